"""The package as a whole: which part may import which, what `import sct` costs, what the wheel holds."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from sct.errors import MissingExtraError
from sct.extras import load_extra, missing_extra
from sct.version import DISTRIBUTION, REPOSITORY, __version__
from sct.weights import packaged

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sct"

# What prints, and what decides how much is printed.
_MESSAGES = {"messages", "global_settings"}
_BELOW_FAMILIES = _MESSAGES | {
    "inference",
    "tasks",
    "generation",
    "gene_features",
    "weights",
    "eval",
    "eval.metrics",
    "models",
    "data",
    "nn",
    "errors",
    "checks",
    "atomic",
    "outputs",
    "extras",
    "folder_lock",
    "hashes",
    "progress",
    "terminal",
}
_BELOW_TRAIN = _BELOW_FAMILIES | {"families"}
_ALL = _BELOW_TRAIN | {
    "result_tables",
    "train",
    "speed",
    "pp",
    "tl",
    "pl",
    "benchmarks",
    "commands",
    "cli",
    "sct",
    "version",
    "devices",
}
# Part of the package -> parts that it may import. "sct" is the root, which others read for its version.
ALLOWED: dict[str, set[str]] = {
    "sct": {"version"},
    "version": set(),
    "errors": set(),
    "checks": {"errors"},
    "extras": {"errors", "version"},
    "hashes": set(),
    "devices": {"checks", "errors", "version"},
    "global_settings": {"devices", "errors"},
    "messages": {"global_settings"},
    "progress": _MESSAGES,
    "terminal": set(),
    "atomic": {"errors"},
    "result_tables": {"atomic", "checks", "errors", "extras"},
    "outputs": {"errors"},
    "folder_lock": {"errors"} | _MESSAGES,
    "nn": {"nn", "checks", "errors"},
    "models": {"models", "nn", "checks", "errors", "hashes"} | _MESSAGES,
    "data": {
        "data",
        "checks",
        "errors",
        "extras",
        "atomic",
        "hashes",
        "outputs",
        "progress",
        "terminal",
        "version",
    }
    | _MESSAGES,
    "eval.metrics": {"extras"},
    "eval": {
        "eval",
        "eval.metrics",
        "data",
        "progress",
        "terminal",
        "checks",
        "errors",
        "extras",
        "atomic",
        "version",
    }
    | _MESSAGES,
    "generation": {"generation", "data", "models", "nn", "progress", "checks", "errors"},
    "tasks": {
        "tasks",
        "gene_features",
        "data",
        "models",
        "weights",
        "generation",
        "eval",
        "eval.metrics",
        "nn",
        "checks",
        "errors",
    },
    "gene_features": {
        "gene_features",
        "weights",
        "generation",
        "data",
        "models",
        "nn",
        "progress",
        "checks",
        "errors",
        "atomic",
        "outputs",
        "hashes",
        "version",
        "extras",
    }
    | _MESSAGES,
    "inference": {
        "inference",
        "generation",
        "weights",
        "data",
        "models",
        "nn",
        "progress",
        "checks",
        "errors",
        "version",
    }
    | _MESSAGES,
    "families": {"families", "sct"} | _BELOW_FAMILIES,
    "weights": {
        "weights",
        "models",
        "nn",
        "data.genes.alignment",
        "data.genes.vocabulary",
        "data.cell_options",
        "data.bag_order",
        "data.tokenize",
        "data.text.tokenizer",
        "progress",
        "checks",
        "errors",
        "atomic",
        "outputs",
        "extras",
        "hashes",
        "version",
    }
    | _MESSAGES,
    "train": {"train", "version"} | _BELOW_TRAIN,
    **{part: _ALL - {"train", "speed", "benchmarks", "commands", "cli"} for part in ("pp", "tl", "pl")},
    "benchmarks": {"benchmarks", "train", "tl", "pl", "version"} | _BELOW_TRAIN,
    "speed": {"speed", "train", "tl", "version"} | _BELOW_TRAIN,
    **dict.fromkeys(("commands", "cli", "__main__"), _ALL),
}
# Never needed to import the package: each is loaded where a function cannot do without it.
OPTIONAL = {
    "torch", "transformers", "scanpy", "cellxgene_census", "huggingface_hub", "matplotlib", "igraph",
    "umap", "scib_metrics", "ot", "decoupler", "tokenizers", "sentencepiece", "sacrebleu",
    "rouge_score", "rapidfuzz", "joblib", "magic", "scvi", "pyarrow",
}  # fmt: skip
# Extras of programs that are run, and of plugins that jax finds by itself.
TOOLS = {"test", "docs", "cuda", "tpu"}
# Libraries that no extra brings -> why.
UNDECLARED = {
    "scvi": "a baseline that is skipped without it, and whose dependencies are many",
    "IPython": "what a notebook runs in",
    "transformers": "what speed is compared with, where it is installed",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "configs" not in path.parts}


def part_of(module: str) -> str:
    """Row of `ALLOWED` that a module of ours belongs to."""
    below = module.split(".")[1:]
    if below[:2] == ["eval", "metrics"]:
        return "eval.metrics"
    return below[0] if below else "sct"


def imported(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Every absolute name that a module imports, anywhere in it, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # `from sct.data import masking` names a module, `from sct.data.masking import x` does not.
                yield (full if full in MODULES else base), node.lineno


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of a module that the table does not allow, and uses of the root beyond its version."""
    tree, part = ast.parse(source), part_of(module)
    found = []
    for name, line in imported(tree, module, is_package):
        top = name.split(".")[0]
        if top == "launch":
            found.append(f"{module}:{line} imports {name}")
        elif top == "sct":
            allowed = ALLOWED[part]
            if part_of(name) not in allowed and name.removeprefix("sct.") not in allowed:
                found.append(f"{module}:{line} imports {name}")
    if part in ("pp", "tl", "pl", "commands", "cli"):
        return found
    # The root loads its parts lazily, so `sct.Store` would be an import that the table does not see.
    return found + [
        f"{module}:{node.lineno} uses sct.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "sct"
        and node.attr != "__version__"
        and f"sct.{node.attr}" not in {name for name, _ in imported(tree, module, is_package)}
    ]


