"""How a command gets its memory, and that it does so without starting its process over."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sct import cli

PAGES = "transparent_hugepage"


class Library:
    """A C library that counts its options."""

    def __init__(self):
        self.options = []

    def mallopt(self, option, value):
        self.options.append(option)


def test_freed_memory_is_kept_only_where_there_are_no_large_pages(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_PAGES", tmp_path / PAGES)
    wrong = []
    for on_cpu in (True, False):
        monkeypatch.setattr(cli, "_on_cpu_of_linux", lambda on_cpu=on_cpu: on_cpu)
        for text in ("[always] madvise never", "always [madvise] never", "always madvise [never]", None):
            (tmp_path / PAGES).unlink(missing_ok=True)
            if text is not None:
                (tmp_path / PAGES).write_text(text)
            library = Library()
            monkeypatch.setattr(cli.ctypes, "CDLL", lambda name, library=library: library)
            cli.keep_freed_memory()
            keeps = on_cpu and text in ("always madvise [never]", None)
            if len(library.options) != 3 * keeps:
                wrong.append((on_cpu, text, library.options))
    assert not wrong


SCRIPT = """
import pathlib, sys
print("begun", flush=True)
from sct import cli
cli._on_cpu_of_linux = lambda: True
cli._PAGES = pathlib.Path(sys.argv.pop(1))
cli.main(sys.argv.pop(1))
"""


@pytest.mark.slow
def test_no_command_starts_its_process_over(tmp_path):
    """Whatever the system says of large pages; each command ends at a flag that there is not."""
    pages = tmp_path / PAGES
    pages.write_text("always [madvise] never")
    wrong = {}
    for command in cli._COMMANDS:
        words = [sys.executable, "-c", SCRIPT, str(pages), command, "--no_such_flag=a b"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.stdout.count("begun") != 1 or done.returncode != 2 or "no_such_flag" not in done.stderr:
            wrong[command] = (done.stdout, done.stderr)
    assert not wrong
