"""Methods of imputation that a model has to beat, asked at the same hidden positions as the model."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from scipy import sparse
from scipy.spatial.distance import cdist

from sct.data.bags import BagSource
from sct.data.normalization import log_expression, per_count
from sct.data.tokenize import digitize
from sct.eval.imputation.eval_cells import EvalCells, Masked, pick
from sct.extras import missing_extra
from sct.progress import track

TRAINING, OTHER_CELLS, THESE_CELLS = "training studies", "other cells of the study", "these cells"

# Bound the dense blocks of smoothed counts and of profiles.
_CELLS_AT_ONCE, _GENES_AT_ONCE, _REFERENCE_AT_ONCE = 256, 2000, 1024


class Unavailable(Exception):  # noqa: N818
    """A method cannot answer; the message is the reason, as the table gives it."""


@dataclasses.dataclass(frozen=True)
class LevelPrediction:
    """Levels (n,) and raw counts (n,) at the scored positions of a `Masked`."""

    levels: np.ndarray
    counts: np.ndarray


class ImputationMethod(Protocol):
    """A row of the table, or two.

    Attributes
    ----------
    name, fitted_on, remark
        What it is, which cells it learned from, and what a reader should know.
    """

    name: str
    fitted_on: str
    remark: str

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """Predict the hidden positions.

        Key True is the form that is told that the positions are expressed, False the form that is not; a
        method has one or both. It may look at `masked.visible`, at the tokens that are not hidden, and at the
        ranges, medians and means of `masked`, never at those of `eval_cells`. Raises `Unavailable`.
        """
        ...


def from_levels(masked: Masked, levels: np.ndarray) -> LevelPrediction:
    """Prediction of levels (n,): their counts are those that stand for them in each cell."""
    return LevelPrediction(levels, masked.medians[masked.cells, levels])


def from_counts(masked: Masked, counts: np.ndarray) -> dict[bool, LevelPrediction]:
    """Both forms of a prediction of raw counts (n,), whose levels follow from the range of the cell.

    The form that is told that the genes are expressed knows that they have at least one count.
    """
    low, high = masked.low[masked.cells], masked.high[masked.cells]
    levels = digitize(np.log1p(counts), low, high, masked.medians.shape[1])
    # Half a count is where the nearest integer turns to zero.
    free = np.where(counts < 0.5, 0, levels)
    return {
        False: LevelPrediction(free, counts),
        True: LevelPrediction(levels, np.maximum(counts, np.float32(1))),
    }


@functools.lru_cache(maxsize=1)  # one protocol after the other asks for those of the same studies
def level_frequencies(train: BagSource) -> np.ndarray:
    """Number of cells (P, num_bins) in which each gene that was measured takes each level; not to be written to."""
    num_bins, positions = train.options.num_bins, train.options.num_positions
    frequencies = np.zeros((positions, num_bins), np.int64)
    for number in track(range(len(train)), "counting levels"):
        bag = train.record(number)
        for level in range(num_bins):
            frequencies[:, level] += (bag["tokens"] == level).sum(axis=0) * bag["measured"]
    return frequencies


class CommonLevel:
    """Most common level of each gene, over all levels or over the expressed ones.

    The second kind is told that the gene is expressed. It is the strong baseline, since the levels of most
    genes hardly vary. A gene that no cell expresses has the lowest level that it may have.

    Parameters
    ----------
    expressed
        Whether levels above zero alone are counted.
    train
        Frequencies of levels in the training studies (see `level_frequencies`), or None where there are none.
    """

    remark = ""

    def __init__(self, expressed: bool, train: np.ndarray | None):
        self.first, self._train = int(expressed), train
        self.name = f"most common {'expressed ' * expressed}level per gene"
        self.fitted_on = TRAINING

    def frequencies(self, eval_cells: EvalCells, masked: Masked) -> np.ndarray:
        """Frequencies (n, num_bins) of the gene of each scored position."""
        if self._train is None:
            raise Unavailable("no training studies were given")
        return self._train[masked.genes]

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """See `ImputationMethod`; one form."""
        frequencies = self.frequencies(eval_cells, masked)[:, self.first :]
        levels = self.first + frequencies.argmax(axis=1)
        return {bool(self.first): from_levels(masked, levels)}


class OthersCommonLevel(CommonLevel):
    """The same of the other cells of the study, all of whose genes are known: each cell without itself.

    The form that is given expressed genes is the reference baseline: a useful imputation must beat it.
    """

    def __init__(self, expressed: bool):
        super().__init__(expressed, None)
        self.fitted_on = OTHER_CELLS

    def frequencies(self, eval_cells: EvalCells, masked: Masked) -> np.ndarray:
        """See `CommonLevel`."""
        frequencies = eval_cells.frequencies[eval_cells.study[masked.cells], masked.genes]
        frequencies[np.arange(len(frequencies)), masked.levels] -= 1
        return frequencies


def _require_visible(masked: Masked) -> None:
    """Refuse where all scored cells are hidden as a whole."""
    shown = np.diff(masked.visible.indptr)[masked.cells]
    if shown.size and not shown.any():
        raise Unavailable("nothing of the hidden cells is visible")


def require_shown(masked: Masked) -> None:
    """Refuse where the hidden genes are hidden in every cell."""
    hidden = np.asarray(masked.mask.all(axis=0))
    if masked.genes.size and hidden[masked.genes].all():
        raise Unavailable("the hidden genes are hidden in every one of the cells that it learns from")


def _smoothed(
    neighbors: np.ndarray,
    reference: sparse.csr_matrix,
    shown_in: Callable[[np.ndarray], np.ndarray],
    masked: Masked,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean counts (n,) of each cell's `neighbors` (N, k), scaled to the cell's library size, and of how many (n,).

    Neighbours are rows of `reference` (M, G); `shown_in` says of some of them (m, k) how many show each gene (m, G),
    and the others are left out of the mean. The library size is that of genes that the cell and its neighbours show.
    """
    positions, genes = masked.mask.shape[1], reference.shape[1]
    out, of = np.zeros((2, len(masked.cells)), np.float32)
    k = neighbors.shape[1]
    for first in range(0, len(neighbors), _CELLS_AT_ONCE):
        rows = neighbors[first : first + _CELLS_AT_ONCE]
        starts = np.arange(len(rows) + 1) * k
        ones = np.ones(rows.size, np.float32)
        chosen = sparse.csr_matrix((ones, rows.ravel(), starts), (len(rows), reference.shape[0]))
        means, number = np.zeros((2, len(rows), positions), np.float32)
        number[:, :genes] = shown_in(rows)
        means[:, :genes] = (chosen @ reference).toarray()
        means /= np.maximum(number, 1)
        cells = slice(first, first + len(rows))
        both = masked.shown[cells] & (number > 0)
        total = (masked.visible[cells].toarray() * both).sum(axis=1)
        seen = (means * both).sum(axis=1)
        # Neighbours that show none of the visible genes tell nothing about the library size.
        factor = np.where(seen > 0, total / np.where(seen > 0, seen, 1), 1)
        part = slice(*np.searchsorted(masked.cells, [first, first + len(rows)]))
        cell = masked.cells[part] - first
        out[part] = means[cell, masked.genes[part]] * factor[cell]
        of[part] = number[cell, masked.genes[part]]
    return out, of


