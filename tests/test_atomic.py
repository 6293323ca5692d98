"""Files and folders that take their place at once: no link is followed, nothing is left of a failure."""

from __future__ import annotations

import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sct import atomic
from sct.errors import OutputError

ROOT = Path(__file__).resolve().parents[1]


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "made.txt"
    path.write_text("old")
    with atomic.atomic_write(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert tree(tmp_path) == {"made.txt": "new"}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    atomic.write_json(path, {"gene": "β"})
    assert path.read_text(encoding="utf-8") == '{\n "gene": "β"\n}\n'


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("x" * 255, "β" * 127):
        atomic.write_text(tmp_path / name, "x")
        assert tree(tmp_path).pop(name) == "x"


@pytest.mark.parametrize("where", ["block", "fsync", "replace"])
def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch, where):
    path = tmp_path / "made.txt"
    path.write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    if where != "block":
        monkeypatch.setattr(os, where, full)

    def write():
        with atomic.atomic_write(path) as temporary:
            temporary.write_text("half")
            if where == "block":
                full()

    with pytest.raises(
        OutputError, match=r"made.txt cannot be written \(No space left on device\)"
    ) as caught:
        write()
    assert caught.value.strerror == "No space left on device"
    assert tree(tmp_path) == {"made.txt": "old"}


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Neither of a foreseen name, nor of the one that is drawn, nor at the target itself."""
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("irreplaceable")
    folder.mkdir()
    for name in (".made.txt.tmp", ".made.txt.partial", "made.tmp", "made.txt"):
        (folder / name).symlink_to(victim)
    atomic.write_text(folder / "made.txt", "new")
    assert not (folder / "made.txt").is_symlink()
    monkeypatch.setattr(secrets, "token_hex", lambda n: "drawn")
    (folder / ".made.txt.drawn.tmp").symlink_to(victim)
    (folder / ".dangling.drawn.tmp").symlink_to(tmp_path / "nothing")
    for name in ("made.txt", "dangling"):
        with pytest.raises(OutputError, match="File exists"):
            atomic.write_text(folder / name, "newer")
    assert victim.read_text() == "irreplaceable"
    assert not (tmp_path / "nothing").exists()
    assert (folder / "made.txt").read_text() == "new"


def test_a_folder_is_replaced_when_it_is_complete(tmp_path):
    folder = tmp_path / "deep" / "made"
    for text in ("old", "new"):
        with atomic.atomic_folder(folder) as new:
            assert new.parent == folder.parent
            (new / "sub").mkdir()
            (new / "sub" / "a").write_text(text)
        assert tree(tmp_path) == {"deep/made/sub/a": text}

    def stop():
        with atomic.atomic_folder(folder) as new:
            (new / "b").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert tree(tmp_path) == {"deep/made/sub/a": "new"}
    assert [path.name for path in folder.parent.iterdir()] == ["made"]


def test_the_old_folder_comes_back_where_a_process_died(tmp_path):
    folder = tmp_path / "made"
    atomic.replaced(folder).mkdir()
    (atomic.replaced(folder) / "a").write_text("old")
    with pytest.raises(OSError, match="full"), atomic.atomic_folder(folder):
        raise OSError("full")
    assert tree(tmp_path) == {"made/a": "old"}


def test_leftovers_of_dead_processes_alone_are_removed(tmp_path):
    folder, link = tmp_path / "made", tmp_path / ".made.00000000000000ff.tmp"
    dead, foreign = tmp_path / ".made.0123456789abcdef.tmp", tmp_path / ".made.456789abcdef0123.tmp"
    for place in (dead, foreign):
        place.mkdir()
    (dead / "a").write_text("half")
    (foreign / "thesis").write_text("irreplaceable")
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(tmp_path / "elsewhere")

    def is_leftover(path):
        return {file.name for file in path.iterdir()} <= {"a"}

    with atomic.atomic_folder(folder, is_leftover) as one:
        (one / "a").write_text("one")
        assert not dead.exists()
        # Another writer of the same folder takes nothing from this one.
        with atomic.atomic_folder(folder, is_leftover) as two:
            (two / "a").write_text("two")
        assert tree(one) == {"a": "one"}
        assert tree(folder) == {"a": "two"}
    assert tree(folder) == {"a": "one"}
    assert foreign.is_dir()
    assert link.is_symlink()
    assert (tmp_path / "elsewhere").is_dir()


def made_long_ago(path: Path) -> Path:
    then = time.time() - 3600
    os.utime(path, (then, then))
    return path


def test_an_empty_folder_that_was_just_made_is_not_taken_for_a_leftover(tmp_path):
    young, old = (tmp_path / f".made.{digit * 16}.tmp" for digit in "01")
    young.mkdir()
    old.mkdir()
    made_long_ago(old)
    with atomic.atomic_folder(tmp_path / "made", lambda leftover: True):
        assert young.is_dir()
        assert not old.exists()


KILLED = """
import os, signal, sys
from sct.atomic import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_files_of_dead_processes_alone_are_removed(tmp_path):
    target = tmp_path / "made.txt"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    (dead,) = tmp_path.iterdir()
    others = [tmp_path / name for name in (
        "made.txt.0123456789abcdef.tmp", ".made.txt.0123.tmp", ".made.txt.tmp", ".other.0123456789abcdef.tmp",
        ".made.txt.0123456789ABCDEF.tmp", ".madeXtxt.0123456789abcdef.tmp",
    )]  # fmt: skip
    for path in others:
        path.write_text("irreplaceable")
        made_long_ago(path)
    link, folder = (tmp_path / f".made.txt.{digit * 16}.tmp" for digit in "01")
    link.symlink_to(others[0])
    folder.mkdir()
    (folder / "thesis").write_text("irreplaceable")
    made_long_ago(folder)
    atomic.write_text(target, "young")
    assert dead.exists(), "it may still be written"
    made_long_ago(dead)
    with atomic.atomic_write(target) as one:
        one.write_text("one")
        made_long_ago(one)
        assert not dead.exists()
        # Another writer of the same file takes nothing from this one.
        atomic.write_text(target, "two")
        assert one.read_text() == "one"
    assert target.read_text() == "one"
    assert set(tmp_path.iterdir()) == {target, link, folder, *others}


