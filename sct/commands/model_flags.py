"""Define the flags that choose a model: its path or Hub id, and the checkpoint of a run."""

from __future__ import annotations

from typing import Any

from absl import flags

from sct.commands.flag_errors import FlagError

MODEL: flags.FlagHolder[Any] = flags.DEFINE_string(
    "model", None, "Model: a model folder, a run folder or a Hub id."
)
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint to use from a run folder. Default: the best checkpoint.",
    lower_bound=1,
)  # fmt: skip


def model() -> Any:
    """Return the path of the model that the flags choose.

    With --step, load the checkpoint of this step and return the loaded model instead of a path.
    """
    if _STEP.value is None:
        return MODEL.value
    if MODEL.value is None:
        raise FlagError(
            "--step chooses a checkpoint of a run, but --model is missing: add --model=RUN_FOLDER."
        )
    from sct.weights.load import load

    return load(MODEL.value, step=_STEP.value)
