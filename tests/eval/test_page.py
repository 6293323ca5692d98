"""The HTML page: self-contained, escaped, and working in a browser."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sct.eval.reports.page import Figure, figure_svg, page
from sct.eval.reports.report import Report

matplotlib = pytest.importorskip("matplotlib", reason="figures need matplotlib: make install brings it")
NASTY = "<script>document.title = 'broken'</script> \"A\" & 'B' </table>"
VOID = {"meta", "link", "br"}


class Outline(HTMLParser):
    """Names, targets and balance of a page's elements."""

    def __init__(self, text: str):
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        for name in ("href", "src", "xlink:href"):
            if name in values:
                (self.targets if values[name].startswith("#") else self.loaded).append(values[name])
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def drawing(points: int = 20, seed: int = 0):
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(4, 3))
    ax = figure.subplots()
    ax.scatter(*np.random.default_rng(seed).normal(size=(2, points)), c=np.arange(points), label="cells")
    ax.set_title("a <title> & more")
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def tables() -> list[Report]:
    first = Report(
        "Imputation", ("method", "MCC", "MAE", "remark"), notes=("Five draws.",), better={"MCC": "max", "MAE": "min"}
    )  # fmt: skip
    first.add("bar", [0.5, 0.6], [10.0, 11.0], "")
    first.add("model", [0.7, 0.6], [9.0, 9.5], "")
    first.add("MAGIC", [], [], "magic-impute is not installed: pip install magic-impute " * 3)
    first.add("kNN", [0.1], [100.0], NASTY)
    second = Report("Embedding", ("method", *"abcdef"))
    second.add(NASTY, *[[0.1, 0.2]] * 6)
    return [first, second]


def whole() -> str:
    figures = [Figure("One", figure_svg(drawing()), "A caption."), Figure("Two", figure_svg(drawing(3000)))]
    return page("Benchmark", tables(), figures, {"command": f"run {NASTY}", "seeds": "0, 1"})


def test_the_page_is_whole_escaped_and_loads_nothing():
    text = whole()
    outline = Outline(text)
    assert outline.stack == []
    assert len(outline.ids) == len(set(outline.ids)) > 10
    assert {target[1:] for target in outline.targets} <= set(outline.ids)
    assert {"#table-1", "#table-2", "#figure-1", "#figure-2"} <= set(outline.targets)
    assert all(address.startswith("data:") for address in outline.loaded)
    assert outline.tags.count("script") == 1
    assert outline.tags.count("table") == 2
    assert outline.tags.count("svg") == 2
    assert html.escape(NASTY) in text
    assert "<?xml" not in text
    assert "<!DOCTYPE svg" not in text
    used = set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(outline.ids)
    # Fixed colours of pages would be unreadable in the other mode.
    assert not re.search(r"(?:fill|stroke): #(?:000000|ffffff)", text)


def test_a_figure_cut_out_of_the_page_keeps_its_look():
    """As a file of its own it is well-formed XML, needs no style of the page, and shows the same picture."""
    import xml.etree.ElementTree as ET

    (cut,) = re.findall(r"<svg.*?</svg>", page("t", [], [Figure("One", figure_svg(drawing()))]), re.DOTALL)
    root = ET.fromstring(cut)
    assert "var(" not in cut
    assert "currentColor" not in cut
    style = page("t", [], [])
    parts = {"ink-fill", "ink-stroke", "paper-fill", "paper-stroke"}
    for element in root.iter():
        classes = set(element.get("class", "").split())
        assert classes <= parts
        for each in classes:
            kind, _, name = each.partition("-")
            assert element.get(name) == {"ink": "#000000", "paper": "#ffffff"}[kind]
            assert name + ":" not in element.get("style", "")
            assert f".{each} {{ {name}:" in style
    used = {each for element in root.iter() for each in element.get("class", "").split()}
    assert {"ink-stroke", "paper-fill"} <= used
    (background,) = (e for e in root.iter() if e.get("id", "").endswith("patch_1"))
    assert background[0].get("fill") == "#ffffff"
    assert (root.get("stroke-linejoin"), root.get("stroke-linecap")) == ("round", "butt")


