"""Group the cells of an AnnData into bags: sets of K cells that the model reads together.

Training draws bags at random. Inference needs reproducible bags that contain every cell. The functions of this module
compute an order of the cells, and this order is cut into bags of K cells. The order depends only on the number of
cells, their spatial coordinates and a seed. The bags therefore do not depend on how many cells are read at a time.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.spatial import KDTree

CELLS_PER_BAG = 50  # sCT paper, section 3
# Number of cells to shuffle together. They are one contiguous read from a file, of at most some hundred megabytes.
WINDOW = 10_000


@dataclasses.dataclass(frozen=True)
class BagOrder:
    """List the row numbers of the cells bag by bag: the first K row numbers are the first bag, and so on.

    Attributes
    ----------
    rows
        Row numbers, int64 (bags * K,). A cell may occur more than once.
    is_target
        bool (bags * K,). True at exactly one occurrence of each cell: the result of the cell is taken from this
        occurrence. Other occurrences are only context for the bag.
    cells_per_bag
        Number of cells per bag (K).
    """

    rows: np.ndarray
    is_target: np.ndarray
    cells_per_bag: int

    def without_context(self) -> BagOrder:
        """Return the order without the cells that were added as context. The last bag may then be incomplete."""
        return BagOrder(self.rows[self.is_target], self.is_target[self.is_target], self.cells_per_bag)


def _closed(rows: np.ndarray, cells_per_bag: int) -> BagOrder:
    """Fill up an incomplete last bag with the first cells of the order. The added cells are only context."""
    cells = min(cells_per_bag, len(rows))
    missing = -len(rows) % cells
    is_target = np.ones(len(rows) + missing, bool)
    is_target[len(rows) :] = False
    return BagOrder(np.concatenate([rows, rows[:missing]]), is_target, cells)


def random_order(rows: np.ndarray, cells_per_bag: int, seed: int = 0, window: int = WINDOW) -> BagOrder:
    """Assign each cell to exactly one random bag.

    Rows are split into consecutive windows. Each window is shuffled separately and cut into bags. If there are at most
    `window` cells, all cells are shuffled together. The last bag is filled up with the first cells of the order. If
    there are fewer than K cells, all of them form one smaller bag.

    Parameters
    ----------
    rows
        Row numbers (N,).
    cells_per_bag
        Number of cells per bag (K).
    seed
        Seed of the shuffling. Each window is shuffled with this seed and the number of the window.
    window
        Number of cells per window.
    """
    rows = np.asarray(rows, np.int64)
    window = max(cells_per_bag, window - window % cells_per_bag)
    parts = [
        np.random.default_rng([seed, number]).permutation(rows[start : start + window])
        for number, start in enumerate(range(0, len(rows), window))
    ]
    return _closed(np.concatenate(parts), cells_per_bag)


def tile_order(rows: np.ndarray, coordinates: np.ndarray, cells_per_bag: int) -> BagOrder:
    """Divide a tissue section into compact tiles of K neighboring cells. Each cell is in one tile.

    The tissue section is cut in two across its longer side, and each piece is cut again, until no piece has more than K
    cells. A cut divides the cells about equally, and the first piece gets a multiple of K cells. Cells with equal
    coordinates stay in the order of their rows. Within a tile, the first cell is the cell nearest to the center of the
    tile. The other cells are sorted by their distance from the first cell, as in the bags of spatial training. If the
    last tile has fewer than K cells, it is filled up with the nearest cells of other tiles.

    Parameters
    ----------
    rows, coordinates
        Row numbers (N,) and coordinates (N, 2).
    cells_per_bag
        Number of cells per tile (K).
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
    tiles.sort(key=lambda tile: len(tile) < cells)  # move the incomplete tile, if any, to the end
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
    """Return the row numbers of each cell and its nearest cells, int64 (N, K), sorted by distance.

    Spatial training uses the same neighbors (sCT paper, appendix A). Row i starts with cell i, even if several cells
    are at the same place.

    Parameters
    ----------
    places
        Coordinates (N, 2), rescaled as in training. In other units, rounding could change the order of neighbors at
        equal distances.
    cells_per_bag
        Number of cells per bag (K).
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
    """Make one bag for each cell: the cell itself as the target, and its nearest neighbors as context.

    Spatial training uses the same bags. Inference with these bags takes K times the compute of inference with tiles.
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
    """Make bags for predicting completely masked cells from visible cells.

    Each bag has `masked_per_bag` masked cells (the last bag may have fewer). Visible cells fill the rest of the bag.
    Without coordinates, the masked and the visible cells of a bag are random. Every visible cell is used once before
    any of them is used again. With coordinates, the masked cells of a bag are neighbors (a tile), and the visible cells
    nearest to the center of this tile fill the bag.

    Parameters
    ----------
    rows
        Row numbers, int (N,).
    hidden
        bool (N,): True for the cells to predict, whose counts are masked.
    cells_per_bag
        Number of cells per bag (K).
    masked_per_bag
        Number of masked cells per bag.
    seed
        Seed of the random choices.
    coordinates
        Coordinates (N, 2), or None for random bags.
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
