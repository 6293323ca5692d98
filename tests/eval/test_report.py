"""Tables of results: every number with its seeds, the best bold, readable on any terminal, whole files."""

from __future__ import annotations

import io
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sct.eval.reports import folder as report_folder
from sct.eval.reports.folder import environment
from sct.eval.reports.page import Figure
from sct.eval.reports.report import Column, Report, Summary

REASON = "magic-impute is not installed: pip install magic-impute, then run the command again"
COLUMNS = ("method", "fitted on", "told expressed", "MCC", "gain over the bar", "MAE (counts)", "remark")
BETTER = {"MCC": "max", "gain over the bar": "max", "MAE (counts)": "min"}


def imputation() -> Report:
    made = Report("Imputation [40%] of genes", COLUMNS, notes=("Scored: expressed genes.",), better=BETTER)
    made.add(
        "most common expressed level per gene",
        "other cells of the study",
        "yes",
        [0.5, 0.6],
        [0.0, 0.0],
        [1.2, 1.0],
        "",
    )
    made.add("model", "training studies", "yes", [0.626, 0.6], [0.126, 0.0], [1.5, math.nan], "")
    made.add("MAGIC", "these cells", "no", [], [], [], REASON)
    return made  # fmt: skip


def embedding() -> Report:
    names = ("method", "fitted on", *(f"a longer metric {i}" for i in range(11)), "remark")
    made = Report("Embedding", names)
    made.add("model", "nothing (zero-shot)", *([0.1 * i, 0.2] for i in range(11)), "")
    return made


def shown(made: Report, width: int, **options) -> str:
    out = io.StringIO()
    Console(file=out, width=width, **options).print(made.table(width))
    return out.getvalue()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.41, 0.42, 0.436], "0.422 ± 0.011 (3)"),
        ([0.4216], "0.422 (1)"),
        ([], "-"),
        ([math.nan, math.nan], "n/a"),
        ([0.5, math.nan, 0.7], "0.600 ± 0.100 (2 of 3)"),
        ([-1e-9, -1e-9], "0.000 ± 0.000 (2)"),
        ([1500.0, 1700.0], "1,600.0 ± 100.0 (2)"),
        ([math.inf, 1.0], "inf (2)"),
    ],
)
def test_a_number_is_shown_with_its_seeds(values, text):
    assert str(Summary.of(values)) == text
    made = Report("t", ("a",))
    made.add(values)
    assert f"| {text} |" in made.markdown()


@given(st.lists(st.floats(-900, 900), min_size=1, max_size=9))
def test_mean_and_spread_are_numpys(values):
    found = re.fullmatch(r"(\S+)(?: ± (\S+))? \((\d+)\)", str(Summary.of(values)))
    assert int(found[3]) == len(values)
    assert float(found[1]) == pytest.approx(np.mean(values), abs=6e-4)
    assert (found[2] is None) == (len(values) == 1)
    assert float(found[2] or 0) == pytest.approx(np.std(values), abs=6e-4)


def test_arrays_are_kept_as_lists_of_floats():
    made = Report("t", ("a", "b"))
    made.add(np.array([1, 2]), (np.float32(0.5),))
    assert made.rows == [[[1.0, 2.0], [0.5]]]


def test_the_best_mean_is_bold_in_its_direction():
    made = imputation()
    assert made.best() == {(1, 3), (1, 4), (0, 5)}
    lines = made.markdown().splitlines()
    assert "**0.613 ± 0.013 (2)**" in lines[5]
    assert "**1.100 ± 0.100 (2)**" in lines[4]
    assert made.markdown().count("**") == 2 + 2 * 3
    bold = re.findall(r"\x1b\[1m([^\x1b]*)", shown(made, 160, force_terminal=True, color_system="standard"))
    assert [text for text in bold if "±" in text] == [
        "1.100 ± 0.100 (2)",
        "0.613 ± 0.013 (2)",
        "0.063 ± 0.063 (2)",
    ]


def test_what_reads_the_same_is_equally_good():
    made = Report("t", ("a", "b", "c"), better={"a": "max", "b": "min", "c": "max"})
    made.add([0.50001], [1.0], [0.5])
    made.add([0.50002], [1.0], [math.nan])
    made.add([0.1], [1.0], [])
    # All equal, or one number alone: nothing to point at.
    assert made.best() == {(0, 0), (1, 0)}


@given(
    st.lists(st.lists(st.floats(-5, 5), max_size=3), min_size=1, max_size=6), st.sampled_from(["max", "min"])
)
def test_no_mean_beats_a_bold_one(cells, direction):
    made = Report("t", ("a",), better={"a": direction})
    for cell in cells:
        made.add(cell)
    means = [np.mean(cell) if cell else None for cell in cells]
    sign = 1 if direction == "max" else -1
    for row, _ in made.best():
        assert all(sign * mean <= sign * means[row] + 1e-3 for mean in means if mean is not None)


