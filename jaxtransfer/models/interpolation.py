"""Interpolation as a matrix, one an axis: torch's, which jax.image does not offer."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@lru_cache(maxsize=64)
def resize_matrix(old: int, new: int, kernel: str = "bicubic") -> np.ndarray:
    """Interpolation of ``old`` samples at ``new`` places as a matrix (new, old): torch's, without ``align_corners``.

    ``bicubic`` is Keys' kernel with a = -0.75 (`jax.image.resize` has -0.5), ``bilinear`` the hat; samples beyond the
    ends repeat the last one, and shrinking does not blur.

    Example:
      >>> resize_matrix(2, 4, "bilinear").tolist()
      [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """

    def weigh(t: np.ndarray) -> np.ndarray:
        t, a = np.abs(t), -0.75
        if kernel == "bilinear":
            return np.maximum(0.0, 1.0 - t)
        near, far = ((a + 2) * t - (a + 3)) * t * t + 1, a * (((t - 5) * t + 8) * t - 4)
        return np.where(t <= 1, near, np.where(t < 2, far, 0.0))

    out = np.zeros((new, old))
    place = (np.arange(new) + 0.5) * old / new - 0.5
    for offset in (-1, 0, 1, 2):
        source = np.floor(place).astype(int) + offset
        np.add.at(out, (np.arange(new), np.clip(source, 0, old - 1)), weigh(place - source))
    out.flags.writeable = False
    return out


def resize_grid(table: Any, tokens: int, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Positions of another grid of patches, bicubic: (1, tokens + h * w, d) -> (1, tokens + h' * w', d)."""
    rows, columns = (jnp.asarray(resize_matrix(a, b), table.dtype) for a, b in zip(old, new, strict=True))
    grid = table[0, tokens:].reshape(*old, -1)
    grid = jnp.einsum("ai,bj,ijd->abd", rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([table[:, :tokens], grid.reshape(1, -1, table.shape[-1])], axis=1)
