"""Cells to impute, and one draw of what is hidden of them: the same positions for every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sct.data import masking
from sct.data.bags import BagSource
from sct.data.loader import spread
from sct.data.tokenize import level_values
from sct.errors import ConfigError
from sct.progress import track

# Gene positions that are drawn, or given to a model, at once where nothing else is asked: a full bag alone,
# many small ones together.
POSITIONS_AT_ONCE = 2**18

# (key, tokens (B, K, P), amount, num_bins) -> mask (B, K, P), see `sct.data.masking`.
Rule = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class BagBatch:
    """Some consecutive bags: their `numbers` (B,), their `cells`, and the place (`record`, `slot`) of each."""

    numbers: np.ndarray
    cells: slice
    bag: np.ndarray
    slot: np.ndarray


@dataclasses.dataclass(frozen=True)
class EvalCells:
    """Cells that are scored, all in memory, bag after bag; absent cells of a bag are not among them.

    Attributes
    ----------
    tokens
        uint8 (N, P) levels; PAD = `num_bins` beyond the vocabulary.
    counts
        Raw counts, CSR float32 (N, P).
    low, high
        float32 (N,) range of each cell, see `sct.data.tokenize.Bins`.
    medians, means
        float32 (N, num_bins) raw counts that stand for the levels of each cell. These and the ranges tell
        the size of a cell: methods take those of `Masked`.
    coordinates
        float32 (N, 2) rescaled positions, NaN for cells of studies without any; None where no study has any.
    record, slot
        int (N,) number of each cell's bag in its source, ascending, and the cell's place in the bag.
    study
        int (N,) number of each cell's study.
    measured
        bool (studies, P): genes that a study measured.
    cells_per_bag, num_bins
        K, and levels, zero included.
    spatial
        Whether the model is given the coordinates.
    """

    tokens: np.ndarray
    counts: sparse.csr_matrix
    low: np.ndarray
    high: np.ndarray
    medians: np.ndarray
    means: np.ndarray
    coordinates: np.ndarray | None
    bag: np.ndarray
    slot: np.ndarray
    study: np.ndarray
    measured: np.ndarray
    cells_per_bag: int
    num_bins: int
    spatial: bool = False

    @classmethod
    def read(cls, source: BagSource, max_bags: int = 0) -> EvalCells:
        """Read at most `max_bags` bags, spread evenly over the source (0: all of them).

        Raises
        ------
        ConfigError
            The source gives no raw counts, or may give a cell twice (its copy would tell the answer).
        """
        options = source.options
        if not (options.with_counts and source.exhaustive):
            raise ConfigError(
                "bags without raw counts, or with a cell in several of them, cannot be scored: make them with "
                "with_counts=True and exhaustive=True."
            )
        coordinates = {
            index: study.rescaled_coordinates() for index, study in enumerate(source.studies) if study.spatial
        }
        parts: dict[str, list[Any]] = {}
        for number in track(spread(len(source), max_bags), "reading cells"):
            bag, (index, _) = source.record(number), source.locate(number)
            (slot,) = np.nonzero(bag["rows"] >= 0)
            part = {name: bag[name][slot] for name in ("tokens", "low", "high", "medians", "means")}
            part |= {"slot": slot, "bag": np.full(len(slot), number), "study": np.full(len(slot), index)}
            part["counts"] = sparse.csr_matrix(bag["counts"][slot])
            if coordinates:
                nowhere = np.full((len(slot), 2), np.nan, np.float32)
                part["coordinates"] = (
                    coordinates[index][bag["rows"][slot]] if index in coordinates else nowhere
                )
            for name, value in part.items():
                parts.setdefault(name, []).append(value)
        counts = sparse.vstack(parts.pop("counts"), format="csr")
        whole: dict[str, Any] = {name: np.concatenate(values) for name, values in parts.items()}
        measured = np.zeros((len(source.studies), options.num_positions), bool)
        for row, study in zip(measured, source.studies, strict=True):
            row[: study.n_genes] = study.measured
        return cls(
            **{"coordinates": None, **whole},
            counts=counts,
            measured=measured,
            cells_per_bag=options.cells_per_bag,
            num_bins=options.num_bins,
            spatial=options.spatial,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def eligible(self) -> np.ndarray:
        """Positions (N, P) that may be hidden: as in training, neither padding nor a gene that was not measured."""
        return self.measured[self.study] & (self.tokens < self.num_bins)

    @cached_property
    def frequencies(self) -> np.ndarray:
        """Number of cells of each study that have each gene at each level, int32 (studies, P, num_bins)."""
        out = np.zeros((*self.measured.shape, self.num_bins), np.int32)
        for index in np.unique(self.study):
            tokens = self.tokens[self.study == index]
            for level in range(self.num_bins):
                out[index, :, level] = (tokens == level).sum(axis=0)
        return out

    @cached_property
    def _starts(self) -> np.ndarray:
        """First cell of each bag, and the number of cells."""
        return np.append(np.flatnonzero(np.diff(self.bag, prepend=-1)), len(self))

    @property
    def num_bags(self) -> int:
        """Number of bags."""
        return len(self._starts) - 1

    def batches(self, bags_per_batch: int = 0) -> Iterator[BagBatch]:
        """All bags in order, `bags_per_batch` at once (0: as many as fit into a modest size)."""
        if not bags_per_batch:
            bags_per_batch = max(1, POSITIONS_AT_ONCE // (self.cells_per_bag * self.tokens.shape[1]))
        size = min(bags_per_batch, self.num_bags)
        for first in range(0, self.num_bags, size):
            starts = self._starts[first : first + size + 1]
            cells = slice(int(starts[0]), int(starts[-1]))
            # The last batch repeats its last number for the bags that it lacks, which hold no cell.
            numbers = np.resize(self.bag[starts[:-1]], len(starts) - 1)
            numbers = np.pad(numbers, (0, size - len(numbers)), mode="edge")
            bag = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            yield BagBatch(numbers, cells, bag, self.slot[cells])

    def padded(self, batch: BagBatch, values: np.ndarray, fill: Any) -> np.ndarray:
        """Bags (B, K, ...) of the cells' `values` (N, ...), with `fill` where a bag has no cell."""
        shape = (len(batch.numbers), self.cells_per_bag, *values.shape[1:])
        out = np.full(shape, fill, values.dtype)
        out[batch.bag, batch.slot] = values[batch.cells]
        return out


