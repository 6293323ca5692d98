"""Plots: what is drawn, what is written into the data, and what wrong input is told."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from sct.errors import DataError, MissingExtraError

matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib: make install brings it")
from matplotlib.collections import EllipseCollection, PathCollection  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import sct.pl  # noqa: E402

N = 60
BAR = "most common expressed level per gene, other cells of the study"
CURVES = {
    "model": [(0.15, [0.5, 0.6]), (0.8, [0.3, 0.5])],
    BAR: [(0.15, [0.55, 0.55]), (0.8, [0.56, 0.54])],
    "MAGIC": [],
    "_kNN $k$": [(0.8, [0.2, np.nan]), (0.15, [0.3])],
}


def axes(columns: int = 1):
    return Figure(figsize=(4 * columns, 3)).subplots(1, columns)


def cells(n: int = N, seed: int = 0) -> AnnData:
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["T", "B", "_odd $x$"], n), ["T", "B", "unused", "_odd $x$"]),
            "total": rng.random(n),
            "donor": [None if i % 10 == 0 else f"donor {i % 3}" for i in range(n)],
            "good": rng.random(n) > 0.5,
        },
        index=[f"c{i}" for i in range(n)],
    )  # fmt: skip
    adata = AnnData(sparse.random(n, 4, 0.5, "csr", np.float32, rng), obs=obs)
    adata.var_names = ["EPCAM", "CD8A", "CD8B", "MS4A1"]
    adata.layers["log"] = adata.X.log1p()
    adata.obsm["X_sct"] = rng.normal(size=(n, 5)).astype(np.float32)
    adata.obsm["X_umap"] = rng.normal(size=(n, 2))
    return adata


def slide() -> AnnData:
    adata = cells()
    x, y = np.meshgrid(np.arange(10) * 100.0, np.arange(6) * 100.0)
    adata.obsm["spatial"] = np.stack([x.ravel(), y.ravel()], axis=1)
    adata.layers["sct_expected"] = np.random.default_rng(1).random((N, 4)).astype(np.float32)
    adata.obsm["sct_expected"] = pd.DataFrame({"FOXP3": np.arange(N, dtype=float)}, index=adata.obs_names)
    return adata


def maps(adata: AnnData, gene: str, *, compare: bool = True, layer: str = "sct_expected", **options):
    """The imputed and, with `compare`, the observed map of a gene."""
    return sct.pl.spatial(adata, gene, layer=layer, compare=compare, **options)


def points(ax, kind=PathCollection) -> np.ndarray:
    return np.concatenate([c.get_offsets() for c in ax.collections if isinstance(c, kind)])


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def png(figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=60, bbox_inches="tight", metadata={"Software": None})
    return out.getvalue()


def state(adata: AnnData) -> dict[str, object]:
    parts = {
        f"{name}/{key}": np.asarray(value[key]).copy()
        for name in ("obsm", "obs")
        for value in [getattr(adata, name)]
        for key in value
    }
    return {
        **parts,
        "X": adata.X.toarray(),
        "uns": sorted(adata.uns),
        "layers": sorted(filter(None, adata.layers)),
    }


def same(one: dict, other: dict) -> bool:
    def equal(a, b):
        return np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f") or pd.Series(
            np.ravel(a)
        ).equals(pd.Series(np.ravel(b)))

    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("color", [None, "cell_type", "total", "donor", "good", "CD8A"])
def test_umap_draws_every_cell_once_and_writes_nothing(color):
    adata = cells()
    before, ax = state(adata), axes()
    assert sct.pl.umap(adata, color=color, ax=ax) is ax
    drawn = points(ax)
    assert len(drawn) == N
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(adata.obsm["X_umap"], axis=0))
    assert same(before, state(adata))


def test_umap_without_axes_makes_a_new_figure():
    import matplotlib.pyplot as plt

    ax = sct.pl.umap(cells(), color="cell_type")
    assert ax.figure.number in plt.get_fignums()


def test_the_legend_names_what_is_there_letter_by_letter():
    ax = axes()
    sct.pl.umap(cells(), color="cell_type", ax=ax)
    assert legend(ax) == ["T", "B", "_odd $x$"]
    sct.pl.umap(cells(), color="donor", ax=(other := axes()))
    assert legend(other) == ["donor 0", "donor 1", "donor 2", f"no value ({N // 10} cells)"]


def test_colours_follow_the_values():
    adata = cells()
    sct.pl.umap(adata, color="CD8A", layer="log", ax=(ax := axes()))
    drawn = ax.collections[-1]
    by_place = dict(zip(map(tuple, np.asarray(drawn.get_offsets())), drawn.get_array(), strict=True))
    expected = adata.layers["log"].toarray()[:, 1]
    for place, value in zip(adata.obsm["X_umap"], expected, strict=True):
        assert by_place[tuple(place)] == pytest.approx(value)
    sct.pl.umap(adata, color="cell_type", ax=(ax := axes()))
    colors = {}
    for collection in ax.collections:
        for place, color in zip(collection.get_offsets(), collection.get_facecolors(), strict=True):
            colors[tuple(place)] = tuple(color)
    kinds = [colors[tuple(place)] for place in adata.obsm["X_umap"]]
    table = pd.crosstab(adata.obs["cell_type"].to_numpy(), pd.Series(kinds).map(str).to_numpy())
    assert ((table > 0).sum(axis=0) == 1).all()
    assert ((table > 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize("maximum", [30, 45])
def test_a_legend_is_neither_cut_off_nor_over_the_points(maximum):
    labels = np.array([f"a name of some length {i % maximum}" for i in range(200)])
    adata = AnnData(np.zeros((200, 1), np.float32), obs={"label": labels})
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(200, 2))
    ax = sct.pl.umap(adata, color="label")
    ax.figure.canvas.draw()
    box, frame = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert frame.x1 <= box.x0
    assert box.x1 <= ax.figure.bbox.x1
    assert ax.figure.bbox.y0 <= box.y0
    assert box.y1 <= ax.figure.bbox.y1
    assert frame.width > 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"color": "celltype"}, "'cell_type'"),
        ({"color": "cd8a"}, "'CD8A'"),
        ({"color": "CD8A", "layer": "logs"}, r"'logs'.*'log'"),
        ({"basis": "X_umaps"}, r"'X_umaps'.*'X_umap'"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest_ones(options, message):
    with pytest.raises(DataError, match=message) as caught:
        sct.pl.umap(cells(), ax=axes(), **options)
    assert caught.value.args[0].count(". ") == 0


def test_a_broken_embedding_is_refused():
    adata = cells()
    adata.obsm["X_umap"][3, 1] = np.nan
    with pytest.raises(DataError, match=r"obsm\['X_umap'\] .*1 of 60"):
        sct.pl.umap(adata, ax=axes())
    adata = cells()
    adata.obs["empty"] = np.nan
    with pytest.raises(DataError, match="'empty'"):
        sct.pl.umap(adata, color="empty", ax=axes())


def test_the_confusion_matrix_is_annotated_with_shares_and_counts():
    counts = np.array([[0] * 5, [1, 3, 0, 0, 0], [0, 0, 5, 5, 0], [0, 0, 0, 1200, 0], [2, 0, 0, 0, 2]])
    ax = axes()
    assert sct.pl.imputation_confusion(counts, ax=ax) is ax
    texts = np.array([text.get_text() for text in ax.texts]).reshape(5, 5)
    assert texts[0].tolist() == ["0"] * 5
    assert texts[1, 1] == "75%\n3"
    assert texts[3, 3] == "100%\n1,200"
    image = ax.images[0].get_array()
    np.testing.assert_allclose(image[1:].sum(axis=1), 1)
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "unexpressed",
        "low",
        "moderate",
        "high-moderate",
        "high",
    ]
    sct.pl.imputation_confusion(counts, normalize=False, ax=(other := axes()))
    np.testing.assert_array_equal(other.images[0].get_array(), counts)
    assert [text.get_text() for text in other.texts][18] == "1,200"


def test_levels_are_numbered_where_there_are_not_five_and_rows_are_the_last_ones():
    sct.pl.imputation_confusion(np.ones((2, 3), int), ax=(ax := axes()))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "2"]
    sct.pl.imputation_confusion(np.ones((4, 5), int), ax=(ax := axes()))
    assert ax.get_yticklabels()[0].get_text() == "low"
    sct.pl.imputation_confusion(np.eye(60, dtype=int), ax=(ax := axes()))
    assert len(ax.texts) == 0


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((5, 5)), np.ones(5), np.ones((3, 2)), -np.eye(2), np.full((2, 2), np.nan), np.array([["a"]])],
)
def test_what_is_no_matrix_of_counts_is_refused(wrong):
    with pytest.raises(DataError, match="confusion"):
        sct.pl.imputation_confusion(wrong, ax=axes())


def test_curves_are_means_in_the_order_of_their_last_value():
    ax = axes()
    assert sct.pl.mcc_by_ratio(CURVES, models=["model"], reference=[BAR], ax=ax) is ax
    assert [text.replace("\n", " ") for text in legend(ax)] == [BAR, "model", "_kNN $k$", "MAGIC (not run)"]
    # A value of NaN is left out, ratios are sorted, and a method without values has an empty line.
    means = sorted(np.round(line.get_ydata(), 9).tolist() for line in ax.lines)
    assert means == [[], [0.3, 0.2], [0.55, 0.4], [0.55, 0.55]]
    bar = max(ax.lines, key=lambda line: line.get_linewidth())
    assert bar.is_dashed()
    np.testing.assert_allclose(bar.get_ydata(), [0.55, 0.55])
    # Names say nothing: without roles no curve stands out.
    widths = [
        {line.get_linewidth() for line in each.lines} for each in (ax, sct.pl.mcc_by_ratio(CURVES, ax=axes()))
    ]
    assert [len(each) for each in widths] == [3, 1]
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.3)
    assert band[:, 1].max() == pytest.approx(0.6)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["15%", "80%"]


def test_one_ratio_is_drawn_with_its_spread():
    curves = {name: curve[:1] for name, curve in CURVES.items()}
    curves["_kNN $k$"] = [(0.15, [0.3, 0.5])]
    sct.pl.mcc_by_ratio(curves, reference=[BAR], ax=(ax := axes()))
    assert len(ax.containers) == 3


def test_many_curves_all_look_different():
    curves = {f"method {i}": [(0.1, [i / 40]), (0.2, [i / 40])] for i in range(24)}
    sct.pl.mcc_by_ratio(curves, ax=(ax := axes()))
    assert (
        len({(line.get_color(), str(line._unscaled_dash_pattern), line.get_marker()) for line in ax.lines})
        == 24
    )


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "curve"),
        ({"model": []}, "curve"),
        ({"model": [(15, [0.5])]}, "masked fraction .* 15"),
        ({"model": [(0.5, [1.5])]}, r"\[-1, 1\]"),
        ({"model": [(0.5, [0.5]), (0.5, [0.6])]}, "twice"),
    ],
)
def test_curves_that_cannot_be_are_refused(curves, message):
    with pytest.raises(DataError, match=message):
        sct.pl.mcc_by_ratio(curves, ax=axes())


def test_maps_share_one_scale_and_show_every_spot():
    adata, pair = slide(), axes(2)
    before = state(adata)
    out = maps(adata, "EPCAM", ax=pair)
    assert out == list(pair)
    imputed, observed = (ax.collections[-1] for ax in pair)
    assert imputed.get_clim() == observed.get_clim()
    np.testing.assert_allclose(imputed.get_array(), adata.layers["sct_expected"][:, 0])
    np.testing.assert_allclose(observed.get_array(), adata.X.toarray()[:, 0])
    for ax in pair:
        np.testing.assert_array_equal(points(ax, EllipseCollection), adata.obsm["spatial"])
        assert ax.get_aspect() == 1
        assert ax.yaxis_inverted()
        # Spots are as wide as the grid's step, whatever the size of the axes.
        np.testing.assert_allclose(ax.collections[-1].get_widths(), 100)
    assert same(before, state(adata))
    alone = axes()
    assert maps(adata, "EPCAM", compare=False, ax=alone) is alone


def test_a_gene_that_the_panel_lacks_comes_from_the_table():
    adata = slide()
    imputed, observed = maps(adata, "FOXP3", ax=axes(2))
    np.testing.assert_array_equal(imputed.collections[-1].get_array(), np.arange(N))
    assert observed.collections[-1].get_array() is None
    assert len(points(observed, EllipseCollection)) == N
    assert "not in the panel" in observed.get_title()


def test_cells_without_an_imputed_value_are_grey():
    adata = slide()
    adata.layers["sct_expected"][:20, 0] = np.nan
    ax = maps(adata, "EPCAM", compare=False, ax=axes())
    assert [len(c.get_offsets()) for c in ax.collections] == [20, 40]
    assert len(ax.collections[1].get_array()) == 40


def imputed_slide(
    genes=("EPCAM",), rows=None, counts_from="X", var_names=("EPCAM",), var_column=False
) -> AnnData:
    """What sct.tl.impute leaves: counts, with 0.25 more where genes of cells were imputed, and a record."""
    adata = slide()
    del adata.obsm["sct_expected"]
    counts = np.random.default_rng(2).poisson(3.0, (N, 4)).astype(np.float32)
    adata.X = sparse.csr_matrix(counts)
    columns = adata.var_names.get_indexer(["EPCAM"] if genes else adata.var_names)
    chosen = np.arange(N) if rows is None else np.asarray(rows)
    expected = counts.copy()
    expected[np.ix_(chosen, columns)] += 0.25
    adata.layers["sct_expected"] = sparse.csr_matrix(expected)
    adata.layers["sct_level"] = sparse.csr_matrix(np.minimum(counts, 4).astype(np.uint8))
    adata.uns["sct"] = {
        "genes": np.asarray(genes, dtype=str),
        "cells": np.asarray([] if rows is None else adata.obs_names[chosen], dtype=str),
        "counts_from": counts_from,
    }
    if var_names is not None:
        adata.uns["sct"]["var_names"] = np.asarray(var_names, dtype=str)
    if var_column:
        adata.var["gene_ids"] = [f"ENSG{i}" for i in range(4)]
    if counts_from == "raw.X":
        adata.raw = adata.copy()
    elif counts_from != "X":
        adata.layers["counts"] = adata.X.copy()
    if counts_from != "X":
        adata.X = adata.X.log1p()
    return adata


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"genes": ("ENSG0",)},
        {"var_names": None},
        {"genes": ("ENSG0",), "var_names": None, "var_column": True},
        {"rows": range(10)},
    ],
)
def test_a_gene_that_was_not_imputed_is_refused(options):
    adata = imputed_slide(**options)
    maps(adata, "EPCAM", ax=axes(2))
    with pytest.raises(DataError, match=r"'CD8A' .*'EPCAM'") as caught:
        maps(adata, "CD8A", ax=axes(2))
    assert caught.value.args[0].count(". ") == 0


@pytest.mark.parametrize("counts_from", ["X", "raw.X", 'layers["counts"]'])
def test_imputed_and_observed_counts_are_on_one_scale(counts_from, tmp_path):
    import anndata

    adata = imputed_slide(counts_from=counts_from)
    adata.write_h5ad(tmp_path / "x.h5ad")
    adata = anndata.read_h5ad(tmp_path / "x.h5ad")
    imputed, observed = maps(adata, "EPCAM", ax=axes(2))
    imputed_values, observed_values = (ax.collections[-1].get_array() for ax in (imputed, observed))
    np.testing.assert_allclose(imputed_values, observed_values + 0.25)
    np.testing.assert_array_equal(observed_values, np.rint(observed_values))
    assert [ax.get_title() for ax in (imputed, observed)] == ["EPCAM, imputed", "EPCAM, observed"]
    assert "expected raw counts" in [ax.get_ylabel() for ax in imputed.figure.axes]
    half = adata[N // 2 :]
    part, _ = maps(half, "EPCAM", ax=axes(2))
    np.testing.assert_allclose(part.collections[-1].get_array(), imputed_values[N // 2 :])


@pytest.mark.parametrize(("genes", "gene"), [((), "CD8B"), (("EPCAM",), "EPCAM")])
@pytest.mark.parametrize("with_names", [True, False])
def test_only_imputed_cells_have_a_colour_in_the_imputed_map(genes, gene, with_names):
    names = (genes or ("EPCAM", "CD8A", "CD8B")) if with_names else None
    adata = imputed_slide(genes, range(20, 32), var_names=names)
    imputed, observed = maps(adata, gene, ax=axes(2))
    grey, coloured = imputed.collections
    assert (len(grey.get_offsets()), len(coloured.get_offsets())) == (N - 12, 12)
    np.testing.assert_array_equal(coloured.get_offsets(), adata.obsm["spatial"][20:32])
    assert imputed.get_title() == f"{gene}, imputed in 12 of 60 cells"
    assert len(observed.collections[-1].get_array()) == N
    np.testing.assert_allclose(coloured.get_array(), observed.collections[-1].get_array()[20:32] + 0.25)
    if with_names and not genes:
        with pytest.raises(DataError, match="'MS4A1'"):
            maps(adata, "MS4A1", ax=axes(2))
    with pytest.raises(DataError, match=rf"'{gene}' .*20 cells"):
        maps(adata[:20], gene, ax=axes(2))


@pytest.mark.slow
def test_what_the_tool_writes_is_what_the_map_reads():
    from tests.tl import conftest as tools

    adata, model = tools.slide(), tools.made()
    known, unknown = adata.var_names[2], adata.var_names[-1]
    sct.tl.impute(adata, model, genes=[known])
    imputed, observed = maps(adata, known, ax=axes(2))
    np.testing.assert_allclose(
        imputed.collections[-1].get_array(), adata[:, known].layers["sct_expected"].toarray().ravel()
    )
    np.testing.assert_array_equal(observed.collections[-1].get_array(), adata[:, known].X.toarray().ravel())
    with pytest.raises(DataError, match=adata.var_names[3]):
        maps(adata, adata.var_names[3], ax=axes(2))
    sct.tl.impute(adata, model, cells=[0, 7, 8])
    imputed, _ = maps(adata, known, ax=axes(2))
    assert imputed.get_title() == f"{known}, imputed in 3 of {adata.n_obs} cells"
    with pytest.raises(DataError, match=unknown):
        maps(adata, unknown, ax=axes(2))


def test_a_gene_of_a_table_is_compared_under_whatever_name_var_has():
    adata = imputed_slide(("ENSG0",), var_names=(), var_column=True)
    adata.obsm["sct_expected"] = pd.DataFrame({"ENSG0": np.arange(N, dtype=float)}, index=adata.obs_names)
    imputed, observed = maps(adata, "ENSG0", ax=axes(2))
    np.testing.assert_array_equal(imputed.collections[-1].get_array(), np.arange(N))
    np.testing.assert_array_equal(observed.collections[-1].get_array(), adata.X.toarray()[:, 0])
    with pytest.raises(DataError, match="'EPCAM'"):
        maps(adata, "EPCAM", ax=axes(2))


def test_levels_are_drawn_alone():
    adata = imputed_slide()
    with pytest.raises(DataError, match=r"'sct_level' .*compare=False"):
        maps(adata, "EPCAM", layer="sct_level", ax=axes(2))
    ax = maps(adata, "EPCAM", layer="sct_level", compare=False, ax=axes())
    assert ax.get_title() == "EPCAM, imputed level"


def test_a_layer_of_another_origin_is_named_in_the_title():
    imputed, _ = maps(slide(), "EPCAM", ax=axes(2))
    assert imputed.get_title() == "EPCAM, sct_expected"


@pytest.mark.parametrize("counts_from", ["X", "raw.X", 'layers["counts"]'])
def test_observed_counts_that_are_no_longer_there_are_told(counts_from):
    adata = imputed_slide(counts_from=counts_from)
    if counts_from == "X":
        adata.X = adata.X.log1p()
    elif counts_from == "raw.X":
        adata.raw = None
    else:
        del adata.layers["counts"]
    with pytest.raises(DataError, match="compare=False") as caught:
        maps(adata, "EPCAM", ax=axes(2))
    assert counts_from in caught.value.args[0]
    maps(adata, "EPCAM", compare=False, ax=axes())


def test_an_outlier_does_not_take_the_whole_scale():
    n = 1000
    adata = AnnData(np.zeros((n, 1), np.float32))
    adata.var_names = ["EPCAM"]
    adata.obsm["spatial"] = np.random.default_rng(0).random((n, 2))
    adata.layers["sct_expected"] = np.linspace(0, 1, n)[:, None]
    adata.layers["sct_expected"][0] = 1e6
    ax = maps(adata, "EPCAM", compare=False)
    assert ax.collections[-1].get_clim() == pytest.approx((0, 0.995), abs=1e-2)
    (bar,) = (other for other in ax.figure.axes if other is not ax)
    assert bar.get_ylabel() == "expression"


def change(adata: AnnData, name: str) -> AnnData:
    if name == "all NaN":
        adata.layers["sct_expected"][:] = np.nan
    elif name == "one column":
        adata.obsm["spatial"] = adata.obsm["spatial"][:, :1]
    elif name == "twice":
        adata.var_names = ["EPCAM", "EPCAM", "a", "b"]
    return adata


@pytest.mark.parametrize(
    ("gene", "options", "name", "message"),
    [
        ("EPCAMM", {}, "", r"'EPCAMM'.*'EPCAM'"),
        ("EPCAM", {"layer": "other"}, "", "'other'"),
        ("EPCAM", {"spatial_key": "X_spatial"}, "", r"'X_spatial'.*'spatial'"),
        ("EPCAM", {}, "all NaN", "'EPCAM'"),
        ("EPCAM", {}, "one column", r"\(60, 1\)"),
        ("EPCAM", {}, "twice", "'EPCAM'"),
        ("EPCAM", {"compare": False}, "pair", "2 axes"),
    ],
)
def test_a_map_that_cannot_be_drawn_is_refused(gene, options, name, message):
    with pytest.raises(DataError, match=message):
        maps(change(slide(), name), gene, ax=axes(2), **options)


def test_real_slides_are_drawn(shared_data):
    import anndata

    adata = anndata.read_h5ad(shared_data / "spatial" / "st_pdac_moncada.h5ad")
    gene = adata.var_names[int(np.asarray(adata.X.sum(axis=0)).argmax())]
    adata.layers["sct_expected"] = adata.X
    imputed, observed = maps(adata, gene)
    assert len(points(imputed, EllipseCollection)) == len(points(observed, EllipseCollection)) == adata.n_obs
    assert png(imputed.figure)


DRAWINGS = {
    "umap": lambda: sct.pl.umap(cells(), color="cell_type"),
    "panels": lambda: sct.pl.umap(cells(), color=["donor", "CD8A", None])[0],
    "map of labels": lambda: sct.pl.spatial(slide(), "cell_type"),
    "umap of a number": lambda: sct.pl.umap(cells(), color="total"),
    "confusion": lambda: sct.pl.imputation_confusion(np.arange(25).reshape(5, 5)),
    "curves": lambda: sct.pl.mcc_by_ratio(CURVES, models=["model"], reference=[BAR]),
    "spatial": lambda: maps(slide(), "EPCAM")[0],
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_same_call_draws_the_same_picture(name):
    one, other = (png(DRAWINGS[name]().figure) for _ in range(2))
    assert one == other
    assert one.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_missing_library_is_told_with_the_command(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sct-jax\[analysis\]"'):
        DRAWINGS[name]()


def test_naming_the_functions_loads_no_matplotlib():
    names = "[getattr(sct.pl, name) for name in dir(sct.pl)]"
    code = f"import sys, sct.pl; {names}; print('matplotlib' in sys.modules, *dir(sct.pl))"
    root = Path(sct.pl.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    names = ["imputation_confusion", "mcc_by_ratio", "reliability", "spatial", "umap"]
    assert done.stdout.split() == ["False", *names]
    with pytest.raises(AttributeError, match="no_such_plot"):
        _ = sct.pl.no_such_plot
