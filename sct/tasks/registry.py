"""Tasks by name: the one place where a configuration becomes a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from sct.data.quantile_bins import known_genes
from sct.data.store import Store
from sct.data.text.tokenizer import Tokenizer
from sct.errors import ConfigError
from sct.models import registry
from sct.tasks import cell_sentences, instructions, masked_bins
from sct.tasks.base import StoreConfig, Task
from sct.tasks.cell_sentences import CellSentences, CellSentencesConfig, SentenceData
from sct.tasks.instructions import InstructionData, Instructions, InstructionsConfig
from sct.tasks.masked_bins import BinData, MaskedBins, MaskedBinsConfig
from sct.tasks.masked_expression import BagData, MaskedExpression, MaskedExpressionConfig


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a task is made of.

    Attributes
    ----------
    family, model
        Name of the family, and plain values of its architecture.
    objective, data
        Options, of the types that the task's `Kind` names.
    store, seed
        Cells, and the run's seed.
    tokenizer
        Of a task of texts.
    kept
        What the run that goes on, or the model that training starts from, says of its data.
    mesh
        Devices that share the arrays of models which the task loads, each reading its own part; None for one.
    """

    family: str
    model: Mapping[str, Any]
    objective: Any
    data: Any
    store: Store
    seed: int
    tokenizer: Tokenizer | None = None
    kept: Mapping[str, Any] | None = None
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of task.

    Attributes
    ----------
    families
        Models that it trains.
    objective, data
        Types of the configuration's sections.
    make
        Makes the task.
    tokenizer
        Of a task of texts: trains one, from (store, objective, data, seed).
    resolves
        Whether sizes of the model follow from files: a run that is resumed, or that starts from a model, then has the
        sizes that were kept.
    """

    families: tuple[str, ...]
    objective: type[Any]
    data: type[StoreConfig]
    make: Callable[[Parts], Task]
    tokenizer: Callable[[Store, Any, Any, int], Tokenizer] | None = None
    resolves: bool = False


def _masked_expression(parts: Parts) -> MaskedExpression:
    model = registry.model_config(parts.family, parts.model, len(parts.store.vocabulary))
    return MaskedExpression(parts.objective, model, parts.data.options(parts.seed), parts.store)


def _cell_sentences(parts: Parts) -> CellSentences:
    assert parts.tokenizer is not None
    model = registry.model_config(parts.family, parts.model, parts.tokenizer.vocab_size)
    return CellSentences(
        parts.objective, parts.data, model, parts.tokenizer, parts.store, parts.seed, parts.family
    )


def _masked_bins(parts: Parts) -> MaskedBins:
    vocabulary, kept, features = parts.store.vocabulary, parts.kept, None
    if kept is not None and kept.get("task") == masked_bins.NAME:
        known = known_genes(len(vocabulary), kept["dropped"])
        described = kept["features"]
    else:
        features, known, described = masked_bins.gene_features(parts.data, vocabulary, parts.seed)
    values = {
        **parts.model,
        "feature_dim": parts.model.get("feature_dim") or (0 if features is None else features.shape[1]),
    }
    model = registry.model_config(parts.family, values, len(vocabulary))
    return MaskedBins(parts.objective, parts.data, model, parts.store, known, features, described, parts.seed)


def _instructions(parts: Parts) -> Instructions:
    assert parts.tokenizer is not None
    vocabulary, kept, values = parts.store.vocabulary, parts.kept, dict(parts.model)
    if kept is not None and kept.get("task") == instructions.NAME:
        given: dict[str, Any] = {}
        licence = "unknown"
        if kept["members"] != list(parts.objective.mixture.members):
            raise ConfigError(
                f"the model has adapters for {', '.join(kept['members'])}, but the configuration asks for "
                f"{', '.join(parts.objective.mixture.members)}: name the same tasks in the same order."
            )
        known = known_genes(len(vocabulary), kept["dropped"])
    else:
        if not parts.data.llm and not parts.objective.train_llm:
            raise ConfigError(
                "LoRA needs a pretrained decoder: set --config.data.llm=FOLDER, or train one with "
                "--config.objective.train_llm=True."
            )
        size = parts.tokenizer.vocab_size
        values, known, given, licence = instructions.parts_of(
            parts.data, vocabulary, values, size, parts.mesh, not parts.objective.train_llm
        )
    model = registry.model_config(parts.family, values, len(vocabulary))
    return Instructions(
        parts.objective, parts.data, model, parts.tokenizer, parts.store, known, given, parts.seed, licence
    )


TASKS: Mapping[str, Kind] = {
    "masked_expression": Kind(("sct",), MaskedExpressionConfig, BagData, _masked_expression),
    cell_sentences.NAME: Kind(
        ("gpt2", "neox", "llama"),
        CellSentencesConfig,
        SentenceData,
        _cell_sentences,
        cell_sentences.make_tokenizer,
        resolves=True,
    ),
    instructions.NAME: Kind(
        ("zeromics",),
        InstructionsConfig,
        InstructionData,
        _instructions,
        instructions.make_tokenizer,
        resolves=True,
    ),
    masked_bins.NAME: Kind(("zeromics_cells",), MaskedBinsConfig, BinData, _masked_bins, resolves=True),
}


def kind_of(config: Mapping[str, Any]) -> Kind:
    """Kind of a configuration's task; `ConfigError` where there is none, or it does not train the family."""
    name, family = config.get("task"), config.get("family")
    for what, value, known in (("family", family, registry.MODELS), ("task", name, TASKS)):
        if value not in known:
            raise ConfigError(f"{what} is {value!r}, but it must be one of {', '.join(known)}.")
    kind = TASKS[str(name)]
    if family not in kind.families:
        raise ConfigError(
            f"the task {name!r} does not train the family {family!r}: choose from {', '.join(kind.families)}."
        )
    return kind


def data_of(config: Mapping[str, Any]) -> Any:
    """A configuration's data section, of the type of its task."""
    return registry.build(kind_of(config).data, config.get("data", {}), "data")


def make_task(
    config: Mapping[str, Any],
    store: Store,
    tokenizer: Tokenizer | None = None,
    kept: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Any, Any]:
    """Task of a configuration over a store, and its data section.

    A task of texts without a tokenizer trains one; `kept` and `mesh` are those of `Parts`. `ConfigError` for a model
    that this machine does not compute.
    """
    kind, data = kind_of(config), data_of(config)
    objective = registry.build(kind.objective, config.get("objective", {}), "objective")
    seed = int(config.get("train", {}).get("seed", 0))
    if kind.tokenizer is not None and tokenizer is None:
        tokenizer = kind.tokenizer(store, objective, data, seed)
    parts = Parts(
        config["family"], config.get("model", {}), objective, data, store, seed, tokenizer, kept, mesh
    )
    task = kind.make(parts)
    registry.check_device(task.model_config)
    return task, data
