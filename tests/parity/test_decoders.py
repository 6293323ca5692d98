"""GPT-2, GPT-NeoX and LLaMA beside `transformers`: logits, gradients, export."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sct
from sct.models import registry
from sct.nn.paths import flatten
from sct.weights.hf import folder as hf

from . import foreign

torch = pytest.importorskip("torch", reason=foreign.REASON.format("torch"))
transformers = pytest.importorskip("transformers", reason=foreign.REASON.format("transformers"))
F = torch.nn.functional


def loss_and_logits(model, given):
    """Mean loss of the next tokens that are not padding, its gradients by variable, and logits."""
    module = registry.family(model.family).module(model.config)
    is_target = given["attention_mask"][:, :-1] * given["attention_mask"][:, 1:]

    @jax.jit
    def compute(variables):
        def loss(variables):
            logits = module.apply(variables, **given)["logits"]
            scores = jax.nn.log_softmax(logits[:, :-1])
            chosen = jnp.take_along_axis(scores, jnp.asarray(given["input_ids"])[:, 1:, None], axis=-1)[
                ..., 0
            ]
            return -(chosen * is_target).sum() / is_target.sum(), logits

        return jax.value_and_grad(loss, has_aux=True)(variables)

    (value, logits), gradients = compute(model.variables)
    return float(value), gradients, np.asarray(logits)


def foreign_loss(theirs, given):
    """Loss and logits of `transformers`; gradients are left in its parameters."""
    logits = foreign.outputs(theirs, given).logits
    ids, mask = torch.as_tensor(given["input_ids"]), torch.as_tensor(given["attention_mask"])
    is_target = (mask[:, :-1] * mask[:, 1:]).float()
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    loss = (each * is_target).sum() / is_target.sum()
    loss.backward()
    return float(loss.detach()), logits.detach().numpy()


def check_gradients(theirs, gradients, of):
    """Gradients of all parameters, by the names of `transformers`, within 1e-3 of their norms."""
    ours = hf.tensors(dataclasses.replace(of, variables=gradients))
    parameters = {
        name.replace("lm_head", "embed_out") if of.family == "neox" else name: p.grad
        for name, p in theirs.named_parameters()
    }
    assert parameters.keys() == ours.keys()
    total = np.sqrt(sum(float((g**2).sum()) for g in parameters.values()))
    for name, gradient in parameters.items():
        difference = np.linalg.norm(np.asarray(ours[name]) - gradient.numpy())
        # Some are zero but for rounding: what a bias of keys adds to all scores of a query has no effect.
        assert difference <= 1e-3 * float(torch.linalg.norm(gradient)) + 1e-6 * total, name


@pytest.mark.parametrize(("kind", "name"), foreign.CASES)
def test_logits_gradients_and_export_are_those_of_transformers(kind, name, tmp_path):
    theirs = foreign.make(kind, name)
    theirs.save_pretrained(tmp_path / "theirs")
    model = sct.load(tmp_path / "theirs")
    assert model.family == kind
    given = foreign.inputs(model.config.vocab_size)
    real = given["attention_mask"] == 1
    value, gradients, logits = loss_and_logits(model, given)
    expected, their_logits = foreign_loss(theirs, given)
    assert their_logits[real].std() > 0.5, "weights so small that nothing is compared"
    np.testing.assert_allclose(logits[real], their_logits[real], rtol=1e-4, atol=1e-4)
    assert value == pytest.approx(expected, rel=1e-5)
    check_gradients(theirs, gradients, model)

    hf.save(model, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    foreign.same_weights(again, theirs)
    with torch.no_grad():
        logits = foreign.outputs(again, given).logits.numpy()
    np.testing.assert_allclose(logits[real], their_logits[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
def test_padding_counts_for_nothing_with_positions_counted(kind, tmp_path):
    """`transformers` sees each text by itself; here they share a padded batch, and positions are not given."""
    theirs = foreign.make(kind)
    theirs.save_pretrained(tmp_path)
    given = foreign.inputs(61)
    logits = hf.load(tmp_path).apply(input_ids=given["input_ids"], attention_mask=given["attention_mask"])[
        "logits"
    ]
    for row, real in enumerate(given["attention_mask"] == 1):
        with torch.no_grad():
            alone = theirs(torch.as_tensor(given["input_ids"][row, real][None])).logits[0].numpy()
        np.testing.assert_allclose(logits[row, real], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "plain"), ("neox", "plain"), ("llama", "llama3")])
def test_bfloat16_is_near_float32(kind, name, tmp_path):
    theirs = foreign.make(kind, name)
    theirs.save_pretrained(tmp_path)
    model = hf.load(tmp_path, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in flatten(model.variables).values()} == {"bfloat16"}
    half = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype="bfloat16"))
    given = foreign.inputs(61)
    logits = half.apply(**given)["logits"]
    assert logits.dtype == jnp.float32
    real = given["attention_mask"] == 1
    with torch.no_grad():
        expected = foreign.outputs(theirs, given).logits.numpy()[real]
    error = np.asarray(logits)[real] - expected
    assert np.sqrt((error**2).mean()) < 0.05 * expected.std()
