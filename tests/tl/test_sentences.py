"""Cells as text and text as cells: `sct.tl.to_sentences`, `generate_cells`, `annotate` by answers, `describe`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import anndata as ad
import jax
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import sct
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.prompts import JOIN, Template, parse_labels
from sct.data.text.tokenizer import Tokenizer
from sct.errors import ConfigError, DataError
from sct.generation.cell_sentence_model import CellSentenceModel
from sct.models.decoder_config import GPT2Config
from sct.tasks.cell_sentences import CellSentences, CellSentencesConfig, SentenceData
from sct.weights.pretrained import Pretrained
from tests.data.text.toy_texts import GENES, SHORT, ToyStore, counts, study, tokenizer, vocabulary
from tests.random_models import random_model
from tests.tl.test_annotate import blobs

TASKS = (
    "unconditional", "cell_type_to_cell", "cell_to_cell_type", "cell_to_labels", "labels_to_cell", "cell_to_abstract",
)  # fmt: skip
TYPES = ["B cell", "NK cell", "T cell"]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Pretrained:
    """Decoder with random parameters that says that it learned cell sentences."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.json"
    describing = (Template("Tell of {cell} !", "Summary: {abstract}"),)
    dataclasses.replace(SHORT, templates={**SHORT.templates, "cell_to_abstract": describing}).save(prompts)
    config = GPT2Config(
        vocab_size=tokenizer().vocab_size, embed_dim=16, num_layers=1, num_heads=2, ffn_dim=24, max_length=128
    )
    objective = CellSentencesConfig(tuple((task, 1.0) for task in TASKS), prompts=str(prompts))
    data = SentenceData(top_k=5, length=128, abstract="own", labels=("tissue", "cell_type"))
    store: Any = ToyStore(study(40), study(30, "two", seed=1))
    task = CellSentences(objective, data, config, tokenizer(), store, seed=0)
    parts = task.exports()
    parts["data"] = json.loads(json.dumps(parts["data"]))
    return random_model("gpt2", config, scale=0.25, **parts)


def without(model: Pretrained, *tasks: str) -> Pretrained:
    """Model that did not learn some tasks."""
    left = [task for task in model.data["tasks"] if task not in tasks]
    return dataclasses.replace(model, data={**model.data, "tasks": left})


@pytest.fixture
def cells() -> ad.AnnData:
    """Cells of all genes of the toy vocabulary, in another order, with one that the model does not know."""
    values = np.hstack([counts(9, seed=5), np.full((9, 1), 50)]).astype(np.float32)
    names = [*vocabulary().ensembl_ids, "ENSG00000999999"]
    order = np.random.default_rng(0).permutation(GENES + 1)
    var = pd.DataFrame(index=[names[i] for i in order])
    obs = pd.DataFrame(index=[f"cell {i}" for i in range(9)])
    return ad.AnnData(sp.csr_matrix(values[:, order]), obs=obs, var=var)


def pbmc(n: int = 30) -> ad.AnnData:
    """Cells of genes that the human table knows, by symbol."""
    human = GeneVocabulary.human()
    places = [i for i, symbol in enumerate(human.symbols[:40]) if len(human.owners_of_symbol[symbol]) == 1][
        :12
    ]
    rng = np.random.default_rng(0)
    return ad.AnnData(
        sp.csr_matrix(rng.poisson(1.0, (n, 12)).astype(np.float32)),
        obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]),
        var=pd.DataFrame(
            {"ids": [human.ensembl_ids[i] for i in places]}, index=[human.symbols[i] for i in places]
        ),
    )


# Sentences.


def test_sentences_are_the_genes_in_descending_order(cells):
    written = sct.tl.to_sentences(cells)
    assert isinstance(written, pd.Series)
    assert list(written.index) == list(cells.obs_names)
    frame = cells.to_df()
    for name, sentence in written.items():
        words = sentence.split()
        values = frame.loc[name, words].tolist()
        assert values == sorted(values, reverse=True)
        assert min(values) > 0
        assert sorted(words) == sorted(frame.columns[frame.loc[name] > 0])
    assert not len(cells.obs.columns)
    assert sct.tl.to_sentences(cells, top_k=3).tolist() == [" ".join(text.split()[:3]) for text in written]


