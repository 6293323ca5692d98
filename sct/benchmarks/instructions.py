"""Questions about cells of unseen studies, zero- and few-shot, beside baselines (ZerOmics, sections 4.2 and 4.3)."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from sct.benchmarks.few_shot import Shots, TuningOptions, drawn, tune
from sct.data.bundled import prepare, study_texts
from sct.data.quantile_bins import binned_cells
from sct.data.text.cell_sentence import cell_keys
from sct.data.text.instructions import (
    BETWEEN,
    NORMAL,
    YES,
    InstructionOptions,
    StudyQuestions,
    read_study_texts,
)
from sct.errors import ConfigError, DataError, SctError
from sct.eval import labels, marker_scores, pathways, report
from sct.eval.report import Report
from sct.generation.cell_asker import CellAsker
from sct.models.registry import build
from sct.tasks.instructions import TRAINED_TASKS
from sct.tl import benchmarking, running
from sct.tl.asking import asker_of
from sct.weights.pretrained import Pretrained

TUMOUR = "tumour cell"
TITLES = {
    "cta": "Cell type annotation",
    "rci": "Rare cell identification",
    "tcd": "Tumour cell discovery",
    "cpi": "Cell pathway inference",
}
ZERO = "zero-shot"
OTHERS = "zero-shot, soft tokens of other cells"
_PATHWAYS = "sct_pathways"  # column of labels that the scorer makes
_UNS = ("abstract", "cell_types", "rare", "diseases")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Cells to ask about; see `configs/benchmark_zeromics.py` for each field."""

    path: str = ""
    dataset: str = ""
    split: str = "test"
    studies: str = ""
    cell_type: str = "cell_type"
    disease: str = ""
    normal: tuple[str, ...] = ("normal", "healthy")
    rare_share: float = 0.05
    group_key: str = ""
    share: float = 1 / 3
    layer: str = ""
    gene_column: str = ""
    duplicates: str = "error"
    study_key: str = ""
    max_cells: int = 3_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"data.share is {self.share}, but a share between 0 and 1 is needed.")
        if not 0 <= self.rare_share <= 1:
            raise ConfigError(f"data.rare_share is {self.rare_share}, but a share is needed.")

    @property
    def cells(self) -> benchmarking.DataOptions:
        """How cells are read, as in the other benchmark."""
        return benchmarking.DataOptions(
            path=self.path, split=self.split, layer=self.layer, gene_column=self.gene_column,
            duplicates=self.duplicates, study_key=self.study_key, max_cells=self.max_cells, seed=self.seed,
        )  # fmt: skip

    @property
    def columns(self) -> dict[str, Any]:
        """What a model that is tuned is told of the columns of labels."""
        return {
            "cell_type": self.cell_type, "disease": self.disease, "pathways": _PATHWAYS, "normal": self.normal,
            "rare_share": self.rare_share,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PathwayOptions:
    """Gene sets, and when one is active."""

    file: str = ""
    names: tuple[str, ...] = ()
    deviations: float = 1.0


@dataclasses.dataclass(frozen=True)
class InstructionBenchmarkOptions:
    """The whole benchmark; see `configs/benchmark_zeromics.py`."""

    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    pathways: PathwayOptions = dataclasses.field(default_factory=PathwayOptions)
    tuning: TuningOptions = dataclasses.field(default_factory=TuningOptions)
    model: str = ""
    output: str = "runs/benchmark_zeromics"
    tasks: tuple[str, ...] = TRAINED_TASKS
    shots: tuple[int, ...] = (1, 5, 10)
    seeds: int = 3
    templates: int = 1
    batch_size: int = 8
    markers: str = ""

    def __post_init__(self) -> None:
        if strange := [task for task in self.tasks if task not in TITLES]:
            raise ConfigError(f"tasks has {strange[0]!r}, but choose from {', '.join(TITLES)}.")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks is {self.tasks}, but different ones of {', '.join(TITLES)} are needed.")
        if any(number < 1 for number in self.shots) or len(set(self.shots)) < len(self.shots):
            raise ConfigError(
                f"shots is {self.shots}, but different positive numbers are needed; zero shots are measured always."
            )
        for name in ("seeds", "templates", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but at least 1 is needed.")


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
    """Labels of a study in memory; see `sct.data.text.instructions.Labelled`."""

    name: str
    labels: pd.DataFrame

    @property
    def n_cells(self) -> int:
        return len(self.labels)

    def obs(self, columns: Collection[str] | None = None) -> pd.DataFrame:
        chosen = [name for name in self.labels if columns is None or name in columns]
        return self.labels[chosen]


def benchmark(
    config: Mapping[str, Any], adata: ad.AnnData | None = None, model: running.Model | None = None
) -> list[Report]:
    """Ask a model about cells of studies, zero- and few-shot, and write tables with baselines beside.

    Each study is divided: on the larger part baselines are fitted and few-shot cells drawn, and all methods are
    measured on the same cells of the smaller one.

    Parameters
    ----------
    config
        Values as `configs/benchmark_zeromics.py` gives them.
    adata
        Cells in place of `config["data"]["path"]`.
    model
        A model in place of `config["model"]`.

    Returns
    -------
    The tables. `config["output"]` gets `report.html`, `report.md`, `report.json` and `results.json`.

    Raises
    ------
    SctError
        Whatever a user can mend, in one sentence.
    """
    started = time.monotonic()
    values = {name: value for name, value in json.loads(json.dumps(config)).items() if name != "benchmark"}
    options = build(InstructionBenchmarkOptions, values, "config")
    output, data = Path(options.output).expanduser(), options.data
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output {output} is a file, but it must be a folder: choose another.")
    if not (model or options.model):
        raise ConfigError("say which model to ask: --config.model=RUN.")
    handle = running.loaded(model or options.model)
    asker = asker_of(handle)
    said = read_study_texts(data.studies) if data.studies else {}
    if data.dataset:
        if data.path or adata is not None:
            raise ConfigError("there is both data.path and data.dataset: choose one of them.")
        prepare(data.dataset, output / "store")
        data = dataclasses.replace(data, path=str(output / "store"))
        said = {**study_texts(data.dataset), **said}
    if not data.path and adata is None:
        raise ConfigError("say what to ask about: --config.data.path=FILE.h5ad, or a store.")
    options = dataclasses.replace(options, data=data)
    studies, _ = benchmarking.open_cells(data.cells, adata)
    reports: list[Report] = []
    numbers: dict[str, Any] = {}
    sizes = []
    for name, cells in studies:
        own = {key: _listed(cells.uns[key]) for key in _UNS if key in cells.uns}
        asked = _Study(name, cells, {**own, **said.get(name, {})}, handle, asker, options)
        sizes.append(f"{name} ({len(asked.query):,} asked about, {len(asked.support):,} to fit on)")
        for task in options.tasks:
            title = f"{name}: {TITLES[task]}"
            try:
                table, measured = asked.measure(task)
            except SctError as error:
                table = Report(title, ("method", "remark"))
                table.add("all", str(error))
            else:
                table.title = f"{title}. {table.title}"
                numbers.setdefault(name, {})[task] = measured
            reports.append(table)
    if not numbers:
        reasons = list(dict.fromkeys(str(each.rows[0][1]) for each in reports))
        raise ConfigError(f"no task could be measured: {' '.join(reasons)}")
    facts = {
        **report.environment(), "model": repr(handle), "model folder": str(options.model or "(in memory)"),
        "weights": handle.fingerprint, "licence of the model": handle.license, "cells": ", ".join(sizes),
        "few shots": f"{options.tuning.steps} steps at {options.tuning.learning_rate:g}",
        "seeds": str(options.seeds), "time": f"{time.monotonic() - started:,.0f} s",
    }  # fmt: skip
    report.write(reports, output, facts, (), "Questions about cells", numbers)
    return reports


def _listed(value: Any) -> Any:
    return value if isinstance(value, str) else [str(each) for each in value]


class _Study:
    """A study whose cells are asked about."""

    def __init__(
        self, name: str, cells: ad.AnnData, said: Mapping[str, Any], model: Pretrained, asker: CellAsker,
        options: InstructionBenchmarkOptions,
    ):  # fmt: skip
        part = benchmarking.part_of(name, cells, model.vocabulary, options.data.cells)
        self.model, self.asker, self.options, self.said = model, asker, options, dict(said)
        self.name, self.data = name, options.data
        self.counts = sparse.csr_matrix(part.table.read(np.arange(part.table.n_cells)))
        self.obs = part.adata.obs
        self.symbols = list(model.vocabulary.symbols)
        self.keys = [int(key) for key in cell_keys(part.adata.obs_names)]
        self.support, self.query = self._divided()

    def _divided(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows to fit on and to ask about: by group where there is one, else with all labels in both parts."""
        rows, data = np.arange(len(self.obs)), self.data
        if data.group_key:
            if data.group_key not in self.obs:
                raise ConfigError(f"{self.name} has no column {data.group_key!r}: name another group_key.")
            groups = self.obs[data.group_key].astype(str)
            if groups.nunique() < 2:
                raise ConfigError(
                    f"all cells of {self.name} have the same {data.group_key}: leave data.group_key out."
                )
            split = GroupShuffleSplit(1, test_size=data.share, random_state=data.seed)
            fit, ask = next(split.split(rows, groups=groups))
            return fit, ask
        if len(rows) < 3:
            raise DataError(f"{self.name} has {len(rows)} cells, too few to divide: give more.")
        names = self.obs.get(data.cell_type, pd.Series("", index=self.obs.index)).astype(str)
        sizes = names.map(names.value_counts())
        strata = names.where(sizes > 1, "")  # one cell alone cannot be in both parts
        few = strata.value_counts().min() < 2 or strata.nunique() > min(data.share, 1 - data.share) * len(
            rows
        )
        fit, ask = train_test_split(
            rows, test_size=data.share, random_state=data.seed, stratify=None if few else strata
        )
        return np.sort(fit), np.sort(ask)

    def _questions(self, obs: pd.DataFrame, said: Mapping[str, Any]) -> StudyQuestions:
        if "abstract" not in said:
            raise ConfigError(
                f"{self.name} has no abstract: put it into adata.uns['abstract'], or add `{self.name}: {{abstract: "
                "...}` to the YAML file of --config.data.studies."
            )
        asked = InstructionOptions(
            num_soft=self.asker.config.num_soft, studies={self.name: dict(said)}, **self.data.columns
        )
        return StudyQuestions(_Table(self.name, obs), asked)

    @functools.cached_property
    def records(self) -> dict[str, np.ndarray]:
        """The cells that are asked about, as the model reads them."""
        return binned_cells(self.counts[self.query], self.asker.cells, self.asker.known)

    def measure(self, task: str) -> tuple[Report, dict[str, Any]]:
        """Table of a task, and its numbers."""
        return self._pathways() if task == "cpi" else self._single(task)

    def _score(
        self,
        asker: CellAsker,
        task: str,
        rows: np.ndarray,
        candidates: Sequence[str],
        seed: int,
        others: bool = False,
    ) -> pd.DataFrame:
        """Probabilities of the candidates for these of the cells asked about; `others` gives each another's tokens."""
        chosen = {name: value[rows] for name, value in self.records.items()}
        mixed = np.random.default_rng(seed).permutation(len(rows)).tolist() if others else None
        logs = asker.score(
            task, chosen, [self.said["abstract"]] * len(rows), candidates, seed=seed, cells=mixed,
            keys=[self.keys[row] for row in self.query[rows]], templates=self.options.templates,
            batch_size=self.options.batch_size,
        )  # fmt: skip
        return pd.DataFrame(np.exp(logs), columns=list(candidates))

    def _tuned(
        self, task: str, rows: np.ndarray, obs: pd.DataFrame, said: dict[str, Any], seed: int
    ) -> CellAsker:
        shots = Shots(self.counts[rows], obs.iloc[rows], said)
        columns, tuning = self.data.columns, self.options.tuning
        return tune(self.model, self.asker, task, shots, columns, tuning, seed)

    def _single(self, task: str) -> tuple[Report, dict[str, Any]]:
        """One answer of several."""
        asked = self._questions(self.obs, self.said)
        if task not in asked.candidates:
            column = "disease" if task == "tcd" else "cell_type"
            raise ConfigError(
                f"{self.name} has no answers: name the column of labels by --config.data.{column}, of which two values "
                "are needed, and for rare cells a type below data.rare_share."
            )
        candidates, options = asked.candidates[task], self.options
        answers = np.array([asked.answer(task, row) for row in range(len(self.obs))], dtype=object)
        rows = np.flatnonzero(answers[self.query] != "")
        fit = self.support[answers[self.support] != ""]
        true = answers[self.query[rows]]
        if len(set(true)) < 2 or len(set(answers[fit])) < 2:
            raise ConfigError(
                f"{self.name} has cells with one answer only, or with none, in one of its parts."
            )
        listed = {"cta": {"cell_types": list(candidates)}, "rci": {"rare": sorted(asked.rare)}}
        listed["tcd"] = {"diseases": [name for name in candidates if name != NORMAL]}
        said = {"abstract": self.said["abstract"], **listed[task]}

        def folded(names: np.ndarray) -> np.ndarray:
            return np.where(names == NORMAL, NORMAL, TUMOUR) if task == "tcd" else names

        def prediction(table: pd.DataFrame) -> labels.Prediction:
            if task == "tcd":
                tumour = 1 - table[NORMAL] if NORMAL in table else pd.Series(1.0, index=table.index)
                table = pd.DataFrame({NORMAL: 1 - tumour, TUMOUR: tumour})
            best = table.columns.to_numpy(object)[table.to_numpy().argmax(axis=1)]
            return labels.Prediction(pd.DataFrame({task: best}, dtype=object), {task: table})

        seeds = range(options.seeds)
        main = [prediction(self._score(self.asker, task, rows, candidates, seed)) for seed in seeds]
        beside: dict[str, tuple[str, Any]] = {
            OTHERS: (
                "",
                [prediction(self._score(self.asker, task, rows, candidates, seed, True)) for seed in seeds],
            )
        }
        counts, of_each = self.counts[self.query[rows]], "{} of each answer"
        for number in options.shots:
            tuned, fitted = [], []
            for seed in seeds:
                places = fit[drawn(list(answers[fit]), number, True, seed)]
                asker = self._tuned(task, places, self.obs, said, seed)
                tuned.append(prediction(self._score(asker, task, rows, candidates, seed)))
                known = pd.DataFrame({task: folded(answers[places])}, dtype=object)
                with_few = labels.classify(self.counts[places], known, counts)
                fitted.append(with_few[labels.LOGISTIC])
            beside[f"{number}-shot"] = of_each.format(number), tuned
            beside[f"{labels.LOGISTIC}, {number}-shot"] = of_each.format(number), fitted
        beside |= self._markers(
            task, counts, fit, folded(answers[fit]), folded(np.array(candidates, dtype=object))
        )
        table, numbers = labels.compare(
            {ZERO: main},
            pd.DataFrame({task: folded(true)}, dtype=object),
            pd.DataFrame({task: folded(answers[fit])}, dtype=object),
            counts,
            self.counts[fit],
            labels.Options(seeds=options.seeds, positive={"rci": YES, "tcd": TUMOUR}.get(task, "")),
            beside,
        )
        if task == "tcd":
            table.notes = (*table.notes, f"Diseases are folded: a cell is a {NORMAL} or a {TUMOUR}.")
        table.notes = (*table.notes, *self._notes(task))
        return table, numbers

    def _markers(
        self, task: str, counts: sparse.csr_matrix, fit: np.ndarray, names: np.ndarray, candidates: np.ndarray
    ) -> dict[str, tuple[str, labels.Prediction]]:
        """Labels by marker genes, of a file or of the cells to fit on."""
        given = bool(self.options.markers) and task == "cta"
        if given:
            markers = marker_scores.read_markers(self.options.markers)
        else:
            markers = marker_scores.find_markers(self.counts[fit], names.tolist(), self.symbols)
        try:
            table = marker_scores.marker_scores(
                counts, self.symbols, markers, list(dict.fromkeys(candidates.tolist()))
            )
        except DataError:
            if given:
                raise
            return {}
        best = table.columns.to_numpy(object)[table.to_numpy().argmax(axis=1)]
        predicted = labels.Prediction(pd.DataFrame({task: best}, dtype=object), {task: table})
        return {marker_scores.NAME: ("a file" if given else labels.TRAINING, predicted)}

    def _notes(self, task: str) -> list[str]:
        divided = f"by {self.data.group_key}" if self.data.group_key else "at random"
        notes = [
            f"Baselines are fitted on {len(self.support):,} other cells of the study, which is divided {divided}; the "
            "zero-shot model has seen none of them."
        ]
        if task not in self.model.data["tasks"]:
            notes.append("The model was not trained on this task.")
        return notes

    def _pathways(self) -> tuple[Report, dict[str, Any]]:
        """Several answers: which pathways are active."""
        asked = self.options.pathways
        if not asked.file:
            raise ConfigError(
                "name a GMT file of gene sets by --config.pathways.file, such as MSigDB's hallmarks."
            )
        gene_sets = pathways.read_gene_sets(asked.file, asked.names)
        cells = pathways.Cells.of(self.counts, self.symbols, gene_sets, asked.deviations)
        names = list(cells.active)
        texts = [BETWEEN.join(np.array(names, dtype=object)[own]) for own in cells.active.to_numpy()]
        obs = self.obs.assign(**{_PATHWAYS: texts})
        said = {"abstract": self._questions(obs, self.said).said["abstract"], "gene_sets": names}
        options, rows, seeds = self.options, np.arange(len(self.query)), range(self.options.seeds)

        def scores(asker: CellAsker, seed: int, others: bool = False) -> np.ndarray:
            return self._score(asker, "cpi", rows, names, seed, others).to_numpy()

        predictions: dict[str, tuple[str, Sequence[np.ndarray]]] = {
            ZERO: ("", [scores(self.asker, seed) for seed in seeds]),
            OTHERS: ("", [scores(self.asker, seed, True) for seed in seeds]),
        }
        query = cells.rows(self.query)
        for number in options.shots:
            tuned, fitted = [], []
            for seed in seeds:
                places = self.support[drawn([texts[row] for row in self.support], number, False, seed)]
                tuned.append(scores(self._tuned("cpi", places, obs, said, seed), seed))
                fitted.append(
                    pathways.baselines(cells.rows(places), query, labels.Options())[labels.LOGISTIC]
                )
            predictions[f"{number}-shot"] = f"{number} cells", tuned
            predictions[f"{labels.LOGISTIC}, {number}-shot"] = f"{number} cells", fitted
        table, numbers = pathways.compare(
            predictions, query, cells.rows(self.support), labels.Options(seeds=options.seeds)
        )
        left = len(gene_sets) - len(names)
        notes = [f"{left} gene sets with too few of the cells' genes are left out."] if left else []
        table.notes = (*table.notes, *notes, *self._notes("cpi"))
        return table, numbers
