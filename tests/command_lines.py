"""Command lines of this project in a text, and what their real flag parsers say of them. No command is run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Calls the command line of every entry of standard input, up to the function `main` of its command. Each is called in
# a process of its own, because flags are global.
PARSE = """
import importlib, json, os, sys, tempfile
sys.path.insert(0, os.getcwd())
import absl.app, ml_collections.config_flags, rich.console
import sct.cli, sct.commands.flag_parsing
errors = []
for words in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as said:
        if os.fork() == 0:
            status = 1
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                module = importlib.import_module("sct.commands." + words[1])
                module.main = lambda rest: 0
                sys.argv = words
                sct.cli.main()
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except ImportError as error:
                print(error, file=sys.stderr)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.wait()[1]
        said.seek(0)
        text = said.read().strip()
        # A former name of a flag gives a notice: "note: --old is now --new".
        errors.append(text or f"status {status}" if status or text.startswith("note: ") else "")
json.dump(errors, sys.stdout)
"""

# Programs by the words that start them; a group of the pattern names the command.
PROGRAMS = (
    r"(?:^|\s)(?:python\S* -m )?sct (?P<name>[a-z]\w*)(?!\S)(?P<words>.*)",
    r"-m launch\.(?P<name>\w+)(?P<words>.*)",
    r"launch/(?:slurm|tpu)/train\.sh (?:start )?(?=--config)(?P<words>.*)",
)


def shell_words(text: str) -> list[str]:
    """Words of the first command of a line, without its comment and what stands for something to fill in."""
    words = []
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&<>`")
    lexer.whitespace_split = True
    try:
        for word in lexer:
            if set(word) <= set(";|&<>`"):
                break
            words.append(word)
    except ValueError:  # a quotation that ends on a later line
        pass
    return [word for word in words if "$" not in word and "..." not in word]


def commands(text: str) -> list[list[str]]:
    """Command lines of this project in a text, as the words after `sct`."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = re.sub(r"(?<=\S)\s+#\s.*", "", line)
        for pattern in PROGRAMS:
            if match := re.search(pattern, line):
                name = match.groupdict().get("name") or "train"
                found.append([name, *shell_words(match["words"])])
                break
    return found


def line(words: Iterable[str]) -> str:
    """A command line as it is written in a shell."""
    return shlex.join(["sct", *words])


def errors(found: Iterable[list[str]]) -> dict[str, str]:
    """Command lines that a flag parser refuses -> its message. Each command line is the words after `sct`."""
    lines = list(dict.fromkeys(map(tuple, found)))
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps([["sct", *words] for words in lines]),
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = zip(lines, json.loads(done.stdout), strict=True)
    return {line(words): answer for words, answer in answers if answer}
