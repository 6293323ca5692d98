"""Implement `sct.tl.benchmark`: compare a model with baselines on unseen cells (sCT paper, section 4)."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import anndata as ad
import numpy as np
from scipy import sparse

from sct import families
from sct.checks import check_at_least, check_choice, check_distinct, check_not_empty, check_share
from sct.data.bags import BagOptions, BagSource
from sct.data.cells import CellCounts, CellStudy
from sct.data.class_prior import ClassPrior
from sct.data.coordinates import SCALES
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.store import SPLITS, Store
from sct.errors import ConfigError, DataError, SctError, TrainingStoppedError, first_line
from sct.eval.embedding import measures as embeddings
from sct.eval.embedding.baselines import fit_components
from sct.eval.imputation import natural
from sct.eval.imputation import protocols as imputation
from sct.eval.imputation.eval_cells import EvalCells
from sct.eval.imputation.scoring import ImputationModel, ProtocolResult
from sct.eval.reports import folder as report_folder
from sct.eval.reports.page import Figure, figure_svg
from sct.eval.reports.report import MODEL, REFERENCE, Report
from sct.folder_lock import only_one
from sct.inference import inputs
from sct.inference.bags import BagReader, plan_bags
from sct.inference.fitting import parts as parts_of
from sct.inference.readouts import FITTED
from sct.models.registry import build
from sct.outputs import check_folder
from sct.tl.embedding import Contexts, default_name
from sct.tl.readout import row_of
from sct.train.experiment import train_parents
from sct.train.parents import ParentRun, split
from sct.weights.pretrained import Pretrained

ASSUMED_RATES = "its masking rates are not recorded: 15% and 1% are assumed"
_REPORT_BYTES = 10_000_000  # disk space that a report with figures may need


@dataclasses.dataclass(frozen=True)
class CellChoice:
    """Options for the cells of a benchmark, which are read from a file or a store.

    Parameters
    ----------
    path
        File (.h5ad or .zarr) or store with the cells.
    split
        Split whose studies are scored if `path` is a store: "test", "validation" or "train".
    layer
        Where the raw counts are: "X", "raw" or a layer. By default, the first of these that holds raw counts.
    gene_column
        Column of `var` with Ensembl ids or gene symbols. By default, the column is found automatically.
    duplicates
        What to do if several columns belong to one gene: "error", or "sum" to add their counts.
    study_key
        Column of `obs` that divides the cells of a file into studies, donors or slides; "" if the file is a single
        study.
    max_cells
        Maximum number of cells drawn at random from each study; 0 for all cells.
    seed
        Random seed for drawing the cells.
    """

    path: str = ""
    split: str = "test"
    layer: str = ""
    gene_column: str = ""
    duplicates: str = "error"
    study_key: str = ""
    max_cells: int = 10_000
    seed: int = 0

    # Defaults for benchmarks that do not read spatial coordinates or a training store.
    spatial_key = ""
    train = ""

    def __post_init__(self) -> None:
        check_choice("data.split", self.split, SPLITS)
        self._check_not_negative("max_cells", "seed")

    def _check_not_negative(self, *names: str) -> None:
        for name in names:
            check_at_least(f"data.{name}", getattr(self, name), 0)


@dataclasses.dataclass(frozen=True)
class ZeroShotData(CellChoice):
    """Options for the cells to evaluate.

    Parameters
    ----------
    train
        Store with the studies that the model was trained on. Baselines are fitted on these studies. If `path` is a
        store, this option is not needed.
    spatial_key
        Key of the spatial coordinates in `obsm`. A study without this key is evaluated without coordinates.
    label_key
        Column of `obs` with labels, such as cell types. A study without this column has no evaluation of embeddings.
    batch_key
        Column of `obs` with batches, for integration metrics; "" for none.
    cells_per_bag
        Number of cells per bag; 0 uses the number with which the model was trained.
    max_bags
        Maximum number of bags in which imputation is evaluated, spaced evenly over the study; 0 for all bags.
    """

    train: str = ""
    spatial_key: str = "spatial"
    label_key: str = "cell_type"
    batch_key: str = ""
    cells_per_bag: int = 0
    max_bags: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_not_negative("cells_per_bag", "max_bags")


@dataclasses.dataclass(frozen=True)
class NaturalImputationOptions:
    """Options of natural imputation, in which expressed and unexpressed genes are equally likely to be masked.

    Parameters
    ----------
    run
        Whether to run this evaluation.
    ratio
        Fraction of the measured genes of each cell that is masked.
    whole_genes
        Whether to add an evaluation in which the same genes are masked in all cells, as `sct.tl.impute` does.
    """

    run: bool = True
    ratio: float = natural.RATIO
    whole_genes: bool = True

    def __post_init__(self) -> None:
        check_share("natural_imputation.ratio", self.ratio, zero=False, one=False)


@dataclasses.dataclass(frozen=True)
class GeneImputationOptions:
    """Options of the imputation of randomly masked genes, in the protocol of the paper.

    Parameters
    ----------
    run
        Whether to run this evaluation.
    ratios
        Fractions of the measured genes of each cell that are masked. Each fraction is evaluated separately.
    magic
        Whether to include the baseline MAGIC.
    """

    run: bool = True
    ratios: tuple[float, ...] = imputation.RATIOS
    magic: bool = True

    def __post_init__(self) -> None:
        check_not_empty("gene_imputation.ratios", self.ratios)
        for ratio in self.ratios:
            check_share("gene_imputation.ratios", ratio, zero=False, one=False)
        check_distinct("gene_imputation.ratios", self.ratios)


@dataclasses.dataclass(frozen=True)
class CellImputationOptions:
    """Options of whole-cell imputation.

    Attributes
    ----------
    run
        Whether to run this evaluation.
    numbers
        Numbers of cells to mask in a bag. (0,) selects the numbers of the paper, scaled to the bag size.
    """

    run: bool = True
    numbers: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class FixedGenesOptions:
    """Options of the imputation of genes that are masked in all cells.

    Parameters
    ----------
    run
        When to run this evaluation: "always", "never", or "spatial", which means only for data with spatial
        coordinates.
    per_group
        Number of genes to mask in each group. Genes are grouped by the fraction of cells in which their count is zero.
    """

    run: str = "spatial"
    per_group: int = 25

    def __post_init__(self) -> None:
        check_choice("fixed_genes.run", self.run, ("always", "never", "spatial"))
        check_at_least("fixed_genes.per_group", self.per_group, 1)


@dataclasses.dataclass(frozen=True)
class EmbeddingOptions:
    """Options of the evaluation of embeddings.

    Parameters
    ----------
    run
        Whether to run this evaluation.
    k, folds
        Number of neighbors that vote for the label of a cell, and number of cross-validation folds.
    resolution
        Resolution of the Leiden clustering.
    scvi
        Whether to include the baseline scVI, if it is installed.
    readouts
        Readouts of the model to evaluate (see `sct.tl.embed`), each in its own row; () for all that it offers. All are
        computed in one pass over the cells.
    training_cells
        Largest number of training cells on which the baseline "zero-shot PCA" is fitted; 0 to leave it out. It needs a
        store with training studies (`data.train`).
    """

    run: bool = True
    k: int = 5
    folds: int = 5
    resolution: float = 1.0
    scvi: bool = True
    readouts: tuple[str, ...] = ()
    training_cells: int = 20_000

    def __post_init__(self) -> None:
        check_at_least("embedding.training_cells", self.training_cells, 0)


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the zero-shot benchmark: the model, the cells, and one group of options per evaluation.

    Parameters
    ----------
    model
        Model folder, run folder or Hub id; "" measures only the baselines.
    genes
        File with the gene vocabulary, used only without a model; "" for all human protein-coding genes.
    output
        Folder of the report.
    seeds
        Number of random seeds; each evaluation is repeated with each seed.
    """

    data: ZeroShotData = dataclasses.field(default_factory=ZeroShotData)
    natural_imputation: NaturalImputationOptions = dataclasses.field(default_factory=NaturalImputationOptions)
    gene_imputation: GeneImputationOptions = dataclasses.field(default_factory=GeneImputationOptions)
    cell_imputation: CellImputationOptions = dataclasses.field(default_factory=CellImputationOptions)
    fixed_genes: FixedGenesOptions = dataclasses.field(default_factory=FixedGenesOptions)
    embedding: EmbeddingOptions = dataclasses.field(default_factory=EmbeddingOptions)
    model: str = ""
    genes: str = ""
    output: str = "runs/benchmark"
    seeds: int = 5

    def __post_init__(self) -> None:
        if not self.data.path:
            raise ConfigError(
                "data.path is not set, but the benchmark needs cells: set --config.data.path to an .h5ad file or a "
                "store."
            )
        check_at_least("seeds", self.seeds, 1)