def test_sentences_depend_on_the_seed_and_not_on_other_cells_or_columns():
    adata = pbmc()
    whole = sct.tl.to_sentences(adata)
    assert (sct.tl.to_sentences(adata, seed=1) != whole).mean() > 0.5
    pd.testing.assert_series_equal(sct.tl.to_sentences(adata, seed=1), sct.tl.to_sentences(adata, seed=1))
    part = adata[[7, 3, 21]].copy()[:, list(adata.var_names[::-1])].copy()
    pd.testing.assert_series_equal(sct.tl.to_sentences(part), whole.iloc[[7, 3, 21]])


@pytest.mark.parametrize(
    "form", ["csr", "csc", "dense", "view", "layer", "raw", "backed", "backed csc", "backed dense"]
)
def test_sentences_of_counts_wherever_they_are(form, tmp_path):
    adata = pbmc()
    expected = sct.tl.to_sentences(adata, top_k=4)
    options = {}
    if "csc" in form:
        adata.X = adata.X.tocsc()
    elif "dense" in form:
        adata.X = adata.X.toarray()
    elif form == "view":
        adata = ad.concat([adata, pbmc(3)], index_unique="-")
        adata.obs_names = [name.removesuffix("-0") for name in adata.obs_names]
        adata = adata[:30]
    elif form == "layer":
        adata.layers["own"], adata.X = adata.X, np.sqrt(adata.X.toarray())
        options["layer"] = "own"
    elif form == "raw":
        adata.raw = adata.copy()
        adata = adata[:, :5].copy()
        adata.X = np.log1p(adata.X.toarray())
    if "backed" in form:
        adata.write_h5ad(tmp_path / "cells.h5ad")
        adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    pd.testing.assert_series_equal(sct.tl.to_sentences(adata, top_k=4, **options), expected)


def test_ensembl_ids_are_written_as_symbols():
    adata = pbmc()
    expected = sct.tl.to_sentences(adata)
    assert {word for text in expected for word in text.split()} <= set(adata.var_names)
    adata.var_names = [f"{name}.7" for name in adata.var["ids"]]
    pd.testing.assert_series_equal(sct.tl.to_sentences(adata), expected)


def test_cells_without_a_count_have_an_empty_sentence(text_model, cells):
    values = cells.X.toarray()
    values[2] = 0
    cells.X = sp.csr_matrix(values)
    for written in (sct.tl.to_sentences(cells), sct.tl.to_sentences(cells, model=text_model)):
        assert written.iloc[2] == ""
        assert (written.drop("cell 2") != "").all()


def test_sentences_in_the_words_of_a_model(text_model, cells):
    written = sct.tl.to_sentences(cells, model=text_model)
    known = set(vocabulary().symbols)
    assert all(len(text.split()) <= 5 and set(text.split()) <= known for text in written)
    shorter = sct.tl.to_sentences(cells, model=text_model, top_k=2)
    assert shorter.tolist() == [" ".join(text.split()[:2]) for text in written]
    assert sct.tl.to_sentences(cells, model=text_model, top_k=99).tolist() == written.tolist(), (
        "no more than it reads"
    )
    symbols = dict(zip(vocabulary().ensembl_ids, vocabulary().symbols, strict=True))
    own = cells[:, [name in symbols for name in cells.var_names]].copy()
    own.var_names = [symbols[name] for name in own.var_names]
    pd.testing.assert_series_equal(sct.tl.to_sentences(own, top_k=5), written)


def test_cells_that_cannot_be_written(cells, model):
    twice = cells.copy()
    twice.var_names = [*twice.var_names[:-1], twice.var_names[0]]
    with pytest.raises(DataError, match="occur more than once"):
        sct.tl.to_sentences(twice)
    spaced = cells.copy()
    spaced.var_names = ["A B", *spaced.var_names[1:]]
    with pytest.raises(DataError, match="'A B'"):
        sct.tl.to_sentences(spaced)
    logged = cells.copy()
    logged.X = logged.X.log1p()
    with pytest.raises(DataError, match="raw counts"):
        sct.tl.to_sentences(logged)
    for options, words in (
        ({"top_k": 0}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"duplicates": "sum"}, "model"),
    ):
        with pytest.raises(ConfigError, match=words):
            sct.tl.to_sentences(cells, **options)
    with pytest.raises(ConfigError, match="generate cells"):
        sct.tl.to_sentences(cells, model=model)
    with pytest.raises(DataError, match="AnnData"):
        sct.tl.to_sentences(cells.to_df())


