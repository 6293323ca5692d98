"""The benchmark of questions: same cells for all, few shots by the loop of training, and what cannot be measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from configs.benchmark_zeromics import get_config
from sct.benchmarks import few_shot, instructions
from sct.benchmarks.few_shot import Shots, TuningOptions, drawn, tune
from sct.errors import ConfigError, DataError
from sct.eval import labels, marker_scores
from sct.nn.paths import flatten
from sct.tl.asking import asker_of
from sct.train.loop import train
from tests.data.text.test_instructions import ABSTRACT
from tests.data.text.toy_texts import GENES, vocabulary
from tests.quick import compiled_quickly
from tests.tl.test_asking import asked  # noqa: F401  (a model, as a fixture)

COLUMNS = {
    "cell_type": "cell_type",
    "disease": "disease",
    "pathways": "active",
    "normal": ("normal",),
    "rare_share": 0.1,
}


@pytest.fixture(autouse=True, scope="module")
def _quickly():
    with compiled_quickly():
        yield


def table(n: int = 90, seed: int = 0) -> ad.AnnData:
    """Cells whose type and disease show in their genes; a twentieth are of a rare type."""
    rng = np.random.default_rng(seed)
    types = rng.choice(["B cell", "T cell"], n).astype(object)
    types[:: n // 5] = "NK cell"
    counts = rng.poisson(1.5, (n, GENES)) + 1
    for number, name in enumerate(("B cell", "T cell", "NK cell")):
        counts[np.flatnonzero(types == name), 4 * number : 4 * number + 4] += 9
    obs = pd.DataFrame(
        {
            "cell_type": types, "disease": rng.choice(["normal", "glioma", "melanoma"], n),
            "donor": rng.choice(["a", "b", "c"], n),
        },
        index=[f"cell {i}" for i in range(n)],
    )  # fmt: skip
    return ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=list(vocabulary().ensembl_ids)),
        uns={"abstract": ABSTRACT},
    )  # fmt: skip


def config(output: Path, **changes: Any) -> dict[str, Any]:
    made = get_config()
    made.update(
        output=str(output), seeds=1, shots=(2,), tasks=("cta", "rci", "tcd"), batch_size=16,
        data={"disease": "disease", "rare_share": 0.1}, tuning={"steps": 2, "batch_size": 4},
    )  # fmt: skip
    made.update(changes)
    return made.to_dict()


def gene_sets(path: Path) -> Path:
    symbols = list(vocabulary().symbols)
    path.write_text(
        f"HALLMARK_ONE\tx\t{chr(9).join(symbols[:6])}\nHALLMARK_TWO\tx\t{chr(9).join(symbols[6:13])}\n"
    )
    return path


def test_all_methods_answer_about_the_same_cells(asked, tmp_path):  # noqa: F811
    pytest.importorskip("decoupler")
    pathways = {"file": str(gene_sets(tmp_path / "sets.gmt"))}
    given = config(tmp_path / "out", tasks=("cta", "rci", "tcd", "cpi"), pathways=pathways)
    cells = table()
    before, weights = cells.copy(), jax.device_get(flatten(asked.variables))
    reports = instructions.benchmark(given, cells, asked)
    assert [each.title.split(".")[0] for each in reports] == [
        f"cells: {name}" for name in instructions.TITLES.values()
    ]
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    shared = {instructions.ZERO, instructions.OTHERS, "2-shot", labels.LOGISTIC, f"{labels.LOGISTIC}, 2-shot"}
    for task in ("cta", "rci", "tcd", "cpi"):
        assert shared <= set(numbers[task])
    assert marker_scores.NAME in numbers["cta"]
    assert 'F1 of "Yes"' in numbers["rci"][instructions.ZERO]
    assert 'F1 of "tumour cell"' in numbers["tcd"][instructions.ZERO]
    # Types show in the genes: what looks at them is right, from two cells of each as well.
    for method in (labels.LOGISTIC, f"{labels.LOGISTIC}, 2-shot", marker_scores.NAME):
        assert numbers["cta"][method]["accuracy"][0] > 0.9, method
    assert all("of 30 cells" in each.title for each in reports)
    facts = json.loads((tmp_path / "out" / "report.json").read_text())["facts"]
    assert facts["cells"] == "cells (30 asked about, 60 to fit on)"
    # Neither the cells nor the model were changed.
    assert (cells.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    for path, value in flatten(asked.variables).items():
        np.testing.assert_array_equal(value, weights[path], err_msg=path)


def test_the_zero_shot_row_is_what_the_model_answers(asked, tmp_path):  # noqa: F811
    """By `sct.tl.annotate` of the same cells."""
    import sct

    cells = table(60)
    given = config(tmp_path / "out", tasks=("cta",), shots=())
    instructions.benchmark(given, cells, asked)
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]["cta"]
    study = instructions._Study(
        "cells", cells.copy(), {"abstract": ABSTRACT}, asked, asker_of(asked),
        instructions.build(
            instructions.InstructionBenchmarkOptions,
            {name: value for name, value in given.items() if name != "benchmark"}, "config",
        ),
    )  # fmt: skip
    part = cells[study.query].copy()
    assert set(study.query) | set(study.support) == set(range(60))
    assert not set(study.query) & set(study.support)
    sct.tl.annotate(part, asked, candidates=sorted(set(cells.obs["cell_type"])))
    right = (part.obs["sct_label"].astype(str) == part.obs["cell_type"].astype(str)).mean()
    assert numbers[instructions.ZERO]["accuracy"] == [pytest.approx(right)]


def test_groups_are_in_one_part_only(asked, tmp_path):  # noqa: F811
    cells = table()
    given = config(tmp_path / "out", tasks=("cta",), shots=())
    given["data"]["group_key"] = "donor"
    (made,) = instructions.benchmark(given, cells, asked)
    assert any("divided by donor" in note for note in made.notes)
    values = {name: value for name, value in given.items() if name != "benchmark"}
    options = instructions.build(instructions.InstructionBenchmarkOptions, values, "config")
    study = instructions._Study(
        "cells", cells.copy(), {"abstract": ABSTRACT}, asked, asker_of(asked), options
    )
    donors = cells.obs["donor"].to_numpy()
    assert not set(donors[study.query]) & set(donors[study.support])


def _shots(cells: ad.AnnData, task: str, rows: np.ndarray) -> Shots:
    said = {
        "cta": {"cell_types": ["B cell", "T cell", "NK cell"]}, "cpi": {"gene_sets": ["one", "two"]},
    }[task]  # fmt: skip
    return Shots(sp.csr_matrix(cells.X)[rows], cells.obs.iloc[rows], {"abstract": ABSTRACT, **said})


@pytest.mark.parametrize("task", ["cta", "cpi"])
def test_a_few_cells_tune_adapters_and_tokenizer_alone(asked, task, monkeypatch):  # noqa: F811
    """The universal adapter always, of the others that of the task."""
    cells = table()
    cells.obs["active"] = np.where(cells.obs["cell_type"] == "B cell", "one", "one, two")
    rows = np.arange(0, 90, 9)
    losses: list[float] = []

    def watched(made: Any, loop: Any, optimizer: Any, folder: Path, start: Any) -> Any:
        result = train(made, dataclasses.replace(loop, log_every=10), optimizer, folder, start)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.extend(json.loads(line)["train/loss"] for line in lines)
        return result

    monkeypatch.setattr(few_shot, "train", watched)
    asker = asker_of(asked)
    options = TuningOptions(steps=40, learning_rate=2e-2, batch_size=5)
    tuned = tune(asked, asker, task, _shots(cells, task, rows), COLUMNS, options, 0)
    before, after = flatten(asker.variables), flatten(tuned.variables)
    assert set(before) == set(after)
    members = asked.data["members"]
    rank = next(value for path, value in before.items() if path.endswith("lora_a")).shape[-1] // len(members)
    changed = set()
    for path, value in before.items():
        same = np.array_equal(value, after[path])
        if path.startswith(("params/cells/", "params/llm/")):
            assert same, path
        elif path.startswith("params/tokenizer/"):
            assert not same, path
        elif path.endswith("lora_b"):
            # Momentum and decay act on what has a gradient alone: the others' stays zero.
            moved = np.abs(np.asarray(after[path]) - np.asarray(value))
            by_rank = moved.max(axis=tuple(i for i in range(moved.ndim) if i != moved.ndim - 2))
            changed |= {members[i // rank] for i in np.flatnonzero(by_rank > 1e-3)}
    assert changed == {"universal", *({task} & set(members))}
    assert losses[-1] < losses[0] - 1


def test_cells_are_drawn_of_each_answer_or_in_all():
    answers = ["", "a", "b", "a", "a", "", "b", "c"]
    chosen = drawn(answers, 2, True, 0)
    assert sorted(answers[i] for i in chosen) == ["a", "a", "b", "b", "c"]
    assert len(set(chosen.tolist())) == 5
    assert drawn(answers, 3, False, 0).tolist() == drawn(answers, 3, False, 0).tolist()
    assert all(answers[i] for seed in range(5) for i in drawn(answers, 3, False, seed))
    assert {tuple(drawn(answers, 1, True, seed)) for seed in range(20)} != {tuple(drawn(answers, 1, True, 0))}
    with pytest.raises(ConfigError, match="no cell of the part to tune on has an answer"):
        drawn(["", ""], 1, True, 0)


def test_what_cannot_be_measured_is_said(asked, tmp_path):  # noqa: F811
    cells = table()
    given = config(tmp_path / "out", tasks=("cta", "cpi"), shots=())
    reports = instructions.benchmark(given, cells, asked)
    assert "name a GMT file" in reports[1].rows[0][1]
    nameless = cells.copy()
    del nameless.uns["abstract"]
    with pytest.raises(ConfigError, match=r"cells has no abstract: put it into adata.uns\['abstract'\]"):
        instructions.benchmark(given, nameless, asked)
    for changes, words in (
        ({"tasks": ("abc",)}, "choose from cta, rci, tcd, cpi"),
        ({"shots": (0,)}, "zero shots are measured always"),
        ({"seeds": 0}, "seeds is 0"),
        ({"tuning": {"steps": 0}}, "tuning.steps is 0"),
        ({"data": {"share": 1.5}}, "data.share is 1.5"),
        ({"data": {"group_key": "patient"}}, "no column 'patient'"),
    ):
        with pytest.raises((ConfigError, DataError), match=words):
            instructions.benchmark(config(tmp_path / "out", **changes), cells, asked)
    with pytest.raises(ConfigError, match="say which model to ask"):
        instructions.benchmark(given, cells)
    with pytest.raises(ConfigError, match="say what to ask about"):
        instructions.benchmark(given, None, asked)
    assert few_shot.TuningOptions().steps == get_config().tuning.steps