@dataclasses.dataclass(frozen=True)
class Part:
    """Hold one study to evaluate: its cells (`adata`), and their counts aligned to the genes of the model (`table`)."""

    name: str
    adata: ad.AnnData
    table: CellCounts

    @property
    def spatial(self) -> bool:
        """Return whether the cells have spatial coordinates."""
        return self.table.sections[0].places is not None


def benchmark(
    config: Mapping[str, Any],
    adata: ad.AnnData | None = None,
    model: inputs.ModelLike | None = None,
    *,
    overwrite: bool = True,
) -> list[Report]:
    """Evaluate a model and baselines on the same cells and the same masked genes, and write a report.

    Parameters
    ----------
    config
        Options as in `configs/benchmark.py`.
    adata
        Cells to use instead of `config["data"]["path"]`.
    model
        Model to use instead of `config["model"]`.
    overwrite
        Whether to replace an earlier report in the folder. If False, an earlier report raises an error before the
        computation starts.

    Returns
    -------
    The tables. The folder `config["output"]` gets `report.html`, `report.md`, `report.json` (the tables) and
    `results.json` (all numbers, including those that are in no table).

    Raises
    ------
    SctError
        An option, the cells or the model are not usable; the message says what to change.
    """
    config, builds_on = split(config)
    options, output = read_options(BenchmarkOptions, config, adata, overwrite)
    with only_one(output, "benchmark", "--output"):
        return _benchmark(options, output, adata, model, builds_on if model is None else ())


