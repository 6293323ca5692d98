"""Mode generate: from configuration to report, and what is refused."""

from __future__ import annotations

import io
import math
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from sct.errors import ConfigError, MissingExtraError, SctError
from sct.models import registry
from sct.speed import generation, report
from sct.speed.job import MODES, SpeedJob, SpeedOptions
from sct.speed.run import measure
from sct.weights.pretrained import expected_shapes
from tests.speed.conftest import CONFIG as CELLS
from tests.train.conftest import merged

CONFIG: dict[str, Any] = {
    "family": "gpt2", "task": "cell_sentences",
    "model": {"vocab_size": 50, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "max_length": 32},
    "data": {"length": 32}, "objective": {}, "optimizer": {}, "train": {"batch_size": 2},
}  # fmt: skip
OPTIONS = SpeedOptions("generate", steps=3)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few tokens, a small matrix, and no other library beside it."""
    for name, value in {"PROMPT": 8, "NEW": 5, "_CEILING_BYTES": 1 << 18}.items():
        monkeypatch.setattr(generation, name, value)

    def missing(*given):
        raise MissingExtraError("torch and transformers are not installed.")

    monkeypatch.setattr(generation, "_transformers", missing)


@pytest.fixture(scope="module")
def asked():
    """What was asked of `generate` in the measurement below."""
    return []


@pytest.mark.slow
def test_a_measurement_from_configuration_to_report(asked, monkeypatch):
    original = generation.generate

    def recording(model, prompts, options, **others):
        made = original(model, prompts, options, **others)
        asked.append((model, prompts, options, others, [each.ids for each in made]))
        return made

    monkeypatch.setattr(generation, "generate", recording)
    found = measure(CONFIG, OPTIONS, apart=False)
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    assert all(math.isfinite(value) and value > 0 for value in numbers.values()), numbers
    assert found["mode"] == "generate"
    config = registry.model_config("gpt2", CONFIG["model"])
    assert found["parameters"] == sum(leaf.size for leaf in expected_shapes("gpt2", config).values())
    rate = found["batch_size"] * found["new_tokens"] / found["step_seconds"]
    assert found["generated_tokens_per_s"] == pytest.approx(rate)
    assert found["weights_bytes_per_s"] == pytest.approx(4 * found["parameters"] * 5 / found["step_seconds"])
    assert found["utilisation_of_memory"] == pytest.approx(
        found["weights_bytes_per_s"] / found["memory_ceiling_bytes_per_s"]
    )
    assert len(found["step_seconds_all"]) == 3
    assert found["check"]["differences"]["scores with a cache"] < generation.LIMIT
    assert found["transformers"] == "not installed"
    # Every timed call makes as many tokens as are counted, whatever they are, drawn and not.
    assert {each[2].temperature for each in asked} == {0.0, 0.7}
    for _, prompts, options, others, made in asked:
        assert (options.max_new_tokens, len(prompts), others["stop"]) == (5, generation.ROWS, ())
        assert all(len(ids) == 5 for ids in made)
        assert {len(prompt) for prompt in prompts} >= {4, 8}
    said = io.StringIO()
    Console(file=said, width=200).print(report.table(found))
    assert "generated tokens, greedy" in said.getvalue()
    assert "8 prompts of up to 8 tokens, 5 generated tokens each" in said.getvalue()
    assert "scores with a cache" in " ".join(report.notes(found))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"), [("neox", {"rotary_fraction": 0.5}), ("llama", {"num_kv_heads": 1})]
)
def test_reading_with_a_cache_is_compared_for_every_family(family, changes):
    config = {"family": family, "model": {**CONFIG["model"], **changes}}
    model = generation.model_of(SpeedJob({**CONFIG, **config}, OPTIONS, None))
    assert generation.check(model)["differences"]["scores with a cache"] < 1e-5


def wrong(part: int, change: Any) -> Any:
    original = generation.extend

    def extend(*given, **options):
        made = list(original(*given, **options))
        if not options.get("first"):
            made[part] = change(made[part])
        return tuple(made)

    return extend


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        (0, lambda hidden: hidden * 1.01),
        (1, lambda cache: cache._replace(positions=cache.positions + 1)),
        (1, lambda cache: cache._replace(values=tuple(x * 1.05 for x in cache.values))),
        (1, lambda cache: cache._replace(filled=cache.filled.at[:, 3].set(False))),
        (0, lambda hidden: hidden * np.nan),
    ],
    ids=["scores", "positions", "values", "filled", "nan"],
)
def test_no_time_is_given_for_a_cache_that_is_wrong(monkeypatch, change):
    monkeypatch.setattr(generation, "extend", wrong(*change))

    def refused(*given, **options):
        raise AssertionError("timed")

    monkeypatch.setattr(generation, "timed", refused)
    with pytest.raises(SctError, match="cache"):
        measure(CONFIG, OPTIONS, apart=False)


def test_a_model_with_too_few_positions_is_refused(monkeypatch):
    monkeypatch.setattr(generation, "NEW", 25)
    with pytest.raises(ConfigError, match=r"--config\.model\.max_length"):
        measure(CONFIG, OPTIONS, apart=False)


@pytest.mark.parametrize("family", ["sct", "bert"])
def test_models_that_write_nothing_are_refused(family):
    config = CELLS if family == "sct" else {**CONFIG, "family": "bert"}
    with pytest.raises(
        ConfigError, match=f"generates text, but the family is '{family}': .* gpt2, neox, llama"
    ):
        measure(config, OPTIONS, apart=False)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "generate"])
@pytest.mark.parametrize("cells", [0, 100])
def test_other_modes_refuse_models_of_text(mode, cells):
    with pytest.raises(
        ConfigError, match=f"--mode={mode} cannot measure the task 'cell_sentences'.*generate"
    ):
        measure(CONFIG, SpeedOptions(mode, steps=3, cells=cells), apart=False)


def test_a_model_to_start_from_is_measured_itself(tmp_path):
    made = generation.model_of(SpeedJob(CONFIG, OPTIONS, None))
    made.save_pretrained(tmp_path / "model")
    config = {**merged(CONFIG, model__embed_dim=64), "init_from": str(tmp_path / "model")}
    loaded = generation.model_of(SpeedJob(config, OPTIONS, None))
    assert loaded.config == made.config
    for one, other in zip(jax.tree.leaves(loaded.variables), jax.tree.leaves(made.variables), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_vocabulary_left_to_the_tokenizer_is_that_of_the_family():
    config = merged(CONFIG, model__vocab_size=0, model__embed_dim=2, model__num_layers=1)
    model = generation.model_of(SpeedJob(config, OPTIONS, None))
    assert model.config.vocab_size == 50_257