def at_import(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Top-level names of what is imported when a module is: not in functions, not for type checkers."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0], node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that knows nothing of the checkout and is not told about accelerators."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX_", "XLA_"))}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**inherited, "JAX_PLATFORMS": "cpu", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_every_part_of_the_package_has_a_row():
    assert {part_of(module) for module in MODULES} <= set(ALLOWED)


def test_imports_point_one_way():
    found = [
        violation
        for module, path in MODULES.items()
        for violation in violations(path.read_text(), module, path.name == "__init__.py")
    ]
    assert found == []


def test_a_forbidden_import_is_seen():
    forbidden = [
        ("sct.nn.linear", "from sct.models import sct"),
        ("sct.nn.linear", "def f():\n    import sct.data.genes.vocabulary"),
        ("sct.data.store", "from ..models.sct_config import SCTConfig"),
        ("sct.data.store", "import sct\nsct.Store"),
        ("sct.models.sct", "from sct.data import genes"),
        ("sct.eval.metrics", "from sct.errors import DataError"),
        ("sct.weights.pretrained", "from sct.data.store import Store"),
        ("sct.tasks.base", "from sct.train.loop import train"),
        ("sct.tasks.task_spec", "from sct.families import models"),
        ("sct.inference.runner", "from sct.families import models"),
        ("sct.families.sct", "from sct.train.loop import train"),
        ("sct.train.loop", "from sct.cli import main"),
        ("sct.tl", "from sct.train.loop import train"),
        ("sct.commands.train", "import launch.train"),
    ]
    assert [case for case in forbidden if not violations(case[1], case[0])] == []


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, each imported by the one after it; none where there is none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_one_that_imports_it():
    """Imports in functions and for type checkers count: a module is understood after those that it imports."""
    imports = {
        module: {
            name
            for name, _ in imported(ast.parse(path.read_text()), module, path.name == "__init__.py")
            if name in MODULES and name != module
        }
        for module, path in MODULES.items()
    }
    assert circle(imports) == []
    assert {"sct.errors", "sct.cli"} <= set(circle(imports | {"sct.errors": {"sct.cli"}}))


def compared_names(tree: ast.AST, names: Collection[str]) -> list[int]:
    """Lines that compare something with one of some names, or look whether it is among names that are written out."""
    found = []
    for node in ast.walk(tree):
        cases = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        if isinstance(node, ast.MatchValue):
            cases = [node.value]
        cases += [
            each for case in cases if isinstance(case, ast.Tuple | ast.List | ast.Set) for each in case.elts
        ]
        if any(isinstance(case, ast.Constant) and case.value in names for case in cases):
            found.append(node.lineno)
    return found


def test_nothing_but_manifests_and_converters_compares_names_of_families():
    from sct import families
    from sct.families.tasks import task_specs

    names = {*families.all_families(), *families.models(), *task_specs()}
    assert {"sct", "gpt2", "zeromics_cells"} <= names
    exempt = re.compile(r"sct\.(families\b.*|models\.registry|weights\.(hf|peft|haiku)[\w.]*)")
    found = {
        f"{module}:{line}"
        for module, path in MODULES.items()
        if not exempt.fullmatch(module)
        for line in compared_names(ast.parse(path.read_text()), names)
    }
    assert found == set()
    for seen in (
        'a.family == "sct"',
        '"gpt2" != x',
        'x in ("llama", "other")',
        "match x:\n case 'bert': pass",
    ):
        assert compared_names(ast.parse(seen), names), seen
    assert not compared_names(ast.parse('{"sct": 1}; f("sct")'), names)


def test_texts_that_serve_every_family_name_no_format_of_one():
    """Help and docstrings ask the manifests: only a family's own files know its format."""
    from sct import families

    names = {
        word for name, each in families.converters().items() if name != "hf" for word in (name, each.title)
    }
    assert {"scgpt", "haiku-sct"} <= names
    wanted = re.compile("|".join(re.escape(name) for name in names if name), re.IGNORECASE)
    exempt = re.compile(r"sct\.(families\b.*|models\.(registry|cell_encoder\w*)|weights\.(haiku|scgpt)\w*)")
    found = [
        f"{module}: {match[0]}"
        for module, path in MODULES.items()
        if not exempt.fullmatch(module) and (match := wanted.search(path.read_text()))
    ]
    assert found == []


def test_what_serves_every_family_imports_no_task_of_one():
    from sct.families.tasks import task_specs

    # Fine-tuning is a task of every family, and is itself what serves them.
    own = {kind.make.__module__ for kind in task_specs().values() if not kind.finetunes}
    assert {"sct.tasks.masked_expression", "sct.tasks.instructions"} <= own
    found = {
        f"{module}:{line} imports {name}"
        for module, path in MODULES.items()
        if part_of(module) in ("train", "tl", "speed", "commands", "weights", "inference")
        for name, line in imported(ast.parse(path.read_text()), module, path.name == "__init__.py")
        if any(name == task or name.startswith(f"{task}.") for task in own)
    }
    assert found == set()


def named_classes(sources: dict[str, str]) -> dict[str, set[str]]:
    """Classes and aliases of types by name -> modules that define them; imports under another name included."""
    found: dict[str, set[str]] = {}
    for module, text in sources.items():
        for node in ast.parse(text).body:
            names = []
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.ImportFrom):
                names = [alias.asname for alias in node.names if alias.asname]
            for name in names:
                if re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", name):
                    found.setdefault(name, set()).add(module)
    return found


