"""Define the flags that choose a model: its path or Hub id, the checkpoint of a run, and adapters."""

from __future__ import annotations

from typing import Any

from absl import flags

from sct.commands.flag_errors import FlagError

MODEL: flags.FlagHolder[Any] = flags.DEFINE_string(
    "model", None, "Model: a packaged model (see `sct models`), a model folder, a run folder or a Hub id."
)
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint to use from a run folder. Default: the best checkpoint.",
    lower_bound=1,
)  # fmt: skip
_ADAPTERS = flags.DEFINE_string(
    "adapters", None, "Adapter folder to add to --model, such as `sct finetune` writes."
)


def model() -> Any:
    """Return the path of the model that the flags choose.

    With --step or --adapters, load the model and return the loaded model instead of a path.
    """
    if _STEP.value is None and _ADAPTERS.value is None:
        return MODEL.value
    if MODEL.value is None:
        given = "--adapters adds adapters to a model"
        if _STEP.value is not None:
            given = "--step chooses a checkpoint of a run"
        raise FlagError(f"{given}, but --model is missing: add --model=MODEL.")
    from sct.weights.load import load

    return load(MODEL.value, step=_STEP.value, adapters=_ADAPTERS.value)
