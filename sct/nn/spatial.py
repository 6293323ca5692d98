"""Sinusoidal encoding of the coordinates of cells (sCT paper, equation 1)."""

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

    Parameters
    ----------
    coordinates
        Positions of cells, rescaled per slide (see `sct.data.coordinates.rescale_coordinates`).
    num_scales, sigma_min, sigma_max
        S scales sigma_s between the two bounds; the wavelength of a scale is 2 pi sigma_s.
    mode
        "paper": cos and sin of both coordinates, sigma_s geometric between the bounds, 4 S features
        (per scale cos x, cos y, sin x, sin y).
        "reference": cos of x and sin of y only, with the exponent's s running over
        linspace(sigma_min, sigma_max, S) as in the published checkpoint, 2 S features.

    Returns
    -------
    float32 (B, K, 4 S) or (B, K, 2 S), features interleaved scale by scale.
    """
    chex.assert_shape(coordinates, (None, None, 2))
    ratio = np.float32(sigma_max / sigma_min)
    if mode == "paper":
        steps = np.arange(num_scales, dtype=np.float32)
    else:
        steps = np.linspace(sigma_min, sigma_max, num_scales, dtype=np.float32)
    # On the host, once: a compiled power is a few units off in the last place, which the towers amplify.
    sigma = np.float32(sigma_min) * ratio ** (steps / np.float32(max(num_scales - 1, 1)))
    angle = coordinates.astype(jnp.float32)[..., None, :] / sigma[:, None]  # (B, K, S, 2)
    x, y = angle[..., 0], angle[..., 1]
    if mode == "paper":
        features = jnp.stack([jnp.cos(x), jnp.cos(y), jnp.sin(x), jnp.sin(y)], axis=-1)
    else:
        features = jnp.stack([jnp.cos(x), jnp.sin(y)], axis=-1)
    return rearrange(features, "b k scale form -> b k (scale form)")