def _benchmark(
    options: BenchmarkOptions,
    output: Path,
    adata: ad.AnnData | None,
    model: inputs.ModelLike | None,
    builds_on: Sequence[ParentRun],
) -> list[Report]:
    """Run the benchmark and write the report; the caller holds the lock of the folder."""
    started = time.monotonic()
    # Find mistakes in the options of the cells before training the models that are missing.
    studies, train = open_cells(options.data, adata)
    for _, cells in studies if options.data.batch_key else ():
        inputs.column(cells, options.data.batch_key, "data.batch_key")
    train_missing(builds_on)
    chosen = model if model is not None else options.model
    handle = inputs.load_model(chosen) if chosen else None
    if handle is not None:
        families.require(handle, "embed")
    vocabulary = handle.vocabulary if handle is not None else _vocabulary(options.genes)
    if train is not None:
        train.check_vocabulary(vocabulary)
    parts = [part_of(name, study, vocabulary, options.data) for name, study in studies]
    facts = {
        **facts_of(handle, options.model),
        "cells per bag": str(_bag_size(_imputer(handle), options.data)),
        "cells": ", ".join(f"{part.name} ({part.adata.n_obs:,})" for part in parts),
        "counts": ", ".join(sorted({part.table.counts_from for part in parts})),
        "genes": ", ".join(f"{int(part.table.measured.sum()):,} of {len(vocabulary):,}" for part in parts),
        "training studies": "none" if train is None else f"{len(train.split('train'))} of {train.path}",
        "seeds": str(options.seeds),
    }
    reports: list[Report] = []
    figures: list[Figure] = []
    numbers: dict[str, Any] = {"imputation": [], "embedding": {}}

    def timed() -> dict[str, str]:
        return facts | {"time": f"{time.monotonic() - started:,.0f} s"}

    for tables, drawn in _measure(parts, handle, train, options, numbers):
        reports += tables
        figures += drawn
        report_folder.keep(reports, output, timed(), numbers)
    report_folder.write(reports, output, timed(), figures, "Zero-shot benchmark", numbers)
    return reports


def facts_of(handle: Pretrained | None, folder: str) -> dict[str, str]:
    """Return facts about the running process and the model, for the report.

    `folder` is the folder of the model; "" for a model in memory.
    """
    if handle is None:
        what = ("none (baselines only)", "-", "-", "-")
    else:
        what = (repr(handle), folder or "(in memory)", handle.fingerprint, handle.license)
    return {
        **report_folder.environment(),
        **dict(zip(("model", "model folder", "weights", "license of the model"), what, strict=True)),
    }