# Generated cells.


def same_cells(one: ad.AnnData, other: ad.AnnData) -> bool:
    return one.obs["sentence"].tolist() == other.obs["sentence"].tolist() and (one.X != other.X).nnz == 0


@pytest.mark.slow
def test_generated_cells_are_a_table_that_can_be_written(text_model, tmp_path):
    made = sct.tl.generate_cells(text_model, cell_type=["B cell", "T cell"], n=3, seed=4, max_new_tokens=30)
    assert made.shape == (6, GENES)
    assert made.obs["cell_type"].tolist() == ["B cell"] * 3 + ["T cell"] * 3
    assert list(made.var_names) == list(vocabulary().symbols)
    assert made.var["ensembl_id"].tolist() == list(vocabulary().ensembl_ids)
    assert made.X.dtype == np.float32
    assert made.obs_names.is_unique
    for _, row in made.obs.iterrows():
        words = row["sentence"].split()
        valid = [word for word in words if word in set(made.var_names)]
        assert (row["n_words"], row["n_valid"], row["n_unique"]) == (len(words), len(valid), len(set(valid)))
        assert row["valid_share"] == pytest.approx(len(valid) / max(len(words), 1))
        assert row["unique_share"] == pytest.approx(len(set(valid)) / max(len(words), 1))
    assert made.obs["finished"].dtype == bool
    assert made.uns["sct"]["seed"] == 4
    assert made.uns["sct"]["task"] == "cell_type_to_cell"
    made.write_h5ad(tmp_path / "made.h5ad")
    read = ad.read_h5ad(tmp_path / "made.h5ad")
    assert same_cells(made, read)
    assert list(read.obs.columns) == list(made.obs.columns)


@pytest.mark.slow
def test_whatever_a_model_writes_can_be_written_to_a_file(text_model, cells, tmp_path, monkeypatch):
    """A byte-level tokenizer can spell any character, and a file takes no zero byte."""
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, skip_special=True: "GA0 \x00 GB1.")
    made = sct.tl.generate_cells(text_model, n=2, max_new_tokens=2)
    made.write_h5ad(tmp_path / "made.h5ad")
    assert made.obs["n_valid"].tolist() == [1, 1]
    sct.tl.describe(cells, text_model, max_new_tokens=2)
    cells.write_h5ad(tmp_path / "cells.h5ad")


def test_expression_is_that_of_the_sentences_by_the_line_of_a_study(text_model):
    """Random parameters write no gene; what stands behind them is put in their place."""
    sentences = ["GA0 GB1 what GD3", "GC2 GA0 GC2", ""]
    sentence_model = CellSentenceModel.of(
        text_model.config, text_model.variables, text_model.tokenizer, text_model.genes, text_model.data
    )
    for study_name in ("all", "one", "two"):
        fit = text_model.data["fits"][study_name]
        matrix, table = sentence_model.expression(sentences, study_name)
        value = lambda rank, fit=fit: max(fit["slope"] * np.log(rank) + fit["intercept"], 0)  # noqa: E731
        expected = np.zeros((3, GENES))
        expected[0, [0, 1, 3]] = value(1), value(2), value(4)
        expected[1, [0, 2]] = value(2), value(2)
        np.testing.assert_allclose(matrix.toarray(), expected, rtol=1e-5)
    assert table["n_valid"].tolist() == [3, 3, 0]
    assert len({json.dumps(text_model.data["fits"][name]) for name in ("all", "one", "two")}) == 3


