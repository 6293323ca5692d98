"""Rules over parameter paths, schedules and the optimiser."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sct.errors import ConfigError
from sct.nn.paths import flatten, resolve, unflatten
from sct.train.optim import OptimizerConfig, learning_rate, make_optimizer

PARAMS = {
    "params/stem/conv/kernel": jnp.full((2, 2), 2.0),
    "params/stem/conv/bias": jnp.ones(2),
    "params/head/kernel": jnp.ones((2, 2)),
}


def test_the_first_matching_rule_decides():
    rules = [("bias$", "b"), ("^params/stem/", "s"), (".*", "rest")]
    assert resolve(rules, PARAMS, "test") == {
        "params/stem/conv/kernel": "s",
        "params/stem/conv/bias": "b",
        "params/head/kernel": "rest",
    }


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ConfigError, match="'params/head/kernel'"):
        resolve([("stem", 1)], PARAMS, "test")


def test_a_rule_without_a_parameter_is_an_error():
    with pytest.raises(ConfigError, match="'haed'"):
        resolve([("haed", 1), (".*", 0)], PARAMS, "test")


def test_flatten_and_unflatten_are_inverse():
    nested = unflatten(PARAMS)
    assert nested["params"]["stem"]["conv"]["bias"].shape == (2,)
    assert flatten(nested).keys() == PARAMS.keys()


def test_the_paper_schedule():
    rate = learning_rate(OptimizerConfig(), 100_000)
    np.testing.assert_allclose([rate(0), rate(5_000), rate(10_000)], [5e-5, 7.5e-5, 1e-4], rtol=1e-5)
    np.testing.assert_allclose(rate(55_000), 5e-5, rtol=1e-4)  # half of the cosine
    np.testing.assert_allclose(rate(100_000), 0, atol=1e-9)


def test_adam_of_the_paper_is_optax_adam():
    config = OptimizerConfig(schedule="constant", warmup_steps=0)
    ours, _ = make_optimizer(config, 10, PARAMS)
    reference = optax.adam(1e-4)
    gradient = {path: jnp.cos(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape)
                for path, value in PARAMS.items()}  # fmt: skip
    mine, theirs = ours.init(PARAMS), reference.init(PARAMS)
    for _ in range(3):
        update, mine = ours.update(gradient, mine, PARAMS)
        expected, theirs = reference.update(gradient, theirs, PARAMS)
    for path in PARAMS:
        np.testing.assert_allclose(update[path], expected[path], rtol=1e-6)


def test_decay_and_rate_rules():
    config = OptimizerConfig(
        schedule="constant", warmup_steps=0, peak_lr=1.0, weight_decay=0.1,
        decay_rules=(("bias$", False), (".*", True)), lr_rules=(("head", 0.0), (".*", 0.5)),
    )  # fmt: skip
    optimizer, _ = make_optimizer(config, 10, PARAMS)
    zero = {path: jnp.zeros_like(value) for path, value in PARAMS.items()}
    update, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(update["params/stem/conv/kernel"], -0.5 * 0.1 * 2.0)
    np.testing.assert_allclose(update["params/stem/conv/bias"], 0)
    np.testing.assert_allclose(update["params/head/kernel"], 0)


@pytest.mark.parametrize(("field", "value"), [("schedule", "square"), ("peak_lr", 0.0)])
def test_bad_options(field, value):
    with pytest.raises(ConfigError, match=field.split("_")[0]):
        OptimizerConfig(**{field: value})