def _nearest(
    query: sparse.csr_matrix,
    shown: np.ndarray,
    reference: sparse.csr_matrix,
    shown_there: np.ndarray | None,
    k: int,
) -> np.ndarray:
    """Rows (N, k) of `reference` (M, G) with the greatest cosine to each `query` (N, G), over what both show.

    Were all of a reference cell in its norm, cells without counts of the hidden genes would be the nearest. `shown`
    (N, G) and `shown_there` (M, G) say what is shown; None: everything. Where the same cells are given twice a cell is
    not its own neighbour.
    """
    own = query is reference
    rows = np.zeros((query.shape[0], k), int)
    squares = reference.multiply(reference).tocsr()
    for first in range(0, len(rows), _CELLS_AT_ONCE):
        some = slice(first, min(first + _CELLS_AT_ONCE, len(rows)))
        seen, mine = shown[some].astype(np.float32), query[some]
        cosine = (mine @ reference.T).toarray()
        mine = mine.multiply(mine).toarray()
        for start in range(0, cosine.shape[1], _REFERENCE_AT_ONCE):
            part = slice(start, start + _REFERENCE_AT_ONCE)
            norm = seen @ squares[part].toarray().T
            if shown_there is not None:
                norm *= mine @ shown_there[part].T.astype(np.float32)
            cosine[:, part] /= np.sqrt(np.maximum(norm, 1e-12))
        if own:
            cosine[np.arange(some.stop - first), np.arange(first, some.stop)] = -np.inf
        rows[some] = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
    return rows


