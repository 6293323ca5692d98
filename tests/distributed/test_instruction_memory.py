"""A frozen decoder that devices share is stored, and gathered, in parts: a step never holds all of it."""

from __future__ import annotations

import pytest

from .conftest import answer

WIDTH, FFN, TOKENS = 4096, 11_008, 32_000
LAYER, HEAD = 4 * WIDTH**2 + 3 * WIDTH * FFN, WIDTH * TOKENS


@pytest.mark.slowest
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_each_of_eight_devices_needs_an_eighth_of_a_frozen_llama(mesh):
    runs = {"target": "cpu", "runs": [{"batch": 16, "mesh": mesh, "max_genes": 512}]}
    four, eight = (answer("instruction_memory", {"llm": {"num_layers": n}, **runs}) for n in (4, 8))

    # The base in 16 bits and no optimiser for it.
    added = eight["whole"]["frozen"] - four["whole"]["frozen"]
    assert added * 2**30 == pytest.approx(4 * 2 * LAYER, rel=1e-3)
    assert eight["whole"]["optimizer"] < 2.01 * eight["whole"]["trained"] < 0.1 * eight["whole"]["frozen"]

    # Of what a layer adds an eighth, and adapters; of the rest, the tokenizer of 500 columns may be whole.
    assert eight["arguments"] - four["arguments"] < 1.15 * added / 8
    assert eight["arguments"] < 0.2 * sum(eight["whole"].values())

    # On CPU in float32, beside what layers keep for the backward pass: still less than the layers gathered at once.
    assert eight["temporaries"] - four["temporaries"] < 0.6 * added
    assert eight["largest"] * 2**30 < 8 * 2 * WIDTH * FFN

    # On CPU in float32, too: layers once in each direction, the head for each of the six pieces of the loss.
    few, many = (run["exchanged_gb"]["all-gather"] * 1e9 for run in (four, eight))
    share = (mesh["fsdp"] - 1) / mesh["fsdp"] / mesh.get("tensor", 1)
    assert 0.95 < (many - few) / (2 * 4 * 4 * LAYER * share) < 1.7
    assert few - (many - few) < 10 * 4 * HEAD
