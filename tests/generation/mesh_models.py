"""What models generate whose parameters lie on eight simulated devices, and on one, as JSON; run as a program."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct.generation.decoding import DecodingOptions, prepared
from sct.generation.generate import generate
from sct.generation.scoring import score
from sct.generation.trie import make_trie
from sct.models import lora
from sct.nn import axes
from sct.train.sharding import MeshConfig, make_mesh
from sct.weights.pretrained import Pretrained, boxed_shapes, fitting_rules
from tests.parity.mesh_models import random_model

VOCAB, STOP = 62, 5  # tokens can be divided among the devices
HOW = {
    "best token": {"repetition_penalty": 1.2},
    "drawn": {"temperature": 0.9, "top_k": 40, "top_p": 0.95},
    "beams": {"beams": 3},
}
MESHES = {
    "gpt2": {"fsdp": 8},
    "neox": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "llama": {"fsdp": 4, "tensor": 2},
}


def on_one(family: str) -> tuple[Pretrained, Any]:
    """A model, and the same as boxed shapes; that of the family llama has adapters."""
    model = random_model(family, vocab_size=VOCAB)
    boxed = boxed_shapes(family, model.config)
    if family != "llama":
        return model, boxed
    options = lora.LoraConfig((".",), rank=4, alpha=8.0)
    boxed = {
        **boxed,
        "adapters": jax.eval_shape(lambda: lora.init(jax.random.key(0), boxed["params"], options)),
    }
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), nn.unbox(boxed["adapters"])
    )
    return dataclasses.replace(model, variables={**model.variables, "adapters": adapters}), boxed


def generated(model: Pretrained) -> dict[str, Any]:
    """Tokens and their probabilities by every way to generate, and scores of candidates."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, length) for length in (3, 7, 1, 11, 5)]
    made: dict[str, Any] = {}
    for name, options in HOW.items():
        given = DecodingOptions(max_new_tokens=12, batch_size=4, **options)
        made[name] = generate(model, prompts, given, stop=[STOP], seeds=3, progress_bar=False)
    trie = make_trie([[1, 2], [3], [4, 6, 7]], STOP)
    given = DecodingOptions(max_new_tokens=4, temperature=1.0)
    made["of a list"] = generate(model, prompts, given, stop=[STOP], trie=trie, progress_bar=False)
    tokens = {name: [each.ids.tolist() for each in answers] for name, answers in made.items()}
    values = [each.log_probability for answers in made.values() for each in answers]
    scores = score(model, prompts, [[1, 2, STOP], [4, STOP], [9]])
    return {"tokens": tokens, "values": np.append(scores, values).tolist()}


def held(tree: Any) -> float:
    """Share of a device in a tree of arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(
        leaf.nbytes for leaf in leaves
    )


def measure(family: str) -> dict[str, Any]:
    """What one device and a mesh generate, and how much of the parameters a device of the mesh holds."""
    single, boxed = on_one(family)
    mesh = make_mesh(MeshConfig(data=1, **MESHES[family]))
    where = axes.shardings(boxed, mesh, fitting_rules(mesh, None))
    placed = dataclasses.replace(single, variables=jax.device_put(single.variables, where))
    return {
        "family": family, "one": generated(single), "mesh": generated(placed), "share": held(prepared(placed))
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps([measure(family) for family in MESHES]))
