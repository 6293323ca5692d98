"""Define the classifier that fine-tuning trains on cell embeddings.

The classifier is that of the scPEFT paper: two times (dense layer, ReLU, layer norm), then a dense layer. Its variables
are a collection of their own, "classifier", so that the collection "params" of the model stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct.models.cell_encoder import LabelHead
from sct.nn.paths import flatten

COLLECTION = "classifier"
NUM_LAYERS = 3
NEW: tuple[str, ...] = (rf"^{COLLECTION}/",)


def _head(width: int, num_classes: int, num_layers: int) -> LabelHead:
    return LabelHead(width, num_classes, num_layers, jax.nn.relu)


def init(rng: jax.Array, width: int, num_classes: int, num_layers: int = NUM_LAYERS) -> dict[str, Any]:
    """Make the collection "classifier" for embeddings of a width (D), boxed with axis names."""
    made = _head(width, num_classes, num_layers).init(rng, jnp.zeros((1, width)))
    return cast(dict[str, Any], made["params"])


def logits(tree: Mapping[str, Any], embeddings: jax.Array) -> jax.Array:
    """Return the logits, float32 (..., C), of cell embeddings (..., D); `tree` is the collection "classifier"."""
    width, classes = tree["out"]["kernel"].shape
    module = _head(width, classes, _layers(tree))
    return cast(jax.Array, module.apply({"params": tree}, embeddings.astype(jnp.float32)))


def _layers(tree: Mapping[str, Any]) -> int:
    return 1 + sum(name.startswith("hidden_") for name in tree)


def beside(variables: Any, found: Mapping[str, Any]) -> Any:
    """Extend the boxed shapes of a model by those of the classifier in a weights file.

    Parameters
    ----------
    variables
        Boxed shapes of the model.
    found
        Shapes of the arrays in the file, as a dict by path.

    Returns
    -------
    Boxed shapes. They contain the collection "classifier" if the file has a classifier.
    """
    kernel = found.get(f"{COLLECTION}/out/kernel")
    if kernel is None or len(kernel.shape) != 2:
        return variables
    names = {path.split("/")[1] for path in found if path.startswith(f"{COLLECTION}/")}
    width, classes = kernel.shape
    made = jax.eval_shape(
        lambda key: init(key, width, classes, _layers(dict.fromkeys(names))), jax.random.key(0)
    )
    return {**variables, COLLECTION: made}


def count(tree: Mapping[str, Any]) -> int:
    """Return the number of parameters in the collection "classifier"."""
    return sum(int(np.prod(value.shape)) for value in flatten(nn.unbox(dict(tree))).values())