@pytest.mark.slow
def test_the_same_seed_gives_the_same_cells(text_model):
    options = {"cell_type": "T cell", "n": 5, "max_new_tokens": 20}
    first = sct.tl.generate_cells(text_model, **options, seed=3)
    assert same_cells(first, sct.tl.generate_cells(text_model, **options, seed=3))
    assert same_cells(first, sct.tl.generate_cells(text_model, **options, seed=3, batch_size=2))
    assert first.obs["sentence"].nunique() == 5
    assert not same_cells(first, sct.tl.generate_cells(text_model, **options, seed=9))
    fewer = sct.tl.generate_cells(text_model, **{**options, "n": 2}, seed=3)
    assert fewer.obs["sentence"].tolist() == first.obs["sentence"].tolist()[:2]


def test_other_seeds_give_other_cells(text_model):
    """Repetitions with the seeds 0, 1, 2, ... are independent of each other."""
    one = {task: templates[:1] for task, templates in text_model.data["prompts"].items()}
    model = dataclasses.replace(text_model, data={**text_model.data, "prompts": one})
    drawn = [
        sct.tl.generate_cells(model, cell_type="T cell", n=5, seed=seed, max_new_tokens=12)
        .obs["sentence"]
        .tolist()
        for seed in (0, 1)
    ]
    assert not set(drawn[0]) & set(drawn[1])


def test_a_greedy_cell_is_the_best_one_each_time(text_model):
    made = sct.tl.generate_cells(text_model, n=4, temperature=0, max_new_tokens=6)
    # Two wordings of the question, and nothing drawn.
    assert made.obs["sentence"].nunique() <= 2
    assert "sentence" in made.obs
    assert not set(made.obs.columns) & {"cell_type", "tissue", "labels", "abstract"}
    assert made.uns["sct"]["task"] == "unconditional"


@pytest.mark.slow
def test_cells_of_labels_that_were_learned_together(text_model, tmp_path):
    wanted = [{"tissue": "lung", "cell_type": "B cell"}, {"tissue": "gut", "cell_type": "T cell"}]
    made = sct.tl.generate_cells(text_model, labels=wanted, n=2, max_new_tokens=8)
    assert [parse_labels(text) for text in made.obs["labels"]] == [each for each in wanted for _ in range(2)]
    assert made.obs["tissue"].tolist() == ["lung", "lung", "gut", "gut"]
    assert made.obs["cell_type"].tolist() == ["B cell", "B cell", "T cell", "T cell"]
    made.write_h5ad(tmp_path / "made.h5ad")
    one = sct.tl.generate_cells(text_model, labels=wanted[0], n=2, max_new_tokens=8)
    assert same_cells(one, made[:2])


def test_the_order_in_which_labels_are_given_does_not_matter(text_model):
    options = {"n": 3, "max_new_tokens": 8}
    one, other = (
        sct.tl.generate_cells(text_model, labels=dict(pairs), **options)
        for pairs in (
            (("tissue", "lung"), ("cell_type", "B cell")),
            (("cell_type", "B cell"), ("tissue", "lung")),
        )
    )
    assert same_cells(one, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cell_type": "astrocyte"}, "'astrocyte'"),
        ({"cell_type": ["B cell", "b cell"]}, "'b cell'"),
        ({"cell_type": []}, "cell_type"),
        ({"cell_type": "B cell", "text": "About."}, r"cell_type .*text"),
        ({"n": 0}, "n"),
        ({"seed": -2}, "seed"),
        ({"fit": "three"}, r"'three'.*'all', 'one', 'two'"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"tissue": "lung"}, "learned"),
        ({"text": "A study of cells."}, "learned"),
        ({"labels": {"dose": "high", "cell_type": "B cell"}}, "dose"),
        ({"labels": {"cell_type": "B cell"}}, "tissue"),
    ],
)
def test_cells_that_cannot_be_asked_for(text_model, options, words, monkeypatch):
    if "fit" in options:  # found before the time for generation is spent
        monkeypatch.setattr(CellSentenceModel, "answer", None)
    with pytest.raises(ConfigError, match=words):
        sct.tl.generate_cells(text_model, **{"max_new_tokens": 4, **options})


def test_only_a_model_of_cell_sentences_generates(model, text_model):
    with pytest.raises(ConfigError, match="generate cells"):
        sct.tl.generate_cells(model)
    with pytest.raises(ConfigError, match="cell sentences"):
        sct.tl.generate_cells(dataclasses.replace(text_model, tokenizer=None))
    with pytest.raises(ConfigError, match="learned"):
        sct.tl.generate_cells(without(text_model, "unconditional"), max_new_tokens=4)


