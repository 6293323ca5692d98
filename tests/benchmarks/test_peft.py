"""The benchmark of fine-tuning: its tables, trainings that diverge, and cells that cannot be compared."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from sct.benchmarks import peft
from sct.errors import DataError, DivergedError
from sct.eval.labels.measures import MAJORITY
from tests.train import tuned_models

CONFIG = runpy.run_path(str(Path(__file__).resolve().parents[2] / "configs" / "benchmark_peft.py"))


def config(output: Path, **changes):
    values = CONFIG["get_config"]("quick").to_dict()
    values.pop("benchmark")
    values["data"]["donor_key"] = "donor"
    values["peft"]["rank"] = 2
    return {**values, "output": str(output), "epochs": 1, "methods": ("classifier", "lora"), **changes}


@pytest.mark.slow
def test_a_training_that_diverges_is_noted_and_the_others_are_compared(tmp_path, monkeypatch):
    real, asked, kept, made = peft.tune, [], [], []

    def tune(model, cells, method, config, options, **more):
        asked.append((method.method, options.learning_rate, options.seed, config.report_baselines))
        if options.learning_rate == 0.02 and method.method == "classifier":
            raise DivergedError("the loss of step 1 is not finite.")
        if not made:  # one training is enough to make tables of
            made.append(real(model, cells, method, config, options, **more))
        tuned, result, numbers = made[0]
        return tuned, result, {**numbers, "validation_loss": 1 / options.learning_rate}

    def keep(reports, folder, facts, numbers):
        kept.append(len(numbers["trainings"]))

    monkeypatch.setattr(peft, "tune", tune)
    monkeypatch.setattr(peft.report_folder, "keep", keep)
    monkeypatch.setattr(peft.embeddings, "umap", lambda vectors, seed: vectors[:, :2])
    adata, model = tuned_models.cells(90), tuned_models.zeromics()
    output = tmp_path / "out"
    changes = {"seeds": 2, "learning_rates": (0.02, 1e-2)}
    table, classes = peft.benchmark(config(output, **changes), adata, model)
    # The rate is chosen with the first seed, and what needs no training is measured once.
    assert asked[:3] == [
        ("classifier", 0.02, 0, True), ("classifier", 1e-2, 0, True), ("classifier", 1e-2, 1, False),
    ]  # fmt: skip
    assert asked[3:] == [("lora", 0.02, 0, False), ("lora", 1e-2, 0, False), ("lora", 0.02, 1, False)]
    assert kept == [1, 2, 3, 4, 5, 6]
    rows = {row["method"]: row for _, row in table.records()}
    for name in ("classifier only", "LoRA"):
        assert len(rows[name]["accuracy"]) == 2
    assert (rows["classifier only"]["learning rate"], rows["LoRA"]["learning rate"]) == ("0.01", "0.02")
    assert rows[MAJORITY]["trained parameters"] == "-"
    assert any("native" in name for name in rows)
    assert any("classifier only, seed 0, learning rate 0.02" in note for note in table.notes)
    assert {row["cell type"] for _, row in classes.records()} == set(tuned_models.NAMES)
    trainings = json.loads((output / "results.json").read_text())["trainings"]
    assert [bool(each.get("diverged")) for each in trainings] == [True, *[False] * 5]


@pytest.mark.slow
def test_nothing_to_compare_is_refused(tmp_path, monkeypatch):
    adata, model = tuned_models.cells(), tuned_models.zeromics()
    adata.obs["fold"] = "train"

    def never(*arguments, **options):
        raise DivergedError("the loss of step 1 is not finite.")

    monkeypatch.setattr(peft, "tune", never)
    data = {**config(tmp_path)["data"], "split_key": "fold"}
    with pytest.raises(DataError, match="no test cells"):
        peft.benchmark(config(tmp_path / "a", data=data), adata, model)
    with pytest.raises(DivergedError, match="learning_rates"):
        peft.benchmark(config(tmp_path / "b"), adata, model)
