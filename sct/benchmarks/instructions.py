"""Benchmark a model that answers questions about cells, zero-shot and few-shot (ZerOmics, sections 4.2 and 4.3)."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from sct import families
from sct.benchmarks import zero_shot as benchmarking
from sct.benchmarks.few_shot import Shots, TuningOptions, drawn, tune
from sct.checks import check_at_least, check_choice, check_distinct, check_share
from sct.data.bundled import prepare, study_texts
from sct.data.cell_records import cell_records
from sct.data.text.cell_sentence import cell_keys
from sct.data.text.instructions import (
    BETWEEN,
    NORMAL,
    YES,
    InstructionOptions,
    StudyQuestions,
    read_study_texts,
)
from sct.data.text.prompts import TASK_CODES, task_code, task_name
from sct.errors import ConfigError, DataError, MissingExtraError, SctError
from sct.eval.labels import marker_scores, pathways
from sct.eval.labels import measures as labels
from sct.eval.reports import folder as report_folder
from sct.eval.reports.report import Report
from sct.folder_lock import only_one
from sct.generation.instruction_model import InstructionModel
from sct.inference import inputs
from sct.train.parents import ParentRun, split
from sct.weights.pretrained import Pretrained

TUMOR = "tumor cell"
TITLES = {
    "cta": "Cell type annotation",
    "rci": "Rare cell identification",
    "tcd": "Tumor cell discovery",
    "cpi": "Cell pathway inference",
}
ZERO = "zero-shot"
OTHERS = "zero-shot, soft tokens of other cells"
_PATHWAYS = "sct_pathways"  # obs column with the active pathways of each cell
_UNS = ("abstract", "cell_types", "rare", "diseases")


@dataclasses.dataclass(frozen=True)
class InstructionBenchmarkData(benchmarking.CellChoice):
    """Options for the cells of the benchmark, and for the split into query cells and training cells.

    Parameters
    ----------
    dataset
        Data set to use instead of `path`: "pbmc68k", the cells that scanpy ships.
    studies
        YAML file with abstracts and candidate answers of the studies. The file takes precedence over `adata.uns`.
    cell_type, disease
        Columns of `obs` with cell types and diseases; "" for none.
    normal
        Values of the disease column that mean a normal cell.
    rare_share
        A cell type is rare if less than this fraction of the cells of the study belongs to it.
    group_key
        Column of `obs`, such as the donor. All cells of a group are either cells to train on or cells to ask about.
    share
        Fraction of the cells (or groups) of each study about which the model is asked. The baselines are fitted on the
        other cells.
    """

    max_cells: int = 3_000
    dataset: str = ""
    studies: str = ""
    cell_type: str = "cell_type"
    disease: str = ""
    normal: tuple[str, ...] = ("normal", "healthy")
    rare_share: float = 0.05
    group_key: str = ""
    share: float = 1 / 3

    def __post_init__(self) -> None:
        check_share("data.share", self.share, zero=False, one=False)
        check_share("data.rare_share", self.rare_share)
        if self.split == "train":
            raise ConfigError(
                "data.split is 'train', but the benchmark needs cells that the model was not trained on: "
                "set --config.data.split to 'test' or 'validation'."
            )
        super().__post_init__()

    @property
    def columns(self) -> dict[str, Any]:
        """Return the options of `InstructionData` for few-shot fine-tuning, as a dict: label columns and thresholds."""
        return {
            "cell_type": self.cell_type, "disease": self.disease, "pathways": _PATHWAYS, "normal": self.normal,
            "rare_share": self.rare_share,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PathwayOptions:
    """Options of the pathway task: the gene sets, and the threshold above which a pathway is active.

    Attributes
    ----------
    file
        GMT file of gene sets.
    names
        Names of the gene sets to use; empty for all.
    deviations
        A pathway is active in a cell if its score is more than this number of standard deviations above its mean score.
    """

    file: str = ""
    names: tuple[str, ...] = ()
    deviations: float = 1.0


@dataclasses.dataclass(frozen=True)
class InstructionBenchmarkOptions:
    """Options of the benchmark of questions about cells.

    Parameters
    ----------
    model
        Model folder or run folder of `configs/zeromics_llm.py`.
    output
        Folder of the report.
    tasks
        Names of the tasks: "cell_type", "rare_cell", "tumor", "pathway"; () for all tasks whose columns or gene sets
        are set.
    shots
        Numbers of training cells for few-shot fine-tuning; the model is fine-tuned and evaluated once for each number.
        For pathways, a number is the total number of cells; for all other tasks, it is the number of cells per answer.
        The model without fine-tuning is always evaluated.
    seeds
        Number of random seeds. Each seed determines the prompt template, the order of the candidate answers, the
        few-shot cells and the control.
    templates
        Number of prompt templates. With 1, each seed uses a different template. With a larger number n, the
        probabilities are averaged over the first n templates.
    batch_size
        Number of questions that the model answers at once.
    markers
        JSON file with marker genes, `{"B cell": ["MS4A1", ...]}`. If "", markers are found in the training cells of
        each study.
    """

    data: InstructionBenchmarkData = dataclasses.field(default_factory=InstructionBenchmarkData)
    pathways: PathwayOptions = dataclasses.field(default_factory=PathwayOptions)
    tuning: TuningOptions = dataclasses.field(default_factory=TuningOptions)
    model: str = ""
    output: str = "runs/benchmark_zeromics"
    tasks: tuple[str, ...] = ()
    shots: tuple[int, ...] = (1, 5, 10)
    seeds: int = 3
    templates: int = 1
    batch_size: int = 8
    markers: str = ""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TITLES:
                check_choice("tasks", task, TASK_CODES)
        object.__setattr__(self, "tasks", tuple(map(task_code, self.tasks)))
        check_distinct("tasks", tuple(map(task_name, self.tasks)))
        if "tcd" in self.tasks and not self.data.disease:
            raise ConfigError(
                "`tasks` contains tumor, but data.disease is not set: set --config.data.disease to the column of "
                "`obs` with the diseases."
            )
        if "cpi" in self.tasks and not self.pathways.file:
            raise ConfigError(
                "`tasks` contains pathway, but pathways.file is not set: set --config.pathways.file to a GMT file, "
                "such as MSigDB's hallmark sets."
            )
        for number in self.shots:
            check_at_least("shots", number, 1, advice="remove it, because zero-shot is always evaluated")
        check_distinct("shots", self.shots)
        for name in ("seeds", "templates", "batch_size"):
            check_at_least(name, getattr(self, name), 1)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Return the tasks to evaluate: `tasks`, or by default all tasks whose required options are set."""
        known = {
            "cta": self.data.cell_type, "rci": self.data.cell_type, "tcd": self.data.disease, "cpi": self.pathways.file,
        }  # fmt: skip
        return self.tasks or tuple(task for task, needed in known.items() if needed)


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
    """Hold the labels of a study in memory; the class implements `sct.data.text.instructions.LabeledCells`."""

    name: str
    labels: pd.DataFrame

    @property
    def n_cells(self) -> int:
        return len(self.labels)

    def obs(self, columns: Collection[str] | None = None) -> pd.DataFrame:
        chosen = [name for name in self.labels if columns is None or name in columns]
        return self.labels[chosen]