@pytest.mark.parametrize("better", [{"b": "max"}, {"a": "highest"}])
def test_a_wrong_direction_is_refused(better):
    with pytest.raises(ValueError, match=r"'b'|'highest'"):
        Report("t", ("a",), better=better)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 cells"):
        Report("t", ("a", "b", "c")).add("x", [1.0])


def test_keys_outlive_titles_and_a_report_comes_back_from_its_file(tmp_path):
    columns = (Column("name", "method"), Column("mcc", "MCC (0 to 1)"), Column("mae", "error"), "remark")
    made = Report("t", columns, notes=["n"], better={"mcc": "max"})
    made.add("ours", [0.5, math.nan], [math.inf], "x", key="model")
    made.add("theirs", [0.25], "-", None)
    assert made.keys == ("name", "mcc", "mae", "remark")
    assert "| method | MCC (0 to 1) | error | remark |" in made.markdown()
    for facts in (None, {"seed": "1"}):
        report_folder.write([made, imputation()], tmp_path, facts)
        (again, other) = report_folder.read(tmp_path / "report.json")
        assert other.titles == COLUMNS
        (key, cells), (no_key, _) = again.records()
        assert (key, no_key) == ("model", "")
        assert {name: cells[name] for name in ("name", "mae", "remark")} == {
            "name": "ours", "mae": [math.inf], "remark": "x",
        }  # fmt: skip
        np.testing.assert_array_equal(cells["mcc"], [0.5, math.nan])
        assert again.as_dict() == made.as_dict()
        assert again.best() == made.best() == {(0, 1)}


def test_a_report_without_keys_is_read(tmp_path):
    path = tmp_path / "report.json"
    saved = {name: value for name, value in imputation().as_dict().items() if "keys" not in name}
    path.write_text(json.dumps([saved]))
    (read,) = report_folder.read(path)
    keys = ["method", "fitted_on", "given_expressed", "mcc", "delta_mcc", "mae", "remark"]
    assert read.keys == tuple(keys)
    # Reports of earlier versions may also have a former key.
    former = [key.replace("delta_mcc", "mcc_gain") for key in keys]
    path.write_text(json.dumps([saved | {"keys": former, "better": {}}]))
    assert report_folder.read(path)[0].keys == read.keys
    assert read.titles == COLUMNS
    assert read.better == {"mcc": "max", "delta_mcc": "max", "mae": "min"}
    assert read.row_keys == ["", "model", ""]
    assert read.best() == imputation().best()
    assert read.markdown() == imputation().markdown()
    for broken in (
        {},
        {**saved, "rows": [["one"]]},
        {**saved, "columns": 3},
        {**saved, "rows": [[["x"]] * 7]},
    ):
        path.write_text(json.dumps([broken]))
        with pytest.raises((KeyError, TypeError, ValueError)):
            report_folder.read(path)


@pytest.mark.parametrize("width", [50, 60, 80, 100, 120, 160, 200])
@pytest.mark.parametrize("made", [imputation(), embedding()], ids=["imputation", "embedding"])
def test_the_terminal_shows_everything_and_never_breaks_a_number(made, width):
    text = shown(made, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert made.table(width).row_count == len(made.rows)
    lines = [line for line in text.splitlines() if not re.search(r"[━─]", line)]
    for row in made.rows:
        for cell in row:
            if isinstance(cell, list) and len(cell) > 1:
                # Mean and spread stand beside or right above each other.
                mean, spread = Summary.of(cell).value, Summary.of(cell).spread
                assert any(mean in line for line in lines)
                assert any(spread in line for line in lines), spread
    words = re.sub(r"[^\w]", "", "".join(lines))
    for row in made.rows:
        assert re.sub(r"[^\w]", "", row[0]) in words or all(word in text for word in row[0].split())
    if made.rows[-1][-1]:
        assert all(word in text for word in REASON.split())


def test_the_widest_layout_that_fits_is_taken():
    found = []
    for width in (50, 80, 120, 200):
        head = re.split(r"[━─┏┓┳]{30,}", shown(imputation(), width))[1]
        found.append([title in head for title in ("method", "MCC", "remark")])
    assert found == [[True, False, False], [True, True, False], [True, True, False], [True, True, True]]
    # Long texts are left 20 characters or more, however much the numbers take.
    narrowest = []
    for width in range(100, 240, 3):
        for border in re.findall("┏.*┓", shown(imputation(), width)):
            columns = [len(part) - 2 for part in border.strip("┏┓").split("┳")]
            narrowest.append(min(columns[0], columns[1], columns[-1]))
    assert len(narrowest) > 20
    assert min(narrowest) >= 20


def test_tables_without_rows_texts_or_numbers_are_shown():
    nothing, numbers, reason = Report("t", ("a", "b")), Report("t", ("a", "b")), Report("t", ("a", "b"))
    numbers.add([1.0, 2.0], [2000.0, 3.0])
    reason.add("all", "a library is missing")
    for width in (25, 40, 80):
        assert "a" in shown(nothing, width)
        assert shown(numbers, width).count("1.500") == 1
        assert "± 998.5 (2)" in shown(numbers, width)
        assert "missing" in shown(reason, width)
        assert all(
            len(line) <= width
            for made in (nothing, numbers, reason)
            for line in shown(made, width).splitlines()
        )


def test_texts_are_not_read_as_markup():
    made = Report("share [bold]x[/bold] <0.75", ("a|b", "n"), notes=("see <b>this</b> *note*",))
    made.add("[red]gene|name`s`</td>", [1.0])
    assert "[bold]x[/bold]" in shown(made, 90)
    assert "[red]gene|name" in shown(made, 90)
    text = made.markdown()
    assert r"| \[red" not in text
    assert r"[red]gene\|name\`s\`\</td>" in text
    assert r"\<b>this\</b> \*note\*" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}