# Annotation by answers.


def table_of(adata: ad.AnnData, key: str = "sct_label") -> pd.DataFrame:
    """Probabilities of the candidates (N, C)."""
    values = adata.obsm[f"{key}_probabilities"]
    assert values.dtype == np.float32
    return pd.DataFrame(values, adata.obs_names, list(adata.uns[key]["labels"]))


def probability(model: Pretrained, prompt: str, answer: str) -> float:
    """Logarithm of the probability of an answer and the end behind a prompt, by the forward pass."""
    own = model.tokenizer
    head, whole = own.encode(prompt), np.append(own.encode(prompt + JOIN + answer), own.eos)
    filled = np.zeros((1, 128), np.int32)
    filled[0, : len(whole)] = whole
    scores = np.asarray(model.apply(input_ids=filled)["logits"][0], np.float64)
    logs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    places = np.arange(len(head), len(whole))
    return float(logs[places - 1, whole[places]].sum())


def by_hand(
    model: Pretrained, adata: ad.AnnData, task: str, answers: list[str], templates: int = 1
) -> np.ndarray:
    """Share of each answer in the probability of all (N, C)."""
    found = np.zeros((adata.n_obs, len(answers)))
    for row, sentence in enumerate(sct.tl.to_sentences(adata, model=model)):
        for template in model.data["prompts"][task][:templates]:
            prompt = template["prompt"].replace("{cell}", sentence)
            field = task.removeprefix("cell_to_")
            logs = [
                probability(model, prompt, template["response"].replace(f"{{{field}}}", each))
                for each in answers
            ]
            found[row] += (
                np.exp(np.array(logs) - max(logs)) / np.exp(np.array(logs) - max(logs)).sum() / templates
            )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("templates", [1, 2])
def test_probabilities_are_those_of_the_forward_pass(text_model, cells, templates):
    assert sct.tl.annotate(cells, text_model, templates=templates, batch_size=4) is None
    table = table_of(cells)
    assert sorted(table.columns) == TYPES
    expected = by_hand(text_model, cells, "cell_to_cell_type", list(table.columns), templates)
    np.testing.assert_allclose(table.to_numpy(), expected, atol=2e-4)
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-6)
    assert cells.obs["sct_label"].tolist() == table.idxmax(axis=1).tolist()
    np.testing.assert_allclose(cells.obs["sct_label_probability"], table.max(axis=1))
    assert isinstance(cells.obs["sct_label"].dtype, pd.CategoricalDtype)
    assert len(np.unique(expected.argmax(axis=1))) > 1 or np.ptp(expected, axis=0).max() > 1e-3
    assert cells.uns["sct_label"]["templates"] == templates


def test_a_cell_is_named_the_same_whatever_is_beside_it(text_model, cells):
    whole = sct.tl.annotate(cells, text_model, copy=True)
    assert "sct_label" not in cells.obs
    part = cells[[6, 1]].copy()
    sct.tl.annotate(part, text_model, batch_size=1)
    np.testing.assert_allclose(
        part.obsm["sct_label_probabilities"], whole.obsm["sct_label_probabilities"][[6, 1]], atol=1e-5
    )


def test_a_cell_below_the_threshold_is_unknown(text_model, cells):
    sct.tl.annotate(cells, text_model)
    highest = cells.obs["sct_label_probability"].to_numpy()
    middle = float(np.sort(highest)[3:5].mean())
    again = sct.tl.annotate(cells, text_model, threshold=middle, key_added="strict", copy=True)
    unknown = again.obs["strict"].astype(str) == "unknown"
    np.testing.assert_array_equal(unknown, highest < middle)
    assert unknown.sum() == 4
    np.testing.assert_array_equal(again.obs["strict_probability"], highest)
    assert set(cells.obs["sct_label"]) <= set(TYPES)


def test_candidates_of_the_user(text_model, cells):
    own = ["B cell", "astrocyte"]
    sct.tl.annotate(cells, text_model, candidates=own)
    table = table_of(cells)
    assert list(table.columns) == ["B cell", "astrocyte"]
    np.testing.assert_allclose(table, by_hand(text_model, cells, "cell_to_cell_type", own), atol=2e-4)


