"""Small decoders with random parameters, one of each kind."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sct.models.decoder_config import DecoderConfig, GPT2Config, LlamaConfig, NeoXConfig
from sct.weights.pretrained import Pretrained
from tests.random_models import random_model

SMALL = {"vocab_size": 23, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "ffn_dim": 24}
CONFIGS = {
    "gpt2": GPT2Config(**SMALL, max_length=160),
    "neox": NeoXConfig(**SMALL, rotary_fraction=0.5),
    "llama": LlamaConfig(**SMALL, num_kv_heads=2),
}


def make(config: DecoderConfig, family: str, seed: int = 0) -> Pretrained:
    """A model whose scores differ a lot, so that no rounding decides."""
    return random_model(family, config, seed=seed, key=seed)


# NeoX generates as the others do, by one more arrangement of the same layers.
FAMILIES = ["gpt2", "llama", pytest.param("neox", marks=pytest.mark.slow)]


@pytest.fixture(scope="session", params=FAMILIES)
def model(request) -> Pretrained:
    return make(CONFIGS[request.param], request.param)


@pytest.fixture(scope="session")
def gpt2() -> Pretrained:
    return make(dataclasses.replace(CONFIGS["gpt2"], vocab_size=11), "gpt2", seed=3)


def logits(model: Pretrained, ids) -> np.ndarray:
    """Scores (T, V) of one text by the model's own forward pass."""
    filled = np.zeros(
        (1, 16), int
    )  # of one length, so that it is compiled once; nothing sees what is behind it
    filled[0, : len(ids)] = ids
    return np.asarray(model.apply(input_ids=filled)["logits"][0, : len(ids)], np.float64)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
