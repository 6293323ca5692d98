"""Define `Pretrained`: a loaded model with its weights, genes and tokenizer, which can be applied and saved."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sct.checks import check_choice
from sct.data.bag_order import CELLS_PER_BAG
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.tokenizer import Tokenizer
from sct.data.tokenize import NOISE_FRACTION
from sct.errors import CheckpointError, ConfigError, DataError
from sct.models import classifier, registry
from sct.models.card_text import CardText
from sct.nn import axes
from sct.nn.paths import flatten
from sct.version import DISTRIBUTION, REPOSITORY, __version__
from sct.weights import model_folder
from sct.weights.fitted_readout import FittedReadout
from sct.weights.model_folder import FORMAT_VERSION, SHARD_BYTES
from sct.weights.training_cells import TrainingCells

# Entry of the data record of a model that describes its classifier, and the method that trains the whole model.
ANNOTATION, FULL = "annotation", "full"
LOADED_DTYPES = ("float32", "bfloat16", "float16")
# Data options that must be the same in training and inference, with the paper's values.
DATA_OPTIONS: Mapping[str, Any] = {"cells_per_bag": CELLS_PER_BAG, "noise_fraction": NOISE_FRACTION}
_DATA_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(DATA_OPTIONS, (int, float)), "masking": Mapping, "logit_adjustment": bool,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with its weights and genes, ready to use. All model families use this class.

    Attributes
    ----------
    family
        Name of the model family in `sct.models.registry`.
    config
        Architecture: the configuration dataclass of the family.
    variables
        Nested dict of arrays.
    genes
        Gene vocabulary: the genes at the model's input positions, or the genes whose names the model can write. None
        for a model that uses only text.
    card
        Text of the model card.
    license
        License of the weights, as stated in the model card.
    step
        Training step of the weights, or None if they do not come from a run.
    data
        Options with which the training inputs were made, as far as known. For cells: the entries of `DATA_OPTIONS`, and
        the masking options (`sct.data.class_prior`). For text: the description of the training task.
    tokenizer
        Tokenizer of a text model, otherwise None.
    readout
        Fitted readout of cell embeddings (`sct.tl.fit_readout`), or None.
    embedding
        Default readout of `sct.tl.embed`, and how it compares with principal components of the training cells on
        unseen studies; see `sct.tl.record_benchmark`. Empty if nothing is recorded.
    training_cells
        Hashes of the cells that the model was trained on (`sct.tl.in_training_set`), or None if they are not known.
    """

    family: str
    config: Any
    variables: dict[str, Any]
    genes: GeneVocabulary | None = None
    card: str = ""
    license: str = "unknown"
    step: int | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    readout: FittedReadout | None = None
    embedding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training_cells: TrainingCells | None = None

    def __repr__(self) -> str:
        knows = f", {len(self.genes):,} genes" if self.genes is not None else ""
        knows += f", {self.tokenizer.vocab_size:,} tokens" if self.tokenizer is not None else ""
        return f"Pretrained({self.family!r}, {self.size:,} parameters{knows})"

    @property
    def size(self) -> int:
        """Return the number of parameters of the model."""
        return sum(int(np.prod(value.shape)) for value in flatten(self.variables).values())

    @property
    def vocabulary(self) -> GeneVocabulary:
        """Return the gene vocabulary; raise `ConfigError` if the model has none."""
        if self.genes is None:
            raise ConfigError(f"{self!r} has no gene vocabulary: use a model that was trained on cells.")
        return self.genes

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of the weights (16 hexadecimal digits), which identifies the model."""
        digest = hashlib.sha256()
        for path, value in sorted(flatten(self.variables).items()):
            digest.update(path.encode())
            digest.update(np.asarray(value).tobytes())
        return digest.hexdigest()[:16]

    def apply(
        self, *, intermediates: Sequence[str] = (), outputs: Sequence[str] | None = None, **inputs: Any
    ) -> dict[str, jax.Array]:
        """Run the model on input arrays. The model is compiled once for each combination of input shapes.

        Parameters
        ----------
        intermediates
            Names of activations to return in addition to the outputs.
        outputs
            Names of the outputs to compute. Default: all outputs. A computation that none of these outputs needs is
            skipped.
        inputs
            Input arrays by name. The names depend on the model family. For sCT: `tokens`, integers (B, K, G), and
            `coordinates`, (B, K, 2) or None.

        Returns
        -------
        Arrays by name. For sCT: `logits` float32 (B, K, G, levels + 2) and `cell_embedding` float32 (B, K, D). The
        intermediate activations of sCT are `conv_out`, `transformer_out` and `deconv_out`.

        Raises
        ------
        CheckpointError
            The family does not have this output or intermediate.
        DataError
            The family does not have this input, an input is missing, or its shape or values do not fit the model.
        ConfigError
            The model computes in float16, which the device, a CPU, does not support.
        """
        registry.check_device(self.config)
        module = registry.family(self.family).module
        unknown = sorted(set(intermediates) - set(module.intermediates))
        for name in unknown:
            check_choice("the intermediate", name, module.intermediates, error=CheckpointError)
        available = module.outputs_of(self.config) if hasattr(module, "outputs_of") else module.outputs
        chosen = available if outputs is None else tuple(outputs)
        unknown = sorted(set(chosen) - set(available))
        for name in unknown:
            check_choice("the output", name, available, error=CheckpointError)
        wanted = (*chosen, *sorted(set(intermediates)))
        given = {
            name: value if hasattr(value, "shape") else np.asarray(value)
            for name, value in inputs.items()
            if value is not None
        }
        _check_inputs(module, self.config, given)
        arrays = {name: jnp.asarray(value) for name, value in given.items()}
        # The classifier reads the outputs, so that models with other classifiers share the compiled program.
        variables = {name: tree for name, tree in self.variables.items() if name != classifier.COLLECTION}
        return _compiled(self.family, self.config, wanted)(variables, arrays)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, dtype: str = "float32", shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Save the model to a model folder, replacing an existing one.

        The write is atomic. The new folder is completed under a temporary name. Then an existing model is renamed to
        `.NAME.old`, the new folder gets its final name, and the old model is deleted. If the process dies between these
        steps, `load` reads the old model, and the next save restores it first.

        Parameters
        ----------
        folder
            Output folder. It must be new, empty, or a model folder without other files.
        dtype
            Widest floating-point dtype in the file: "float32", "bfloat16" or "float16". Arrays with a narrower dtype
            keep their dtype. `sct.load` converts the weights of a folder in float16 to float32.
        shard_bytes
            Maximal size of a weights file in bytes. Larger weights are split into several files, as in Hugging Face
            folders.

        Raises
        ------
        CheckpointError
            The folder holds other files or cannot be written, a weight is NaN or infinite, or a weight is too large for
            float16. No partial output remains.
        """
        config = {
            "format_version": FORMAT_VERSION,
            "sct_version": __version__,
            "family": self.family,
            "dtype": dtype,
            "license": self.license,
            "step": self.step,
            "vocabulary_hash": self.genes.hash if self.genes is not None else None,
            "tokenizer_hash": self.tokenizer.fingerprint if self.tokenizer is not None else None,
            "data": dict(self.data),
            "model": dataclasses.asdict(self.config),
            "parameters": self.size,
            "genes": None if self.genes is None else _described(self.genes),
        }
        extra: dict[str, Mapping[str, np.ndarray]] = {}
        if self.readout is not None:
            config[model_folder.READOUT_RECORD] = self.readout.record()
            extra[model_folder.READOUT] = self.readout.arrays()
        if self.training_cells is not None:
            config[model_folder.TRAINING_CELLS_RECORD] = self.training_cells.record()
            extra[model_folder.TRAINING_CELLS] = self.training_cells.arrays
        if self.embedding:
            config[model_folder.EMBEDDING] = dict(self.embedding)
        card = self.card or default_card(self)
        target = Path(folder).expanduser()
        arrays = flatten(self.variables)
        model_folder.save(
            target, arrays, config, self.genes, self.tokenizer, card, dtype, shard_bytes, extra=extra
        )


