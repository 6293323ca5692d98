"""Compiled programs are kept between runs, and no state of their folder harms a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What the commands do, with a program of their size in seconds of compilation replaced by a small one.
PROGRAM = """
import os, sys
from sct.commands.compilation import keep_programs
print("folder", keep_programs(*sys.argv[1:]))
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
jax.jit(lambda x: (x * 2 + 1).sum(), inline=True)(jax.numpy.arange(7.0))
print("hits", sum(name.endswith("cache_hits") for name in found))
"""


def work(*words: str, **environment: str) -> tuple[str, int, str]:
    """The folder in use, how many programs were taken from it, and what was said."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder, hits = (line.partition(" ")[2] for line in done.stdout.splitlines())
    return folder, int(hits), done.stderr.strip()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


@pytest.mark.slow
def test_a_second_run_takes_what_the_first_one_compiled_and_mends_a_broken_entry(tmp_path):
    folder = tmp_path / "new" / "xla"
    assert work(str(folder)) == (str(folder), 0, "")
    kept = entries(folder)
    assert kept
    assert work(str(folder)) == (str(folder), len(kept), "")
    whole = {path: path.read_bytes() for path in kept}
    kept[0].write_bytes(whole[kept[0]][:-20])
    # The broken one is compiled anew and replaced, without a word.
    used, hits, said = work(str(folder))
    assert (used, said) == (str(folder), "")
    assert hits < len(kept)
    assert work(str(folder)) == (str(folder), len(kept), "")


@pytest.mark.slow
def test_the_folder_is_in_the_home_folder_or_the_environments_or_nowhere(tmp_path):
    assert work(HOME=str(tmp_path))[0] == str(tmp_path / ".cache" / "sct" / "xla")
    assert entries(tmp_path / ".cache" / "sct" / "xla")
    assert work(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[0] == str(tmp_path / "mine")
    assert work("", HOME=str(tmp_path / "other")) == ("", 0, "")
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    used, hits, said = work(str(tmp_path / "file" / "xla"))
    assert (used, hits) == ("", 0)
    assert len(said.splitlines()) == 1
    assert "cannot be written (Not a directory), so every run compiles again: set another folder" in said


def test_a_disk_that_fills_up_is_one_sentence(tmp_path):
    program = (
        "import errno, os, jax\n"
        "from jax._src import lru_cache\n"
        "def full(self, key, value):\n"
        "    self.path.joinpath(key + '-cache').write_bytes(value[:10])\n"
        "    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "lru_cache.LRUCache.put = full\n"
    ) + PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    # What was written of the entries is gone, so that a later run does not try to read it.
    assert not entries(tmp_path)