def test_a_name_stands_for_one_class():
    sources = {str(file.relative_to(PACKAGE)): file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}
    shared = {name: sorted(where) for name, where in named_classes(sources).items() if len(where) > 1}
    assert not shared
    assert named_classes({"a": "class Job: ...", "b": "Job = dict[str, int]"})["Job"] == {"a", "b"}


def test_configs_import_ml_collections_and_the_standard_library_only():
    for path in (ROOT / "configs").glob("*.py"):
        names = {name.split(".")[0] for name, _ in imported(ast.parse(path.read_text()), path.stem)}
        assert names <= {"ml_collections", *sys.stdlib_module_names}, path.name


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, dict[str, str]]:
    """Requirements of pyproject.toml by distribution, in groups: "core" and the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {
        group: {normalized(re.split(r"[^\w.-]", line)[0]): line for line in lines}
        for group, lines in groups.items()
    }


# absl-py's module is absl, scikit-learn's is sklearn: a module belongs to its distributions.
_OWNERS = {
    module: {normalized(owner) for owner in owners}
    for module, owners in metadata.packages_distributions().items()
}


def owners_of(module: str) -> set[str]:
    """Distributions that hold a module; its own name where none is installed."""
    return _OWNERS.get(module, {normalized(module)})


def extra_calls(tree: ast.AST) -> Iterator[tuple[str | None, str, str, int]]:
    """Module (of `load_extra` only), library, extra and line of every call that names an extra."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        words = [ast.literal_eval(word) for word in node.args if isinstance(word, ast.Constant)]
        if node.func.id == "load_extra":
            module = words[0].split(".")[0]
            yield module, words[2] if len(words) > 2 else module, words[1], node.lineno
        elif node.func.id == "missing_extra" and len(words) > 1:
            yield None, words[0], words[1], node.lineno