def train_missing(builds_on: Sequence[ParentRun]) -> None:
    """Train the runs that a benchmark builds on, unless they are finished.

    Raises
    ------
    KeyboardInterrupt
        Ctrl-C stopped the training, after it has saved a checkpoint.
    TrainingStoppedError
        SIGTERM or the option train.stop_at stopped the training, after it has saved a checkpoint.
    SctError
        Any error of `sct.train.experiment.train_parents`.
    """
    stopped = train_parents(builds_on)
    if stopped is None:
        return
    if stopped.reason == "interrupt":
        raise KeyboardInterrupt("resume")
    why = {"signal": "SIGTERM", "stop_at": "train.stop_at"}[stopped.reason]
    raise TrainingStoppedError(
        f"the training of a model that the benchmark needs was stopped by {why} at step {stopped.progress.step:,}: "
        "run the same benchmark again to resume it.",
        stopped.reason,
    )


def read_options(
    kind: type[Any], config: Mapping[str, Any], adata: ad.AnnData | None, overwrite: bool
) -> tuple[Any, Path]:
    """Read and check the options of a benchmark; return the options and the checked output folder.

    Parameters
    ----------
    kind
        Dataclass of the options, with the fields `data.path` and `output`.
    config, adata, overwrite
        See `benchmark`.
    """
    values = json.loads(json.dumps(config))
    if adata is not None:
        values.setdefault("data", {})["path"] = "(in memory)"
    options = build(kind, values, "config")
    output = Path(options.output).expanduser()
    check_folder(output, "--output", overwrite, _REPORT_BYTES, report_folder.FILES)
    return options, output


def _vocabulary(path: str) -> GeneVocabulary:
    return GeneVocabulary.load(Path(path).expanduser()) if path else GeneVocabulary.human()


def open_cells(
    data: CellChoice, adata: ad.AnnData | None = None
) -> tuple[list[tuple[str, ad.AnnData]], Store | None]:
    """Read the studies to evaluate into memory.

    Also open the store with training studies for the baselines, or return None if there is none.
    """
    path = Path(data.path).expanduser()
    train = Store.open(Path(data.train).expanduser()) if data.train else None
    if adata is not None:
        return _divided(adata, data, "cells"), train
    if not path.exists():
        raise DataError(
            f"data.path is {path}, but there is no such file or folder: set --config.data.path to an .h5ad file, a "
            ".zarr folder or a store."
        )
    if path.is_dir() and (path / "manifest.json").is_file():
        store = Store.open(path)
        chosen = store.split(data.split)
        if not chosen:
            raise DataError(
                f"the store {path} has no study in the split {data.split!r}: assign a study to this split "
                f"with `launch.ingest --{data.split}=NAME`, or choose another split with --config.data.split."
            )
        whole = dataclasses.replace(data, study_key="")
        return [
            pair for each in chosen for pair in _divided(each.to_anndata(), whole, each.name)
        ], train or store
    try:
        cells = ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path, backed="r")
    except Exception as error:
        raise DataError(
            f"data.path is {path}, but this is neither a store nor a readable AnnData file ({first_line(error)}): set "
            "--config.data.path to an .h5ad file, a .zarr folder or a store."
        ) from error
    return _divided(cells, data, path.stem), train


def _divided(cells: ad.AnnData, data: CellChoice, name: str) -> list[tuple[str, ad.AnnData]]:
    """Split an AnnData into studies, each as (name, cells). Keep at most `max_cells` cells per study."""
    spatial_key = data.spatial_key if data.spatial_key in cells.obsm else None
    parts = []
    for section in inputs.sections(cells, data.study_key or None, spatial_key):
        rows = section.rows
        if data.max_cells and len(rows) > data.max_cells:
            rng = np.random.default_rng(data.seed)
            if section.places is None:
                rows = np.sort(rng.permutation(rows)[: data.max_cells])
            else:  # keep adjacent cells, so that spatial neighbors stay neighbors
                center = section.places[rng.integers(len(rows))]
                distance = ((section.places - center) ** 2).sum(axis=1)
                rows = np.sort(rows[np.argsort(distance, kind="stable")[: data.max_cells]])
        # Copy, because results are written into the AnnData.
        part = cells[rows].to_memory() if cells.isbacked else cells[rows].copy()
        part.uns = {key: value for key, value in part.uns.items() if key != SCALES}
        inputs.keep_scales(part, [dataclasses.replace(section, name="")], None, spatial_key)
        parts.append((f"{name}.{section.name}" if section.name else name, part))
    return parts


