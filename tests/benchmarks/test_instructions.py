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
from sct.benchmarks.zero_shot import read_options
from sct.data.cell_records import cell_records
from sct.data.text.cell_sentence import cell_keys
from sct.data.text.prompts import task_code, task_name
from sct.errors import ConfigError, DataError
from sct.eval.labels import marker_scores, pathways
from sct.eval.labels import measures as labels
from sct.inference.asking import instruction_model_of
from sct.nn.paths import flatten
from sct.train.loop import train
from tests.data.text.test_instructions import ABSTRACT
from tests.data.text.toy_texts import GENES, vocabulary
from tests.tl.test_asking import asked  # noqa: F401  (a model, as a fixture)

COLUMNS = {
    "cell_type": "cell_type",
    "disease": "disease",
    "pathways": "active",
    "normal": ("normal",),
    "rare_share": 0.1,
}


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


def study_of(cells: ad.AnnData, model: Any, place: Path, **data: Any) -> Any:
    """A study as the benchmark makes it."""
    given = config(place, tasks=("cta",))
    given["data"].update(data)
    values = {name: value for name, value in given.items() if name != "benchmark"}
    options, _ = read_options(instructions.InstructionBenchmarkOptions, values, cells, False)
    return instructions._Study(
        "cells", cells.copy(), {}, model, instruction_model_of(model), options, None, place
    )


def gene_sets(path: Path) -> Path:
    symbols = list(vocabulary().symbols)
    path.write_text(
        f"HALLMARK_ONE\tx\t{chr(9).join(symbols[:6])}\nHALLMARK_TWO\tx\t{chr(9).join(symbols[6:13])}\n"
    )
    return path


TASKS = ("cta", "rci", "tcd", "cpi")


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [("cta", "pathway"), TASKS], ids=["two", "all"])
def test_all_methods_answer_about_the_same_cells(asked, tmp_path, tasks):  # noqa: F811
    pytest.importorskip("decoupler")
    pathways = {"file": str(gene_sets(tmp_path / "sets.gmt"))}
    given = config(tmp_path / "out", tasks=tasks, pathways=pathways)
    cells = table()
    before, weights = cells.copy(), jax.device_get(flatten(asked.variables))
    reports = instructions.benchmark(given, cells, asked)
    assert [each.title.split(".")[0] for each in reports] == [
        f"cells: {name}" for task, name in instructions.TITLES.items() if task in map(task_code, tasks)
    ]
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    shared = {instructions.ZERO, instructions.OTHERS, "2-shot", labels.LOGISTIC, f"{labels.LOGISTIC}, 2-shot"}
    assert set(numbers) == {task_name(task) for task in tasks}
    assert not set(numbers) & set(TASKS)
    for measured in numbers.values():
        assert shared <= set(measured)
    assert marker_scores.NAME in numbers["cell_type"]
    for task, answer in (("rci", "Yes"), ("tcd", "tumor cell")):
        assert (
            task not in map(task_code, tasks)
            or f'F1 of "{answer}"' in numbers[task_name(task)][instructions.ZERO]
        )
    # Types show in the genes: what looks at them is right, from two cells of each as well.
    for method in (labels.LOGISTIC, f"{labels.LOGISTIC}, 2-shot", marker_scores.NAME):
        assert numbers["cell_type"][method]["accuracy"][0] > 0.9, method
    assert all("of 30 cells" in each.title for each in reports)
    facts = json.loads((tmp_path / "out" / "report.json").read_text())["facts"]
    assert facts["cells"] == "cells (30 asked about, 60 to fit on)"
    # Neither the cells nor the model were changed.
    assert (cells.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    for path, value in flatten(asked.variables).items():
        np.testing.assert_array_equal(value, weights[path], err_msg=path)


@pytest.mark.slow
def test_the_zero_shot_row_is_what_the_model_answers(asked, tmp_path):  # noqa: F811
    """By `sct.tl.annotate` of the same cells."""
    import sct

    cells = table(60)
    given = config(tmp_path / "out", tasks=("cta",), shots=())
    instructions.benchmark(given, cells, asked)
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]["cell_type"]
    study = study_of(cells, asked, tmp_path)
    part = cells[study.query].copy()
    assert set(study.query) | set(study.support) == set(range(60))
    assert not set(study.query) & set(study.support)
    sct.tl.annotate(part, asked, candidates=sorted(set(cells.obs["cell_type"])))
    right = (part.obs["sct_label"].astype(str) == part.obs["cell_type"].astype(str)).mean()
    assert numbers[instructions.ZERO]["accuracy"] == [pytest.approx(right)]


