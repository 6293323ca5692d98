"""Find configuration files by name, and check the fields set on the command line before the flags are parsed."""

from __future__ import annotations

import dataclasses
import re
import runpy
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import sct
from sct import messages
from sct.commands.flag_errors import FlagError, nearest, renamed
from sct.errors import SctError
from sct.global_settings import WARNINGS

_FIELD = re.compile(r"--?(no)?config\.([^=]*)(=.*)?", re.DOTALL)


def config_folder() -> Path:
    """Return the folder of the configurations: inside the installed package, or next to the package in a clone."""
    package = Path(sct.__file__).parent
    return next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())


def prepare(argv: Sequence[str]) -> list[str]:
    """Replace the name of a configuration by the path of its file, and check the fields that the command line sets.

    Parameters
    ----------
    argv
        Words of a command line.

    Returns
    -------
    The words, in which --config=FILE comes before the flags that set fields of the configuration.

    Raises
    ------
    FlagError
        The configuration, the variant or a field does not exist.
    """
    words, value = _without_config(argv)
    if value is None:
        return words
    path, variant = _named(value)
    config = _read(path, variant)
    words = _with_current_names(config, words)
    _check_fields(config, words)
    place = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    variant = "" if variant is None else f":{variant}"
    return [*words[:place], f"--config={path}{variant}", *words[place:]]


def keys(argv: Sequence[str]) -> list[str]:
    """Return the names of all fields of the configuration that a command line uses, such as "train.steps".

    Return an empty list if the command line names no configuration, or one that cannot be read.
    """
    try:
        value = _without_config(argv)[1]
        return [] if value is None else list(_leaves(_read(*_named(value))))
    except FlagError:
        return []


def _without_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Remove `--config` and its values from the words of a command line.

    Return the remaining words, and the last value of `--config` (None if the command line does not have `--config`).
    """
    words, value = [], None
    rest = iter(argv)
    for word in rest:
        if word in ("--config", "-config"):
            value = next(rest, "")
        elif word.startswith(("--config=", "-config=")):
            value = word.partition("=")[2]
        else:
            words.append(word)
    return words, value


def _named(value: str) -> tuple[Path, str | None]:
    """Return the configuration file and the variant (or None) that a value of `--config` names."""
    name, colon, variant = value.partition(":")
    return _find(name), variant if colon else None


def _find(name: str) -> Path:
    folder = config_folder()
    candidates = [Path(name), folder / f"{name}.py"]
    if Path(name).parent in (Path(), Path("configs")):
        candidates.append(folder / Path(name).name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    meant = nearest(Path(name).stem, known)
    hint = f"did you mean --config={meant}? Known names" if meant else "give a file or one of these names"
    raise FlagError(f"--config={name}: there is no such configuration; {hint}: {', '.join(known)}.")


def _read(path: Path, variant: str | None) -> Any:
    """Run a configuration file and return its configuration for a variant. Raises `FlagError` if the file fails."""
    try:
        module = runpy.run_path(str(path))
    except Exception as error:
        raise FlagError(
            f"--config={path}: the configuration file raised an error ({_where(error, path)}): correct the "
            "file."
        ) from error
    if "get_config" not in module:
        raise FlagError(
            f"--config={path}: the file has no function get_config: set --config to a file that defines "
            "get_config()."
        )
    try:
        return module["get_config"](*([] if variant is None else [variant]))
    except Exception as error:
        known = [each for each in module.get("VARIANTS", ()) if each]
        if variant is not None and known and variant not in known:
            meant = nearest(variant, known)
            hint = f"did you mean {path.stem}:{meant}?" if meant else f"choose from {', '.join(known)}."
            raise FlagError(
                f"--config={path.stem}:{variant}: the configuration has no variant {variant!r}; {hint}"
            ) from error
        raise FlagError(
            f"--config={path}: the function get_config raised an error ({_where(error, path)}): correct the "
            "file."
        ) from error


def _where(error: BaseException, path: Path) -> str:
    """Describe an error in a configuration file, with the line number at which it occurred."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    place = f", line {line}" if line else ""
    return f"{type(error).__name__}: {' '.join(str(text).split())}{place}"


def _leaves(config: Any, before: str = "") -> Iterator[str]:
    """Yield the paths of all fields of a configuration, such as "train.steps"."""
    for name in config:
        if isinstance(config[name], ConfigDict):
            yield from _leaves(config[name], f"{before}{name}.")
        else:
            yield f"{before}{name}"


