"""Token sequences of cells: what stands where, and that a cell does not depend on the others."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from sct.data.cell_options import CellOptions
from sct.data.cell_records import cell_records
from sct.data.gene_selection import hvg_of
from sct.data.gene_tokens import gene_tokens, rows_of_genes
from sct.errors import CheckpointError, DataError
from tests.data.fake_study import FakeStudy

G, CLS, PAD, PAD_VALUE = 40, 1, 0, -2.0
ROWS = np.arange(G) + 3
ROWS[[4, 7]] = -1
CHOICES = {
    "all": {}, "listed": {}, "hvg": {"max_genes": 4}, "expressed": {"max_genes": 40}, "top": {"max_genes": 8},
    "sampled": {"max_genes": 8},
}  # fmt: skip
LISTED = np.array([3, 4, 9, 30])


def counts_of(cells: int = 9) -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(0).poisson(0.8, (cells, G)).astype(np.float32))


def by_hand(record, cell, length, first):
    """One cell, gene by gene."""
    values = record["values" if "values" in record else "bins"][cell]
    genes = record["genes"][cell] if "genes" in record else range(G)
    ids, seen = [CLS] * first, [0.0] * first
    for gene, value in zip(genes, values, strict=True):
        if gene >= 0 and ROWS[gene] >= 0:
            ids.append(ROWS[gene])
            seen.append(value)
    empty = length - len(ids)
    return ids + [PAD] * empty, seen + [PAD_VALUE] * empty, [False] * len(ids) + [True] * empty


def test_any_genes_with_any_values_become_tokens():
    for genes, more in CHOICES.items():
        for values in ("quantiles", "log1p"):
            for cls in (CLS, None):
                options = CellOptions(50, genes=genes, values=values, **more)
                record = cell_records(counts_of(), options, listed=LISTED)
                size = record[options.name].shape[1] + (cls is not None)
                for length in (None, size + 3):
                    made = gene_tokens(record, ROWS, cls, PAD, PAD_VALUE, length)
                    assert {name: a.dtype.name for name, a in made.items()} == {
                        "gene_ids": "int32", "values": "float32", "padding_mask": "bool",
                    }  # fmt: skip
                    for cell in range(9):
                        expected = by_hand(record, cell, length or size, int(cls is not None))
                        for array, wanted in zip(made.values(), expected, strict=True):
                            np.testing.assert_array_equal(array[cell], np.float32(wanted), str(options))


def test_a_cell_does_not_depend_on_the_cells_beside_it():
    """Neither on how cells are divided into blocks nor on their order: the published code is known for both."""
    counts, order = counts_of(17), np.random.default_rng(1).permutation(17)
    for genes, more in CHOICES.items():
        options = CellOptions(50, genes=genes, **more)

        def tokens(rows, options=options):
            record = cell_records(counts[rows], options, ROWS >= 0, LISTED[[0, 2, 3]], seed=3)
            return gene_tokens(record, ROWS, CLS, PAD, PAD_VALUE)

        whole = tokens(np.arange(17))
        for rows in (order, np.arange(5), np.array([16])):
            for name, array in tokens(rows).items():
                np.testing.assert_array_equal(array, whole[name][rows], f"{genes} {name}")


def test_the_most_tokens():
    record = cell_records(counts_of(), CellOptions(50, genes="top", max_genes=8))
    with pytest.raises(DataError, match=r"9 tokens.*at most 8"):
        gene_tokens(record, np.arange(G), CLS, PAD, PAD_VALUE, 8)
    # Genes that the model does not know take no place.
    few = np.where(np.arange(G) < 5, ROWS, -1)
    assert gene_tokens(record, few, CLS, PAD, PAD_VALUE, 6)["gene_ids"].shape == (9, 6)
    none = gene_tokens(record, np.full(G, -1), None, PAD, PAD_VALUE, 4)
    assert none["padding_mask"].all()
    assert (none["values"] == PAD_VALUE).all()


def test_highly_variable_genes_are_those_of_the_training_cells():
    """Genes whose expression differs between cells, known and measured in all studies."""
    pytest.importorskip("scanpy")
    rng = np.random.default_rng(2)
    means = rng.uniform(1, 8, 400)
    counts = rng.poisson(means, (300, 400))
    variable = np.arange(5, 400, 20)
    counts[:, variable] = rng.poisson(means[variable] * 5 * (rng.random((300, 20)) < 0.2))
    studies = [FakeStudy(counts[:200], "one"), FakeStudy(counts[200:], "two")]
    known = np.ones(400, bool)
    chosen = hvg_of(studies, 20, known)
    assert (np.diff(chosen) > 0).all()
    assert len(np.intersect1d(chosen, variable)) >= 18
    known[chosen[3]] = False
    studies[1].measured[chosen[5]] = False
    assert not {chosen[3], chosen[5]} & set(hvg_of(studies, 20, known))
    # Some genes are measured in one study alone, and some only differ between the studies.
    studies[1].measured[chosen[5]], studies[1].measured[chosen[7]] = True, False
    counts[200:, chosen[7]] = 0
    differ = np.setdiff1d(np.arange(400), variable)[:5]
    counts[:, differ] = rng.poisson(1, (300, 5))
    counts[200:, differ] += 40
    changed = [FakeStudy(counts[:200], "one"), FakeStudy(counts[200:], "two")]
    changed[1].measured[chosen[7]] = False
    pooled, within = (set(hvg_of(changed, 25, known, everywhere=each)) for each in (True, False))
    assert chosen[7] in within - pooled
    assert len(set(differ) & pooled) > len(set(differ) & within)
    assert len(set(variable) & within) >= 18
    few = [FakeStudy(counts[:9], "few")]
    assert len(hvg_of(few, 20, known, everywhere=False)) == 20


def test_rows_that_are_not_those_of_the_genes_are_refused():
    assert rows_of_genes({}, 3, 5).tolist() == [0, 1, 2]
    assert rows_of_genes({"gene_rows": [4, -1, 0]}, 3, 5).tolist() == [4, -1, 0]
    for rows in ([0, 1], [0, 1, 2, 3], [0, 1, 5], [0, 1, -2], [0, 1, 1.5], [0, 1, "2"], [0, 1, True]):
        with pytest.raises(CheckpointError, match="gene_rows"):
            rows_of_genes({"gene_rows": rows}, 3, 5)
