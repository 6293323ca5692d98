"""Generate `docs/families/*.md` from the manifests in `sct/families`.

Each page lists what the models of the family can do, and which file defines each component.

    python tools/make_family_pages.py docs/families

The output is deterministic.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import runpy
import textwrap
from pathlib import Path
from typing import Any

from sct import families
from sct.families import Family, FamilyModel
from sct.families.manifest import ABILITIES

ROOT = Path(__file__).resolve().parents[1]
# Ability -> function of `sct.tl`.
FUNCTIONS = {
    "embed": "sct.tl.embed",
    "embed_genes": "sct.tl.gene_embeddings",
    "impute": "sct.tl.impute",
    "annotate": "sct.tl.annotate",
    "generate": "sct.tl.generate_cells",
    "describe": "sct.tl.describe",
    "ask": "sct.tl.ask",
}


def link(part: Any) -> str:
    """Return a Markdown link from a page to the file that defines a class or function."""
    if isinstance(part, functools.partial):
        part = part.func
    part = inspect.unwrap(getattr(part, "__func__", part))
    path = Path(inspect.getfile(part)).resolve().relative_to(ROOT)
    return f"[`{part.__qualname__}`](../../{path.as_posix()})"


def options(section: str, name: str) -> tuple[str, str]:
    """Return the row (component, source) with the link to a section of the configuration reference."""
    kind = "family" if section == "model" else "task"
    return f"options of `{section}`", f"[reference](../configuration.md#{section}-{kind}-{name})"


def components(name: str, model: FamilyModel) -> list[tuple[str, str]]:
    """Return the rows (component, source file) of the table that lists the components of the architecture `name`."""
    made = [
        ("configuration", link(model.architecture.config)),
        ("model", link(model.architecture.module)),
    ]
    if model.tasks:
        made.append(options("model", name))
    for kind in model.tasks:
        made.append((f"task `{kind.name}`", link(kind.make)))
        made += [("objective", link(kind.objective)), options("objective", kind.name)]
        made += [("data", link(kind.data)), options("data", kind.name)]
    if model.config:
        made.append(("training configuration", f"[`{model.config}`](../../{model.config})"))
    made += [("adapter", link(kind)) for kind in model.adapters] or [
        ("adapters", "only the adapters that the task trains")
    ]
    # An unescaped `|` would end the table cell.
    targets = [f"`{target}`".replace("|", "\\|") for target in model.architecture.targets]
    made.append(("default LoRA layers", ", ".join(targets) or "none"))
    return made


def table(*rows: tuple[str, ...]) -> list[str]:
    """Return the lines of a Markdown table, whose first row is the header, and an empty line."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:], ""]


def quickstart(config: str) -> list[str]:
    """Return lines with the command that trains a configuration file's quick start; [] if it has no quick start."""
    module = runpy.run_path(str(ROOT / config))
    if "quickstart" not in module["VARIANTS"]:
        return []
    name = Path(config).stem
    return [
        "Train a small model on real blood cells:",
        "",
        f"    sct train --config={name}:quickstart --workdir=runs/{name}",
        "",
    ]


def page(family: Family) -> str:
    """Return the Markdown page of a family."""
    lines = [f"# {family.name}", "", f"{family.title}.", ""]
    if family.paper:
        lines += [f"Paper: {family.paper}.", ""]
    if family.guide:
        guide = Path(family.guide)
        lines += [f"User guide: [`{family.guide}`](../{guide.relative_to('docs')}).", ""]
    lines += [
        "The page [Example configurations](../configurations.md) lists the model sizes, the data and the run times.",
        "",
    ]
    for name, model in family.models.items():
        lines += [f"## `{name}`", ""]
        lines += quickstart(model.config) if model.config else []
        abilities = [
            (ABILITIES[each], f"`{FUNCTIONS[each]}`", link(getattr(model, each))) for each in model.abilities
        ]
        if abilities:
            lines += table(("a trained model can", "function", "implemented by"), *abilities)
        lines += table(("component", "source"), *components(name, model))
    if family.converters:
        lines += ["## Weight conversion", ""]
        for name, each in family.converters.items():
            if each.title:
                lines += [
                    f"Convert a {each.title} folder to a model folder, or a model folder to a {each.title} folder:",
                    "",
                ]
            lines.append(f"    sct convert --from={name} --input=DIR --output=MODEL_DIR")
            if each.write is not None:
                lines.append(f"    sct convert --from=sct --to={name} --input=MODEL_DIR --output=DIR")
            lines.append("")
            if each.files:
                lines += [textwrap.fill(each.files, 120, break_on_hyphens=False, break_long_words=False), ""]
            if each.takes_genes:
                lines += [
                    "If the folder `DIR` does not contain the names of the genes, add `--genes=VOCABULARY`.",
                    "",
                ]
    notices = dict.fromkeys([family.license, *(each.notice for each in family.converters.values())])
    texts = [textwrap.fill(notice.strip(), 120, break_on_hyphens=False) for notice in notices if notice]
    if texts:
        lines += ["## Licenses of published weights", "", *texts, ""]
    manifest = f"sct/families/{family.name}.py"
    lines += [
        f"This family is defined in [`{manifest}`](../../{manifest}).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the pages of all families to the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, family in families.all_families().items():
        (folder / f"{name}.md").write_text(page(family), encoding="utf-8")


if __name__ == "__main__":
    main()