def part_of(name: str, study: ad.AnnData, vocabulary: GeneVocabulary, data: CellChoice) -> Part:
    """Read the counts and the spatial coordinates of a study, without the cells that have no counts."""

    def table(cells: ad.AnnData) -> CellCounts:
        spatial_key = data.spatial_key if data.spatial_key in cells.obsm else None
        return CellCounts(
            cells, vocabulary, inputs.sections(cells, None, spatial_key), layer=data.layer or None,
            gene_column=data.gene_column or None, duplicates=data.duplicates,  # type: ignore[arg-type]
        )  # fmt: skip

    made = table(study)
    if made.sections[0].scale is not None:
        inputs.keep_scales(study, made.sections, None, data.spatial_key)
    filled = made.cell_totals > 0
    if not filled.any():
        raise DataError(
            f"all cells of the study {name!r} have zero counts in the genes of the model: use a "
            "study with counts in these genes."
        )
    if not filled.all():
        study = study[filled].copy()
        made = table(study)
    return Part(name, study, made)


def _measure(
    parts: list[Part],
    handle: Pretrained | None,
    train: Store | None,
    options: BenchmarkOptions,
    numbers: dict[str, Any],
) -> Iterator[tuple[list[Report], list[Figure]]]:
    """Run all evaluation protocols, yield the tables and figures of each, and add the numbers to `numbers`.

    For a protocol that cannot run, yield a table with the reason.
    """
    gene, cell, fixed = options.gene_imputation, options.cell_imputation, options.fixed_genes
    with_fixed = fixed.run == "always" or (fixed.run == "spatial" and any(part.spatial for part in parts))
    protocols: dict[str, Callable[..., Any]] = {}
    if options.natural_imputation.run:
        settings: dict[str, Any] = {"ratio": options.natural_imputation.ratio, "magic": gene.magic}
        protocols["Natural imputation"] = functools.partial(natural.natural_imputation, **settings)
    if options.natural_imputation.run and options.natural_imputation.whole_genes:
        protocols["Natural imputation of whole genes"] = functools.partial(
            natural.natural_imputation, **settings, whole_genes=True
        )
    if gene.run:
        protocols["Imputation of masked genes"] = functools.partial(
            imputation.gene_imputation, ratios=gene.ratios, magic=gene.magic
        )
    if cell.run:
        chosen = tuple(number for number in cell.numbers if number)
        protocols["Imputation of whole cells"] = functools.partial(
            imputation.whole_cell_imputation, numbers=chosen, magic=gene.magic
        )
    if with_fixed:
        protocols["Imputation of fixed genes"] = functools.partial(
            imputation.fixed_gene_imputation, per_group=fixed.per_group, magic=gene.magic
        )
    if protocols:
        eval_cells, training, asked = _held_out(parts, handle, train, options.data)
        name = ", ".join(part.name for part in parts)
        name = name if len(name) < 60 else f"{len(parts)} studies"
        for title, protocol in protocols.items():
            try:
                outcome = protocol(eval_cells, asked, training, seeds=options.seeds, cells_name=name)
            except SctError as error:
                yield [reason(title, error)], []
                continue
            numbers["imputation"].append(outcome.as_dict())
            if isinstance(outcome, natural.NaturalResult):
                yield outcome.reports, [_reliability_figure(outcome)]
            else:
                yield outcome.reports, _imputation_figures(outcome, eval_cells.cells_per_bag)
    components = functools.cache(lambda: _components(train, options.embedding.training_cells))
    for part in parts if options.embedding.run else ():
        try:
            table, drawn, measured = _embedding(part, handle, options, components)
        except SctError as error:
            yield [reason(f"Embedding, {part.name}", error)], []
            continue
        numbers["embedding"][part.name] = measured
        yield [table], drawn


def reason(title: str, error: SctError) -> Report:
    """Return a table that contains only the reason why the evaluation could not run."""
    table = Report(title, ("method", "remark"))
    table.add("all", str(error))
    return table


def _imputer(handle: Pretrained | None) -> BagReader | None:
    """Return the reader that imputes with a model, or None if the model family cannot impute."""
    if handle is None or families.model(handle.family).impute is None:
        return None
    return cast(BagReader, families.require(handle, "impute"))


def _bag_size(reader: BagReader | None, data: ZeroShotData) -> int:
    if data.cells_per_bag or reader is None:
        return data.cells_per_bag or BagOptions.cells_per_bag
    return reader.cells_per_bag()