def test_labels_learned_together_have_a_column_each(text_model, cells):
    keys = ["cell_type", "tissue"]
    sct.tl.annotate(cells, text_model, label_key=keys)
    table = table_of(cells)
    assert len(table.columns) == 6
    np.testing.assert_allclose(
        table, by_hand(text_model, cells, "cell_to_labels", list(table.columns)), atol=2e-4
    )
    parts = pd.DataFrame([parse_labels(answer) for answer in table.columns])
    for key in keys:
        sums = pd.DataFrame(
            {
                value: table.loc[:, (parts[key] == value).to_numpy()].sum(axis=1)
                for value in parts[key].unique()
            }
        )
        assert cells.obs[f"sct_label_{key}"].tolist() == sums.idxmax(axis=1).tolist()
    assert cells.obs["sct_label"].tolist() == table.idxmax(axis=1).tolist()
    again = sct.tl.annotate(cells, text_model, label_key="labels", copy=True)
    np.testing.assert_array_equal(again.obsm["sct_label_probabilities"], table)
    given = [{"tissue": "lung", "cell_type": "B cell"}, {"tissue": "gut", "cell_type": "T cell"}]
    sct.tl.annotate(cells, text_model, label_key=keys, candidates=given)
    assert set(cells.obs["sct_label_tissue"]) <= {"lung", "gut"}
    assert list(table_of(cells).columns) == [
        "tissue: lung; cell_type: B cell",
        "tissue: gut; cell_type: T cell",
    ]


def test_the_probability_of_a_label_is_that_of_all_answers_with_it(text_model, cells, monkeypatch):
    shares = {("lung", "B cell"): 0.3, ("gut", "T cell"): 0.2, ("gut", "NK cell"): 0.25, ("gut", "B cell"): 0.15,
              ("lung", "T cell"): 0.1}  # fmt: skip

    def score(self, task, fields, candidates, **options):
        assert task == "cell_to_labels"
        return np.log(np.array([list(shares.values())] * len(fields)))

    monkeypatch.setattr(CellSentenceModel, "score", score)
    given = [{"tissue": tissue, "cell_type": cell_type} for tissue, cell_type in shares]
    sct.tl.annotate(cells, text_model, label_key=["tissue", "cell_type"], candidates=given)
    assert set(cells.obs["sct_label"]) == {"tissue: lung; cell_type: B cell"}
    assert set(cells.obs["sct_label_tissue"]) == {"gut"}
    assert set(cells.obs["sct_label_cell_type"]) == {"B cell"}


@pytest.mark.parametrize(
    "names", [["B cell", "T cell"], ["CD4+/CD25 T Reg", "CD8+/CD45RA+ Naive"], ["a", "A", "index"]]
)
def test_annotated_cells_can_be_written(text_model, cells, tmp_path, names):
    sct.tl.annotate(cells, text_model, candidates=names)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    read = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert read.obs["sct_label"].tolist() == cells.obs["sct_label"].tolist()
    pd.testing.assert_frame_equal(table_of(read), table_of(cells), check_names=False)
    assert list(table_of(read).columns) == names


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"threshold": 1.5}, ConfigError, "threshold"),
        ({"batch_key": "batch"}, ConfigError, "'batch_key'"),
        ({"use_rep": "X"}, ConfigError, "use_rep"),
        ({"n_neighbors": 3}, ConfigError, "n_neighbors"),
        ({"candidates": []}, ConfigError, "candidates is empty"),
        ({"candidates": ["neuron"]}, ConfigError, "candidates has 1"),
        ({"candidates": ["B cell", "neuron", "B cell"]}, ConfigError, "candidates has 'B cell' twice"),
        ({"candidates": "neuron"}, ConfigError, "'neuron'"),
        (
            {
                "label_key": "labels",
                "candidates": [{"tissue": "gut", "probability": p} for p in ("high", "low")],
            },
            ConfigError,
            "'probability'",
        ),
        (
            {"label_key": ["cell_type", "dose"]},
            ConfigError,
            r"cell_type, dose.*cell_type, tissue",
        ),
        ({"label_key": "celltype"}, ConfigError, "celltype"),
        ({"label_key": "tissue"}, ConfigError, "tissue"),
        ({"label_key": "tissue", "candidates": ["lung"]}, ConfigError, "tissue|learned"),
        ({"label_key": "celltype", "candidates": ["B cell"]}, ConfigError, "celltype"),
        ({"templates": 0}, ConfigError, "templates"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"layer": "none"}, DataError, "none"),
    ],
)
def test_answers_that_cannot_be_asked_for(text_model, cells, options, error, words):
    with pytest.raises(error, match=words):
        sct.tl.annotate(cells, text_model, **options)