def loaded(tree: ast.AST, module: str) -> Iterator[tuple[str, int]]:
    """Top-level names of other projects that a module imports, at once or when it needs them, with the line."""
    found = [(name.split(".")[0], line) for name, line in imported(tree, module)]
    found += [(name, line) for name, _, _, line in extra_calls(tree) if name]
    yield from (pair for pair in found if pair[0] != "sct" and pair[0] not in sys.stdlib_module_names)


def test_what_is_imported_at_once_is_a_core_dependency():
    core = set(declared()["core"])
    for module, path in MODULES.items():
        for name, line in at_import(ast.parse(path.read_text())):
            if name in sys.stdlib_module_names or name == "sct":
                continue
            assert name not in OPTIONAL, f"{module}:{line} imports {name} at module level"
            assert owners_of(name) & core, f"{module}:{line} imports {name}, which is not declared"


def test_what_is_imported_when_needed_is_declared():
    known = set().union(*declared().values())
    found = [
        f"{module}:{line} imports {name}, which is not declared"
        for module, path in MODULES.items()
        for name, line in loaded(ast.parse(path.read_text()), module)
        if name not in UNDECLARED and not owners_of(name) & known
    ]
    assert found == []


def test_what_is_declared_is_imported():
    used = {
        owner
        for module, path in MODULES.items()
        for name, _ in loaded(ast.parse(path.read_text()), module)
        for owner in owners_of(name)
    }
    unused = {
        group: sorted(set(requirements) - used)
        for group, requirements in declared().items()
        if group not in TOOLS and set(requirements) - used
    }
    assert unused == {}


def test_errors_name_the_extra_that_brings_the_library():
    groups, found = declared(), []
    for module, path in MODULES.items():
        for name, library, extra, line in extra_calls(ast.parse(path.read_text())):
            if normalized(library) not in groups.get(extra, ()):
                found.append(f"{module}:{line} says that the extra {extra} brings {library}")
            elif name and name in _OWNERS and normalized(library) not in owners_of(name):
                found.append(f"{module}:{line} says that {library} holds {name}")
    assert found == []


def test_one_range_of_versions_per_dependency():
    ranges: dict[str, set[str]] = {}
    for lines in declared().values():
        for name, line in lines.items():
            if "[" not in line:  # jax[cuda12] is jax again
                ranges.setdefault(name, set()).add(line)
    assert {name: lines for name, lines in ranges.items() if len(lines) > 1} == {}


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "absent_library", None)
    with pytest.raises(
        MissingExtraError, match=rf'^a map needs Absent: pip install "{DISTRIBUTION}\[text\]"$'
    ):
        raise missing_extra("Absent", "text", "a map")
    with pytest.raises(MissingExtraError, match="absent_library is not installed: pip install"):
        load_extra("absent_library.part", "text", "absent_library")


