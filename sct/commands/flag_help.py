"""Make the text of `sct COMMAND --help`."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from absl import flags

from sct.commands.flag_parsing import Command, is_required, value_of

_WIDTH = 110
_INDENT = 30


def text(command: Command) -> str:
    """Return the help text of a command: its usage, its description and its flags."""
    described = (command.module.__doc__ or "").strip()
    listed = [_entry(flag) for flag in command.flags.values()]
    return "\n".join([command.usage.partition(";")[0], "", described, "", "Flags:", *listed])


def _entry(flag: flags.Flag[Any]) -> str:
    """Return the help text of one flag: how to write the flag, and its description to the right or below."""
    written = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}={value_of(flag)}"
    gap = " " * _INDENT
    lines = textwrap.wrap(_sentences(flag), _WIDTH - _INDENT)
    if len(written) > _INDENT - 2:
        return "\n".join([written, *(gap + line for line in lines)])
    return "\n".join([f"{written:<{_INDENT}}{lines[0]}", *(gap + line for line in lines[1:])])


def _sentences(flag: flags.Flag[Any]) -> str:
    # absl puts the choices of an enumeration before its help text.
    found = re.sub(r"^<[^>]*>:\s*", "", str(flag.help).strip())
    if isinstance(flag, flags.MultiFlag):
        found += " May be given several times."
    if is_required(flag):
        found += " Required."
    elif flag.default not in (None, [], "") and "efault" not in found:
        found += f" Default: {str(flag.default).lower() if flag.boolean else flag.default}."
    return found
