"""Sphinx extension: generate the reference of all configuration options from the option dataclasses.

On the page `configuration`, the comment `<!-- options -->` is replaced by the reference when the site is built. The
names, types and defaults are those of the dataclass fields, and the descriptions are those of their docstrings.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

PAGE, PLACE = "configuration", "<!-- options -->"
# A description that refers to the options of another class, such as "See `sct.data.bags.BagOptions`."
REFERENCE = re.compile(r"[Ss]ee `(?:(?P<module>[\w.]+)\.)?(?P<name>[A-Z]\w+)`\.?")


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a configuration.

    Attributes
    ----------
    path
        Name in a configuration, such as "train.steps".
    type, default
        Type and default value, as the page shows them.
    text
        Description. Options that are described together have the same text.
    """

    path: str
    type: str
    default: str
    text: str


def described(kind: type[Any]) -> dict[str, str]:
    """Return the descriptions in the sections Parameters and Attributes of a dataclass and its bases, by field name.

    If a class and its base class both describe a field, the description in the class itself is used.
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        lines = inspect.cleandoc(base.__dict__.get("__doc__") or "").split("\n")
        titles = [n for n, line in enumerate(lines[1:]) if re.fullmatch("-{4,}", line)]
        for start, end in itertools.pairwise([*titles, len(lines)]):
            if lines[start] not in ("Parameters", "Attributes"):
                continue
            names: list[str] = []
            for line in lines[start + 2 : end]:
                if re.fullmatch(r"\w+(, \w+)*", line):
                    names = line.split(", ")
                    found |= dict.fromkeys(names, "")
                elif names:
                    found |= dict.fromkeys(names, f"{found[names[0]]} {line.strip()}".strip())
    return found


def text_of(kind: type[Any], name: str) -> str:
    """Return the description of a field.

    If the description refers to another class, insert the description of the field in that class.

    Raises
    ------
    LookupError
        The docstrings do not describe the field.
    """
    text = described(kind).get(name, "")
    match = REFERENCE.search(text or summary(kind))
    other = None
    if match is not None:
        module = importlib.import_module(match["module"]) if match["module"] else sys.modules[kind.__module__]
        other = described(getattr(module, match["name"])).get(name)
    if not text and not other:
        raise LookupError(f"{kind.__module__}.{kind.__qualname__} does not describe its field {name}")
    if match is None or not other:
        return text
    kept = text.replace(match[0], "").strip(" ,.")
    return f"{other} {kept}." if kept else other


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field."""
    return field.default_factory() if callable(field.default_factory) else field.default


def options(kind: type[Any], section: str) -> Iterator[Option]:
    """Yield the options of a section of a configuration: for a nested section, first its summary, then its options."""
    before = f"{section}." if section else ""
    for field in dataclasses.fields(kind):
        default, path = default_of(field), f"{before}{field.name}"
        if hasattr(default, "parse"):  # a structured option that is written as text
            rules = " ".join(inspect.cleandoc(default.parse.__doc__).split("\n\nRaises")[0].split())
            yield Option(path, "str", repr(written(default)), rules)
        elif dataclasses.is_dataclass(default):
            yield Option(path, "section", "", described(kind).get(field.name) or summary(type(default)))
            yield from options(type(default), path)
        else:
            yield Option(path, str(field.type), value(default), text_of(kind, field.name))


def written(default: Any) -> str:
    """Return the text that a user writes for a structured option: the name of a preset, or the values of all fields.

    Raises
    ------
    LookupError
        Parsing the text does not give the option `default`.
    """
    presets = getattr(sys.modules[type(default).__module__], "PRESETS", {})
    fields = ",".join(f"{name}={each}" for name, each in dataclasses.asdict(default).items())
    text = next((name for name, preset in presets.items() if preset == default), fields)
    if type(default).parse(text) != default:
        raise LookupError(
            f"{type(default).__qualname__} cannot be written as text: {text!r} is not {default}"
        )
    return text


def value(default: Any) -> str:
    """Return a default as a user writes it in a configuration."""
    if isinstance(default, float) and default and (default >= 1e6 or default < 1e-3):
        return f"{default:g}"
    return repr(default)


def sections() -> Iterator[tuple[str, str, list[Option]]]:
    """Yield (title, introduction, options) of every section of the reference."""
    from sct.benchmarks.instructions import InstructionBenchmarkOptions
    from sct.benchmarks.peft import PeftBenchmark
    from sct.benchmarks.zero_shot import BenchmarkOptions
    from sct.families import models
    from sct.families.tasks import task_specs, trained_by
    from sct.tasks.adapted import AdapterOptions
    from sct.tasks.finetuning import PeftConfig
    from sct.train.export import ExportConfig
    from sct.train.loop import TrainConfig
    from sct.train.optim import OptimizerConfig

    trained = {name: model for name, model in models().items() if model.tasks}
    for name, model in trained.items():
        kind = model.architecture.config
        yield f"`model`, family `{name}`", summary(kind), list(options(kind, "model"))
    for name, spec in task_specs().items():
        families = " or ".join(f"`{family}`" for family in trained_by(spec))
        for section, kind in (("data", spec.data), ("objective", spec.objective)):
            text = f"{summary(kind)} This task trains the family {families}."
            yield f"`{section}`, task `{name}`", text, list(options(kind, section))
    for section, kind in (
        ("adapters", AdapterOptions),
        ("peft", PeftConfig),
        ("optimizer", OptimizerConfig),
        ("train", TrainConfig),
        ("export", ExportConfig),
    ):
        yield f"`{section}`", summary(kind), list(options(kind, section))
    for name, kind in (
        ("benchmark", BenchmarkOptions),
        ("benchmark_zeromics", InstructionBenchmarkOptions),
        ("benchmark_peft", PeftBenchmark),
    ):
        text = f"All options of [`configs/{name}.py`](../configs/{name}.py). {summary(kind)}"
        yield f"Benchmark `{name}`", text, list(options(kind, ""))


def summary(kind: type[Any]) -> str:
    """Return the first paragraph of the docstring of a class."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())


def markdown() -> str:
    """Return the reference as Markdown."""
    found = []
    for title, text, listed in sections():
        found += [f"## {title}", "", text, ""]
        grouped: dict[tuple[str, str], list[Option]] = {}
        for option in listed:
            grouped.setdefault((option.path.rpartition(".")[0], option.text), []).append(option)
        for (_, meaning), group in grouped.items():
            found += [", ".join(map(term, group)), *definition(meaning), ""]
    return "\n".join(found)


def term(option: Option) -> str:
    """Return the name, the type and the default of an option."""
    default = f", default `{option.default}`" if option.default else ""
    return f"`{option.path}` ({option.type}{default})"


def definition(text: str) -> list[str]:
    """Return the lines of the definition of a term."""
    return textwrap.wrap(text, 110, initial_indent=": ", subsequent_indent="  ", break_on_hyphens=False)


def insert(app: Any, page: str, source: list[str]) -> None:
    """Replace the comment on the page by the reference."""
    if page == PAGE:
        source[0] = source[0].replace(PLACE, markdown())


def setup(app: Any) -> Mapping[str, bool]:
    """Register the extension."""
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}