def test_a_class_of_a_foreign_figure_does_not_meet_the_rules_of_the_page():
    svg = (
        f'<svg {SVG}><path class="number ink-fill" style="fill: #FFFFFF;stroke:#000000; opacity: 0.5"/></svg>'
    )
    text = page("t", [], [Figure("Mine", svg)])
    (path,) = re.findall(r"<path[^>]*>", text)
    assert 'class="paper-fill ink-stroke"' in path
    assert 'style="opacity: 0.5"' in path


def test_the_same_input_makes_the_same_page():
    assert whole() == whole()


def test_numbers_carry_what_they_are_sorted_by():
    text = whole()
    values = [float(value) for value in re.findall(r'data-value="([^"]+)"', text)]
    assert values == pytest.approx([0.55, 10.5, 0.65, 9.25, 0.1, 100.0] + [0.15] * 6)
    best = re.findall(r'<td class="number best"[^>]*>([^< ]*)', text)
    assert best == ["0.650", "9.250"]
    assert 'title="0.5, 0.6"' in text


def test_nothing_to_show_is_still_a_page():
    outline = Outline(page("Empty", [Report("No rows", ("a", "b"))], [], {}))
    assert outline.stack == []
    assert "nav" not in outline.tags


def test_a_figure_is_the_same_twice_and_is_left_as_it_was():
    figure = drawing(3000)
    (points,) = figure.axes[0].collections
    before = dict(matplotlib.rcParams)
    svg = figure_svg(figure)
    assert figure_svg(figure) == figure_svg(drawing(3000)) == svg
    assert not points.get_rasterized()
    assert dict(matplotlib.rcParams) == before
    assert "<dc:date>" not in svg
    assert figure_svg(drawing(3000, seed=1)) != svg


def test_many_points_become_an_image():
    few, many = figure_svg(drawing(1500)), figure_svg(drawing(50_000))
    assert "<image" not in few
    assert "<image" in many
    assert 6 * len(many) < 3_000_000


SVG = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
FOREIGN = (
    "",
    "<p>none</p>",
    "<svg><script>bad()</script></svg>",
    "<svg><SCRIPT>bad()</SCRIPT></svg>",
    "<svg onload='bad()'></svg>",
    "<svg><g\nOnClick = 'bad()'/></svg>",
    "<svg><foreignObject/></svg>",
    "<svg><unclosed></svg>",
    f"<svg {SVG}><x:script xmlns:x='http://www.w3.org/1999/xhtml'>bad()</x:script></svg>",
    f"<svg {SVG}><s:script xmlns:s='http://www.w3.org/2000/svg'>bad()</s:script></svg>",
    f"<svg {SVG}><a xlink:href='javascript:bad()'><path/></a></svg>",
    f"<svg {SVG}><use xlink:href='https://bad/x.svg#a'/></svg>",
    f"<svg {SVG}><image href='https://bad/x.png'/></svg>",
    f"<svg {SVG}><path style='fill: url(https://bad/x)'/></svg>",
    f"<svg {SVG}><animate attributeName='href' to='javascript:bad()'/></svg>",
    f"<svg {SVG}><!-- --><iframe src='bad'/></svg>",
    f"<!DOCTYPE svg [<!ENTITY x 'bad'>]><svg {SVG}><text>&x;</text></svg>",
    f"<svg {SVG}><!-- a --><script><!-- bad() --></script></svg>",
    f"<svg {SVG}><scr<!-- -->ipt>bad()</script></svg>",
)


def test_what_is_not_a_plain_svg_costs_that_figure_alone():
    good, wrong = figure_svg(drawing()), []
    for svg in FOREIGN:
        with pytest.warns(UserWarning, match="'Mine'.*not a plain SVG"):
            text = page("t", tables(), [Figure("Mine", svg, "Not drawn."), Figure("Good", good)], {})
        outline = Outline(text)
        of_figure = text.split('<section id="figure-1">')[1].split("</section>")[0]
        said = "This figure could not be drawn: the figure is not a plain SVG" in of_figure
        if (
            not said
            or "<svg" in of_figure
            or outline.stack
            or outline.tags.count("svg") != 1
            or "bad()" in text
        ):
            wrong.append(svg)
    assert not wrong


