"""Make the text of `sct COMMAND --help`."""

from __future__ import annotations

import re
import shutil
import textwrap
from typing import Any

from absl import flags

from sct.commands.flag_parsing import Command, is_required, value_of

_WIDEST, _INDENT = 110, 30


def text(command: Command) -> str:
    """Return the help text of a command: its usage, its description and its flags."""
    # Output that is no terminal has 80 columns.
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    described = _wrapped((command.module.__doc__ or "").strip(), width)
    listed = [_entry(flag, width) for flag in command.flags.values()]
    usage = textwrap.fill(
        command.usage.partition(";")[0], width, subsequent_indent="    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join([usage, "", described, "", "Flags:", *listed])


def _wrapped(text: str, width: int) -> str:
    """Wrap the paragraphs and the example commands of a text. Other indented lines stay as they are."""
    found = []
    for paragraph in re.split(r"\n\n+", text):
        if paragraph.startswith(" "):
            found.append("\n".join(_wrapped_command(line, width) for line in paragraph.splitlines()))
        else:
            found.append(textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False))
    return "\n\n".join(found)


def _wrapped_command(line: str, width: int) -> str:
    """Wrap a line with an example command, so that it can still be pasted into a shell."""
    if len(line) <= width or not re.match(r" +(sct|python) ", line):
        return line
    lines = [line[: len(line) - len(line.lstrip())]]
    for word in re.findall(r"(?:[^\s\"]|\"[^\"]*\")+", line):
        if len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append(" " * 7)
        lines[-1] += f"{'' if lines[-1].isspace() and len(lines) == 1 else ' '}{word}"
    return "\n".join(lines)


def _entry(flag: flags.Flag[Any], width: int) -> str:
    """Return the help text of one flag: how to write the flag, and its description to the right or below."""
    written = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}={value_of(flag)}"
    gap = " " * _INDENT
    lines = textwrap.wrap(_sentences(flag), width - _INDENT, break_on_hyphens=False)
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
