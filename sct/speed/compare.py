"""How far two paths are apart, and how far they may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sct.errors import SctError
from sct.nn.reference import reference_kernels, smaller_chunks
from sct.speed.ceiling import arithmetic

# Largest difference in relative norm where products are exact float32: about 40 layers, and sums over a million
# positions in another order. The full model on 2 cells: gradient 2e-6, worst leaf 9e-6 (CPU, jax 0.10).
TOLERANCE = 1e-4
# The gradient of one parameter may be a small difference of large numbers: its error is measured against its norm
# plus this share of the whole gradient's, and may be this many times larger than that of all together.
LEAF_FLOOR, LEAF_FACTOR = 1e-3, 5.0
# What products of fewer bits lose depends on the model and its parameters (in bfloat16 3% of the full logits, 8% of a
# small gradient): it is measured on the plain forms in the same arithmetic. Rounding is as good as random: a step may
# by chance lose so many times as much.
ROUNDING_FACTOR = 3.0
# The loss is one number, whose error may be small by chance: 8 roundings of the arithmetic, about the square root of
# their number on a path through the model.
LOSS_TOLERANCE = {"float32": TOLERANCE, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}
# Options of the model on the reference path: what only saves time or memory is off.
PLAIN_MODEL: Mapping[str, Any] = {"remat": "none"}
EXACT_MODEL: Mapping[str, Any] = {"dtype": "float32"}

Check = dict[str, Any]
# Arrays by name, or a gradient: arrays by path, by name.
Outputs = dict[str, Any]
# Options of the model -> outputs of the step of the model with them.
ComputationPath = Callable[[Mapping[str, Any]], Outputs]


def _norm(x: Any) -> float:
    flat = np.asarray(x, np.float64).ravel()
    return float(np.sqrt(flat @ flat))


def difference(made: Any, reference: Any) -> float:
    """Norm of the difference of two arrays relative to that of the second."""
    made, reference = np.asarray(made, np.float64), np.asarray(reference, np.float64)
    if made.shape != reference.shape:
        return float("inf")
    return _norm(made - reference) / max(_norm(reference), 1e-30)


def gradient_difference(made: Mapping[str, Any], reference: Mapping[str, Any]) -> tuple[float, float, str]:
    """Relative difference of two gradients over all leaves, the worst one of a leaf, and the name of that leaf."""
    if set(made) != set(reference):
        return float("inf"), float("inf"), str(sorted(set(made) ^ set(reference))[0])
    errors, norms = {}, {}
    for path, right in reference.items():
        errors[path] = _norm(np.asarray(made[path], np.float64) - np.asarray(right, np.float64))
        norms[path] = _norm(right)
    whole = float(np.hypot.reduce(list(norms.values())))
    leaves = {path: error / (norms[path] + LEAF_FLOOR * whole + 1e-30) for path, error in errors.items()}
    # A NaN is worse than any number.
    worst = max(leaves, key=lambda path: np.nan_to_num(leaves[path], nan=np.inf))
    return float(np.hypot.reduce(list(errors.values()))) / max(whole, 1e-30), leaves[worst], worst


def differences(made: Outputs, reference: Outputs) -> dict[str, float]:
    """Relative difference of each output by name; a gradient has one of all its leaves and one of the worst leaf."""
    found = {}
    for name, expected in reference.items():
        if isinstance(expected, dict):
            found[name], found[f"worst leaf of the {name}"], _ = gradient_difference(made[name], expected)
        else:
            found[name] = difference(made[name], expected)
    return found


def _require(what: str, made: Outputs, expected: Outputs, limits: Mapping[str, float]) -> dict[str, float]:
    """Differences, or `SctError` where one exceeds its limit or is no number."""
    found = differences(made, expected)
    for name, value in found.items():
        if not value <= limits[name]:
            leaves = [gradient_difference(made[n], e)[2] for n, e in expected.items() if isinstance(e, dict)]
            raise SctError(
                f"the {name} of {what} differs from the reference path by {value:.2g} in relative norm, where at most "
                f"{limits[name]:.2g} is expected{f' (the worst leaf is {leaves[0]})' if leaves else ''}: no time is "
                "given for a step that is wrong."
            )
    return found


def compare(what: str, dtype: str, fast: ComputationPath, plain: ComputationPath, share: float) -> Check:
    """Compare a step with the reference path: its formulas in exact float32, and then the step in its own arithmetic.

    Parameters
    ----------
    what
        Name of the step, for messages.
    dtype
        Type in which the model computes.
    fast, plain
        Outputs of the step that will be timed, and of the reference path; `fast` is called first.
    share
        Size of what is compared relative to what will be timed: the fast path takes as many pieces as that will.

    Raises
    ------
    SctError
        They differ by more than rounding explains.
    """
    kind = arithmetic(dtype)
    with jax.default_matmul_precision("highest"):
        with smaller_chunks(share):
            made = fast(EXACT_MODEL if kind != "float32" else {})
        with reference_kernels():
            expected = plain({**PLAIN_MODEL, **EXACT_MODEL})
    names = differences(expected, expected)
    limits = {name: TOLERANCE * (LEAF_FACTOR if "leaf" in name else 1.0) for name in names}
    found = _require(f"{what} in float32", made, expected, limits)
    if kind == "float32":
        return {"arithmetic": kind, "differences": found, "limits": limits}
    del made
    with reference_kernels():
        rounding = differences(plain(PLAIN_MODEL), expected)
    own_limits = {name: ROUNDING_FACTOR * rounding[name] + TOLERANCE for name in names}
    own_limits.update({name: LOSS_TOLERANCE[kind] for name in names if name == "loss"})
    with smaller_chunks(share):
        made = fast({})
    own = _require(f"{what} in {kind}", made, expected, own_limits)
    exact = {"differences_in_float32": found, "limits_in_float32": limits}
    return {"arithmetic": kind, "differences": own, "limits": own_limits, "rounding": rounding, **exact}
