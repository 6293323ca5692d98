"""Tuning a model that answers questions about cells on a few more cells (ZerOmics, section 4.3)."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import sparse

from sct.checks import check_at_least, check_positive
from sct.data.ingest.build import ingest
from sct.data.store import Store
from sct.data.text.instructions import StudyQuestions, fields_of, tokens_of
from sct.errors import ConfigError
from sct.generation.instruction_model import InstructionModel
from sct.models import lora
from sct.nn.paths import flatten
from sct.tasks.instructions import InstructionData, Instructions, InstructionsConfig
from sct.train.loop import TrainConfig, train
from sct.train.optim import OptimizerConfig
from sct.train.sharding import MeshConfig
from sct.weights.pretrained import Pretrained

_STUDY, _SPARE = "shots", 32  # tokens, for an order of candidates in which they have a few more


@dataclasses.dataclass(frozen=True)
class TuningOptions:
    """How a model is tuned on a few cells.

    Parameters
    ----------
    steps, learning_rate, batch_size
        Of AdamW, with a tenth of the steps to warm up, then a cosine.
    """

    steps: int = 50
    learning_rate: float = 5e-4
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_at_least("tuning.steps", self.steps, 1)
        check_at_least("tuning.batch_size", self.batch_size, 1)
        check_positive("tuning.learning_rate", self.learning_rate)


@dataclasses.dataclass(frozen=True, eq=False)
class Shots:
    """A few cells with what is known of them.

    Attributes
    ----------
    counts
        Raw counts (N, G) over the model's genes.
    obs
        Labels of the cells, (N, columns).
    study_metadata
        What a file of studies says of theirs, candidates included.
    """

    counts: sparse.csr_matrix
    obs: pd.DataFrame
    study_metadata: Mapping[str, Any]


def _mixture(model: Pretrained) -> dict[str, Any]:
    """Options of the adapters that a model has; of fresh ones where they were merged into the decoder."""
    members = tuple(model.data["members"])
    layers = dict(lora.adapted(model.variables))
    if not layers:
        return {"members": members}
    adapter = next(iter(layers.values()))
    rank = np.shape(adapter["lora_a"])[-1] // len(members)
    return {
        "members": members,
        "rank": rank,
        "alpha": float(np.ravel(adapter["scale"])[0]) * rank,
        "dropout": float(np.ravel(adapter.get("dropout", 0.0))[0]),
        "targets": tuple(re.escape(layer.split("llm/", 1)[-1]) + "$" for layer in layers),
    }


def _plain(study_metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Texts and lists of texts as YAML knows them, whatever an AnnData made of them."""
    return {
        name: str(value) if isinstance(value, str) else [str(each) for each in value]
        for name, value in study_metadata.items()
    }


def _longest(instruction_model: InstructionModel, questions: StudyQuestions, task: str, number: int) -> int:
    """Tokens of the longest instruction about some cells."""
    candidates, sizes = questions.candidates[task], []
    for row in range(number):
        fields = fields_of(
            task, questions.study_metadata["abstract"], candidates, (0, row), questions.answer(task, row)
        )
        for template in range(len(instruction_model.prompts.templates[task])):
            example = instruction_model.prompts.render(task, fields, number=template)
            sizes.append(
                len(tokens_of(example, instruction_model.tokenizer, instruction_model.config.num_soft)[0])
            )
    return max(sizes)


def tune(
    model: Pretrained, instruction_model: InstructionModel, task: str, shots: Shots, columns: Mapping[str, Any],
    options: TuningOptions, seed: int, place: Path | None = None,
) -> InstructionModel:  # fmt: skip
    """Tune a model on one task with a few cells, by the loop and the loss of its training.

    The cell tokenizer, the universal adapter and that of the task are trained; a task without an adapter, which the
    model has not been trained on, trains the universal one. The model itself is not changed.

    Parameters
    ----------
    model, instruction_model
        A model of instructions.
    task
        "cta", "rci", "tcd" or "cpi"; every cell has an answer to it.
    shots
        The cells.
    columns
        `cell_type`, `disease`, `pathways`, `normal` and `rare_share` of `InstructionData`.
    options, seed
        How, and the order of cells, wordings and candidates.
    place
        Folder for temporary files.

    Raises
    ------
    SctError
        The cells cannot be asked about, or the loss is not finite.
    KeyboardInterrupt
        The process was asked to stop.
    """
    import yaml

    vocabulary = model.vocabulary
    with tempfile.TemporaryDirectory(prefix=".shots_", dir=place) as name:
        folder = Path(name)
        table = ad.AnnData(
            X=sparse.csr_matrix(shots.counts, dtype=np.float32),
            obs=shots.obs.copy(),
            var=pd.DataFrame(index=list(vocabulary.ensembl_ids)),
        )
        ingest([(_STUDY, table)], folder / "store", vocabulary=vocabulary)
        store = Store.open(folder / "store")
        texts, prompts = folder / "studies.yaml", folder / "prompts.json"
        texts.write_text(
            yaml.safe_dump({_STUDY: _plain(shots.study_metadata)}, allow_unicode=True), encoding="utf-8"
        )
        instruction_model.prompts.save(prompts)
        config = InstructionsConfig(
            tasks=((task, 1.0),), prompts=str(prompts), report_cells=0, **_mixture(model)
        )
        data = InstructionData(
            max_genes=instruction_model.cells.max_genes, studies=str(texts), length=1 << 20, **columns
        )
        made = Instructions(
            config,
            data,
            instruction_model.config,
            instruction_model.tokenizer,
            store,
            instruction_model.known,
            {},
            seed,
        )
        number = store.split("train")[0].n_cells
        longest = _longest(
            instruction_model, StudyQuestions(store.split("train")[0], made.options), task, number
        )
        data = dataclasses.replace(data, length=-(-(longest + _SPARE) // 64) * 64)
        made = Instructions(
            config,
            data,
            instruction_model.config,
            instruction_model.tokenizer,
            store,
            instruction_model.known,
            {},
            seed,
        )
        steps = options.steps
        loop = TrainConfig(
            steps=steps, batch_size=min(options.batch_size, number), log_every=steps, eval_every=steps,
            checkpoint_every=steps, seed=seed, loader_threads=1, mesh=MeshConfig.parse("single"),
        )  # fmt: skip
        optimizer = OptimizerConfig(
            peak_lr=options.learning_rate, init_lr=0.0, warmup_steps=max(steps // 10, 1), clip_norm=1.0
        )
        # The loop gives its start away, and the model is needed again.
        start = jax.tree.map(jnp.copy, flatten(model.variables))
        result = train(made, loop, optimizer, folder, start, keep=False)
        if result.reason != "finished":
            raise KeyboardInterrupt
        return dataclasses.replace(instruction_model, variables=result.state.variables)


def drawn(answers: Sequence[str], shots: int, each: bool, seed: int) -> np.ndarray:
    """Places of the cells to tune on: so many of each answer (`each`), or in all, of those that have one.

    Raises
    ------
    ConfigError
        There are no answers.
    """
    rng = np.random.default_rng([seed, shots])
    known = np.flatnonzero(np.asarray(answers, dtype=object) != "")
    if not len(known):
        raise ConfigError("no cell of the part to tune on has an answer: give more cells.")
    order = rng.permutation(known)
    if not each:
        return np.sort(order[:shots])
    named = np.asarray(answers, dtype=object)[order]
    return np.sort(np.concatenate([order[named == answer][:shots] for answer in sorted(set(named))]))
