"""Train a model, or resume a run.

    sct train --config=sct_sc:quickstart
    sct train --config=sct_sc --config.data.store=STORE --config.optimizer.peak_lr=2e-4 --workdir=runs/mine

Writes a run folder: checkpoints, metrics, the best model as a model folder, and a report. A configuration is a file, or
the name of one that comes with sct; a variant follows a colon, and any of its fields is set by
`--config.section.field=value`. Running the same command again resumes the run in `--workdir`. A configuration with a
section `sweep` (sct_ablations) is several runs, trained one after the other in `WORKDIR/NAME`; `--only=NAME,NAME`
selects some. In a clone, `python -m launch.train` is the same program.

On several machines, start the same command on each with `--multihost` (launch/slurm, launch/tpu). If one process ends,
the others end within a minute, and the command resumes from the last checkpoint with any number of processes.

Exit status: 0 if nothing is left to do (also after train.stop_at), 75 if the same command should be run again (after
SIGTERM, or if another process was lost), 130 after Ctrl-C, which also saves, 2 for a wrong command line, and 1 for any
other mistake, a run folder in which another process trains, or a loss that is not finite. A command waits for a
process that is still saving to the same run folder, so it can be started again at once.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sct.commands.compilation import DEFAULT, keep_programs
from sct.commands.configuration import prepare
from sct.commands.flag_errors import FlagError
from sct.errors import AGAIN

__all__ = ["main", "prepare"]

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration: a file, or the name of one that comes with sct, and a variant after a colon.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder to write or to resume. Default: runs/CONFIGURATION[-VARIANT]."
)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    f"Folder to keep compiled programs in; empty for none. Default: $JAX_COMPILATION_CACHE_DIR or {DEFAULT}.",
)
_MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "This process is one of several. Slurm and TPU pods need no other flag."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Address of process 0, for --multihost without Slurm or a TPU pod."
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes, with --coordinator.", lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0, with --coordinator.", lower_bound=0
)
_JOIN = flags.DEFINE_integer(
    "join_seconds",
    300,
    "Seconds that processes wait for each other at the start, with --multihost.",
    lower_bound=1,
)
_ONLY = flags.DEFINE_list("only", [], "Names of the runs of a sweep to train. Default: all runs.")
flags.mark_flag_as_required("config")

# Why a run or a sweep ended -> exit status, where it is not 0.
_STATUS = {"signal": AGAIN, "interrupt": 130, "failed": 1}


def main(argv: list[str]) -> int:
    """Train as the flags say; the status to exit with."""
    keep_programs(_CACHE.value)  # before JAX is imported, which reads the environment then

    from sct.train import processes

    if _MULTIHOST.value:
        processes.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _JOIN.value)
    elif (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value) != (None, None, None):
        raise FlagError("--coordinator, --num_processes and --process_id need --multihost: add it.")
    with processes.together():
        return _STATUS.get(_run(), 0)


def _run() -> str:
    """Train one run or a sweep; why it ended."""
    from sct.train import experiment, sweep

    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    default = Path("runs") / "-".join([Path(file).stem, *([variant] if variant else [])])
    config, workdir = _CONFIG.value.to_dict(), _WORKDIR.value or default
    if "sweep" in config:
        return sweep.run(config, workdir, _ONLY.value).reason
    if _ONLY.value:
        raise FlagError(
            "--only selects runs of a sweep, but this configuration is a single run: leave it out."
        )
    return experiment.run(config, workdir).reason