class KnnSmoothing:
    """Mean raw counts of the nearest cells of the training studies, scaled to the cell's library size.

    Neighbours are found by the cosine of log1p counts per 10,000 over the genes that are visible in the cell.
    Neighbours whose study did not measure a gene are left out of its mean.

    Parameters
    ----------
    train
        Training cells, or None where there are none.
    neighbors
        k.
    max_cells
        Training cells searched at most, the same number of each study: the first ones (the order is random),
        or evenly spaced ones of a spatial study (whose order follows the plane).
    """

    fitted_on, remark = TRAINING, ""

    def __init__(self, train: BagSource | None, neighbors: int = 5, max_cells: int = 5000):
        self.name = f"kNN smoothing, k = {neighbors}"
        self._reference = None if train is None else _reference(train, max_cells)
        if self._reference is not None:
            self.neighbors = min(neighbors, self._reference.counts.shape[0])

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """See `ImputationMethod`; both forms."""
        return from_counts(masked, self.smooth(eval_cells, masked)[0])

    def smooth(self, eval_cells: EvalCells, masked: Masked) -> tuple[np.ndarray, np.ndarray]:
        """Mean counts (n,), and of how many cells (n,)."""
        if self._reference is None:
            raise Unavailable("no training studies were given")
        _require_visible(masked)
        genes = self._reference.counts.shape[1]
        rows = np.zeros((len(eval_cells), self.neighbors), int)
        for study in np.unique(eval_cells.study):
            (cells,) = np.nonzero(eval_cells.study == study)
            profile = self._reference.profile(eval_cells.measured[study, :genes])
            query = log_expression(masked.visible[cells][:, :genes])
            rows[cells] = _nearest(query, masked.shown[cells, :genes], profile, None, self.neighbors)
        return _smoothed(rows, self._reference.counts, self._reference.shown_in, masked)


class _Reference:
    """Training cells in which neighbours are searched.

    Attributes
    ----------
    counts
        CSR (M, G).
    study, measured
        int (M,) study of each cell, and bool (studies, G).
    """

    def __init__(self, counts: sparse.csr_matrix, study: np.ndarray, measured: np.ndarray):
        self.counts, self.study, self.measured = counts, study, measured
        self._profiles: dict[bytes, sparse.csr_matrix] = {}

    def profile(self, genes: np.ndarray) -> sparse.csr_matrix:
        """Profiles (M, G) of some genes (G,) alone; the last ones are kept."""
        key = genes.tobytes()
        if key not in self._profiles:
            shown = sparse.csr_matrix(self.counts @ sparse.diags(genes.astype(np.float32)))
            self._profiles = {key: log_expression(shown)}
        return self._profiles[key]

    def shown_in(self, rows: np.ndarray) -> np.ndarray:
        """How many of the cells `rows` (n, k) were measured for each gene, (n, G)."""
        of_study = (self.study[rows][..., None] == np.arange(len(self.measured))).sum(axis=1)
        return of_study @ self.measured.astype(np.float32)


