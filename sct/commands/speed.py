"""Measure the speed of a configuration on this machine, and compare it with the machine's limit.

    sct speed --config=sct_sc --mode=train --output=speed.json
    sct speed --config=sct_sc --mode=forward --config.model.dtype=float32 --config.data.cells_per_bag=10
    sct speed --config=sct_sc --mode=loader --config.data.store=STORE

Prints a table of times, memory and throughput. --output writes all numbers to a file. The modes are:

    forward   run the model on a batch, with logits at all positions
    train     run a training step, with optimizer and loader
    embed     run `sct.tl.embed`
    loader    read bags and raw blocks of a store
    ingest    ingest an .h5ad file into a store
    save      save a checkpoint of a run
    generate  generate text (only gpt2, neox and llama)

The machine's limit is the speed of a large matrix product with the same data type and device, measured in the same run.
Before a step is timed, its results are compared with the reference implementation on bags of --check_cells cells. A
difference is an error.

If the configuration sets neither data.store nor data.dataset, synthetic cells are made in a temporary folder (TMPDIR).
The synthetic cells have human genes; --config.model.num_genes=N uses the first N genes. Parameters are random. In a
clone, `python -m launch.speed` is the same program.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sct.commands import output_flags
from sct.commands.configuration import prepare

__all__ = ["main", "prepare"]

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration: a file, or the name of one that sct provides; optionally with :VARIANT.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["forward", "train", "loader", "ingest", "embed", "save", "generate"],
    "What to measure.",
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write all numbers to.")
_STEPS = flags.DEFINE_integer(
    "steps", 5, "Number of timed repetitions, at least 3 (1 for --mode=ingest).", lower_bound=1
)
_WARMUP = flags.DEFINE_integer("warmup", 1, "Number of repetitions before the timed ones.", lower_bound=1)
_CHECK = flags.DEFINE_integer(
    "check_cells",
    0,
    "Number of cells per bag in the comparison with the reference implementation; 0 means 2 (50 for --mode=loader).",
)
_CELLS = flags.DEFINE_integer(
    "cells", 0, "Number of synthetic cells; 0 means 1,000 to 40,000, depending on the mode.", lower_bound=0
)
_NONZEROS = flags.DEFINE_integer(
    "nonzeros", 0, "Average number of expressed genes per synthetic cell; 0 means a tenth of the genes."
)
_CEILING = flags.DEFINE_integer(
    "ceiling_size",
    0,
    "Rows and columns of the matrices that measure the limit; 0 means a default for the device.",
)
flags.mark_flag_as_required("config")

FLAG_MODULES = ("sct.commands.output_flags", "sct.commands.device_flag")
RENAMED_FLAGS = {"json": "output"}


def main(argv: list[str]) -> None:
    """Measure the speed of a configuration and print the result."""
    import jax

    from sct import messages, outputs
    from sct.global_settings import ERRORS, INFO, settings
    from sct.speed import report
    from sct.speed.job import SpeedOptions
    from sct.speed.run import measure

    options = SpeedOptions(
        _MODE.value, _STEPS.value, _WARMUP.value, _CHECK.value, _CELLS.value, _NONZEROS.value, _CEILING.value
    )
    path = Path(_OUTPUT.value).expanduser() if _OUTPUT.value else None
    if path is not None:
        outputs.check_file(path, "--output", output_flags.OVERWRITE.value)
    # Without the cache, the compilation time cannot be that of loading a program that an earlier run compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    found = measure(_CONFIG.value.to_dict(), options)
    # The table is the result, so --quiet does not hide it, unless it is in a file.
    console = messages.console(quiet=path is not None and settings.verbosity < INFO, level=ERRORS)
    console.print(report.summary(found), soft_wrap=True, highlight=False)
    console.print(report.table(found))
    for note in report.notes(found):
        console.print(note, soft_wrap=True, highlight=False)
    if path is not None:
        report.write(found, path)
        console.print(f"all numbers: {path}", soft_wrap=True, highlight=False)