def benchmark(
    config: Mapping[str, Any],
    adata: ad.AnnData | None = None,
    model: inputs.ModelLike | None = None,
    *,
    overwrite: bool = True,
) -> list[Report]:
    """Ask a model about the cells of studies, zero-shot and few-shot, compare it with baselines, and write a report.

    The cells of each study are split into training cells and query cells. The baselines are fitted on the training
    cells, from which the few-shot cells are also drawn. All methods are scored on the same query cells.

    Parameters
    ----------
    config
        Options as in `configs/benchmark_zeromics.py`.
    adata
        Cells to use instead of `config["data"]["path"]`.
    model
        Model to use instead of `config["model"]`.
    overwrite
        Whether to replace an earlier report in the folder. If False, an earlier report raises an error before the
        computation starts.

    Returns
    -------
    The tables. The folder `config["output"]` gets `report.html`, `report.md`, `report.json` and `results.json`.

    Raises
    ------
    SctError
        An option, the cells or the model are not usable; the message says what to change.
    """
    config, builds_on = split(config)
    values = {name: value for name, value in config.items() if name != "benchmark"}
    options, output = benchmarking.read_options(InstructionBenchmarkOptions, values, adata, overwrite)
    with only_one(output, "benchmark", "--output"):
        return _benchmark(options, output, adata, model, builds_on if model is None else ())


