"""Names that stand in a store's files and become folders: those that lead elsewhere are refused, nothing is deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from store_inputs import files_of, make_adata, run, write_as

from sct.data.ingest.input_files import sanitize
from sct.data.store import Store, study_path
from sct.errors import DataError, StoreError

BAD = (
    "", ".", "..", "../victim", "../../victim", "/victim", "a/b", "a\\b", "..\\victim", "a..b", ".a", "a.", "a\n",
    "a\0b", "a:b", "~", "ä", "a" + "/.." * 3 + "/victim", None, 3, ["a"],
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_as(make_adata(20), "csr", tmp_path / "inputs", "a")
    write_as(make_adata(20, 1), "csr", tmp_path / "inputs", "b")
    run([tmp_path / "inputs"], tmp_path / "deep" / "store")
    for victim in (tmp_path / "victim.zarr", tmp_path / "deep" / "victim.zarr"):
        victim.mkdir()
        (victim / "zarr.json").write_text("irreplaceable")
        (victim.with_suffix(".json")).write_text("irreplaceable")
    return tmp_path / "deep" / "store"


def victims(tmp_path: Path) -> list[str]:
    found = sorted(tmp_path.glob("**/victim*/zarr.json")) + sorted(tmp_path.glob("**/victim.json"))
    return [path.read_text() for path in found]


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except StoreError as error:
        return str(error)
    return ""


def edit(file: Path, name: object, path: object) -> None:
    content = json.loads(file.read_text())
    content.pop("sha256", None)  # whoever writes such a file can write its hash
    for record in content["studies"][:1] if "studies" in content else [content]:
        record.update(name=name, path=path)
    file.write_text(json.dumps(content))


def test_names_are_read_as_they_are_written():
    for text in ("a", "A-b_c", "10x v3 (pbmc)", "..x..", "-a-", "a.b", "naïve"):
        assert study_path(sanitize(text)) == f"studies/{sanitize(text)}.zarr"
    assert study_path(f"{sanitize('a b')}.{sanitize('slide 1')}") == "studies/a_b.slide_1.zarr"
    for name in BAD:
        with pytest.raises(StoreError, match="a study is called"):
            study_path(name)
    for name in ("", "..", "/", "___", "ä"):
        with pytest.raises(DataError, match="a study name"):
            sanitize(name)


def test_a_manifest_that_leads_elsewhere_is_refused(store: Path, tmp_path: Path) -> None:
    file = store / "manifest.json"
    whole, wrong = file.read_text(), []
    paths = (
        "studies/b.zarr",
        "../victim.zarr",
        str(tmp_path / "victim.zarr"),
        "",
        None,
        "studies/../studies/a.zarr",
    )
    for name, path in [*((name, f"studies/{name}.zarr") for name in BAD), *(("a", path) for path in paths)]:
        edit(file, name, path)
        said = refusal(lambda: Store.open(store))
        if str(file) not in said or "\n" in said or "sha256" in said:
            wrong.append((name, path, said))
        file.write_text(whole)
    assert not wrong
    content = json.loads(whole)
    for change in (
        {"split": "../x"},
        {"name": "b", "path": "studies/b.zarr"},
        {"name": "B", "path": "studies/B.zarr"},
    ):
        altered = json.loads(whole)
        del altered["sha256"]
        altered["studies"][0].update(change)
        file.write_text(json.dumps(altered))
        with pytest.raises(StoreError, match=r"split|twice"):
            Store.open(store)
    file.write_text(whole)
    assert Store.open(store).manifest == content


def test_an_ingest_deletes_nothing_that_a_foreign_record_names(store: Path, tmp_path: Path) -> None:
    """The input has changed, so the folders that its records name are to be replaced."""
    file, wrong = store / "studies/a.json", []
    write_as(make_adata(25), "csr", tmp_path / "inputs", "a")
    whole, before = file.read_text(), files_of(store)
    for name in (*BAD, "../../victim", "../victim", str(tmp_path / "victim"), "b"):
        edit(file, name, f"studies/{name}.zarr")
        said = refusal(lambda: run([tmp_path / "inputs"], store))
        if str(file) not in said or "\n" in said or "sha256" in said:
            wrong.append((name, said))
        file.write_text(whole)
        assert victims(tmp_path) == ["irreplaceable"] * 4
        assert files_of(store) == before
    assert not wrong
    # A record without what a record has is of no use, and its study is made again.
    file.write_text(json.dumps({"name": "a", "source": {"input": "a", "siblings": 3}}))
    assert {each["name"]: each["n_cells"] for each in run([tmp_path / "inputs"], store).studies} == {
        "a": 25,
        "b": 20,
    }


def test_a_store_whose_studies_lie_elsewhere_is_not_written_to(store: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (store / "studies").rename(elsewhere)
    (store / "studies").symlink_to(elsewhere)
    before = files_of(elsewhere)
    write_as(make_adata(25), "csr", tmp_path / "inputs", "a")
    with pytest.raises(StoreError, match="symbolic link"):
        run([tmp_path / "inputs"], store)
    assert files_of(elsewhere) == before
    assert len(Store.open(store).studies) == 2


def test_the_link_of_a_study_is_replaced_and_what_it_names_is_kept(store: Path, tmp_path: Path) -> None:
    (store / "studies/a.zarr").rename(tmp_path / "moved.zarr")
    (store / "studies/a.zarr").symlink_to(tmp_path / "moved.zarr")
    before = files_of(tmp_path / "moved.zarr")
    write_as(make_adata(25), "csr", tmp_path / "inputs", "a")
    run([tmp_path / "inputs"], store)
    assert not (store / "studies/a.zarr").is_symlink()
    assert Store.open(store).study("a").n_cells == 25
    assert files_of(tmp_path / "moved.zarr") == before


def test_columns_of_cells_stay_in_their_folder(tmp_path: Path) -> None:
    """Each column of obs is a folder; what can be none is left out and told."""
    bad = ["..", ".", "a\\..\\..\\x", "zarr.json", "a/b", "a\nb", " ", "x" * 300]
    cells = make_adata(20)
    cells.obs = pd.concat([cells.obs, pd.DataFrame(1.0, index=cells.obs.index, columns=bad)], axis=1)
    report = run([("cells", cells)], tmp_path / "store")
    (study,) = Store.open(tmp_path / "store").studies
    assert set(study.obs_columns) == {"cell_type", "batch", "quality"}
    assert any("cannot store" in note and "zarr.json" in note for note in report.notes)
    study.to_anndata()


def test_names_of_a_download_stay_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("cellxgene_census")

    def download(dataset_id: str, to_path: str, **options: object) -> None:
        made.append(Path(to_path).resolve())
        make_adata(20).write_h5ad(to_path)

    made: list[Path] = []
    module.download_source_h5ad = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cellxgene_census", module)
    run(["census:../../../victim"], tmp_path / "deep" / "store")
    assert all(path.is_relative_to(tmp_path / "deep" / "store" / "studies") for path in made)
    assert not list(tmp_path.rglob("victim.h5ad"))
