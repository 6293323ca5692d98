"""Synthetic cells, memory, disk and the ceiling."""

from __future__ import annotations

import sys
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sct.errors import ConfigError
from sct.speed import memory, report, synthetic
from sct.speed.ceiling import arithmetic, matmul_ceiling
from sct.speed.timing import timed

MIB = 1 << 20


@settings(max_examples=15, deadline=None)
@given(st.integers(50, 3000), st.floats(0.01, 0.8))
def test_cells_express_as_many_genes_as_asked(n_genes, share):
    nonzeros = max(1, round(share * n_genes))
    rates = synthetic.means(n_genes, nonzeros)
    expected = -np.expm1(-rates).sum()
    assert abs(expected - nonzeros) < 1e-6 * nonzeros
    counts = sparse.vstack(list(synthetic.blocks(200, n_genes, nonzeros)))
    expressed = np.diff(counts.indptr)
    # One gene is added to each cell, so that none is empty; six standard deviations of a mean over 200 cells.
    assert abs(expressed.mean() - nonzeros) < 1 + 6 * np.sqrt(nonzeros / 200)
    assert expressed.min() >= 1
    assert counts.has_canonical_format or counts.has_sorted_indices
    np.testing.assert_array_equal(counts.data, np.rint(counts.data))


def test_cells_do_not_depend_on_anything_but_the_seed(monkeypatch):
    first, again, other = (sparse.vstack(list(synthetic.blocks(30, 100, 10, seed))) for seed in (0, 0, 1))
    assert (first != again).nnz == 0
    assert (first != other).nnz > 0


@pytest.mark.parametrize("nonzeros", [0, 91])
def test_more_genes_than_there_are_cannot_be_expressed(nonzeros):
    with pytest.raises(ConfigError, match="--nonzeros"):
        synthetic.means(100, nonzeros)


def test_a_file_of_several_blocks_is_what_the_blocks_are(tmp_path, monkeypatch):
    import anndata as ad

    monkeypatch.setattr(synthetic, "_BLOCK_VALUES", 500)
    genes = synthetic.vocabulary(100)
    blocks = list(synthetic.blocks(90, 100, 10))
    assert len(blocks) > 2
    synthetic.write_h5ad(tmp_path / "cells.h5ad", genes, 90, 10)
    written = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert (sparse.vstack(blocks) != written.X).nnz == 0
    assert list(written.var_names) == list(genes.keys)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of a process is read from /proc")
def test_the_peak_is_that_of_what_is_inside():
    def use(size: int) -> None:
        np.ones(size, np.uint8)

    use(400 * MIB)
    with memory.HostPeak() as quiet:
        use(10 * MIB)
    with memory.HostPeak() as busy:
        use(200 * MIB)
    assert quiet.bytes - quiet.before < 100 * MIB
    assert 190 * MIB < busy.bytes - busy.before < 300 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of a process is read from /proc")
def test_the_peak_is_sampled_where_the_mark_cannot_be_set_back(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "such")
    with memory.HostPeak() as peak:
        block = np.ones(200 * MIB, np.uint8)
        deadline = time.monotonic() + 30
        while peak._sampled < peak.before + 150 * MIB and time.monotonic() < deadline:
            time.sleep(0.01)
        del block
    assert peak.how == "sampled"
    assert peak.bytes - peak.before > 150 * MIB


def test_reading_and_forgetting_files_leaves_them_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1" * 5000)
    (tmp_path / "y").write_bytes(b"")
    files = memory.files_below([tmp_path])
    assert [path.name for path in files] == ["x", "y"]
    rate, source = memory.sequential_read(files)
    assert rate > 0
    assert source in ("disk", "page cache", "unknown")
    assert (tmp_path / "a" / "x").read_bytes() == b"1" * 5000


def test_the_ceiling_is_that_of_the_size_given():
    rate, size = matmul_ceiling("float32", 96)
    assert size == 96
    assert rate > 0
    assert arithmetic("bfloat16") == "bfloat16"
    with jax.default_matmul_precision("highest"):
        assert arithmetic("float32") == "float32"


def test_times_are_of_the_step_without_its_input():
    calls = []
    times = timed(lambda: time.sleep(0.05), calls.append, 4, "nothing")
    assert len(calls) == len(times.wall) == 4
    assert min(times.wait) >= 0.05
    assert min(times.wall) <= times.median <= max(times.wall)
    assert times.report()["step_seconds_spread"]["max"] == max(times.wall)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "s", "-"),
        (1.23456, "s", "1.235 s"),
        (4.14e12, "FLOP", "4.14 TFLOP"),
        (1.5e11, "FLOP/s", "150 GFLOP/s"),
        (5 * 2**30, "B", "5 GiB"),
        (23.1e6, "/s", "23.1 million /s"),
        (10_234.0, "/s", "10,234 /s"),
        (0.71234, "", "0.712"),
    ],
)
def test_quantities_are_written_for_people(value, unit, text):
    assert report.quantity(value, unit) == text
