"""Colors, panels, limits and files of the plots of cells."""

from __future__ import annotations

import contextlib
import io
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from sct.errors import ConfigError, DataError, MissingExtraError
from tests.pl.test_pl import (
    CURVES,
    axes,
    cells,
    imputed_slide,
    legend,
    points,
    same,
    slide,
    state,
)

matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib: make install brings it")
from matplotlib.collections import EllipseCollection  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402

import sct.pl  # noqa: E402
from sct.pl import style  # noqa: E402


def labeled(labels, **columns) -> AnnData:
    adata = AnnData(np.zeros((len(labels), 1), np.float32), obs={"label": labels, **columns})
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(len(labels), 2))
    return adata


def colors_of(ax, adata: AnnData, key: str = "label") -> dict[str, str]:
    """Color of each label, which all its cells have."""
    found: dict[tuple, str] = {}
    for collection in ax.collections:
        faces = collection.get_facecolors()
        for i, place in enumerate(collection.get_offsets()):
            found[tuple(place)] = to_hex(faces[i % len(faces)])
    colors: dict[str, set[str]] = {}
    for place, label in zip(adata.obsm["X_umap"], adata.obs[key], strict=True):
        colors.setdefault(str(label), set()).add(found[tuple(place)])
    assert all(len(each) == 1 for each in colors.values())
    return {label: next(iter(each)) for label, each in colors.items()}


