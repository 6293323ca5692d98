"""Train a question-answering model on a few labeled cells: few-shot fine-tuning (ZerOmics, section 4.3)."""

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

_STUDY = "shots"  # name of the temporary study
# Spare tokens, because the number of tokens of a prompt depends slightly on the order of its candidates.
_SPARE = 32


@dataclasses.dataclass(frozen=True)
class TuningOptions:
    """Options of few-shot fine-tuning.

    Parameters
    ----------
    steps, learning_rate, batch_size
        Number of training steps, peak learning rate of AdamW, and number of cells per step. The learning rate warms up
        during the first tenth of the steps and then follows a cosine decay.
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
    """Hold the cells for few-shot fine-tuning, with their labels.

    Attributes
    ----------
    counts
        Raw counts (N, G) of the genes of the model.
    obs
        Table of the labels of the cells (N rows).
    study_metadata
        Metadata of the study, with the same keys as in a studies file: the abstract and the candidate answers.
    """

    counts: sparse.csr_matrix
    obs: pd.DataFrame
    study_metadata: Mapping[str, Any]


def _mixture(model: Pretrained) -> dict[str, Any]:
    """Return the adapter options of a model, or the default options if its adapters were merged into the decoder."""
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
    """Return metadata as plain strings and lists, because YAML cannot write the numpy types of an AnnData."""
    return {
        name: str(value) if isinstance(value, str) else [str(each) for each in value]
        for name, value in study_metadata.items()
    }


def _longest(instruction_model: InstructionModel, questions: StudyQuestions, task: str, number: int) -> int:
    """Build the instructions for the first `number` cells, and return the length of the longest one in tokens."""
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
    """Fine-tune a model on one task with a few labeled cells, by the usual training loop and loss of its family.

    The trained parameters are the cell tokenizer (which converts a cell to soft tokens), the universal adapter (which
    all tasks share) and the adapter of the task. If the model was not trained on the task, it has no adapter for this
    task, so only the cell tokenizer and the universal adapter are trained. The input model is not changed.

    Parameters
    ----------
    model, instruction_model
        The model to fine-tune, and the same model as an `InstructionModel`.
    task
        "cta" (cell type), "rci" (rare cell), "tcd" (tumor) or "cpi" (pathway). Every cell in `shots` needs an answer.
    shots
        Cells to train on.
    columns
        Dict with the options `cell_type`, `disease`, `pathways`, `normal` and `rare_share` of `InstructionData`.
    options, seed
        Training options, and random seed. The seed determines the order of the cells, the order of the candidates and
        the choice of the templates.
    place
        Folder for temporary files; None for the system's default folder.

    Returns
    -------
    The fine-tuned model.

    Raises
    ------
    SctError
        The cells do not fit the task, or the loss is not finite.
    KeyboardInterrupt
        The process received a signal to stop.
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

        def task_with(data: InstructionData) -> Instructions:
            own = instruction_model
            return Instructions(config, data, own.config, own.tokenizer, store, own.known, {}, seed)

        made = task_with(data)
        number = store.split("train")[0].n_cells
        longest = _longest(
            instruction_model, StudyQuestions(store.split("train")[0], made.options), task, number
        )
        data = dataclasses.replace(data, length=-(-(longest + _SPARE) // 64) * 64)
        made = task_with(data)
        steps = options.steps
        loop = TrainConfig(
            steps=steps, batch_size=min(options.batch_size, number), log_every=steps, eval_every=steps,
            checkpoint_every=steps, seed=seed, loader_threads=1, mesh=MeshConfig.parse("single"),
        )  # fmt: skip
        optimizer = OptimizerConfig(
            peak_lr=options.learning_rate, init_lr=0.0, warmup_steps=max(steps // 10, 1), clip_norm=1.0
        )
        # The training loop donates its initial variables, so pass a copy and keep the model usable.
        start = jax.tree.map(jnp.copy, flatten(model.variables))
        result = train(made, loop, optimizer, folder, start, keep=False)
        if result.reason != "finished":
            raise KeyboardInterrupt
        return dataclasses.replace(instruction_model, variables=result.state.variables)


def drawn(answers: Sequence[str], shots: int, each: bool, seed: int) -> np.ndarray:
    """Draw random cells for fine-tuning from the cells that have an answer.

    Parameters
    ----------
    answers
        Answer of each cell; "" for a cell without an answer.
    shots
        Maximum number of cells to draw, per answer or in total; see `each`.
    each
        True: draw up to `shots` cells for each answer. False: draw up to `shots` cells in total.
    seed
        Random seed.

    Returns
    -------
    Sorted row numbers of the drawn cells.

    Raises
    ------
    ConfigError
        None of the cells has an answer.
    """
    rng = np.random.default_rng([seed, shots])
    known = np.flatnonzero(np.asarray(answers, dtype=object) != "")
    if not len(known):
        raise ConfigError(
            "few-shot fine-tuning needs labeled cells, but none of the cells to train on has a label: add labeled "
            "cells to the study."
        )
    order = rng.permutation(known)
    if not each:
        return np.sort(order[:shots])
    named = np.asarray(answers, dtype=object)[order]
    return np.sort(np.concatenate([order[named == answer][:shots] for answer in sorted(set(named))]))
