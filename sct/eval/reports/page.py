"""Write tables and figures as one self-contained HTML page, which loads no other file and needs no network."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from sct import messages
from sct.errors import DataError, first_line
from sct.eval.reports.report import Report, Summary, cell_text

# A scatter plot with more points is rasterized inside the SVG, because each vector point costs about 100 bytes.
_MAX_VECTOR_POINTS = 2000
_LONG = ' class="long"'
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_XML = "http://www.w3.org/XML/1998/namespace"
# SVG elements that only draw. Elements that run scripts, load files, link or animate are not allowed.
_DRAWING = frozenset(
    ("svg", "g", "defs", "symbol", "use", "title", "desc", "path", "rect", "circle", "ellipse", "line", "polyline",
     "polygon", "text", "tspan", "image", "clipPath", "mask", "pattern", "marker", "linearGradient", "radialGradient",
     "stop")
)  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2430; --soft: #5d6878; --line: #dde2e9;
  --head: #f3f5f8; --hover: #f0f5fb; --accent: #0b66b0; --best: #e3f1e8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181e; --ink: #e4e8ee; --soft: #9aa5b5; --line: #2e3641; --head: #1d232b;
    --hover: #1b2531; --accent: #71b7f5; --best: #173526; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
.sheet { max-width: 84rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.12rem; line-height: 1.35; margin: 0 0 .6rem; scroll-margin-top: 1rem;
  overflow-wrap: anywhere; }
a { color: var(--accent); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
section { margin: 2.6rem 0 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem 1.2rem;
  grid-auto-flow: row dense; margin: 0; font-size: .86rem; line-height: 1.35; padding: .9rem 1.1rem;
  border: 1px solid var(--line); border-radius: .5rem; background: var(--head); }
dl .long { grid-column: 1 / -1; }
dt { color: var(--soft); font-size: .92em; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
nav { margin: 1.4rem 0 0; font-size: .92rem; }
nav ol { margin: 0; padding-left: 1.4rem; columns: 24rem; column-gap: 2rem; }
nav li { break-inside: avoid; padding: .1rem 0; overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 88vh; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .88rem; line-height: 1.35;
  font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .45rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; z-index: 2; background: var(--head); vertical-align: bottom; padding: 0; }
thead button { all: unset; box-sizing: border-box; width: 100%; padding: .5rem .8rem; cursor: pointer;
  font-weight: 600; }
thead button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
thead button::after { content: "\\a0\\2195"; color: var(--soft); opacity: .55; }
thead th[aria-sort="ascending"] button::after { content: "\\a0\\2191"; color: var(--accent); opacity: 1; }
thead th[aria-sort="descending"] button::after { content: "\\a0\\2193"; color: var(--accent); opacity: 1; }
tbody th { font-weight: 500; min-width: 9rem; max-width: 22rem; overflow-wrap: anywhere; }
tbody td:not(.number) { min-width: 5rem; max-width: 22rem; overflow-wrap: break-word; }
tbody td.long { min-width: 14rem; }
.number, .number button { text-align: right; }
td.number { white-space: nowrap; }
.spread { color: var(--soft); font-size: .92em; }
.wide .spread { display: block; }
td.best { background: var(--best); font-weight: 700; }
td.best .spread { font-weight: 400; }
tbody tr:hover > :not(.best) { background: var(--hover); }
.notes { margin: .6rem 0 0; padding: 0; list-style: none; color: var(--soft); font-size: .86rem;
  max-width: 60rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 2.4rem 2rem; align-items: start; }
.figures section { min-width: 0; }
figure { margin: 0; }
figure svg { display: block; max-width: 100%; height: auto; fill: currentColor; }
.ink-fill { fill: currentColor; }
.ink-stroke { stroke: currentColor; }
.paper-fill { fill: var(--paper); }
.paper-stroke { stroke: var(--paper); }
figcaption { margin-top: .6rem; color: var(--soft); font-size: .88rem; max-width: 44rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .82rem; }
@media (max-width: 40rem) {
  .sheet { padding: 1.2rem .9rem 3rem; }
  h1 { font-size: 1.35rem; }
  dl { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); padding: .7rem .8rem; }
  .spread { display: block; }
  figure { overflow-x: auto; }
  figure svg { max-width: none; min-width: 100%; width: auto; height: min(20rem, 92vw); }
  th, td { padding: .4rem .55rem; }
  thead button { padding: .45rem .55rem; }
  tbody th { position: sticky; left: 0; z-index: 1; background: var(--paper); min-width: 7.5rem; max-width: 9.5rem; }
}
@media print {
  :root { color-scheme: light; --paper: #ffffff; --ink: #000000; --soft: #444444; --line: #bbbbbb;
    --head: #f3f3f3; --best: #eeeeee; }
  .sheet { max-width: none; padding: 0; }
  nav, thead button::after { display: none; }
  .scroll { overflow: visible; max-height: none; border: 0; }
  table { font-size: 7.5pt; }
  thead th, tbody th { position: static; }
  th, td, thead button { padding: .2rem .3rem; }
  tbody th, tbody td:not(.number), tbody td.long { min-width: 0; }
  td.number { white-space: normal; }
  .spread { display: block; }
  tr, figure, dl { break-inside: avoid; }
  h2 { break-after: avoid; }
  .figures { display: block; }
}
"""

