"""Held-out cells and training bags made of toy studies."""

from __future__ import annotations

import dataclasses

import numpy as np

from sct.data.bags import BagOptions, BagSource
from sct.eval.imputation.eval_cells import EvalCells, Masked
from tests.data.fake_study import FakeStudy, toy_study

GENES, POSITIONS, NUM_BINS = 12, 16, 5


def study(n_cells: int, seed: int = 0, spatial: bool = False, name: str = "toy") -> FakeStudy:
    made = toy_study(n_cells, GENES, seed, spatial, name)
    made.measured = np.ones(GENES, bool)
    return made


def source(*studies: FakeStudy, cells: int = 8, **options) -> BagSource:
    options = {"num_positions": POSITIONS, "num_bins": NUM_BINS, "with_counts": True, **options}
    return BagSource(studies, BagOptions(cells, **options), exhaustive=True)


def hold_out(*studies: FakeStudy, cells: int = 8, max_bags: int = 0, **options) -> EvalCells:
    return EvalCells.read(source(*studies, cells=cells, **options), max_bags)


def changed(held_out: EvalCells, mask: np.ndarray, seed: int = 0) -> EvalCells:
    """The same cells with other levels and counts at the masked expressed positions, ranges kept."""
    rng = np.random.default_rng(seed)
    hidden = mask & (held_out.tokens > 0) & (held_out.tokens < NUM_BINS)
    tokens, counts = held_out.tokens.copy(), held_out.counts.toarray()
    tokens[hidden] = rng.integers(1, NUM_BINS, hidden.sum())
    counts[hidden] = rng.integers(1, 900, hidden.sum())
    return dataclasses.replace(held_out, tokens=tokens, counts=type(held_out.counts)(counts))


def scaled(made: FakeStudy, rows: np.ndarray, factor: int) -> FakeStudy:
    """The same study with all counts of some cells multiplied."""
    counts = made.counts.toarray()
    counts[rows] *= factor
    again = FakeStudy(counts, made.name, made.coordinates)
    again.measured = made.measured
    return again


def random_mask(held_out: EvalCells, share: float, seed: int = 0) -> Masked:
    return Masked.of(held_out, np.random.default_rng(seed).random(held_out.tokens.shape) < share)