@functools.lru_cache(maxsize=1)  # of all numbers of neighbours and protocols
def _reference(train: BagSource, max_cells: int) -> _Reference:
    """Read the same number of cells of each training study."""
    for study in train.studies:
        study.check_counts()
    each = -(-max_cells // len(train.studies))
    blocks = [
        study.read_rows(np.linspace(0, study.n_cells - 1, min(study.n_cells, each)).astype(int))
        if study.spatial
        else study.read(0, min(study.n_cells, each))
        for study in train.studies
    ]
    numbers = np.repeat(np.arange(len(blocks)), [block.shape[0] for block in blocks])
    measured = np.array([study.measured for study in train.studies])
    return _Reference(sparse.vstack(blocks).tocsr(), numbers, measured)


class OwnKnnSmoothing:
    """The same with the other cells of the draw as neighbours, of which only the visible part is known."""

    fitted_on = THESE_CELLS
    remark = "neighbours that hide the gene are left out"

    def __init__(self, neighbors: int = 5):
        self.neighbors = neighbors
        self.name = f"kNN smoothing, k = {neighbors}"

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """See `ImputationMethod`; both forms."""
        return from_counts(masked, self.smooth(eval_cells, masked)[0])

    def smooth(self, eval_cells: EvalCells, masked: Masked) -> tuple[np.ndarray, np.ndarray]:
        """Mean counts (n,), and of how many cells (n,)."""
        _require_visible(masked)
        require_shown(masked)
        if len(eval_cells) < 2:
            raise Unavailable("there is one cell only, which has no neighbours")
        k = min(self.neighbors, len(eval_cells) - 1)
        profile = log_expression(masked.visible)
        rows = _nearest(profile, masked.shown, profile, masked.shown, k)
        return _smoothed(rows, masked.visible, lambda rows: masked.shown[rows].sum(axis=1), masked)


class NeighborMean:
    """Mean raw counts of the visible cells of the bag, for cells that are hidden as a whole.

    A visible cell is one of which nothing is hidden.

    Parameters
    ----------
    eval_cells
        Cells that will be scored.
    neighbors
        k: of cells with positions the k nearest ones in the plane; otherwise, and for None, all visible cells.
    expressed
        Whether the mean is over the cells that express the gene, for the form that is told so alone.
    """

    fitted_on, remark = THESE_CELLS, ""

    def __init__(self, eval_cells: EvalCells, neighbors: int | None = 5, expressed: bool = False):
        places, self.expressed = eval_cells.coordinates, expressed
        self.neighbors = None if places is None else neighbors
        nearest = "" if self.neighbors is None else f"{self.neighbors} nearest "
        self.name = f"mean of the {nearest}visible cells of the bag{' that express the gene' * expressed}"
        if nearest and places is not None and np.isnan(places).any():
            self.remark = "cells without a position: mean of all visible cells of the bag"

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """See `ImputationMethod`; both forms, or the one that is told."""
        weights = self._weights(eval_cells, masked)
        counts = pick(weights @ masked.visible, masked.cells, masked.genes)
        if not self.expressed:
            return from_counts(masked, counts)
        share = pick(weights @ (masked.visible > 0).astype(np.float32), masked.cells, masked.genes)
        counts = np.where(share > 0, counts / np.where(share > 0, share, 1), 0)
        return {True: from_counts(masked, counts)[True]}

    def _weights(self, eval_cells: EvalCells, masked: Masked) -> sparse.csr_matrix:
        """Share (N, N) of each visible cell in the mean of each other cell."""
        touched = np.asarray(masked.mask.any(axis=1))
        rows, columns, shares = [], [], []
        for bag in np.unique(eval_cells.bag[masked.cells]):
            (cells,) = np.nonzero(eval_cells.bag == bag)
            asked, visible = cells[touched[cells]], cells[~touched[cells]]
            if not visible.size:
                continue
            chosen = np.broadcast_to(visible, (len(asked), len(visible)))
            places = None if eval_cells.coordinates is None else eval_cells.coordinates[cells]
            if self.neighbors is not None and places is not None and not np.isnan(places).any():
                distance = cdist(places[touched[cells]], places[~touched[cells]])
                chosen = visible[np.argsort(distance, axis=1, kind="stable")[:, : self.neighbors]]
            rows.append(np.repeat(asked, chosen.shape[1]))
            columns.append(chosen.ravel())
            shares.append(np.full(chosen.size, 1 / chosen.shape[1], np.float32))
        if not rows:
            raise Unavailable("no cell of the bags is visible as a whole")
        place = (np.concatenate(rows), np.concatenate(columns))
        return sparse.csr_matrix((np.concatenate(shares), place), (len(eval_cells), len(eval_cells)))


_PROBES = 100


class Magic:
    """MAGIC (van Dijk et al., Cell 2018): diffusion of expression over a graph of the cells.

    The operator is the one of the package magic-impute with its default parameters (k = 5, decay 1, t = 3,
    100 components), fitted on the visible counts per 10,000, square-rooted, as its documentation has it.
    Diffused values are squared and scaled to the library size of the genes that are visible in the cell.

    Parameters
    ----------
    seed
        Seed of the principal components.
    """

    name, fitted_on = "MAGIC", THESE_CELLS
    remark = "magic-impute, default parameters"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """See `ImputationMethod`; both forms."""
        return from_counts(masked, self.smooth(eval_cells, masked)[0])

    def smooth(self, eval_cells: EvalCells, masked: Masked) -> tuple[np.ndarray, np.ndarray]:
        """Diffused counts (n,), and of how many cells that show the gene they count (n,)."""
        _require_visible(masked)
        require_shown(masked)
        totals = np.asarray(masked.visible.sum(axis=1)).ravel()
        genes = np.flatnonzero(np.bincount(masked.visible.indices, minlength=masked.visible.shape[1]))
        scaled = sparse.diags(per_count(masked.visible)) @ masked.visible.tocsc()[:, genes]
        roots = scaled.sqrt().tocsr()
        operator, steps = self._operator(roots)
        place = np.full(masked.mask.shape[1], -1)
        place[genes] = np.arange(len(genes))
        place = place[masked.genes]
        out, seen = np.zeros(len(masked.cells)), np.zeros(len(totals))
        # Diffusion acts on each gene by itself, so that a few at a time give the same as all.
        for first in range(0, len(genes), _GENES_AT_ONCE):
            part = slice(first, first + _GENES_AT_ONCE)
            diffused = roots[:, part].toarray()
            for _ in range(steps):
                diffused = operator @ diffused
            relative = diffused**2
            seen += np.where(masked.shown[:, genes[part]], relative, 0).sum(axis=1)
            here = (place >= first) & (place < first + _GENES_AT_ONCE)
            out[here] = relative[masked.cells[here], place[here] - first]
        factor = np.where(seen > 0, totals / np.where(seen > 0, seen, 1), 0)
        # Mean of so many cells of equal weight: the sum of squared weights of a row, by random signs.
        signs = np.random.default_rng(self.seed).choice([-1.0, 1.0], (len(totals), _PROBES))
        for _ in range(steps):
            signs = operator @ signs
        cells = 1 / np.maximum((signs**2).mean(axis=1), 1 / len(totals))
        number = cells[masked.cells] * masked.shown.mean(axis=0)[masked.genes]
        return (out * factor[masked.cells]).astype(np.float32), number.astype(np.float32)

    def _operator(self, values: sparse.csr_matrix) -> tuple[Any, int]:
        """Diffusion operator (N, N) of cells (N, G), and how often it is applied."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                from magic import MAGIC
            except ImportError as error:  # a package of file types has the same name
                raise Unavailable(str(missing_extra("magic-impute", "analysis"))) from error
            fitted = MAGIC(random_state=self.seed, verbose=0).fit(values)
            return fitted.diff_op, fitted.t


def standard_methods(
    eval_cells: EvalCells, train: BagSource | None, *, whole_cells: bool = False, magic: bool = True
) -> list[ImputationMethod]:
    """All baselines, the reference first; what can be fitted before anything is hidden is fitted now.

    Parameters
    ----------
    eval_cells, train
        Cells that will be scored; exhaustive bags of the training studies, or None where there are none.
    whole_cells
        Whether cells will be hidden as a whole.
    magic
        Whether MAGIC is among them.
    """
    frequencies = None if train is None else level_frequencies(train)
    methods: list[ImputationMethod] = [
        OthersCommonLevel(expressed=True),
        CommonLevel(expressed=True, train=frequencies),
        OthersCommonLevel(expressed=False),
        CommonLevel(expressed=False, train=frequencies),
    ]
    if whole_cells:
        if eval_cells.coordinates is not None:
            methods.append(NeighborMean(eval_cells))
        methods += [NeighborMean(eval_cells, None), NeighborMean(eval_cells, None, expressed=True)]
    methods += [KnnSmoothing(train), OwnKnnSmoothing()]
    return [*methods, Magic()] if magic else methods
