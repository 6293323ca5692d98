"""Train a model, or go on with a run.

    sct train --config=sct_sc:quickstart
    sct train --config=sct_sc --config.data.store=STORE --config.optimizer.peak_lr=2e-4 --workdir=runs/mine

A configuration is a file, or the name of one that comes with sct; a variant follows a colon, and any of its
fields is overridden as `--config.section.field=value`. Running the same command again resumes the run in
`--workdir`. A configuration with a section `sweep` (sct_ablations) is several runs, trained one after the other in
`WORKDIR/NAME`; `--only=NAME,NAME` chooses. In a clone, `python -m launch.train` is the same program.

On several machines, the same command is started on each with `--multihost` (launch/slurm, launch/tpu). Where one
process ends, the others end too, within a minute, and the command goes on from the last checkpoint on any number of
processes.

Exit status: 0 where nothing is left to do (also after train.stop_at), 75 where the same command goes on (SIGTERM came,
or another process was lost), 130 after Ctrl-C, which also saves, and 1 for a mistake, a run folder in which another
process trains, or a loss that is not finite. A process that was asked to stop is waited for while it saves, so that the
same command can be started again at once.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sct.commands.compilation import DEFAULT, keep_programs
from sct.commands.configuration import prepare
from sct.errors import AGAIN, ConfigError

__all__ = ["main", "prepare"]

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration: FILE_OR_NAME[:VARIANT].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; runs/CONFIGURATION[-VARIANT] by default.")
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    f"Folder of compiled programs kept between runs; '' for none; $JAX_COMPILATION_CACHE_DIR or {DEFAULT} by default.",
)
_MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "This is one process of several; Slurm and TPU pods need nothing else."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, with --multihost elsewhere.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, with --coordinator.")
_JOIN = flags.DEFINE_integer("join_seconds", 300, "How long processes wait for each other, with --multihost.")
_ONLY = flags.DEFINE_list("only", [], "Runs of a sweep to train, NAME,NAME; all of them by default.")
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
        raise ConfigError("--coordinator, --num_processes and --process_id need --multihost: add it.")
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
        raise ConfigError("--only chooses runs of a sweep, but this configuration is one run: leave it out.")
    return experiment.run(config, workdir).reason
