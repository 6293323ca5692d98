"""Evaluate generated perturbed cells: compare the mean expression, and its change, with that of real cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from sct.data.gene_selection import variable_genes
from sct.errors import DataError
from sct.eval import metrics
from sct.eval.generation.cells import GENERATED, REAL, SHUFFLED, GenerationOptions, _split
from sct.eval.generation.measures import CellSet, correlations, mean_profiles
from sct.eval.reports.report import CONTROL, MODEL, Report
from sct.extras import load_extra
from sct.progress import track

NO_CHANGE = "training cells of the opposite condition"


def chosen_genes(expression: Any, number: int = 5000, *, log_base: float = 10.0) -> np.ndarray:
    """Select the most variable genes of log-transformed expression (N, G), and return their column numbers.

    Parameters
    ----------
    expression
        (N, G) log-transformed expression.
    number
        Number of genes; 0 returns all genes.
    log_base
        Base of the logarithm.

    Raises
    ------
    MissingExtraError
        scanpy is not installed.
    """
    if not number or number >= expression.shape[1]:
        return np.arange(expression.shape[1])
    with metrics.quiet():
        return variable_genes(expression.astype(np.float32), number, log_base=log_base)


def differential_genes(cells: Any, opposite: Any, number: int = 20) -> np.ndarray:
    """Return the column numbers of the genes whose expression differs most, up or down, between two sets of cells.

    Genes are ranked by the absolute score of scanpy's Wilcoxon rank-sum test with tie correction.

    Parameters
    ----------
    cells, opposite
        (N, G) and (M, G) expression.
    number
        Number of genes.

    Returns
    -------
    int (number,) column numbers; the array is shorter if there are fewer than `number` genes.

    Raises
    ------
    MissingExtraError
        scanpy is not installed.
    """
    scanpy = load_extra("scanpy", "analysis")
    from anndata import AnnData

    with metrics.quiet():
        both = sparse.vstack([sparse.csr_matrix(cells), sparse.csr_matrix(opposite)], format="csr")
        adata = AnnData(both.astype(np.float32))
        adata.obs["set"] = pd.Categorical(["cells"] * cells.shape[0] + ["opposite"] * opposite.shape[0])
        scanpy.tl.rank_genes_groups(
            adata,
            "set",
            groups=["cells"],
            reference="opposite",
            method="wilcoxon",
            tie_correct=True,
            rankby_abs=True,
            n_genes=min(number, adata.n_vars),
        )
    return np.asarray(adata.uns["rank_genes_groups"]["names"]["cells"]).astype(int)


PERTURBATION = ("Pearson", "top DE Pearson", "Spearman", "top DE Spearman")
PERTURBATION_COLUMNS = (*PERTURBATION, *(f"Δ {name}" for name in PERTURBATION))


def perturbation_correlations(
    generated: CellSet,
    real: CellSet,
    training: CellSet,
    opposite: Mapping[Any, Any],
    *,
    genes: np.ndarray | None = None,
    differential: Mapping[Any, np.ndarray],
) -> pd.DataFrame:
    """Correlate mean expression profiles of generated and real cells for conditions absent from the training cells.

    See Cell2Sentence, section 4.2, Table 2.

    Parameters
    ----------
    generated, real, training
        Cells with their conditions as labels. The training cells must not include the evaluated conditions.
    opposite
        Dict from each evaluated condition to its opposite condition, such as the control. The training cells must
        include the opposite condition.
    genes
        Column numbers of the genes to use, such as those that `chosen_genes` returns for the training cells; None for
        all genes.
    differential
        Dict from each condition to the column numbers of its differential genes.

    Returns
    -------
    Table with one row per condition and the columns `PERTURBATION_COLUMNS`. The values are correlations in [-1, 1] over
    `genes` and over the differential genes. The best value is 1. NaN means that a profile is constant. In the Δ
    columns, the mean training profile of the opposite condition is first subtracted from both profiles.
    """
    profiles = [mean_profiles(each.expression, each.labels) for each in (generated, real, training)]
    chosen = slice(None) if genes is None else genes
    rows = {}
    for condition, other in opposite.items():
        made, true = (table.loc[condition].to_numpy() for table in profiles[:2])
        base = profiles[2].loc[other].to_numpy()
        cells: list[float] = []
        for shift in (np.zeros_like(base), base):
            whole, top = (
                correlations((true - shift)[at], (made - shift)[at])
                for at in (chosen, differential[condition])
            )
            cells += [whole.pearson, top.pearson, whole.spearman, top.spearman]
        rows[condition] = cells
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(PERTURBATION_COLUMNS))


def compare_perturbations(
    generated: CellSet,
    real: CellSet,
    training: CellSet,
    opposite: Mapping[Any, Any],
    options: GenerationOptions | None = None,
) -> tuple[Report, metrics.MetricDraws]:
    """Compare cells generated for unseen conditions with real cells and controls.

    See Cell2Sentence, section 4.2, Table 2. Cells are drawn as in `sct.eval.generation.cells.compare`. Variable genes
    are selected in the training cells. The differential genes of a condition are those whose expression differs most
    between the reference real cells and the training cells of the opposite condition. The rows of the table are:

    - the generated cells, and the same cells with shuffled conditions (control);
    - other real cells, which show the best values a generator can reach;
    - the training cells of the opposite condition, which predict no effect, so their Δ columns are undefined.

    Parameters
    ----------
    generated, real, training, opposite
        See `perturbation_correlations`.
    options
        See `GenerationOptions`.

    Returns
    -------
    The report, with means over conditions, and a nested dict of all numbers: {row name: {column: [one value per
    seed]}}.

    Raises
    ------
    DataError
        A condition has fewer than two real cells or no generated cell, or its opposite condition has fewer than two
        training cells.
    MissingExtraError
        scanpy is not installed.
    """
    options = options or GenerationOptions()
    for condition, other in opposite.items():
        for cells, label, least, what in (
            (generated, condition, 1, "generated"),
            (real, condition, 2, "real"),
            (training, other, 2, "training"),
        ):
            if (number := int((cells.labels == label).sum())) < least:
                raise DataError(
                    f"condition {label!r} has {number} {what} cells, but at least {least} are needed: add "
                    "cells of this condition or leave the condition out."
                )
    genes = chosen_genes(training.expression, options.variable_genes, log_base=options.log_base)
    names = (GENERATED, SHUFFLED, REAL, NO_CHANGE)
    numbers: metrics.MetricDraws = {name: {column: [] for column in PERTURBATION_COLUMNS} for name in names}
    for seed in track(range(options.seeds), "measuring perturbations"):
        reference, made, others = _split(generated, real, list(opposite), options, seed)
        differential = {
            condition: genes[
                differential_genes(
                    reference.expression[reference.labels == condition][:, genes],
                    training.expression[training.labels == other][:, genes],
                    options.differential_genes,
                )
            ]
            for condition, other in opposite.items()
        }
        base = [np.flatnonzero(training.labels == other) for other in opposite.values()]
        unchanged = CellSet(
            training.expression[np.concatenate(base)],
            np.repeat(np.array(list(opposite), dtype=object), [len(rows) for rows in base]),
        )
        mixed = np.random.default_rng([seed, 1]).permutation(made.labels)
        sets = (made, dataclasses.replace(made, labels=mixed), others, unchanged)
        for name, cells in zip(names, sets, strict=True):
            table = perturbation_correlations(
                cells, reference, training, opposite, genes=genes, differential=differential
            )
            for column, value in table.mean().items():
                numbers[name][str(column)].append(float(value))
    report = Report(
        f"{len(opposite)} unseen conditions, {len(generated):,} generated cells",
        ("cells", *PERTURBATION_COLUMNS),
        notes=(
            f"Means over conditions, for {len(genes):,} genes. Top DE: the {options.differential_genes} genes that "
            "differ most between the real cells and the training cells of the opposite condition.",
            "Δ: the mean training profile of the opposite condition is subtracted from both profiles first.",
        ),
    )
    for name in names:
        row_key = {GENERATED: MODEL, SHUFFLED: CONTROL, REAL: CONTROL}.get(name, "")
        report.add(name, *numbers[name].values(), key=row_key)
    return report, numbers