def pick(matrix: sparse.csr_matrix, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Entries (n,) of a matrix at `rows`, ascending, and `columns`, float32."""
    out = np.zeros(len(rows), np.float32)
    step = max(1, POSITIONS_AT_ONCE // max(matrix.shape[1], 1))
    # Dense blocks: looking up millions of single entries of a sparse matrix takes far longer.
    for first in range(0, matrix.shape[0], step):
        part = slice(*np.searchsorted(rows, [first, first + step]))
        if part.start < part.stop:
            block = np.asarray(matrix[first : first + step].toarray(), np.float32)
            out[part] = block[rows[part] - first, columns[part]]
    return out


def shown_ranges(
    eval_cells: EvalCells, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Low and high (N,), and medians and means of levels (N, num_bins), of each cell, as methods may know them.

    A cell of which some gene is shown has its own. One that is hidden as a whole has the mean of the shown
    cells of its bag (of all bags, where its bag shows none), so that nothing of its size is told. Where no
    cell at all is shown, what is asked for is genes and not cells, and each cell has its own.
    """
    own = np.column_stack([eval_cells.low, eval_cells.high, eval_cells.medians, eval_cells.means])
    shown = (~mask & eval_cells.eligible).any(axis=1)
    if shown.any() and not shown.all():
        _, bag = np.unique(eval_cells.bag, return_inverse=True)
        number = np.bincount(bag[shown], minlength=eval_cells.num_bags)
        means = np.zeros((len(number), own.shape[1]))
        np.add.at(means, bag[shown], own[shown])
        means /= np.maximum(number, 1)[:, None]
        means[number == 0] = own[shown].mean(axis=0, dtype=np.float64)
        own[~shown] = means[bag[~shown]]
    medians, means = np.split(own[:, 2:], 2, axis=1)
    return own[:, 0], own[:, 1], medians, means


@dataclasses.dataclass(frozen=True)
class Masked:
    """One draw of what is hidden, and the truth of what is scored: by default, hidden genes that are expressed.

    Attributes
    ----------
    mask
        bool (N, P): hidden positions, whatever their level; PAD is never hidden.
    shown
        bool (N, P): positions of measured genes that are not hidden.
    visible
        Raw counts that are not hidden, CSR float32 (N, P): all that a method may look at.
    cells, genes
        (n,) scored positions, by cell.
    levels, counts
        (n,) their true levels, uint8, and raw counts, float32.
    low, high, medians, means
        Ranges (N,), and medians and means of levels (N, num_bins), as methods may know them, float32, see
        `shown_ranges`.
    """

    mask: np.ndarray
    shown: np.ndarray
    visible: sparse.csr_matrix
    cells: np.ndarray
    genes: np.ndarray
    levels: np.ndarray
    counts: np.ndarray
    low: np.ndarray
    high: np.ndarray
    medians: np.ndarray
    means: np.ndarray

    @classmethod
    def of(
        cls, eval_cells: EvalCells, mask: np.ndarray, scored: tuple[np.ndarray, np.ndarray] | None = None
    ) -> Masked:
        """Hide the positions of `mask` (N, P); score those that are expressed, or `scored` (cells, genes), by cell."""
        tokens, all_counts = eval_cells.tokens, eval_cells.counts
        mask = mask & (tokens < eval_cells.num_bins)
        cells, genes = np.nonzero(mask & (tokens > 0)) if scored is None else scored
        rows = np.repeat(np.arange(len(eval_cells)), np.diff(all_counts.indptr))
        shown = ~mask[rows, all_counts.indices]
        ends = np.append(0, np.cumsum(shown))[all_counts.indptr]
        visible = sparse.csr_matrix(
            (all_counts.data[shown], all_counts.indices[shown], ends), all_counts.shape
        )
        return cls(
            mask,
            eval_cells.eligible & ~mask,
            visible,
            cells,
            genes,
            tokens[cells, genes],
            pick(all_counts, cells, genes),
            *shown_ranges(eval_cells, mask),
        )


@partial(jax.jit, static_argnames=("rule", "num_bins"))
def _masks(
    rule: Rule, seed: Any, numbers: jax.Array, tokens: jax.Array, amounts: jax.Array, num_bins: int
) -> jax.Array:
    def one(number: Any, bag: Any, amount: Any) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), number)
        return rule(key, bag[None], amount, num_bins)[0]

    return jax.vmap(one)(numbers, tokens, amounts)


