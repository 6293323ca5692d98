"""Define the methods of fine-tuning: which adapters a method adds to a model, and which parameters it trains.

A method of the scPEFT paper is a preset over the kinds of adapters (`sct.models.adapter_kinds`). Every method also
trains a new classifier (`sct.models.classifier`). The manifest of a family says how a model is fine-tuned
(`FineTuning`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from sct.checks import check_at_least, check_choice
from sct.errors import ConfigError
from sct.models import adapters, classifier
from sct.models.adapter_kinds import AdapterConfig, BottleneckConfig, LoraConfig, PrefixConfig
from sct.nn.adapters import COLLECTION
from sct.nn.paths import flatten, resolve
from sct.weights.pretrained import FULL

CLASSIFIER, PREFIX, LORA = "classifier", "prefix", "lora"
GENE_TOKEN, GENE_ENCODER = "gene_token", "gene_encoder"
METHODS = (FULL, CLASSIFIER, PREFIX, LORA, GENE_TOKEN, GENE_ENCODER)
# Kind of adapters of each method.
_KINDS: Mapping[str, type[AdapterConfig]] = {
    PREFIX: PrefixConfig, LORA: LoraConfig, GENE_TOKEN: BottleneckConfig, GENE_ENCODER: BottleneckConfig,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """How the models of an architecture are fine-tuned for cell types; part of the manifest of a family.

    The reader of `embed` converts cells to model inputs, in training as in inference. The classifier reads the output
    `readout` of this reader.

    Attributes
    ----------
    gene_embedding
        Regular expressions for the layers that embed genes. The method "gene_token" puts a bottleneck after them.
        Empty if the architecture has no gene embedding; the method is then not available.
    projections
        Regular expressions for the dense layers that the method "lora" adapts.
    blocks
        Regular expressions for the dense layers after which the method "gene_encoder" puts a bottleneck: the last
        layers of attention and feed-forward network.
    attention
        Regular expressions for the attention layers that get a prefix.
    frozen
        Regular expressions for parameters that are never trained, not even by the method "full".
    """

    gene_embedding: tuple[str, ...] = ()
    projections: tuple[str, ...] = (r"attention/(query|key|value)$",)
    blocks: tuple[str, ...] = (r"attention/out$", r"mlp/down$")
    attention: tuple[str, ...] = (r"attention$",)
    frozen: tuple[str, ...] = ()

    def targets(self, method: str) -> tuple[str, ...]:
        """Return the regular expressions for the layers that a method adapts; empty if it adapts none."""
        return {
            PREFIX: self.attention, LORA: self.projections, GENE_TOKEN: self.gene_embedding,
            GENE_ENCODER: self.blocks,
        }.get(method, ())  # fmt: skip

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that the architecture supports."""
        return tuple(name for name in METHODS if name not in _KINDS or self.targets(name))


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """Options of the method of fine-tuning (section `peft` of a configuration).

    Parameters
    ----------
    method
        "full" trains all parameters. All other methods leave the model as it is: "classifier" trains only the
        classifier, "prefix" also a prefix in each attention layer, "lora" low-rank adapters, "gene_token" a bottleneck
        after the gene embedding, and "gene_encoder" two bottlenecks in each of the chosen blocks. Methods can be
        combined: "lora+gene_token".
    rank, alpha
        Options of "lora", see `sct.models.adapter_kinds.LoraConfig`. By default, rank 20 on queries, keys and values:
        1,270,283 trained parameters at the size of the scPEFT paper.
    length
        Option of "prefix": number of vectors in each attention layer.
    width, scale, skip
        Options of "gene_token" and "gene_encoder", see `BottleneckConfig`. The form of the paper is `skip=False`.
    layers
        Numbers of the blocks, counted from 0, that get adapters. By default, "gene_encoder" uses the upper half of the
        blocks (the paper uses 6 of 12 and does not name them), and the other methods use all blocks.
    """

    method: str = GENE_ENCODER
    rank: int = 20
    alpha: float = 20.0
    length: int = PrefixConfig.length
    width: int = BottleneckConfig.width
    scale: float = BottleneckConfig.scale
    skip: bool = BottleneckConfig.skip
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in self.methods:
            check_choice("peft.method", name, METHODS)
        if len(set(self.methods)) < len(self.methods) or (
            len(self.methods) > 1 and set(self.methods) & {FULL, CLASSIFIER}
        ):
            raise ConfigError(
                f"peft.method is {self.method!r}, but only different methods with adapters can be combined "
                f"({', '.join(_KINDS)}): remove the others."
            )
        for name in ("rank", "length", "width"):
            check_at_least(f"peft.{name}", getattr(self, name), 1)

    @property
    def methods(self) -> tuple[str, ...]:
        """The single methods that are combined."""
        return tuple(self.method.split("+"))

    def adapters(self, how: FineTuning, params: Any, architecture: str) -> tuple[AdapterConfig, ...]:
        """Return the options of the adapters of a model.

        Parameters
        ----------
        how
            Entry of the architecture in the manifest.
        params
            Boxed shapes of the collection "params".
        architecture
            Name of the architecture, for messages.

        Raises
        ------
        ConfigError
            The architecture does not support the method.
        """
        made = []
        for name in self.methods:
            check_choice(
                f"peft.method of the architecture {architecture!r}",
                name,
                how.methods,
                advice="choose one of these",
            )
            if name in _KINDS:
                made.append(self._adapter(name, how.targets(name), params))
        return tuple(made)

    def _adapter(self, name: str, targets: tuple[str, ...], params: Any) -> AdapterConfig:
        layers = self.layers if name != GENE_TOKEN else ()
        if name == LORA:
            return LoraConfig(targets, rank=self.rank, alpha=self.alpha, layers=layers)
        if name == PREFIX:
            return PrefixConfig(targets, length=self.length, layers=layers)
        made = BottleneckConfig(targets, width=self.width, scale=self.scale, skip=self.skip)
        if name == GENE_ENCODER:
            number = adapters.num_blocks(params, made)
            upper = tuple(range(number // 2, number))
            made = dataclasses.replace(made, layers=layers or upper)
        return made

    def trainable(self, how: FineTuning, paths: Iterable[str]) -> tuple[tuple[str, bool], ...]:
        """Return the table of trained parameters: (regular expression over paths, whether they are trained).

        `paths` are the paths of the model's variables. Rules of `how` that match none of them are left out.
        """
        own: tuple[tuple[str, bool], ...] = ((rf"^{classifier.COLLECTION}/", True),)
        if self.method == FULL:
            paths = list(paths)
            frozen = [pattern for pattern in how.frozen if any(re.search(pattern, path) for path in paths)]
            return (*((pattern, False) for pattern in frozen), *own, (".*", True))
        if self.method == CLASSIFIER:
            return (*own, (".*", False))
        return (*own, *adapters.TRAINABLE)


def count_trained(variables: Any, peft: PeftConfig, how: FineTuning) -> int:
    """Return the number of parameters that a method trains, classifier included; boxed shapes also work."""
    flat = flatten(nn.unbox(variables))
    chosen = resolve(peft.trainable(how, flat), flat, "trainable")
    return sum(int(np.prod(value.shape, dtype=np.int64)) for path, value in flat.items() if chosen[path])


def init(
    rng: jax.Array,
    variables: Mapping[str, Any],
    configs: tuple[AdapterConfig, ...],
    width: int,
    num_classes: int,
) -> dict[str, Any]:
    """Add new adapters and a new classifier to the boxed variables of a model.

    Parameters
    ----------
    rng
        PRNG key.
    variables
        Boxed variables of the model, or their shapes under `jax.eval_shape`.
    configs
        Options of the adapters; none for the methods "full" and "classifier".
    width, num_classes
        Width of the cell embedding (D), and number of cell types.
    """
    first, second = jax.random.split(rng)
    made = {**variables, classifier.COLLECTION: classifier.init(second, width, num_classes)}
    if configs:
        made[COLLECTION] = adapters.init(first, variables["params"], *configs)
    return made
