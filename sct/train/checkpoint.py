"""Save and restore the checkpoints of a run.

The library Orbax writes each checkpoint atomically and in the background. The latest checkpoints and the best one are
kept.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from sct.errors import CheckpointError, first_line, space_hint
from sct.train.state import State
from sct.weights import run_folder
from sct.weights.pretrained import match

# Time limit to write a checkpoint and to hash it, which only process 0 does. A model of 13 billion parameters with its
# optimizer state has 156 GB. Orbax's default is 20 minutes.
SAVE_SECONDS = 6 * 3600


@dataclasses.dataclass
class RunProgress:
    """Progress of a run: the part of the training state that is not stored in arrays.

    Attributes
    ----------
    step
        Number of updates so far.
    records_drawn
        Number of training records (such as bags of cells) that the loader has drawn so far; see `sct.data.loader`.
    best, best_step
        Best value of the monitored metric so far, and its step; None before the first validation.
    stale
        Number of validations since the validation with the best value.
    unlogged
        Results of the steps since the last log entry. These results are saved if a run stops between two entries. The
        resumed run then writes the same entry as a run that never stopped.
    """

    step: int = 0
    records_drawn: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    unlogged: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class _LastAndBest(policies.PreservationPolicy):
    """Keep the latest checkpoints and the best one.

    The step of the best checkpoint comes from `RunProgress`. Orbax's own policy does not know the metrics of
    checkpoints that an earlier process saved, and would therefore delete the best checkpoint after a resume.
    """

    def __init__(self, last: int):
        self.last = last
        self.best: int | None = None

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        """Return one bool per checkpoint, in the order of steps: whether to keep the checkpoint."""
        newest = {info.step for info in checkpoints[-self.last :]}
        return [info.step in newest or info.step == self.best for info in checkpoints]


def _not_orbax_error(record: logging.LogRecord) -> bool:
    """Return whether to show a log record: False for the errors of Orbax, True for all others.

    Orbax not only logs these errors, but also raises them. The log records, which contain tracebacks, are therefore not
    needed.
    """
    return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


class Checkpoints:
    """The `checkpoints` folder of a run.

    Parameters
    ----------
    folder
        Path of the folder.
    keep_last
        Number of latest checkpoints to keep, in addition to the best one.
    """

    def __init__(self, folder: Path, keep_last: int = 2):
        logging.getLogger("absl").addFilter(_not_orbax_error)
        self._kept, self._begun, self._folder = _LastAndBest(keep_last), 0, folder.absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(
                    timeout_secs=SAVE_SECONDS, post_finalization_callback=self._record
                ),
                # A run that was killed while it saved leaves a temporary folder behind.
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "progress"),
        )

    def _record(self) -> None:
        """Record the hashes of the written files.

        Orbax calls this method in the background, before it renames the temporary folder.
        """
        unfinished = self._folder.glob(f"{self._begun}.orbax-checkpoint-tmp*")
        run_folder.record_checkpoint(max(unfinished, key=lambda path: path.stat().st_mtime_ns))

    @property
    def latest(self) -> int | None:
        """Step of the latest complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, progress: RunProgress) -> None:
        """Wait until the previous checkpoint is saved, then start to save a new one in the background.

        The method returns as soon as Orbax has copied the arrays. The caller may then donate the state.

        Raises
        ------
        CheckpointError
            This checkpoint, or the previous one, cannot be written. `check`, `wait` and `close` raise this error as
            well.
        """
        with self._writing():
            self._manager.wait_until_finished()
            if progress.step in self._manager.all_steps():
                return
            self._kept.best, self._begun = progress.best_step, progress.step
            self._manager.save(
                progress.step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
                ),
                force=True,
            )

    def check(self) -> None:
        """Raise `CheckpointError` if a background save has failed, without waiting for a running save."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def restore(self, abstract: State, step: int | None = None) -> tuple[State, RunProgress]:
        """Load a checkpoint, by default the latest one, and shard its arrays as in `abstract`.

        Raises
        ------
        CheckpointError
            There is no checkpoint, its files were changed, or its parameters differ from those of the model. The
            message lists the parameters that differ.

        Warns
        -----
        UserWarning
            The checkpoint has no recorded hashes, so its files cannot be verified.
        """
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(
                f"{self._manager.directory} contains no complete checkpoint, so the run cannot resume: start a new "
                "run in another --workdir."
            )
        older = [other for other in self.steps() if other < step]
        instead = f"to resume from step {older[-1]}" if older else "to start again"
        run_folder.verify_checkpoint(self._folder / str(step), shared=True, instead=instead)
        self._check_shapes(abstract, step)
        try:
            loaded = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:
            folder = self._manager.directory / str(step)
            raise CheckpointError(
                f"the checkpoint {folder} cannot be read ({first_line(error)}): if it is damaged, delete that folder "
                f"{instead}."
            ) from error
        for group in (loaded.state.trained, loaded.state.frozen):
            run_folder.check_finite_arrays(group, self._folder / str(step))
        return loaded.state, RunProgress(**loaded.progress)

    def _check_shapes(self, abstract: State, step: int) -> None:
        """Raise `CheckpointError` with a list of the parameters that differ between the model and a checkpoint."""
        try:
            saved = ocp.PyTreeCheckpointer().metadata(self._manager.directory / str(step) / "state")
            stored = {**saved.item_metadata.tree["frozen"], **saved.item_metadata.tree["trained"]}
        except Exception:
            return  # the files are damaged; `restore` raises the better error for this
        source = f"the checkpoint {self._manager.directory / str(step)}"
        match(stored, {**abstract.frozen, **abstract.trained}, source)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until the last checkpoint is on disk, and release the folder."""
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            older = [step for step in self._manager.all_steps(read=True) if step != self._begun]
            reason = _reason(error)
            raise CheckpointError(
                f"the checkpoint of step {self._begun} cannot be written to {self._manager.directory} "
                f"({reason}): check that the folder is writable{space_hint(reason)}, then run the same command again "
                + (f"to resume from step {max(older)}." if older else "to start from the beginning.")
            ) from error


def _reason(error: Exception) -> str:
    """Return the operating system's reason for a failed write.

    Without such a reason, return the first line of the error.
    """
    known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOENT)
    words = [os.strerror(number) for number in known]
    return next((text for text in words if text in str(error)), first_line(error))
