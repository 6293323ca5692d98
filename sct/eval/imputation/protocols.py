"""Imputation of hidden expression, the model beside its baselines (sCT paper, section 4 and appendix C).

Scored are the hidden genes that are expressed: MCC of the level, mean absolute error of the raw count. Since
only those are scored, a method that knows so has an easier task; every method is shown in the form that
chooses among all levels and, where it has one, in the form that is told that the gene is expressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from sct.data.bags import BagSource
from sct.errors import DataError
from sct.eval.imputation import eval_cells as drawing
from sct.eval.imputation.baselines import ImputationMethod, standard_methods
from sct.eval.imputation.eval_cells import EvalCells, Masked
from sct.eval.imputation.scoring import (
    BAG_RANGES,
    OWN_RANGES,
    Draw,
    ImputationModel,
    Probabilities,
    ProtocolResult,
    ScoreRow,
    Setting,
    measure,
)
from sct.eval.reports.report import Report
from sct.progress import progress

RATIOS = (0.15, 0.30, 0.40, 0.80)
CELL_SHARES = (1 / 50, 10 / 50, 20 / 50, 40 / 50)  # the paper's bags have 50 cells
SPARSITY_GROUPS = {"low": (0.0, 0.75), "medium": (0.75, 0.90), "high": (0.90, 0.95), "very high": (0.95, 1.0)}


def _run(
    eval_cells: EvalCells,
    methods: Sequence[ImputationMethod],
    settings: Sequence[tuple[str, Sequence[Callable[[], Draw]]]],
    description: str,
) -> list[tuple[str, dict[str, list[ScoreRow]], dict[str, list[int]]]]:
    """Measure one setting after the other, under one display of progress."""
    units = sum(eval_cells.num_bags if isinstance(method, ImputationModel) else 1 for method in methods)
    total = units * sum(len(draws) for _, draws in settings)
    with progress(description, total) as bar:
        return [(name, *measure(eval_cells, methods, draws, bar.update)) for name, draws in settings]


def _methods(
    eval_cells: EvalCells, model: ImputationMethod | None, train: BagSource | None, **options: bool
) -> list[ImputationMethod]:
    reference, *others = standard_methods(eval_cells, train, **options)
    return [reference, *([] if model is None else [model]), *others]


def _by_amount(
    eval_cells: EvalCells,
    methods: Sequence[ImputationMethod],
    mask: Callable[[EvalCells, Any, int], Masked],
    titles: Mapping[Any, str],
    seeds: int,
    description: str,
    ranges: str = OWN_RANGES,
) -> list[Setting]:
    """A setting for each amount that is masked (amount -> title), whose positions are scored together."""

    def draw(amount: Any, seed: int) -> Draw:
        masked = mask(eval_cells, amount, seed)
        return masked, {"": np.ones(len(masked.cells), bool)}

    asked = [
        (title, [partial(draw, amount, seed) for seed in range(seeds)]) for amount, title in titles.items()
    ]
    measured = _run(eval_cells, methods, asked, description)
    return [
        Setting(title, amount, rows[""], positions[""], ranges=ranges)
        for amount, (title, rows, positions) in zip(titles, measured, strict=True)
    ]


def gene_imputation(
    eval_cells: EvalCells,
    model: ImputationMethod | None,
    train: BagSource | None = None,
    *,
    ratios: Sequence[float] = RATIOS,
    seeds: int = 5,
    magic: bool = True,
    cells_name: str = "held-out cells",
) -> ProtocolResult:
    """Imputation of genes masked at random (sCT paper, section 4, Table 1).

    In every cell a share of all genes is masked, whatever their level.

    Parameters
    ----------
    eval_cells
        Cells.
    model
        Usually a `ImputationModel`; None for the baselines alone.
    train
        Exhaustive bags of the studies that the model was trained on, or None.
    ratios
        Shares of genes masked.
    seeds
        Draws, with seeds 0 .. seeds - 1.
    magic
        Whether MAGIC is among the baselines.
    cells_name
        What the titles call the cells.
    """
    methods = _methods(eval_cells, model, train, magic=magic)
    titles = {ratio: f"Imputation of {ratio:.0%} masked genes, {cells_name}" for ratio in ratios}
    settings = _by_amount(eval_cells, methods, drawing.mask_ratio, titles, seeds, "imputing masked genes")
    return ProtocolResult("gene imputation", "ratio", settings)


def cells_to_mask(cells_per_bag: int) -> tuple[int, ...]:
    """Numbers of cells of a bag that are masked: the paper's 1, 10, 20, 40 of 50, in proportion.

    Raises
    ------
    DataError
        Bags of one cell, of which no other is left to learn from.
    """
    if cells_per_bag < 2:
        raise DataError(
            f"bags have {cells_per_bag} cell, but masking whole cells needs others beside them: use bags of 2 or more."
        )
    numbers = [min(max(1, round(share * cells_per_bag)), cells_per_bag - 1) for share in CELL_SHARES]
    return tuple(dict.fromkeys(numbers))


def whole_cell_imputation(
    eval_cells: EvalCells,
    model: ImputationMethod | None,
    train: BagSource | None = None,
    *,
    numbers: Sequence[int] = (),
    seeds: int = 5,
    magic: bool = True,
    cells_name: str = "held-out cells",
) -> ProtocolResult:
    """Imputation of whole cells from the others of their bag (sCT paper, section 4, Table 2).

    No method is told the size of a masked cell, see `sct.eval.imputation.eval_cells.shown_ranges`.

    Parameters
    ----------
    numbers
        Cells masked in each bag of K; empty for the paper's shares, see `cells_to_mask`. A bag that lacks
        cells has the same share masked.
    eval_cells, model, train, seeds, magic, cells_name
        See `gene_imputation`. MAGIC needs visible genes of a cell: its row says so.

    Raises
    ------
    DataError
        A number that leaves no cell, or bags of one cell.
    """
    whole = eval_cells.cells_per_bag
    numbers = tuple(numbers) or cells_to_mask(whole)
    for number in numbers:
        if not 0 < number < whole:
            raise DataError(
                f"{number} cells of a bag are to be masked, but bags have {whole}: mask 1 to {whole - 1}."
            )
    methods = _methods(eval_cells, model, train, whole_cells=True, magic=magic)
    titles = {number: f"Imputation of {number} of {whole} cells, {cells_name}" for number in numbers}
    settings = _by_amount(
        eval_cells, methods, drawing.mask_cells, titles, seeds, "imputing whole cells", BAG_RANGES
    )
    return ProtocolResult("whole-cell imputation", "cells", settings)


def sparsity_groups(eval_cells: EvalCells) -> dict[str, np.ndarray]:
    """Genes of each group of sparsity (sCT paper, appendix C.1), as gene positions.

    Sparsity is the share of cells without a count of the gene, of those whose study measured it. Genes that
    no cell expresses belong to no group.
    """
    cells = np.bincount(eval_cells.study, minlength=len(eval_cells.measured)) @ eval_cells.measured
    is_target = np.bincount(eval_cells.counts.indices, minlength=eval_cells.tokens.shape[1])
    expressed = eval_cells.frequencies[:, :, 1 : eval_cells.num_bins].sum(axis=(0, 2)) > 0
    sparsity = np.where(expressed, 1 - is_target / np.maximum(cells, 1), np.nan)
    last = list(SPARSITY_GROUPS)[-1]
    return {
        name: np.flatnonzero((sparsity >= low) & ((sparsity < high) | (name == last)))
        for name, (low, high) in SPARSITY_GROUPS.items()
    }


def fixed_gene_imputation(
    eval_cells: EvalCells,
    model: ImputationMethod | None,
    train: BagSource | None = None,
    *,
    per_group: int = 25,
    seeds: int = 5,
    magic: bool = True,
    cells_name: str = "held-out cells",
) -> ProtocolResult:
    """Imputation of genes masked in all cells, by their sparsity (sCT paper, section 4 and appendix C.1).

    For each draw `per_group` genes of each group of sparsity are chosen at random; all of them are masked at
    once, in all cells, and each group is scored by itself. Other parameters as for `gene_imputation`.
    """
    groups = sparsity_groups(eval_cells)
    methods = _methods(eval_cells, model, train, magic=magic)

    def draw(seed: int) -> Draw:
        rng = np.random.default_rng(seed)
        chosen = {
            name: rng.choice(genes, min(per_group, len(genes)), replace=False)
            for name, genes in groups.items()
        }
        masked = drawing.mask_genes(eval_cells, np.concatenate(list(chosen.values())))
        return masked, {name: np.isin(masked.genes, genes) for name, genes in chosen.items()}

    draws = [lambda seed=seed: draw(seed) for seed in range(seeds)]
    ((_, tables, positions),) = _run(eval_cells, methods, [("", draws)], "imputing fixed genes")
    settings = []
    for name, genes in groups.items():
        low, high = SPARSITY_GROUPS[name]
        number = min(per_group, len(genes))
        notes: tuple[str, ...] = ()
        if len(genes) < per_group:
            notes = (f"The cells have {len(genes)} genes of this sparsity, fewer than {per_group}.",)
        rows = tables[name]
        if not len(genes):
            methods_once = dict.fromkeys((row.key, row.method, row.fitted_on) for row in rows)
            rows = [
                ScoreRow(method, fitted_on, None, "no gene of this sparsity", key=key)
                for key, method, fitted_on in methods_once
            ]
        title = (
            f"Imputation of {number} fixed genes of {name} sparsity ({low:.0%} to {high:.0%}), {cells_name}"
        )
        settings.append(Setting(title, name, rows, positions[name], notes))
    return ProtocolResult("fixed-gene imputation", "sparsity", settings)


class GeneImputation:
    """`gene_imputation` at one ratio, as the measurement after training; without MAGIC.

    Parameters
    ----------
    probabilities, odds
        See `ImputationModel`.
    train, eval_cells
        Exhaustive bags with counts: what baselines are fitted on, and what is scored.
    split
        Name of the held-out split, for the title.
    ratio, seeds
        Share of genes masked; number of draws of the masked positions, over which the spread is given.
    max_bags
        Bags scored, spread evenly over the held-out ones; 0 for all.
    """

    name = "imputation"

    def __init__(
        self,
        probabilities: Probabilities,
        train: BagSource,
        eval_cells: BagSource,
        split: str = "test",
        ratio: float = 0.15,
        seeds: int = 5,
        max_bags: int = 0,
        odds: float = 1.0,
    ):
        self.train, self.eval_cells, self.split = train, eval_cells, split
        self.ratio, self.seeds, self.max_bags, self.odds = ratio, seeds, max_bags, odds
        self._probabilities = jax.jit(probabilities)
        self.report: Report | None = None

    def __call__(self, variables: Any) -> Iterator[tuple[str, float]]:
        """Measure; yields the numbers of the table and keeps it in `report`."""
        outcome = gene_imputation(
            EvalCells.read(self.eval_cells, self.max_bags),
            ImputationModel(self._probabilities, variables, odds=self.odds),
            self.train,
            ratios=(self.ratio,),
            seeds=self.seeds,
            magic=False,
            cells_name=f"{self.split} cells",
        )
        (self.report,) = outcome.reports
        for row in outcome.settings[0].rows:
            for name in ("mcc", "delta_mcc", "mae", "msle") if row.mcc else ():
                yield f"{row.label}/{name}", float(np.mean(getattr(row, name)))