def test_an_installed_library_that_cannot_be_loaded_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import absent_library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_library") as raised:
        load_extra("half_installed", "text")
    assert not isinstance(raised.value, MissingExtraError)


IMPORT = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
import sct
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""


def test_import_is_cheap():
    results = [json.loads(run(sys.executable, "-c", IMPORT, cwd=ROOT).stdout) for _ in range(3)]
    assert min(seconds for seconds, _ in results) < 1.0
    # Nothing but the standard library: neither JAX nor scanpy, anndata, pandas, numpy.
    assert set(results[0][1]) - set(sys.stdlib_module_names) == {"sct"}


START = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print("imported")
import jax
jax.devices()
"""


@pytest.mark.slow
def test_no_module_starts_a_jax_backend():
    # Commands define flags and run one to a process; the installed ones are run below.
    names = [name for name in MODULES if not name.startswith("sct.commands.")]
    # With a platform that does not exist, whatever starts a backend fails: here that is the last line alone.
    done = run(sys.executable, "-c", START, *names, cwd=ROOT, JAX_PLATFORMS="no_such_platform")
    assert done.stdout.strip() == "imported", done.stderr
    assert "no_such_platform" in done.stderr


def test_public_modules_list_only_public_names():
    import sct

    public = {name: getattr(sct, name) for name in sct.__all__ if isinstance(getattr(sct, name), ModuleType)}
    assert callable(public.pop("models")), "public is the function, not what else the package has"
    assert set(public) == {"datasets", "pl", "pp", "tl"}
    assert {name: dir(each) for name, each in public.items()} == {
        name: sorted(each.__all__) for name, each in public.items()
    }


def test_public_names_resolve():
    import sct

    for name in sct.__all__:
        assert getattr(sct, name) is not None
    assert set(sct.__all__) <= set(dir(sct))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sct.no_such_name


def tracked_files() -> list[Path]:
    """Files of the repository, those included that are not committed yet."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        listed = run(git, "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    folders = ("sct", "configs", "launch", "tests", "tools", "docs", "constraints", ".ci")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path for path in [*ROOT.glob("*"), *inside] if path.is_file() and "__pycache__" not in path.parts]


MACHINE = re.compile(
    r"(?<![\w./~}])/(?:home|root|Users|work|opt|tmp|mnt)/[\w.]"
    r"|file:///|py[p]i\.org|python[h]osted|--(?:extra-)?index-url|--find-links|\b(?:10|192\.168)\.\d+\.\d+\.\d+"
)


def test_no_file_names_a_machine_or_a_registry():
    files = tracked_files()
    assert ROOT / "pyproject.toml" in files
    found = []
    for path in files:
        content = path.read_bytes()
        if path == Path(__file__).resolve() or b"\0" in content[:1024]:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if MACHINE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_a_machine_path_is_seen():
    lines = [
        "see /home/me/data",
        'open("/tmp/x")',
        "--index-url https://host",
        "file:///opt/x",
        "http://10.1.2.3",
    ]
    assert [line for line in lines if not MACHINE.search(line)] == []


# The name of another project where ours is meant, or an address that nobody has.
MISNAMED = re.compile(
    r"(?<![\w.])sct\\*(?:\[|==|\s*@\s*git)|pip install (?:-\S+ )*[\"'\\]*sct(?![\w-])|\bOWNER/"
)
EXTRAS_NAMED = re.compile(re.escape(DISTRIBUTION) + r"\\*\[([\w,]+)\\*\]")


def test_no_file_installs_another_project_or_leads_nowhere():
    found, extras = [], set(declared()) - {"core"}
    for path in tracked_files():
        content = path.read_bytes()
        if path == Path(__file__).resolve() or b"\0" in content[:1024]:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            named = {name for names in EXTRAS_NAMED.findall(line) for name in names.split(",")}
            if named - extras or MISNAMED.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_a_misnamed_installation_is_seen():
    wrong = [
        "pip install \"sct[text]\"", "pip install sct", "pip install -q 'sct==0.1'", "sct[analysis] @ git+https://host",
        "match=r\"sct\\[text\\]\"", "https://host/OWNER/sct",
    ]  # fmt: skip
    right = [
        'pip install "sct-jax[text]"',
        'pip install -e ".[cells]"',
        "pip install sct-jax",
        'uns["sct"]["x"]',
    ]
    assert [line for line in [*wrong, *right] if MISNAMED.search(line)] == wrong