def _described(genes: GeneVocabulary) -> dict[str, Any]:
    """Return the description of a gene vocabulary in `config.json`, for lists of models. Loading does not use it."""
    return {"number": len(genes), "name": genes.name, "species": genes.species}


def with_changed_outputs(model: Pretrained, **changes: Any) -> Pretrained:
    """Return a model with changed fields, such as its variables, which change its embeddings.

    The fitted readout and the comparison of the embedding are left out, because they describe the model before the
    change. The hashes of the training cells remain, with a note that the model was fine-tuned later on other cells.
    """
    known = model.training_cells
    if known is not None:
        known = dataclasses.replace(known, info={**known.info, "tuned": True})
    return dataclasses.replace(
        model, **{"readout": None, "embedding": {}, "training_cells": known, **changes}
    )


def _check_inputs(module: Any, config: Any, inputs: Mapping[str, Any]) -> None:
    """Raise `DataError` if an input is unknown, missing, or does not fit the model."""
    takes = inspect.signature(module.__call__).parameters
    names = [name for name in takes if name != "self"]
    unknown = sorted(set(inputs) - set(names))
    for name in unknown:
        check_choice("the input", name, names, error=DataError)
    missing = [n for n in names if takes[n].default is inspect.Parameter.empty and n not in inputs]
    if missing:
        raise DataError(
            f"the input {missing[0]!r} is missing: pass it by name (the inputs are {', '.join(names)})."
        )
    if hasattr(module, "check_inputs"):
        module.check_inputs(config, inputs)


