"""Make bags: sets of K cells from one study that sCT reads together as one input.

A bag of a single-cell study has random cells. A bag of a spatial study has a cell and its nearest neighbors in the
plane. In an ablation, it has random cells instead. Seed, study, epoch and bag number determine the cells of a bag, so
any bag can be made again without repeating the run.
"""

from __future__ import annotations

import dataclasses
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from sct.checks import check_at_least, check_not_empty, check_share
from sct.data.bag_order import CELLS_PER_BAG
from sct.data.cell_labels import NO_LABEL, label_numbers
from sct.data.store import Study
from sct.data.thinning import thin
from sct.data.tokenize import NOISE_FRACTION, bin_counts
from sct.errors import ConfigError


def _rng(*words: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(list(words)))


def _permutation(size: int, *words: int) -> np.ndarray:
    return _rng(*words).permutation(size)


def random_bag_rows(
    n_cells: int,
    cells_per_bag: int,
    number: int,
    epoch: int,
    seed: int,
    shuffle_cells: int = 0,
    permutation: Callable[..., np.ndarray] = _permutation,
) -> np.ndarray:
    """Return the row numbers of the cells of one bag, in ascending order. The study is stored in random order.

    The rows of the study are treated as a ring: the first row follows the last row. Each epoch starts at a different
    row, which depends on the seed, and cuts the ring into blocks. Within a block, cells are assigned to bags at random.
    An epoch leaves out up to `cells_per_bag - 1` cells, which differ between epochs.

    Parameters
    ----------
    n_cells
        Number of cells of the study.
    cells_per_bag
        Number of cells per bag (K).
    number, epoch, seed
        Number of the bag within the epoch, number of the epoch, and random seed.
    shuffle_cells
        Number of cells per block. With 0, each block is one bag, so the rows of a bag are contiguous and are read at
        once. Only a bag that contains both the last and the first row of the study needs two reads. If a block is as
        large as the study, any partition of the study into bags is possible.
    permutation
        Function that returns seeded permutations; the function may cache its last result.
    """
    number_of_bags = max(1, n_cells // cells_per_bag)
    if not 0 <= number < number_of_bags:
        raise IndexError(f"bag {number} does not exist: use a number from 0 to {number_of_bags - 1}.")
    if n_cells <= cells_per_bag:
        return np.arange(n_cells)
    offset = int(_rng(seed, 1, epoch).integers(n_cells))
    per_block = max(1, min(shuffle_cells, n_cells) // cells_per_bag)
    block, place = divmod(number, per_block)
    start = block * per_block * cells_per_bag
    stop = min(start + per_block * cells_per_bag, number_of_bags * cells_per_bag)
    one_bag = stop - start <= cells_per_bag
    order = np.arange(stop - start) if one_bag else permutation(stop - start, seed, 2, epoch, block)
    chosen = order[place * cells_per_bag : (place + 1) * cells_per_bag]
    return np.sort((offset + start + chosen) % n_cells)


def spatial_bag_rows(
    tree: KDTree,
    cells_per_bag: int,
    number: int,
    epoch: int,
    seed: int,
    permutation: Callable[..., np.ndarray] = _permutation,
) -> np.ndarray:
    """Return the row numbers of a center cell and its nearest neighbors, nearest first (sCT paper, appendix A).

    An epoch has `n_cells // cells_per_bag` different center cells, drawn at random.

    Parameters
    ----------
    tree
        KD-tree of the coordinates of the study.
    cells_per_bag
        Number of cells per bag (K).
    number, epoch, seed
        Number of the bag within the epoch, number of the epoch, and random seed.
    permutation
        Function that returns seeded permutations; the function may cache its last result.
    """
    n_cells = tree.n
    center = permutation(n_cells, seed, 3, epoch)[number]
    _, rows = tree.query(tree.data[center], k=min(cells_per_bag, n_cells))
    return np.atleast_1d(rows).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class BagOptions:
    """Options for making bags from studies.

    Parameters
    ----------
    cells_per_bag
        Number of cells per bag (K). The paper uses 50.
    num_positions
        Length of the model's gene axis (P): the number of genes in the vocabulary plus padding.
    num_bins
        Number of expression levels, including level 0.
    shuffle_cells
        Number of cells per block. The cells of a block are assigned to bags at random. With 0, each bag is one block of
        cells that are stored next to each other, in random order; see `random_bag_rows`.
    noise_fraction
        In each study, the counts of a gene are set to zero if the mean count of the gene per cell is below this value;
        see `sct.data.tokenize.noisy_genes`.
    spatial
        Add coordinates to the bags. Cells of studies without coordinates have NaN.
    spatial_bags
        Make bags of spatial studies from neighboring cells. If False, a bag has random cells of the study (an
        ablation).
    with_counts
        Add the raw counts, and the median and mean raw count of each expression level, for evaluation.
    seed
        Random seed that determines which cells are in a bag.
    thinning
        Range of the probability with which a molecule of a training cell is kept, such as (0.2, 1.0); () for no
        thinning. The probability of a cell is drawn in each epoch (`sct.data.thinning`). The tokens are the levels of
        the thinned counts, also as targets of masked genes: the levels that a model predicts then belong to the depth
        of the cell that it reads, as in inference. The array `full_tokens` has the levels of all counts, from which
        `cell_decoding` and `contrast` learn what does not depend on the depth. Bags that contain every cell once are
        never thinned.
    with_study
        Add the number of the study, and whether the cells of the bag are random cells of the study, for `contrast`.
    label_key, label_names
        Column of `obs` with labels of cells, and the known labels; see `sct.data.cell_labels`. "": no labels.
    """

    cells_per_bag: int = CELLS_PER_BAG
    num_positions: int = 19_968
    num_bins: int = 5
    shuffle_cells: int = 0
    noise_fraction: float = NOISE_FRACTION
    spatial: bool = False
    spatial_bags: bool = True
    with_counts: bool = False
    seed: int = 0
    thinning: tuple[float, ...] = ()
    with_study: bool = False
    label_key: str = ""
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_at_least("cells_per_bag", self.cells_per_bag, 1)
        check_at_least(
            "num_bins", self.num_bins, 2, most=254
        )  # tokens, including PAD and MASK, must fit into uint8
        check_at_least("the seed of bags", self.seed, 0)
        check_thinning(self.thinning)


_THINNING = "write it like (0.2, 1.0), or () for no thinning"


def check_thinning(thinning: tuple[float, ...]) -> None:
    """Raise `ConfigError` unless `thinning` is empty or a range of probabilities."""
    if not isinstance(thinning, list | tuple) or len(thinning) not in (0, 2):
        raise ConfigError(f"data.thinning is {thinning!r}, but must be two probabilities: {_THINNING}.")
    for share in thinning:
        check_share("each probability of data.thinning", share, zero=False, advice=_THINNING)
    if list(thinning) != sorted(thinning):
        raise ConfigError(
            f"data.thinning is {thinning!r}, but the smaller probability comes first: {_THINNING}."
        )


class BagSource:
    """Make the bags of several studies, given a bag number and an epoch. The object is picklable and thread-safe.

    `source.record(number, epoch)` returns these arrays:

    - `tokens` uint8 (K, P). If a study has fewer than K cells, the rows of the missing cells are filled with the token
      PAD.
    - `measured` bool (P,): the genes that the study measured.
    - `rows` int32 (K,): row of each cell in its study, -1 for missing cells.
    - With `options.spatial`: `coordinates` float32 (K, 2), NaN for cells without coordinates.
    - With `options.with_counts`: `counts` float32 (K, P), `low` and `high` (K,), `medians` and `means` (K, num_bins);
      see `sct.data.tokenize.Bins`.
    - With `options.thinning`, unless `exhaustive`: `full_tokens` uint8 (K, P), the levels before thinning.
    - With `options.with_study`, unless `exhaustive`: `study` int32 (), and `random_cells` bool (), which is False for
      bags of neighboring cells.
    - With `options.label_key`, unless `exhaustive`: `labels` int32 (K,), -1 for cells without a label.

    Parameters
    ----------
    studies
        Studies of one store.
    options
        See `BagOptions`.
    exhaustive
        Return every cell exactly once, in file order, for evaluation. The last bag of a study is filled up with PAD,
        and the epoch has no effect. Spatial studies are stored along a space-filling curve, so their bags are compact.
        Without `spatial_bags`, the cells of a spatial study are assigned to bags at random, in the same way in every
        epoch.
    """

    def __init__(self, studies: Sequence[Study], options: BagOptions, exhaustive: bool = False):
        check_not_empty("the list of studies to read bags from", studies)
        self.studies, self.options, self.exhaustive = tuple(studies), options, exhaustive
        cells = options.cells_per_bag
        counts = [-(-s.n_cells // cells) if exhaustive else max(1, s.n_cells // cells) for s in self.studies]
        self._ends = np.cumsum(counts)
        self._made: dict[tuple[str, int], Any] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_made", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _made={}, _lock=threading.RLock())

    def _once(self, what: str, index: int, make: Callable[[], Any]) -> Any:
        """Return a cached object of a study. The first call creates the object, while other threads wait."""
        with self._lock:
            if (what, index) not in self._made:
                self._made[what, index] = make()
            return self._made[what, index]

    def _permutation(self, index: int, size: int, *words: int) -> np.ndarray:
        """Return a seeded permutation. Only the last permutation of each study is cached, to save memory."""
        with self._lock:
            kept, order = self._made.get(("permutation", index), (None, None))
            if kept != (size, *words):
                order = _permutation(size, *words)
                self._made["permutation", index] = (size, *words), order
            return order

    def _coordinates(self, index: int) -> np.ndarray:
        """Return the rescaled coordinates (N, 2) of a spatial study."""
        study = self.studies[index]
        return self._once("coordinates", index, lambda: study.rescaled_coordinates())

    def _measured(self, study: Study) -> np.ndarray:
        """Return a mask of the genes that a study measured, bool (P,). The mask is False for padding."""
        measured = np.zeros(self.options.num_positions, bool)
        measured[: study.n_genes] = study.measured
        return measured

    def locate(self, number: int) -> tuple[int, int]:
        """Return the index of the study that a bag belongs to, and the number of the bag within this study."""
        if not 0 <= number < len(self):
            raise IndexError(f"bag {number} does not exist: use a number from 0 to {len(self) - 1}.")
        study = int(np.searchsorted(self._ends, number, side="right"))
        return study, number - (int(self._ends[study - 1]) if study else 0)

    def rows(self, number: int, epoch: int = 0) -> tuple[Study, np.ndarray]:
        """Return the study that a bag belongs to, and the row numbers of the bag's cells in this study."""
        index, bag = self.locate(number)
        study, options = self.studies[index], self.options
        cells = options.cells_per_bag
        seed = self._seed(study)
        scattered = study.spatial and not options.spatial_bags
        order = partial(self._permutation, index)
        if self.exhaustive:
            block = slice(bag * cells, min((bag + 1) * cells, study.n_cells))
            if not scattered:
                return study, np.arange(block.start, block.stop)
            return study, np.sort(order(study.n_cells, seed, 4)[block])
        if not study.spatial or scattered:
            # A spatial study stores neighbors next to each other, so it must be shuffled as a whole.
            shuffle_cells = study.n_cells if scattered else options.shuffle_cells
            return study, random_bag_rows(study.n_cells, cells, bag, epoch, seed, shuffle_cells, order)
        tree = self._once("tree", index, lambda: KDTree(self._coordinates(index)))
        return study, spatial_bag_rows(tree, cells, bag, epoch, seed, order)

    def _seed(self, study: Study) -> int:
        # Seed by the name of the study, so that adding a study does not change the bags of the others.
        return self.options.seed * 1_000_003 + zlib.crc32(study.name.encode())

    def describe(self, number: int, epoch: int = 0) -> str:
        """Return the text that identifies a bag in messages: the study and the rows of the bag."""
        study, rows = self.rows(number, epoch)
        return f"study {study.name!r}, rows {rows.min()} to {rows.max()} (bag {number} of epoch {epoch})"

    def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Read and tokenize one bag."""
        options = self.options
        study, rows = self.rows(number, epoch)
        index, place = self.locate(number)
        drop = self._once("drop", index, lambda: study.noisy_genes(options.noise_fraction))
        counts = study.read_rows(rows)
        to_levels = partial(
            bin_counts, num_bins=options.num_bins, num_positions=options.num_positions, drop=drop
        )
        bag = {}
        if options.thinning and not self.exhaustive:
            bag["full_tokens"] = to_levels(counts).tokens
            low, high = options.thinning
            counts = thin(counts, low, high, _rng(self._seed(study), 5, epoch, place))
        bins = to_levels(counts, with_values=options.with_counts)
        bag |= {"tokens": bins.tokens, "rows": rows.astype(np.int32)}
        fill = {"rows": -1, "coordinates": np.nan, "labels": NO_LABEL}
        fill |= dict.fromkeys(("tokens", "full_tokens"), options.num_bins)
        if options.spatial:
            bag["coordinates"] = np.full((len(rows), 2), np.nan, np.float32)
            if study.spatial:
                bag["coordinates"] = self._coordinates(index)[rows]
        if options.with_counts and bins.medians is not None and bins.means is not None:
            dense = np.zeros(bins.tokens.shape, np.float32)
            dense[:, : counts.shape[1]] = counts.toarray()
            bag |= {"counts": dense, "low": bins.low, "high": bins.high}
            bag |= {"medians": bins.medians, "means": bins.means}
        if options.label_key and not self.exhaustive:
            key, names = options.label_key, options.label_names
            bag["labels"] = self._once("labels", index, lambda: label_numbers(study, key, names))[rows]
        missing = options.cells_per_bag - len(rows)
        if missing:
            bag = {
                key: np.concatenate(
                    [value, np.full((missing, *value.shape[1:]), fill.get(key, 0), value.dtype)]
                )
                for key, value in bag.items()
            }
        bag["measured"] = self._once("measured", index, lambda: self._measured(study))
        if options.with_study and not self.exhaustive:
            bag["study"] = np.asarray(index, np.int32)
            bag["random_cells"] = np.asarray(not (study.spatial and options.spatial_bags))
        return bag
