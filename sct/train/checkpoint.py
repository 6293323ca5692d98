"""Checkpoints of a run: Orbax, written in the background, atomic, the last ones and the best one kept."""

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

# For writing a checkpoint and then reading all of it to hash it, of which process 0 does the second alone: a model of
# 13 billion parameters with its optimizer is 156 GB. Orbax's default is 20 minutes.
SAVE_SECONDS = 6 * 3600


@dataclasses.dataclass
class RunProgress:
    """What a run knows beside its arrays.

    Attributes
    ----------
    step
        Updates made.
    records_drawn
        State of the loader, see `sct.data.loader`.
    best, best_step
        Best value of the watched number so far and the step of it (None before the first).
    stale
        Evaluations since the best one.
    unlogged
        What the steps since the last line of the log gave, where a run stops between two lines: the line is written
        when it goes on, as if it had not stopped.
    """

    step: int = 0
    records_drawn: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    unlogged: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class _LastAndBest(policies.PreservationPolicy):
    """Keep the last checkpoints and the best one.

    Which is best is told by the run's own progress: Orbax's policy by metric forgets the metrics of what an
    earlier process saved, and deletes the best checkpoint after a resume.
    """

    def __init__(self, last: int):
        self.last = last
        self.best: int | None = None

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        """For each checkpoint, in the order of steps, whether it stays."""
        newest = {info.step for info in checkpoints[-self.last :]}
        return [info.step in newest or info.step == self.best for info in checkpoints]


def _told_otherwise(record: logging.LogRecord) -> bool:
    """Whether to log a record: Orbax logs errors of saving with their traces before it raises them."""
    return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


class Checkpoints:
    """The `checkpoints` folder of a run.

    Parameters
    ----------
    folder
        Where they lie.
    keep_last
        Number of the latest ones kept, beside the best one.
    """

    def __init__(self, folder: Path, keep_last: int = 2):
        logging.getLogger("absl").addFilter(_told_otherwise)
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
        """Hash what was written; Orbax calls this in the background, just before it renames the folder."""
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
        """Start to save; returns as soon as the arrays are copied or held, the save before being finished.

        The state may be donated afterwards: what is held is not written over.

        Raises
        ------
        CheckpointError
            This checkpoint, or the one that was being written, cannot be written; so do `check`, `wait` and `close`.
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
        """Raise what went wrong in the background, without waiting."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def restore(self, abstract: State, step: int | None = None) -> tuple[State, RunProgress]:
        """Load a checkpoint (the latest by default) straight onto the mesh.

        Raises
        ------
        CheckpointError
            There is none, its files were changed, or it is of another model; the message says which parameters
            differ.

        Warns
        -----
        UserWarning
            It has no hashes.
        """
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"{self._manager.directory} holds no complete checkpoint.")
        older = [other for other in self.steps() if other < step]
        instead = f"to go on from step {older[-1]}" if older else "to start again"
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
                f"checkpoint {folder} cannot be read ({first_line(error)}): if it is damaged, delete that folder "
                f"{instead}."
            ) from error
        for group in (loaded.state.trained, loaded.state.frozen):
            run_folder.check_finite_arrays(group, self._folder / str(step))
        return loaded.state, RunProgress(**loaded.progress)

    def _check_shapes(self, abstract: State, step: int) -> None:
        """Raise with the list of parameters that differ from those of a checkpoint."""
        try:
            saved = ocp.PyTreeCheckpointer().metadata(self._manager.directory / str(step) / "state")
            there = {**saved.item_metadata.tree["frozen"], **saved.item_metadata.tree["trained"]}
        except Exception:
            return  # the files are damaged, which restoring says better
        source = f"the checkpoint {self._manager.directory / str(step)}"
        match(there, {**abstract.frozen, **abstract.trained}, source)

    def wait(self) -> None:
        """Wait until what was saved is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is being written and release the folder."""
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
                f"({reason}): check that the folder can be written to{space_hint(reason)}, and run the same command "
                "again, which goes on " + (f"from step {max(older)}." if older else "from the start.")
            ) from error


def _reason(error: Exception) -> str:
    """What the system says of a failed write, without the many words of the libraries in between."""
    known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOENT)
    words = [os.strerror(number) for number in known]
    return next((text for text in words if text in str(error)), first_line(error))