@pytest.mark.filterwarnings("ignore:Glyph 8")
def test_any_label_is_drawn():
    """Names of cell types are texts of others: Matplotlib writes them into comments and names of elements."""
    from matplotlib.figure import Figure as Canvas

    labels = [
        "T cell onset=late",
        NASTY,
        "a -- b --> c",
        "]]>&amp;&x;",
        "\x08bell",
        "url(https://x)",
        'href="x"',
        "β\n2",
    ]
    canvas = Canvas(figsize=(4, 3))
    ax = canvas.subplots()
    for number, label in enumerate(labels):
        (line,) = ax.plot([0, 1], [0, number], label=label)
        line.set_gid(f"id {label}" if number < 3 else None)
    ax.legend()
    text = page("t", [], [Figure(label, figure_svg(canvas)) for label in labels], {})
    outline = Outline(text)
    assert outline.stack == []
    assert outline.tags.count("svg") == len(labels)
    assert outline.tags.count("script") == 1
    assert outline.loaded == ["data:,"]


def test_a_figure_that_cannot_be_drawn_costs_itself_alone():
    """It is drawn when the page is made."""

    def broken() -> str:
        figure = drawing()
        figure.axes[0].set_title(r"$\frac$")  # no formula
        return figure_svg(figure)

    figures = [Figure("Broken", broken), Figure("Good", lambda: figure_svg(drawing()))]
    with pytest.warns(UserWarning, match="'Broken'"):
        text = page("t", tables(), figures, {})
    outline = Outline(text)
    assert outline.stack == []
    assert outline.tags.count("svg") == 1
    assert outline.tags.count("table") == 2
    assert "This figure could not be drawn" in text


@pytest.fixture(scope="session")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no browser here: install chromium or google-chrome to look at the page in it")
    return found


def opened(browser: str, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page without a window; what its console says is on standard error."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
        f"--user-data-dir={path.parent}/profile",
    ]
    done = subprocess.run(
        [*command, *options, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(path.parent)},
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done


CLICKS = """
<script>
const names = () => [...document.querySelectorAll("#table-1 tbody tr")].map((row) => row.cells[0].innerText);
const [method, mcc, mae] = document.querySelectorAll("#table-1 thead button");
const seen = [names()];
for (const head of [mcc, mcc, mcc, mae, method]) { head.click(); seen.push(names()); }
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.body.dataset.seen = seen.map((order) => order.join()).join(";") + (wide ? ";wider" : "");
</script>
"""


def test_a_click_sorts_a_table_in_a_browser(browser, tmp_path):
    path = tmp_path / "page.html"
    # The page's policy runs its own script alone, so the copy with the clicks goes without.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", whole())
    path.write_text(text.replace("</body>", f"{CLICKS}</body>"), encoding="utf-8")
    done = opened(browser, path, "--window-size=500,900", "--dump-dom")
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)[1]
    written = "bar,model,MAGIC,kNN"
    assert seen.split(";") == [
        written,
        "model,bar,kNN,MAGIC",
        "kNN,bar,model,MAGIC",
        written,
        "model,bar,kNN,MAGIC",
        "bar,kNN,MAGIC,model",
    ]
    assert "<title>Benchmark</title>" in done.stdout


def test_the_page_is_drawn_in_light_and_dark(browser, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "page.html"
    path.write_text(whole(), encoding="utf-8")
    paper = {}
    for mode, number in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{mode}.png"
        opened(
            browser,
            path,
            "--window-size=1200,1600",
            f"--screenshot={shot}",
            f"--blink-settings=preferredColorScheme={number}",
        )
        picture = imread(shot)[..., :3]
        assert picture.shape == (1600, 1200, 3)
        colors = (picture * 255).astype(np.int64) @ [65536, 256, 1]
        assert len(np.unique(colors)) > 50
        paper[mode] = picture[2, 2].mean()
    assert paper["light"] == 1
    assert paper["dark"] < 0.2


def test_the_policy_stops_a_foreign_script(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        whole().replace("</body>", "<script>document.title = 'broken'</script></body>"), encoding="utf-8"
    )
    with pytest.raises(AssertionError, match="Content Security Policy"):
        opened(browser, path, "--dump-dom")
