from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from store_inputs import (
    VOCABULARY,
    files_of,
    log1p_file,
    run,
    three_files,
)

from sct.data.store import Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return three_files(tmp_path / "inputs")


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "launch.ingest", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.slow
def test_command_line_in_parallel(three: list[Path], tmp_path: Path) -> None:
    genes = tmp_path / "toy.tsv"
    VOCABULARY.save(genes)
    store = tmp_path / "store"
    done = command(
        f"--input={three[0]},{three[1]}",
        f"--input={three[2]}",
        f"--output={store}",
        f"--genes={genes}",
        "--processes=2",
        "--validation=b",
    )
    assert done.returncode == 0, done.stderr
    for word in ("a", "b", "c", "train", "validation", "120 cells; 0 cells dropped", "matched"):
        assert word in done.stdout
    assert "Warning" not in done.stderr
    run(three, tmp_path / "straight", validation=("b",))
    assert files_of(store / "studies") == files_of(tmp_path / "straight/studies")
    assert [each.split for each in Store.open(store).studies] == ["train", "validation", "train"]


@pytest.mark.slow
def test_command_line_refuses_in_one_sentence(three: list[Path], tmp_path: Path) -> None:
    genes = tmp_path / "toy.tsv"
    VOCABULARY.save(genes)
    bad = log1p_file(tmp_path)
    flags = (f"--output={tmp_path / 'store'}", f"--genes={genes}")
    done = command(f"--input={three[0]}", f"--input={bad}", *flags, "--processes=2")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: 1 of 2 inputs were refused" in done.stderr
    assert str(bad) in done.stderr
    done = command(f"--input={three[0]}", f"--input={bad}", *flags, "--processes=1", "--skip_invalid")
    assert done.returncode == 0, done.stderr
    assert "left out" in done.stdout


@pytest.mark.slow
def test_command_line_without_inputs_or_output(tmp_path: Path) -> None:
    for flags in ((f"--input={tmp_path}",), (f"--output={tmp_path / 'store'}",)):
        done = command(*flags)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "is missing" in done.stderr
