"""The documents say what the code does: every command line, option, name and example in them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from markdown_it import MarkdownIt

import sct
from sct.train.run_spec import NESTED
from tests import command_lines
from tests.cases import each

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import config_reference  # noqa: E402

# Folders below docs that `make docs` makes.
MADE = ("_build", "api", "tutorials")
PAGES = [ROOT / name for name in ("README.md", "BUILD.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    path for path in (ROOT / "docs").rglob("*.md") if path.relative_to(ROOT / "docs").parts[0] not in MADE
)
CLUSTERS = sorted((ROOT / "launch").rglob("*.md"))
LONGEST = 120


class Piece(NamedTuple):
    """A piece of code of a page: its language or "" (a block), or None (within a sentence)."""

    page: str
    line: int
    language: str | None
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pieces(path: Path) -> Iterator[Piece]:
    page = path.relative_to(ROOT).as_posix()
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text()):
        line = token.map[0] + 1 if token.map else 0
        if token.type in ("fence", "code_block"):
            yield Piece(page, line, token.info.strip(), token.content)
        for inside in token.children or ():
            if inside.type == "code_inline":
                yield Piece(page, line, None, inside.content)


PIECES = [piece for path in [*PAGES, *CLUSTERS] for piece in pieces(path)]
PYTHON = [piece for piece in PIECES if piece.language == "python"]
# Sentences of the changelog and of the pages on clusters name flags of earlier releases and of other programs.
SENTENCES = [
    piece for piece in PIECES if piece.language is None and not piece.page.startswith(("CHANGELOG", "launch"))
]


def wrong_commands(found: list[Piece]) -> list[str]:
    """Command lines that their flag parsers refuse; one within a sentence may lack required flags and values."""
    words = {place: command_lines.commands(place.text) for place in found}
    refused = command_lines.errors(words for each in words.values() for words in each)
    missing = re.compile(r"error: [-\w, ]+ (is|are) missing\b|error: --\w+ needs a value\b")
    return [
        f"{piece.place}: {line}\n  {refused[line]}"
        for piece, lines in words.items()
        for line in map(command_lines.line, lines)
        if line in refused and not (piece.language is None and missing.match(refused[line]))
    ]


def test_every_command_line_is_one_that_its_flag_parser_accepts():
    blocks = [piece for piece in PIECES if piece.language != "python"]
    assert sum(len(command_lines.commands(piece.text)) for piece in blocks) > 60
    assert wrong_commands(blocks) == []


def test_a_wrong_command_line_is_found():
    lines = [
        "sct embed --no_such_flag=1",
        "sct no_such_command",
        "python -m launch.train --config=no_such_configuration",
        "python -m launch.train --config=configs/sct_sc.py:no_such_variant",
        "python -m launch.train --config=configs/sct_sc.py --config.train.mesh.data=2",
        "sct train --config=sct_sc --config.train.batch_size=many  # a comment",
        "sct ingest --input=x --output=y --skip_bad",  # the former name of a flag
    ]
    incomplete = "sct annotate --n_contexts=8"
    found = wrong_commands([Piece("page", 1, None, line) for line in [*lines, incomplete]])
    assert len(found) == len(lines)
    assert len(wrong_commands([Piece("page", 1, "", incomplete)])) == 1


def option_paths() -> set[str]:
    """Options of all configurations, and their sections, such as "train" and "train.steps"."""
    found = {option.path for *_, options in config_reference.sections() for option in options}
    for path in (ROOT / "configs").glob("*.py"):
        module = runpy.run_path(str(path))
        for variant in module["VARIANTS"]:
            found.update(paths_of(module["get_config"](variant).to_dict()))
    return found | {path.rpartition(".")[0] for path in found if "." in path}


def paths_of(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from paths_of(value, f"{before}{name}.")


SECTIONS = (*NESTED, "pathways", "tuning")
NAMED_FLAG = re.compile(r"(?<![\w-])--(?P<flag>[a-z]\w*)(?:\.(?P<option>[\w.]+))?")


def named_options(text: str) -> Iterator[str]:
    """Options of configurations that code in a sentence names, such as `train.steps` and `--config.train.steps=1`."""
    for match in NAMED_FLAG.finditer(text):
        if match["flag"] == "config" and match["option"]:
            yield match["option"]
    match = re.fullmatch(r"(config\.)?([a-z_]+\.[a-z_.]*[a-z_])(=.*)?", text)
    known = match and (match[1] or match[2].split(".")[0] in SECTIONS)
    if match and known and not re.search(r"\.(safetensors|json|py)$", match[2]):
        yield match[2]


def test_every_option_that_a_sentence_names_exists():
    known = option_paths()
    assert "train.mesh" in known
    assert "train.mesh.data" not in known
    named = [(piece, option) for piece in SENTENCES for option in named_options(piece.text)]
    named += [
        (piece, option)
        for piece in PIECES
        if piece.language == "" and not command_lines.commands(piece.text)
        for option in named_options(piece.text)
    ]
    assert len(named) > 80
    assert [f"{piece.place}: {option}" for piece, option in named if option not in known] == []


def test_every_flag_that_a_sentence_names_exists():
    source = "".join(
        path.read_text()
        for path in [
            *(ROOT / "sct" / "commands").glob("*.py"),
            ROOT / "sct" / "cli.py",
            *(ROOT / "tools").glob("*.py"),
        ]
    )
    known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)) | set(re.findall(r'"--(\w+)"', source))
    named = [
        (piece, match["flag"])
        for piece in SENTENCES
        if not re.match(r"(pip|pytest|make|python -m (?!sct|launch))\b", piece.text)
        for match in NAMED_FLAG.finditer(piece.text)
    ]
    assert len(named) > 30
    assert [f"{piece.place}: --{flag}" for piece, flag in named if flag not in known] == []


def test_every_target_of_make_exists():
    targets = set(re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split())
    named = [
        (piece, word)
        for piece in PIECES
        if piece.language in ("", "bash", "console", None)
        for line in piece.text.splitlines()
        for match in [re.match(r"\s*make( .*|$)", line)]
        if match
        for word in command_lines.shell_words(match[1])
        if "=" not in word and not word.startswith("-")
    ]
    assert {"quickstart", "docs"} <= {word for _, word in named}
    assert [f"{piece.place}: make {word}" for piece, word in named if word not in targets] == []
    said = (ROOT / "Makefile").read_text()
    assert [target for target in targets if f'"make {target} ' not in said and target != "help"] == []


def test_every_extra_and_file_that_is_named_exists():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for piece in PIECES:
        for names in re.findall(r"\.\[([\w,]+)\]", piece.text):
            assert set(names.split(",")) <= extras, piece.place
    file = re.compile(r"((?:sct|docs|configs|launch|tests|tools|notebooks|constraints)/[\w./-]*\w)(?::\w+)?")
    named = [(piece, match[1]) for piece in SENTENCES for match in [file.fullmatch(piece.text)] if match]
    assert len(named) > 40
    # What `make docs` writes, and names in capitals that a user fills in.
    made = re.compile(r"docs/_build/.*|.*/[A-Z]+\.py")
    missing = [
        f"{piece.place}: {name}"
        for piece, name in named
        if not (ROOT / name).exists() and not made.fullmatch(name)
    ]
    assert missing == []


def links(path: Path) -> Iterator[str]:
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text()):
        for inside in token.children or ():
            target = inside.attrs.get("href") or inside.attrs.get("src")
            if target and not re.match(r"\w+:|#", str(target)):
                yield str(target).partition("#")[0]


def test_every_link_leads_to_a_file():
    found = [(path, link) for path in PAGES for link in links(path)]
    assert len(found) > 60
    missing = [f"{path.name}: {link}" for path, link in found if not (path.parent / link).exists()]
    assert missing == []


def test_no_line_is_too_long():
    long = [
        f"{path.relative_to(ROOT)}:{number}: {len(line)} characters"
        for path in [*PAGES, *CLUSTERS]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > LONGEST
    ]
    assert long == []


def test_the_reference_describes_every_option_of_every_configuration():
    listed = {option.path: option for *_, options in config_reference.sections() for option in options}
    outside = {"family", "task", "init_from", "benchmark"}
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = runpy.run_path(str(path))
        for variant in module["VARIANTS"]:
            values = module["get_config"](variant).to_dict()
            for name in ("sweep", "builds_on"):  # changes of this configuration, and other configurations
                values.pop(name, None)
            missing = [name for name in paths_of(values) if name not in listed]
            assert {name for name in missing if name not in SECTIONS} <= outside, (path.stem, variant)
    assert listed["train.steps"].default == "1000"
    text = config_reference.markdown()
    assert all(f"`{path}`" in text for path in listed)
    assert all(option.text and not option.text.startswith("See `") for option in listed.values())


def test_an_option_without_a_description_is_refused():
    made = dataclasses.make_dataclass("Made", [("one", int, 1)])
    with pytest.raises(LookupError, match="one"):
        list(config_reference.options(made, "made"))


def test_the_reference_of_functions_lists_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    modules = ("datasets", "pp", "tl", "pl")
    names = [f"sct.{name}" for name in sct.__all__ if name not in (*modules, "__version__")]
    names += [f"sct.{module}.{name}" for module in modules for name in getattr(sct, module).__all__]
    assert len(names) > 20
    errors = importlib.import_module("sct.errors")
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.SctError):
            names.append(name)
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)] == []


# Examples in Python: names and arguments without running them.


class Unknown:
    """What is not known without running an example."""


def known_value(node: ast.AST, names: Mapping[str, Any]) -> Any:
    """Object that an expression names, or the class of the object that it makes; `Unknown` if neither is known.

    Raises
    ------
    AttributeError
        A module or class does not have a name.
    """
    if isinstance(node, ast.Name):
        return names.get(node.id, Unknown)
    if isinstance(node, ast.Attribute):
        owner = known_value(node.value, names)
        if owner is Unknown:
            return Unknown
        if isinstance(owner, Instance):
            return owner.attribute(node.attr)
        if inspect.ismodule(owner) or inspect.isclass(owner):
            return getattr(owner, node.attr)
    if isinstance(node, ast.Call):
        made = known_value(node.func, names)
        if inspect.isclass(made) and made is not Unknown:
            return Instance(made)
        if inspect.isroutine(made):
            try:
                result = typing.get_type_hints(made).get("return")
            except Exception:  # annotations for type checkers only
                return Unknown
            if inspect.isclass(result) and result.__module__.startswith("sct."):
                return Instance(result)
    return Unknown


class Instance(NamedTuple):
    """An object of a class that an example makes."""

    kind: type[Any]

    def attribute(self, name: str) -> Any:
        if hasattr(self.kind, name):
            value = inspect.getattr_static(self.kind, name)
            return value if inspect.isfunction(value) else Unknown
        if name not in typing.get_type_hints(self.kind) and name not in vars(self.kind).get("__slots__", ()):
            raise AttributeError(f"{self.kind.__name__} has no attribute {name}")
        return Unknown


def check_call(node: ast.Call, names: Mapping[str, Any]) -> None:
    """Raise `TypeError` if a call does not fit the signature of what it calls."""
    called = known_value(node.func, names)
    if called is Unknown or not callable(called) or isinstance(called, Instance):
        return
    if any(isinstance(word, ast.Starred) for word in node.args) or any(k.arg is None for k in node.keywords):
        return
    try:
        signature = inspect.signature(called)
    except ValueError:  # written in C
        return
    bound = isinstance(node.func, ast.Attribute) and isinstance(known_value(node.func.value, names), Instance)
    if bound and not isinstance(inspect.getattr_static(known_value(node.func.value, names).kind, node.func.attr),
                                (staticmethod, classmethod)):  # fmt: skip
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    signature.bind(*[None] * len(node.args), **{str(k.arg): None for k in node.keywords})


def check_example(piece: Piece, names: dict[str, Any]) -> None:
    """Check the names and the arguments of an example, and add what it imports and makes to `names`."""
    tree = ast.parse(piece.text, piece.place)
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    module = importlib.import_module(alias.name)
                    names[alias.asname or alias.name.split(".")[0]] = (
                        module if alias.asname else sys.modules[alias.name.split(".")[0]]
                    )
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    try:
                        value = getattr(importlib.import_module(str(node.module)), alias.name)
                    except AttributeError:
                        value = importlib.import_module(f"{node.module}.{alias.name}")
                    names[alias.asname or alias.name] = value
            elif isinstance(node, ast.Attribute):
                known_value(node, names)
            elif isinstance(node, ast.Call):
                check_call(node, names)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            names[statement.targets[0].id] = known_value(statement.value, names)


def test_names_and_arguments_of_every_example_exist():
    assert len(PYTHON) > 10
    each(lambda place, piece: check_example(piece, {"sct": sct}), [(piece.place, piece) for piece in PYTHON])


def test_a_wrong_example_is_found():
    wrong = [
        "sct.tl.no_such_function(adata)",
        "sct.tl.embed(adata, model, no_such_argument=1)",
        "sct.pl.umap()",
        "from sct.models import no_such_module",
        "model = sct.load('x')\nmodel.no_such_attribute",
        "model = sct.load('x')\nmodel.save_pretrained()",
        "genes = sct.GeneVocabulary.human()\ngenes.subset(names=1)",
        "sct.load(",
    ]
    for text in wrong:
        with pytest.raises((AttributeError, TypeError, ImportError, SyntaxError)):
            check_example(Piece("page", 1, "python", text), {"sct": sct})
    right = "genes = sct.GeneVocabulary.human()\ngenes.subset(['x']).save('f')\nsct.load('x', dtype='float32').genes"
    check_example(Piece("page", 1, "python", right), {"sct": sct})


# Examples in Python, run on the blood cells that scanpy ships, with models of a few steps of training.

# Page and beginning of an example that is not run -> why.
NOT_RUN = {
    ("docs/benchmarks.md", "import anndata"): "it reads files of five studies",
    ("docs/howto/add_family.md", "from sct.families"): "its parts are those of tests/families/toy.py",
    (
        "docs/howto/finetune.md",
        "",
    ): "it trains for minutes; tests/train/test_finetuning.py calls the same functions",
    (
        "docs/howto/published_weights.md",
        'import sct\n\nmodel = sct.load("models/scgpt")',
    ): "it reads published weights",
}


def trained(config: str, folder: Path, change: Callable[[Any], None]) -> None:
    """Train a quick start for two steps."""
    from sct.train.experiment import run

    values = runpy.run_path(str(ROOT / "configs" / f"{config}.py"))["get_config"]("quickstart")
    values.train.update(steps=2, eval_every=2, checkpoint_every=2, log_every=1)
    change(values)
    run(values.to_dict(), folder)


def small_sct(values: Any) -> None:
    values.objective.update(report_seeds=1, report_bags=1)
    values.model.update(num_downsamples=3, num_layers=4)  # an example names blocks 2 and 3
    values.data.cells_per_bag = 4


def small_text(values: Any) -> None:
    splits = ("train", "validation", "test")
    Path("STUDIES.yaml").write_text(
        "".join(f"pbmc68k_{name}: {{abstract: Blood cells.}}\n" for name in splits)
    )
    values.data.studies = "STUDIES.yaml"
    values.objective.tasks += (("cell_to_abstract", 1.0),)  # an example describes cells
    values.objective.update(report_cells=0)
    values.model.update(embed_dim=32, num_layers=1, num_heads=2, ffn_dim=32)


def small_cells(values: Any) -> None:
    values.objective.update(report_cells=0)
    values.model.update(embed_dim=16, num_layers=1, num_heads=2, ffn_dim=16)


def small_answers(values: Any) -> None:
    values.objective.update(report_cells=0)
    values.model.llm.update(embed_dim=32, num_layers=1, num_heads=2, ffn_dim=32)


@pytest.mark.slow
def test_every_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("scanpy", reason="the real cells come with scanpy: make install brings it")
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    trained("sct_sc", runs / "quickstart", small_sct)
    trained("c2s_gpt2", runs / "c2s", small_text)
    trained("zeromics_sc", runs / "zeromics_sc", small_cells)
    trained("zeromics_llm", runs / "zeromics_llm", small_answers)
    for name in ("mine", "x"):
        shutil.copytree(runs / "quickstart", runs / name)
    shutil.copytree(runs / "quickstart" / "model", tmp_path / "models" / "sct")
    labeled = sct.datasets.pbmc68k()[::7].copy()
    for name, method in (("blood", "lora"), ("lung", "gene_encoder")):
        _ = sct.tl.finetune(
            labeled,
            runs / "x",
            label_key="bulk_labels",
            method=method,
            epochs=1,
            baselines=False,
            output=runs / name,
        )
    subprocess.run(
        [sys.executable, "-m", "sct", "convert", "--from=sct", "--to=hf", "--input=runs/c2s", "--output=GPT2_FOLDER"],
        check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    failed, run = [], 0
    for page in dict.fromkeys(piece.page for piece in PYTHON):
        names: dict[str, Any] = example_names()
        for piece in [piece for piece in PYTHON if piece.page == page]:
            if any(page == where and piece.text.startswith(start) for where, start in NOT_RUN):
                continue
            run += 1
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # after two steps of training, most labels are unknown
                    exec(compile(piece.text, piece.place, "exec"), names)
            except Exception as error:
                failed.append(f"{piece.place}: {type(error).__name__}: {error}")
    assert failed == []
    assert run >= 10


def example_names() -> dict[str, Any]:
    """Names that an example may use without making them."""
    cells = sct.datasets.pbmc68k()
    slide = cells[:60].copy()
    slide.obsm["spatial"] = np.random.default_rng(0).random((60, 2))
    return {"sct": sct, "adata": cells[:40].copy(), "atlas": cells[100:160].copy(), "slide": slide}
