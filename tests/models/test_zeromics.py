"""ZerOmics: cells become soft tokens, which a decoder reads where an instruction has them."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.errors import ConfigError, DataError
from sct.models import lora, registry
from sct.models.decoder import Decoder
from sct.models.decoder_config import LlamaConfig
from sct.models.lora import LoraConfig, Mixture
from sct.models.zeromics import ZerOmics, ZerOmicsConfig
from sct.models.zeromics_cells import ZerOmicsCells, ZerOmicsCellsConfig
from sct.nn.paths import flatten, unflatten
from sct.weights.pretrained import Pretrained
from tests.cached import cached
from tests.random_models import random_model

CELLS = ZerOmicsCellsConfig(
    num_genes=12, feature_dim=6, num_bins=4, embed_dim=8, num_layers=1, num_heads=2, ffn_dim=10
)
LLM = LlamaConfig(
    vocab_size=30, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=24, max_length=32
)
CONFIG = ZerOmicsConfig(CELLS, LLM, num_soft=3)
INSTRUCTIONS = np.array([[4, -1, -2, -3, 9, 7], [8, 8, -1, -2, -3, 2]])


@cached
def model(tokenizer: str = "linear", width: int = 16) -> Pretrained:
    llm = dataclasses.replace(LLM, embed_dim=width)
    config = ZerOmicsConfig(CELLS, llm, 1 if tokenizer == "none" else 3, tokenizer)
    return random_model("zeromics", config, seed=0)


def bins() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 5, (2, CELLS.num_genes)).astype(np.uint8)


def encoded() -> np.ndarray:
    params = model().variables["params"]["cells"]
    return np.asarray(ZerOmicsCells(CELLS).apply({"params": params}, bins())["hidden"])


@pytest.mark.slow
def test_soft_tokens_are_linear_maps_over_genes_and_width():
    params = jax.tree.map(np.asarray, model().variables["params"]["tokenizer"])
    pooled = np.einsum("bgd,gk->bkd", encoded(), params["genes"])
    expected = pooled @ params["out"]["kernel"] + params["out"]["bias"]
    found = model().apply(bins=bins(), outputs=["soft", "cell_embedding"])
    np.testing.assert_allclose(found["soft"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["cell_embedding"], expected.mean(axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("tokenizer", "width"), [("linear", 16), ("pooled", 16), ("none", 16), ("none", 8)])
def test_genes_in_any_order_and_places_without_one(tokenizer, width):
    handle, order = model(tokenizer, width), np.random.default_rng(2).permutation(CELLS.num_genes)
    genes = np.pad(np.broadcast_to(order, bins().shape), ((0, 0), (0, 4)), constant_values=-1)
    mixed = handle.apply(bins=np.pad(bins()[:, order], ((0, 0), (0, 4))), genes=genes, outputs=["soft"])[
        "soft"
    ]
    whole = handle.apply(bins=bins(), outputs=["soft"])["soft"]
    assert whole.shape == (2, 1 if tokenizer == "none" else 3, width)
    np.testing.assert_allclose(mixed, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_pooled_and_missing_tokenizers():
    cells = model("pooled").variables["params"]["cells"]
    hidden = ZerOmicsCells(CELLS).apply({"params": cells}, bins())["hidden"]
    params = model("pooled").variables["params"]["tokenizer"]["out"]
    expected = (hidden.mean(axis=1) @ params["kernel"] + params["bias"]).reshape(2, 3, 16)
    np.testing.assert_allclose(
        model("pooled").apply(bins=bins(), outputs=["soft"])["soft"], expected, atol=1e-4
    )
    cells = model("none", 8).variables["params"]
    assert "tokenizer" not in cells  # a cell's mean has the decoder's width already
    hidden = ZerOmicsCells(CELLS).apply({"params": cells["cells"]}, bins())["hidden"]
    found = model("none", 8).apply(bins=bins(), outputs=["soft"])["soft"]
    np.testing.assert_allclose(found[:, 0], hidden.mean(axis=1), atol=1e-4)


@pytest.mark.slow
def test_the_decoder_reads_soft_tokens_where_the_instruction_has_them():
    """As a decoder whose table of tokens has them as further rows."""
    found = model().apply(bins=bins(), input_ids=INSTRUCTIONS)
    params = model().variables["params"]["llm"]
    for row in range(2):
        table = np.concatenate([params["token"]["embedding"], found["soft"][row]])
        ids = np.where(INSTRUCTIONS[row] < 0, LLM.vocab_size - 1 - INSTRUCTIONS[row], INSTRUCTIONS[row])
        longer = dataclasses.replace(LLM, vocab_size=LLM.vocab_size + 3)
        own = {"params": {**params, "token": {"embedding": table}}}
        hidden = Decoder(longer).apply(own, ids[None], method="hidden_states")
        logits = Decoder(LLM).apply({"params": params}, hidden, method="logits")
        np.testing.assert_allclose(found["logits"][row], logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    plain = model().apply(bins=bins(), input_ids=INSTRUCTIONS)["logits"]
    amount = ((0, 0), (2, 0) if side == "left" else (0, 2))
    mask = np.pad(np.ones_like(INSTRUCTIONS), amount)
    filled = model().apply(bins=bins(), input_ids=np.pad(INSTRUCTIONS, amount), attention_mask=mask)["logits"]
    kept = filled[:, 2:] if side == "left" else filled[:, :-2]
    np.testing.assert_allclose(kept, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_answer_depends_on_the_cell_through_every_part():
    """Gradients of an answer reach the tokenizer and the cell model, and a mixture of adapters in the decoder."""
    config = model().config
    module = ZerOmics(config)
    mixture = Mixture(
        ("universal", "cta"), LoraConfig((r"llm/layers/attention/(query|value)$",), rank=2, alpha=2.0)
    )
    boxed = jax.eval_shape(module.init, jax.random.key(0), **ZerOmics.example(config))
    adapters = flatten(nn.unbox(lora.init(jax.random.key(1), boxed["params"], mixture.config)))
    adapters = {path: value + 0.2 if path.endswith("lora_b") else value for path, value in adapters.items()}
    variables = {**model().variables, "adapters": unflatten(adapters)}

    def loss(variables: Any) -> jax.Array:
        gated = lora.gated(variables, mixture.gate(jnp.array([[1, 1], [1, 0]])))
        out = module.apply(gated, bins(), None, INSTRUCTIONS)["logits"]
        return jax.nn.log_softmax(out)[:, -1, 3].sum()

    found = flatten(jax.grad(loss)(variables))
    for path in (
        "params/tokenizer/genes",
        "params/tokenizer/out/kernel",
        "params/cells/layers/mlp/up/kernel",
    ):
        assert np.abs(found[path]).max() > 0, path
    assert not np.asarray(found["params/cells/gene_head/kernel"]).any()
    assert {path.rsplit("/", 1)[0] for path in found if path.endswith("lora_a")} == {
        "adapters/llm/layers/attention/query", "adapters/llm/layers/attention/value",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input_ids": INSTRUCTIONS[:1]}, "2 cells"),
        ({"input_ids": np.full((2, 3), -4)}, "-4 to -4"),
        ({"input_ids": np.full((2, 3), 30)}, "30 to 30"),
        ({"input_ids": INSTRUCTIONS, "attention_mask": np.ones((2, 3), int)}, "input_ids"),
    ],
)
def test_inputs_that_do_not_fit(inputs, words):
    with pytest.raises(DataError, match=words):
        model().apply(bins=bins(), **inputs)


def test_configurations_and_files(tmp_path):
    with pytest.raises(ConfigError, match="num_soft"):
        ZerOmicsConfig(CELLS, LLM, 2, "none")
    with pytest.raises(ConfigError, match="'mean'"):
        ZerOmicsConfig(CELLS, LLM, 2, "mean")
    values = dataclasses.asdict(CONFIG)
    assert registry.model_config("zeromics", values) == CONFIG
    values["cells"]["num_genes"] = 0
    assert registry.model_config("zeromics", values, 7).num_genes == 7


def test_the_size_of_the_paper_without_values():
    """LLaMA-2-13B: 13.0 billion parameters of the decoder, and 14 million of the linear tokenizer."""
    llm = LlamaConfig(embed_dim=5120, num_layers=40, num_heads=40, ffn_dim=13_824)
    config = ZerOmicsConfig(ZerOmicsCellsConfig(), llm)
    shapes = jax.eval_shape(ZerOmics(config).init, jax.random.key(0), **ZerOmics.example(config))
    sizes: dict[str, int] = {}
    for path, leaf in flatten(nn.unbox(shapes)).items():
        part = path.split("/")[1]
        sizes[part] = sizes.get(part, 0) + int(np.prod(leaf.shape))
    assert sizes["llm"] == 13_015_864_320
    assert sizes["tokenizer"] == 20_124 * 500 + 768 * 5120 + 5120
