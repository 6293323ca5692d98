"""How a command gets its memory: large pages where there are any, asked for once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sct import cli


class RestartError(Exception):
    """Raised in place of starting over."""


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Function that sets what the system says of large pages; a restart raises."""

    def restart(program, words):
        raise RestartError(program, words)

    monkeypatch.setattr(os, "execv", restart)
    monkeypatch.setattr(cli, "_on_cpu_of_linux", lambda: True)
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: kept)
    monkeypatch.setattr(cli, "_PAGES", tmp_path / "enabled")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    kept = Kept()

    def says(text):
        (tmp_path / "enabled").write_text(text)
        return kept

    return says


class Kept:
    """A C library that counts its options."""

    def __init__(self):
        self.options = []

    def mallopt(self, option, value):
        self.options.append(option)


def test_a_command_starts_over_once_where_pages_are_given_when_asked(system, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "launch.train", "--config=a b"])
    kept = system("always [madvise] never")
    with pytest.raises(RestartError) as caught:
        cli.use_memory_well()
    assert caught.value.args == (sys.executable, [sys.executable, "-m", "launch.train", "--config=a b"])
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"
    cli.use_memory_well()
    assert kept.options == []


def test_what_is_freed_is_kept_only_where_there_are_no_large_pages(system):
    kept = system("[always] madvise never")
    cli.use_memory_well()
    assert kept.options == []
    system("always madvise [never]")
    cli.use_memory_well()
    assert len(kept.options) == 3


@pytest.mark.slow
def test_the_words_survive_the_restart():
    words = ["-c", "from sct.cli import main; main('speed')", "--config=sct_sc", "--mode=no such mode"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--mode is 'no such mode'" in done.stderr