def test_the_name_and_the_address_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
    assert project.get("urls", {}).get("Repository") == REPOSITORY
    assert REPOSITORY is None or re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", REPOSITORY)


@pytest.mark.parametrize("path", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda path: path.stem)
def test_constraints_are_names_and_versions(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line) for line in lines)
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))
    assert {"jax", "jaxlib", "flax", "anndata", "scanpy", "pytest"} <= set(names)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("build", reason="the wheel needs the package `build`: make install brings it")
    pytest.importorskip("hatchling", reason="the wheel needs the package `hatchling`: make install brings it")
    out = tmp_path_factory.mktemp("dist")
    made = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    assert made.returncode == 0, made.stdout + made.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Virtual environment with the wheel, whose dependencies are those of the running interpreter."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    done = run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    paths = dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder)
    # A folder that a .pth file adds comes after the wheel's, and its own .pth files (an editable checkout's)
    # are not followed.
    Path(purelib.stdout.strip(), "dependencies.pth").write_text("\n".join(paths) + "\n")
    return folder / "bin"


def test_packaged_models_belong_to_the_wheel_and_the_sdist():
    """Nothing is built: the rules that choose the files accept every file of a model."""
    wheels = pytest.importorskip(
        "hatchling.builders.wheel", reason="the wheel needs the package `hatchling`: make install brings it"
    )
    from hatchling.builders.sdist import SdistBuilder

    names = (
        "config.json", "model.safetensors", "genes.tsv", "README.md", "readout.safetensors",
        "training_cells.safetensors",
    )  # fmt: skip
    for builder in (wheels.WheelBuilder(str(ROOT)), SdistBuilder(str(ROOT))):
        for name in names:
            path = (packaged.FOLDER / packaged.DEFAULT / name).relative_to(ROOT).as_posix()
            assert builder.config.include_path(path, is_package=True), path
        assert not builder.config.include_path(f"runs/{packaged.DEFAULT}/model.safetensors")


def test_packaged_models_are_small_and_whole():
    import sct

    size = sum(path.stat().st_size for path in packaged.FOLDER.rglob("*") if path.is_file())
    assert size < 12e6, "the models in the wheel have at most 12 MB"
    listed = sct.models()
    packages = listed[listed["where"] == "package"]
    assert packages["name"].tolist() == packaged.names()
    assert packages["trouble"].dropna().tolist() == []
    assert packages[["parameters", "genes", "species"]].notna().all(axis=None)
    assert not packages["license"].isin(["unknown"]).any(), "the license of a packaged model is known"


def test_wheel_holds_what_it_needs_and_no_more(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged_models = [path for path in packaged.FOLDER.rglob("*") if path.is_file()]
    assets = [*(PACKAGE / "data" / "assets").iterdir(), *packaged_models, PACKAGE / "py.typed"]
    for path in [*MODULES.values(), *assets]:
        assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "configs").glob("*.py"):
        assert f"sct/configs/{path.name}" in names
    assert wheel.name == f"{DISTRIBUTION.replace('-', '_')}-{__version__}-py3-none-any.whl"
    assert {name.split("/")[0] for name in names} == {"sct", f"{wheel.name.split('-py3')[0]}.dist-info"}
    assert not [name for name in names if re.search(r"test|__pycache__|\.pyc$", name)]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


@pytest.mark.slow
def test_installed_package_is_the_wheels(installed, tmp_path):
    listed = run(installed / "python", "-m", "pip", "show", DISTRIBUTION, cwd=tmp_path)
    assert f"Version: {__version__}" in listed.stdout, listed.stderr
    code = "import sct; print(sct.__file__, len(sct.GeneVocabulary.human()))"
    shown = run(installed / "python", "-P", "-c", code, cwd=tmp_path).stdout.split()
    assert Path(shown[0]).is_relative_to(installed.parent)
    assert int(shown[1]) > 19_000


