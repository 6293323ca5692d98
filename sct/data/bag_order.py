"""The order in which the cells of an AnnData are put, so that every K of them make a bag.

Training draws bags at random; a cell that is to be embedded needs one that can be named. The rules here are
functions of the number of cells, their positions and a seed, never of how much is read at a time.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.spatial import KDTree

CELLS_PER_BAG = 50  # sCT paper, section 3
# Cells that are shuffled among each other: one contiguous read of a file, some hundred megabytes at most.
WINDOW = 10_000


@dataclasses.dataclass(frozen=True)
class BagOrder:
    """Rows of a table of cells, bag after bag.

    Attributes
    ----------
    rows
        int64 (bags * K,): a cell may occur more than once.
    is_target
        bool (bags * K,): True once for each cell, where its result is taken from; elsewhere it is context.
    cells_per_bag
        K.
    """

    rows: np.ndarray
    is_target: np.ndarray
    cells_per_bag: int

    def without_context(self) -> BagOrder:
        """The order without context: each cell once, the last bag incomplete."""
        return BagOrder(self.rows[self.is_target], self.is_target[self.is_target], self.cells_per_bag)


def _closed(rows: np.ndarray, cells_per_bag: int) -> BagOrder:
    """Fill the last bag up with the first rows, which there are context only."""
    cells = min(cells_per_bag, len(rows))
    missing = -len(rows) % cells
    is_target = np.ones(len(rows) + missing, bool)
    is_target[len(rows) :] = False
    return BagOrder(np.concatenate([rows, rows[:missing]]), is_target, cells)


def random_order(rows: np.ndarray, cells_per_bag: int, seed: int = 0, window: int = WINDOW) -> BagOrder:
    """Deal cells to bags at random, each once.

    `rows` (N,) are taken in their order in windows of `window` cells; in each window they are permuted by
    (seed, number of the window) and every K of them are a bag. With at most `window` cells that is a random
    partition of all. The last bag is filled up with the first cells of the order; fewer than K cells are one
    smaller bag.
    """
    rows = np.asarray(rows, np.int64)
    window = max(cells_per_bag, window - window % cells_per_bag)
    parts = [
        np.random.default_rng([seed, number]).permutation(rows[start : start + window])
        for number, start in enumerate(range(0, len(rows), window))
    ]
    return _closed(np.concatenate(parts), cells_per_bag)


def tile_order(rows: np.ndarray, coordinates: np.ndarray, cells_per_bag: int) -> BagOrder:
    """Divide a section into compact tiles of K cells, each cell once.

    The section is cut across its longer side into two parts whose sizes are multiples of K (as nearly equal
    as that allows), and the parts are cut in turn; ties are broken by the order of the rows. Within a tile
    cells are sorted by distance from the cell nearest to its middle, as training sorts neighbours. The last
    tile is filled up with the cells nearest to it.

    Parameters
    ----------
    rows, coordinates
        (N,) and (N, 2).
    """
    rows, places = np.asarray(rows, np.int64), np.asarray(coordinates, np.float64)
    cells = min(cells_per_bag, len(rows))
    tiles, todo = [], [np.arange(len(rows))]
    while todo:
        part = todo.pop()
        if len(part) <= cells:
            tiles.append(part)
            continue
        axis = int(np.argmax(np.ptp(places[part], axis=0)))
        part = part[np.argsort(places[part, axis], kind="stable")]
        half = max(1, len(part) // cells // 2) * cells
        todo += [part[half:], part[:half]]
    tiles.sort(key=lambda tile: len(tile) < cells)  # the incomplete one, if any, stands last
    order, is_target = [], []
    for tile in tiles:
        center = places[tile].mean(axis=0)
        middle = places[tile[np.argmin(((places[tile] - center) ** 2).sum(axis=1))]]
        tile = tile[np.argsort(((places[tile] - middle) ** 2).sum(axis=1), kind="stable")]
        context = np.zeros(0, np.int64)
        if len(tile) < cells:
            distance = ((places - middle) ** 2).sum(axis=1)
            distance[tile] = np.inf
            context = np.argsort(distance, kind="stable")[: cells - len(tile)]
        order += [tile, context]
        is_target += [np.ones(len(tile), bool), np.zeros(len(context), bool)]
    return BagOrder(rows[np.concatenate(order)], np.concatenate(is_target), cells)


def neighbors(places: np.ndarray, cells_per_bag: int) -> np.ndarray:
    """Rows of the K nearest cells of each cell, (N, K): itself first, then by distance (paper, appendix A).

    `places` (N, 2) are in the units of models, as in training: at equal distances rounding decides. Cells at one
    place stand in the order of the tree, but each cell is first in its own bag.
    """
    cells = min(cells_per_bag, len(places))
    _, found = KDTree(places).query(places, k=cells)
    found = np.asarray(found, np.int64).reshape(len(places), cells)
    own = np.arange(len(places))
    for row in np.flatnonzero(found[:, 0] != own):
        others = found[row][found[row] != row]
        found[row] = np.concatenate([[row], others[: cells - 1]])
    return found


def centered_order(rows: np.ndarray, coordinates: np.ndarray, cells_per_bag: int) -> BagOrder:
    """One bag for each cell: itself, first and counted, and its nearest neighbours as context.

    The bags that spatial training draws; K times the work of tiles.
    """
    rows = np.asarray(rows, np.int64)
    found = neighbors(coordinates, cells_per_bag)
    is_target = np.zeros(found.shape, bool)
    is_target[:, 0] = True
    return BagOrder(rows[found].ravel(), is_target.ravel(), found.shape[1])


def masked_cell_order(
    rows: np.ndarray,
    hidden: np.ndarray,
    cells_per_bag: int,
    masked_per_bag: int,
    seed: int = 0,
    coordinates: np.ndarray | None = None,
) -> BagOrder:
    """Bags for cells that are to be predicted as a whole, beside cells that are seen.

    Hidden cells are dealt, `masked_per_bag` to a bag (the last bag may hold fewer), at random or, with
    coordinates, in tiles. The rest of a bag are visible cells: random ones, drawn without repetition as long
    as there are any, or those nearest to the tile's middle.

    Parameters
    ----------
    rows, hidden
        int (N,) and bool (N,).
    """
    rows, hidden = np.asarray(rows, np.int64), np.asarray(hidden, bool)
    seen, unseen = np.flatnonzero(~hidden), np.flatnonzero(hidden)
    if coordinates is None:
        parts = random_order(unseen, masked_per_bag, seed)
        pool = np.random.default_rng([seed, 1, 1]).permutation(seen)
    else:
        places = np.asarray(coordinates, np.float64)
        parts = tile_order(unseen, places[unseen], masked_per_bag)
        tree = KDTree(places[seen])
    context = min(cells_per_bag - parts.cells_per_bag, len(seen))
    bags = []
    for number, tile in enumerate(parts.rows.reshape(-1, parts.cells_per_bag)):
        if coordinates is None:
            chosen = pool[(np.arange(context) + number * context) % len(pool)]
        else:
            _, nearest = tree.query(places[tile].mean(axis=0), k=context)
            chosen = seen[np.atleast_1d(nearest)]
        bags.append(np.concatenate([tile, chosen]))
    is_target = np.zeros((len(bags), len(bags[0])), bool)
    is_target[:, : parts.cells_per_bag] = parts.is_target.reshape(len(bags), -1)
    return BagOrder(rows[np.concatenate(bags)], is_target.ravel(), len(bags[0]))
