"""Questions to a ZerOmics model: what is written, what it follows from, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import anndata as ad
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import sct
from sct.data.cell_records import cell_records
from sct.data.text.cell_sentence import cell_keys
from sct.data.text.instructions import fields_of, tokens_of
from sct.errors import CheckpointError, ConfigError, DataError
from sct.generation.instruction_model import InstructionModel
from sct.models import registry
from sct.nn.paths import flatten, unflatten
from sct.tasks.instructions import InstructionData, Instructions, InstructionsConfig
from sct.weights.pretrained import Pretrained
from tests.data.text.test_instructions import ABSTRACT, study, tokenizer
from tests.data.text.toy_texts import GENES, ToyStore, counts, vocabulary
from tests.random_models import noisy

TYPES = ["B cell", "T cell", "NK cell"]
SIZES = {
    "cells": {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "ffn_dim": 12, "feature_dim": 5, "num_bins": 4},
    "llm": {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "max_length": 256}, "num_soft": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Pretrained:
    """Model with random parameters and adapters that says it learned instructions; it knows all genes but two."""
    path = tmp_path_factory.mktemp("texts") / "studies.yaml"
    path.write_text(f"one: {{abstract: {ABSTRACT}}}\n")
    values = {**SIZES, "llm": {**SIZES["llm"], "vocab_size": tokenizer().vocab_size}}
    model = registry.model_config("zeromics", values, GENES)
    known = np.ones(GENES, bool)
    known[[3, 8]] = False
    data = InstructionData(studies=str(path), length=160, disease="disease", max_genes=GENES - 4)
    task = Instructions(InstructionsConfig(rank=2), data, model, tokenizer(), ToyStore(study()), known, {}, 0)
    variables = noisy(nn.unbox(jax.jit(task.init)(jax.random.key(0))), but="scale")
    parts = task.exports()
    parts["data"] = json.loads(json.dumps(parts["data"]))
    return Pretrained("zeromics", model, variables, **parts)


@pytest.fixture
def cells() -> ad.AnnData:
    values = sp.csr_matrix(counts(7, seed=5).astype(np.float32))
    order = np.random.default_rng(0).permutation(GENES)
    var = pd.DataFrame(index=[vocabulary().ensembl_ids[i] for i in order])
    obs = pd.DataFrame(index=[f"cell {i}" for i in range(7)])
    return ad.AnnData(values[:, order], obs=obs, var=var, uns={"abstract": ABSTRACT})


def by_hand(
    model: Pretrained, cells: ad.AnnData, task: str, candidates: list[str], seed: int = 0
) -> np.ndarray:
    """Probabilities of answers from the forward pass of the whole model, one question and answer at a time."""
    instruction_model = InstructionModel.of(
        model.config, model.variables, model.tokenizer, model.genes, model.data
    )
    table = sp.csr_matrix(cells[:, list(vocabulary().ensembl_ids)].X)
    records = cell_records(table, instruction_model.cells, instruction_model.known)
    found = np.zeros((len(cells), len(candidates)))
    for row, key in enumerate(cell_keys(cells.obs_names)):
        for column, candidate in enumerate(candidates):
            fields = fields_of(task, ABSTRACT, candidates, (seed, int(key), 0, 1), candidate)
            example = instruction_model.prompts.render(task, fields, number=0)
            ids, question = tokens_of(example, tokenizer(), 3)
            inputs = {name: value[row][None] for name, value in records.items()}
            logs = jax.nn.log_softmax(
                model.apply(**inputs, input_ids=ids[None], outputs=["logits"])["logits"][0]
            )
            # An answer may list several pathways: that it begins with one is what counts.
            answer = np.arange(question, len(ids) - (task == "cpi"))
            found[row, column] = np.asarray(logs)[answer - 1, ids[answer]].sum()
    shares = np.exp(found - found.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


@pytest.mark.slow
def test_types_are_named_by_the_probability_of_each_candidate(asked, cells):
    before = cells.copy()
    assert sct.tl.annotate(cells, asked, candidates=TYPES, batch_size=3) is None
    expected = by_hand(asked, cells, "cta", TYPES)
    np.testing.assert_allclose(cells.obsm["sct_label_probabilities"], expected, atol=1e-3)
    assert cells.obs["sct_label"].tolist() == [TYPES[i] for i in expected.argmax(axis=1)]
    np.testing.assert_allclose(cells.obs["sct_label_probability"], expected.max(axis=1), atol=1e-3)
    assert cells.uns["sct_label"]["labels"] == TYPES
    assert (cells.X != before.X).nnz == 0
    # Each cell for itself, whatever else is asked about.
    part = before[[4, 1]].copy()
    sct.tl.annotate(part, asked, candidates=TYPES)
    np.testing.assert_allclose(part.obsm["sct_label_probabilities"], expected[[4, 1]], atol=1e-3)
    # As a column of obs gives them.
    again = sct.tl.annotate(part, asked, candidates=pd.Index(TYPES), key_added="again", copy=True)
    np.testing.assert_allclose(again.obsm["again_probabilities"], expected[[4, 1]], atol=1e-3)
    assert again.uns["again"]["learned"] == ["cell_type", "rare_cell", "tumor"]
    other = sct.tl.annotate(before, asked, candidates=TYPES, seed=1, templates=3, copy=True)
    assert np.abs(other.obsm["sct_label_probabilities"] - expected).max() > 1e-4
    assert "sct_label" not in before.obs


def test_what_the_table_says_of_its_study_is_taken(asked, cells):
    expected = sct.tl.annotate(cells, asked, candidates=TYPES, abstract="Cells of a lung.", copy=True)
    cells.uns["abstract"], cells.uns["cell_types"] = "Cells of a lung.", np.array(TYPES)
    sct.tl.annotate(cells, asked)
    np.testing.assert_allclose(
        cells.obsm["sct_label_probabilities"], expected.obsm["sct_label_probabilities"], atol=1e-5
    )


@pytest.mark.slow
def test_one_answer_for_all_cells_is_doubted_but_not_of_a_search(asked, cells):
    many = ad.concat([cells] * 4, index_unique="-", merge="same", uns_merge="same")
    flat = dataclasses.replace(asked, variables=jax.tree.map(np.zeros_like, asked.variables))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sct.tl.find_rare(many, flat)
        sct.tl.find_tumor(many, flat, diseases=["glioma"])
    assert many.obs["sct_rare"].nunique() == many.obs["sct_tumor"].nunique() == 1
    with pytest.warns(UserWarning, match=rf"{len(many)} of {len(many)} cells have the same label"):
        sct.tl.annotate(many, flat, candidates=TYPES)


@pytest.mark.slow
def test_rare_cells_tumours_and_pathways(asked, cells, tmp_path):
    diseases = ["glioma", "melanoma"]
    sct.tl.find_rare(cells, asked)
    sct.tl.find_tumor(cells, asked, diseases=diseases)
    sct.tl.infer_pathways(cells, asked, gene_sets=["HYPOXIA", "APOPTOSIS", "DNA_REPAIR"])
    for key, task, answers in (
        ("sct_rare", "rci", ["Yes", "No"]),
        ("sct_tumor", "tcd", [*diseases, "normal cell"]),
        ("sct_pathways", "cpi", ["HYPOXIA", "APOPTOSIS", "DNA_REPAIR"]),
    ):
        expected = by_hand(asked, cells, task, answers)
        np.testing.assert_allclose(cells.obsm[f"{key}_probabilities"], expected, atol=1e-3, err_msg=key)
        assert set(cells.obs[key]) <= set(answers)
        assert cells.uns[key]["labels"] == answers
        # Of what is asked for, whatever the answer: a cell that is not rare with 0.9 is rare with 0.1.
        told = {
            "sct_rare": expected[:, 0],
            "sct_tumor": 1 - expected[:, -1],
            "sct_pathways": expected.max(axis=1),
        }
        np.testing.assert_allclose(cells.obs[f"{key}_probability"], told[key], atol=1e-3, err_msg=key)
    assert "No" in set(cells.obs["sct_rare"])
    assert "normal cell" in set(cells.obs["sct_tumor"])
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert ad.read_h5ad(tmp_path / "cells.h5ad").obs["sct_tumor"].tolist() == cells.obs["sct_tumor"].tolist()
    named = {"HYPOXIA": ["A"], "APOPTOSIS": ["B"], "DNA_REPAIR": ["C"]}
    cells.uns["gene_sets"] = named
    again = sct.tl.infer_pathways(cells, asked, copy=True)
    np.testing.assert_allclose(
        again.obsm["sct_pathways_probabilities"], cells.obsm["sct_pathways_probabilities"], atol=1e-6
    )


@pytest.mark.slow
def test_any_question_has_a_text_for_an_answer(asked, cells):
    sct.tl.ask(cells, asked, "What is this cell?", max_new_tokens=6)
    texts = cells.obs["sct_answer"].tolist()
    assert len(set(texts)) > 1  # of different cells
    part = cells[[5, 2]].copy()
    sct.tl.ask(part, asked, "What is this cell?", max_new_tokens=6)
    assert part.obs["sct_answer"].tolist() == [texts[5], texts[2]]
    drawn = [
        sct.tl.ask(cells, asked, "What?", max_new_tokens=6, temperature=2.0, seed=seed, copy=True).obs[
            "sct_answer"
        ]
        for seed in (0, 0, 1)
    ]
    assert drawn[0].tolist() == drawn[1].tolist() != drawn[2].tolist()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda a, m: sct.tl.annotate(a, m), ConfigError, r"candidates.*uns\[.cell_types"),
        (lambda a, m: sct.tl.annotate(a, m, candidates=["B cell"]), ConfigError, "candidates has 1"),
        (lambda a, m: sct.tl.annotate(a, m, candidates="B cell"), ConfigError, r"candidates .*'B cell'"),
        (lambda a, m: sct.tl.annotate(a, m, candidates=["B cell", None]), ConfigError, r"candidates .*None"),
        (lambda a, m: sct.tl.annotate(a, m, candidates=[]), ConfigError, "list"),
        (lambda a, m: sct.tl.annotate(a, m, candidates=TYPES, batch_size=0), ConfigError, "batch_size"),
        (lambda a, m: sct.tl.find_rare(a, m, key_added=""), ConfigError, "key_added"),
        (lambda a, m: sct.tl.ask(a, m, ["x"]), ConfigError, "question"),
        (lambda a, m: sct.tl.annotate(a, m, candidates=TYPES, label_key="tissue"), ConfigError, "cell types"),
        (lambda a, m: sct.tl.annotate(a, m, candidates=TYPES, context="x"), ConfigError, "'context'"),
        (lambda a, m: sct.tl.annotate(a, m, candidates=TYPES, templates=4), ConfigError, "1 to 3"),
        (lambda a, m: sct.tl.find_tumor(a, m), ConfigError, "diseases"),
        (lambda a, m: sct.tl.find_tumor(a, m, diseases=["normal cell", "normal"]), ConfigError, "disease"),
        (lambda a, m: sct.tl.infer_pathways(a, m), ConfigError, "gene_sets"),
        (lambda a, m: sct.tl.find_rare(a, m, abstract=" "), ConfigError, "abstract"),
        (lambda a, m: sct.tl.find_rare(a, m, layer="none"), DataError, "none"),
        (lambda a, m: sct.tl.ask(a, m, " "), ConfigError, "question"),
        (lambda a, m: sct.tl.ask(a, m, "Why?", max_new_tokens=0), ConfigError, "max_new_tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(asked, cells, call, error, words):
    before = cells.copy()
    with pytest.raises(error, match=words):
        call(cells, asked)
    assert list(cells.obs) == list(before.obs)
    assert list(cells.uns) == list(before.uns)


def test_models_and_cells_that_cannot_be_asked(asked, model, cells):
    with pytest.raises(ConfigError, match="answer questions about cells"):
        sct.tl.find_rare(cells, model)
    with pytest.raises(ConfigError, match="instructions"):
        sct.tl.ask(cells, dataclasses.replace(asked, data={}), "Why?")
    del cells.uns["abstract"]
    with pytest.raises(ConfigError, match="abstract="):
        sct.tl.find_rare(cells, asked)
    values: Any = cells.X.toarray()
    values[2] = 0
    empty = ad.AnnData(sp.csr_matrix(values), obs=cells.obs, var=cells.var, uns={"abstract": ABSTRACT})
    with pytest.raises(DataError, match="1 of 7 cells"):
        sct.tl.find_rare(empty, asked)


def test_answers_that_are_not_finite_are_refused_before_anything_is_written(asked, cells):
    flat = flatten(asked.variables)
    name = "params/cells/project/kernel"
    flat[name] = jnp.full_like(flat[name], jnp.nan)
    broken = dataclasses.replace(asked, variables=unflatten(flat))
    before = cells.copy()
    calls = {
        "annotate": lambda: sct.tl.annotate(cells, broken, candidates=TYPES),
        "find_rare": lambda: sct.tl.find_rare(cells, broken),
        "ask": lambda: sct.tl.ask(cells, broken, "What is it?", max_new_tokens=2),
    }
    for call in calls.values():
        with pytest.raises(CheckpointError, match="NaN or infinity") as error:
            call()
        assert "\n" not in str(error.value)
        assert list(cells.obs) == list(before.obs)
        assert list(cells.uns) == list(before.uns)


def test_genes_that_the_model_has_no_features_of(asked, cells):
    dropped = [3, 8]
    ids = [vocabulary().ensembl_ids[gene] for gene in dropped]
    for columns, words in (
        (ids, "only 0 of 2 genes are shared"),
        ([*ids, vocabulary().ensembl_ids[0]], "row 1"),
    ):
        part = cells[:, columns].copy()
        counts = np.ones(part.shape, np.float32)
        counts[1, len(dropped) :] = 0
        part.X = sp.csr_matrix(counts)
        with pytest.raises(DataError, match=words):
            sct.tl.find_rare(part, asked)
