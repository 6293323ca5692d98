"""Telling raw counts from other values: one test for each kind of input."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from sct.data import counts
from sct.data.counts import CountsChecker, exact_integers, validate
from sct.errors import DataError

N_CELLS, N_GENES = 40, 30


@pytest.fixture
def raw() -> np.ndarray:
    """(N, G) counts without an empty cell."""
    drawn = np.random.default_rng(0).negative_binomial(0.5, 0.1, (N_CELLS, N_GENES)).astype(np.float32)
    drawn[:, 0] += 1
    return drawn


def normalized(raw: np.ndarray, total: float = 1e4) -> np.ndarray:
    return (raw / raw.sum(axis=1, keepdims=True) * total).astype(np.float32)


def anndata(X, **kwargs) -> ad.AnnData:
    return ad.AnnData(
        X,
        obs=pd.DataFrame(index=[f"cell{i}" for i in range(X.shape[0])]),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(X.shape[1])]),
        **kwargs,
    )


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


# Accepted ------------------------------------------------------------------------------------------------

FORMS = {
    "dense": np.asarray,
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "int64": lambda x: x.astype(np.int64),
    "uint16": lambda x: sparse.csc_matrix(x.astype(np.uint16)),
    "float64": lambda x: x.astype(np.float64),
    "fortran": np.asfortranarray,
}


@pytest.mark.parametrize("form", FORMS)
def test_counts_are_accepted_in_every_form(raw, form):
    X = FORMS[form](raw)
    found = validate(anndata(X))
    assert found.source == "X"
    assert isinstance(found.matrix, sparse.csr_matrix)
    assert found.matrix.dtype == X.dtype
    assert found.matrix.has_canonical_format
    assert found.n_empty_cells == 0
    assert found.messages == ()
    np.testing.assert_array_equal(found.matrix.toarray(), raw)


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
def test_floats_that_are_integers_become_these_integers(raw, form):
    noisy = raw.astype(np.float64)
    noisy[noisy > 0] += np.random.default_rng(1).uniform(-1e-4, 1e-4, (noisy > 0).sum())
    adata = anndata(FORMS[form](noisy))
    found = validate(adata)
    np.testing.assert_array_equal(found.matrix.toarray(), raw)
    assert any("which were rounded" in message for message in found.messages)
    np.testing.assert_array_equal(dense(adata.X), noisy)  # the input is left alone


@given(
    hnp.arrays(np.int64, (6, 5), elements=st.integers(0, 2**20)), st.sampled_from(["f4", "f8", "i8", "u4"])
)
@settings(max_examples=50, deadline=None)
def test_any_integers_are_accepted_unless_all_are_zero(values, dtype):
    adata = anndata(sparse.csc_matrix(values.astype(dtype)))
    if not values.any():
        with pytest.raises(DataError, match="only zeros"):
            validate(adata)
        return
    found = validate(adata)
    np.testing.assert_array_equal(found.matrix.toarray(), values)
    assert found.n_empty_cells == (values.sum(axis=1) == 0).sum()


@given(st.integers(0, 1000), st.floats(1e-2, 0.5), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_one_value_between_integers_is_enough_to_refuse(whole, part, at):
    values = np.arange(10, dtype=np.float64)
    values[at] = whole + part
    with pytest.raises(DataError, match="not integers"):
        CountsChecker("X").update(values)


def test_empty_cells_are_counted_and_reported(raw):
    raw[[3, 7]] = 0
    for X in (raw, sparse.csr_matrix(raw), sparse.csc_matrix(raw)):
        found = validate(anndata(X))
        assert found.n_empty_cells == 2
        assert any("2 of 40 cells are empty" in message for message in found.messages)


def test_a_stored_zero_is_no_count(raw):
    X = sparse.csr_matrix(raw)
    X.data[X.indptr[4] : X.indptr[5]] = 0
    assert validate(anndata(X)).n_empty_cells == 1


def test_repeated_entries_of_a_sparse_matrix_are_one_value():
    X = sparse.csr_matrix((np.array([0.5, 0.5, 2.0]), np.array([1, 1, 0]), np.array([0, 2, 3])), shape=(2, 2))
    adata = anndata(X)
    assert validate(adata).matrix.toarray().tolist() == [[0, 1], [2, 0]]
    assert adata.X.data.tolist() == [0.5, 0.5, 2.0]


def test_duplicate_genes_are_left_to_the_alignment(raw):
    adata = anndata(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata warns too
        adata.var_names = ["same"] * 3 + list(adata.var_names[3:])
    found = validate(adata)
    assert any("2 gene names occur more than once" in message for message in found.messages)
    assert list(found.var.index[:3]) == ["same"] * 3


def test_ones_alone_are_suspicious(raw):
    assert any("binarized" in message for message in validate(anndata((raw > 0) * 1)).messages)
    found = validate(anndata(sparse.csr_matrix(raw > 0)))
    assert found.matrix.dtype == np.uint8
    assert found.matrix.sum() == (raw > 0).sum()


# Refused -------------------------------------------------------------------------------------------------

WRONG = {
    "log1p of counts normalized": lambda x: np.log1p(normalized(x)),
    "log1p of counts:": np.log1p,
    r"log2\(x \+ 1\) of counts": lambda x: np.log2(x + 1),
    "log-transformed": lambda x: np.log1p(normalized(x))[:, :20],
    "normalized to 10,000 per cell": normalized,
    "normalized to 1 per cell": lambda x: normalized(x, 1.0),
    "TPM, normalized or corrected": lambda x: (
        x * 1.37 + (x > 0) * 20 * np.linspace(0.31, 1.7, len(x))[:, None]
    ),
    "scaled": lambda x: (x - x.mean(axis=0)) / x.std(axis=0),
    "1 NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, np.nan, x),
    "1 infinite": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, np.inf, x),
    "negative values .e.g. -1": lambda x: (
        (x - (np.arange(x.size).reshape(x.shape) == 5) * 100).astype(int).clip(-1)
    ),
    "only zeros": np.zeros_like,
    "complex": lambda x: x.astype(complex),
}


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_values_are_named_and_the_way_out_is_given(raw, kind, form):
    X = WRONG[kind](raw)
    adata = anndata({"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[form](X))
    with pytest.raises(DataError, match=kind.rstrip(":")) as error:
        validate(adata)
    message = str(error.value)
    assert message.startswith("X has ")
    assert 'layers["counts"]' in message
    assert "layer=" in message
    assert "\n" not in message


def test_proportions_do_not_pass_as_empty_cells():
    with pytest.raises(DataError, match="not integers"):
        CountsChecker("X").update(np.array([1e-4, 5e-4, 2.0]))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_no_cells_or_no_genes_is_refused(shape):
    with pytest.raises(DataError, match="cells" if shape[0] == 0 else "genes"):
        validate(anndata(np.zeros(shape, np.float32)))


def test_repeated_cell_names_are_refused_with_the_way_out(raw):
    adata = anndata(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata warns too
        adata.obs_names = ["a", "a", "b", "b", *adata.obs_names[4:]]
    with pytest.raises(DataError, match=r"\(a, b\).*obs_names_make_unique"):
        validate(adata)


# Where the counts are ------------------------------------------------------------------------------------


def with_raw(X: np.ndarray, raw_X: np.ndarray, **layers: np.ndarray) -> ad.AnnData:
    adata = anndata(raw_X)
    adata.raw = adata.copy()
    adata = adata[:, :20].copy()
    adata.X = X[:, :20]
    for name, values in layers.items():
        adata.layers[name] = values[:, :20]
    return adata


def test_x_comes_first(raw):
    assert validate(with_raw(raw, raw, counts=raw)).source == "X"


def test_raw_is_taken_with_its_own_genes_where_x_is_not_counts(raw):
    found = validate(with_raw(np.log1p(normalized(raw)), raw, counts=raw))
    assert found.source == "raw.X"
    assert found.matrix.shape == (N_CELLS, N_GENES)
    assert len(found.var) == N_GENES
    assert found.messages[0].startswith("counts are taken from raw.X, because X has")


def test_the_counts_layer_is_taken_where_raw_is_not_counts(raw):
    logged = np.log1p(normalized(raw))
    found = validate(with_raw(logged, logged, counts=raw))
    assert found.source == 'layers["counts"]'
    np.testing.assert_array_equal(found.matrix.toarray(), raw[:, :20])
    assert "X has" in found.messages[0]
    assert "raw.X has" in found.messages[0]


def test_all_places_are_named_where_none_holds_counts(raw):
    logged = np.log1p(normalized(raw))
    with pytest.raises(DataError) as error:
        validate(with_raw(logged, logged, counts=normalized(raw)))
    for source in ("X has", "raw.X has", 'layers["counts"] has'):
        assert source in str(error.value)


def test_layer_forces_the_place(raw):
    logged = np.log1p(normalized(raw))
    adata = with_raw(raw, raw, umi=raw, scaled=logged)
    assert validate(adata, layer="umi").source == 'layers["umi"]'
    assert validate(adata, layer="raw.X").source == "raw.X"
    assert validate(adata, layer="X").source == "X"
    with pytest.raises(DataError, match=r'layers\["scaled"\] has'):
        validate(adata, layer="scaled")
    with pytest.raises(DataError, match=r"'spliced'.*'umi', 'scaled'"):
        validate(adata, layer="spliced")
    with pytest.raises(DataError, match=r"layer 'raw\.X'"):
        validate(anndata(raw), layer="raw.X")


def test_without_x_the_layer_is_taken(raw):
    adata = ad.AnnData(
        obs=pd.DataFrame(index=[str(i) for i in range(N_CELLS)]),
        var=pd.DataFrame(index=[str(i) for i in range(N_GENES)]),
    )
    with pytest.raises(DataError, match="no X"):
        validate(adata)
    adata.layers["counts"] = raw
    assert validate(adata).source == 'layers["counts"]'


def test_a_view_is_read_as_itself(raw):
    view = anndata(sparse.csr_matrix(raw))[5:9, ::2]
    np.testing.assert_array_equal(validate(view).matrix.toarray(), raw[5:9, ::2])


# Backed files and streams --------------------------------------------------------------------------------


@pytest.fixture(params=[97, 10**6], ids=["many blocks", "one block"])
def block_values(request, monkeypatch):
    monkeypatch.setattr(counts, "BLOCK_VALUES", request.param)


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
def test_a_backed_file_is_checked_and_left_on_disk(raw, form, tmp_path, block_values):
    raw[11] = 0
    anndata(FORMS[form](raw)).write_h5ad(tmp_path / "cells.h5ad")
    adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    found = validate(adata)
    assert found.n_empty_cells == 1
    assert not isinstance(found.matrix, np.ndarray)
    assert not sparse.issparse(found.matrix)
    np.testing.assert_array_equal(dense(found.matrix[:]), raw)


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
def test_a_wrong_value_anywhere_in_a_backed_file_is_found(raw, form, tmp_path, block_values):
    raw[33, 27] = 0.25
    anndata(FORMS[form](raw)).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(DataError, match=r"0\.25"):
        validate(ad.read_h5ad(tmp_path / "cells.h5ad", backed="r"))


def test_raw_of_a_backed_file_is_read(raw, tmp_path, block_values):
    with_raw(np.log1p(normalized(raw)), raw).write_h5ad(tmp_path / "cells.h5ad")
    found = validate(ad.read_h5ad(tmp_path / "cells.h5ad", backed="r"))
    assert found.source == "raw.X"
    np.testing.assert_array_equal(dense(found.matrix[:]), raw)


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
def test_blocks_do_not_change_what_is_returned(raw, form, monkeypatch):
    whole = validate(anndata(FORMS[form](raw)))
    monkeypatch.setattr(counts, "BLOCK_VALUES", 61)
    parts = validate(anndata(FORMS[form](raw)))
    assert (whole.matrix != parts.matrix).nnz == 0


def test_a_stream_is_refused_at_its_first_wrong_block(raw):
    checker = CountsChecker("X of cells.h5ad")
    checker.update(raw[:10])
    checker.update(sparse.csr_matrix(raw[10:20]))
    checker.update(raw[20].astype(np.int32))
    checker.update(np.array([], np.float32))
    assert checker.n_nonzero == np.count_nonzero(raw[:21])
    assert checker.maximum == raw[:21].max()
    checker.finish()
    with pytest.raises(DataError, match=r"X of cells\.h5ad .*negative"):
        checker.update(-raw[21:])


def test_a_stream_without_counts_is_refused_at_its_end():
    checker = CountsChecker("X")
    checker.update(np.zeros(5))
    with pytest.raises(DataError, match="every cell"):
        checker.finish()


def test_exact_integers_round_only_what_differs(raw):
    for matrix in (raw, sparse.csr_matrix(raw), raw.astype(np.int32)):
        assert exact_integers(matrix) is matrix
    noisy = sparse.csr_matrix(raw)
    noisy.data = noisy.data + 1e-4
    np.testing.assert_array_equal(exact_integers(noisy).toarray(), raw)
    np.testing.assert_array_equal(exact_integers(raw + 1e-4), raw)


# Real files ----------------------------------------------------------------------------------------------


def test_real_counts_are_accepted_and_real_tpm_is_refused(shared_data):
    pbmc = validate(ad.read_h5ad(shared_data / "single_cell" / "pbmc3k_10x.h5ad", backed="r"))
    assert pbmc.source == "X"
    assert pbmc.n_empty_cells == 0
    assert pbmc.messages == ()
    glioma = shared_data / "unlabelled" / "glioma_oligo_tirosh.h5ad"
    for adata in (ad.read_h5ad(glioma), ad.read_h5ad(glioma, backed="r")):
        with pytest.raises(DataError, match="integers"):
            validate(adata)