def _held_out(
    parts: list[Part], handle: Pretrained | None, train: Store | None, data: ZeroShotData
) -> tuple[EvalCells, BagSource | None, ImputationModel | None]:
    """Return three values: the cells to impute, the bags of the training studies, and the imputation model."""
    reader = _imputer(handle)
    size = _bag_size(reader, data)
    if reader is not None:
        bags = reader.options(size, spatial=True, with_counts=True)
    else:
        bags = BagOptions(cells_per_bag=size, num_positions=len(parts[0].table.vocabulary), with_counts=True)
    studies = []
    for part in parts:
        order = plan_bags(part.table.sections[0], size, data.seed).without_context()
        studies.append(CellStudy(part.table, 0, order, name=part.name))
    source = BagSource(studies, bags, exhaustive=True)  # type: ignore[arg-type]
    training = None
    if train is not None and train.split("train"):
        training = BagSource(train.split("train"), bags, exhaustive=True)
    asked = None
    if reader is not None and handle is not None:
        prior = ClassPrior.of(handle.data)
        asked = ImputationModel(
            reader.probabilities(prior), handle.variables, odds=prior.odds,
            fitted_on="its training studies", remark=ASSUMED_RATES if prior.assumed else "",
        )  # fmt: skip
    return EvalCells.read(source, data.max_bags), training, asked


def _reliability_figure(outcome: natural.NaturalResult) -> Figure:
    """Draw the reliability diagram of the predicted probability of expression."""
    caption = (
        f"Measured genes masked {'in all cells' if outcome.whole_genes else 'at random'}, all draws together. "
        "Probabilities on the diagonal are calibrated."
    )
    drawing = functools.partial(
        _drawn, "reliability", (8.2, 4.8), outcome.reliability, models=outcome.labels(MODEL)
    )
    title = (
        f"Reliability of the probability of expression{', genes masked in all cells' * outcome.whole_genes}"
    )
    return Figure(title, drawing, caption)


def _imputation_figures(outcome: ProtocolResult, cells_per_bag: int) -> list[Figure]:
    """Draw the MCC curves of all methods, and the confusion matrix of the model in the first setting."""
    titles = {
        "ratio": ("MCC against masking ratio", "masked genes", 1),
        "cells": ("MCC against masked cells", "masked cells of a bag", cells_per_bag),
    }
    if outcome.axis not in titles or not outcome.curves:
        return []
    title, masked, whole = titles[outcome.axis]
    shares = {row: [(value / whole, mcc) for value, mcc in curve] for row, curve in outcome.curves.items()}
    thick = {"models": outcome.labels(MODEL), "reference": outcome.labels(REFERENCE)}
    draw = functools.partial(_drawn, "mcc_by_ratio", (7.2, 5.6), shares, masked=masked, **thick)
    caption = "Mean over draws, with one standard deviation. The dashed line is the reference baseline."
    figures = [Figure(title, draw, caption)]
    first = next(iter(outcome.confusion.values()), {})
    for row, matrix in list(first.items())[:1]:
        setting = outcome.settings[0].name
        figures.append(
            Figure(
                f"Levels of the {row}, {setting[0].lower()}{setting[1:]}",
                functools.partial(_drawn, "imputation_confusion", (5.5, 4.8), matrix),
                "True level by predicted level, as a fraction of each row; all draws together.",
            )
        )
    return figures


def _embedding(
    part: Part,
    handle: Pretrained | None,
    options: BenchmarkOptions,
    components: Callable[[], Callable[[Any], np.ndarray] | None],
) -> tuple[Report, list[Figure], dict[str, Any]]:
    """Evaluate the embeddings of a study; return the table, the figures and the numbers.

    `components` returns the function that computes the principal components of the training cells, or None.
    """
    data, asked = options.data, options.embedding
    labels = part.adata.obs.get(data.label_key)
    if labels is None:
        raise DataError(
            f"`obs` has no column {data.label_key!r}: set --config.data.label_key to a column with cell "
            "labels."
        )
    settings = embeddings.EmbeddingMetricOptions(
        seeds=options.seeds, folds=asked.folds, k=asked.k, resolution=asked.resolution,
        baselines=tuple(name for name in embeddings.BASELINES if asked.scvi or name != embeddings.SCVI),
    )  # fmt: skip
    methods: dict[str, Any] = {}
    notes: list[str] = []
    if handle is not None:
        methods, notes = _readouts(part, handle, options)
    counts = part.table.read(np.arange(part.table.n_cells))
    if (transform := components()) is not None:
        methods[embeddings.ZERO_SHOT_PCA] = embeddings.EmbeddingMethod(
            lambda seed: transform(counts), embeddings.TRAINING_CELLS
        )
    batch = part.adata.obs[data.batch_key] if data.batch_key else None
    alone = batch is not None and batch.nunique() < 2
    table, measured = embeddings.measure(methods, counts, labels, None if alone else batch, settings)
    table.title = f"{part.name}: {table.title}"
    table.notes = (*table.notes, *notes)
    if alone:
        table.notes = (
            *table.notes,
            f"All cells have the same {data.batch_key}, so batch integration is not evaluated.",
        )
    figures = [
        _umap(part, color, data.seed)
        for color in (data.label_key, data.batch_key)
        if color and handle is not None
    ]
    return table, figures, measured


