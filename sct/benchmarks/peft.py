"""Benchmark methods of fine-tuning for cell types, in the layout of Table 3 of the scPEFT paper."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from sct import families, messages
from sct.benchmarks.zero_shot import facts_of, read_options, train_missing
from sct.checks import check_at_least, check_choice, check_distinct, check_not_empty
from sct.data.labeled_cells import TEST, TRAIN, AnnotatedCells, SplitOptions
from sct.data.store import Store
from sct.errors import ConfigError, DataError, DivergedError, first_line
from sct.eval.embedding import measures as embeddings
from sct.eval.labels.annotation import ECE, METRICS, SILHOUETTE, TRAINED, AnnotationResult
from sct.eval.reports import folder as report_folder
from sct.eval.reports.page import Figure, figure_svg
from sct.eval.reports.report import METHOD, MODEL, Report
from sct.folder_lock import only_one
from sct.inference import inputs
from sct.tasks.annotation import AnnotationConfig
from sct.tasks.finetuning import METHODS, PeftConfig
from sct.train.finetuning import TuneOptions, tune
from sct.train.parents import ParentRun, split
from sct.weights.pretrained import Pretrained

MINUTES, MEMORY, RATE = "minutes", "memory (GiB)", "learning rate"


@dataclasses.dataclass(frozen=True)
class PeftData:
    """Cells of the benchmark.

    Parameters
    ----------
    path
        Labeled cells: an .h5ad file, a .zarr folder, or a store with the genes of the model.
    label_key
        Column of `obs` with the labels.
    split_key, donor_key, test_fraction, split_seed
        See `sct.data.labeled_cells.SplitOptions`.
    shots
        Number of training cells per type, drawn at random; 0 for all. All methods and baselines get the same cells.
    layer
        Layer with the raw counts; empty for the first of X, raw and layers["counts"] that has raw counts.
    gene_column, duplicates
        Column of `var` with Ensembl ids or symbols (empty: the column that matches most genes), and what to do if
        several columns hold the same gene: "error", or "sum" them.
    """

    path: str = ""
    label_key: str = "cell_type"
    split_key: str = ""
    donor_key: str = ""
    test_fraction: float = 0.2
    split_seed: int = 0
    shots: int = 0
    layer: str = ""
    gene_column: str = ""
    duplicates: str = "error"

    def __post_init__(self) -> None:
        check_not_empty("data.path", self.path, advice="set --config.data.path to labeled cells")
        check_at_least("data.shots", self.shots, 0)
        check_choice("data.duplicates", self.duplicates, ("error", "sum"))
        if not self.test_fraction and not self.split_key:
            raise ConfigError("data.test_fraction is 0, but the benchmark needs test cells: set it above 0.")


@dataclasses.dataclass(frozen=True)
class PeftBenchmark:
    """Options of the benchmark; see `configs/benchmark_peft.py`.

    Parameters
    ----------
    model, output
        Pretrained model, and the folder of the report.
    methods
        Methods of fine-tuning; empty for all methods that the architecture supports.
    seeds
        Number of trainings of each method, with the seeds 0, 1, ...
    learning_rates
        Learning rates to try with the first seed. The one with the lowest validation loss is used for all seeds.
    data, peft
        Cells, and sizes of the adapters (`peft.method` has no effect).
    class_weights
        See `sct.tasks.annotation.AnnotationConfig`.
    epochs, batch_size, patience
        See `sct.train.finetuning.TuneOptions`.
    """

    model: str = ""
    output: str = "runs/benchmark_peft"
    methods: tuple[str, ...] = ()
    seeds: int = 3
    learning_rates: tuple[float, ...] = (1e-3, 1e-4)
    class_weights: str = AnnotationConfig.class_weights
    epochs: int = 100
    batch_size: int = 0
    patience: int = 10
    data: PeftData = dataclasses.field(default_factory=lambda: PeftData(path="-"))
    peft: PeftConfig = dataclasses.field(default_factory=PeftConfig)

    def __post_init__(self) -> None:
        check_at_least("seeds", self.seeds, 1)
        check_not_empty("learning_rates", self.learning_rates)
        check_distinct("methods", self.methods)
        for method in self.methods:
            PeftConfig(method=method)


def benchmark(
    config: Mapping[str, Any],
    adata: ad.AnnData | None = None,
    model: inputs.ModelLike | None = None,
    *,
    overwrite: bool = True,
) -> list[Report]:
    """Fine-tune a model with each method, several times, and compare the results on the same test cells.

    Parameters
    ----------
    config
        Options as in `configs/benchmark_peft.py`.
    adata, model
        Cells and model to use instead of those that the configuration names.
    overwrite
        Whether to replace an earlier report in the folder.

    Returns
    -------
    The tables: all methods, and the cell types of the best method. The folder `config["output"]` gets `report.html`,
    `report.md`, `report.json` and `results.json`.

    Raises
    ------
    SctError
        An option, the cells or the model are not usable; the message says what to change.
    """
    config, builds_on = split(config)
    options, output = read_options(PeftBenchmark, config, adata, overwrite)
    with only_one(output, "benchmark", "--output"):
        return _benchmark(options, output, adata, model, builds_on if model is None else ())


def _benchmark(
    options: PeftBenchmark,
    output: Path,
    adata: ad.AnnData | None,
    model: inputs.ModelLike | None,
    builds_on: Sequence[ParentRun],
) -> list[Report]:
    started = time.monotonic()
    if model is None and not options.model:
        raise ConfigError(
            "model is empty, but fine-tuning needs a pretrained model: set --config.model=MODEL."
        )
    train_missing(builds_on)
    handle = inputs.load_model(model if model is not None else options.model)
    supported = families.finetuning(handle).methods
    methods = options.methods or supported
    for method in methods:
        for name in method.split("+"):
            check_choice(f"a method of the architecture {handle.family!r}", name, supported)
    cells = _open(options.data, adata, handle)
    if not len(cells.rows[TEST]):
        raise DataError(
            f"the split of {options.data.path} has no test cells, but the benchmark compares methods on test cells: "
            "set data.split_key to a column that also has the value test, or leave it empty."
        )
    report = Report(
        f"Cell types of {len(cells.rows[TEST]):,} test cells ({len(cells.names)} types, "
        f"{len(cells.rows[TRAIN]):,} training cells)",
        (METHOD, TRAINED, *METRICS, SILHOUETTE, ECE, MINUTES, MEMORY, RATE), better=dict.fromkeys(METRICS, "max"),
    )  # fmt: skip
    facts = facts_of(handle, options.model)
    runs = Trainings(handle, cells, options, lambda made: report_folder.keep([report], output, facts, made))
    best: tuple[float, str, AnnotationResult] | None = None
    figures: list[Figure] = []
    for method in methods:
        found = list(runs.of(method))
        if not found:
            continue
        own = {name: [numbers_of[name] for _, numbers_of in found] for name in found[0][1]}
        report.add(
            _title(method), f"{found[0][1]['trained_parameters']:,.0f}", *(own[each] for each in METRICS),
            own[SILHOUETTE], own[ECE], own[MINUTES], own[MEMORY][:1], f"{own[RATE][0]:g}", key=MODEL,
        )  # fmt: skip
        result = found[0][0]
        # The best method is chosen by the validation loss, not by the test cells.
        loss = float(np.mean(own["validation_loss"]))
        if best is None or loss < best[0]:
            best = loss, method, result
        figures.append(_figure(f"fine-tuned ({method})", result.embeddings[1], cells, own[SILHOUETTE][0]))
    if best is None or runs.first is None:
        raise DivergedError(
            "the loss of all methods diverged at all learning rates, so there is nothing to compare: set smaller "
            "values with --config.learning_rates."
        )
    first = runs.first
    for key, row in first.table.records():
        if key != MODEL:
            report.add(
                row[METHOD.key], row[TRAINED], *(row[each] for each in METRICS), row[SILHOUETTE], *["-"] * 4
            )
    if first.embeddings[0] is not None:
        others = [row for key, row in first.table.records() if key != MODEL]
        silhouette = next(row[SILHOUETTE][0] for row in others if isinstance(row[SILHOUETTE], list))
        figures.insert(0, _figure("native model", first.embeddings[0], cells, silhouette))
    report.notes = (*first.table.notes, *_notes(options), *runs.notes)
    classes = best[2].classes
    classes.title = f"Test cells by type, method {best[1]} (lowest validation loss), seed 0"
    facts = {
        **facts, "cells": options.data.path, "seeds": str(options.seeds),
        "time": f"{time.monotonic() - started:,.0f} s",
    }  # fmt: skip
    reports = [report, classes]
    report_folder.write(reports, output, facts, figures, "Fine-tuning for cell types", runs.numbers)
    return reports


class Trainings:
    """Fine-tune a model with several methods, learning rates and seeds.

    Parameters
    ----------
    model, cells, options
        Pretrained model, labeled cells, and options of the benchmark.
    keep
        Function that saves the numbers so far. It is called after every training.

    Attributes
    ----------
    first
        Results of the first training that did not diverge. Only these have the native model and the baselines, which
        are the same for all methods and seeds.
    notes
        Sentences about trainings that diverged.
    numbers
        Numbers of all trainings, as a list of dicts under "trainings".
    """

    def __init__(
        self,
        model: Pretrained,
        cells: AnnotatedCells,
        options: PeftBenchmark,
        keep: Callable[[Mapping[str, Any]], None],
    ):
        self.model, self.cells, self.options, self.keep = model, cells, options, keep
        self.first: AnnotationResult | None = None
        self.notes: list[str] = []
        self.numbers: dict[str, Any] = {"trainings": []}

    def of(self, method: str) -> Iterator[tuple[AnnotationResult, dict[str, float]]]:
        """Fine-tune with one method and each seed; yield the results and all numbers.

        The learning rate with the lowest validation loss of the first seed is used for all seeds.
        """
        rates = self.options.learning_rates
        for seed in range(self.options.seeds):
            found = [made for rate in rates if (made := self._train(method, seed, rate)) is not None]
            if not found:
                if seed == 0:
                    return
                continue
            kept = min(found, key=lambda made: made[1]["validation_loss"])
            rates = (kept[1][RATE],)
            yield kept

    def _train(self, method: str, seed: int, rate: float) -> tuple[AnnotationResult, dict[str, float]] | None:
        """Fine-tune once; return None if the loss diverges."""
        options = self.options
        messages.info(f"{method}, seed {seed}, learning rate {rate:g}")
        training = TuneOptions(options.epochs, rate, options.batch_size, options.patience, seed)
        is_first = self.first is None
        config = AnnotationConfig(options.class_weights, report_native=is_first, report_baselines=is_first)
        began = time.monotonic()
        about = {"method": method, "seed": seed, RATE: rate}
        try:
            _, result, found = tune(
                self.model, self.cells, dataclasses.replace(options.peft, method=method), config, training,
                measure_memory=seed == 0,
            )  # fmt: skip
        except DivergedError as error:
            self.notes.append(f"{_title(method)}, seed {seed}, learning rate {rate:g}: {first_line(error)}")
            messages.warn(self.notes[-1])
            self.numbers["trainings"].append({**about, "diverged": True})
            self.keep(self.numbers)
            return None
        assert result is not None
        self.first = self.first or result
        found |= {RATE: rate, "total_minutes": (time.monotonic() - began) / 60}
        found.setdefault(MEMORY, float("nan"))
        self.numbers["trainings"].append({**found, **about})
        self.keep(self.numbers)
        return result, found


def _title(method: str) -> str:
    names = {
        "full": "full fine-tuning", "classifier": "classifier only", "prefix": "prefix", "lora": "LoRA",
        "gene_token": "gene token prompt", "gene_encoder": "gene encoder prompt",
    }  # fmt: skip
    assert set(names) == set(METHODS)
    return " + ".join(names[each] for each in method.split("+"))


def _open(data: PeftData, adata: ad.AnnData | None, handle: Pretrained) -> AnnotatedCells:
    split_options = SplitOptions(
        data.split_key, data.donor_key, data.test_fraction, data.split_seed, data.shots
    )
    path = Path(data.path).expanduser()
    if adata is None and path.is_dir() and (path / "manifest.json").is_file():
        store = Store.open(path)
        store.check_vocabulary(handle.vocabulary)
        return AnnotatedCells.of_store(store, data.label_key, split_options)
    if adata is None:
        if not path.exists():
            raise DataError(
                f"data.path is {path}, but there is no such file or folder: set --config.data.path to an .h5ad file, a "
                ".zarr folder or a store."
            )
        try:
            adata = ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path)
        except Exception as error:
            raise DataError(
                f"data.path is {path}, but this is neither a store nor a readable AnnData file ({first_line(error)}): "
                "set --config.data.path to an .h5ad file, a .zarr folder or a store."
            ) from error
    return AnnotatedCells.of(
        adata, handle.vocabulary, data.label_key, split_options, layer=data.layer or None,
        gene_column=data.gene_column or None, duplicates="sum" if data.duplicates == "sum" else "error",
    )  # fmt: skip


def _figure(name: str, vectors: np.ndarray, cells: AnnotatedCells, silhouette: float) -> Figure:
    def draw() -> str:
        from matplotlib.figure import Figure as Canvas

        from sct import pl

        adata = ad.AnnData(obs=cells.obs.iloc[cells.rows[TEST]][[cells.label_key]].copy())
        adata.obsm["X_umap"] = embeddings.umap(vectors, 0)
        canvas = Canvas(figsize=(7, 5), layout="constrained")
        pl.umap(adata, cells.label_key, ax=canvas.add_subplot())
        return figure_svg(canvas)

    return Figure(
        f"UMAP of the test cells, {name}", draw, f"Silhouette of the cell types {silhouette:.3f}; seed 0."
    )


def _notes(options: PeftBenchmark) -> list[str]:
    rates = ", ".join(f"{rate:g}" for rate in options.learning_rates)
    chosen = rates
    if len(options.learning_rates) > 1:
        chosen = f"the one of {rates} with the lowest validation loss of seed 0"
    return [
        f"Seeds change the initial parameters and the order of the cells, not the split: {options.seeds}. Learning "
        f"rate: {chosen}. At most {options.epochs} epochs; training stops after {options.patience} epochs without a "
        "lower validation loss.",
        "Minutes: training, with compilation. Memory: arguments and temporary arrays of one compiled training step.",
    ]
