from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from store_inputs import (
    VOCABULARY,
    files_of,
    leftovers,
    make_adata,
    run,
    three_files,
    write_as,
)

from sct import outputs
from sct.data.ingest import workers as ingest_jobs
from sct.data.ingest.build import ingest
from sct.data.ingest.inputs import ingest_input
from sct.data.ingest.sorting import BucketSort
from sct.data.store import Store
from sct.errors import StoreError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return three_files(tmp_path / "inputs")


def count_jobs(monkeypatch: pytest.MonkeyPatch, fail_on: str = "") -> list[str]:
    done: list[str] = []

    def is_target(root, item, *args, **kwargs):
        if item.name == fail_on:
            raise KeyboardInterrupt
        done.append(item.name)
        return ingest_input(root, item, *args, **kwargs)

    monkeypatch.setattr(ingest_jobs, "ingest_input", is_target)
    return done


def test_an_interrupted_ingest_resumes(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    count_jobs(monkeypatch, fail_on="b")
    with pytest.raises(KeyboardInterrupt):
        run(three, store)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Store.open(store)
    # What a killed process leaves.
    (store / "studies/.b.partial/X").mkdir(parents=True)
    (store / "studies/.b.spill").mkdir()
    done = count_jobs(monkeypatch)
    report = run(three, store)
    assert done == ["b", "c"]
    assert report.kept == ("a",)
    assert not leftovers(store)
    run(three, tmp_path / "straight")
    assert files_of(store) == files_of(tmp_path / "straight")


def test_running_again_does_nothing_and_more_inputs_are_added(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    run(three[:2], store, validation=("b",))
    before = files_of(store)
    done = count_jobs(monkeypatch)
    run(three[:2], store)
    assert done == []
    assert files_of(store) == before
    run(three[2:], store)
    assert done == ["c"]
    assert {each.name: each.split for each in Store.open(store).studies} == {
        "a": "train",
        "b": "validation",
        "c": "train",
    }
    run(three, store, validation=(), test=("c",))
    assert done == ["c"]
    assert {each.name: each.split for each in Store.open(store).studies}["b"] == "train"


def test_what_has_changed_is_done_again(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    run(three, store)
    write_as(make_adata(50, seed=7), "csr", tmp_path / "inputs", "b")
    done = count_jobs(monkeypatch)
    run(three, store)
    assert done == ["b"]
    assert Store.open(store).study("b").n_cells == 50
    (store / "studies/c.zarr/zarr.json").unlink()
    run(three, store)
    assert done == ["b", "c"]
    run(three, store, seed=3)
    assert done == ["b", "c", "a", "b", "c"]


def test_a_clock_that_jumps_back_hides_no_change(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    monkeypatch.setattr("time.time", iter(range(10**9, 0, -1000)).__next__)
    run(three, store)
    before = files_of(store)
    changed = three[1]
    size = changed.stat().st_size
    with h5py.File(changed, "r+") as file:
        file["X/data"][0] += 1
    os.utime(changed, (1, 1))
    done = count_jobs(monkeypatch)
    run(three, store)
    assert done == ["b"]
    assert changed.stat().st_size == size, "only the time of the change can tell that there is one"
    assert files_of(store) != before


def test_a_store_whose_study_is_being_replaced_does_not_open(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    run(three, store, test=("c",))
    write_as(make_adata(50, seed=7), "csr", tmp_path / "inputs", "b")
    count_jobs(monkeypatch, fail_on="b")
    with pytest.raises(KeyboardInterrupt):
        run([three[1]], store)
    with pytest.raises(StoreError, match="interrupted"):
        Store.open(store)
    count_jobs(monkeypatch)
    run([three[1]], store)
    assert [(each.name, each.split) for each in Store.open(store).studies] == [
        ("a", "train"),
        ("b", "train"),
        ("c", "test"),
    ]
    assert not (store / "manifest.previous.json").exists()


def test_room_is_asked_for_what_is_left_to_do(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    run(three[:1], store)
    before = files_of(store)
    done = count_jobs(monkeypatch)
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda place: full)
    run(three[:1], store)
    with pytest.raises(StoreError, match="free space"):
        run(three[:2], store)
    assert not done
    assert files_of(store) == before
    with pytest.raises(StoreError, match="free space"):
        run(three[:2], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_ingest_gives_hashes_to_a_store_without(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions recorded none: their studies are made anew, which is what the note about them asks for."""
    store = tmp_path / "store"
    run(three[:2], store)
    before = files_of(store)
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["sha256"], manifest["vocabulary"]["sha256"], manifest["studies"][0]["hashes"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    record = json.loads((store / "studies/a.json").read_text())
    del record["hashes"]
    (store / "studies/a.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="no hashes"):
        Store.open(store)
    done = count_jobs(monkeypatch)
    run(three[:2], store)
    assert done == ["a"]
    assert files_of(store) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Store.open(store)


def test_studies_of_an_old_study_key_disappear(tmp_path: Path) -> None:
    path = write_as(make_adata(), "csr", tmp_path)
    run([path], tmp_path / "store", study_key="batch")
    run([path], tmp_path / "store")
    assert [each.name for each in Store.open(tmp_path / "store").studies] == ["sample"]
    assert sorted(each.name for each in (tmp_path / "store/studies").iterdir()) == [
        "sample.json",
        "sample.zarr",
    ]


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}, {root!r}]
left = [{number}]
replace = os.replace
def kill_at(source, target):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill_at
from store_inputs import run
from pathlib import Path
run([Path(each) for each in {inputs!r}], Path({store!r}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 8])
def test_a_killed_ingest_leaves_no_store_and_resumes(three: list[Path], tmp_path: Path, number: int) -> None:
    store = tmp_path / "store"
    code = KILLED.format(
        here=str(Path(__file__).parent),
        root=str(ROOT),
        number=number,
        inputs=[str(each) for each in three],
        store=str(store),
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(StoreError, match="interrupted"):
        Store.open(store)
    run(three, store)
    run(three, tmp_path / "straight")
    assert files_of(store) == files_of(tmp_path / "straight")


def test_one_ingest_at_a_time(three: list[Path], tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    store = tmp_path / "store"
    run(three[:1], store)
    lock = os.open(store, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(StoreError, match="another ingest"):
            run(three, store)
    finally:
        os.close(lock)
    run(three, store)


def test_another_vocabulary_needs_another_store(three: list[Path], tmp_path: Path) -> None:
    run(three[:1], tmp_path / "store")
    other = VOCABULARY.subset(VOCABULARY.ensembl_ids[:40])
    with pytest.raises(StoreError, match=r"'toy'.*'toy, 40 of its genes'"):
        ingest(three[:1], tmp_path / "store", vocabulary=other)
    (tmp_path / "store/manifest.json").unlink()
    ingest(three[:1], tmp_path / "store", vocabulary=other)
    assert Store.open(tmp_path / "store").study("a").read(0, 3).shape == (3, 40)


def test_planted_links_are_not_followed(three: list[Path], tmp_path: Path) -> None:
    """Neither to files nor to folders, where an ingest puts what it has not finished."""
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    (store / "studies").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("0", "thesis.txt"):
        (elsewhere / name).write_text("irreplaceable")
    for name in ("a.partial", "a.spill", "a.download", "a.json.partial"):
        (store / f"studies/.{name}").symlink_to(elsewhere / ("thesis.txt" if "json" in name else ""))
    for name in (".genes.tsv.partial", ".manifest.json.partial", "genes.tsv"):
        (store / name).symlink_to(elsewhere / "thesis.txt")
    run(three[:1], store)
    assert not leftovers(store)
    assert {path.name: path.read_text() for path in elsewhere.iterdir()} == {
        "0": "irreplaceable",
        "thesis.txt": "irreplaceable",
    }
    # A link that comes while the ingest runs.
    (store / "studies/.late.spill").symlink_to(elsewhere)
    sort = BucketSort(store / "studies/.late.spill", np.array([0, 10]), 5, held=0)
    with pytest.raises(FileExistsError):
        sort.add(np.arange(3), sp.csr_matrix(np.ones((3, 5), np.float32)))
    assert (elsewhere / "0").read_text() == "irreplaceable"


def test_only_files_of_an_ingest_are_cleared_away(three: list[Path], tmp_path: Path) -> None:
    """The output may be a folder of other work."""
    store = tmp_path / "store"
    folders = (".cache.download", ".genes.tsv.0123456789abcdef.tmp", ".old.spill")
    files = (".notes.tmp", ".a.partial", ".manifest.json.tmp", ".notes.0123456789abcdef.tmp")
    for name in folders:
        (store / name).mkdir(parents=True)
        (store / name / "thesis.txt").write_text("irreplaceable")
    for name in files:
        (store / name).write_text("irreplaceable")
    ours = (
        ".manifest.json.0123456789abcdef.tmp",
        ".genes.tsv.partial",
        "studies/.a.json.0123456789abcdef.tmp",
    )
    (store / "studies").mkdir()
    for name in ours:
        (store / name).write_text("half")
    run(three[:1], store)
    assert not [name for name in ours if (store / name).exists()]
    assert {name for name in files if (store / name).read_text() == "irreplaceable"} == set(files)
    assert {name for name in folders if (store / name / "thesis.txt").exists()} == set(folders)
