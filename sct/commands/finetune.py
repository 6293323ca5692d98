"""Fine-tune a pretrained model for the cell types of labeled cells in an .h5ad file.

    sct finetune --input=atlas.h5ad --model=runs/mine --label_key=cell_type --donor_key=donor --output=runs/tuned
    sct annotate --input=cells.h5ad --model=runs/mine --adapters=runs/tuned/adapters --output=out.h5ad

Writes a folder with the adapters and the classifier (adapters/) and a report on held-out cells (report.html). The model
itself does not change; with --method=full, the folder has the whole changed model instead (model/). Without
--split_key and --donor_key, cells are divided at random. In a clone, `python -m launch.finetune` is the same program.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags

from sct import messages
from sct.commands import model_flags, output_flags
from sct.commands.flag_errors import FlagError

_METHODS = ("full", "classifier", "prefix", "lora", "gene_token", "gene_encoder")
_INPUT = flags.DEFINE_string(
    "input", None, "Labeled cells: an .h5ad file or a .zarr folder with raw counts.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_LABEL = flags.DEFINE_string("label_key", None, "Column of obs with the labels.", required=True)
_METHOD = flags.DEFINE_string(
    "method",
    "gene_encoder",
    f"Method: {', '.join(_METHODS)}, or several with adapters, such as lora+gene_token.",
)
_METHOD_OPTIONS = flags.DEFINE_string(
    "method_options",
    "{}",
    "Options of the method as JSON: rank, alpha, length, width, scale, skip, layers; "
    'for example \'{"rank": 8, "layers": [2, 3]}\'.',
)
_SPLIT = flags.DEFINE_string("split_key", None, "Column of obs with the values train, validation and test.")
_DONOR = flags.DEFINE_string(
    "donor_key", None, "Column of obs with the donors; whole donors are then held out."
)
_TEST = flags.DEFINE_float(
    "test_fraction", 0.2, "Share of the donors, or of the cells, for the test; 0 for none.",
    lower_bound=0.0, upper_bound=0.9,
)  # fmt: skip
_WEIGHTS = flags.DEFINE_enum(
    "class_weights", "none", ["none", "balanced"], "balanced: rare cell types get larger weights in the loss."
)
_EPOCHS = flags.DEFINE_integer(
    "epochs", 100, "Largest number of passes over the training cells.", lower_bound=1
)
_RATE = flags.DEFINE_float("learning_rate", 1e-4, "Learning rate at the start.", lower_bound=0.0)
_PATIENCE = flags.DEFINE_integer(
    "patience", 10, "Number of epochs without a lower validation loss after which training stops; 0: never.",
    lower_bound=0,
)  # fmt: skip
_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Number of cells in a step. Default: 32, or fewer for long inputs.", lower_bound=1
)
_CELLS = flags.DEFINE_integer(
    "cells_per_bag", None, "Number of cells that the model reads together. Default: as in training.",
    lower_bound=1,
)  # fmt: skip
_LAYER = flags.DEFINE_string(
    "layer", None, "Where the raw counts are: X, raw or a layer. Default: the first that holds raw counts."
)
_COLUMN = flags.DEFINE_string(
    "gene_column", None, "Column of var with Ensembl ids or gene symbols. Default: found automatically."
)
_DUPLICATES = flags.DEFINE_enum(
    "duplicates",
    "error",
    ["error", "sum"],
    "If several columns belong to one gene: stop with an error, or sum them.",
)
_BASELINES = flags.DEFINE_bool(
    "baselines",
    True,
    "Also report the native model and methods without a pretrained model, on the same cells.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of the training.", lower_bound=0)
_SPLIT_SEED = flags.DEFINE_integer(
    "split_seed", 0, "Random seed of the division of the cells.", lower_bound=0
)
flags.mark_flag_as_required("model")

FLAG_MODULES = ("sct.commands.model_flags", "sct.commands.output_flags", "sct.commands.device_flag")


def main(argv: list[str]) -> None:
    """Fine-tune the model on the cells of the input file, and write the output folder."""
    from sct.commands import tables
    from sct.train.finetuning import ADAPTERS, MODEL_FOLDER, check_output, finetune

    target, options = Path(_OUTPUT.value).expanduser(), _method_options()
    check_output(target, output_flags.OVERWRITE.value)
    duplicates: Any = _DUPLICATES.value
    finetune(
        tables.read(_INPUT.value), model_flags.model(), label_key=_LABEL.value, method=_METHOD.value,
        method_options=options, split_key=_SPLIT.value, donor_key=_DONOR.value, test_fraction=_TEST.value,
        split_seed=_SPLIT_SEED.value, class_weights=_WEIGHTS.value, epochs=_EPOCHS.value,
        learning_rate=_RATE.value, batch_size=_SIZE.value, patience=_PATIENCE.value, seed=_SEED.value,
        cells_per_bag=_CELLS.value, layer=_LAYER.value, gene_column=_COLUMN.value, duplicates=duplicates,
        baselines=_BASELINES.value, output=target, overwrite=output_flags.OVERWRITE.value,
    )  # fmt: skip
    made = target / (MODEL_FOLDER if _METHOD.value == "full" else ADAPTERS)
    report = target / "report.html"
    messages.info(f"{made}; report: {report}" if report.is_file() else str(made))


def _method_options() -> dict[str, Any]:
    text = _METHOD_OPTIONS.value
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FlagError(
            f"--method_options is {text!r}, but it must be a JSON object: write it like "
            "--method_options='{\"rank\": 8}'."
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