@pytest.mark.slow
def test_groups_are_in_one_part_only(asked, tmp_path):  # noqa: F811
    cells = table()
    given = config(tmp_path / "out", tasks=("cta",), shots=())
    given["data"]["group_key"] = "donor"
    (made,) = instructions.benchmark(given, cells, asked)
    assert any("split by donor" in note for note in made.notes)
    study = study_of(cells, asked, tmp_path, group_key="donor")
    donors = cells.obs["donor"].to_numpy()
    assert not set(donors[study.query]) & set(donors[study.support])


class Oracle:
    """Answers what the cells themselves say, half of them where it was not tuned; keeps what it was asked."""

    def __init__(self, cells: ad.AnnData, real: Any, tuned_on: frozenset[int] = frozenset()):
        self.table, self.real, self.tuned_on, self.seen = cells, real, tuned_on, []
        self.cells, self.known, self.prompts, self.config = real.cells, real.known, real.prompts, real.config

    def score(self, task, records, abstracts, candidates, *, keys, seed, templates, batch_size, cells=None):
        names = self.table.obs_names
        rows = {int(key): i for i, key in enumerate(cell_keys(names))}
        own = [rows[key] for key in keys]
        expected = cell_records(sp.csr_matrix(self.table.X)[own], self.cells, self.known)
        for name, value in expected.items():
            np.testing.assert_array_equal(records[name], value)  # each question with its own cell
        self.seen.append((task, own, cells, list(templates), seed))
        looked = own if cells is None else [own[i] for i in cells]
        column = {"cta": "cell_type", "rci": "rare", "tcd": "told", "cpi": "active"}[task]
        truth = self.table.obs[column].to_numpy(object)
        found = np.full((len(own), len(candidates)), 0.01)
        for i, row in enumerate(looked):
            for j, name in enumerate(candidates):
                right = name in str(truth[row]).split(", ")
                # Untuned, it knows every other cell alone.
                found[i, j] += right and (bool(self.tuned_on) or row % 2 == 0)
        return np.log(found / found.sum(axis=1, keepdims=True))


@pytest.fixture
def watched(asked, monkeypatch):  # noqa: F811
    """Cells whose answers an oracle reads, and what it was asked and tuned on."""
    cells = table(120)
    types = cells.obs["cell_type"]
    cells.obs["rare"] = np.where(types == "NK cell", "Yes", "No")
    # Three diseases that together are more probable than any one answer.
    cells.obs["told"] = cells.obs["disease"].astype(str).replace("normal", "normal cell")
    cells.obs["active"] = ""
    oracle, tunings = Oracle(cells, instruction_model_of(asked)), []
    monkeypatch.setattr(instructions.families, "require", lambda model, name: oracle)

    def tuned(model, instruction_model, task, shots, columns, options, seed, place):
        assert instruction_model is oracle
        names = shots.obs.index
        rows = frozenset(cells.obs_names.get_indexer(names).tolist())
        np.testing.assert_array_equal(shots.counts.toarray(), sp.csr_matrix(cells.X)[sorted(rows)].toarray())
        made = Oracle(cells, oracle, rows)
        tunings.append((task, rows, made, seed))
        return made

    monkeypatch.setattr(instructions, "tune", tuned)
    return cells, oracle, tunings


@pytest.mark.slow
def test_every_row_is_of_the_right_model_and_cells(asked, watched, tmp_path):  # noqa: F811
    cells, oracle, tunings = watched
    given = config(tmp_path / "out", seeds=2, shots=(1, 3))
    instructions.benchmark(given, cells, asked)
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    columns = {"cta": "cell_type", "rci": "rare", "tcd": "told"}
    query = sorted({row for _, rows, *_ in oracle.seen for row in rows})
    assert len(query) == 40
    for task in ("cta", "rci", "tcd"):
        rows = numbers[task_name(task)]
        calls = [each for each in oracle.seen if each[0] == task]
        assert [each[1] for each in calls] == [query] * 4
        # The seed chooses the wording, and the control mixes the cells.
        assert [each[3] for each in calls] == [[0], [1]] * 2
        assert [each[2] is None for each in calls] == [True, True, False, False]
        assert all(sorted(each[2]) == list(range(40)) for each in calls[2:])
        # Untuned it is right about the even cells and at the first answer of the others.
        assert rows["1-shot"]["accuracy"] == rows["3-shot"]["accuracy"] == [1.0, 1.0]
        truth = cells.obs[columns[task]].to_numpy(object)[query]
        first = {"cta": truth == "B cell", "rci": truth == "Yes", "tcd": truth != "normal cell"}[task]
        expected = (first | (np.array(query) % 2 == 0)).mean()
        assert rows[instructions.ZERO]["accuracy"] == [pytest.approx(expected)] * 2
        assert rows[instructions.OTHERS]["accuracy"][0] < rows[instructions.ZERO]["accuracy"][0]
        made = [each for each in tunings if each[0] == task]
        number = cells.obs[columns[task]].nunique()
        assert [len(shots) for _, shots, *_ in made] == [number] * 2 + [3 * number] * 2
        for _, shots, tuned, _ in made:
            assert not shots & set(query)
            assert [each[:2] for each in tuned.seen] == [(task, query)]
        assert len({shots for _, shots, *_ in made}) == 4


