"""The cell encoder beside a small torch model, written from the description of the published one.

The golden files hold outputs of the published model, but only for one form of it. Here is every head and form.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.models.cell_encoder import STATISTICS, CellEncoder
from sct.models.cell_encoder_config import CellEncoderConfig
from sct.weights import scgpt
from tests.models.test_cell_encoder import FORMS, GENERATED, PAD, SIZES, handle, inputs
from tests.parity import foreign

torch = pytest.importorskip("torch", reason=foreign.REASON.format("torch"))
F = torch.nn.functional
MORE = (
    CellEncoderConfig(
        **SIZES,
        mvc="inner product",
        explicit_zero=True,
        num_batches=2,
        use_batch_labels=False,
        domain_norm="plain",
    ),
    CellEncoderConfig(
        **SIZES, norm="pre", mvc="inner product, detach", num_classes=4, classifier_layers=2, num_batches=2
    ),
)


class Published:
    """Functions of the arrays of a published file, named as in the file."""

    def __init__(self, arrays: dict[str, np.ndarray], config: CellEncoderConfig):
        self.arrays = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
        self.config = config

    def linear(self, x: Any, name: str) -> Any:
        return F.linear(x, self.arrays[f"{name}.weight"], self.arrays.get(f"{name}.bias"))

    def norm(self, x: Any, name: str) -> Any:
        weight, bias = self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, 1e-5)

    def table(self, ids: Any, name: str) -> Any:
        return F.embedding(ids, self.arrays[f"{name}.weight"])

    def attention(self, x: Any, at: str, seen: Any) -> Any:
        heads = self.config.num_heads
        parts = self.linear(x, f"{at}.self_attn.Wqkv").chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1)
        return self.linear((weights @ value).transpose(1, 2).flatten(2), f"{at}.self_attn.out_proj")

    def encoder(self, x: Any, seen: Any) -> Any:
        for number in range(self.config.num_layers):
            at = f"transformer_encoder.layers.{number}"

            def mlp(y: Any, at: str = at) -> Any:
                return self.linear(F.relu(self.linear(y, f"{at}.linear1")), f"{at}.linear2")

            if self.config.norm == "pre":
                x = x + self.attention(self.norm(x, f"{at}.norm1"), at, seen)
                x = x + mlp(self.norm(x, f"{at}.norm2"))
            else:
                x = self.norm(x + self.attention(x, at, seen), f"{at}.norm1")
                x = self.norm(x + mlp(x), f"{at}.norm2")
        return x

    def domain_norm(self, x: Any, labels: Any) -> Any:
        rows = []
        for row, label in zip(x, labels.tolist(), strict=True):
            at = f"dsbn.bns.{label}"
            mean, variance = self.arrays[f"{at}.running_mean"], self.arrays[f"{at}.running_var"]
            weight, bias = self.arrays.get(f"{at}.weight"), self.arrays.get(f"{at}.bias")
            rows.append(F.batch_norm(row.T[None], mean, variance, weight, bias, eps=6.1e-5)[0].T)
        return torch.stack(rows)

    def head(self, x: Any, name: str) -> Any:
        x = F.leaky_relu(self.linear(x, f"{name}.0"), 0.01)
        x = F.leaky_relu(self.linear(x, f"{name}.2"), 0.01)
        return self.linear(x, f"{name}.4")[..., 0]

    def labels(self, x: Any, name: str, layers: int, activation: Any) -> Any:
        for number in range(layers - 1):
            x = activation(self.linear(x, f"{name}._decoder.{3 * number}"))
            x = self.norm(x, f"{name}._decoder.{3 * number + 2}")
        return self.linear(x, f"{name}.out_layer")

    def __call__(
        self, gene_ids: Any, values: Any, padding_mask: Any, batch_labels: Any = None, generated: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        config = self.config
        genes = self.norm(self.table(gene_ids, "encoder.embedding"), "encoder.enc_norm")
        if config.values == "continuous":
            exact = values.clamp(max=config.max_value)[..., None]
            added = self.linear(F.relu(self.linear(exact, "value_encoder.linear1")), "value_encoder.linear2")
            added = self.norm(added, "value_encoder.norm")
        elif config.values == "category":
            added = self.norm(self.table(values, "value_encoder.embedding"), "value_encoder.enc_norm")
        else:
            added = genes * values[..., None] - genes
        if generated is not None:
            flag = self.table(torch.ones_like(gene_ids), "flag_encoder")
            added = torch.where(generated[..., None], flag, added)
        x = genes + added
        if config.domain_norm:
            x = self.domain_norm(x, batch_labels)
        length = x.shape[1]
        unknown = torch.zeros_like(padding_mask) if generated is None else generated
        seen = ~padding_mask[:, None, :] & (~unknown[:, None, :] | torch.eye(length, dtype=torch.bool))
        hidden = self.encoder(x, seen | torch.zeros(1, length, 1, dtype=torch.bool))
        kept = (~padding_mask & ~unknown)[..., None].float()
        cell = {
            "cls": hidden[:, 0],
            "avg-pool": (hidden * kept).sum(1) / kept.sum(1),
            "w-pool": F.normalize((hidden * kept * values[..., None]).sum(1), dim=1),
        }[config.cell_embedding]
        out = {"encoder_output": hidden, "cell_emb": cell}
        batch = None
        if config.reads_batches:
            batch = self.norm(self.table(batch_labels, "batch_encoder.embedding"), "batch_encoder.enc_norm")
        into = hidden if batch is None else torch.cat([hidden, batch[:, None].expand_as(hidden)], dim=2)
        out["mlm_output"] = self.head(into, "decoder.fc")
        if config.explicit_zero:
            out["mlm_zero_probs"] = self.head(into, "decoder.zero_logit").sigmoid()
        if config.num_classes:
            out["cls_output"] = self.labels(cell, "cls_decoder", config.classifier_layers, F.relu)
        if config.dab:
            out["dab_output"] = self.labels(cell, "grad_reverse_discriminator", 3, F.leaky_relu)
        if config.mvc:
            query = self.linear(genes, "mvc_decoder.gene2query").sigmoid()
            if config.mvc.startswith("inner product"):
                whole = cell if batch is None else torch.cat([cell, batch], dim=1)
                out["mvc_output"] = (self.linear(query, "mvc_decoder.W") @ whole[..., None])[..., 0]
                if config.explicit_zero:
                    zero = self.linear(query, "mvc_decoder.W_zero_logit") @ whole[..., None]
                    out["mvc_zero_probs"] = zero[..., 0].sigmoid()
            else:
                wide = cell[:, None].expand(-1, length, -1)
                x = torch.cat([wide, query], dim=2) if config.mvc == "concat query" else wide + query
                x = F.prelu(
                    self.linear(x, "mvc_decoder.fc1"), self.arrays["mvc_decoder.hidden_activation.weight"]
                )
                out["mvc_output"] = self.linear(x, "mvc_decoder.fc2")[..., 0]
        return out


@pytest.mark.slow
def test_every_head_and_form_agrees():
    wrong = []
    for config in (*FORMS, *MORE):
        model, given = handle(config), inputs(config)
        theirs = Published(scgpt.arrays(model), config)
        for generated in [{}, {"generated": GENERATED}][: 1 + config.flags]:
            with jax.default_matmul_precision("highest"):
                found = model.apply(**given, **generated)
            with torch.no_grad():
                tensors = {name: torch.as_tensor(value) for name, value in {**given, **generated}.items()}
                tensors = {name: x.long() if x.dtype == torch.int32 else x for name, x in tensors.items()}
                expected = theirs(**tensors)
            assert set(found) == set(expected)
            for name, value in expected.items():
                one, other = np.asarray(found[name]), value.numpy()
                if other.shape[:2] == PAD.shape:
                    one, other = one[~PAD], other[~PAD]
                size = np.abs(one - other).max() / max(1.0, np.abs(other).max())
                wrong += [f"{config.mvc} {config.values} {name}: {size:.1e}"] if not size <= 1e-5 else []
    assert not wrong


def test_statistics_of_batches_move_as_in_torch():
    config = CellEncoderConfig(**SIZES, num_batches=2, use_batch_labels=False, domain_norm="plain")
    model, given = handle(config), inputs(config)
    given |= {"padding_mask": np.zeros(PAD.shape, bool), "batch_labels": np.ones(2, np.int32)}
    module = CellEncoder(config)
    _, changed = module.apply(model.variables, **given, mutable=[STATISTICS], method="hidden_states")
    genes = module.apply(model.variables, jnp.asarray(given["gene_ids"]), method="gene_embeddings")
    x = np.array(
        genes + module.apply(model.variables, jnp.asarray(given["values"]), method="value_embeddings")
    )
    norm = torch.nn.BatchNorm1d(config.embed_dim, eps=6.1e-5, affine=False)
    before = model.variables[STATISTICS]["domain_norm"]
    norm.running_mean, norm.running_var = (
        torch.from_numpy(np.array(before[name][1])) for name in ("mean", "variance")
    )
    norm.train()(torch.from_numpy(x).transpose(1, 2))
    after = changed[STATISTICS]["domain_norm"]
    np.testing.assert_allclose(after["mean"][1], norm.running_mean.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after["variance"][1], norm.running_var.numpy(), rtol=1e-4, atol=1e-5)