def test_a_model_is_asked_by_itself_what_it_learned(text_model, cells):
    other = without(text_model, "cell_to_cell_type")
    with pytest.raises(ConfigError, match="cell_to_cell_type"):
        sct.tl.annotate(cells, other, label_key="cell_type")
    sct.tl.annotate(cells, other)
    assert cells.uns["sct_label"]["label_key"] == "labels"


def test_cells_without_a_count_are_refused(text_model, cells):
    values = cells.X.toarray()
    values[3] = 0
    cells.X = sp.csr_matrix(values)
    with pytest.raises(DataError, match="1 of 9 cells"):
        sct.tl.annotate(cells, text_model)
    assert "sct_label" not in cells.obs


def test_with_a_reference_labels_are_transferred_as_ever(text_model):
    query, reference = blobs(10, 0, labels=False), blobs(40, 1)
    sct.tl.annotate(query, reference=reference, label_key="kind", use_rep="X")
    assert list(query.obs["sct_label"]) == ["T", "B"] * 5
    assert query.uns["sct_label"]["threshold"] == 0.5
    for options in ({"candidates": ["T"]}, {"label_key": ["kind"]}, {"label_key": None}):
        with pytest.raises(ConfigError, match="reference"):
            sct.tl.annotate(
                query,
                reference=reference,
                **{"label_key": "kind", "use_rep": "X", **options},
            )
    with pytest.raises(DataError, match="the reference"):  # whose genes are no words of the model
        sct.tl.annotate(query, text_model, reference=reference, label_key="kind")


def test_without_a_reference_a_model_must_answer_in_words(model, cells):
    for given in (None, model):
        with pytest.raises(ConfigError, match="annotat"):
            sct.tl.annotate(cells, given)


# Descriptions.


def test_cells_are_described(text_model, cells, tmp_path):
    options = {"max_new_tokens": 12, "batch_size": 4}
    assert sct.tl.describe(cells, text_model, **options) is None
    assert all(isinstance(text, str) for text in cells.obs["sct_description"])
    again = sct.tl.describe(cells, text_model, **options, key_added="again", copy=True)
    assert again.obs["again"].tolist() == cells.obs["sct_description"].tolist()
    assert "again" not in cells.obs
    other = sct.tl.describe(cells, text_model, **options, seed=1, copy=True)
    assert other.obs["sct_description"].tolist() != cells.obs["sct_description"].tolist()
    cells.write_h5ad(tmp_path / "cells.h5ad")


def test_a_description_is_that_of_the_cell_wherever_it_stands(text_model, cells):
    whole = sct.tl.describe(cells, text_model, max_new_tokens=12, copy=True).obs["sct_description"]
    part = sct.tl.describe(cells[[6, 1]].copy(), text_model, max_new_tokens=12, copy=True).obs[
        "sct_description"
    ]
    assert part.tolist() == whole.iloc[[6, 1]].tolist()


def test_a_model_that_did_not_learn_to_describe(text_model, cells):
    with pytest.raises(ConfigError, match="cell_to_abstract"):
        sct.tl.describe(cells, without(text_model, "cell_to_abstract"))


@pytest.mark.slow
def test_a_model_that_names_all_cells_alike_is_doubted(text_model, cells):
    many = ad.concat([cells] * 4, index_unique="-")
    flat = dataclasses.replace(text_model, variables=jax.tree.map(np.zeros_like, text_model.variables))
    with pytest.warns(UserWarning, match=rf"{len(many)} of {len(many)} cells have the same label"):
        sct.tl.annotate(many, flat, candidates=["B cell", "astrocyte of the cortex"])
