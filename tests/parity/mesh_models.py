"""Small random text models; run as a program, their logits on meshes of eight simulated devices, as JSON."""

from __future__ import annotations

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct.models import registry
from sct.models.bert_config import BertConfig
from sct.models.decoder_config import GPT2Config, LlamaConfig, NeoXConfig
from sct.nn import axes, chunked_attention
from sct.nn.paths import flatten, unflatten
from sct.train.sharding import MeshConfig, make_mesh
from sct.weights.pretrained import Pretrained, boxed_shapes, fitting_rules

_SIZES: dict[str, Any] = {"vocab_size": 61, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48}
SMALL: dict[str, Any] = {
    "gpt2": GPT2Config(**_SIZES, max_length=40),
    "neox": NeoXConfig(**_SIZES, rotary_fraction=0.5),
    "llama": LlamaConfig(**_SIZES, num_kv_heads=1, head_dim=10, rotary_scaling="llama3", rotary_length=16),
    "bert": BertConfig(**_SIZES, max_length=40),
}


def random_model(family: str, **changes: Any) -> Pretrained:
    """Model with weights large enough that every part of it counts."""
    config = type(SMALL[family])(**{**vars(SMALL[family]), **changes})
    shapes = flatten(nn.unbox(boxed_shapes(family, config)))
    rng, made = np.random.default_rng(0), {}
    for path, leaf in shapes.items():
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        scale = 1.4 * leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 0.3
        made[path] = jnp.asarray(scale * noise + (1.0 if path.endswith("scale") else 0.0))
    return Pretrained(family, config, unflatten(made))


def measure(family: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Largest difference from one device, and from itself with other tokens behind; share of a device."""
    model = random_model(family, vocab_size=62)
    module = registry.family(family).module(model.config)
    mesh = make_mesh(MeshConfig(data=1, **sizes))
    rules = fitting_rules(mesh, None)
    where = axes.shardings(boxed_shapes(family, model.config), mesh, rules)
    placed = jax.device_put(model.variables, where)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 62, (4, 32))
    segments = np.sort(rng.integers(1, 4, (4, 32)), axis=1)
    segments[:, 29:] = 0
    other = np.concatenate([ids[:, :20], (ids[:, 20:] + 1) % 62], axis=1)

    def forward(variables: Any, ids: Any) -> jax.Array:
        return module.apply(variables, input_ids=ids, segments=segments)["logits"]

    def on_mesh(variables: Any, ids: Any) -> jax.Array:
        with axes.on_mesh(mesh, rules):
            return forward(variables, ids)

    single = jax.jit(forward)(model.variables, ids)
    compiled = jax.jit(on_mesh)
    found, changed = (np.asarray(compiled(placed, x)) for x in (ids, other))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    ahead = 0.0 if family == "bert" else float(np.abs(found - changed)[:, :20].max())
    return {
        "family": family,
        "mesh": ",".join(f"{name}={size}" for name, size in sizes.items()),
        "error": float(np.abs(found - single).max() / np.abs(single).max()),
        "ahead": ahead,
        "share": held / sum(leaf.nbytes for leaf in jax.tree.leaves(placed)),
    }


if __name__ == "__main__":
    chunked_attention.CPU_SMALL_CHUNKS = (5, 9)  # several chunks, the last of them not full
    meshes = ({"fsdp": 4, "tensor": 2}, {"fsdp": 2, "sequence": 2, "tensor": 2})
    print(json.dumps([measure(family, sizes) for family in SMALL for sizes in meshes]))