@functools.lru_cache(maxsize=32)
def _compiled(family: str, config: Any, wanted: tuple[str, ...]) -> Callable[..., dict[str, jax.Array]]:
    module = registry.family(family).module(config)

    def run(variables: dict[str, Any], inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        outputs = cast(dict[str, jax.Array], module.apply(variables, **inputs))
        return {name: outputs[name] for name in wanted}

    return jax.jit(run)


# Licenses by which the Hugging Face Hub knows weights. Any other license is "other" with a name.
_HUB_LICENSES = frozenset((
    "apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "openrail",
    "bigscience-openrail-m", "llama2", "llama3", "llama3.1", "gemma", "unknown", "other",
))  # fmt: skip


def _front_matter(model: Pretrained, tags: Sequence[str]) -> list[str]:
    """Return the YAML block at the beginning of a model card, in the format that the Hugging Face Hub reads."""
    license = model.license.strip().lower()
    named = ["license: " + (license if license in _HUB_LICENSES else "other")]
    if license not in _HUB_LICENSES:
        named.append(f"license_name: {json.dumps(model.license)}")
    tags = list(dict.fromkeys(["single-cell", *tags, model.family]))
    return ["---", "library_name: sct", *named, f"tags: [{', '.join(tags)}]", "---"]


def default_card(model: Pretrained, text: str = "") -> str:
    """Return a model card, which describes the model, how to load it, its use, its limits and its license.

    Parameters
    ----------
    model
        Model to describe. The attribute `CARD` of its configuration class describes the architecture.
    text
        Markdown about the origin of the weights: training data, results, or conversion.
    """
    about: CardText | None = getattr(model.config, "CARD", None)
    example = about.example.splitlines() if about else []
    rights = (
        "The license of these weights is not recorded. Before you share them, choose a license that the training data "
        "allows, and replace `license: unknown` at the top of this file."
        if model.license == "unknown"
        else f"License of the weights: {model.license}."
    )
    code = (
        "The code of sct has the license Apache-2.0. The training data keeps the licenses of its providers."
    )
    knows = []
    if model.genes is not None:
        knows.append(f"{len(model.genes):,} genes ({model.genes.name}, hash `{model.genes.hash[:16]}`)")
    if model.tokenizer is not None:
        knows.append(f"{model.tokenizer.vocab_size:,} tokens (hash `{model.tokenizer.fingerprint[:16]}`)")
    return "\n".join(
        [
            *_front_matter(model, about.tags if about else ()), "",
            f"# {about.title if about else f'{model.family} model'}", "", *([about.summary, ""] if about else []),
            f"{', '.join([*knows, f'{model.size:,} parameters'])}, written by sct {__version__}.", "",
            f"To load it, `pip install {DISTRIBUTION}`{f' ({REPOSITORY})' if REPOSITORY else ''}, then", "",
            "```python", "import sct", 'model = sct.load("THIS_FOLDER")', *example, "```", "",
            *(["## Intended use", "", about.use, ""] if about else []),
            *([text, ""] if text else []),
            *(["## Limitations", "", *[f"- {each}" for each in about.limits], ""] if about else []),
            "## License", "", f"{rights} {code}", "",
        ]
    )  # fmt: skip


def data_options(values: Any) -> dict[str, Any]:
    """Select the options that `DATA_OPTIONS` names, and the masking options, from a configuration's data section.

    Entries with a wrong type are left out.
    """
    given = values if isinstance(values, Mapping) else {}
    return {name: given[name] for name, kind in _DATA_TYPES.items() if isinstance(given.get(name), kind)}


def data_record(values: Any) -> dict[str, Any]:
    """Return the data section of a model folder. Entries of `data_options` that have a wrong type are left out."""
    given = values if isinstance(values, Mapping) else {}
    return {name: value for name, value in given.items() if isinstance(value, _DATA_TYPES.get(name, object))}


def fitting_rules(mesh: Mesh | None, rules: axes.AxisRules | None) -> axes.AxisRules:
    """Return the sharding rules for a mesh.

    Given rules are checked against the axes of the mesh. If no rules are given, the result is the default rules without
    the axes that the mesh does not have.

    Raises
    ------
    ConfigError
        A given rule names an axis that the mesh does not have.
    """
    available = set(mesh.axis_names) if mesh is not None else set()
    if rules is None:
        return {name: tuple(a for a in wanted if a in available) for name, wanted in axes.RULES.items()}
    unknown = sorted({axis for wanted in rules.values() for axis in wanted} - available)
    if mesh is not None and unknown:
        raise ConfigError(
            f"the rules use the mesh axis {unknown[0]!r}, but the mesh has only the axes "
            f"{', '.join(mesh.axis_names)}: rename the axis in the rules or in the mesh."
        )
    return rules


def spans_processes(mesh: Mesh | None) -> bool:
    """Return whether there are several processes and the mesh has devices of every process."""
    owners = {device.process_index for device in mesh.devices.flat} if mesh is not None else set()
    return jax.process_count() > 1 and len(owners) == jax.process_count()


def boxed_shapes(family: str, config: Any) -> Any:
    """Return the shapes and logical axis names of the variables of a model. No arrays are allocated."""
    module = registry.family(family).module
    return jax.eval_shape(lambda key: module(config).init(key, **module.example(config)), jax.random.key(0))


def expected_shapes(family: str, config: Any) -> dict[str, Any]:
    """Return the shapes of a model's variables, as a dict by path."""
    return flatten(nn.unbox(boxed_shapes(family, config)))


def match(
    loaded: Mapping[str, Any], expected: Mapping[str, Any], source: str, new: Sequence[str] = ()
) -> None:
    """Check that loaded arrays fit a model by path, shape and dtype.

    Two different dtypes fit if both are floating-point types in which models can be stored, such as float32 and
    bfloat16.

    Parameters
    ----------
    loaded, expected
        Arrays or shapes by path.
    source
        Name of the file or folder for the error message.
    new
        Regular expressions for paths of new parameters. A parameter whose path matches an expression may be missing,
        and then keeps its initial value.

    Raises
    ------
    CheckpointError
        The arrays differ. The message lists the differences: "-" missing, "+" not in the model, "~" another shape or
        dtype.
    """
    differences = [
        f"- {path} {tuple(expected[path].shape)}"
        for path in sorted(set(expected) - set(loaded))
        if not any(re.search(pattern, path) for pattern in new)
    ]
    differences += [f"+ {path} {tuple(loaded[path].shape)}" for path in sorted(set(loaded) - set(expected))]
    for path in sorted(set(loaded) & set(expected)):
        ours, theirs = expected[path], loaded[path]
        if tuple(theirs.shape) != tuple(ours.shape):
            differences.append(f"~ {path} {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
        elif _kind(theirs) != _kind(ours):
            differences.append(f"~ {path} {theirs.dtype} instead of {ours.dtype}")
    if differences:
        shown = "\n  ".join(differences[:40]) + ("\n  ..." if len(differences) > 40 else "")
        raise CheckpointError(
            f"{source} does not fit the model, because {len(differences)} parameters differ (in the list below, - "
            "marks a missing parameter, + a parameter that the model does not have, and ~ another shape or dtype): "
            f"use weights of this architecture.\n  {shown}"
        )


def _kind(value: Any) -> str:
    """Return the dtype of an array, or "floating" if it is one of the floating-point dtypes for storing models."""
    name = str(jnp.dtype(value.dtype))
    return "floating" if name in LOADED_DTYPES else name
