"""Finding configurations by name, and checking their fields before flags are read."""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

import sct
from sct.errors import ConfigError


def config_folder() -> Path:
    """Where the configurations lie: in the installed package, or beside it in a clone."""
    package = Path(sct.__file__).parent
    return next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())


def prepare(argv: list[str]) -> list[str]:
    """Replace the name of a configuration that comes with sct by its file, in a list of arguments."""
    found = []
    for index, word in enumerate(argv):
        prefix, _, value = word.partition("=") if word.startswith("--config=") else ("", "", word)
        if prefix or (index and argv[index - 1] == "--config"):
            name, colon, variant = value.partition(":")
            path = _find(name)
            _check_fields(path, variant if colon else None, argv)
            value = f"{path}{colon}{variant}"
            word = f"{prefix}={value}" if prefix else value
        found.append(word)
    return found


def _find(name: str) -> Path:
    folder = config_folder()
    candidates = [Path(name), folder / f"{name}.py"]
    if Path(name).parent in (Path(), Path("configs")):
        candidates.append(folder / Path(name).name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__"))
    raise ConfigError(f"there is no configuration {name!r}: give a file, or one of {known}.")


def _check_fields(path: Path, variant: str | None, argv: list[str]) -> None:
    """Refuse a variant, or a field of `--config.section.field=value`, that a configuration does not have."""
    module = runpy.run_path(str(path))
    try:
        config = module["get_config"](*([] if variant is None else [variant]))
    except ValueError as error:
        raise ConfigError(f"{path.name}: {error}.") from error
    for word in argv:
        if not word.startswith("--config."):
            continue
        node, names = config, word.removeprefix("--config.").partition("=")[0].split(".")
        for depth, name in enumerate(names):
            if not isinstance(node, ConfigDict) or name not in node:
                where = ".".join(["config", *names[:depth]])
                choices = f": choose from {', '.join(node)}" if isinstance(node, ConfigDict) else ""
                raise ConfigError(f"{where} has no field {name!r}{choices}.")
            node = node[name]
