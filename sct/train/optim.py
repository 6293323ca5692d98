"""Make the optimizer and its learning-rate schedule (optax), with rules for individual parameters."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import optax
import optax.contrib

from sct.checks import check_at_least, check_choice, check_positive, check_share
from sct.nn.paths import resolve


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Options of the optimizer and its learning-rate schedule. The defaults are those of the sCT paper (appendix B).

    Parameters
    ----------
    peak_lr, init_lr, final_lr
        Learning rates: `peak_lr` at the end of the warm-up, `init_lr` at the first step, and `final_lr` at the end of
        training.
    warmup_steps
        Number of steps of linear warm-up.
    schedule
        Schedule after the warm-up: "cosine", "linear", "constant" or "plateau". With "plateau", the learning rate is
        constant until the training loss stops to fall.
    plateau_factor, plateau_patience, plateau_steps
        Options of the schedule "plateau". The training loss is averaged over `plateau_steps` steps (0: the steps from
        one validation to the next). After `plateau_patience` averages without improvement, the learning rate is
        multiplied by `plateau_factor`.
    b1, b2, eps
        Decay rates of Adam's moments, and epsilon.
    moment_dtype
        dtype of Adam's first moment: "float32", or "bfloat16" to halve its memory. The second moment and the parameters
        are always float32.
    weight_decay
        Decoupled weight decay (AdamW) of the parameters that `decay_rules` select; 0 is Adam.
    clip_norm
        Upper bound on the global norm of the gradient. 0 means no bound.
    decay_rules, lr_rules
        Tables over parameter paths. A row of `decay_rules` is (regular expression, whether to decay the parameter). A
        row of `lr_rules` is (regular expression, multiplier of the learning rate). See `sct.nn.paths`.
    """

    peak_lr: float = 1e-4
    init_lr: float = 5e-5
    final_lr: float = 0.0
    warmup_steps: int = 10_000
    schedule: str = "cosine"
    plateau_factor: float = 0.5
    plateau_patience: int = 3
    plateau_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    moment_dtype: str = "float32"
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    decay_rules: tuple[tuple[str, bool], ...] = (
        (r"/(bias|scale|embedding|prefix|bottleneck_(down|up)_bias)$", False),
        (".*", True),
    )
    lr_rules: tuple[tuple[str, float], ...] = ((".*", 1.0),)

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, ("cosine", "linear", "constant", "plateau"))
        check_choice("moment_dtype", self.moment_dtype, ("float32", "bfloat16"))
        check_positive("peak_lr", self.peak_lr)
        for name in ("init_lr", "final_lr", "warmup_steps", "weight_decay"):
            check_at_least(name, getattr(self, name), 0, whole=name == "warmup_steps")
        if self.clip_norm != math.inf:
            check_at_least("clip_norm", self.clip_norm, 0, whole=False)
        check_share("plateau_factor", self.plateau_factor, zero=False, one=False)
        check_at_least("plateau_patience", self.plateau_patience, 1)
        check_at_least("plateau_steps", self.plateau_steps, 0)
        for name in ("b1", "b2"):
            check_share(name, getattr(self, name), one=False)

    def for_evaluations(self, steps: int) -> OptimizerConfig:
        """Return the options with `plateau_steps` set to the steps from one validation to the next, if it is 0."""
        return self if self.plateau_steps else dataclasses.replace(self, plateau_steps=steps)


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Return the learning-rate schedule: linear warm-up, then decay to `final_lr` at `total_steps`."""
    warmup = min(config.warmup_steps, total_steps)
    rest = max(total_steps - warmup, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(
            config.peak_lr, rest, alpha=config.final_lr / config.peak_lr
        ),
        "linear": lambda: optax.linear_schedule(config.peak_lr, config.final_lr, rest),
        "constant": lambda: optax.constant_schedule(config.peak_lr),
        "plateau": lambda: optax.constant_schedule(config.peak_lr),
    }[config.schedule]()
    if not warmup:
        return after
    rise = optax.linear_schedule(config.init_lr, config.peak_lr, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, total_steps: int, params: dict[str, jax.Array]
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer for a flat dict of trained parameters, and its learning-rate schedule."""
    schedule = learning_rate(config, total_steps)
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.moment_dtype))
    if config.weight_decay:
        rules = config.decay_rules
        if rules == OptimizerConfig.decay_rules:
            # A rule that matches no parameter is an error. The default rules serve all models, so drop unused ones.
            rules = tuple(rule for rule in rules if any(re.search(rule[0], path) for path in params))
        decayed = resolve(rules, params, "weight-decay")
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    multipliers = resolve(config.lr_rules, params, "learning-rate")
    if any(value != 1.0 for value in multipliers.values()):
        parts.append(
            optax.stateless(lambda updates, _: {path: multipliers[path] * u for path, u in updates.items()})
        )
    parts.append(optax.scale_by_learning_rate(schedule))
    if config.schedule == "plateau":
        parts.append(
            optax.contrib.reduce_on_plateau(
                config.plateau_factor, config.plateau_patience, accumulation_size=config.plateau_steps or 1
            )
        )
    return optax.chain(*parts), schedule


def plateau_scale(state: Any) -> float:
    """Return the factor by which the schedule "plateau" has reduced the learning rate; 1 for other schedules."""
    scale = optax.tree_utils.tree_get(state, "scale", 1.0, filtering=_in_plateau)
    return float(scale)


def _in_plateau(path: Any, value: Any) -> bool:
    return any(getattr(key, "tuple_name", "") == "ReduceLROnPlateauState" for key in path)
