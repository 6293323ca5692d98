"""A model with its weights and genes: applied and saved."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
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
from sct.models import registry
from sct.nn import axes
from sct.nn.paths import flatten
from sct.version import DISTRIBUTION, REPOSITORY, __version__
from sct.weights import model_folder
from sct.weights.model_folder import FORMAT_VERSION, SHARD_BYTES

LOADED_DTYPES = ("float32", "bfloat16", "float16")
# Options of the data that a model's inputs should share with its training, and the paper's values.
DATA_OPTIONS: Mapping[str, Any] = {"cells_per_bag": CELLS_PER_BAG, "noise_fraction": NOISE_FRACTION}
_DATA_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(DATA_OPTIONS, (int, float)), "masking": Mapping, "logit_adjustment": bool,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with its weights and genes, ready to be applied; every family's handle has this shape.

    Attributes
    ----------
    family, config
        Name in `sct.models.registry`, and the architecture.
    variables
        Nested dict of arrays.
    genes
        Vocabulary of the gene positions, or the genes whose names the model writes; None of a model of text alone.
    card
        Text of the model card.
    license
        Licence of the weights, as the card states it.
    step
        Training step of the weights, where a run made them.
    data
        How inputs were made in training, as far as it is known: the entries of `DATA_OPTIONS` and how genes were
        masked (`sct.data.class_prior`), or what a task of texts describes.
    tokenizer
        Of a model of text.
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

    def __repr__(self) -> str:
        knows = f", {len(self.genes):,} genes" if self.genes is not None else ""
        knows += f", {self.tokenizer.vocab_size:,} tokens" if self.tokenizer is not None else ""
        return f"Pretrained({self.family!r}, {self.size:,} parameters{knows})"

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(value.shape)) for value in flatten(self.variables).values())

    @property
    def vocabulary(self) -> GeneVocabulary:
        """Genes of the model; `ConfigError` where it has none."""
        if self.genes is None:
            raise ConfigError(f"{self!r} knows no genes: give a model that was made for cells.")
        return self.genes

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the weights, 16 hexadecimal digits: which model it was."""
        digest = hashlib.sha256()
        for path, value in sorted(flatten(self.variables).items()):
            digest.update(path.encode())
            digest.update(np.asarray(value).tobytes())
        return digest.hexdigest()[:16]

    def apply(
        self, *, intermediates: Sequence[str] = (), outputs: Sequence[str] | None = None, **inputs: Any
    ) -> dict[str, jax.Array]:
        """Run the model; compiled once per shape of the inputs.

        Parameters
        ----------
        outputs
            Names of the results to compute, all by default; what only the others need is left out.
        intermediates
            Names of activations to return beside the outputs.
        inputs
            Arrays by name, as the family's module takes them. For sCT: `tokens` integers (B, K, G) and
            `coordinates` (B, K, 2) or None; the result has `logits` float32 (B, K, G, levels + 2) and
            `cell_embedding` float32 (B, K, D), and, where asked for, `conv_out`, `transformer_out` and
            `deconv_out`.

        Raises
        ------
        CheckpointError
            An output or intermediate that the family does not have.
        DataError
            An input that the family does not take, or whose shape or values are not those of this model.
        ConfigError
            The model computes in float16, which CPUs do not.
        """
        registry.check_device(self.config)
        module = registry.family(self.family).module
        unknown = sorted(set(intermediates) - set(module.intermediates))
        for name in unknown:
            check_choice("the intermediate", name, module.intermediates, error=CheckpointError)
        there = module.outputs_of(self.config) if hasattr(module, "outputs_of") else module.outputs
        chosen = there if outputs is None else tuple(outputs)
        unknown = sorted(set(chosen) - set(there))
        for name in unknown:
            check_choice("the output", name, there, error=CheckpointError)
        wanted = (*chosen, *sorted(set(intermediates)))
        given = {
            name: value if hasattr(value, "shape") else np.asarray(value)
            for name, value in inputs.items()
            if value is not None
        }
        _check_inputs(module, self.config, given)
        arrays = {name: jnp.asarray(value) for name, value in given.items()}
        return _compiled(self.family, self.config, wanted)(self.variables, arrays)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, dtype: str = "float32", shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write a model folder; an existing model folder is replaced.

        What is written takes its place at once when it is complete. An existing model is renamed to
        `.NAME.old` just before that and then deleted; where the process dies in between, `load` reads it
        there and the next save puts it back first.

        Parameters
        ----------
        folder
            Where to write. A folder that holds anything else than the files of a model is refused.
        dtype
            "float32" or "bfloat16": widest type of the floating-point arrays in the file; narrower ones stay.
        shard_bytes
            Size above which the weights are split over several files, as Hugging Face does.

        Raises
        ------
        CheckpointError
            The folder holds other files, or cannot be written; nothing is left of the attempt then.
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
        }
        card = self.card or default_card(self)
        target = Path(folder).expanduser()
        arrays = flatten(self.variables)
        model_folder.save(target, arrays, config, self.genes, self.tokenizer, card, dtype, shard_bytes)


