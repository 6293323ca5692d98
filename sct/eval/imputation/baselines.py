"""Impute by baseline methods, which are scored on the same masked (cell, gene) pairs as the model."""

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

# Sizes of the dense blocks of smoothed counts and of cell profiles; they limit the memory.
_CELLS_AT_ONCE, _GENES_AT_ONCE, _REFERENCE_AT_ONCE = 256, 2000, 1024


class Unavailable(Exception):  # noqa: N818
    """Signal that an imputation method cannot run on the given cells.

    The message of this error is the reason, which the table shows as a remark.
    """


@dataclasses.dataclass(frozen=True)
class LevelPrediction:
    """Hold predicted expression levels (n,) and raw counts (n,) for the n scored (cell, gene) pairs of a `Masked`."""

    levels: np.ndarray
    counts: np.ndarray


class ImputationMethod(Protocol):
    """Interface of an imputation method. A method makes one or two predictions, each of which is a row of the table.

    Attributes
    ----------
    name, fitted_on, remark
        Name of the method, the cells it is fitted on, and a remark for the reader of the table.
    """

    name: str
    fitted_on: str
    remark: str

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """Predict the expression levels and raw counts of the scored (cell, gene) pairs of `masked`.

        A method may use `masked.visible` and the tokens that are not masked. A method may also use the ranges, medians
        and means of `masked`, but not the ranges, medians and means of `eval_cells`.

        Returns
        -------
        Dict with one or two predictions. The prediction with the key True uses the knowledge that all scored genes are
        expressed. The prediction with the key False does not use this knowledge.

        Raises
        ------
        Unavailable
            The method cannot run on these cells.
        """
        ...


def from_levels(masked: Masked, levels: np.ndarray) -> LevelPrediction:
    """Convert each predicted expression level (n,) to a raw count: the median count of this level in the cell."""
    return LevelPrediction(levels, masked.medians[masked.cells, levels])


def from_counts(masked: Masked, counts: np.ndarray) -> dict[bool, LevelPrediction]:
    """Turn predicted raw counts (n,) into two predictions: with and without the knowledge that genes are expressed.

    Levels are computed from the counts and the expression range of the cell. The prediction with the key True uses the
    knowledge that the genes are expressed, so each count is raised to at least 1. The prediction with the key False
    does not.
    """
    low, high = masked.low[masked.cells], masked.high[masked.cells]
    levels = digitize(np.log1p(counts), low, high, masked.medians.shape[1])
    # Counts below 0.5 round to zero.
    with_zero = np.where(counts < 0.5, 0, levels)
    return {
        False: LevelPrediction(with_zero, counts),
        True: LevelPrediction(levels, np.maximum(counts, np.float32(1))),
    }


@functools.lru_cache(maxsize=1)  # all protocols of a run use the same training studies
def level_frequencies(train: BagSource) -> np.ndarray:
    """Return the number of training cells with each expression level of each gene, int64 (P, num_bins).

    The result is cached: do not modify it.
    """
    num_bins, positions = train.options.num_bins, train.options.num_positions
    frequencies = np.zeros((positions, num_bins), np.int64)
    for number in track(range(len(train)), "counting levels"):
        bag = train.record(number)
        for level in range(num_bins):
            frequencies[:, level] += (bag["tokens"] == level).sum(axis=0) * bag["measured"]
    return frequencies


class CommonLevel:
    """Baseline that predicts the most common expression level of each gene.

    One variant counts all expression levels. The other variant counts only levels above zero, so it knows that the gene
    is expressed. The second variant is a strong baseline, because the levels of most genes vary little. For a gene that
    no cell expresses, the prediction is the lowest possible level.

    Parameters
    ----------
    expressed
        Whether to count only expression levels above zero.
    train
        Level frequencies in the training studies, as returned by `level_frequencies`. None if there are no training
        studies.
    """

    remark = ""

    def __init__(self, expressed: bool, train: np.ndarray | None):
        self.first, self._train = int(expressed), train
        self.name = f"most common {'expressed ' * expressed}level per gene"
        self.fitted_on = TRAINING

    def frequencies(self, eval_cells: EvalCells, masked: Masked) -> np.ndarray:
        """For the gene of each scored pair, return the number of cells with each expression level, (n, num_bins)."""
        if self._train is None:
            raise Unavailable(
                "this method needs training studies, but none were given: give a store with training studies"
            )
        return self._train[masked.genes]

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """Predict expression levels and raw counts.

        The method knows that the scored genes are expressed only if `expressed` is True.
        """
        frequencies = self.frequencies(eval_cells, masked)[:, self.first :]
        levels = self.first + frequencies.argmax(axis=1)
        return {bool(self.first): from_levels(masked, levels)}


