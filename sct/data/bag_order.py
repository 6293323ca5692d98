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
    counted
        bool (bags * K,): True once for each cell, where its result is taken from; elsewhere it is context.
    cells_per_bag
        K.
    """

    rows: np.ndarray
    counted: np.ndarray
    cells_per_bag: int

    def once(self) -> BagOrder:
        """The order without context: each cell once, the last bag incomplete."""
        return BagOrder(self.rows[self.counted], self.counted[self.counted], self.cells_per_bag)


def _closed(rows: np.ndarray, cells_per_bag: int) -> BagOrder:
    """Fill the last bag up with the first rows, which there are context only."""
    cells = min(cells_per_bag, len(rows))
    missing = -len(rows) % cells
    counted = np.ones(len(rows) + missing, bool)
    counted[len(rows) :] = False
    return BagOrder(np.concatenate([rows, rows[:missing]]), counted, cells)


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
    order, counted = [], []
    for tile in tiles:
        centre = places[tile].mean(axis=0)
        middle = places[tile[np.argmin(((places[tile] - centre) ** 2).sum(axis=1))]]
        tile = tile[np.argsort(((places[tile] - middle) ** 2).sum(axis=1), kind="stable")]
        context = np.zeros(0, np.int64)
        if len(tile) < cells:
            distance = ((places - middle) ** 2).sum(axis=1)
            distance[tile] = np.inf
            context = np.argsort(distance, kind="stable")[: cells - len(tile)]
        order += [tile, context]
        counted += [np.ones(len(tile), bool), np.zeros(len(context), bool)]
    return BagOrder(rows[np.concatenate(order)], np.concatenate(counted), cells)


def neighbours(places: np.ndarray, cells_per_bag: int) -> np.ndarray:
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


def centred_order(rows: np.ndarray, coordinates: np.ndarray, cells_per_bag: int) -> BagOrder:
    """One bag for each cell: itself, first and counted, and its nearest neighbours as context.

    The bags that spatial training draws; K times the work of tiles.
    """
    rows = np.asarray(rows, np.int64)
    found = neighbours(coordinates, cells_per_bag)
    counted = np.zeros(found.shape, bool)
    counted[:, 0] = True
    return BagOrder(rows[found].ravel(), counted.ravel(), found.shape[1])


def hidden_order(
    rows: np.ndarray,
    hidden: np.ndarray,
    cells_per_bag: int,
    hidden_per_bag: int,
    seed: int = 0,
    coordinates: np.ndarray | None = None,
) -> BagOrder:
    """Bags for cells that are to be predicted as a whole, beside cells that are seen.

    Hidden cells are dealt, `hidden_per_bag` to a bag (the last bag may hold fewer), at random or, with
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
        parts = random_order(unseen, hidden_per_bag, seed)
        pool = np.random.default_rng([seed, 1, 1]).permutation(seen)
    else:
        places = np.asarray(coordinates, np.float64)
        parts = tile_order(unseen, places[unseen], hidden_per_bag)
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
    counted = np.zeros((len(bags), len(bags[0])), bool)
    counted[:, : parts.cells_per_bag] = parts.counted.reshape(len(bags), -1)
    return BagOrder(rows[np.concatenate(bags)], counted.ravel(), len(bags[0]))
