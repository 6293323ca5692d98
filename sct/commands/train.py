"""Train a model, or resume a run.

    sct train --config=sct_sc:quickstart
    sct train --config=sct_sc --config.data.store=STORE --config.optimizer.peak_lr=2e-4 --workdir=runs/mine

Writes a run folder with checkpoints, metrics, the best model as a model folder, and a report. `--config` takes a
configuration file, or the name of a configuration that sct provides; a variant may follow after a colon.
`--config.section.field=value` sets a field of the configuration. Run the same command again to resume the run in
`--workdir`. With a larger `--config.train.steps`, the same command lengthens a finished run.

A configuration with a section `sweep`, such as sct_ablations, defines several runs. The runs are trained one after the
other, each in the folder `WORKDIR/NAME`; `--only=NAME,NAME` selects some of them. In a clone, `python -m launch.train`
is the same program.

On several machines, start the same command on each with `--multihost` (launch/slurm, launch/tpu). If one process ends,
the others end within a minute. Run the command again, with any number of processes, to resume from the last checkpoint.

Exit status:

    0    nothing is left to do (also after train.stop_at)
    75   run the command again: it received SIGTERM, or lost another process
    130  the run was stopped by Ctrl-C, and has saved a checkpoint
    2    the command line is wrong
    1    another error, such as a run folder in use or a loss that is not finite

The command can be started again at once: it waits for a process that is still saving to the same run folder.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sct.commands import device_flag
from sct.commands.compilation import DEFAULT, keep_programs
from sct.commands.configuration import prepare
from sct.commands.flag_errors import FlagError
from sct.errors import AGAIN

__all__ = ["main", "prepare"]

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration: a file, or the name of one that sct provides; optionally with :VARIANT.",
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
    "multihost", False, "This process is one of several. Under Slurm and on TPU pods no other flag is needed."
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
    "With --multihost, how many seconds the processes wait for each other at the start.",
    lower_bound=1,
)
_ONLY = flags.DEFINE_list("only", [], "Names of the runs of a sweep to train. Default: all runs.")
flags.mark_flag_as_required("config")

FLAG_MODULES = ("sct.commands.device_flag",)

# Exit status by the reason why a run or a sweep ended; other reasons have status 0.
_STATUS = {"signal": AGAIN, "interrupt": 130, "failed": 1}


def main(argv: list[str]) -> int:
    """Train one model, or all models of a sweep, and return the exit status of the command."""
    keep_programs(_CACHE.value)  # before the import of JAX, which reads the environment

    from sct.train import processes

    if _MULTIHOST.value:
        processes.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _JOIN.value)
    elif (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value) != (None, None, None):
        raise FlagError("--coordinator, --num_processes and --process_id need --multihost: add --multihost.")
    device_flag.check()  # after `join`, before which JAX must not start
    with processes.together():
        return _STATUS.get(_run(), 0)


def _run() -> str:
    """Train one run or all runs of a sweep, and return the reason why training ended."""
    from sct.train import experiment, sweep

    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    default = Path("runs") / "-".join([Path(file).stem, *([variant] if variant else [])])
    config, workdir = _CONFIG.value.to_dict(), _WORKDIR.value or default
    if "sweep" in config:
        return sweep.run(config, workdir, _ONLY.value).reason
    if _ONLY.value:
        raise FlagError(
            "--only selects runs of a sweep, but this configuration is a single run: remove --only."
        )
    return experiment.run(config, workdir).reason
