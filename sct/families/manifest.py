"""What a family is: its architectures, what trains them, what a trained model can do, and foreign formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sct.data.genes.vocabulary import GeneVocabulary
from sct.generation.cell_sentence_model import CellSentenceModel
from sct.generation.instruction_model import InstructionModel
from sct.inference.answers import Annotator
from sct.inference.bags import BagReader
from sct.inference.readers import CellReader
from sct.models.adapter_kinds import AdapterConfig, LoraConfig
from sct.models.registry import Architecture
from sct.tasks.task_spec import TaskSpec
from sct.weights.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class FamilyModel:
    """One architecture of a family. Each ability is a function that takes a model and returns the object for it.

    Attributes
    ----------
    architecture
        Configuration and module.
    tasks
        Tasks that train it.
    config
        Configuration file that trains it, for messages; "" where none does.
    adapters
        Adapters that it accepts (`sct.models.adapter_kinds`); default layers: `architecture.targets` and the kinds.
    embed
        Makes the reader that embeds cells (`sct.tl.embed`).
    impute
        Makes the reader that predicts levels of hidden genes (`sct.tl.impute`, the imputation of the benchmark).
    annotate
        Names cells in words (`sct.tl.annotate` without a reference).
    generate, describe
        Writes cells as sentences (`sct.tl.generate_cells`), and texts about cells (`sct.tl.describe`).
    ask
        Answers questions about cells (`sct.tl.ask`, `find_rare`, `find_tumor`, `infer_pathways`).
    """

    architecture: Architecture
    tasks: tuple[TaskSpec, ...] = ()
    config: str = ""
    adapters: tuple[type[AdapterConfig], ...] = (LoraConfig,)
    embed: Callable[[Pretrained], CellReader] | None = None
    impute: Callable[[Pretrained], BagReader] | None = None
    annotate: Callable[[Pretrained], Annotator] | None = None
    generate: Callable[[Pretrained], CellSentenceModel] | None = None
    describe: Callable[[Pretrained], CellSentenceModel] | None = None
    ask: Callable[[Pretrained], InstructionModel] | None = None

    @property
    def abilities(self) -> tuple[str, ...]:
        """Names of what a model of this architecture can do."""
        return tuple(name for name in ABILITIES if getattr(self, name) is not None)


# Ability -> description, used in messages and pages.
ABILITIES: Mapping[str, str] = {
    "embed": "embed cells",
    "impute": "impute genes",
    "annotate": "predict cell labels",
    "generate": "generate cells",
    "describe": "describe cells",
    "ask": "answer questions about cells",
}


@dataclasses.dataclass(frozen=True)
class Converter:
    """A foreign format of weights.

    Attributes
    ----------
    read
        (source, target, dtype, genes, numbered): writes a model folder; `numbered` replaces gene names by numbers.
    write
        (model, target, dtype): writes the foreign folder; None if that is not possible.
    notice
        License note for the user.
    takes_genes
        Whether the gene order may be given.
    title
        Name for people.
    """

    read: Callable[[Path, Path, str, GeneVocabulary | None, bool], None]
    write: Callable[[Any, Path, str], None] | None = None
    notice: str = ""
    takes_genes: bool = False
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
    """A family: its architectures, converters and documentation.

    Attributes
    ----------
    name, title
        Short name, and what it is in one line.
    paper
        Where it is described.
    guide
        Page of the documentation for users.
    license
        Of published weights, for users.
    models
        Architectures by name; configurations and model folders name them in `family`.
    converters
        Foreign formats by their name in `launch.convert`.
    """

    name: str
    title: str
    paper: str
    models: Mapping[str, FamilyModel]
    guide: str = ""
    license: str = ""
    converters: Mapping[str, Converter] = dataclasses.field(default_factory=dict)