def _with_current_names(config: Any, words: Sequence[str]) -> list[str]:
    """Replace the old names of renamed fields in the words of a command line.

    Raise `FlagError` if a field is set under both names.
    """
    found, notices = [], []
    given = {match[2] for word in words if (match := _FIELD.fullmatch(word))}
    for word in words:
        new, is_former = _with_own_name(config, word)
        before, after = _FIELD.fullmatch(word), _FIELD.fullmatch(new)
        if before and after and before[2] != after[2]:
            if after[2] in given:
                raise FlagError(
                    f"--config.{before[2]} and --config.{after[2]} are two names of the same field: remove "
                    "one of these flags."
                )
            if is_former:
                notices.append(renamed(f"config.{before[2]}", f"config.{after[2]}"))
        found.append(new)
    for notice in notices:
        messages.notice(notice, WARNINGS)
    return found


def _with_own_name(config: Any, word: str) -> tuple[str, bool]:
    """Replace the name of a renamed field by the name that the configuration uses, in one word of the command line.

    Some options have been renamed. A configuration file that was written for an earlier version of sct uses the old
    names. The command line may use the new names even with such a file. Other words are returned unchanged.

    Returns
    -------
    The word, and whether a former name in the word was replaced.
    """
    match = _FIELD.fullmatch(word)
    if match is None or match[2] in config or "family" not in config:
        return word, False
    names = match[2].split(".")
    if len(names) == 1 or _has(config, names):
        return word, False
    # These imports are slow, and only an unknown field needs them.
    from sct.families.tasks import task_spec_of
    from sct.train.run_spec import section_types

    try:
        kind: Any = section_types(config.family, task_spec_of(config.to_dict())).get(names[0])
    except SctError:
        return word, False
    current, former = names[:1], names[:1]
    for name in names[1:]:
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        field = next((each for each in fields if name in (each.name, each.metadata.get("formerly"))), None)
        if field is None:
            return word, False
        current.append(field.name)
        former.append(field.metadata.get("formerly", field.name))
        kind = field.default_factory if callable(field.default_factory) else type(field.default)
    path = ".".join(current)
    if path == match[2] and _has(config, former):
        return f"--{match[1] or ''}config.{'.'.join(former)}{match[3] or ''}", False
    if path == match[2] or not _has(config, current):
        return word, False
    return f"--{match[1] or ''}config.{path}{match[3] or ''}", True


def _has(config: Any, names: Sequence[str]) -> bool:
    """Return whether a configuration has a field.

    `names` holds the names of the sections of the field, outermost first, followed by the name of the field.
    """
    node = config
    for name in names:
        if not isinstance(node, ConfigDict) or name not in node:
            return False
        node = node[name]
    return True


def _check_fields(config: Any, words: Sequence[str]) -> None:
    """Raise `FlagError` if a word `--config.section.field=value` sets a field that the configuration does not have."""
    for place, word in enumerate(words):
        match = _FIELD.fullmatch(word)
        if match is None:
            continue
        node, names = config, match[2].split(".")
        for depth, name in enumerate(names):
            if isinstance(node, ConfigDict) and name in node:
                node = node[name]
                continue
            where = ".".join(["config", *names[:depth]])
            raise FlagError(f"{where} has no field {name!r}{_meant(config, node, names, depth)}")
        if not match[1] and match[3] is None and not isinstance(node, bool):
            following = words[place + 1] if place + 1 < len(words) else "--"
            if following.startswith("--"):
                raise FlagError(f"--config.{match[2]} needs a value: write --config.{match[2]}=VALUE.")
        if match[1] and not isinstance(node, bool):
            raise FlagError(
                f"--noconfig.{match[2]} only works for a boolean field, but {match[2]} is {node!r}: write "
                f"--config.{match[2]}=VALUE."
            )


def _meant(config: Any, node: Any, names: list[str], depth: int) -> str:
    """Return the end of the error message about an unknown field, which suggests similar or existing fields."""
    before = names[:depth]
    if not isinstance(node, ConfigDict):
        return f": it is a value and not a section, so write --{'.'.join(['config', *before])}=VALUE."
    found = nearest(names[depth], list(node))
    if found:
        return f": did you mean --{'.'.join(['config', *before, found, *names[depth + 1 :]])}?"
    by_name = {path.rpartition(".")[2]: path for path in reversed(list(_leaves(config)))}
    found = by_name.get(nearest(names[-1], by_name), "")
    return f": did you mean --config.{found}?" if found else f": choose from {', '.join(node)}."
