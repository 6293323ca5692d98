"""Hold the cells on which imputation is evaluated, and draw the random masks that all methods share."""

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

# Default number of gene positions in a batch: one bag of full size, or many small bags.
POSITIONS_AT_ONCE = 2**18

# Function (key, tokens (B, K, P), amount, num_bins) -> mask (B, K, P); see `sct.data.masking`.
Rule = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class BagBatch:
    """Record which cells are in a batch: consecutive bags that are processed together.

    Attributes
    ----------
    numbers
        int (B,) index of each bag in its source.
    cells
        Slice of the rows of `EvalCells` that holds the cells of these bags.
    bag, slot
        int (cells,): for each cell, the index of its bag within the batch, and the index of the cell within its bag.
    """

    numbers: np.ndarray
    cells: slice
    bag: np.ndarray
    slot: np.ndarray


@dataclasses.dataclass(frozen=True)
class EvalCells:
    """Hold all N cells to score in memory, ordered by bag. The empty slots of incomplete bags are not stored.

    Attributes
    ----------
    tokens
        uint8 (N, P): expression level of each gene in each cell. Positions after the last gene of the vocabulary hold
        PAD (= `num_bins`).
    counts
        Raw counts, CSR float32 (N, P).
    low, high
        float32 (N,) lowest and highest non-zero expression value of each cell; see `sct.data.tokenize.Bins`.
    medians, means
        float32 (N, num_bins): median and mean raw count of each expression level in each cell. Ranges, medians and
        means reveal the library size of a cell, so methods must use those of `Masked` instead.
    coordinates
        float32 (N, 2) rescaled spatial coordinates; NaN for cells of studies without coordinates; None if no study has
        coordinates.
    bag, slot
        int (N,): for each cell, the index of its bag in the source, and the index of the cell within its bag. The cells
        are sorted by bag.
    study
        int (N,): index of the study of each cell.
    measured
        bool (studies, P): whether the study measured the gene.
    cells_per_bag, num_bins
        Number of cells per bag (K), and number of expression levels including zero.
    spatial
        Whether the model receives the coordinates.
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
        """Read at most `max_bags` bags, spread evenly over the source; 0 reads all bags.

        Raises
        ------
        ConfigError
            The source has no raw counts, or it may contain a cell twice. A visible copy of a masked cell would reveal
            the masked values.
        """
        options = source.options
        if not (options.with_counts and source.exhaustive):
            raise ConfigError(
                f"the source of the bags has with_counts={options.with_counts} and exhaustive={source.exhaustive}, "
                "but scoring needs raw counts (with_counts=True) and bags that contain each cell once "
                "(exhaustive=True): create the source with both options set to True."
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
        """Return a mask (N, P) of the genes that may be masked in each cell.

        As in training, these are the measured genes.
        """
        return self.measured[self.study] & (self.tokens < self.num_bins)

    @cached_property
    def frequencies(self) -> np.ndarray:
        """For each study and gene, count the cells with each expression level, int32 (studies, P, num_bins)."""
        out = np.zeros((*self.measured.shape, self.num_bins), np.int32)
        for index in np.unique(self.study):
            tokens = self.tokens[self.study == index]
            for level in range(self.num_bins):
                out[index, :, level] = (tokens == level).sum(axis=0)
        return out

    @cached_property
    def _starts(self) -> np.ndarray:
        """Return the row number of the first cell of each bag, followed by the number of all cells."""
        return np.append(np.flatnonzero(np.diff(self.bag, prepend=-1)), len(self))

    @property
    def num_bags(self) -> int:
        """Return the number of bags that contain the cells."""
        return len(self._starts) - 1

    def batches(self, bags_per_batch: int = 0) -> Iterator[BagBatch]:
        """Yield all bags in order, `bags_per_batch` at a time.

        With `bags_per_batch=0`, the number of bags is chosen for a moderate batch size.
        """
        if not bags_per_batch:
            bags_per_batch = max(1, POSITIONS_AT_ONCE // (self.cells_per_bag * self.tokens.shape[1]))
        size = min(bags_per_batch, self.num_bags)
        for first in range(0, self.num_bags, size):
            starts = self._starts[first : first + size + 1]
            cells = slice(int(starts[0]), int(starts[-1]))
            # All batches have the same shape: the last one is filled up with empty copies of its last bag.
            numbers = np.resize(self.bag[starts[:-1]], len(starts) - 1)
            numbers = np.pad(numbers, (0, size - len(numbers)), mode="edge")
            bag = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            yield BagBatch(numbers, cells, bag, self.slot[cells])

    def padded(self, batch: BagBatch, values: np.ndarray, fill: Any) -> np.ndarray:
        """Arrange an array with one entry per cell (N, ...) as bags (B, K, ...). Empty slots of a bag get `fill`."""
        shape = (len(batch.numbers), self.cells_per_bag, *values.shape[1:])
        out = np.full(shape, fill, values.dtype)
        out[batch.bag, batch.slot] = values[batch.cells]
        return out


def pick(matrix: sparse.csr_matrix, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the entries (rows[i], columns[i]) of a matrix, as float32 (n,). `rows` (n,) must be sorted."""
    out = np.zeros(len(rows), np.float32)
    step = max(1, POSITIONS_AT_ONCE // max(matrix.shape[1], 1))
    # Convert blocks to dense: indexing millions of single entries of a sparse matrix is much slower.
    for first in range(0, matrix.shape[0], step):
        part = slice(*np.searchsorted(rows, [first, first + step]))
        if part.start < part.stop:
            block = np.asarray(matrix[first : first + step].toarray(), np.float32)
            out[part] = block[rows[part] - first, columns[part]]
    return out


def shown_ranges(
    eval_cells: EvalCells, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the expression ranges, and the median and mean counts of levels, that imputation methods may use.

    A cell with visible genes keeps its own values. If all genes of a cell are masked, its own values would reveal its
    library size. Such a cell gets the mean values of those cells of its bag that have visible genes. If no cell of the
    bag has visible genes, the mean is taken over all cells with visible genes, from all bags. If no cell has a visible
    gene, the task is to impute genes rather than cells, and each cell keeps its own values.

    Returns
    -------
    Four arrays. `low` and `high` (N,) are the limits of the expression range of each cell. `medians` and `means` (N,
    num_bins) are the median and mean raw count of each expression level in each cell.
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
    """Hold one random mask of the cells, and the true values of the scored (cell, gene) pairs.

    By default, a (cell, gene) pair is scored if the gene is masked and expressed in this cell.

    Attributes
    ----------
    mask
        bool (N, P): whether each gene is masked in each cell; PAD is never masked.
    shown
        bool (N, P): measured genes that are not masked.
    visible
        CSR float32 (N, P): raw counts, except the masked ones. Methods may use only these counts.
    cells, genes
        int (n,): row of the cell, and position of the gene, of each scored (cell, gene) pair. Pairs are sorted by cell.
    levels, counts
        (n,): true expression levels, uint8, and true raw counts, float32, of the scored (cell, gene) pairs.
    low, high, medians, means
        float32: expression range of each cell (N,), and median and mean raw count of each expression level (N,
        num_bins). Methods may use these values; see `shown_ranges`.
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
        """Mask the genes of each cell for which `mask`, bool (N, P), is True.

        `scored` gives the (cell, gene) pairs to score as two arrays (cells, genes), sorted by cell. By default, all
        masked pairs in which the gene is expressed are scored.
        """
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
    """Return a random mask (N, P) of measured genes.

    For each bag, `amounts` holds the fraction of genes to mask or the number of cells to mask. The PRNG key of a bag
    depends only on the seed and on the number of the bag.
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
    """Mask exactly round(`ratio` x n) of the n measured genes of each cell.

    Only the masked genes that are expressed are scored.
    """
    amounts = np.full(eval_cells.num_bags, ratio, np.float32)
    return Masked.of(eval_cells, _draw(eval_cells, masking.exact_ratio, seed, amounts))


def mask_measured(eval_cells: EvalCells, ratio: float, seed: int, most: int) -> Masked:
    """Mask exactly round(`ratio` x n) of the n measured genes of each cell.

    All masked genes are scored, whether they are expressed or not.

    If more than `most` (cell, gene) pairs are masked, a random sample of `most` pairs is scored. The `means` of the
    result are computed from the visible genes of each cell.
    """
    amounts = np.full(eval_cells.num_bags, ratio, np.float32)
    return _all_scored(eval_cells, _draw(eval_cells, masking.exact_ratio, seed, amounts), seed, most)


def mask_measured_genes(eval_cells: EvalCells, ratio: float, seed: int, most: int) -> Masked:
    """Mask the same round(`ratio` x n) of the n measured genes in all cells.

    All masked genes are scored, whether they are expressed or not.
    """
    genes = np.flatnonzero(eval_cells.measured.any(axis=0))
    hidden = np.zeros(eval_cells.tokens.shape[1], bool)
    hidden[np.random.default_rng(seed).choice(genes, round(ratio * len(genes)), replace=False)] = True
    return _all_scored(eval_cells, hidden & eval_cells.eligible, seed, most)


def _all_scored(eval_cells: EvalCells, mask: np.ndarray, seed: int, most: int) -> Masked:
    """Score the masked (cell, gene) pairs, whether the genes are expressed or not.

    If more than `most` pairs are masked, a random sample of `most` pairs is scored. The mean count of each level is
    computed from visible genes only.
    """
    places = np.flatnonzero(mask)
    if len(places) > most:
        places = np.sort(np.random.default_rng(seed).choice(places, most, replace=False))
    masked = Masked.of(eval_cells, mask, np.divmod(places, mask.shape[1]))
    # As in `sct.tl.impute`, the mean count of a level comes from the visible genes.
    shown = masked.visible
    rows = np.repeat(np.arange(len(eval_cells)), np.diff(shown.indptr))
    levels = eval_cells.tokens[rows, shown.indices]
    used = levels > 0  # level 0 also holds noise genes, whose counts are not zero
    _, means = level_values(
        rows[used], levels[used], shown.data[used], masked.low, masked.high, eval_cells.num_bins
    )
    return dataclasses.replace(masked, means=means)


def mask_cells(eval_cells: EvalCells, num_cells: int, seed: int) -> Masked:
    """Mask all measured genes of `num_cells` of the K cells of each bag.

    In a bag with fewer than K cells, the same fraction of the cells is masked: at least one cell, but never all cells.
    A bag with a single cell is not masked.
    """
    present = np.diff(eval_cells._starts)
    hidden = np.round(num_cells * present / eval_cells.cells_per_bag)
    hidden = np.minimum(np.maximum(hidden, 1), present - 1).astype(np.int32)
    return Masked.of(eval_cells, _draw(eval_cells, masking.whole_cells, seed, hidden))


def mask_genes(eval_cells: EvalCells, genes: np.ndarray) -> Masked:
    """Mask the genes at the vocabulary positions `genes` in all cells whose study measured them."""
    chosen = np.zeros(eval_cells.tokens.shape[1], bool)
    chosen[genes] = True
    hidden = masking.fixed_genes(jnp.asarray(eval_cells.tokens), jnp.asarray(chosen), eval_cells.num_bins)
    return Masked.of(eval_cells, np.asarray(hidden) & eval_cells.eligible)