class OthersCommonLevel(CommonLevel):
    """Baseline that predicts the most common expression level of a gene in the other cells of the study.

    The other cells include cells in which the gene is masked.

    The variant with `expressed=True` is the reference baseline: a useful imputation method must beat it.

    Parameters
    ----------
    expressed
        Whether to count only expression levels above zero.
    """

    def __init__(self, expressed: bool):
        super().__init__(expressed, None)
        self.fitted_on = OTHER_CELLS

    def frequencies(self, eval_cells: EvalCells, masked: Masked) -> np.ndarray:
        """For the gene of each scored pair, return the number of other cells with each level, (n, num_bins)."""
        frequencies = eval_cells.frequencies[eval_cells.study[masked.cells], masked.genes]
        frequencies[np.arange(len(frequencies)), masked.levels] -= 1
        return frequencies


def _require_visible(masked: Masked) -> None:
    """Raise `Unavailable` if no scored cell has a visible count."""
    shown = np.diff(masked.visible.indptr)[masked.cells]
    if shown.size and not shown.any():
        raise Unavailable(
            "all genes of the masked cells are masked, but this method needs visible genes: use another method"
        )


def require_shown(masked: Masked) -> None:
    """Raise `Unavailable` if all scored genes are masked in every cell."""
    hidden = np.asarray(masked.mask.all(axis=0))
    if masked.genes.size and hidden[masked.genes].all():
        raise Unavailable(
            "this method needs cells in which the masked genes are visible, but these genes "
            "are masked in all cells"
        )


def _smoothed(
    neighbors: np.ndarray,
    reference: sparse.csr_matrix,
    shown_in: Callable[[np.ndarray], np.ndarray],
    masked: Masked,
) -> tuple[np.ndarray, np.ndarray]:
    """Predict the masked counts of a cell: the mean counts of its neighbors, scaled to the library size of the cell.

    A neighbor in which a gene is masked or not measured is left out of the mean of this gene. The library size is the
    sum of the counts of those genes that are visible in the cell and in at least one neighbor.

    Parameters
    ----------
    neighbors
        Row indices in `reference` of the k neighbors of each cell, int (N, k).
    reference
        Counts (M, G).
    shown_in
        Function that takes the row indices of the k neighbors of each of m cells, int (m, k). The function returns, for
        each cell and gene, the number of neighbors in which the gene is visible, (m, G).
    masked
        Mask of the cells, with the scored (cell, gene) pairs.

    Returns
    -------
    Two arrays (n,): the mean count of each scored (cell, gene) pair, and the number of neighbors in this mean.
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
        # If the neighbors have no counts in the visible genes, the means are not scaled.
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
    reference_shown: np.ndarray | None,
    k: int,
) -> np.ndarray:
    """Return the rows (N, k) of `reference` with the highest cosine similarity to each row of `query`.

    The similarity is computed only from genes that are visible in both cells. If the norm of a reference cell also
    included the genes that are masked in the query cell, the nearest cells would always be those without counts in
    these genes.

    Parameters
    ----------
    query, reference
        Profiles (N, G) and (M, G). If both are the same object, a cell is not its own neighbor.
    shown, reference_shown
        bool (N, G) and (M, G): visible genes of the query and of the reference; None for all genes.
    k
        Number of neighbors.
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
            if reference_shown is not None:
                norm *= mine @ reference_shown[part].T.astype(np.float32)
            cosine[:, part] /= np.sqrt(np.maximum(norm, 1e-12))
        if own:
            cosine[np.arange(some.stop - first), np.arange(first, some.stop)] = -np.inf
        rows[some] = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
    return rows