def _readouts(part: Part, handle: Pretrained, options: BenchmarkOptions) -> tuple[dict[str, Any], list[str]]:
    """Embed the cells of a study by all readouts; return the methods by row name, and notes for the table.

    The default embedding is also written to `obsm`, for the figures.
    """
    data, reader = options.data, families.require(handle, "embed")
    settings: dict[str, Any] = {
        "layer": data.layer or None, "gene_column": data.gene_column or None, "duplicates": data.duplicates,
        "spatial_key": data.spatial_key if part.spatial and reader.in_bags else None,
        "cells_per_bag": data.cells_per_bag or None if reader.in_bags else None, "seed": data.seed,
    }  # fmt: skip
    default, notes = default_name(handle), []
    names = options.embedding.readouts or sorted(reader.readouts, key=lambda name: name != default)
    small = [name for name in names if name in reader.readouts and not reader.readouts[name].is_large]
    try:
        contexts = Contexts.of(part.adata, handle, **settings, readout=names)
    except SctError as error:  # probably the memory of flat readouts; any other error is raised again below
        if options.embedding.readouts or not small or len(small) == len(names):
            raise
        contexts = Contexts.of(part.adata, handle, **settings, readout=small)
        left = ", ".join(name for name in names if name not in small)
        notes = [f"Readouts that were not measured: {left} ({error})"]
    totals = contexts.totals()
    part.adata.obsm[_EMBEDDING] = totals.get(default, next(iter(totals.values())))
    methods = {
        row_of(name) if name in reader.readouts else MODEL: embeddings.EmbeddingMethod(
            embedding, embeddings.TRAINING_CELLS if name == FITTED else embeddings.ZERO_SHOT
        )
        for name, embedding in totals.items()
    }
    if len(methods) > 1 and row_of(default) in methods:
        notes.append(f"The default readout of the model is {default}.")
    return methods, notes


def _components(train: Store | None, max_cells: int) -> Callable[[Any], np.ndarray] | None:
    """Fit principal components to training cells, and return the function that applies them; None without them."""
    studies = [] if train is None else train.split("train")
    if not studies or not max_cells:
        return None
    for study in studies:
        study.check_counts()
    chosen = zip(studies, parts_of(studies, max_cells, seed=0), strict=True)
    return fit_components(
        sparse.vstack([study.read(rows.start, rows.stop) for study, rows in chosen]).tocsr()
    )


# Keys in obsm of the embedding that the figures show, and of its UMAP. The input can already have an X_umap.
_EMBEDDING, _UMAP = "X_sct", "X_umap_sct"


def _umap(part: Part, color: str, seed: int) -> Figure:
    def draw() -> str:
        if _UMAP not in part.adata.obsm:
            part.adata.obsm[_UMAP] = embeddings.umap(part.adata.obsm[_EMBEDDING], seed)
        return _drawn("umap", (7, 5), part.adata, color, basis=_UMAP)

    title = f"UMAP of the model's embedding, {part.name}, by {color}"
    return Figure(title, draw, f"Colored by {color}.")


def _drawn(function: str, size: tuple[float, float], *arguments: Any, **options: Any) -> str:
    """Draw a figure with a function of `sct.pl` and return it as SVG."""
    from matplotlib.figure import Figure as Canvas

    from sct import pl

    canvas = Canvas(figsize=size, layout="constrained")
    getattr(pl, function)(*arguments, **options, ax=canvas.add_subplot())
    return figure_svg(canvas)