def _draw(eval_cells: EvalCells, rule: Rule, seed: int, amounts: np.ndarray) -> np.ndarray:
    """Mask (N, P) of measured genes, bag by bag, `amounts` one of each.

    The key of a bag comes from the seed and the bag's number alone.
    """
    tokens = np.where(
        eval_cells.eligible, eval_cells.tokens, np.asarray(eval_cells.num_bins, eval_cells.tokens.dtype)
    )
    mask = np.zeros(tokens.shape, bool)
    position = np.searchsorted(np.unique(eval_cells.bag), eval_cells.bag)
    for batch in eval_cells.batches():
        amount = np.zeros(len(batch.numbers), amounts.dtype)
        amount[batch.bag] = amounts[position[batch.cells]]
        given = eval_cells.padded(batch, tokens, eval_cells.num_bins)
        made = _masks(rule, seed, batch.numbers, given, amount, eval_cells.num_bins)
        mask[batch.cells] = np.asarray(made)[batch.bag, batch.slot]
    return mask


def mask_ratio(eval_cells: EvalCells, ratio: float, seed: int) -> Masked:
    """Hide exactly round(`ratio` x n) of the n measured genes of each cell, expressed or not."""
    amounts = np.full(eval_cells.num_bags, ratio, np.float32)
    return Masked.of(eval_cells, _draw(eval_cells, masking.exact_ratio, seed, amounts))


def mask_measured(eval_cells: EvalCells, ratio: float, seed: int, most: int) -> Masked:
    """Hide exactly round(`ratio` x n) of the n measured genes of each cell, and score them all, expressed or not.

    If more than `most` positions are hidden, a random draw of `most` of them is scored. `means` are those of the
    visible genes of each cell.
    """
    amounts = np.full(eval_cells.num_bags, ratio, np.float32)
    return _all_scored(eval_cells, _draw(eval_cells, masking.exact_ratio, seed, amounts), seed, most)


def mask_measured_genes(eval_cells: EvalCells, ratio: float, seed: int, most: int) -> Masked:
    """Hide round(`ratio` x n) of the n genes that were measured, in all cells; else as `mask_measured`."""
    genes = np.flatnonzero(eval_cells.measured.any(axis=0))
    hidden = np.zeros(eval_cells.tokens.shape[1], bool)
    hidden[np.random.default_rng(seed).choice(genes, round(ratio * len(genes)), replace=False)] = True
    return _all_scored(eval_cells, hidden & eval_cells.eligible, seed, most)


def _all_scored(eval_cells: EvalCells, mask: np.ndarray, seed: int, most: int) -> Masked:
    """Score hidden positions of any level; what stands for a level are counts of visible genes."""
    places = np.flatnonzero(mask)
    if len(places) > most:
        places = np.sort(np.random.default_rng(seed).choice(places, most, replace=False))
    masked = Masked.of(eval_cells, mask, np.divmod(places, mask.shape[1]))
    # As `sct.tl.impute`: what stands for a level are the counts of the genes that are shown.
    shown = masked.visible
    rows = np.repeat(np.arange(len(eval_cells)), np.diff(shown.indptr))
    levels = eval_cells.tokens[rows, shown.indices]
    used = levels > 0  # noise is read as unexpressed
    _, means = level_values(
        rows[used], levels[used], shown.data[used], masked.low, masked.high, eval_cells.num_bins
    )
    return dataclasses.replace(masked, means=means)


def mask_cells(eval_cells: EvalCells, num_cells: int, seed: int) -> Masked:
    """Hide all measured genes of `num_cells` of the K cells of each bag.

    A bag that lacks cells hides the same share of those it has, at least one and never all of them; a lone
    cell stays visible.
    """
    present = np.diff(eval_cells._starts)
    hidden = np.round(num_cells * present / eval_cells.cells_per_bag)
    hidden = np.minimum(np.maximum(hidden, 1), present - 1).astype(np.int32)
    return Masked.of(eval_cells, _draw(eval_cells, masking.whole_cells, seed, hidden))


def mask_genes(eval_cells: EvalCells, genes: np.ndarray) -> Masked:
    """Hide the gene positions `genes` in all cells that measured them."""
    chosen = np.zeros(eval_cells.tokens.shape[1], bool)
    chosen[genes] = True
    hidden = masking.fixed_genes(jnp.asarray(eval_cells.tokens), jnp.asarray(chosen), eval_cells.num_bins)
    return Masked.of(eval_cells, np.asarray(hidden) & eval_cells.eligible)