class KnnSmoothing:
    """Baseline that predicts the mean raw counts of the nearest training cells, scaled to the library size of the cell.

    The similarity is the cosine of log1p counts per 10,000 over the genes visible in the cell. Neighbors whose study
    did not measure a gene are left out of the mean of this gene.

    Parameters
    ----------
    train
        Training cells, or None if there are no training studies.
    neighbors
        Number of neighbors (k).
    max_cells
        Maximum number of training cells to search, divided equally among the studies. If a study is stored in random
        order, its first cells are used. Spatial studies are stored in spatial order, so evenly spaced cells are used
        instead.
    """

    fitted_on, remark = TRAINING, ""

    def __init__(self, train: BagSource | None, neighbors: int = 5, max_cells: int = 5000):
        self.name = f"kNN smoothing, k = {neighbors}"
        self._reference = None if train is None else _reference(train, max_cells)
        if self._reference is not None:
            self.neighbors = min(neighbors, self._reference.counts.shape[0])

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """Predict expression levels and raw counts twice: with and without knowing that the genes are expressed."""
        return from_counts(masked, self.smooth(eval_cells, masked)[0])

    def smooth(self, eval_cells: EvalCells, masked: Masked) -> tuple[np.ndarray, np.ndarray]:
        """Return two arrays (n,): the mean count of each scored (cell, gene) pair, and the number of averaged cells."""
        if self._reference is None:
            raise Unavailable(
                "this method needs training studies, but none were given: give a store with training studies"
            )
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
    """Hold the training cells among which the nearest cells are searched.

    Attributes
    ----------
    counts
        Raw counts, CSR (M, G).
    study
        int (M,): index of the study of each cell.
    measured
        bool (studies, G): whether the study measured the gene.
    """

    def __init__(self, counts: sparse.csr_matrix, study: np.ndarray, measured: np.ndarray):
        self.counts, self.study, self.measured = counts, study, measured
        self._profiles: dict[bytes, sparse.csr_matrix] = {}

    def profile(self, genes: np.ndarray) -> sparse.csr_matrix:
        """Return the log-normalized profiles (M, G) of all cells.

        Only genes that are True in the mask `genes` (G,) are used.

        The last result is cached.
        """
        key = genes.tobytes()
        if key not in self._profiles:
            shown = sparse.csr_matrix(self.counts @ sparse.diags(genes.astype(np.float32)))
            self._profiles = {key: log_expression(shown)}
        return self._profiles[key]

    def shown_in(self, rows: np.ndarray) -> np.ndarray:
        """In each of n sets of k cells, count the cells in which each gene is measured, int (n, G).

        The sets are given as row numbers `rows` (n, k).
        """
        of_study = (self.study[rows][..., None] == np.arange(len(self.measured))).sum(axis=1)
        return of_study @ self.measured.astype(np.float32)


@functools.lru_cache(maxsize=1)  # shared by all numbers of neighbors and all protocols
def _reference(train: BagSource, max_cells: int) -> _Reference:
    """Read about `max_cells` training cells in total, the same number from each study."""
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
    """Baseline that predicts the mean visible counts of the nearest cells among the other evaluated cells.

    Cells are compared and counts are scaled as in `KnnSmoothing`. Neighbors in which a gene is masked are left out of
    the mean of this gene.

    Parameters
    ----------
    neighbors
        Number of neighbors (k).
    """

    fitted_on = THESE_CELLS
    remark = "neighbors in which the gene is masked are left out"

    def __init__(self, neighbors: int = 5):
        self.neighbors = neighbors
        self.name = f"kNN smoothing, k = {neighbors}"

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """Predict expression levels and raw counts twice: with and without knowing that the genes are expressed."""
        return from_counts(masked, self.smooth(eval_cells, masked)[0])

    def smooth(self, eval_cells: EvalCells, masked: Masked) -> tuple[np.ndarray, np.ndarray]:
        """Return two arrays (n,): the mean count of each scored (cell, gene) pair, and the number of averaged cells."""
        _require_visible(masked)
        require_shown(masked)
        if len(eval_cells) < 2:
            raise Unavailable("this method needs neighbor cells, but there is only one cell: use more cells")
        k = min(self.neighbors, len(eval_cells) - 1)
        profile = log_expression(masked.visible)
        rows = _nearest(profile, masked.shown, profile, masked.shown, k)
        return _smoothed(rows, masked.visible, lambda rows: masked.shown[rows].sum(axis=1), masked)


