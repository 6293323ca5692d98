"""Outputs are checked before the work, and a full disk is one sentence."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest

from sct import atomic, cli, outputs
from sct.errors import ConfigError, DataError, OutputError, SctError, disk_trouble
from tests.tl.conftest import made, slide

ROOT = Path(__file__).resolve().parents[1]
FULL = os.strerror(errno.ENOSPC)


def refusal(check, *arguments, **options) -> str:
    try:
        check(*arguments, **options)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_file_is_refused_where_it_could_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "there").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert "is a folder" in refusal(outputs.check_file, tmp_path, "--output")
    assert "is not a folder" in refusal(outputs.check_file, tmp_path / "there" / "x", "--output")
    for name in ("there", "dangling"):
        assert "--overwrite" in refusal(outputs.check_file, tmp_path / name, "--output")
    assert not refusal(outputs.check_file, tmp_path / "there", "--output", overwrite=True)
    for check in (outputs.check_file, outputs.check_folder, outputs.check_room):
        assert "too long" in refusal(check, tmp_path / ("x" * 300), "--output")
    assert not refusal(outputs.check_file, tmp_path / "deep" / "er" / "new", "--output")
    monkeypatch.chdir(tmp_path)
    assert not refusal(outputs.check_file, Path("new"), "--output")
    said = refusal(outputs.check_file, tmp_path / "new", "--output", needed=1 << 60)
    assert "free space" in said
    assert "--output" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "there"]


def test_a_folder_is_refused_where_it_would_lose_files(tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "other").write_text("kept")
    assert "other" in refusal(outputs.check_folder, folder, "--output")
    assert not refusal(outputs.check_folder, folder, "--output", files=["report.json"])
    (folder / "report.json").write_text("{}")
    assert "report.json" in refusal(outputs.check_folder, folder, "--output", files=["report.json"])
    assert not refusal(outputs.check_folder, folder, "--output", overwrite=True, files=["report.json"])
    assert "is a file" in refusal(outputs.check_folder, folder / "other", "--output")
    assert "free space" in refusal(outputs.check_folder, tmp_path / "new", "--output", needed=1 << 60)


def test_a_place_that_takes_no_file_is_told(tmp_path, monkeypatch):
    def refuse(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", refuse)
    assert os.strerror(errno.EROFS) in refusal(outputs.check_room, tmp_path, "--output")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    slide().write_h5ad(folder / "cells.h5ad")
    (folder / "report").mkdir()
    (folder / "report" / "results.json").write_text("old")
    (folder / "model").mkdir()
    made().save_pretrained(folder / "model")
    (folder / "there.h5ad").write_text("old")
    (folder / "speed.json").write_text("old")
    return folder


@pytest.mark.slow
def test_every_command_refuses_an_output_before_the_work(files):
    """None of the models exists, so a command that came to load one would say that."""
    cells, there = f"--input={files}/cells.h5ad", f"--output={files}/there.h5ad"
    commands = {
        "embed": [cells, there, "--model=nothing"],
        "impute": [cells, there, "--model=nothing", "--genes=A"],
        "annotate": [cells, there, "--model=nothing"],
        "generate": [there, "--model=nothing"],
        "convert": ["--from=hf", f"--input={files}/nothing", f"--output={files}/model"],
        "benchmark": [
            "--config=benchmark", "--config.model=nothing", f"--config.data.path={files}/cells.h5ad",
            f"--output={files}/report",
        ],
        "speed": ["--config=sct_sc:quickstart", f"--output={files}/speed.json"],
    }  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "sct", name, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment, cwd=files,
        )
        for name, words in commands.items()
    }  # fmt: skip
    wrong = {}
    for name, process in started.items():
        _, said = process.communicate(timeout=300)
        if process.returncode != 1 or "--overwrite" not in said or len(said.strip().splitlines()) != 1:
            wrong[name] = said
    assert not wrong
    assert (files / "there.h5ad").read_text() == (files / "speed.json").read_text() == "old"
    assert (files / "report" / "results.json").read_text() == "old"


@pytest.mark.slow
def test_benchmarks_of_the_library_check_their_folder(files):
    from sct.benchmarks.instructions import benchmark as ask
    from sct.benchmarks.zero_shot import benchmark

    for measure in (benchmark, ask):
        config = {
            "data": {"path": str(files / "cells.h5ad")},
            "model": "nothing",
            "output": str(files / "report"),
        }
        with pytest.raises(ConfigError, match="--overwrite"):
            measure(config, overwrite=False)
        with pytest.raises(ConfigError, match="is a file"):
            measure({**config, "output": str(files / "cells.h5ad")})
        # With it, the next thing that is wrong is told.
        with pytest.raises(SctError, match="nothing does not exist"):
            measure(config)


def test_what_the_system_says_of_a_disk_is_found_in_what_libraries_say():
    full = OSError(errno.ENOSPC, FULL)
    wrapped = RuntimeError("no checkpoint")
    wrapped.__cause__ = full
    for error in (
        full,
        OSError(f"Can't write data (errno = 28, error message = '{FULL}')"),
        ValueError(f"RESOURCE_EXHAUSTED: Failed to write: {FULL} [source locations=...]"),
        wrapped,
        OutputError(errno.EDQUOT, os.strerror(errno.EDQUOT), "x"),
    ):
        assert disk_trouble(error), error
    for other in (
        OSError(errno.ENOENT, "No such file"),
        ValueError("x"),
        RuntimeError("RESOURCE_EXHAUSTED: memory"),
    ):
        assert not disk_trouble(other)


def test_a_defect_that_comes_up_on_a_full_disk_is_a_defect():
    def caught(defect) -> Exception:
        try:
            try:
                raise OSError(errno.ENOSPC, FULL)
            except OSError:
                defect()
        except Exception as error:
            return error
        raise AssertionError

    def broken_library():
        # h5py's own, of a file that is closed while the error is on its way.
        with h5py.File("x", "w", driver="core", backing_store=False) as file:
            file.create_group("a")
            file.create_group("a")

    def reraised():
        raise OSError("the folder was not written")

    def value_of_ours():
        raise ValueError("not a disk")

    for defect in (lambda: {}["x"], lambda: [][0], lambda: int("x"), value_of_ours):
        assert not disk_trouble(caught(defect)), caught(defect)
    assert not disk_trouble(KeyError(FULL))
    for trouble in (reraised, broken_library):
        assert disk_trouble(caught(trouble)), caught(trouble)


def test_an_input_that_cannot_be_read_is_not_told_as_an_output(tmp_path):
    from sct.commands import tables

    cells, source = slide(), tmp_path / "cells.h5ad"
    with pytest.raises(DataError, match=r"cells\.h5ad cannot be read \(No such file"):
        tables.write(cells, str(source), tmp_path / "out.h5ad", {}, [])
    cells.write_h5ad(source)
    tables.write(cells, str(source), tmp_path / "out.h5ad", {}, [])
    assert (tmp_path / "out.h5ad").read_bytes() == source.read_bytes()


def test_sigterm_ends_a_command_without_leftovers(tmp_path):
    code = """
