"""Questions about cells: how long an answer may be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sct.errors import DataError
from sct.generation.cell_sentence_model import CellSentenceModel
from sct.models.decoder_config import DecoderConfig, GPT2Config, LlamaConfig
from tests.data.text.toy_texts import SHORT, tokenizer, vocabulary
from tests.generation.conftest import make

TASKS = ("unconditional", "cell_type_to_cell", "cell_to_cell_type", "cell_to_abstract")
SIZES = {
    "vocab_size": tokenizer().vocab_size,
    "embed_dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "ffn_dim": 24,
}


def sentence_model(config: DecoderConfig, top_k: int = 4, length: int = 48) -> CellSentenceModel:
    """Decoder with random parameters that says that it learned rows of so many tokens."""
    words = tuple(vocabulary().symbols)
    family = "llama" if isinstance(config, LlamaConfig) else "gpt2"
    return CellSentenceModel(
        config, make(config, family).variables, tokenizer(), words, SHORT, top_k, {}, {}, TASKS, length
    )


def questions(*lengths: int) -> list[np.ndarray]:
    return [np.ones(length, int) for length in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("config", [GPT2Config(**SIZES, max_length=48), LlamaConfig(**SIZES, max_length=16)])
def test_question_and_answer_have_the_length_of_a_row_of_training(config):
    """A rotary model reads on behind any length, but did not learn to."""
    asked = sentence_model(config)
    assert asked.options("cell_type_to_cell", questions(3, 10)).max_new_tokens == 8 * 4
    assert asked.options("cell_type_to_cell", questions(3, 30)).max_new_tokens == 48 - 30
    whole = replace(asked, top_k=0)
    assert whole.options("unconditional", questions(5)).max_new_tokens == 48 - 5
    # How many words a cell has says nothing of other answers.
    assert asked.options("cell_to_abstract", questions(3, 10)).max_new_tokens == 48 - 10
    for task in ("cell_type_to_cell", "cell_to_abstract"):
        for length in (48, 60):
            with pytest.raises(DataError, match=rf"has {length} tokens, .* at most 48"):
                asked.options(task, questions(3, length))
            assert asked.options(task, questions(3, length), max_new_tokens=7).max_new_tokens == 7


def test_fewer_positions_than_a_row_has_tokens_are_the_limit():
    asked = sentence_model(GPT2Config(**SIZES, max_length=40))
    assert asked.options("cell_to_abstract", questions(10)).max_new_tokens == 30
    with pytest.raises(DataError, match=r"\b40\b.*max_new_tokens"):
        asked.options("cell_to_abstract", questions(40))


@pytest.mark.slow
def test_a_longer_question_is_answered_where_the_model_can_read_it():
    fields = [{"cell": "GA0 GB1"}, {"cell": " ".join(vocabulary().symbols * 4)}]
    rotary, learned = (
        sentence_model(LlamaConfig(**SIZES, max_length=16)),
        sentence_model(GPT2Config(**SIZES, max_length=48)),
    )
    given = {"max_new_tokens": 5, "temperature": 0}
    made = rotary.answer("cell_to_cell_type", fields, **given)
    long = replace(rotary, config=LlamaConfig(**SIZES), length=4096)
    assert made.equals(long.answer("cell_to_cell_type", fields, **given))
    with pytest.raises(DataError, match=r"\d\d+ tokens.* at most 48"):
        rotary.answer("cell_to_cell_type", fields)
    with pytest.raises(DataError, match="48 positions"):
        learned.answer("cell_to_cell_type", fields, **given)
