"""Knock-outs: what changes, what does not, and how the p-values behave."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import sct
from sct.errors import ConfigError, DataError
from tests.tl.conftest import CELLS


def run(adata, model, genes, **options):
    return sct.tl.perturb(adata, model, genes, copy=True, **{"n_random": 5, **options})


def known(adata, model) -> list[str]:
    """Genes of the model from the most to the least often expressed."""
    columns = model.genes.align(adata.var).columns
    frequent = np.asarray((adata.X > 0).mean(axis=0)).ravel()
    return [adata.var_names[i] for i in np.argsort(-frequent, kind="stable") if columns[i] >= 0]


def same(one: ad.AnnData, other: ad.AnnData, **tolerance) -> None:
    a, b = (each.obsm["sct_perturb"] for each in (one, other))
    assert list(a.columns) == list(b.columns)
    np.testing.assert_allclose(a, b, **tolerance)
    for table in ("effects", "targets"):
        if table in one.uns["sct_perturb"]:
            left, right = (each.uns["sct_perturb"][table] for each in (one, other))
            for column in left:
                if left[column].dtype == object or left[column].dtype.name == "str":
                    assert left[column].tolist() == right[column].tolist()
                else:
                    np.testing.assert_allclose(left[column], right[column], **tolerance)


def test_a_knock_out_changes_cells_and_no_counts(adata, model, tmp_path):
    genes = known(adata, model)
    before = adata.X.copy()
    asked = [genes[0], [genes[1], genes[2]], genes[10]]
    assert sct.tl.perturb(adata, model, asked, targets=genes[20:24], n_random=5) is None
    assert (before != adata.X).nnz == 0
    effects, table = adata.uns["sct_perturb"]["effects"], adata.obsm["sct_perturb"]
    names = [genes[0], f"{genes[1]}+{genes[2]}", genes[10]]
    assert list(table.columns) == list(effects.index) == names
    assert table.shape == (CELLS, 3)
    assert (table >= 0).all().all()
    assert (effects["effect"] > 0).all()
    np.testing.assert_allclose(effects["effect"], table.mean(), rtol=1e-5)
    assert set(np.round(effects["p_value"] * 6, 9)) <= set(range(1, 7))
    assert (effects["q_value"] >= effects["p_value"]).all()
    counts = adata[:, [genes[1], genes[2]]].X.toarray()
    assert effects["fraction_expressed"].iloc[1] == pytest.approx((counts > 0).any(axis=1).mean())
    targets = adata.uns["sct_perturb"]["targets"]
    assert targets["gene"].tolist() == genes[20:24] * 3
    assert (targets["change"] != 0).any()
    assert (targets["expected"] > 0).all()
    # The results survive a file.
    adata.write_h5ad(tmp_path / "x.h5ad")
    again = ad.read_h5ad(tmp_path / "x.h5ad")
    same(adata, again, rtol=1e-6)


def test_the_embeddings_are_those_of_cells_without_the_gene(adata, model):
    """The same as setting the counts to zero by hand, in cells whose other genes are all the same."""
    gene = known(adata, model)[0]
    made = run(adata, model, [gene], metric="euclidean", n_random=0)
    without = adata.copy()
    counts = without.X.tolil()
    counts[:, adata.var_names.get_loc(gene)] = 0
    without.X = sparse.csr_matrix(counts)
    one, other = (sct.tl.embed(each, model, copy=True).obsm["X_sct"] for each in (adata, without))
    expected = np.linalg.norm(one - other, axis=1)
    np.testing.assert_allclose(made.obsm["sct_perturb"][gene], expected, rtol=1e-4, atol=1e-6)
    assert made.uns["sct_perturb"]["effects"][["p_value", "q_value"]].isna().all().all()
    cosine = run(adata, model, [gene], n_random=0).obsm["sct_perturb"][gene]
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    np.testing.assert_allclose(cosine, 1 - (one * other).sum(axis=1) / norms, atol=2e-6)


def test_the_expected_counts_are_those_of_impute(adata, model):
    genes = known(adata, model)
    gene, targets = genes[0], genes[5:8]
    made = run(adata, model, [gene], targets=targets, n_random=0).uns["sct_perturb"]["targets"]
    without = adata.copy()
    counts = without.X.tolil()
    counts[:, adata.var_names.get_loc(gene)] = 0
    without.X = sparse.csr_matrix(counts)
    means = []
    for each in (adata, without):
        done = sct.tl.impute(each, model, genes=targets, copy=True)
        means.append(np.asarray(done[:, targets].layers["sct_expected"].mean(axis=0)).ravel())
    np.testing.assert_allclose(made["expected"], means[0], rtol=1e-5)
    np.testing.assert_allclose(made["change"], means[1] - means[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_gene_that_no_cell_expresses_changes_nothing(adata, model, metric):
    genes = known(adata, model)
    counts = adata.X.tolil()
    counts[:, adata.var_names.get_loc(genes[3])] = 0
    adata.X = sparse.csr_matrix(counts)
    made = run(adata, model, [genes[3]], targets=genes[20:22], metric=metric)
    assert (made.obsm["sct_perturb"] == 0).all().all()
    record = made.uns["sct_perturb"]
    assert record["effects"].iloc[0][["effect", "p_value", "q_value"]].tolist() == [0, 1, 1]
    assert (record["targets"]["change"] == 0).all()
    assert (record["targets"]["p_value"] == 1).all()
    # To hide a gene is not to set it to zero.
    assert (run(adata, model, [genes[3]], mode="mask", n_random=0).obsm["sct_perturb"] > 0).all().all()


def test_a_hidden_gene_is_not_seen(adata, model):
    """With mode="mask", other counts of the gene give the same embedding, so that only the starting point differs."""
    genes = known(adata, model)
    options = {"mode": "mask", "targets": genes[20:22], "n_random": 3}
    made = run(adata, model, [genes[0]], **options)
    assert (made.obsm["sct_perturb"] > 0).all().all()
    assert made.uns["sct_perturb"]["mode"] == "mask"
    zero = run(adata, model, [genes[0]], **{**options, "mode": "zero"})
    assert not np.allclose(made.obsm["sct_perturb"], zero.obsm["sct_perturb"])
    # The gene itself among the hidden ones changes the prediction of the others as impute has it.
    done = sct.tl.impute(adata, model, genes=[*genes[20:22], genes[0]], copy=True)
    hidden = np.asarray(done[:, genes[20:22]].layers["sct_expected"].mean(axis=0)).ravel()
    table = made.uns["sct_perturb"]["targets"]
    np.testing.assert_allclose(table["expected"] + table["change"], hidden, rtol=1e-4)


def test_the_same_seed_gives_the_same_and_chunks_and_company_change_nothing(adata, model):
    genes = known(adata, model)
    asked, options = [genes[0], genes[12]], {"targets": genes[20:22]}
    first = run(adata, model, asked, **options)
    same(first, run(adata, model, asked, **options))
    same(first, run(adata, model, asked, batch_size=1, **options), rtol=2e-3, atol=1e-6)
    alone = run(adata, model, asked[1:], **options)
    one, other = (each.uns["sct_perturb"]["effects"].loc[genes[12]] for each in (first, alone))
    np.testing.assert_array_equal(
        one[["effect", "null_mean", "p_value"]], other[["effect", "null_mean", "p_value"]]
    )
    seeded = run(adata, model, asked, seed=1, **options)
    assert not np.allclose(seeded.obsm["sct_perturb"], first.obsm["sct_perturb"])


def test_p_values_of_genes_drawn_at_random_are_uniform(adata, model):
    """No gene is special to a random model: its rank among genes like it is any rank."""
    genes = known(adata, model)
    made = run(adata, model, genes[:24], n_random=9).uns["sct_perturb"]["effects"]
    ranks = (made["p_value"] * 10).round().astype(int)
    assert ranks.between(1, 10).all()
    # The mean of 24 uniform ranks of 1 to 10 is 5.5, with a standard error of 0.6.
    assert 5.5 - 4 * 0.6 < ranks.mean() < 5.5 + 4 * 0.6
    assert ranks.nunique() > 4
    assert made["q_value"].min() > 0.1


def test_random_genes_are_expressed_as_often():
    from sct.tl.perturbation import _random_sets

    expressed = np.linspace(0, 1, 1001)
    for members in ((900,), (100, 700)):
        sets = _random_sets("x", members, expressed, np.array([690, 701]), 20, 0)
        assert len(sets) == len(set(sets)) == 20
        assert all(len(set(one)) == len(members) for one in sets)
        assert not {690, 701, *members} & {gene for one in sets for gene in one}
        for place, member in enumerate(members):
            assert max(abs(expressed[one[place]] - expressed[member]) for one in sets) < 0.05
    assert _random_sets("x", (1,), expressed, np.zeros(0, int), 5, 0) != _random_sets(
        "y", (1,), expressed, np.zeros(0, int), 5, 0
    )
    # As many random genes as there are.
    assert len(set(_random_sets("x", (3,), np.ones(6), np.array([4]), 4, 0))) == 4


def test_random_sets_do_not_repeat_and_are_near():
    from sct.tl.perturbation import _random_sets

    wrong, rng = [], np.random.default_rng(0)
    for members, genes, n_random in (
        ((3, 8), 23, 20),
        ((0, 1, 2), 15, 10),
        ((5,), 31, 30),
        ((2, 9), 400, 50),
    ):
        expressed = rng.random(genes) * 0.98 + 0.01
        for seed in range(20):
            sets = _random_sets("x", members, expressed, np.zeros(0, int), n_random, seed)
            if len(set(sets)) < n_random or any(len(set(one)) < len(members) for one in sets):
                wrong.append((members, seed))
    assert not wrong
    # A frequent gene among rare ones gets only the nearest ones, which all are used.
    expressed = np.r_[np.linspace(0.1, 0.6, 500), 0.99]
    sets = _random_sets("x", (500,), expressed, np.zeros(0, int), 20, 0)
    assert sorted(sets) == [(gene,) for gene in range(480, 500)]


def test_random_genes_of_a_frequent_gene_are_reported_as_rarer(adata, model):
    genes = known(adata, model)
    counts = adata.X.tolil()
    for gene in genes[1:]:  # a housekeeping gene, and genes that a third of the cells can express
        counts[np.arange(CELLS) % 3 > 0, adata.var_names.get_loc(gene)] = 0
    counts[:, adata.var_names.get_loc(genes[0])] = 2
    counts[:, adata.var_names.get_loc(genes[1])] = 1
    counts[:, adata.var_names.get_loc(genes[2])] = 1
    adata.X = sparse.csr_matrix(counts)
    rare = known(adata, model)[25]
    with pytest.warns(UserWarning, match=f"1 of 2 perturbations.*{genes[0]}") as caught:
        made = run(adata, model, [genes[0], rare], n_random=10)
    assert {each.filename for each in caught} == {__file__}
    effects = made.uns["sct_perturb"]["effects"]
    own, null = effects["fraction_expressed"], effects["null_fraction"]
    assert own[genes[0]] == 1
    assert null[genes[0]] < 0.6
    assert abs(own[rare] - null[rare]) < 0.05
    none = run(adata, model, [genes[0]], n_random=0).uns["sct_perturb"]["effects"]
    assert none["null_fraction"].isna().all()


def test_null_fractions_are_those_of_a_plain_loop(adata, model):
    from sct.data.cells import CellCounts
    from sct.tl.perturbation import _fractions

    cells = CellCounts(adata, model.genes)
    express = cells.read(np.arange(CELLS)).toarray() > 0
    asked, draws = {"a": (0,), "b": (1, 2)}, {"a": [(3,), (4,)], "b": [(2, 5), (0, 7), (8, 9)]}

    def fraction(one):
        return express[:, list(one)].any(axis=1).mean()

    for name, (own, null) in _fractions(asked, draws, cells).items():
        assert own == pytest.approx(fraction(asked[name]))
        assert null == pytest.approx(np.mean([fraction(one) for one in draws[name]]))


def test_a_perturbation_of_cells_on_disk_is_the_same(adata, model, tmp_path):
    gene = known(adata, model)[0]
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    sct.tl.perturb(backed, model, [gene], n_random=2)
    same(backed, run(adata, model, [gene], n_random=2), rtol=1e-5)


def test_what_cannot_be_perturbed_is_refused(adata, model):
    genes = known(adata, model)
    outside = next(g for g in adata.var_names if g not in genes)
    empty = adata.copy()
    counts = empty.X.tolil()
    counts[0] = 0
    counts[0, adata.var_names.get_loc(genes[0])] = 5
    empty.X = sparse.csr_matrix(counts)
    panel = adata[:, [g for g in adata.var_names if g != genes[4]]].copy()
    cases = [
        (adata, [], {}, ConfigError, "genes"),
        (adata, [[]], {}, ConfigError, "genes"),
        (adata, 5, {}, ConfigError, "genes is 5"),
        (adata, [None], {}, ConfigError, "genes is None"),
        (adata, [5], {}, ConfigError, "genes is 5"),
        (adata, [[genes[0], None]], {}, ConfigError, "genes is None"),
        (adata, [genes[0]], {"targets": 5}, ConfigError, "targets is 5"),
        (adata, [genes[0]], {"targets": [None]}, ConfigError, "targets is None"),
        (adata, [genes[0], genes[0]], {}, ConfigError, "twice"),
        (adata, ["no such gene"], {}, DataError, "no such gene"),
        (adata, [outside], {}, DataError, outside),
        (panel, [genes[4]], {}, DataError, "no counts"),
        (adata, [genes[0]], {"mode": "activate"}, ConfigError, "mode"),
        (adata, [genes[0]], {"metric": "l1"}, ConfigError, "metric"),
        (adata, [genes[0]], {"n_random": -1}, ConfigError, "n_random"),
        (adata, [genes[0]], {"n_random": 100}, DataError, "n_random"),
        (adata, [genes[0]], {"targets": [genes[0]]}, DataError, "targets"),
        (adata, [genes[0]], {"targets": genes[1:40]}, DataError, "fifth"),
        (empty, [genes[0]], {}, DataError, "row 0"),
    ]
    wrong = []
    for cells, asked, options, error, words in cases:
        before = set(cells.obsm)
        with pytest.raises(error, match=words):
            sct.tl.perturb(cells, model, asked, **{"n_random": 2, **options})
        wrong += [words] * (set(cells.obsm) != before)
    assert not wrong


def test_tables_of_changed_counts_leave_the_matrix_alone(adata, model):
    from sct.data.cells import CellCounts

    table = CellCounts(adata, model.genes)
    mask = np.zeros(len(model.genes), bool)
    mask[[1, 5]] = True
    changed = table.without(mask)
    rows = np.arange(CELLS)
    whole = table.read(rows).toarray()
    np.testing.assert_array_equal(changed.read(rows).toarray(), np.where(mask, 0, whole))
    np.testing.assert_allclose(changed.cell_totals, np.where(mask, 0, whole).sum(axis=1))
    np.testing.assert_allclose(changed.gene_totals, np.where(mask, 0, table.gene_totals))
    again = changed.without(np.arange(len(mask)) == 7)
    assert (again.read(rows).toarray()[:, [1, 5, 7]] == 0).all()
    np.testing.assert_array_equal(table.read(rows).toarray(), whole)
