"""`sct.tl.finetune`: fine-tune a model for the cell types of labeled cells."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np

from sct import families, messages
from sct.checks import check_at_least
from sct.data.labeled_cells import SPLITS, TEST, TRAIN, AnnotatedCells, SplitOptions
from sct.errors import ConfigError
from sct.eval.labels.annotation import AnnotationResult
from sct.eval.reports import folder as report_folder
from sct.inference import inputs
from sct.models import registry
from sct.nn.paths import flatten, unflatten
from sct.outputs import check_folder
from sct.tasks.annotation import Annotation, AnnotationConfig
from sct.tasks.finetuning import PeftConfig
from sct.train.loop import TrainConfig, train
from sct.train.optim import OptimizerConfig, make_optimizer
from sct.train.sharding import MeshConfig, make_mesh
from sct.train.state import init_state, make_train_step
from sct.version import __version__
from sct.weights import adapter_folder
from sct.weights.pretrained import ANNOTATION, FULL, Pretrained, with_changed_outputs

ADAPTERS, MODEL_FOLDER = "adapters", "model"  # subfolders of the output
BATCH = 32  # cells per step; models that read bags have at least one bag
_TOKENS = 1 << 16  # largest number of tokens in a step, unless one record has more


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """Options of the training in `sct.tl.finetune`.

    Parameters
    ----------
    epochs
        Largest number of passes over the training cells.
    learning_rate
        Learning rate of Adam at the start. It is halved when the training loss has not fallen for three epochs.
    batch_size
        Number of cells in a step; 0: 32, or fewer if the model reads many genes.
    patience
        Number of epochs without a lower validation loss after which training stops; 0 trains for all epochs.
    seed
        Seed of the initial parameters, the order of the cells, and dropout.
    """

    epochs: int = 100
    learning_rate: float = 1e-4
    batch_size: int = 0
    patience: int = 10
    seed: int = 0


def finetune(
    adata: ad.AnnData,
    model: inputs.ModelLike,
    *,
    label_key: str,
    method: str = PeftConfig.method,
    method_options: Mapping[str, Any] | None = None,
    split_key: str | None = None,
    donor_key: str | None = None,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    class_weights: str = AnnotationConfig.class_weights,
    epochs: int = TuneOptions.epochs,
    learning_rate: float = TuneOptions.learning_rate,
    batch_size: int | None = None,
    patience: int = TuneOptions.patience,
    seed: int = 0,
    cells_per_bag: int | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    baselines: bool = True,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    key_added: str = "sct_finetune",
) -> Pretrained:
    """Fine-tune a pretrained model for the cell types of labeled cells (scPEFT paper).

    All methods but "full" leave the weights of the model as they are. They train a classifier on the cell embedding
    and, except "classifier", adapters inside the model. The result is a model that `sct.tl.annotate` and `sct.tl.embed`
    take.

    The cells are divided into training, validation and test cells. Training minimizes the cross-entropy of the cell
    types with Adam, and keeps the parameters with the lowest validation loss. Then the probabilities are calibrated on
    the validation cells, and the model is compared with other methods on the test cells.

    Parameters
    ----------
    adata
        Labeled cells with raw counts (N, n_var). Cells without a label are not used.
    model
        Pretrained model: result of `sct.load`, a path or a Hub id. It is not changed.
    label_key
        Column of `obs` with the labels.
    method
        "full", "classifier", "prefix", "lora", "gene_token" or "gene_encoder", or several methods with adapters, such
        as "lora+gene_token". Which of them a model supports depends on its architecture.
    method_options
        Options of the method, such as {"rank": 8}; see `sct.tasks.finetuning.PeftConfig`.
    split_key
        Column of `obs` with the values "train", "validation" and "test". Without it, cells are divided by `donor_key`.
    donor_key
        Column of `obs` with the donors. 80% of the donors train the model, one of which is used for validation; the
        other donors are the test. Without it, cells are divided at random within each type, which makes the test
        easier than one on new donors.
    test_fraction
        Share of the donors, or of the cells, that is used for the test; 0 uses all for training and makes no report.
    split_seed
        Seed of the division.
    class_weights
        "none", or "balanced": rare types get larger weights in the loss.
    epochs, learning_rate, patience
        See `TuneOptions`. The paper uses 100 epochs and a learning rate of 1e-5.
    batch_size
        Number of cells in a step. Default: 32, or fewer if the model reads many genes. For models that read bags, the
        number of bags is computed from this number.
    seed
        Seed of the initial parameters, the order of the cells, and dropout.
    cells_per_bag
        Number of cells that the model reads together. Default: the value from training.
    layer, gene_column, duplicates
        See `sct.tl.embed`.
    baselines
        Whether the report also has the native model and methods that need no pretrained model.
    output
        Folder to write: the subfolder `adapters` (for "full": `model`), and the reports `report.html`, `report.md` and
        `report.json`. The model is written directly after training, before the evaluation.
    overwrite
        Whether to replace the results of an earlier call in `output`.
    key_added
        `obs[key_added + "_split"]`: the split of each cell. `uns[key_added]`: metrics of the test cells and parameters.

    Returns
    -------
    The fine-tuned model. Save it with `sct.weights.adapter_folder.save`, or set `output`.

    Raises
    ------
    ConfigError
        The architecture does not support the method, an option is invalid, the model is already fine-tuned, or the
        output cannot be written.
    DataError
        A column is missing, there are fewer than two labels, a split is empty, or the counts cannot be read.
    DivergedError
        The loss is not finite.
    KeyboardInterrupt
        The training was stopped. With `output`, the parameters with the lowest validation loss so far are written
        first.

    Examples
    --------
    >>> tuned = sct.tl.finetune(adata, "runs/mine", label_key="cell_type", donor_key="donor")  # doctest: +SKIP
    >>> sct.tl.annotate(query, tuned)  # doctest: +SKIP
    """
    inputs.check_table(adata, False)
    handle = inputs.load_model(model)
    peft = registry.build(PeftConfig, {"method": method, **_method_options(method_options)}, "method_options")
    folder = None if output is None else Path(output).expanduser()
    if folder is not None:
        check_output(folder, overwrite, _size(handle) if method == FULL else 0)
    split = SplitOptions(split_key or "", donor_key or "", test_fraction, split_seed)
    cells = AnnotatedCells.of(
        adata,
        handle.vocabulary,
        label_key,
        split,
        layer=layer,
        gene_column=gene_column,
        duplicates=duplicates,
    )
    options = TuneOptions(epochs, learning_rate, batch_size or 0, patience, seed)
    config = AnnotationConfig(class_weights, report_native=baselines, report_baselines=baselines)
    save = None if folder is None else lambda made: _write_model(made, folder)
    tuned, result, numbers = tune(handle, cells, peft, config, options, cells_per_bag, save=save)
    target = inputs.output_adata(adata, False)
    splits = np.full(adata.n_obs, "", dtype=object)
    for name in SPLITS:
        splits[cells.rows[name]] = name
    target.obs[f"{key_added}_split"] = splits
    target.uns[key_added] = {
        "sct_version": __version__, "model": repr(handle), "weights": handle.fingerprint, "label_key": label_key,
        "method": method, "labels": list(cells.names), "split": cells.how, **numbers,
    }  # fmt: skip
    if result is not None:
        console = messages.console()
        console.print(result.table.table())
    if folder is not None and result is not None:
        facts = {**report_folder.environment(), "model": repr(tuned)}
        report_folder.write([result.table, result.classes], folder, facts, title="Fine-tuning for cell types")
    return tuned


def check_output(folder: Path, overwrite: bool, needed: int = 0) -> None:
    """Raise `ConfigError` if the folder of a fine-tuned model cannot be written; see `sct.outputs.check_folder`."""
    names = (ADAPTERS, MODEL_FOLDER, *report_folder.FILES)
    check_folder(folder, "--output", overwrite, needed, names)


def _size(model: Pretrained) -> int:
    return sum(int(np.prod(value.shape)) * 4 for value in flatten(model.variables).values())


def _method_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(PeftConfig)} - {"method"}
    for name in given or {}:
        if name not in known:
            raise ConfigError(
                f"method_options has {name!r}, but the options are {', '.join(sorted(known))}: use one of these."
            )
    return dict(given or {})


def tune(
    model: Pretrained,
    cells: AnnotatedCells,
    peft: PeftConfig,
    config: AnnotationConfig | None = None,
    options: TuneOptions | None = None,
    cells_per_bag: int | None = None,
    measure_memory: bool = False,
    save: Callable[[Pretrained], None] | None = None,
) -> tuple[Pretrained, AnnotationResult | None, dict[str, float]]:
    """Fine-tune a model on labeled cells; see `finetune`.

    Parameters
    ----------
    model
        Pretrained model. It is not changed.
    cells
        Labeled cells, aligned to the genes of the model.
    peft, config, options
        Options of the method, of the objective and of the training.
    cells_per_bag
        Number of cells that the model reads together; None: as in training.
    measure_memory
        Whether to compile the training step once more, to measure its memory.
    save
        Function that saves the fine-tuned model. It is called directly after training, before the evaluation, and also
        if training is stopped after the first validation.

    Returns
    -------
    The fine-tuned model; the results on the test cells, or None if there are none; and metrics and facts by name.

    Raises
    ------
    SctError
        See `finetune`.
    """
    config, options = config or AnnotationConfig(), options or TuneOptions()
    how, reader = families.finetuning(model), families.require(model, "embed")
    adapter_folder.check_native(model)
    check_at_least("epochs", options.epochs, 1)
    task = Annotation(config, peft, how, reader, cells, cells_per_bag, options.seed)
    source = task.dataset(TRAIN)
    assert source is not None
    loop = TrainConfig(
        epochs=options.epochs, batch_size=_batch_size(options, task, len(source)), log_every=0, eval_every=0,
        checkpoint_every=0, patience=options.patience, seed=options.seed, mesh=MeshConfig.parse("single"),
    ).for_records(len(source))  # fmt: skip
    optimizer = OptimizerConfig(
        peak_lr=options.learning_rate, init_lr=options.learning_rate, warmup_steps=0, schedule="plateau"
    )
    for note in task.notes(fresh=False):
        messages.info(note)
    memory = {"memory (GiB)": _memory(task, loop, optimizer)} if measure_memory else {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sct_finetune_") as name:
        # The training loop donates its initial variables, so pass a copy and keep the model usable.
        start = jax.tree.map(jnp.copy, flatten(model.variables))
        result = train(task, loop, optimizer, Path(name), start, keep=False)
    minutes = (time.monotonic() - began) / 60
    stopped = result.reason in ("signal", "interrupt")
    if stopped and (save is None or result.best_trained is None):
        raise KeyboardInterrupt
    trained = result.best_trained or result.state.trained
    variables = unflatten({**result.state.frozen, **trained})
    if peft.method != FULL:
        # The arrays of the model itself, so that fine-tuned models of one base share them.
        variables |= model.variables
    temperature = task.calibrate(variables)
    tuned = with_changed_outputs(model, variables=variables, data=task.exports()["data"], card="")
    if save is not None:
        save(tuned)
    if stopped:
        messages.info("training was stopped: the model with the lowest validation loss so far was saved.")
        raise KeyboardInterrupt
    progress = result.progress
    numbers = {
        "epochs": progress.step / max(loop.eval_every, 1),
        "best_epoch": (progress.best_step or 0) / max(loop.eval_every, 1),
        "trained_parameters": float(task.trained_parameters),
        "validation_loss": np.nan if progress.best is None else float(progress.best),
        "minutes": minutes, **memory,
    }  # fmt: skip
    if not len(cells.rows[TEST]):
        return tuned, None, numbers
    scored = task.evaluate(variables, model.variables, temperature)
    return tuned, scored, {**numbers, **scored.numbers}


def _memory(task: Annotation, loop: TrainConfig, optimizer: OptimizerConfig) -> float:
    """Return the memory of one compiled training step in GiB: its arguments and its temporary arrays."""
    mesh = make_mesh(loop.mesh)
    options = optimizer.for_evaluations(loop.eval_every)
    abstract, _ = init_state(
        task, lambda shapes: make_optimizer(options, loop.steps, shapes)[0], mesh, loop.seed
    )
    source = task.dataset(TRAIN)
    assert source is not None
    record: dict[str, np.ndarray] = {**source.record(0), "example_mask": np.ones((), np.float32)}
    batch = {
        name: jax.ShapeDtypeStruct((loop.batch_size, *value.shape), value.dtype)
        for name, value in record.items()
    }
    step: Any = make_train_step(
        task, make_optimizer(options, loop.steps, abstract.trained)[0], mesh, abstract
    )
    found = step.lower(abstract, batch).compile().memory_analysis()
    return float((found.argument_size_in_bytes + found.temp_size_in_bytes) / 2**30)


def _batch_size(options: TuneOptions, task: Annotation, records: int) -> int:
    """Return the number of records in a step: cells, or bags of cells."""
    asked = options.batch_size or max(1, min(BATCH, _TOKENS // max(task.tokens_per_record, 1)))
    if task.reader.in_bags:
        asked = max(1, round(asked / task.reader.cells_per_bag(task.cells_per_bag)))
    return min(asked, records)


def _write_model(model: Pretrained, folder: Path) -> None:
    """Write a fine-tuned model to its subfolder of an output folder; delete results of an earlier call."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*report_folder.FILES, report_folder.UNFINISHED):
        (folder / name).unlink(missing_ok=True)
    if model.data[ANNOTATION]["method"] == FULL:
        shutil.rmtree(folder / ADAPTERS, ignore_errors=True)
        model.save_pretrained(folder / MODEL_FOLDER)
    else:
        shutil.rmtree(folder / MODEL_FOLDER, ignore_errors=True)
        adapter_folder.save(model, folder / ADAPTERS)