class NeighborMean:
    """Baseline for whole-cell imputation that predicts the mean raw counts of the visible cells of the bag.

    A cell is visible if none of its genes is masked.

    Parameters
    ----------
    eval_cells
        Cells to score.
    neighbors
        Number of visible cells to average (k). The spatially nearest visible cells are used. If None, or if the cells
        have no spatial coordinates, all visible cells of the bag are averaged.
    expressed
        Whether to average only the visible cells that express the gene. The method then knows that the gene is
        expressed, so it returns only the prediction with the key True.
    """

    fitted_on, remark = THESE_CELLS, ""

    def __init__(self, eval_cells: EvalCells, neighbors: int | None = 5, expressed: bool = False):
        places, self.expressed = eval_cells.coordinates, expressed
        self.neighbors = None if places is None else neighbors
        nearest = "" if self.neighbors is None else f"{self.neighbors} nearest "
        self.name = f"mean of the {nearest}visible cells of the bag{' that express the gene' * expressed}"
        if nearest and places is not None and np.isnan(places).any():
            self.remark = "for cells without spatial coordinates: mean of all visible cells of the bag"

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """Predict expression levels and raw counts.

        If `expressed` is True, the returned dict has only the key True: the prediction for expressed genes.
        """
        weights = self._weights(eval_cells, masked)
        counts = pick(weights @ masked.visible, masked.cells, masked.genes)
        if not self.expressed:
            return from_counts(masked, counts)
        share = pick(weights @ (masked.visible > 0).astype(np.float32), masked.cells, masked.genes)
        counts = np.where(share > 0, counts / np.where(share > 0, share, 1), 0)
        return {True: from_counts(masked, counts)[True]}

    def _weights(self, eval_cells: EvalCells, masked: Masked) -> sparse.csr_matrix:
        """Return the weights with which the counts of visible cells are averaged, CSR (N, N).

        Row i holds the weights for the prediction of cell i.
        """
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
            raise Unavailable(
                "this method needs cells without masked genes, but every cell has masked genes: mask fewer cells"
            )
        place = (np.concatenate(rows), np.concatenate(columns))
        return sparse.csr_matrix((np.concatenate(shares), place), (len(eval_cells), len(eval_cells)))


_PROBES = 100  # random sign vectors used to estimate the sums of squared weights in MAGIC


class Magic:
    """Baseline MAGIC (van Dijk et al., Cell 2018), which diffuses expression over a neighbor graph of the cells.

    The diffusion operator comes from the package magic-impute with its default parameters (k = 5, decay 1, t = 3, 100
    components). MAGIC is fitted on the square root of the visible counts per 10,000, as the documentation of the
    package recommends. The diffused values are squared and scaled to the library size of the cell's visible genes.

    Parameters
    ----------
    seed
        Random seed of the principal components.
    """

    name, fitted_on = "MAGIC", THESE_CELLS
    remark = "magic-impute, default parameters"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def predict(self, eval_cells: EvalCells, masked: Masked) -> dict[bool, LevelPrediction]:
        """Predict expression levels and raw counts twice: with and without knowing that the genes are expressed."""
        return from_counts(masked, self.smooth(eval_cells, masked)[0])

    def smooth(self, eval_cells: EvalCells, masked: Masked) -> tuple[np.ndarray, np.ndarray]:
        """Return two arrays (n,): the diffused count of each scored pair, and the effective number of averaged cells.

        The effective number counts only cells in which the gene is visible.
        """
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
        # Diffusion acts on each gene separately, so it can run on blocks of genes to limit the memory.
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
        # Effective number of cells in a row of the operator: 1 / (sum of squared weights), estimated with random signs.
        signs = np.random.default_rng(self.seed).choice([-1.0, 1.0], (len(totals), _PROBES))
        for _ in range(steps):
            signs = operator @ signs
        cells = 1 / np.maximum((signs**2).mean(axis=1), 1 / len(totals))
        number = cells[masked.cells] * masked.shown.mean(axis=0)[masked.genes]
        return (out * factor[masked.cells]).astype(np.float32), number.astype(np.float32)

    def _operator(self, values: sparse.csr_matrix) -> tuple[Any, int]:
        """Return two values: the diffusion operator (N, N) of the cells (N, G), and the number of diffusion steps."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                from magic import MAGIC
            except ImportError as error:  # also if `magic` is python-magic, which has the same import name
                raise Unavailable(str(missing_extra("magic-impute", "analysis"))) from error
            fitted = MAGIC(random_state=self.seed, verbose=0).fit(values)
            return fitted.diff_op, fitted.t


def standard_methods(
    eval_cells: EvalCells, train: BagSource | None, *, whole_cells: bool = False, magic: bool = True
) -> list[ImputationMethod]:
    """Return all baselines, the reference baseline first. Baselines that can be fitted before masking are fitted here.

    Parameters
    ----------
    eval_cells
        Cells to score.
    train
        Bags of the training studies, or None. All bags together contain each cell exactly once (`BagSource` with
        `exhaustive=True`).
    whole_cells
        Whether whole cells will be masked. If so, `NeighborMean` baselines are added, which average the visible cells
        of a bag.
    magic
        Whether to include MAGIC.
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
