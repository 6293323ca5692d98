"""Generate `docs/families/*.md` from the manifests in `sct/families`.

Each page lists what the models of the family can do, and which file defines each component.

    python tools/make_family_pages.py docs/families

The output is deterministic.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from pathlib import Path
from typing import Any

from sct import families
from sct.families import Family, FamilyModel
from sct.families.manifest import ABILITIES

ROOT = Path(__file__).resolve().parents[1]
# Ability -> function of `sct.tl`.
FUNCTIONS = {
    "embed": "sct.tl.embed",
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


def rows(name: str, model: FamilyModel) -> list[tuple[str, str]]:
    """Return the rows (component, source) of the table for one architecture, called `name`."""
    made = [
        ("configuration", link(model.architecture.config)),
        ("model", link(model.architecture.module)),
    ]
    made += [
        (f"task `{kind.name}`", f"{link(kind.make)}, options {link(kind.objective)}") for kind in model.tasks
    ]
    if model.config:
        made.append(("training configuration", f"[`{model.config}`](../../{model.config})"))
    made += [
        (ABILITIES[each], f"`{FUNCTIONS[each]}`, implemented by {link(getattr(model, each))}")
        for each in model.abilities
    ]
    targets = ", ".join(f"`{target}`" for target in model.architecture.targets) or "none"
    # An unescaped `|` would end the table cell.
    made.append(
        ("adapters", ", ".join(link(kind) for kind in model.adapters) or "only the adapters of its task")
    )
    made.append(("default LoRA layers", targets.replace("|", "\\|")))
    return made


def page(family: Family) -> str:
    """Return the Markdown page of a family."""
    lines = [f"# {family.name}", "", f"{family.title}.", ""]
    if family.paper:
        lines += [f"Paper: {family.paper}.", ""]
    if family.guide:
        lines += [f"User guide: [`{family.guide}`](../../{family.guide}).", ""]
    lines += [f"Manifest: [`sct/families/{family.name}.py`](../../sct/families/{family.name}.py).", ""]
    for name, model in family.models.items():
        lines += [f"## `{name}`", "", "| component | source |", "|---|---|"]
        lines += [f"| {part} | {where} |" for part, where in rows(name, model)] + [""]
    if family.converters:
        lines += ["## Weight conversion", ""]
        for name, each in family.converters.items():
            genes = (
                "; add `--genes=VOCABULARY` if the weights do not name their genes"
                if each.takes_genes
                else ""
            )
            what = f" ({each.title} folders)" if each.title else ""
            lines.append(
                f"- `python -m launch.convert --from={name} --input=DIR --output=MODEL_DIR`{what}{genes}"
            )
            if each.write is not None:
                lines.append(
                    f"- convert back: `python -m launch.convert --from=sct --to={name} --input=MODEL_DIR --output=DIR`"
                )
        lines.append("")
    notices = dict.fromkeys([family.license, *(each.notice for each in family.converters.values())])
    texts = [notice.strip() for notice in notices if notice]
    if texts:
        lines += ["## Licenses of published weights", "", *texts, ""]
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