def test_no_other_module_renames_files_into_place():
    made = re.compile(r"\bmkstemp\(|os\.(replace|rename)\(|\.rename\((?!columns)|O_EXCL")
    found = {
        str(path.relative_to(ROOT / "sct"))
        for path in (ROOT / "sct").rglob("*.py")
        if made.search(path.read_text())
    }
    # An ingest moves manifests aside and studies, which it fills for hours, into place.
    assert found == {"atomic.py", "data/ingest/build.py", "data/ingest/inputs.py"}


def write_vocabulary(folder: Path) -> str:
    from sct.data.genes.vocabulary import GeneVocabulary

    human = GeneVocabulary.human()
    human.subset(list(human.keys[:3])).save(folder / "genes.tsv")
    return "genes.tsv"


def write_features(folder: Path) -> str:
    from sct.gene_features.features import GeneFeatures

    GeneFeatures(("ENSG00000000001",), np.ones((1, 2), np.float32), {"kind": "x"}).save(folder / "f.npz")
    return "f.npz"


def write_report(folder: Path) -> str:
    from sct.eval.reports import folder as report_folder
    from sct.eval.reports.report import Report

    report_folder.write([Report("t", ("a",))], folder, {"seed": "1"})
    return "report.json"


def write_cells(folder: Path) -> str:
    import anndata as ad

    from sct.commands import tables

    cells = ad.AnnData(np.ones((2, 3), np.float32))
    cells.write_h5ad(folder / "in.h5ad")
    cells.obsm["X_sct"] = np.ones((2, 1), np.float32)
    tables.write(cells, str(folder / "in.h5ad"), folder / "out.h5ad", {"obsm": ["X_sct"]}, [])
    return "out.h5ad"


def write_prompts(folder: Path) -> str:
    from sct.data.text.prompts import load_prompts

    load_prompts().save(folder / "prompts.json")
    return "prompts.json"


WRITERS = (write_vocabulary, write_features, write_report, write_cells, write_prompts)


def test_whatever_writes_a_file_follows_no_link(tmp_path):
    """Links of the names that were used, and at the target."""
    wrong = []
    for writer in WRITERS:
        folder, victim = tmp_path / writer.__name__, tmp_path / f"{writer.__name__}.victim"
        folder.mkdir()
        victim.write_text("irreplaceable")
        name = writer(folder)
        stem = Path(name).stem
        (folder / name).unlink()
        for link in (name, f".{name}.tmp", f".{name}.partial", f"{stem}.tmp"):
            (folder / link).symlink_to(victim)
        assert writer(folder) == name
        if victim.read_text() != "irreplaceable" or (folder / name).is_symlink():
            wrong.append(writer.__name__)
    assert not wrong