def _check_inputs(module: Any, config: Any, inputs: Mapping[str, Any]) -> None:
    """Raise `DataError` unless a family's module takes these inputs."""
    takes = inspect.signature(module.__call__).parameters
    names = [name for name in takes if name != "self"]
    unknown = sorted(set(inputs) - set(names))
    for name in unknown:
        check_choice("the input", name, names, error=DataError)
    missing = [n for n in names if takes[n].default is inspect.Parameter.empty and n not in inputs]
    if missing:
        raise DataError(f"the input {missing[0]!r} is missing: the model takes {', '.join(names)}.")
    if hasattr(module, "check_inputs"):
        module.check_inputs(config, inputs)


@functools.lru_cache(maxsize=32)
def _compiled(family: str, config: Any, wanted: tuple[str, ...]) -> Callable[..., dict[str, jax.Array]]:
    module = registry.family(family).module(config)

    def run(variables: dict[str, Any], inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        outputs = cast(dict[str, jax.Array], module.apply(variables, **inputs))
        return {name: outputs[name] for name in wanted}

    return jax.jit(run)


def default_card(model: Pretrained, text: str = "") -> str:
    """Model card: what it is, how to load it, its licence, and `text` about how it was made."""
    knows = []
    if model.genes is not None:
        knows.append(f"{len(model.genes):,} genes ({model.genes.name}, hash `{model.genes.hash[:16]}`)")
    if model.tokenizer is not None:
        knows.append(f"{model.tokenizer.vocab_size:,} tokens (hash `{model.tokenizer.fingerprint[:16]}`)")
    return "\n".join(
        [
            "---", "library_name: sct", f"license: {model.license}", "tags: [single-cell]", "---", "",
            f"# {model.family} model", "",
            f"{', '.join([*knows, f'{model.size:,} parameters'])}, written by sct {__version__}.", "",
            f"To load it, `pip install {DISTRIBUTION}`{f' ({REPOSITORY})' if REPOSITORY else ''}, then", "",
            "```python", "import sct", 'model = sct.load("THIS_FOLDER")', "```", "",
            text, "", "## Licence", "", model.license, "",
        ]
    )  # fmt: skip


def data_options(values: Any) -> dict[str, Any]:
    """Entries of `DATA_OPTIONS`, and the record of masking, in the data section of a configuration.

    Entries of another type than theirs are left out.
    """
    given = values if isinstance(values, Mapping) else {}
    return {name: given[name] for name, kind in _DATA_TYPES.items() if isinstance(given.get(name), kind)}


def data_record(values: Any) -> dict[str, Any]:
    """What a model folder says of its data, without entries of `data_options` that are of another type than theirs."""
    given = values if isinstance(values, Mapping) else {}
    return {name: value for name, value in given.items() if isinstance(value, _DATA_TYPES.get(name, object))}


def fitting_rules(mesh: Mesh | None, rules: axes.AxisRules | None) -> axes.AxisRules:
    """Rules for a mesh: those given, which must fit it, or the default ones without the axes it lacks."""
    there = set(mesh.axis_names) if mesh is not None else set()
    if rules is None:
        return {name: tuple(a for a in wanted if a in there) for name, wanted in axes.RULES.items()}
    strange = sorted({axis for wanted in rules.values() for axis in wanted} - there)
    if mesh is not None and strange:
        raise ConfigError(
            f"the rules name the mesh axis {strange[0]!r}, but the mesh has {', '.join(mesh.axis_names)}."
        )
    return rules


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of all processes, of which there are several."""
    owners = {device.process_index for device in mesh.devices.flat} if mesh is not None else set()
    return jax.process_count() > 1 and len(owners) == jax.process_count()


def boxed_shapes(family: str, config: Any) -> Any:
    """Variables of a family as shapes with logical axis names; nothing is allocated."""
    module = registry.family(family).module
    return jax.eval_shape(lambda key: module(config).init(key, **module.example(config)), jax.random.key(0))


def expected_shapes(family: str, config: Any) -> dict[str, Any]:
    """Shapes of a family's variables by path."""
    return flatten(nn.unbox(boxed_shapes(family, config)))


def match(
    loaded: Mapping[str, Any], expected: Mapping[str, Any], source: str, new: Sequence[str] = ()
) -> None:
    """Check that loaded arrays are those that a model has, by path, shape and kind of number.

    Parameters
    ----------
    loaded, expected
        Arrays or shapes by path.
    source
        Where they come from, for the message.
    new
        Regular expressions of paths that may be absent and keep their initial value.

    Raises
    ------
    CheckpointError
        With a list of the differences: "-" missing, "+" not in the model, "~" another shape or type.
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
            f"{source} does not fit the model, {len(differences)} parameters differ (- missing, + not in the "
            f"model, ~ another shape or type):\n  {shown}"
        )


def _kind(value: Any) -> str:
    """Type of an array, the same for all floating-point types that a model may be stored in."""
    name = str(jnp.dtype(value.dtype))
    return "floating" if name in LOADED_DTYPES else name
