"""Staying near the source's parameters: L2-SP, EWC, Mixout; and BSS, which quietens features that do not transfer."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.objectives.rows import ones
from jaxtransfer.tree.paths import Params, flatten, map_with_path


def l2_sp(params: Params, anchor: Params, alpha: float = 0.01, beta: float = 0.01) -> jax.Array:
    """``alpha/2 sum |w - w0|^2`` over what the source has, ``beta/2 sum |w|^2`` over what is new (Li et al. 2018).

    arXiv:1802.01483. Its gradient at the anchor is 0, and finite.

    Args:
      params: the trained leaves; leaves that are None take no part.
      anchor: the same of the source, and without the new ones; canonical or laid out as ``params``.
      alpha: of leaves in both.
      beta: of leaves in ``params`` alone.

    Raises:
      ValueError: a leaf of another shape than its anchor.

    Example:
      >>> w0 = {"trunk": jnp.ones(3)}
      >>> float(l2_sp({"trunk": jnp.ones(3), "head": jnp.full(2, 2.0)}, w0, alpha=1.0, beta=1.0))
      4.0
    """
    old, total = flatten(anchor), jnp.zeros((), jnp.float32)
    for path, leaf in flatten(params).items():
        if path in old:
            total += alpha / 2.0 * _square(leaf - _of_shape(path, old[path], leaf))
        else:
            total += beta / 2.0 * _square(leaf)
    return total


def quadratic(params: Params, anchor: Params, importance: Params) -> jax.Array:
    """``sum_i F_i (w_i - w0_i)^2 / 2``: elastic weight consolidation's penalty (Kirkpatrick et al. 2017).

    arXiv:1612.00796, equation 3, whose lambda is the term's weight. With SI's importances (Zenke et al. 2017) it is
    theirs, up to their factor of 2.

    Args:
      params: the trained leaves.
      anchor: of the task before.
      importance: F >= 0 by leaf, such as `fisher` gives; leaves without one take no part.

    Raises:
      ValueError: a leaf of another shape than its anchor, or an importance for a leaf that is not there.

    Example:
      >>> float(quadratic({"w": jnp.array([3.0])}, {"w": jnp.array([1.0])}, {"w": jnp.array([0.5])}))
      1.0
    """
    now, old, total = flatten(params), flatten(anchor), jnp.zeros((), jnp.float32)
    for path, weight in flatten(importance).items():
        if path not in now or path not in old:
            where = "parameters" if path not in now else "anchor"
            raise ValueError(f"quadratic: {path} has an importance, but is not among the {where}")
        apart = now[path] - _of_shape(path, old[path], now[path])
        total += jnp.sum(_of_shape(path, weight, apart) * apart * apart) / 2.0
    return total


def mixout(params: Params, anchor: Params, key: jax.Array, probability: float) -> Params:
    """Parameters of which a share is swapped for the source's, with the mean kept (Lee et al. 2020, arXiv:1909.11299).

    ``((1 - m) w0 + m w - p w0) / (1 - p)``, m ~ Bernoulli(1 - p): dropout around the source instead of around 0.
    Gradients carry the factor ``1 / (1 - p)``, which the authors' own code leaves out.

    Args:
      params: the trained leaves.
      anchor: of the source; leaves that it has not are left alone.
      key: of this step.
      probability: p in [0, 1).

    Raises:
      ValueError: a probability out of range, or a leaf of another shape than its anchor.

    Example:
      >>> w = {"w": jnp.arange(3.0)}
      >>> mixout(w, {"w": jnp.zeros(3)}, jax.random.key(0), 0.0)["w"].tolist()
      [0.0, 1.0, 2.0]
    """
    if not 0 <= probability < 1:
        raise ValueError(f"mixout: probability must be in [0, 1), got {probability}")
    old, number = flatten(anchor), {path: i for i, path in enumerate(flatten(params))}

    def mixed(path: str, leaf: jax.Array) -> jax.Array:
        if path not in old:
            return leaf
        w0 = _of_shape(path, old[path], leaf)
        kept = jax.random.bernoulli(jax.random.fold_in(key, number[path]), 1.0 - probability, leaf.shape)
        return (jnp.where(kept, leaf, w0) - probability * w0) / (1.0 - probability)

    return map_with_path(mixed, params)


def spectral_shrinkage(features: jax.Array, k: int = 1, *, weights: jax.Array | None = None) -> jax.Array:
    """Batch spectral shrinkage: the sum of the k smallest squared singular values of a batch (Chen et al. 2019).

    "Catastrophic forgetting meets negative transfer". By singular values alone, whose gradient is finite where two are
    equal; that of the vectors is not.

    Args:
      features: (B, d).
      k: how many, at most min(B, d).
      weights: (B,), 0 for rows of padding, or None: the values are those of the matrix of rows that count.

    Raises:
      ValueError: k is out of range.

    Example:
      >>> round(float(spectral_shrinkage(jnp.diag(jnp.array([3.0, 2.0])))), 4)
      4.0
    """
    if not 1 <= k <= min(features.shape):
        raise ValueError(f"spectral_shrinkage: k must be from 1 to {min(features.shape)}, got {k}")
    counted = ones(features, weights) > 0
    values = jnp.linalg.svd(jnp.where(counted[:, None], features, 0.0), compute_uv=False)
    rank = jnp.minimum(jnp.sum(counted), features.shape[1])  # a row of zeros adds a value of zero behind the others
    at = rank - 1 - jnp.arange(k)
    smallest = jnp.where(at >= 0, values[jnp.maximum(at, 0)], 0.0)
    return jnp.sum(smallest * smallest)


def _square(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return jnp.sum(x * x)  # the norm's own gradient is no number at 0


def _of_shape(path: str, leaf: Any, like: jax.Array) -> jax.Array:
    if tuple(leaf.shape) != tuple(like.shape):
        raise ValueError(f"{path}: is {tuple(like.shape)} here and {tuple(leaf.shape)} there; resize the one first")
    return leaf.astype(like.dtype)