def _benchmark(
    options: InstructionBenchmarkOptions,
    output: Path,
    adata: ad.AnnData | None,
    model: inputs.ModelLike | None,
    builds_on: Sequence[ParentRun],
) -> list[Report]:
    """Run the benchmark and write the report; the caller holds the lock of the folder."""
    started = time.monotonic()
    data: InstructionBenchmarkData = options.data
    if not (model or options.model):
        raise ConfigError(
            "model is not set, but the benchmark needs a model: set --config.model to a run folder."
        )
    if data.path and data.dataset:
        raise ConfigError("data.path and data.dataset are both set: set only one of them.")
    if not (data.path or data.dataset):
        raise ConfigError(
            "data.path is not set, but the benchmark needs cells: set --config.data.path to an .h5ad file or a store, "
            "or --config.data.dataset to a bundled data set."
        )
    study_metadata = read_study_texts(data.studies) if data.studies else {}
    markers = marker_scores.read_markers(options.markers) if options.markers else None
    if options.pathways.file:
        pathways.read_gene_sets(options.pathways.file, options.pathways.names)
    output.mkdir(parents=True, exist_ok=True)
    if data.dataset:
        prepare(data.dataset, output / "store")
        data = dataclasses.replace(data, path=str(output / "store"))
        options = dataclasses.replace(options, data=data)
        study_metadata = {**study_texts(data.dataset), **study_metadata}
    studies, _ = benchmarking.open_cells(data, adata)
    if study_metadata and not set(study_metadata) & {name for name, _ in studies}:
        raise ConfigError(
            f"the file data.studies={data.studies} describes the study {sorted(study_metadata)[0]!r}, but "
            f"the cells come from the studies {', '.join(name for name, _ in studies[:5])}: use the names of "
            "these studies in the file."
        )
    for name, column in (("cell_type", data.cell_type), ("disease", data.disease)):
        asked_for = set(options.wanted) & ({"tcd"} if name == "disease" else {"cta", "rci"})
        if asked_for and not any(column in cells.obs for _, cells in studies):
            known = ", ".join(map(repr, studies[0][1].obs.columns[:10])) or "no columns"
            raise ConfigError(
                f"`obs` has no column {column!r}, but has {known}: set --config.data.{name} to one of these columns, "
                "or choose other tasks with --config.tasks."
            )
    # Only now: training takes longer than finding the mistakes above.
    benchmarking.train_missing(builds_on)
    handle = inputs.load_model(model or options.model)
    instruction_model = families.require(handle, "ask")
    reports: list[Report] = []
    numbers: dict[str, Any] = {}
    sizes: list[str] = []

    def facts() -> dict[str, str]:
        return {
            **benchmarking.facts_of(handle, options.model), "cells": ", ".join(sizes),
            "few shots": f"{options.tuning.steps} steps at {options.tuning.learning_rate:g}",
            "seeds": str(options.seeds), "time": f"{time.monotonic() - started:,.0f} s",
        }  # fmt: skip

    for name, cells in studies:
        try:
            asked = _Study(
                name, cells, study_metadata.get(name, {}), handle, instruction_model, options, markers, output
            )
        except SctError as error:
            reports.append(benchmarking.reason(name, error))
            continue
        sizes.append(f"{name} ({len(asked.query):,} asked about, {len(asked.support):,} to fit on)")
        for task in options.wanted:
            title = f"{name}: {TITLES[task]}"
            try:
                table, measured = asked.measure(task)
            except SctError as error:
                reports.append(benchmarking.reason(title, error))
                continue
            table.title = f"{title}. {table.title}"
            numbers.setdefault(name, {})[task_name(task)] = measured
            reports.append(table)
            report_folder.keep(reports, output, facts(), numbers)
    if not numbers:
        reasons = [f"{each.title}: {each.rows[0][1]}" for each in reports]
        raise ConfigError(f"no task could be evaluated, for these reasons: {' '.join(reasons)}")
    report_folder.write(reports, output, facts(), (), "Questions about cells", numbers)
    return reports


