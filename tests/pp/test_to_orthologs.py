"""`sct.pp.to_orthologs`: human names for the genes of mouse cells, and values as they were."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import sct
from sct.data.counts import validate
from sct.data.genes.orthologs import read_orthologs
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import DataError
from tests.data.ortholog_tables import HUMAN, biomart, human_id, mouse_id, write

GENES = ["Ms4a1", "Cd3d", "Lyz", "Xist", "Nkg7", "Gnly", "Cd79a", "S100a8"]
KEPT, NAMES = [0, 1, 4, 7], ["MS4A1", "CD3D", "NKG7", "S100A8"]
FORMS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}


@pytest.fixture
def table(tmp_path):
    return write(biomart(), tmp_path / "mart_export.txt.gz")


def mouse(form: str = "csr") -> ad.AnnData:
    counts = np.random.default_rng(0).poisson(2.0, (5, len(GENES))).astype(np.float32)
    var = pd.DataFrame({"chromosome": list("abcdefgh"), "ensembl_id": "?"}, index=GENES)
    obs = pd.DataFrame({"cell_type": list("xyxyx")}, index=[f"cell{i}" for i in range(5)])
    adata = ad.AnnData(FORMS[form](counts), obs=obs, var=var, uns={"abstract": "Cells of a mouse."})
    adata.layers["spliced"] = FORMS[form](counts // 2)
    adata.obsm["spatial"] = np.arange(10.0).reshape(5, 2)
    adata.varm["loadings"] = np.arange(16.0).reshape(8, 2)
    return adata


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


@pytest.mark.parametrize("form", FORMS)
def test_genes_are_named_and_values_stay(form, table, capsys):
    before = mouse(form)
    kept = before.copy()
    found = sct.pp.to_orthologs(before, table)
    assert found.var_names.tolist() == NAMES
    assert found.var["ensembl_id"].tolist() == [human_id(name) for name in NAMES]
    assert found.var["source_gene"].tolist() == [GENES[at] for at in KEPT]
    assert found.var["source_ensembl_id"].tolist() == ["?"] * 4  # what was there under the name
    assert found.var["chromosome"].tolist() == [before.var["chromosome"].iloc[at] for at in KEPT]
    for one, other in ((found.X, before.X), (found.layers["spliced"], before.layers["spliced"])):
        assert type(one) is type(other)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(dense(one), dense(other)[:, KEPT])
    np.testing.assert_array_equal(found.varm["loadings"], before.varm["loadings"][KEPT])
    np.testing.assert_array_equal(found.obsm["spatial"], before.obsm["spatial"])
    pd.testing.assert_frame_equal(found.obs, before.obs)
    said = found.uns["sct_orthologs"]
    assert (said["table"], said["pairs"]) == ("mart_export.txt.gz", 6)
    assert (said["genes"], said["mapped"]) == (8, 4)
    assert said["dropped"] == {
        "with several orthologs": 2,
        "without an ortholog": 1,
        "not in the table": 1,
    }
    assert said["genes_from"] == "index (symbols)"
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert sentence.startswith("4 of 8 genes have a one-to-one ortholog in mart_export.txt.gz")
    # What was given is as it was.
    assert before.var.equals(kept.var)
    assert list(before.uns) == ["abstract"]
    np.testing.assert_array_equal(dense(before.X), dense(kept.X))
    assert HUMAN.align(found.var).matched == 4


def test_ids_with_versions_a_column_and_a_table_that_is_read(table):
    before = mouse()
    before.var["ids"] = [f"{mouse_id(i)}.3" for i in (1, 0, 2, 99, 3, 5, 4, 9)]
    before.var_names = [f"gene{i}" for i in range(8)]
    read = read_orthologs(table)
    for found in (
        sct.pp.to_orthologs(before, read),
        sct.pp.to_orthologs(before, table, gene_column="ids", key_added="mapped"),
        sct.pp.to_orthologs(before, table, source="Gene stable ID", target="Human gene name"),
    ):
        assert found.var_names.tolist() == NAMES
        assert found.var["source_gene"].tolist() == [f"{mouse_id(i)}.3" for i in (1, 0, 3, 9)]
    with pytest.raises(DataError, match="source"):
        sct.pp.to_orthologs(before, read, source="a", target="b")


@pytest.mark.parametrize("form", FORMS)
def test_backed_files_and_what_is_written(form, table, tmp_path):
    adata = mouse(form)
    adata.raw = adata.copy()
    adata = adata[:, 1:].copy()
    adata.layers["spliced"] = FORMS[form](adata.layers["spliced"])
    adata.write_h5ad(tmp_path / "mouse.h5ad")
    backed = ad.read_h5ad(tmp_path / "mouse.h5ad", backed="r")
    with pytest.warns(FutureWarning, match="sct.pp.to_orthologs"):
        expected = sct.pp.to_orthologues(adata, table)
    for file, cells in ((backed, 5), (backed[:3], 3)):
        found = sct.pp.to_orthologs(file, table)
        assert not found.isbacked
        assert not found.is_view
        for one, other in (
            (found.X, expected.X),
            (found.layers["spliced"], expected.layers["spliced"]),
            (found.raw.X, expected.raw.X),
            (found.obsm["spatial"], expected.obsm["spatial"]),
        ):
            assert type(one) is type(other)
            np.testing.assert_array_equal(dense(one), dense(other)[:cells])
        assert found.raw.var.to_dict() == expected.raw.var.to_dict()
        # What was read is one's own.
        for matrix in (found.X, found.layers["spliced"], found.obsm["spatial"]):
            (matrix.data if sp.issparse(matrix) else matrix)[...] = 7
    found = sct.pp.to_orthologs(backed, table)
    found.write_h5ad(tmp_path / "human.h5ad")
    again = ad.read_h5ad(tmp_path / "human.h5ad")
    assert again.var.to_dict() == found.var.to_dict()
    assert again.raw.var_names.tolist() == NAMES
    assert again.uns["sct_orthologs"]["dropped"]["not in the table"] == 1


def test_counts_in_raw_are_mapped_as_well(table, capsys):
    adata = mouse()
    adata.raw = adata.copy()
    adata = adata[:, 1:].copy()
    adata.X = adata.X.log1p()
    found = sct.pp.to_orthologs(adata, table)
    assert found.var_names.tolist() == NAMES[1:]
    counts = validate(found)
    assert counts.source == "raw.X"
    assert counts.var.index.tolist() == NAMES
    np.testing.assert_array_equal(counts.matrix.toarray(), mouse().X.toarray()[:, KEPT])
    of_x, of_raw = capsys.readouterr().err.strip().splitlines()
    assert of_x.startswith("3 of 7 genes")
    assert of_raw.startswith("raw: 4 of 8 genes")
    # What was given is as it was.
    assert adata.raw.var.equals(mouse().var)
    np.testing.assert_array_equal(adata.raw.X.toarray(), mouse().X.toarray())


def test_genes_of_raw_are_read_in_the_same_place(table):
    adata = mouse()
    adata.var["ids"] = [
        mouse_id(i) for i in (0, 1, 2, 99, 3, 5, 4, 9)
    ]  # by themselves these would be preferred
    adata.raw = adata.copy()
    found = sct.pp.to_orthologs(adata, table, gene_column="index")
    assert (
        found.raw.var["source_gene"].tolist()
        == found.var["source_gene"].tolist()
        == ["Ms4a1", "Cd3d", "Nkg7", "S100a8"]
    )
    assert sct.pp.to_orthologs(adata, table).raw.var["source_gene"].iloc[0] == mouse_id(0)
    adata.var["later"] = adata.var["ids"]
    with pytest.raises(DataError, match=r"raw: .*'later'"):
        sct.pp.to_orthologs(adata, table, gene_column="later")


def test_genes_that_share_a_symbol_and_genes_that_are_not_known(tmp_path):
    ids = [human_id("CD3D"), human_id("CD3E"), human_id("LYZ")]
    genes = GeneVocabulary.from_ids(ids, ["TWIN", "TWIN", "LYZ"])
    rows = pd.DataFrame(
        {"mouse": ["Aa", "Bb", "Cc", "Dd", "Ee"], "human": [*ids[:2], "ENSG00000999999", "LINC99999", "LYZ"]}
    )
    adata = ad.AnnData(np.ones((2, 5), np.float32), var=pd.DataFrame(index=rows["mouse"]))
    table = read_orthologs(write(rows, tmp_path / "table.csv"), vocabulary=genes)
    found = sct.pp.to_orthologs(adata, table)
    assert found.var_names.tolist() == rows["human"].tolist()
    assert found.var["ensembl_id"].tolist() == [*ids[:2], "ENSG00000999999", "", ids[2]]


def test_what_cannot_be_mapped(table):
    adata = mouse()
    with pytest.raises(DataError, match="DataFrame"):
        sct.pp.to_orthologs(adata.var, table)
    human = adata.copy()
    human.var_names = [name.upper() for name in GENES]
    with pytest.raises(DataError, match=r"MS4A1.*mart_export\.txt\.gz"):
        sct.pp.to_orthologs(human, table)
    twice = adata.copy()
    twice.var_names = [mouse_id(0), f"{mouse_id(0)}.2", *GENES[2:]]
    twice.var["ensembl_id"] = [mouse_id(0), f"{mouse_id(0)}.2", *map(mouse_id, range(3, 9))]
    with pytest.raises(DataError, match="ENSMUSG00000000000 and ENSMUSG"):
        sct.pp.to_orthologs(twice, table)
