"""List the models that are ready to load, the model families, and the models in folders.

    sct models
    sct models --input=runs --input=models/mine

Prints a table of the packaged models and of the models of sct in the cache of the Hugging Face Hub (the same table as
`sct.models()` in Python). Then prints what each family can do, how to train it, and which published weights it loads.
With --input, prints the models in these folders instead: their architecture, number of parameters, genes and training
step. Each folder can be a run folder, a model folder, a Hugging Face folder, or a folder that contains such folders.
The weights are not read.
"""

from __future__ import annotations

import runpy
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from sct.commands.configuration import config_folder
from sct.global_settings import INFO, settings

if TYPE_CHECKING:
    from sct.families import Family
    from sct.weights.listing import FolderSummary

_INPUT = flags.DEFINE_multi_string("input", [], "Folder with models, or with folders of models.")

_WIDTH, _INDENT = 80, 18
TAKES_ARGUMENTS = True  # folders may also be given without --input


def main(argv: list[str]) -> int:
    """Print the models that are ready to load and the families, or the models in the given folders.

    The exit status is 1 if a model in a given folder is damaged. With --quiet, only these models are printed.
    """
    folders, quiet = [*_INPUT.value, *argv[1:]], settings.verbosity < INFO
    if not folders:
        if not quiet:
            _print_ready()
            print("\n".join(["", *_families()]))
        return 0
    from sct.weights.listing import find_models

    found = [each for folder in folders for each in find_models(Path(folder).expanduser())]
    damaged = [each for each in found if each.trouble]
    if not quiet:
        print("\n".join(_models(found, folders)))
    elif damaged:
        print("\n".join(line for each in damaged for line in _model(each)))
    return 1 if damaged else 0


def _print_ready() -> None:
    """Print the table of the models that are ready to load, or a line that says that there are none."""
    from sct import messages, terminal
    from sct.weights import catalog, packaged

    found = catalog.models()
    notes = [f"{each.name}: {each.trouble}" for each in found[found["trouble"].notna()].itertuples()]
    if not packaged.names():
        notes.append("This installation has no packaged models.")
    if not (found["where"] == catalog.CACHE).any():
        notes.append("No model of sct is in the cache of the Hugging Face Hub.")
    if found.empty:
        notes.append(
            "Train a model with sct train, or pass a model folder, a run folder or a Hub id as the model."
        )
    default = found.loc[found["default"] & found["trouble"].isna(), "name"]
    notes += [f"sct embed uses {name} if --model is missing." for name in default]
    usable = found[found["trouble"].isna()]
    if usable.empty:
        print("\n".join(line for note in notes for line in _wrapped(note)))
        return
    rows = [
        [
            each.name, each.where, each.family, _number(each.parameters), _number(each.genes), _text(each.species),
            _text(each.license), _number(each.training_cells), _text(each.readout), f"{each.bytes / 1e6:,.1f}",
        ]
        for each in usable.itertuples()
    ]  # fmt: skip
    columns = (
        "name", "where", "family", "parameters", "genes", "species", "license", "training cells", "readout", "MB",
    )  # fmt: skip
    numeric = [title in ("parameters", "genes", "training cells", "MB") for title in columns]
    title = 'Models that are ready to load with sct.load("NAME")'
    content = terminal.Content(title, columns, rows, numeric, (), notes)
    messages.console().print(terminal.table(content))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | np.integer) else "-"


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else "-"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False, break_long_words=False)


def _families() -> Iterator[str]:
    """Yield the lines of text that describe all model families."""
    from sct import families

    known = families.all_families()
    yield f"{len(known)} model families: {', '.join(known)}"
    trained_by = _configurations()
    for family in known.values():
        yield ""
        yield from textwrap.wrap(f"{family.name}: {family.title}.", _WIDTH)
        for what, text in _facts(family, trained_by):
            yield from textwrap.wrap(
                text, _WIDTH, initial_indent=f"  {what:<{_INDENT - 2}}", subsequent_indent=" " * _INDENT,
                break_on_hyphens=False, break_long_words=False,
            )  # fmt: skip


def _facts(family: Family, trained_by: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield the facts about a model family, as pairs of a heading and a text."""
    from sct.families.manifest import ABILITIES

    for name, model in family.models.items():
        can = ", ".join(ABILITIES[each] for each in model.abilities)
        yield name, f"can {can}" if model.abilities else "is a part of other models"
        if trained_by.get(name):
            yield "", f"train with --config={', '.join(trained_by[name])}"
    for name, converter in family.converters.items():
        command = f"sct convert --from={name} --input=DIR --output=MODEL_DIR"
        yield "weights", f"{converter.weights or converter.title or name}: {command}"
        if converter.write is not None:
            yield "", f"and back: sct convert --from=sct --to={name} --input=MODEL_DIR --output=DIR"
        if converter.files:
            yield "", converter.files
    if family.paper:
        yield "paper", family.paper
    if family.guide:
        yield "guide", family.guide


def _configurations() -> dict[str, list[str]]:
    """Return the configurations that train each architecture, with their variants: "sct_sc[:mini|quickstart]"."""
    found: dict[str, list[str]] = {}
    for path in sorted(config_folder().glob("*.py")):
        module: dict[str, Any] = runpy.run_path(str(path))
        config: Any = module["get_config"]() if "get_config" in module else {}
        if "family" in config:
            variants = "|".join(filter(None, module.get("VARIANTS", ())))
            found.setdefault(config["family"], []).append(f"{path.stem}{f'[:{variants}]' * bool(variants)}")
    return found


def _models(found: list[FolderSummary], folders: list[str]) -> Iterator[str]:
    """Yield the lines of text that describe the models in folders."""
    count = sum(each.kind != "folder" for each in found)
    yield f"{count or 'no'} model{'s' * (count != 1)} in {', '.join(folders)}"
    for each in found:
        yield ""
        yield from _model(each)


def _model(each: FolderSummary) -> Iterator[str]:
    """Yield the lines of text that describe the model in a folder."""
    from sct import families

    owners = {name: family.name for family in families.all_families().values() for name in family.models}
    family = owners.get(each.architecture, "")
    about = [f"{each.architecture}{f' (family {family})' * (family not in ('', each.architecture))}"]
    about += [f"{each.parameters:,} parameters"] if each.parameters is not None else []
    about += [f"{each.genes:,} genes"] if each.genes is not None else []
    about += [f"step {each.step:,}"] if each.step is not None else []
    yield f"{each.path}"
    text = each.trouble or ", ".join(about)
    kind = {"run": "run folder", "model": "model folder"}.get(each.kind, each.kind)
    yield from textwrap.wrap(
        f"{kind}: {text}", _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
