"""Define the objective of instruction tuning: answer questions about a cell (ZerOmics, section 3.2).

This module needs JAX, Flax and optax only, so that a machine without the libraries that read cells can train too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from sct.checks import check_at_least, check_not_empty
from sct.data.text.prompts import task_code, task_name
from sct.errors import ConfigError
from sct.models import lora
from sct.models.decoder import Decoder
from sct.models.lora import LoraConfig, Mixture
from sct.models.zeromics import ZerOmics, ZerOmicsConfig
from sct.models.zeromics_cells import ZerOmicsCells
from sct.nn.losses import next_token_losses
from sct.tasks.base import DeviceBatch, MetricSums, ObjectiveConfig, Variables, file_option

UNIVERSAL = "universal"
# The paper trains on the first three. It uses the fourth, pathways, only for zero-shot and few-shot evaluation.
TRAINED_TASKS = ("cta", "rci", "tcd", "cpi")


@dataclasses.dataclass(frozen=True)
class InstructionsConfig(ObjectiveConfig):
    """Options of the objective: tasks, adapters, and the reports after training.

    Parameters
    ----------
    tasks
        Pairs of (task, sampling weight). The tasks are "cell_type", "rare_cell", "tumor" and "pathway". The paper's
        codes ("cta", "rci", "tcd", "cpi") also work. The names are converted to codes, so this field holds only codes.
    prompts
        JSON file with further prompt templates.
    rank, alpha, dropout
        Options of each LoRA adapter. The paper uses rank 8 and alpha 8.
    targets
        Regular expressions over module paths of the decoder. The default is the query and value projections.
    universal, of_tasks
        Whether to train a universal adapter, which all tasks share, and whether to train one adapter per task. The
        ablations of Table 5 leave out one of the two.
    members
        Names of the adapters of the model in `init_from`. Set this option if that model was trained on other tasks. A
        task without an adapter of its own then trains the universal adapter, which all tasks share. By default, the
        names follow from `universal`, `of_tasks` and `tasks`.
    train_llm, train_cells
        `train_llm`: whether to train the parameters of the decoder as well. `train_cells`: whether to train those of
        the cell encoder as well.
    report_cells, report_seeds
        Number of held-out cells in the reports after training (0: no reports), and number of random seeds.
    """

    tasks: tuple[tuple[str, float], ...] = (("cta", 1.0), ("rci", 1.0), ("tcd", 1.0))
    prompts: str = file_option()
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (r"layers/attention/(query|value)$",)
    universal: bool = True
    of_tasks: bool = True
    members: tuple[str, ...] = ()
    train_llm: bool = False
    train_cells: bool = False
    report_cells: int = 500
    report_seeds: int = 3

    def __post_init__(self) -> None:
        for entry in self.tasks:
            if len(entry) != 2 or task_code(entry[0]) not in TRAINED_TASKS or not float(entry[1]) > 0:
                raise ConfigError(
                    f"objective.tasks has the entry {entry!r}, but each entry must be a pair of a task and a positive "
                    f"weight, such as ({task_name(TRAINED_TASKS[0])!r}, 1.0): correct this entry with a task from "
                    f"{', '.join(map(task_name, TRAINED_TASKS))}."
                )
        # Store codes, so that a run started with codes can resume with names.
        object.__setattr__(self, "tasks", tuple((task_code(task), weight) for task, weight in self.tasks))
        object.__setattr__(self, "members", tuple(map(task_code, self.members)))
        check_at_least("report_cells", self.report_cells, 0)
        check_at_least("report_seeds", self.report_seeds, 1)
        check_not_empty("objective.tasks", self.tasks)
        if not (self.universal or self.of_tasks):
            raise ConfigError(
                "objective.universal and objective.of_tasks are both False, so no adapter would be trained: set one of "
                "the two options to True."
            )
        alone = [task for task, _ in self.tasks if task not in self.members]
        if self.members and UNIVERSAL not in self.members and alone:
            raise ConfigError(
                f"objective.members contains neither {task_name(alone[0])!r} nor {UNIVERSAL!r}, so no adapter would "
                f"learn the task {task_name(alone[0])!r}: remove this task from objective.tasks, start from a model "
                f"with an adapter named {task_name(alone[0])!r} or {UNIVERSAL!r}, or leave objective.members empty to "
                "train new adapters."
            )

    @property
    def mixture(self) -> Mixture:
        """LoRA adapters of the decoder (universal and per task), whose outputs are summed."""
        members = [UNIVERSAL] * self.universal + [task for task, _ in self.tasks] * self.of_tasks
        members = list(self.members) or members
        targets = tuple(f"llm/.*{target}" for target in self.targets)
        return Mixture(tuple(members), LoraConfig(targets, self.rank, self.alpha, self.dropout))


class InstructionObjective:
    """Loss of the answers to instructions, and the parameters that it trains; see `sct.tasks.base.Objective`.

    Parameters
    ----------
    config
        Options of the objective.
    model
        Configuration of the architecture.
    length
        Number of tokens in each row.
    genes
        Number of genes of a cell that the model reads; 0 for all genes of the cell encoder.
    """

    loss_normalizer = "predicted"
    monitor, monitor_mode = "loss", "min"

    def __init__(self, config: InstructionsConfig, model: ZerOmicsConfig, length: int, genes: int = 0):
        self.config, self.model_config, self.model = config, model, ZerOmics(model)
        self.length, self.genes = length, genes or model.cells.num_genes
        self.mixture = config.mixture
        # With tokenizer "none", a random projection bridges different embedding sizes. It is not trained.
        fixed = model.tokenizer == "none"
        has_projection = not fixed or model.cells.embed_dim != model.llm.embed_dim
        self.trainable: Sequence[tuple[str, bool]] = (
            ("^params/cells/(features$|bin_head/|gene_head/)", False),
            ("^params/cells/", config.train_cells),
            ("^params/llm/", config.train_llm),
            *([("^params/tokenizer/", not fixed)] if has_projection else []),
            *lora.TRAINABLE,
        )

    def init(self, rng: jax.Array) -> Variables:
        """Return the initial variables, boxed with their logical axis names."""
        variables = cast(Variables, self.model.init(rng, *ZerOmics.example(self.model_config).values()))
        adapters = lora.init(jax.random.fold_in(rng, 1), variables["params"], self.mixture.config)
        params = dict(variables["params"])
        if not self.config.train_llm:
            # Frozen parameters need no more precision than the compute dtype.
            kind = jnp.dtype(self.model_config.llm.dtype)
            params["llm"] = jax.tree.map(
                lambda leaf: leaf.astype(kind) if leaf.ndim > 1 else leaf, params["llm"]
            )
        return {**variables, "params": params, "adapters": adapters}

    def gates(self, task: jax.Array) -> jax.Array:
        """Return a mask (B, members x rank): an entry is 1 if the cell trains the adapter column, otherwise 0.

        `task` (B,) is the index of each cell's task.
        """
        members = self.mixture.members
        own = jnp.asarray(
            [[member in (UNIVERSAL, name) for member in members] for name, _ in self.config.tasks]
        )
        return self.mixture.gate(own[task])

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Return the mean cross-entropy of the answer tokens, including the end token.

        Also returns sums over the batch. `loss` is the summed loss. `predicted` is the number of predicted tokens, and
        `right` is the number of correct ones. `answers` and `exact` have one entry per task, (T,): the number of
        answers, and the number of answers in which every token is correct.
        """
        ids, genes = batch["input_ids"], batch.get("genes")
        if train:
            variables = lora.gated(variables, self.gates(batch["task"]))
        rates = (self.model_config.cells.dropout, self.model_config.llm.dropout + self.config.dropout)
        encoding, reading = (
            {"dropout": key} if train and rate else {}
            for key, rate in zip(jax.random.split(rng), rates, strict=True)
        )
        encoded = self.model.apply(variables, batch["bins"], genes, rngs=encoding, method="encode")
        if not self.config.train_cells:
            encoded = jax.lax.stop_gradient(encoded)
        soft = self.model.apply(variables, encoded, genes, method="soft")
        # Padding comes last, so causal attention never reads it. Without a mask, GPUs can use a fast attention kernel.
        hidden = self.model.apply(variables, ids, None, soft, rngs=reading, method="hidden_states")

        def scores(x: jax.Array) -> jax.Array:
            return cast(jax.Array, self.model.apply(variables, x, method="logits"))

        losses, right, counts = next_token_losses(
            scores,
            cast(jax.Array, hidden),
            ids,
            batch["predicted"],
            batch["example_mask"],
            self.model_config.llm.vocab_size,
        )
        total, count = (losses * counts).sum(), counts.sum()
        answered = counts.sum(axis=1) > 0
        exact = answered & ((right * counts).sum(axis=1) == counts.sum(axis=1))
        of_task = jax.nn.one_hot(batch["task"], len(self.config.tasks)) * answered[:, None]
        sums = {
            "loss": total,
            "predicted": count,
            "right": (right * counts).sum(),
            "answers": of_task.sum(axis=0),
            "exact": (of_task * exact[:, None]).sum(axis=0),
        }
        return total / jnp.maximum(count, 1.0), sums

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the mean loss in nats, the token accuracy, and each task's fraction of exactly correct answers."""
        count = max(float(sums["predicted"]), 1.0)
        summary = {"loss": float(sums["loss"]) / count, "accuracy": float(sums["right"]) / count}
        for (task, _), answers, exact in zip(self.config.tasks, sums["answers"], sums["exact"], strict=True):
            if answers:
                summary[f"{task_name(task)}_exact"] = float(exact / answers)
        return summary

    def operations(self, records: int) -> float:
        """Return the FLOPs of the matrix products in one forward pass. A multiply-add counts as 2 FLOPs."""
        return ZerOmics.flops(self.model_config, records, self.length, self.genes)

    def step_operations(self, records: int) -> float:
        """Return the FLOPs of the matrix products in a training step, without those that rematerialization repeats.

        A part that is trained counts as three forward passes. The frozen decoder counts as two, because the backward
        pass computes the gradients of its activations. (The products of its attention need three, because both of their
        factors are activations; this is 1.5% of the step at full size and is not counted.) The frozen cell encoder
        counts as one.
        """
        cells = ZerOmicsCells.flops(self.model_config.cells, records, self.genes)
        decoder = Decoder.flops(self.model_config.llm, records, self.length)
        tokenizer = self.operations(records) - cells - decoder
        passes = (3 if self.config.train_cells else 1, 3 if self.config.train_llm else 2)
        return passes[0] * cells + passes[1] * decoder + 3 * tokenizer