def test_a_palette_has_no_color_twice_and_no_look_alikes():
    from sct.pl.style import _oklab, _rgb

    for n, apart in ((8, 0.09), (20, 0.09), (102, 0.07)):
        colors = style.distinct_colors(n)
        assert len(set(colors)) == n
        lab = _oklab(np.stack([_rgb(each) for each in (*colors, style.GRAY, "#ffffff")]))
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(len(lab))
        assert distance.min() > apart
        assert style.distinct_colors(102)[:n] == colors
    # White, black and mid gray of OKLab.
    np.testing.assert_allclose(_oklab(np.array([255.0] * 3)), [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(_oklab(np.array([0.0] * 3)), 0, atol=1e-12)
    # Red, from the definition of OKLab.
    np.testing.assert_allclose(_oklab(np.array([255.0, 0, 0])), [0.62796, 0.22486, 0.12585], atol=1e-4)


@pytest.mark.parametrize("n", [9, 30, 100])
def test_each_of_many_labels_has_its_own_color(n):
    adata = labeled(np.repeat([f"type {i:03d}" for i in range(n)], 2))
    for ax in (axes(), axes(3)[1]):
        sct.pl.umap(adata, "label", ax=ax)
        colors = colors_of(ax, adata)
        assert len(set(colors.values())) == n
        assert style.GRAY not in colors.values()
        shown = {line.get_color() for line in ax.get_legend().get_lines()}
        assert shown == set(colors.values())


def test_of_too_many_labels_the_commonest_are_named():
    # Categories 0 to 103 with 104, 103, ... 1 cells.
    adata = labeled(np.repeat([f"type {i:03d}" for i in range(104)], np.arange(104, 0, -1)))
    sct.pl.umap(adata, color="label", ax=(ax := axes()))
    assert legend(ax) == [f"type {i:03d}" for i in range(100)] + ["4 rarer categories (10 cells)"]
    colors = colors_of(ax, adata)
    assert {label for label, color in colors.items() if color == style.GRAY} == {
        f"type {i}" for i in range(100, 104)
    }
    assert len(points(ax)) == adata.n_obs


@pytest.mark.parametrize("categorical", [True, False])
def test_what_has_no_label_is_gray_and_last(categorical):
    labels = pd.Series(["unknown", "B", None, "T", "Unassigned", "B", "nan"], dtype=object)
    adata = labeled(labels.astype("category").to_numpy() if categorical else labels.to_numpy())
    if categorical:
        adata.obs["label"] = adata.obs["label"].astype("category")
    sct.pl.umap(adata, "label", ax=(ax := axes()))
    colors = colors_of(ax, adata)
    gray = {label for label, color in colors.items() if color == style.GRAY}
    assert gray == {"unknown", "Unassigned", "nan", str(adata.obs["label"].iloc[2])}
    assert [colors["B"], colors["T"]] == list(style.COLORS[:2])
    assert legend(ax) == ["B", "T", "Unassigned", "nan", "unknown", "no value (1 cells)"]


def test_colors_in_uns_are_used():
    adata = labeled(pd.Categorical(["T", "B", "unknown", "T"], ["T", "B", "unknown"]))
    adata.uns["label_colors"] = ["red", "#00ff00", "#0000ff"]
    sct.pl.umap(adata, "label", ax=(ax := axes()))
    assert colors_of(ax, adata) == {"T": "#ff0000", "B": "#00ff00", "unknown": "#0000ff"}
    # A subset keeps the colors of its labels.
    part = adata[1:3].copy()
    sct.pl.umap(part, "label", ax=(ax := axes()))
    assert colors_of(ax, part) == {"B": "#00ff00", "unknown": "#0000ff"}
    for wrong in (["red"], ["red", "greenish", "blue"]):
        adata.uns["label_colors"] = wrong
        with pytest.warns(UserWarning, match="label_colors"):
            sct.pl.umap(adata, "label", ax=(ax := axes()))
        assert colors_of(ax, adata)["T"] == style.COLORS[0]


def test_the_colors_of_scanpy_are_the_colors_of_sct():
    sc = pytest.importorskip("scanpy", reason="scanpy is not installed: make install brings it")
    adata = labeled(pd.Categorical([f"type {i % 12}" for i in range(60)]))
    sc.pl.umap(adata, color="label", show=False)
    sct.pl.umap(adata, "label", ax=(ax := axes()))
    names = adata.obs["label"].cat.categories
    assert colors_of(ax, adata) == dict(
        zip(names, [to_hex(c) for c in adata.uns["label_colors"]], strict=True)
    )


def test_one_outlier_does_not_darken_a_gene():
    adata = AnnData(np.arange(1000, dtype=np.float32)[:, None] % 10)
    adata.var_names = ["CD3E"]
    adata.X[0] = 5000
    adata.obsm["X_umap"] = adata.obsm["spatial"] = np.random.default_rng(0).random((1000, 2))
    for draw in (sct.pl.umap, sct.pl.spatial):
        ax = draw(adata, "CD3E")
        assert ax.collections[-1].get_clim() == (0, 9)
        (bar,) = (other for other in ax.figure.axes if other is not ax)
        assert bar.get_ylabel() == "raw counts"
        assert bar._colorbar.extend == "max"
        for options, clim, extend in (
            ({"vmax": None}, (0, 5000), "neither"),
            ({"vmax": 4}, (0, 4), "max"),
            ({"vmin": 2, "vmax": "p50"}, (2, 5), "both"),
            ({"vmin": "p10", "vmax": 6000}, (1, 6000), "min"),
        ):
            ax = draw(adata, "CD3E", **options)
            (bar,) = (other for other in ax.figure.axes if other is not ax)
            assert (ax.collections[-1].get_clim(), bar._colorbar.extend) == (clim, extend)


def test_a_rare_gene_is_still_seen():
    adata = AnnData(np.zeros((1000, 1), np.float32))
    adata.var_names = ["RARE"]
    adata.X[:3, 0] = [1, 2, 3]
    adata.obsm["X_umap"] = np.random.default_rng(0).random((1000, 2))
    ax = sct.pl.umap(adata, "RARE", ax=axes())
    assert ax.collections[-1].get_clim() == (0, 3)
    adata.X[:] = 0
    assert sct.pl.umap(adata, "RARE", ax=axes()).collections[-1].get_clim() == (0, 1)


def test_the_color_bar_names_the_unit():
    adata, wrong = imputed_slide(), {}
    adata.obsm["X_umap"] = adata.obsm["spatial"]
    adata.layers["scaled"] = adata.X.toarray() - 2
    adata.layers["sct_probability"] = adata.X.toarray() / 50
    cases = {
        ("EPCAM", None): "raw counts",
        ("EPCAM", "sct_expected"): "expected raw counts",
        ("EPCAM", "sct_level"): "expression level",
        ("EPCAM", "sct_probability"): "probability of expression",
        ("EPCAM", "scaled"): "scaled expression",
        ("total", None): "total",
    }
    for (name, layer), unit in cases.items():
        for draw in (sct.pl.umap, sct.pl.spatial):
            ax = draw(adata, name, layer=layer)
            (bar,) = (other for other in ax.figure.axes if other is not ax)
            if bar.get_ylabel() != unit:
                wrong[draw.__name__, name, layer] = bar.get_ylabel()
    adata.X = adata.X.log1p()
    for uns, unit in (({}, "expression"), ({"log1p": {"base": None}}, "log1p expression")):
        adata.uns.update(uns)
        ax = sct.pl.umap(adata, "EPCAM")
        (bar,) = (other for other in ax.figure.axes if other is not ax)
        if bar.get_ylabel() != unit:
            wrong[unit] = bar.get_ylabel()
    assert not wrong


def test_a_list_has_a_panel_each():
    adata = slide()
    before = state(adata)
    for draw in (sct.pl.umap, sct.pl.spatial):
        panels = draw(adata, ["cell_type", "CD8A", "total", None], ncols=2)
        assert isinstance(panels, list)
        assert [ax.get_title() for ax in panels] == ["cell_type", "CD8A", "total", ""]
        grid = [ax.get_subplotspec().rowspan.start for ax in panels]
        assert grid == [0, 0, 1, 1]
        assert draw(adata, ["total"])[0].get_title() == "total"
        given = axes(2)
        assert draw(adata, ["total", "CD8A"], ax=given) == list(given)
        with pytest.raises(DataError, match="axes"):
            draw(adata, ["total", "CD8A"], ax=axes())
        with pytest.raises(DataError, match="color"):
            draw(adata, [])
        with pytest.raises(DataError, match="color"):
            draw(adata, [3])
    assert same(before, state(adata))


def test_legends_of_panels_overlap_nothing():
    labels = [f"a cell type with a long name {i % 30}" for i in range(300)]
    adata = labeled(labels, other=labels, number=np.arange(300.0))
    panels = sct.pl.umap(adata, ["label", "number", "other", "label"], ncols=2)
    figure = panels[0].figure
    figure.canvas.draw()
    boxes = [ax.get_window_extent() for ax in figure.axes]
    boxes += [ax.get_legend().get_window_extent() for ax in panels if ax.get_legend()]
    for i, one in enumerate(boxes):
        assert figure.bbox.x0 <= one.x0
        assert one.x1 <= figure.bbox.x1 + 1
        assert not any(one.padded(-1).overlaps(other) for other in boxes[i + 1 :])
    assert min(ax.get_window_extent().width for ax in panels) > 200


def test_names_can_stand_on_the_cells_or_be_left_out():
    adata = cells()
    ax = sct.pl.umap(adata, "cell_type", legend_loc="on data", ax=axes())
    assert ax.get_legend() is None
    texts = {text.get_text(): text.get_position() for text in ax.texts}
    assert set(texts) == {"T", "B", "_odd $x$"}
    chosen = adata.obsm["X_umap"][(adata.obs["cell_type"] == "T").to_numpy()]
    np.testing.assert_allclose(texts["T"], np.median(chosen, axis=0))
    assert sct.pl.umap(adata, "cell_type", legend_loc=None, ax=axes()).get_legend() is None
    with pytest.raises(ConfigError, match="legend_loc"):
        sct.pl.umap(adata, "cell_type", legend_loc="left", ax=axes())


def test_a_map_shows_labels_and_measured_genes():
    adata = slide()
    ax = sct.pl.spatial(adata, "cell_type", ax=axes())
    assert legend(ax) == ["T", "B", "_odd $x$"]
    faces = [to_hex(each) for each in ax.collections[-1].get_facecolors()]
    table = pd.crosstab(adata.obs["cell_type"].to_numpy(), np.array(faces))
    assert ((table > 0).sum(axis=0) == 1).all()
    np.testing.assert_array_equal(points(ax, EllipseCollection), adata.obsm["spatial"])
    ax = sct.pl.spatial(adata, "CD8A", ax=axes())
    np.testing.assert_array_equal(ax.collections[-1].get_array(), adata.X.toarray()[:, 1])
    ax = sct.pl.spatial(adata, "CD8A", layer="log", ax=axes())
    np.testing.assert_array_equal(ax.collections[-1].get_array(), adata.layers["log"].toarray()[:, 1])
    assert ax.get_title() == "CD8A, log"
    imputed = imputed_slide()
    panels = sct.pl.spatial(imputed, ["cell_type", "EPCAM"], layer="sct_expected", compare=True)
    assert [each.get_title() for each in panels] == ["cell_type", "EPCAM, imputed", "EPCAM, observed"]
    # The two maps of a gene stay in one row.
    for ncols, rows in ((3, [0, 0, 0]), (2, [0, 1, 1]), (1, [0, 1, 1])):
        panels = sct.pl.spatial(
            imputed, ["cell_type", "EPCAM"], layer="sct_expected", compare=True, ncols=ncols
        )
        assert [ax.get_subplotspec().rowspan.start for ax in panels] == rows
        assert len(panels[0].figure.axes) == 4
    with pytest.raises(DataError, match="compare"):
        sct.pl.spatial(adata, "CD8A", compare=True)


def test_a_gene_may_be_named_as_in_a_column_of_var():
    adata = slide()
    symbols = list(adata.var_names)
    adata.var_names = [f"ENSG{i}" for i in range(4)]
    adata.var["feature_name"] = symbols
    ax = sct.pl.umap(adata, "CD8A", ax=axes())
    assert sorted(ax.collections[-1].get_array()) == sorted(adata.X.toarray()[:, 1])
    adata.var["feature_name"] = ["CD8A", "CD8A", "x", "y"]
    with pytest.raises(DataError, match="'CD8A' 2 times"):
        sct.pl.umap(adata, "CD8A", ax=axes())


def test_spots_have_the_size_of_the_spots():
    adata = slide()

    def widths(**options):
        return sct.pl.spatial(adata, "total", ax=axes(), **options).collections[-1].get_widths()

    np.testing.assert_allclose(widths(), 100)
    np.testing.assert_allclose(widths(spot_size=30), 30)
    adata.uns["spatial"] = {"slide": {"scalefactors": {"spot_diameter_fullres": 55.0}}}
    np.testing.assert_allclose(widths(), 55)
    adata.obsm["other"] = adata.obsm["spatial"] * 2
    np.testing.assert_allclose(widths(spatial_key="other"), 200)
    with pytest.raises(ConfigError, match="spot_size"):
        widths(spot_size=0)


def test_a_missing_umap_is_told_with_the_two_calls():
    adata = cells()
    del adata.obsm["X_umap"]
    before = state(adata)
    calls = r'sc\.pp\.neighbors\(adata, use_rep="{}"\) and sc\.tl\.umap\(adata\)'
    with pytest.raises(DataError, match=calls.format("X_sct")):
        sct.pl.umap(adata)
    with pytest.raises(DataError, match="X_sct.*5 columns.*" + calls.format("X_sct")):
        sct.pl.umap(adata, basis="X_sct")
    adata.obsm["X_mine"] = adata.obsm["X_sct"]
    adata.uns["X_mine"] = {"weights": "abc"}  # as sct.tl.embed(key_added="X_mine") writes
    with pytest.raises(DataError, match=calls.format("X_mine")):
        sct.pl.umap(adata)
    del adata.obsm["X_mine"], adata.obsm["X_sct"]
    with pytest.raises(DataError, match=r"sct\.tl\.embed\(adata, model\), " + calls.format("X_sct")):
        sct.pl.umap(adata)
    before.pop("obsm/X_sct")
    assert {key for key in state(adata) if key.startswith("obsm")} == {
        k for k in before if k.startswith("obsm")
    }


def test_without_scanpy_the_missing_umap_names_the_extra(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    adata = cells()
    sct.pl.umap(adata, ax=axes())
    del adata.obsm["X_umap"]
    with pytest.raises(MissingExtraError, match=r"scanpy.*sct-jax\[analysis\]"):
        sct.pl.umap(adata)


SAVED = {
    "umap": lambda save: sct.pl.umap(cells(), ["cell_type", "CD8A"], save=save),
    "spatial": lambda save: sct.pl.spatial(slide(), "cell_type", save=save),
    "confusion": lambda save: sct.pl.imputation_confusion(np.arange(25).reshape(5, 5), save=save),
    "curves": lambda save: sct.pl.mcc_by_ratio(CURVES, save=save),
    "reliability": lambda save: sct.pl.reliability({"a": ([0.2], [0.3], [4])}, save=save),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_plot_is_saved_in_the_format_of_its_suffix(name, tmp_path):
    starts = {"png": b"\x89PNG", "PDF": b"%PDF", "svg": b"<?xml", "jpg": b"\xff\xd8"}
    for suffix, start in starts.items():
        path = tmp_path / f"plot.{suffix}"
        path.write_bytes(b"old")
        SAVED[name](path if suffix == "png" else str(path))
        first = path.read_bytes()
        assert first.startswith(start)
        SAVED[name](path)
        assert path.read_bytes() == first
    ET.fromstring((tmp_path / "plot.svg").read_text())
    assert len(list(tmp_path.iterdir())) == len(starts)


@pytest.mark.parametrize("name", SAVED)
def test_a_file_that_cannot_be_written_is_told_before_drawing(name, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "subplots", lambda *_, **__: pytest.fail("drawn"))
    for save, message in (
        ("plot.gif", r"suffix.*'gif'.*'png'"),
        ("plot", "suffix"),
        (tmp_path / "none" / "plot.png", "folder"),
        (tmp_path, "folder"),
        (3, "save"),
    ):
        with pytest.raises(ConfigError, match=message):
            SAVED[name](save)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "plot.png"
    path.write_bytes(b"old")

    def half(self, out, **options):
        out.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(KeyboardInterrupt):
        sct.pl.umap(cells(), save=path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_many_points_are_one_image_in_a_vector_file(tmp_path):
    n = 20_000
    adata = labeled(np.arange(n) % 3)
    adata.obs["label"] = adata.obs["label"].astype(str)
    sct.pl.umap(adata, "label", save=tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "<image" in text
    assert len(text) < 1_500_000
    assert io.StringIO(text).readline().startswith("<?xml")


@pytest.mark.parametrize(
    "options",
    [
        {"vmax": "99"},
        {"vmax": "p101"},
        {"vmin": "px"},
        {"vmin": [1]},
        {"vmax": float("nan")},
        {"vmin": 3, "vmax": 2},
        {"vmax": {}},
        {"vmin": 1j},
        {"vmin": True},
        {"vmin": "p50", "vmax": "p10"},
        {"vmin": 1e9},
    ],
)
def test_limits_that_cannot_be_are_refused(options):
    for draw in (sct.pl.umap, sct.pl.spatial):
        with pytest.raises(ConfigError, match="|".join(options)):
            draw(slide(), "CD8A", **options)


@pytest.mark.slow
def test_from_an_embedding_to_the_plot_as_in_scanpy(tmp_path):
    sc = pytest.importorskip("scanpy", reason="scanpy is not installed: make install brings it")
    adata = cells()
    del adata.obsm["X_umap"]
    sc.pp.neighbors(adata, use_rep="X_sct")
    sc.tl.umap(adata)
    panels = sct.pl.umap(adata, ["cell_type", "CD8A"], save=tmp_path / "umap.png")
    np.testing.assert_allclose(
        np.sort(points(panels[0]), axis=0), np.sort(adata.obsm["X_umap"], axis=0), rtol=1e-6
    )


def test_colors_in_uns_may_be_rows_of_red_green_and_blue():
    adata = labeled(pd.Categorical(["T", "B", "C", "T"], ["T", "B", "C"]))
    names, rgb = ["red", "#00ff00", "blue"], np.eye(3)
    expected = {"T": "#ff0000", "B": "#00ff00", "C": "#0000ff"}
    wrong = []
    for given in (
        names, np.array(names, dtype=object), tuple(map(tuple, rgb)), rgb, rgb.astype(np.float32), rgb.tolist(),
        np.column_stack([rgb, np.ones(3)]), ["red", (0.0, 1.0, 0.0), np.array([0, 0, 1])],
    ):  # fmt: skip
        adata.uns["label_colors"] = given
        sct.pl.umap(adata, "label", ax=(ax := axes()))
        if colors_of(ax, adata) != expected:
            wrong.append((given, colors_of(ax, adata)))
    for given in (
        rgb * 255, rgb[:, :2], [(np.nan, 0, 0)] * 3, [0.1, 0.2, 0.3], {"T": "red"}, 5, ["red", ["a"], None],
        np.zeros((3, 3, 3)),
    ):  # fmt: skip
        adata.uns["label_colors"] = given
        with pytest.warns(UserWarning, match="label_colors") as caught:
            sct.pl.umap(adata, "label", ax=(ax := axes()))
        if colors_of(ax, adata)["T"] != style.COLORS[0] or caught[0].filename != __file__:
            wrong.append((given, caught[0].filename))
    assert not wrong


def test_columns_of_any_type_are_drawn_or_refused():
    adata, wrong = cells(), []
    n = adata.n_obs
    missing = np.arange(n) % 3 == 0

    def nullable(values, dtype):
        return pd.array(
            [None if gap else value for gap, value in zip(missing, values, strict=True)], dtype=dtype
        )

    gap = f"no value ({missing.sum()} cells)"
    for column, expected in (
        (nullable([True, False] * (n // 2), "boolean"), ["False", "True", gap]),
        (nullable(["a", "b"] * (n // 2), "string"), ["a", "b", gap]),
        (nullable([True, False] * (n // 2), object), ["False", "True", gap]),
        (nullable([pd.Timestamp("2020-01-01")] * n, "datetime64[ns]"), ["2020-01-01 00:00:00", gap]),
        (nullable(range(n), "Int64"), None),
        (nullable(range(n), "Float64"), None),
        (pd.arrays.SparseArray(np.arange(n) % 2), None),
        (np.arange(n, dtype=np.uint8), None),
    ):
        adata.obs["column"] = column
        try:
            sct.pl.umap(adata, "column", ax=(ax := axes()))
        except Exception as error:
            wrong.append((column, error))
            continue
        if expected is not None and legend(ax) != expected:
            wrong.append((column, legend(ax)))
        if expected is None and len(ax.collections[-1].get_array()) != (~pd.isna(column)).sum():
            wrong.append((column, "cells"))
    assert not wrong
    adata.obs["column"] = np.ones(n) * 1j
    adata.layers["waves"] = adata.X * 1j
    for color, layer in (("column", None), ("CD8A", "waves")):
        with pytest.raises(DataError, match="complex"):
            sct.pl.umap(adata, color, layer=layer)


def test_what_is_no_color_and_no_axes_is_refused():
    for draw in (sct.pl.umap, sct.pl.spatial):
        for options in (
            {"color": 5},
            {"color": [5]},
            {"ax": 3},
            {"color": ["CD8A", "total"], "ax": [axes(), 3]},
        ):
            with pytest.raises(DataError, match="ax is" if "ax" in options else "color is"):
                draw(slide(), **options)
    for draw, data in (
        (sct.pl.mcc_by_ratio, {"model": [(0.5, [0.1])]}),
        (sct.pl.imputation_confusion, np.eye(5)),
    ):
        with pytest.raises(DataError, match="ax is"):
            draw(data, ax=3)


def test_a_limit_never_changes_the_other_one():
    from sct.pl.coloring import limits

    values, wrong = np.array([0.0, 1, 2, 5]), []
    for vmin, vmax in (
        (5, "p99"), (10, "p99"), (10, None), (10, "p10"), (None, -1), (None, 0), ("p50", -1), ("p50", "p10"),
        ("p10", "p10"), (np.float32(9), np.float64(3)),
    ):  # fmt: skip
        with contextlib.suppress(ConfigError):
            wrong.append((vmin, vmax, limits(values, vmin, vmax)))
    assert not wrong
    for vmin, vmax, expected in (
        (3, "p50", (3, 5)), ("p50", 1, (0, 1)), (10, 20, (10, 20)), (np.float32(1), np.int64(4), (1, 4)),
    ):  # fmt: skip
        assert limits(values, vmin, vmax)[:2] == expected
    assert limits(np.zeros(3), 0, "p99")[:2] == limits(np.zeros(3), None, None)[:2] == (0, 1)
    assert limits(np.full(3, 3.0), None, 3, from_zero=False)[:2] == (2, 3)
