"""Encode cell coordinates as sines and cosines (sCT paper, equation 1)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange


def spatial_features(
    coordinates: jax.Array, num_scales: int, sigma_min: float, sigma_max: float, mode: str
) -> jax.Array:
    """Encode coordinates (B, K, 2) as sines and cosines at several scales.

    Scale s (of S scales) encodes the angle coordinate / sigma_s, where sigma_s = sigma_min * (sigma_max / sigma_min) **
    (s / (S - 1)). The wavelength of scale s is 2 pi sigma_s.

    Parameters
    ----------
    coordinates
        Coordinates of cells, rescaled per slide (see `sct.data.coordinates.rescale_coordinates`).
    num_scales, sigma_min, sigma_max
        Number of scales (S), and the two constants of the formula, in the unit of the coordinates.
    mode
        "paper" computes cos x, cos y, sin x and sin y for each scale: 4 S features. The scale index s takes the values
        0, 1, ..., S - 1. "reference" computes only cos x and sin y for each scale: 2 S features. In this mode, s takes
        the values linspace(sigma_min, sigma_max, S), as in the published checkpoint.

    Returns
    -------
    float32 (B, K, 4 S) or (B, K, 2 S), with all features of the first scale first, then those of the second, and so on.
    """
    chex.assert_shape(coordinates, (None, None, 2))
    ratio = np.float32(sigma_max / sigma_min)
    if mode == "paper":
        steps = np.arange(num_scales, dtype=np.float32)
    else:
        steps = np.linspace(sigma_min, sigma_max, num_scales, dtype=np.float32)
    # Computed by NumPy on the host. A compiled power is off by a few units in the last place, which the towers amplify.
    sigma = np.float32(sigma_min) * ratio ** (steps / np.float32(max(num_scales - 1, 1)))
    angle = coordinates.astype(jnp.float32)[..., None, :] / sigma[:, None]  # (B, K, S, 2)
    x, y = angle[..., 0], angle[..., 1]
    if mode == "paper":
        features = jnp.stack([jnp.cos(x), jnp.cos(y), jnp.sin(x), jnp.sin(y)], axis=-1)
    else:
        features = jnp.stack([jnp.cos(x), jnp.sin(y)], axis=-1)
    return rearrange(features, "b k scale form -> b k (scale form)")
