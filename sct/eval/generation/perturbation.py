"""Generated perturbations: mean expression, and its change, on variable and differential genes."""

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
from sct.eval.reports.report import Report
from sct.extras import load_extra
from sct.progress import track

NO_CHANGE = "training cells of the opposite condition"


def chosen_genes(expression: Any, number: int = 5000, *, log_base: float = 10.0) -> np.ndarray:
    """Columns of the most variable genes of cells (N, G) of logarithmic expression; of all for a number of 0.

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
    """Columns (number,) in which two sets of cells (N, G) and (M, G) differ most, up or down.

    By the score of scanpy's Wilcoxon rank-sum test, corrected for ties.

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
    """Agreement of mean profiles under unseen conditions (Cell2Sentence, section 4.2, Table 2).

    Parameters
    ----------
    generated, real, training
        Cells by condition; those of the conditions asked for are not among the training cells.
    opposite
        Condition -> the condition of the training cells that it is compared with (the other exposure, the
        control).
    genes
        Columns that count (`chosen_genes` of the training cells), or None for all.
    differential
        Condition -> columns of its differential genes.

    Returns
    -------
    (conditions, 8) table with `PERTURBATION_COLUMNS`, in [-1, 1], 1 the best: correlations over the genes and
    over the differential ones, then (Δ) the same after the mean training profile of the opposite condition is
    taken from both; NaN where a profile is constant.
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
    """Cells generated for unseen conditions beside a ceiling and controls (Cell2Sentence, section 4.2, Table 2).

    Cells are drawn as in `compare`. The variable genes are those of the training cells; the differential genes
    of a condition are those of the real cells that all rows are compared with, against the training cells of the
    opposite condition. The rows are generated cells, the same with their conditions shuffled, other real
    cells, and the training cells of the opposite condition (no effect is predicted, so that Δ is undefined).

    Parameters
    ----------
    generated, real, training, opposite
        See `perturbation_correlations`.
    options
        See `GenerationOptions`.

    Returns
    -------
    The report of means over conditions, and name of the row -> column -> measurements over seeds.

    Raises
    ------
    DataError
        A condition has fewer than two real cells, no generated cell, or no training cells of its opposite.
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
                raise DataError(f"{label!r} has {number} {what} cells; give {least} or more or leave it out.")
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
            f"Means over conditions, of {len(genes):,} genes; top DE: the {options.differential_genes} that differ "
            "most between the real cells and the training cells of the opposite condition.",
            "Δ: after the mean training profile of the opposite condition is taken away.",
        ),
    )
    for name in names:
        report.add(name, *numbers[name].values())
    return report, numbers