def test_the_files_hold_facts_and_every_measurement(tmp_path):
    facts = {"command": "python -m x --a='<b>'", "seeds": "0, 1"}
    figure = Figure("A figure", "<svg xmlns='http://www.w3.org/2000/svg'></svg>")
    report_folder.write([imputation(), embedding()], tmp_path / "new", facts, [figure], title="Benchmark")
    folder = tmp_path / "new"
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    saved = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert saved["facts"] == facts
    assert saved["reports"][0]["rows"][1][5] == [1.5, None]
    assert saved["reports"][0]["better"] == BETTER
    assert (
        (folder / "report.md")
        .read_text()
        .startswith("- command: python -m x --a='\\<b>'\n- seeds: 0, 1\n\n**")
    )
    html = (folder / "report.html").read_text()
    assert "&lt;b&gt;" in html
    assert "<title>Benchmark</title>" in html


def test_further_numbers_have_a_file_without_nan(tmp_path):
    numbers = {
        "curves": {0.5: (np.float32(1.5), np.nan, math.inf)},
        "count": np.int64(3),
        "of": np.array([1.0, np.nan]),
    }
    report_folder.write([imputation()], tmp_path, {"seed": "1"}, numbers=numbers)
    saved = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert saved == {
        "facts": {"seed": "1"},
        "curves": {"0.5": [1.5, None, "inf"]},
        "count": 3,
        "of": [1.0, None],
    }


def test_without_facts_and_figures_there_is_no_page(tmp_path):
    report_folder.write([imputation()], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    (saved,) = json.loads((tmp_path / "report.json").read_text())
    assert saved["title"] == "Imputation [40%] of genes"


@pytest.mark.parametrize("what", ["report.json", "results.json", "report.md", "report.html"])
def test_numbers_are_on_the_disk_before_what_may_fail(tmp_path, monkeypatch, what):
    """Whichever file cannot be written: numbers come first, and nothing of an earlier report stays beside new ones."""
    files = ["report.json", "results.json", "report.md", "report.html"]
    report_folder.write([imputation()], tmp_path, {"seed": "1"}, numbers={"n": 1})
    write_text = type(tmp_path).write_text

    def full(path, text, **options):
        if what in path.name:
            raise OSError("no space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(OSError, match="no space"):
        report_folder.write([embedding()], tmp_path, {"seed": "2"}, numbers={"n": 2})
    there = {path.name: path.read_text() for path in tmp_path.iterdir()}
    if what.endswith(".json"):
        assert set(there) == set(files)
        assert "Embedding" not in "".join(there.values())
    else:
        assert set(there) == set(files[: files.index(what)])
        assert json.loads(there["results.json"])["n"] == 2
        assert "Imputation" not in "".join(there.values())


def test_numbers_of_an_earlier_report_do_not_stay_beside_a_new_one(tmp_path):
    report_folder.write([imputation()], tmp_path, {"seed": "1"}, numbers={"n": 1})
    (tmp_path / "kept.json").write_text("{}")
    report_folder.write([embedding()], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"kept.json", "report.json", "report.md"}


def test_a_page_that_cannot_be_made_costs_no_number(tmp_path):
    def broken() -> str:
        assert json.loads((tmp_path / "results.json").read_text())["n"] == 1
        assert (tmp_path / "report.md").is_file()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report_folder.write([imputation()], tmp_path, {"seed": "1"}, [Figure("f", broken)], numbers={"n": 1})
    assert not (tmp_path / "report.html").exists()


def test_the_environment_names_versions_and_devices():
    import jax

    import sct

    facts = environment()
    assert facts["sct"] == sct.__version__
    assert facts["jax"] == jax.__version__
    assert facts["numpy"] == np.__version__
    assert facts["devices"].startswith(f"{jax.device_count()} x ")
    assert all(isinstance(value, str) and value for value in facts.values())
    assert {"command", "date", "python", "machine", "anndata"} <= set(facts)