def test_pathways_are_scored_cell_by_cell(asked, watched, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("decoupler")
    cells, oracle, tunings = watched
    sets = {"file": str(gene_sets(tmp_path / "sets.gmt"))}
    given = config(tmp_path / "out", tasks=("cpi",), shots=(2,), pathways=sets)
    found = pathways.read_gene_sets(sets["file"])
    counts = sp.csr_matrix(cells.X)
    own = pathways.PathwayCells.of(counts, list(vocabulary().symbols), found).active
    cells.obs["active"] = [", ".join(own.columns[row]) for row in own.to_numpy()]
    instructions.benchmark(given, cells, asked)
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]["pathway"]
    assert numbers["2-shot"] == {name: [1.0] for name in pathways.AREAS}
    query = np.array(oracle.seen[0][1])
    known = own.to_numpy()[query] & (query % 2 == 0)[:, None]
    study_metadata = (known + 0.01) / (known + 0.01).sum(axis=1, keepdims=True)
    expected = pathways.areas(own.to_numpy()[query], study_metadata)
    assert list(numbers[instructions.ZERO].values()) == [[pytest.approx(value)] for value in expected]
    ((_, shots, _, _),) = tunings
    assert len(shots) == 2
    assert not shots & set(oracle.seen[0][1])


def test_genes_that_were_not_measured_are_not_ranked(asked, tmp_path):  # noqa: F811
    pytest.importorskip("decoupler")
    part = table()[:, :12].copy()
    symbols = list(vocabulary().symbols)
    path = tmp_path / "sets.gmt"
    path.write_text(
        f"ONE\tx\t{chr(9).join(symbols[:6])}\nTWO\tx\t{chr(9).join(symbols[6:12])}\nTHREE\tx\t{chr(9).join(symbols[9:])}\n"
    )
    given = config(tmp_path / "out", tasks=("cpi",), shots=(), pathways={"file": str(path)})
    (made,) = instructions.benchmark(given, part, asked)
    assert "1 gene sets with too few measured genes are excluded." in made.notes


def test_diseases_are_folded_after_the_answer():
    shares = pd.DataFrame(
        {"glioma": [0.2, 0.5], "melanoma": [0.3, 0.1], "other": [0.1, 0.0], "normal cell": [0.4, 0.4]}
    )
    made = instructions.prediction("tcd", shares)
    assert made.labels["tcd"].tolist() == ["normal cell", "tumor cell"]
    np.testing.assert_allclose(made.probabilities["tcd"]["tumor cell"], [0.6, 0.6])
    same = instructions.prediction("cta", shares)
    assert same.labels["cta"].tolist() == ["normal cell", "glioma"]


def test_a_tuning_that_fails_leaves_the_other_rows(asked, tmp_path, monkeypatch):  # noqa: F811
    def fails(*args: Any) -> Any:
        raise ConfigError("no.")

    monkeypatch.setattr(instructions, "tune", fails)
    (made,) = instructions.benchmark(config(tmp_path / "out", tasks=("cta",)), table(), asked)
    assert "2-shot could not run: no." in made.notes
    assert {instructions.ZERO, instructions.OTHERS, labels.LOGISTIC} <= {row[0] for row in made.rows}


