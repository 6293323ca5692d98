"""BERT beside `transformers`: all outputs, gradients, export with and without heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sct
from sct.errors import CheckpointError
from sct.models.bert import Bert
from sct.nn.paths import flatten
from sct.weights.hf import folder as hf

from . import foreign

torch = pytest.importorskip("torch", reason=foreign.REASON.format("torch"))
transformers = pytest.importorskip("transformers", reason=foreign.REASON.format("transformers"))


def inputs(config):
    """Padded texts of two types; theirs takes the first token as the first of the row, so nothing is on the left."""
    given = foreign.inputs(config.vocab_size)
    types = np.random.default_rng(1).integers(0, config.num_types, given["input_ids"].shape)
    return {**given, "token_type_ids": types}


@pytest.mark.parametrize("name", foreign.BERT)
def test_outputs_and_gradients_are_those_of_transformers(name, tmp_path):
    theirs = foreign.make("bert", name)
    theirs.save_pretrained(tmp_path)
    model = sct.load(tmp_path)
    assert (model.family, model.config.pooler, model.config.mlm_head) == ("bert", True, True)
    given = inputs(model.config)
    real = given["attention_mask"] == 1
    from_left = np.array([0, 2])  # rows whose first token is not padding
    weights = np.random.default_rng(2).normal(size=(*real.shape, model.config.vocab_size)).astype(np.float32)
    weights *= real[..., None] / weights.size

    @jax.jit
    def compute(variables):
        def loss(variables):
            out = Bert(model.config).apply(variables, **given)
            return (out["logits"] * weights).sum() + out["pooled"][from_left].sum(), out

        return jax.value_and_grad(loss, has_aux=True)(variables)

    (_, ours), gradients = compute(model.variables)
    expected = foreign.outputs(theirs, given, output_hidden_states=True)
    pooled = theirs.bert.pooler(expected.hidden_states[-1])
    ((expected.prediction_logits * torch.as_tensor(weights)).sum() + pooled[from_left].sum()).backward()
    logits = expected.prediction_logits.detach().numpy()
    assert logits[real].std() > 0.5, "weights so small that nothing is compared"
    np.testing.assert_allclose(ours["logits"][real], logits[real], rtol=1e-4, atol=1e-4)
    hidden = expected.hidden_states[-1].detach().numpy()
    np.testing.assert_allclose(ours["hidden"][real], hidden[real], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours["pooled"][from_left], pooled.detach()[from_left], rtol=1e-4, atol=1e-4)

    found = hf.tensors(dataclasses.replace(model, variables=gradients))
    parameters = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    assert parameters.keys() == found.keys()
    total = np.sqrt(sum(float((g**2).sum()) for g in parameters.values()))
    for key, gradient in parameters.items():
        difference = np.linalg.norm(np.asarray(found[key]) - gradient.numpy())
        assert difference <= 1e-3 * float(torch.linalg.norm(gradient)) + 1e-6 * total, key


@pytest.mark.parametrize("name", foreign.BERT)
def test_export_loads_back_with_equal_outputs(name, tmp_path):
    theirs = foreign.make("bert", name, "BertForMaskedLM")
    theirs.save_pretrained(tmp_path / "theirs")
    model = sct.load(tmp_path / "theirs")
    assert (model.config.pooler, model.config.mlm_head) == (False, True)
    with pytest.raises(CheckpointError, match=r"'pooled'.*hidden, logits"):
        model.apply(input_ids=np.zeros((1, 2), np.int32), outputs=["pooled"])
    hf.save(model, tmp_path / "ours")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    if name == "untied":  # its other bias is no parameter of the model
        again.cls.predictions.bias.data = theirs.cls.predictions.bias.data
    foreign.same_weights(again, theirs)
    ids = inputs(model.config)["input_ids"]
    with torch.no_grad():
        expected = again(torch.as_tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model.apply(input_ids=ids)["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooler", [True, False])
def test_the_encoder_alone(pooler, tmp_path):
    """Files of a model without heads lack the prefix."""
    torch.manual_seed(0)
    theirs = transformers.BertModel(foreign.make("bert").config, add_pooling_layer=pooler).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = sct.load(tmp_path / "theirs")
    assert (model.config.pooler, model.config.mlm_head) == (pooler, False)
    ids = inputs(model.config)["input_ids"]
    ours = model.apply(input_ids=ids)
    assert ours.keys() == ({"hidden", "pooled"} if pooler else {"hidden"})
    hf.save(model, tmp_path / "ours")
    again = transformers.BertModel.from_pretrained(tmp_path / "ours", add_pooling_layer=pooler)
    foreign.same_weights(again, theirs)
    with torch.no_grad():
        expected = again(torch.as_tensor(ids))
    np.testing.assert_allclose(ours["hidden"], expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    if pooler:
        np.testing.assert_allclose(ours["pooled"], expected.pooler_output, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_float32(tmp_path):
    foreign.make("bert").save_pretrained(tmp_path)
    model, half = sct.load(tmp_path), sct.load(tmp_path, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in flatten(half.variables).values()} == {"bfloat16"}
    half = dataclasses.replace(half, config=dataclasses.replace(half.config, dtype="bfloat16"))
    ids = inputs(model.config)["input_ids"]
    expected, found = (np.asarray(m.apply(input_ids=ids)["logits"]) for m in (model, half))
    assert found.dtype == jnp.float32
    assert np.sqrt(((found - expected) ** 2).mean()) < 0.05 * expected.std()