def _texts_of(name: str, cells: ad.AnnData) -> dict[str, Any]:
    """Return the metadata of a study from `adata.uns`; raise ConfigError if a value has the wrong type."""
    study_metadata = {}
    for key in (key for key in _UNS if key in cells.uns):
        value = cells.uns[key]
        good = isinstance(value, str) if key == "abstract" else not isinstance(value, str | Mapping)
        if not good:
            form = "a string" if key == "abstract" else "a list of strings"
            raise ConfigError(
                f'in the study {name!r}, adata.uns["{key}"] is {value!r}, but must be {form}: correct this entry of '
                "uns."
            )
        study_metadata[key] = value.strip() if key == "abstract" else [str(each) for each in value]
    return {key: value for key, value in study_metadata.items() if len(value)}


class _Study:
    """Evaluate the tasks on one study of the benchmark.

    The cells of the study are split into cells to train on (`support`) and cells to ask about (`query`).
    """

    def __init__(
        self, name: str, cells: ad.AnnData, study_metadata: Mapping[str, Any], model: Pretrained,
        instruction_model: InstructionModel,
        options: InstructionBenchmarkOptions, markers: Mapping[str, Sequence[str]] | None, place: Path,
    ):  # fmt: skip
        part = benchmarking.part_of(name, cells, model.vocabulary, options.data)
        self.study_metadata = {**_texts_of(name, cells), **study_metadata}
        self.model, self.instruction_model, self.options, self.markers = (
            model,
            instruction_model,
            options,
            markers,
        )
        self.name, self.data, self.place = name, options.data, place
        self.counts = sparse.csr_matrix(part.table.read(np.arange(part.table.n_cells)))
        self.obs, self.measured = part.adata.obs, np.asarray(part.table.measured)
        self.symbols = list(model.vocabulary.symbols)
        self.keys = [int(key) for key in cell_keys(part.adata.obs_names)]
        self.support, self.query = self._divided()

    def _divided(self) -> tuple[np.ndarray, np.ndarray]:
        """Split the cells; return the row numbers of the cells to train on and those of the cells to ask about.

        With `data.group_key`, whole groups are assigned to one of the two parts. Otherwise the split is stratified by
        label, so that a label with at least two cells is in both parts.
        """
        rows, data = np.arange(len(self.obs)), self.data
        if data.group_key:
            check_choice("data.group_key", data.group_key, self.obs, advice=f"name a column of {self.name}")
            groups = self.obs[data.group_key].astype(str)
            if groups.nunique() < 2:
                raise ConfigError(
                    f"all cells of study {self.name!r} have the same value in the column {data.group_key!r}, so this "
                    "column cannot split the cells: set data.group_key to a column with two or more values, or leave "
                    "data.group_key empty."
                )
            split = GroupShuffleSplit(1, test_size=data.share, random_state=data.seed)
            fit, ask = next(split.split(rows, groups=groups))
            return fit, ask
        if len(rows) < 3:
            raise DataError(
                f"the study {self.name!r} has {len(rows)} cells, but at least 3 are needed to split it: add "
                "cells to the study."
            )
        present = [name for name in (data.cell_type, data.disease) if name and name in self.obs]
        least = int(min(data.share, 1 - data.share) * len(rows))
        strata = None
        for columns in (
            present,
            present[:1],
        ):  # if there are too many combinations, stratify by cell type only
            names = pd.Series("", index=rows)
            for column in columns:
                names += self.obs[column].astype(str).to_numpy() + "\0"
            sizes = names.value_counts()
            # A label with a single cell cannot be in both parts, so the cell joins the most common label.
            found = names.where(names.map(sizes) > 1, sizes.index[0])
            if found.nunique() <= least:
                strata = found
                break
        fit, ask = train_test_split(rows, test_size=data.share, random_state=data.seed, stratify=strata)
        return np.sort(fit), np.sort(ask)

    def _questions(self, obs: pd.DataFrame, study_metadata: Mapping[str, Any]) -> StudyQuestions:
        if "abstract" not in study_metadata:
            raise ConfigError(
                f"study {self.name!r} has no abstract: set adata.uns['abstract'], or add `{self.name}: {{abstract: "
                "...}` to the YAML file of --config.data.studies."
            )
        asked = InstructionOptions(
            num_soft=self.instruction_model.config.num_soft,
            studies={self.name: dict(study_metadata)},
            **self.data.columns,
        )
        return StudyQuestions(_Table(self.name, obs), asked)

    @functools.cached_property
    def records(self) -> dict[str, np.ndarray]:
        """Return the model inputs for the query cells, as a dict of arrays."""
        return cell_records(
            self.counts[self.query], self.instruction_model.cells, self.instruction_model.known
        )

    def measure(self, task: str) -> tuple[Report, dict[str, Any]]:
        """Evaluate one task; return its result table and its numbers for `results.json`."""
        return self._pathways() if task == "cpi" else self._single(task)

    def _score(
        self,
        instruction_model: InstructionModel,
        task: str,
        rows: np.ndarray,
        candidates: Sequence[str],
        seed: int,
        others: bool = False,
    ) -> pd.DataFrame:
        """Return the probability of each candidate answer for the query cells `rows`, (rows, candidates).

        Each seed uses its own prompt template and order of candidates. With `others`, each cell gets the soft tokens of
        another cell, as a control.
        """
        chosen = {name: value[rows] for name, value in self.records.items()}
        mixed = np.random.default_rng([seed, 1]).permutation(len(rows)).tolist() if others else None
        templates, number = len(instruction_model.prompts.templates[task]), self.options.templates
        logs = instruction_model.score(
            task, chosen, [self.study_metadata["abstract"]] * len(rows), candidates, seed=seed, cells=mixed,
            keys=[self.keys[row] for row in self.query[rows]], batch_size=self.options.batch_size,
            templates=number if number > 1 else [seed % templates],
        )  # fmt: skip
        return pd.DataFrame(np.exp(logs), columns=list(candidates))

    def _few_shot(
        self, task: str, fit: np.ndarray, answers: np.ndarray, obs: pd.DataFrame, study_metadata: dict[str, Any],
        ask: Callable[[InstructionModel, int], Any], fit_few: Callable[[np.ndarray], Any],
    ) -> tuple[dict[str, tuple[str, Any]], list[str]]:  # fmt: skip
        """Return the few-shot rows of the table as a dict by name, and notes on rows that could not be computed.

        Each number of shots gives two rows of the table. The first row is the model after fine-tuning on a few cells
        drawn from `fit`; `ask` evaluates this model. The second row is the baseline that `fit_few` fits on the same few
        cells.
        """
        made: dict[str, tuple[str, Any]] = {}
        notes = []
        for number in self.options.shots:
            what = f"{number} cells" if task == "cpi" else f"{number} of each answer"
            tuned, few = [], []
            try:
                for seed in range(self.options.seeds):
                    places = fit[drawn(list(answers[fit]), number, task != "cpi", seed)]
                    few.append(fit_few(places))
                    shots = Shots(self.counts[places], obs.iloc[places], study_metadata)
                    columns, tuning = self.data.columns, self.options.tuning
                    # Do not keep the fine-tuned model: it needs as much memory as the original one.
                    tuned.append(
                        ask(
                            tune(
                                self.model,
                                self.instruction_model,
                                task,
                                shots,
                                columns,
                                tuning,
                                seed,
                                self.place,
                            ),
                            seed,
                        )
                    )
            except SctError as error:
                notes.append(f"{number}-shot could not run: {error}")
                continue
            made[f"{number}-shot"] = what, tuned
            made[f"{labels.LOGISTIC}, {number}-shot"] = what, few
        return made, notes

    def _single(self, task: str) -> tuple[Report, dict[str, Any]]:
        """Evaluate a task with one right answer per cell ("cta", "rci" or "tcd"); return its table and its numbers."""
        column = self.data.disease if task == "tcd" else self.data.cell_type
        named = "disease" if task == "tcd" else "cell_type"
        if not column or column not in self.obs:
            found = (
                f"obs of study {self.name!r} has no column {column!r}"
                if column
                else f"data.{named} is not set"
            )
            what = named.replace("_", " ")
            raise ConfigError(
                f"{found}, but this task needs {what} labels: set --config.data.{named} to a "
                f"column with {what} labels."
            )
        asked = self._questions(self.obs, self.study_metadata)
        if task not in asked.candidates:
            raise ConfigError(
                f"the task rare_cell needs both rare and common cell types, but the study {self.name!r} has only "
                "one of the two: list the rare types in adata.uns['rare'] or in the file of --config.data.studies, or "
                "change data.rare_share, the fraction of the cells below which a cell type is rare "
                f"({self.data.rare_share:g})."
                if task == "rci"
                else f"the column {column!r} of the study {self.name!r} has fewer than two different "
                f"labels, but at least two are needed: set --config.data.{named} to another column."
            )
        candidates, options = asked.candidates[task], self.options
        answers = np.array([asked.answer(task, row) for row in range(len(self.obs))], dtype=object)
        rows = np.flatnonzero(answers[self.query] != "")
        fit = self.support[answers[self.support] != ""]
        true, counts = answers[self.query[rows]], self.counts[self.query[rows]]
        if len(set(true)) < 2 or len(set(answers[fit])) < 2:
            raise ConfigError(
                f"the study {self.name!r} is split into cells to train on and cells to ask about, but one of these "
                "two parts has fewer than two different labels: add cells with other labels, or change data.seed or "
                "data.share."
            )
        listed = {"cta": {"cell_types": list(candidates)}, "rci": {"rare": sorted(asked.rare)}}
        listed["tcd"] = {"diseases": [name for name in candidates if name != NORMAL]}
        study_metadata = {"abstract": self.study_metadata["abstract"], **listed[task]}
        score = functools.partial(self._score, task=task, rows=rows, candidates=candidates)

        def fit_few(places: np.ndarray) -> labels.LabelPrediction:
            known = pd.DataFrame({task: folded(task, answers[places])}, dtype=object)
            return labels.classify(self.counts[places], known, counts)[labels.LOGISTIC]

        seeds = range(options.seeds)
        main = [prediction(task, score(self.instruction_model, seed=seed)) for seed in seeds]
        others = [prediction(task, score(self.instruction_model, seed=seed, others=True)) for seed in seeds]
        few, notes = self._few_shot(
            task, fit, answers, self.obs, study_metadata,
            lambda instruction_model, seed: prediction(task, score(instruction_model, seed=seed)), fit_few,
        )  # fmt: skip
        names = list(dict.fromkeys(folded(task, np.array(candidates, dtype=object)).tolist()))
        by_markers, without = self._by_markers(task, counts, fit, folded(task, answers[fit]).tolist(), names)
        table, numbers = labels.compare(
            {ZERO: main},
            pd.DataFrame({task: folded(task, true)}, dtype=object),
            pd.DataFrame({task: folded(task, answers[fit])}, dtype=object),
            counts,
            self.counts[fit],
            labels.LabelOptions(seeds=options.seeds, positive={"rci": YES, "tcd": TUMOR}.get(task, "")),
            {OTHERS: ("", others), **few, **by_markers},
        )
        if task == "tcd":
            notes.append(f"The model answers with a disease; for scoring, every disease counts as {TUMOR!r}.")
        if left := len(self.query) - len(rows):
            strange = sorted(
                set(self.obs[column].dropna().astype(str)) - set(candidates) - set(self.data.normal)
            )
            which = f" ({', '.join(strange[:5])})" if strange and task != "rci" else ""
            notes.append(
                f"{left:,} cells without a label, or with a label that is not a candidate{which}, are excluded."
            )
        table.notes = (*table.notes, *notes, *without, *self._notes(task, len(fit)))
        return table, numbers

    def _by_markers(
        self, task: str, counts: sparse.csr_matrix, fit: np.ndarray, names: list[str], candidates: list[str]
    ) -> tuple[dict[str, tuple[str, labels.LabelPrediction]], list[str]]:
        """Compute the row of the marker-gene baseline. If this row cannot be computed, return a note.

        The note says why the row cannot be computed. For the task "cta", marker genes come from the file `markers`, if
        given. Otherwise they are found in the training cells.
        """
        given = self.markers is not None and task == "cta"
        try:
            markers = (
                self.markers
                if given and self.markers is not None
                else marker_scores.find_markers(self.counts[fit], names, self.symbols)
            )
            table = marker_scores.marker_scores(counts, self.symbols, markers, candidates)
        except (DataError, MissingExtraError) as error:
            return {}, [f"The baseline '{marker_scores.NAME}' could not run: {error}"]
        best = table.columns.to_numpy(object)[table.to_numpy().argmax(axis=1)]
        predicted = labels.LabelPrediction(pd.DataFrame({task: best}, dtype=object), {task: table})
        return {marker_scores.NAME: ("a file" if given else labels.TRAINING, predicted)}, []

    def _notes(self, task: str, fit: int) -> list[str]:
        divided = f"by {self.data.group_key}" if self.data.group_key else "at random"
        notes = [
            f"The study is split {divided}. Baselines are fitted on {fit:,} other cells of the study, few-shot "
            "baselines only on the few-shot cells. The zero-shot model is fitted on no cell of the study."
        ]
        if self.data.dataset:
            notes.append("These cells come from the same sample as the training cells of the quick starts.")
        if task not in self.model.data["tasks"]:
            notes.append("The model was not trained on this task.")
        return notes

    def _pathways(self) -> tuple[Report, dict[str, Any]]:
        """Evaluate the task "cpi"; return its result table and its numbers for `results.json`.

        In this task, several pathways can be active in a cell.
        """
        asked = self.options.pathways
        gene_sets = pathways.read_gene_sets(asked.file, asked.names)
        measured = np.array(self.symbols, dtype=object)[self.measured].tolist()
        cells = pathways.PathwayCells.of(self.counts[:, self.measured], measured, gene_sets, asked.deviations)
        names = list(cells.active)
        texts = [BETWEEN.join(np.array(names, dtype=object)[own]) for own in cells.active.to_numpy()]
        obs = self.obs.assign(**{_PATHWAYS: texts})
        study_metadata = {
            "abstract": self._questions(obs, self.study_metadata).study_metadata["abstract"],
            "gene_sets": names,
        }
        seeds, query = range(self.options.seeds), cells.rows(self.query)
        score = functools.partial(self._score, task="cpi", rows=np.arange(len(self.query)), candidates=names)
        predictions: dict[str, tuple[str, Sequence[np.ndarray]]] = {
            ZERO: ("", [score(self.instruction_model, seed=seed).to_numpy() for seed in seeds]),
            OTHERS: (
                "",
                [score(self.instruction_model, seed=seed, others=True).to_numpy() for seed in seeds],
            ),
        }
        few, failed = self._few_shot(
            "cpi", self.support, np.array(texts, dtype=object), obs, study_metadata,
            lambda instruction_model, seed: score(instruction_model, seed=seed).to_numpy(),
            lambda places: pathways.logistic(cells.rows(places), query, labels.LabelOptions()),
        )  # fmt: skip
        table, numbers = pathways.compare(
            {**predictions, **few},
            query,
            cells.rows(self.support),
            labels.LabelOptions(seeds=self.options.seeds),
        )
        left = len(gene_sets) - len(names)
        notes = [f"{left} gene sets with too few measured genes are excluded."] if left else []
        table.notes = (*table.notes, *failed, *notes, *self._notes("cpi", len(self.support)))
        return table, numbers


def folded(task: str, names: np.ndarray) -> np.ndarray:
    """Return the answers in the form in which they are scored.

    For "tcd", every disease becomes "tumor cell" (ZerOmics, appendix B.1).
    """
    return np.where(names == NORMAL, NORMAL, TUMOR).astype(object) if task == "tcd" else names


def prediction(task: str, table: pd.DataFrame) -> labels.LabelPrediction:
    """Return the most probable answer of each cell, and the probabilities of all answers.

    The answers are in the form that `folded` returns.
    """
    best = table.columns.to_numpy(object)[table.to_numpy().argmax(axis=1)]
    if task == "tcd":
        table = pd.DataFrame({NORMAL: table[NORMAL], TUMOR: 1 - table[NORMAL]})
    return labels.LabelPrediction(pd.DataFrame({task: folded(task, best)}, dtype=object), {task: table})
