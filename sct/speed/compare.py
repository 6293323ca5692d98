"""Compare the outputs of a fast step with those of the reference implementation, and define the tolerances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sct.errors import SctError
from sct.nn.reference import reference_kernels, smaller_chunks
from sct.speed.ceiling import arithmetic

# Maximum relative difference (L2 norm) with exact float32 products. It allows for about 40 layers and for sums over a
# million positions in another order. Measured for the full model on 2 cells: gradient 2e-6, worst leaf 9e-6 (CPU, jax
# 0.10).
TOLERANCE = 1e-4
# The gradient of one parameter (leaf) can be a small difference of large numbers. Its error is therefore divided by its
# norm plus LEAF_FLOOR times the norm of the whole gradient, and its tolerance is LEAF_FACTOR times larger.
LEAF_FLOOR, LEAF_FACTOR = 1e-3, 5.0
# The rounding error of low-precision products depends on the model and its parameters (bfloat16: 3% of the full logits,
# 8% of a small gradient). It is measured with the reference kernels in the same arithmetic. Rounding errors are nearly
# random, so the fast step may have up to this factor of this error.
ROUNDING_FACTOR = 3.0
# The error of the loss, a single number, can be small by chance, so its tolerance is fixed: 8 rounding errors of the
# arithmetic, about the square root of the number of roundings on a path through the model.
LOSS_TOLERANCE = {"float32": TOLERANCE, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}
# Model options of the reference implementation; options that only save time or memory are off.
PLAIN_MODEL: Mapping[str, Any] = {"remat": "none"}
EXACT_MODEL: Mapping[str, Any] = {"dtype": "float32"}

Check = dict[str, Any]
# Name -> array, or name -> gradient (path -> array).
Outputs = dict[str, Any]
# Runs a step with some model options and returns its outputs.
ComputationPath = Callable[[Mapping[str, Any]], Outputs]
Judge = Callable[[str, Outputs, Outputs, Mapping[str, float]], dict[str, float]]


def _norm(x: Any) -> float:
    flat = np.asarray(x, np.float64).ravel()
    return float(np.sqrt(flat @ flat))


def difference(made: Any, reference: Any) -> float:
    """Return the norm of the difference between an array and the reference, divided by the norm of the reference."""
    made, reference = np.asarray(made, np.float64), np.asarray(reference, np.float64)
    if made.shape != reference.shape:
        return float("inf")
    return _norm(made - reference) / max(_norm(reference), 1e-30)


def gradient_difference(made: Mapping[str, Any], reference: Mapping[str, Any]) -> tuple[float, float, str]:
    """Compare two gradients.

    Return three values: the relative difference of the whole gradient, the relative difference of the worst leaf (the
    array that differs most), and the path of this leaf.
    """
    if set(made) != set(reference):
        return float("inf"), float("inf"), str(sorted(set(made) ^ set(reference))[0])
    errors, norms = {}, {}
    for path, right in reference.items():
        errors[path] = _norm(np.asarray(made[path], np.float64) - np.asarray(right, np.float64))
        norms[path] = _norm(right)
    whole = float(np.hypot.reduce(list(norms.values())))
    leaves = {path: error / (norms[path] + LEAF_FLOOR * whole + 1e-30) for path, error in errors.items()}
    # NaN counts as the worst value.
    worst = max(leaves, key=lambda path: np.nan_to_num(leaves[path], nan=np.inf))
    return float(np.hypot.reduce(list(errors.values()))) / max(whole, 1e-30), leaves[worst], worst


def differences(made: Outputs, reference: Outputs) -> dict[str, float]:
    """Return the relative difference of each output, as a dict by name.

    A gradient has two entries: one for the whole gradient and one for its worst leaf.
    """
    found = {}
    for name, expected in reference.items():
        if isinstance(expected, dict):
            found[name], found[f"worst leaf of the {name}"], _ = gradient_difference(made[name], expected)
        else:
            found[name] = difference(made[name], expected)
    return found


def require(what: str, made: Outputs, expected: Outputs, limits: Mapping[str, float]) -> dict[str, float]:
    """Return the relative difference of each output. Raise `SctError` if a difference exceeds its limit or is NaN."""
    found = differences(made, expected)
    for name, value in found.items():
        if not value <= limits[name]:
            leaves = [gradient_difference(made[n], e)[2] for n, e in expected.items() if isinstance(e, dict)]
            raise SctError(
                f"the {name} of {what} differs from the reference implementation by {value:.2g} in relative norm, but "
                f"at most {limits[name]:.2g} is "
                f"allowed{f' (largest difference: the gradient of {leaves[0]})' if leaves else ''}, so the training "
                "step was not timed: report this as a bug in the training step."
            )
    return found


def compare(
    what: str, dtype: str, fast: ComputationPath, plain: ComputationPath, share: float, judge: Judge = require
) -> Check:
    """Compare a step with the reference implementation, first in exact float32, then in the number format of the step.

    Parameters
    ----------
    what
        Name of the step, for messages.
    dtype
        Compute dtype of the model.
    fast, plain
        `fast` runs the step to be timed, and `plain` runs the reference implementation. `fast` is called first.
    share
        Size of the compared batch relative to the timed batch. The fast step splits the compared batch into as many
        chunks as it will use for the timed batch.
    judge
        Function that takes the name of a comparison, the outputs, the expected outputs and the limits. It returns the
        differences, or raises an error.

    Raises
    ------
    SctError
        The outputs differ by more than rounding errors explain.
    """
    kind = arithmetic(dtype)
    with jax.default_matmul_precision("highest"):
        with smaller_chunks(share):
            made = fast(EXACT_MODEL if kind != "float32" else {})
        with reference_kernels():
            expected = plain({**PLAIN_MODEL, **EXACT_MODEL})
    names = differences(expected, expected)
    limits = {name: TOLERANCE * (LEAF_FACTOR if "leaf" in name else 1.0) for name in names}
    found = judge(f"{what} in float32", made, expected, limits)
    if kind == "float32":
        return {"arithmetic": kind, "differences": found, "limits": limits}
    del made
    with reference_kernels():
        rounding = differences(plain(PLAIN_MODEL), expected)
    own_limits = {name: ROUNDING_FACTOR * rounding[name] + TOLERANCE for name in names}
    own_limits.update({name: LOSS_TOLERANCE[kind] for name in names if name == "loss"})
    with smaller_chunks(share):
        made = fast({})
    own = judge(f"{what} in {kind}", made, expected, own_limits)
    exact = {"differences_in_float32": found, "limits_in_float32": limits}
    return {"arithmetic": kind, "differences": own, "limits": own_limits, "rounding": rounding, **exact}
