"""Compare a model with baselines on imputation of masked genes and cells (sCT paper, section 4 and appendix C).

The metrics are the MCC of the expression level and the mean absolute error of the raw count. Only masked genes that are
expressed are scored. A method that knows that these genes are expressed (*given expressed*) has an easier task.
Therefore a method can have two rows in the table. In one row, the method chooses among all levels. In the other row,
the method knows that the gene is expressed.
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
    """Score all methods in several settings, such as masked fractions.

    Each setting is given as (title, draws). For each setting, return the title, the table rows and the numbers of
    scored (cell, gene) pairs. All settings share one progress bar.
    """
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
    """Score all methods, and return one `Setting` for each masked fraction or number of masked cells.

    The fractions or numbers are the keys of `titles`.
    """

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
    """Evaluate imputation of randomly masked genes (sCT paper, section 4, Table 1).

    In every cell, a fraction of the measured genes is masked at random. The masking does not depend on the expression
    level.

    Parameters
    ----------
    eval_cells
        Cells to score.
    model
        Usually an `ImputationModel`; None to score only the baselines.
    train
        Bags of the studies that the model was trained on, or None. Some baselines are fitted on these bags. All bags
        together contain each cell exactly once (`BagSource` with `exhaustive=True`).
    ratios
        Fractions of the measured genes to mask; each fraction has its own table.
    seeds
        Number of random masks per ratio. The masks have the seeds 0 to `seeds` - 1.
    magic
        Whether MAGIC is one of the baselines.
    cells_name
        Name of the cells in the table titles.

    Returns
    -------
    ProtocolResult with one setting per ratio.
    """
    methods = _methods(eval_cells, model, train, magic=magic)
    titles = {ratio: f"Imputation of {ratio:.0%} masked genes, {cells_name}" for ratio in ratios}
    settings = _by_amount(eval_cells, methods, drawing.mask_ratio, titles, seeds, "imputing masked genes")
    return ProtocolResult("gene imputation", "ratio", settings)


def cells_to_mask(cells_per_bag: int) -> tuple[int, ...]:
    """Return the numbers of cells to mask in a bag: 1, 10, 20 and 40 of 50 cells, scaled to the bag size.

    Raises
    ------
    DataError
        `cells_per_bag` is 1, so no visible cell would remain.
    """
    if cells_per_bag < 2:
        raise DataError(
            f"`cells_per_bag` is {cells_per_bag}, but whole-cell imputation needs at least one masked and one "
            "visible cell in a bag: set `cells_per_bag` to 2 or more."
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
    """Evaluate imputation of whole cells from the other cells of their bag (sCT paper, section 4, Table 2).

    No method knows the library size of a masked cell; see `sct.eval.imputation.eval_cells.shown_ranges`.

    Parameters
    ----------
    numbers
        Numbers of cells to mask in each bag of K cells; each number has its own table. Default: the numbers that
        `cells_to_mask` returns. In a bag with fewer than K cells, the same fraction of the cells is masked.
    eval_cells, model, train, seeds, magic, cells_name
        See `gene_imputation`. MAGIC needs visible genes in each cell, so the row of MAGIC has no numbers and gives this
        reason.

    Returns
    -------
    ProtocolResult with one setting per number of masked cells.

    Raises
    ------
    DataError
        A number is not in 1 .. K - 1, or bags have one cell.
    """
    whole = eval_cells.cells_per_bag
    numbers = tuple(numbers) or cells_to_mask(whole)
    for number in numbers:
        if not 0 < number < whole:
            raise DataError(
                f"`numbers` contains {number}, but a bag has {whole} cells and at least one of them must stay "
                f"visible: choose numbers of masked cells from 1 to {whole - 1}."
            )
    methods = _methods(eval_cells, model, train, whole_cells=True, magic=magic)
    titles = {number: f"Imputation of {number} of {whole} cells, {cells_name}" for number in numbers}
    settings = _by_amount(
        eval_cells, methods, drawing.mask_cells, titles, seeds, "imputing whole cells", BAG_RANGES
    )
    return ProtocolResult("whole-cell imputation", "cells", settings)


def sparsity_groups(eval_cells: EvalCells) -> dict[str, np.ndarray]:
    """Return the vocabulary positions of the genes in each sparsity group (sCT paper, appendix C.1).

    The sparsity of a gene is the fraction of cells with zero counts, among the cells whose study measured the gene.
    Genes that no cell expresses are in no group.
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
    """Evaluate imputation of genes that are masked in all cells (sCT paper, section 4 and appendix C.1).

    Genes are grouped by their sparsity (see `sparsity_groups`). In each draw, `per_group` random genes are chosen from
    each group. All chosen genes are masked together, in all cells, and each group is scored separately.

    Parameters
    ----------
    per_group
        Number of genes masked in each sparsity group.
    eval_cells, model, train, seeds, magic, cells_name
        See `gene_imputation`.

    Returns
    -------
    ProtocolResult with one setting per sparsity group.
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
    """Run `gene_imputation` for one fraction of masked genes after training, without the baseline MAGIC.

    Parameters
    ----------
    probabilities, odds
        See `ImputationModel`.
    train, eval_cells
        Bags with raw counts. All bags together contain each cell exactly once. The baselines are fitted on `train`, and
        `eval_cells` is scored.
    split
        Name of the held-out split, for the title.
    ratio, seeds
        Fraction of genes masked, and number of random masks.
    max_bags
        Maximum number of bags to score, spread evenly over `eval_cells`; 0 for all.
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
        """Evaluate the model, yield all metrics as (name, value) pairs, and store the table in `report`."""
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
