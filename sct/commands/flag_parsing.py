"""Parse the flags of a command. A mistake on the command line becomes a `FlagError` of one sentence."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags

from sct import messages
from sct.commands import configuration, session_flags
from sct.commands.flag_errors import FlagError, nearest, renamed
from sct.global_settings import ERRORS, WARNINGS, settings

# Placeholders for values in usage and help, for flags whose type is not enough to choose one.
_VALUES = {
    "config": "NAME[:VARIANT]", "input": "PATH", "output": "PATH", "model": "MODEL", "reference": "PATH",
    "workdir": "FOLDER", "compilation_cache": "FOLDER", "orthologs": "PATH", "label": "NAME=VALUE",
    "coordinator": "HOST:PORT", "from": "FORMAT", "to": "FORMAT",
}  # fmt: skip


# A folder in which a run resumes is --workdir, and every other output is --output.
_OUTPUTS = {"output": "workdir", "workdir": "output"}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command and its flags.

    Attributes
    ----------
    program
        Name under which the command was called, such as "sct embed" or "python -m launch.embed".
    module
        Module of `sct.commands` that has the function `main`.
    """

    program: str
    module: ModuleType

    @property
    def flags(self) -> dict[str, flags.Flag[Any]]:
        """Return the flags by name.

        Required flags come first, then the others, each group in the order of definition.
        """
        modules = (self.module.__name__, *getattr(self.module, "FLAG_MODULES", ()), session_flags.__name__)
        defined = flags.FLAGS.flags_by_module_dict()
        found = [flag for name in modules for flag in defined.get(name, [])]
        found.sort(key=lambda flag: not is_required(flag))
        return {flag.name: flag for flag in found}

    @property
    def renamed(self) -> dict[str, str]:
        """Return the renamed flags, as former name -> current name."""
        return getattr(self.module, "RENAMED_FLAGS", {})

    @property
    def usage(self) -> str:
        """Return one line that shows how to call the command."""
        required = [f"--{name}={value_of(flag)}" for name, flag in self.flags.items() if is_required(flag)]
        return f"usage: {' '.join([self.program, *required])} [--flag=value ...]; {self.program} --help lists all flags"

    def parse(self, argv: Sequence[str]) -> list[str]:
        """Read the flags of a command line.

        Parameters
        ----------
        argv
            Name of the program, followed by the words after it.

        Returns
        -------
        Name of the program, followed by the positional arguments (only for commands that take some).

        Raises
        ------
        FlagError
            A flag is unknown, missing, incomplete or has a wrong value, or there is an unexpected positional argument.
        """
        try:
            words = flags.FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=False)
        except flags.Error as error:
            raise FlagError(
                f"--flagfile cannot be read ({_sentence(error)}): set --flagfile to a readable file."
            ) from error
        if "--quiet" in words:  # the notices below come before the flags are read
            settings.verbosity = ERRORS
        words = self._with_new_names(words)
        given, others = self._split(words)
        has_config = "config" in self.flags
        for name, value in given:
            self._check(name, value, words)
        if others and not getattr(self.module, "TAKES_ARGUMENTS", False):
            raise FlagError(self._refusal(others[0], [name for name, _ in given], words))
        self._check_required(dict(given))
        if has_config:
            words = configuration.prepare(words)
        # ml_collections reads `sys.argv` to find the fields of the configuration that are set.
        sys.argv = [argv[0], *words]
        try:
            return flags.FLAGS(sys.argv)
        except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
            raise FlagError(_explained(error)) from error

    def _with_new_names(self, words: Sequence[str]) -> list[str]:
        """Replace former flag names by current ones in the words of a command line.

        Print a notice for each former name.
        """
        found, noted = [], set()
        matches = [re.fullmatch(r"--?(no)?([\w.]+)(=.*)?", word, re.DOTALL) for word in words]
        names = {match[2] for match in matches if match}
        for word, match in zip(words, matches, strict=True):
            new = self.renamed.get(match[2]) if match else None
            if match and new:
                if new in names:
                    raise FlagError(
                        f"--{match[2]} is the former name of --{new}, but both are given: remove --{match[2]}."
                    )
                word = f"--{match[1] or ''}{new}{match[3] or ''}"
                if new not in noted:
                    messages.notice(renamed(match[2], new), WARNINGS)
                noted.add(new)
            found.append(word)
        return found

    def _split(self, words: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
        """Split words, as absl does, into two lists: (flag, value or None) for each flag, and positional arguments."""
        given: list[tuple[str, str | None]] = []
        others: list[str] = []
        rest = iter(words)
        for word in rest:
            name, mark, text = word.lstrip("-").partition("=")
            if word == "--":
                others += rest
            elif not word.startswith("-") or not name:
                others.append(word)
            elif mark:
                given.append((name, text))
            elif self._takes_value(name):
                value = next(rest, None)
                if value is None or value.startswith("--"):
                    if not name.startswith("config."):
                        raise FlagError(f"--{name} needs a value: write --{name}={self._value_of(name)}.")
                    # A boolean field is a switch, and `prepare` refuses others without a value.
                    given.append((name, None))
                    rest = iter([*([] if value is None else [value]), *rest])
                    continue
                if value == "=":
                    raise FlagError(
                        f"--{name} needs a value: write --{name}={self._value_of(name)}, without spaces."
                    )
                given.append((name, value))
            else:
                given.append((name, None))
        return given, others

    def _takes_value(self, name: str) -> bool:
        """Return whether the word after `--name` is the value of the flag `name`."""
        if name in flags.FLAGS:
            return not flags.FLAGS[name].boolean
        return name.startswith("config.") and "config" in self.flags

    def _value_of(self, name: str) -> str:
        return value_of(flags.FLAGS[name]) if name in flags.FLAGS else "VALUE"

    def _check(self, name: str, text: str | None, words: Sequence[str]) -> None:
        """Raise `FlagError` if a flag is unknown or its value is wrong. `prepare` checks fields of configurations."""
        if name.startswith("config.") or (name.startswith("noconfig.") and text is None):
            if "config" in self.flags:
                return
            raise FlagError(
                f"{self.program} has no flag --{name}, because this command takes no configuration: remove "
                f"--{name}."
            )
        known = flags.FLAGS
        if name not in known and name.startswith("no") and name[2:] in known and known[name[2:]].boolean:
            if text is not None:
                raise FlagError(f"--{name} takes no value: write --{name}, or --{name[2:]}={text}.")
            return
        # absl's own flags also work, though a command does not list them.
        if name not in known:
            raise FlagError(f"{self.program} has no flag --{name}{self._meant(name, words)}")
        flag = known[name]
        if text is None or name == "config":  # `prepare` checks the value of --config
            return
        try:
            flag.parser.parse(text)
        except (ValueError, TypeError) as error:
            raise FlagError(f"--{name}={text} is wrong: {_expected(flag, text)}.") from error

    def _meant(self, name: str, words: Sequence[str]) -> str:
        """Return the end of the error message about an unknown flag: the flag that was probably meant."""
        plain = name.replace("-", "_").lower()
        if plain.startswith("no") and plain[2:] in self.flags:
            return f": --{plain[2:]} is not a switch, write --{plain[2:]}={value_of(self.flags[plain[2:]])}."
        if (other := _OUTPUTS.get(plain)) in self.flags:
            return f": did you mean --{other}?"
        names = [*self.flags, *(f"no{each}" for each, flag in self.flags.items() if flag.boolean), "help"]
        keys = configuration.keys(words) if "config" in self.flags else []
        found = [key for key in keys if plain in (key, key.rpartition(".")[2])]  # --train.steps, --steps
        meant = (
            f"config.{found[0]}" if found else nearest(plain, [*names, *(f"config.{key}" for key in keys)])
        )
        return f": did you mean --{meant}?" if meant else "."

    def _refusal(self, word: str, given: Sequence[str], words: Sequence[str]) -> str:
        """Return the error message about an unexpected positional argument, with the flag that was probably meant."""
        start = f"{self.program} takes no positional argument {word!r}"
        before = list(words)[list(words).index(word) - 1] if word != words[0] else ""
        name, mark, value = word.partition("=")
        plain = name.replace("-", "_")
        missing = [each for each, flag in self.flags.items() if is_required(flag) and each not in given]
        if before.endswith(",") or word.startswith(","):
            return f"{start}: write a list without spaces, --name=A,B."
        if mark and plain in self.flags:
            return f"{start}: use --{plain}={value}."
        if mark and "config" in self.flags:
            keys = [
                key
                for key in configuration.keys(words)
                if name in (key, f"config.{key}", key.rpartition(".")[2])
            ]
            if keys:
                return f"{start}: use --config.{keys[0]}={value}."
        first = "input" if "input" in missing else next(iter(missing), "")
        if first and not mark:
            return f"{start}: use --{first}={word}."
        return f"{start}: write flags as --name=value, and lists without spaces."

    def _check_required(self, given: dict[str, str | None]) -> None:
        required = [name for name, flag in self.flags.items() if is_required(flag)]
        missing = [f"--{name}" for name in required if name not in given]
        if missing:
            listed = " and ".join([", ".join(missing[:-1]), missing[-1]] if missing[1:] else missing)
            written = " ".join(f"{flag}={self._value_of(flag[2:])}" for flag in missing)
            raise FlagError(f"{listed} {'is' if len(missing) == 1 else 'are'} missing: write {written}.")
        for name in required:
            if not given[name]:
                raise FlagError(f"--{name} needs a value: write --{name}={self._value_of(name)}.")


def is_required(flag: flags.Flag[Any]) -> bool:
    """Return whether the command requires the flag."""
    return flag.default is None and any(not each.checker(None) for each in flag.validators)


def value_of(flag: flags.Flag[Any]) -> str:
    """Return the placeholder for the value of a flag in usage and help, such as "PATH" or "N"."""
    if flag.name in _VALUES:
        return _VALUES[flag.name]
    match flag.parser:
        case flags.EnumParser():
            return "|".join(flag.parser.enum_values)
        case flags.IntegerParser():
            return "N"
        case flags.FloatParser():
            return "NUMBER"
        case flags.BooleanParser():
            return "true|false"
        case flags.ListParser():
            return "A,B,..."
    return "TEXT"


def _expected(flag: flags.Flag[Any], text: str) -> str:
    """Return the part of an error message that says which values a flag accepts."""
    if isinstance(flag.parser, flags.EnumParser):
        choices = list(flag.parser.enum_values)
        found = nearest(text.lower(), choices)
        meant = f" (did you mean {found}?)" if found else ""
        return f"choose from {', '.join(choices)}{meant}"
    if isinstance(flag.parser, flags.BooleanParser):
        return "expected true or false"
    return f"expected {flag.parser.syntactic_help or 'another value'}"


def _explained(error: BaseException) -> str:
    """Convert an error of absl or ml_collections, such as a field of the wrong type, to a plain error message."""
    text = str(error)
    if match := re.match(r"flag --([\w.]+)=(.*?): ", text, re.DOTALL):
        name, value = match[1], match[2]
        if name in flags.FLAGS:
            return f"--{name}={value} is wrong: {_expected_of_field(flags.FLAGS[name])}."
    if match := re.search(r"Missing value for flag (--?[\w.]+)", text):
        return f"{match[1]} needs a value: write {match[1]}=VALUE."
    return f"the flags cannot be read: {_sentence(error)}."


def _expected_of_field(flag: flags.Flag[Any]) -> str:
    """Return the part of an error message that says which values a configuration field accepts, and its default."""
    kind = type(flag.parser).__name__
    if "ConfigDict" in kind:
        return f"it is a section, so set its fields one by one (--{flag.name}.FIELD=VALUE)"
    if "Tuple" in kind:
        return f"expected a tuple such as '(1, 2)', by default {flag.default!r}"
    named = {"IntegerParser": "an integer", "FloatParser": "a number", "BooleanParser": "true or false"}
    return f"expected {named.get(kind, 'another type of value')}, by default {flag.default!r}"


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1].rstrip(".")