@pytest.mark.slow
def test_a_tuning_that_is_stopped_gives_no_model(asked, monkeypatch):  # noqa: F811
    def stopped(*args: Any, **options: Any) -> Any:
        return dataclasses.replace(train(*args, **options), reason="interrupt")

    monkeypatch.setattr(few_shot, "train", stopped)
    cells = table()
    options = TuningOptions(steps=1, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        tune(
            asked, instruction_model_of(asked), "cta", _shots(cells, "cta", np.arange(4)), COLUMNS, options, 0
        )


def test_rare_labels_are_in_both_parts_whatever_else_there_is(asked, tmp_path):  # noqa: F811
    cells = table(90)
    cells.obs["cell_type"] = np.where(np.arange(90) % 15 == 0, "NK cell", "B cell")
    cells.obs.loc[cells.obs_names[4], "cell_type"] = "lonely"
    cells.obs["disease"] = "normal"
    for seed in range(4):
        study = study_of(cells, asked, tmp_path, seed=seed)
        assert (cells.obs["cell_type"].to_numpy()[study.query] == "NK cell").sum() == 2


def _shots(cells: ad.AnnData, task: str, rows: np.ndarray) -> Shots:
    study_metadata = {
        "cta": {"cell_types": ["B cell", "T cell", "NK cell"]}, "cpi": {"gene_sets": ["one", "two"]},
    }[task]  # fmt: skip
    return Shots(sp.csr_matrix(cells.X)[rows], cells.obs.iloc[rows], {"abstract": ABSTRACT, **study_metadata})


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cta", "cpi"])
def test_a_few_cells_tune_adapters_and_tokenizer_alone(asked, task, monkeypatch):  # noqa: F811
    """The universal adapter always, of the others that of the task."""
    cells = table()
    cells.obs["active"] = np.where(cells.obs["cell_type"] == "B cell", "one", "one, two")
    rows = np.arange(0, 90, 9)
    losses: list[float] = []

    def watched(made: Any, loop: Any, optimizer: Any, folder: Path, start: Any, **how: Any) -> Any:
        result = train(made, dataclasses.replace(loop, log_every=10), optimizer, folder, start, **how)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.extend(json.loads(line)["train/loss"] for line in lines)
        return result

    monkeypatch.setattr(few_shot, "train", watched)
    instruction_model = instruction_model_of(asked)
    options = TuningOptions(steps=40, learning_rate=2e-2, batch_size=5)
    tuned = tune(asked, instruction_model, task, _shots(cells, task, rows), COLUMNS, options, 0)
    before, after = flatten(instruction_model.variables), flatten(tuned.variables)
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
    with pytest.raises(ConfigError, match="few-shot"):
        drawn(["", ""], 1, True, 0)


@pytest.mark.slow
def test_what_cannot_be_measured_is_said(asked, tmp_path):  # noqa: F811
    cells = table()
    # Without names of tasks those that there are columns for.
    given = config(tmp_path / "out", tasks=(), shots=())
    reports = instructions.benchmark(given, cells, asked)
    assert [each.title.split(".")[0] for each in reports] == [
        f"cells: {instructions.TITLES[task]}" for task in ("cta", "rci", "tcd")
    ]
    del given["data"]["disease"]
    nameless = cells.copy()
    del nameless.uns["abstract"]
    with pytest.raises(ConfigError, match=r"adata\.uns\['abstract'\]"):
        instructions.benchmark(given, nameless, asked)
    for changes, words in (
        ({"tasks": ("abc",)}, "rare_cell"),
        ({"shots": (0,)}, "zero"),
        ({"shots": 5}, "shots"),
        ({"tasks": ("cpi",)}, "tasks"),
        ({"tasks": ("tcd",), "data": {"disease": ""}}, "tasks"),
        ({"data": {"disease": "diseas"}}, r"'diseas'.*'cell_type', 'disease'"),
        ({"data": {"cell_type": "celltype"}}, "'celltype'"),
        ({"pathways": {"file": "nowhere.gmt"}}, "nowhere.gmt"),
        ({"seeds": 0}, "seeds"),
        ({"tuning": {"steps": 0}}, "tuning.steps"),
        ({"data": {"share": 1.5}}, "share"),
        ({"data": {"group_key": "patient"}}, "'patient'"),
    ):
        values = config(tmp_path / "out")
        for name, value in changes.items():
            values[name] = {**values[name], **value} if isinstance(value, dict) else value
        with pytest.raises((ConfigError, DataError), match=words):
            instructions.benchmark(values, cells, asked)
    with pytest.raises(ConfigError, match=r"--config\.model"):
        instructions.benchmark(given, cells)
    with pytest.raises(ConfigError, match=r"--config\.data\.path"):
        instructions.benchmark(given, None, asked)
    assert few_shot.TuningOptions().steps == get_config().tuning.steps
