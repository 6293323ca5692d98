"""The section of adapters of a configuration: kinds that train, resume bit by bit, and what is refused."""

from __future__ import annotations

import json

import chex
import jax
import numpy as np
import pytest

import sct
from sct.errors import ConfigError
from sct.models.adapters import adapters_of
from sct.nn.paths import flatten
from sct.train.experiment import run
from tests.train.conftest import merged

KINDS = {
    "low_rank": {"rank": 2, "targets": ["attention/query$", "attention/value$"]},
    "bottleneck": {"width": 4, "layers": [0]},
    "prefix": {"length": 3},
}


@pytest.fixture(scope="module")
def parent(store, tmp_path_factory):
    """Run of the model to start from, and its configuration."""
    from tests.train.conftest import CONFIG

    folder = tmp_path_factory.mktemp("parent") / "run"
    config = merged(CONFIG, data__store=str(store), model__num_downsamples=1, train__steps=5)
    run(config, folder)
    return folder, config


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_and_resume_as_one_run(parent, kind, tmp_path):
    folder, config = parent
    before = sct.load(folder)
    config = merged(
        config, init_from=str(folder), adapters={"kind": kind, **KINDS[kind]}, train__steps=10,
        optimizer__weight_decay=0.1,
    )  # fmt: skip
    whole = run(config, tmp_path / "whole")
    assert run(merged(config, train__stop_at=5), tmp_path / "parts").reason == "stop_at"
    chex.assert_trees_all_equal(whole.state, run(config, tmp_path / "parts").state, strict=True)
    model = sct.load(tmp_path / "whole" / "model")
    chex.assert_trees_all_equal(model.variables["params"], before.variables["params"])
    found = list(adapters_of(model.variables))
    assert found
    assert {each.name for _, each, _ in found} == {kind.replace("_", "-")}
    fresh = jax.eval_shape(lambda: before.variables["params"])
    assert set(flatten(fresh)) == set(flatten(model.variables["params"]))
    tokens = np.random.default_rng(0).integers(0, 5, (1, 4, model.config.num_genes), dtype=np.uint8)
    tuned, plain = (each.apply(tokens=tokens, outputs=["logits"])["logits"] for each in (model, before))
    assert np.abs(np.asarray(tuned) - np.asarray(plain)).max() > 1e-6
    # Other options of the adapters are another run, and none at all another one still.
    other = {"low_rank": "rank", "bottleneck": "width", "prefix": "length"}[kind]
    for changed in ({**config["adapters"], other: 7}, {}):
        with pytest.raises(ConfigError, match=r"adapters\."):
            run({**config, "adapters": changed}, tmp_path / "whole")
    # A model with adapters goes on with its own, or not at all.
    again = merged(config, init_from=str(tmp_path / "whole"), train__steps=2)
    run(again, tmp_path / "again")
    with pytest.raises(ConfigError, match=r"has adapters.*adapters\.kind"):
        run({**again, "adapters": {}}, tmp_path / "none")
    wrong = next(name for name in KINDS if name != kind)
    with pytest.raises(ConfigError, match=wrong.replace("_", "-")):
        run({**again, "adapters": {"kind": wrong}}, tmp_path / "wrong")


def test_layers_that_the_model_lacks_are_refused_before_anything_is_kept(parent, tmp_path):
    folder, config = parent
    for adapters, words in (
        ({"kind": "low_rank", "targets": ["rings"]}, "'rings', which matches no dense layer"),
        ({"kind": "prefix", "layers": [99]}, "`layers` lists .*99"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(merged(config, init_from=str(folder), adapters=adapters), tmp_path / "run")
        assert not (tmp_path / "run" / "config.json").exists()
    assert json.loads((folder / "config.json").read_text())["family"] == "sct"