# Each click on a column head goes to the next state: sorted, sorted in reverse, original order. Cells of a numeric
# column that hold no number stay at the bottom.
_SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], written = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const order = head.dataset.first === "descending" ? ["descending", "ascending"] : ["ascending", "descending"];
    const now = order[order.indexOf(head.getAttribute("aria-sort")) + 1];
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    if (!now) return body.append(...written);
    head.setAttribute("aria-sort", now);
    const sign = now === "ascending" ? 1 : -1, number = head.classList.contains("number");
    const key = (row) => number ? parseFloat(row.cells[column].dataset.value) : row.cells[column].innerText;
    body.append(...[...written].sort((one, other) => {
      const a = key(one), b = key(other);
      if (!number) return sign * a.localeCompare(b, "en", { numeric: true });
      if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
      return sign * (a - b);
    }));
  }));
}
"""


@dataclasses.dataclass(frozen=True)
class Figure:
    """Hold one figure of an HTML page.

    Attributes
    ----------
    title
        Heading of the figure.
    svg
        SVG document from `figure_svg`, or a function that returns an SVG document. The function is called when the page
        is written.
    caption
        Text below the figure: what it shows, for which cells, with how many seeds.
    """

    title: str
    svg: str | Callable[[], str]
    caption: str = ""


def figure_svg(figure: Any) -> str:
    """Return a Matplotlib figure as an SVG document. Equal figures always give equal documents.

    Point collections, lines and meshes with more than 2,000 elements are rasterized inside the SVG. The figure is not
    changed.

    Parameters
    ----------
    figure
        `matplotlib.figure.Figure`. For a Matplotlib axes `ax`, pass `ax.figure`.
    """
    import matplotlib
    from matplotlib.collections import Collection, QuadMesh
    from matplotlib.lines import Line2D

    def size(artist: Any) -> int:
        if isinstance(artist, Line2D):
            return len(np.asarray(artist.get_xdata()))
        if isinstance(artist, QuadMesh):
            return np.asarray(artist.get_array()).size
        return max(len(artist.get_offsets()), len(artist.get_paths()))

    drawn = figure.findobj(lambda artist: isinstance(artist, Collection | Line2D))
    many = [artist for artist in drawn if not artist.get_rasterized() and size(artist) > _MAX_VECTOR_POINTS]
    out = io.StringIO()
    try:
        for artist in many:
            artist.set_rasterized(True)
        with matplotlib.rc_context({"svg.hashsalt": "sct", "svg.fonttype": "path"}):
            # A tight box keeps legends outside the axes from being cut off.
            figure.savefig(
                out, format="svg", dpi=120, bbox_inches="tight", metadata={"Date": None, "Creator": None}
            )
    finally:
        for artist in many:
            artist.set_rasterized(False)
    return out.getvalue()


def page(
    title: str, reports: Sequence[Report], figures: Sequence[Figure], facts: Mapping[str, str] | None = None
) -> str:
    """Return tables and figures as one HTML page.

    A click on a column head sorts the table. Colors follow the reader's light or dark setting. All text is escaped,
    and the page's content security policy blocks loading of other files. A figure that cannot be drawn, or that is
    not a plain SVG document, is replaced by a paragraph with the reason, and a warning is issued.

    Parameters
    ----------
    title
        Heading of the page.
    reports
        Tables, in the order shown.
    figures
        Figures, shown after the tables.
    facts
        Dict of facts about the run by name, such as command, versions, date, machine and run time.
    """
    entries = [(f"table-{i}", report.title) for i, report in enumerate(reports, 1)]
    entries += [(f"figure-{i}", figure.title) for i, figure in enumerate(figures, 1)]
    contents = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text in entries)
    tables = "".join(_table(f"table-{i}", report) for i, report in enumerate(reports, 1))
    drawings = "".join(_figure(f"figure-{i}", figure) for i, figure in enumerate(figures, 1))
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    # Even if a title or note contains HTML, the browser loads nothing and runs no script except `_SCRIPT`.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">',
        f'<style>{_STYLE}</style>\n</head>\n<body>\n<div class="sheet">',
        f"<header><h1>{escape(title)}</h1>{_facts(facts or {})}</header>",
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>' if len(entries) > 1 else "",
        f"<main>{tables}",
        f'<div class="figures">{drawings}</div>' if drawings else "",
        f"</main>\n</div>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(filter(None, parts))


def _facts(facts: Mapping[str, str]) -> str:
    rows = ""
    for name, value in facts.items():
        kind = _LONG if name == "command" or len(str(value)) > 26 else ""
        rows += f"<div{kind}><dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd></div>"
    return f"<dl>{rows}</dl>" if rows else ""


def _table(name: str, report: Report) -> str:
    """Return a table as an HTML element."""
    numeric, best = report.numeric(), report.best()
    heads = []
    for column, is_number in zip(report.columns, numeric, strict=True):
        first = "descending" if is_number and report.better.get(column.key) != "min" else "ascending"
        kind = ' class="number"' if is_number else ""
        heads.append(
            f'<th scope="col"{kind} data-first="{first}"><button type="button">{escape(column.title)}</button></th>'
        )
    rows = []
    for number, row in enumerate(report.rows):
        cells = []
        for i, cell in enumerate(row):
            if numeric[i]:
                cells.append(_number(cell, (number, i) in best))
                continue
            text = cell_text(cell)
            kind = _LONG if len(text) > 40 else ""
            cells.append(
                f'<th scope="row">{escape(text)}</th>' if i == 0 else f"<td{kind}>{escape(text)}</td>"
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    wide = ' class="wide"' if sum(numeric) > 4 else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return (
        f'<section id="{name}"><h2>{escape(report.title)}</h2>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(report.title)}"><table{wide}>'
        f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>{chr(10).join(rows)}</tbody></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + "</section>\n"
    )


def _number(cell: Any, best: bool) -> str:
    """Return a numeric table cell as HTML. Its tooltip lists the individual measurements."""
    kind = "number best" if best else "number"
    if not isinstance(cell, list):
        return f'<td class="{kind}">{escape(cell_text(cell))}</td>'
    summary = Summary.of(cell)
    value = f' data-value="{summary.mean!r}"' if summary.count else ""
    each = f' title="{escape(", ".join(f"{x:.4g}" for x in cell))}"' if len(cell) > 1 else ""
    spread = f' <span class="spread">{escape(summary.spread)}</span>' if summary.spread else ""
    return f'<td class="{kind}"{value}{each}>{escape(summary.value)}{spread}</td>'


def _figure(name: str, figure: Figure) -> str:
    """Return a figure as an HTML element; if drawing fails, return an element that gives the reason."""
    try:
        text = figure.svg if isinstance(figure.svg, str) else figure.svg()
        drawn = f"<figure>{_inline(name, figure.title, text)}{_caption(figure.caption)}</figure>"
    except (
        Exception
    ) as error:  # drawing libraries raise many types, for example for a label they cannot parse
        reason = first_line(error)
        messages.warn(f"figure {figure.title!r} is not in report.html: {reason}")
        drawn = f'<p class="notes">This figure could not be drawn: {escape(reason)}</p>'
    return f'<section id="{name}"><h2>{escape(figure.title)}</h2>{drawn}</section>\n'


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _inline(name: str, title: str, document: str) -> str:
    """Return an SVG document as an element of the page. Its ids become unique, and black and white become page colors.

    The element is written from the parsed SVG tree, so the browser sees only content that this function has checked.
    The element is also a complete SVG document outside the page: it has its own colors and namespaces.
    """
    # Drop the XML head, because it could define entities, and the comments, because Matplotlib repeats labels in them.
    found = re.search(r"<svg\b.*</svg>", re.sub(r"<!--.*?-->", "", document, flags=re.DOTALL), re.DOTALL)
    try:
        root = ET.fromstring(found[0]) if found else None
    except ET.ParseError as error:
        raise _not_plain(str(error)) from None
    if root is None:
        raise _not_plain("it has no <svg> element")
    _clean(root, name)
    root.attrib.update({"xmlns": _SVG, "xmlns:xlink": _XLINK, "role": "img", "aria-label": title})
    # Matplotlib sets these two in a <style>, which would apply to the whole page.
    root.attrib.update({"stroke-linejoin": "round", "stroke-linecap": "butt"})
    return ET.tostring(root, encoding="unicode")


def _clean(element: ET.Element, name: str) -> None:
    """Clean an SVG element and its children in place.

    Namespaces are removed from the element names, and ids get the prefix `name`. DataError is raised for three things:
    an element that is not in `_DRAWING`, an event handler, and a reference to something outside the document.
    """
    space, _, kind = element.tag.rpartition("}")
    if space not in ("", f"{{{_SVG}") or kind not in _DRAWING:
        raise _not_plain(f"it has the element <{kind}>")
    element.tag = kind
    given, element.attrib = element.attrib, {}
    for key, value in given.items():
        space, _, attribute = key.rpartition("}")
        if space not in ("", f"{{{_XLINK}", f"{{{_XML}") or attribute == "class":
            continue
        data = attribute == "href" and value.startswith("data:image/")
        if attribute.lower().startswith("on"):
            raise _not_plain(f"<{kind}> has the attribute {attribute}")
        if (attribute == "href" and not (data or value.startswith("#"))) or re.search(
            r"url\((?!\s*['\"]?#)|@import|javascript:", value
        ):
            raise _not_plain(f"<{kind}> refers to something outside the document")
        if data:
            value = "".join(value.split())
        elif attribute == "href":
            value = f"#{name}-{value[1:]}"
        elif attribute == "id":
            value = f"{name}-{value}"
        else:
            value = re.sub(r"(url\(\s*['\"]?#)", rf"\g<1>{name}-", value)
        if attribute == "style":
            value = _themed(element, value)
            if not value:
                continue
        prefix = {f"{{{_XLINK}": "xlink:", f"{{{_XML}": "xml:"}.get(space, "")
        element.attrib[prefix + attribute] = value
    for child in list(element):
        # Metadata is not drawn, and a <style> inside an SVG would apply to the whole page.
        if child.tag.rpartition("}")[2] in ("metadata", "style"):
            element.remove(child)
        else:
            _clean(child, name)


def _themed(element: ET.Element, style: str) -> str:
    """Move black and white from the style of an SVG element to attributes and classes; return the remaining style.

    In the page, the style rules of these classes override the attributes. Outside the page, the attributes apply.
    """
    kept = []
    for declaration in filter(None, map(str.strip, style.split(";"))):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        kind = {"#000000": "ink", "#ffffff": "paper"}.get(value.lower())
        if kind is None or name not in ("fill", "stroke"):
            kept.append(declaration)
            continue
        element.attrib[name] = value
        element.attrib["class"] = f"{element.attrib.get('class', '')} {kind}-{name}".strip()
    return "; ".join(kept)


def _not_plain(reason: str) -> DataError:
    return DataError(
        f"the figure is not a plain SVG document ({reason}): make it with sct.eval.reports.page.figure_svg."
    )
