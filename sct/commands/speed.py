"""Measure how fast a configuration runs here, beside what the machine can do.

    sct speed --config=sct_sc --mode=train --json=speed.json
    sct speed --config=sct_sc --mode=forward --config.model.dtype=float32 --config.data.cells_per_bag=10
    sct speed --config=sct_sc --mode=loader --config.data.store=STORE

Modes: forward (the model on a batch, logits at all positions), train (the step of training with its optimiser and
loader), embed (`sct.tl.embed`), loader (bags and raw blocks of a store), ingest (an .h5ad file into a store), save (a
checkpoint of a run), and, for text decoders (gpt2, neox, llama) alone and the only mode of these, generate. The
ceiling, a large matrix product in the same type on the same device, is measured in the same run. Before a step is timed
it is compared with the reference path, on bags of --check_cells cells in as many pieces as it will take, and refused
where it differs.

Without data.store or data.dataset in the configuration, --cells synthetic ones are made in a temporary folder (TMPDIR),
with --nonzeros expressed genes on average, of the human vocabulary (with --config.model.num_genes fewer, of its first
genes). Parameters are random. In a clone, `python -m launch.speed` is the same program.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sct.commands import output_flags
from sct.commands.configuration import prepare

__all__ = ["main", "prepare"]

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration: FILE_OR_NAME[:VARIANT].")
_MODE = flags.DEFINE_string("mode", "train", "forward, train, loader, ingest, embed, save or generate.")
_JSON = flags.DEFINE_string("json", None, "File for all numbers.")
_STEPS = flags.DEFINE_integer("steps", 5, "Repetitions that are timed, 3 or more (of an ingest 1 or more).")
_WARMUP = flags.DEFINE_integer("warmup", 1, "Repetitions before them that are not timed.")
_CHECK = flags.DEFINE_integer(
    "check_cells", 0, "Cells of a bag that is compared with the reference path; 0: 2 (of a loader 50)."
)
_CELLS = flags.DEFINE_integer("cells", 0, "Synthetic cells; 0: by the mode, 1,000 to 40,000.")
_NONZEROS = flags.DEFINE_integer(
    "nonzeros", 0, "Expressed genes of a synthetic cell; 0: a tenth of the genes."
)
_CEILING = flags.DEFINE_integer(
    "ceiling_size", 0, "Side of the matrices of the ceiling; 0: by the kind of device."
)
flags.mark_flag_as_required("config")

FLAG_MODULES = ("sct.commands.output_flags",)


def main(argv: list[str]) -> None:
    """Measure as the flags say."""
    import jax
    from rich.console import Console

    from sct import outputs
    from sct.speed import report
    from sct.speed.job import SpeedOptions
    from sct.speed.run import measure

    options = SpeedOptions(
        _MODE.value, _STEPS.value, _WARMUP.value, _CHECK.value, _CELLS.value, _NONZEROS.value, _CEILING.value
    )
    path = Path(_JSON.value).expanduser() if _JSON.value else None
    if path is not None:
        outputs.check_file(path, "--json", output_flags.OVERWRITE.value)
    # The time of compilation is that of compiling, not of finding what an earlier run has left.
    jax.config.update("jax_enable_compilation_cache", False)
    found = measure(_CONFIG.value.to_dict(), options)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(report.table(found))
    for note in report.notes(found):
        console.print(note, soft_wrap=True, highlight=False)
    if path is not None:
        report.write(found, path)
        console.print(f"all numbers: {path}", soft_wrap=True, highlight=False)