import signal, sys
from sct import cli
from sct.atomic import atomic_write
def program(rest):
    with atomic_write(sys.argv[1]) as temporary:
        temporary.write_text("half")
        signal.raise_signal(signal.SIGTERM)
cli.run_main(program, ["sct"], again="start over", stoppable=sys.argv[2] == "stoppable")
"""
    said = {}
    for how in ("stoppable", "handled"):
        folder = tmp_path / how
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder / "made.txt"), how],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        said[how] = (done.returncode, done.stderr.strip(), len(list(folder.iterdir())))
    assert said == {
        "stoppable": (143, "stopped; run the same command again to start over", 0),
        "handled": (-signal.SIGTERM, "", 1),
    }


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, FULL, "/x/y"), ("/x/y", FULL, "start over")),
        (RuntimeError(f"RESOURCE_EXHAUSTED: {FULL}"), (FULL,)),
        (OutputError(errno.ENOSPC, FULL, "/x/y"), ("/x/y cannot be written", FULL)),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), ("out of memory:",)),
        (MemoryError(), ("out of memory:",)),
    ],
)
def test_a_full_disk_ends_a_command_in_one_sentence(error, words, monkeypatch, capsys):
    from absl import app

    def program(rest):
        raise error

    status = []
    monkeypatch.setattr(app, "run", lambda guarded, argv, flags_parser: status.append(guarded(argv)))
    cli.run_main(program, ["sct"], again="start over")
    said = capsys.readouterr().err
    assert status == [1]
    assert len(said.strip().splitlines()) == 1
    assert all(word in said for word in words), said


def test_a_home_folder_of_no_user_ends_a_command_in_one_sentence(monkeypatch, capsys):
    from absl import app

    monkeypatch.setattr(app, "run", lambda guarded, argv, flags_parser: guarded(argv))
    cli.run_main(
        lambda words: Path(words[-1].partition("=")[2]).expanduser() and 0,
        ["sct", "--output=~/x", "--workdir=~nouser/x"],
    )
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "--workdir=~nouser/x" in said
    assert "full path" in said


def test_a_defect_keeps_its_traceback(monkeypatch):
    from absl import app

    def program(rest):
        raise KeyError("x")

    monkeypatch.setattr(app, "run", lambda guarded, argv, flags_parser: guarded(argv))
    with pytest.raises(KeyError):
        cli.run_main(program, ["sct"])


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    if not mount or not unmount or os.geteuid() != 0:
        pytest.skip("a small disk needs root, mount and umount")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no small disk can be made here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([unmount, str(folder)], check=True)


@pytest.mark.slow
def test_whatever_is_written_to_a_full_disk_ends_in_one_sentence(small_disk, tmp_path):
    """Nothing is left of it, and what was there is kept."""
    from sct.commands import tables
    from sct.data.genes.vocabulary import GeneVocabulary
    from sct.data.ingest.build import ingest
    from sct.eval.reports import folder as report_folder
    from sct.eval.reports.report import Report
    from sct.gene_features.features import GeneFeatures

    atomic.write_text(small_disk / "kept", "x" * 280_000)  # all but some 20 kB
    rng, human = np.random.default_rng(0), GeneVocabulary.human()
    cells = ad.AnnData(rng.random((50, 20)).astype(np.float32))
    cells.write_h5ad(tmp_path / "in.h5ad")
    cells.obsm["X_sct"] = rng.random((50, 4000)).astype(np.float32)
    many = ad.AnnData(rng.poisson(3.0, (300, 2000)).astype(np.float32))
    many.var_names = list(human.keys[:2000])
    table = Report("t", ("a",), notes=("x" * 400_000,))
    writers = {
        "vocabulary": lambda: human.save(small_disk / "genes.tsv"),
        "features": lambda: GeneFeatures(("ENSG1",), rng.random((1, 200_000)).astype(np.float32), {}).save(
            small_disk / "f.npz"
        ),
        "report": lambda: report_folder.write([table], small_disk / "report", {"seed": "1"}),
        "cells": lambda: tables.write(
            cells, str(tmp_path / "in.h5ad"), small_disk / "o.h5ad", {"obsm": ["X_sct"]}, []
        ),
        "model": lambda: made().save_pretrained(small_disk / "model"),
        "store": lambda: ingest([("many", many)], small_disk / "store"),
    }
    wrong = {}
    for name, write in writers.items():
        try:
            write()
        except SctError as error:
            if FULL not in str(error) or "\n" in str(error):
                wrong[name] = str(error)
        except Exception as error:
            wrong[name] = repr(error)
        else:
            wrong[name] = "it was written"
    assert not wrong
    left = [path for path in small_disk.rglob("*") if path.is_file()]
    assert left == [small_disk / "kept"]
    assert (small_disk / "kept").read_text() == "x" * 280_000
    with pytest.raises(DataError, match=FULL):
        tables.write(cells, str(tmp_path / "x.zarr"), small_disk / "o.h5ad", {}, [])