@pytest.mark.slow
def test_installed_command_explains_itself(installed, tmp_path):
    shown = run(installed / "sct", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "train" in shown.stdout
    assert "ingest" in shown.stdout
    assert run(installed / "sct", "--version", cwd=tmp_path).stdout.strip() == __version__
    wrong = run(installed / "sct", "trian", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "trian" in wrong.stderr


@pytest.mark.slow
def test_installed_commands_list_their_flags(installed, tmp_path):
    for command, flag in (("train", "--workdir"), ("ingest", "--output")):
        shown = run(installed / "sct", command, "--help", cwd=tmp_path)
        assert shown.returncode == 0, shown.stdout + shown.stderr
        source = (PACKAGE / "commands" / f"{command}.py").read_text()
        in_text = str(ast.get_docstring(ast.parse(source))).count(flag)
        assert shown.stdout.count(flag) > in_text, command


@pytest.mark.slow
def test_installed_command_trains(installed, tmp_path):
    pytest.importorskip("scanpy", reason="the real cells come with scanpy: make install brings it")
    small = {
        "model.embed_dim": 32, "model.num_heads": 2, "model.ffn_dim": 32, "model.num_layers": 1,
        "model.num_downsamples": 1, "data.cells_per_bag": 2, "train.batch_size": 1, "train.steps": 2,
        "objective.report_seeds": 1, "objective.report_bags": 2,
    }  # fmt: skip
    done = run(
        installed / "sct",
        "train",
        "--config=sct_sc:quickstart",
        *[f"--config.{name}={value}" for name, value in small.items()],
        f"--workdir={tmp_path / 'run'}",
        "--compilation_cache=",
        cwd=tmp_path,
        HOME=str(tmp_path),
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert str(tmp_path / "run") in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slowest
def test_full_install_from_the_index(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    constraints = ROOT / "constraints" / "py{}{}.txt".format(*sys.version_info[:2])
    limits = ["-c", constraints] if constraints.is_file() else []
    python = tmp_path / "venv" / "bin" / "python"
    done = run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        *limits,
        f"{DISTRIBUTION}[cells] @ {wheel.as_uri()}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    checked = run(python, "-m", "pip", "check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    code = "import sct; print(sct.datasets.pbmc68k().shape)"
    assert run(python, "-P", "-c", code, cwd=tmp_path).stdout.strip() == "(700, 765)"


def test_every_public_signature_is_spelt_out_and_documented():
    """A user reads all arguments of a function in its own help: none hide behind **options."""
    import inspect

    import sct
    from sct.weights.pretrained import Pretrained

    public = {f"{part}.{name}": getattr(getattr(sct, part), name)
              for part in ("tl", "pl", "pp", "datasets") for name in dir(getattr(sct, part))}  # fmt: skip
    public |= {name: getattr(sct, name) for name in sct.__all__ if not inspect.ismodule(getattr(sct, name))}
    public["Pretrained"] = Pretrained
    for name, made in list(public.items()):
        if inspect.isclass(made):
            public |= {f"{name}.{key}": getattr(made, key) for key in vars(made) if not key.startswith("_")}
    functions = {
        name: each for name, each in public.items() if inspect.isfunction(each) or inspect.ismethod(each)
    }
    assert len(functions) > 25
    wrong = []
    for name, function in functions.items():
        text = inspect.getdoc(function) or ""
        for parameter in inspect.signature(function).parameters.values():
            # The inputs of `apply` are those of the architecture, by their names.
            if parameter.kind is parameter.VAR_KEYWORD and name != "Pretrained.apply":
                wrong.append(f"{name}(**{parameter.name})")
            elif name.startswith(("tl.", "pl.", "pp.")) and not re.search(
                rf"^(\w+, )*{parameter.name}(, \w+)*$", text, re.MULTILINE
            ):
                wrong.append(f"{name}: {parameter.name} is not in the docstring")
    assert not wrong
