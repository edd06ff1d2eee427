"""Mixup: convex combinations of pairs of examples and of their labels."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Augment = Callable[[Mapping[str, Any], jax.Array], Mapping[str, Any]]


def mixup(alpha: float, classes: int, *, field: str = "pixel_values") -> Augment:
    """``l_i x_i + (1 - l_i) x_p(i)``, and the same of the labels, with ``l_i ~ Beta(alpha, alpha)``: Zhang et al. 2018.

    The partners p are a random permutation of the batch's real rows; padding, of weight 0, neither gives nor gets
    anything. Every row draws its own l, as the paper's equation says (its program drew one for the batch). A batch
    that is split over devices is mixed as a whole, and alike however it is split; with accumulation each microbatch is
    mixed within itself.

    Args:
      alpha: > 0; small values mix little, 1 draws l evenly from [0, 1].
      classes: C, for labels that are class numbers.
      field: what is mixed beside the labels.

    Returns:
      ``augment(batch, key) -> batch``, for `make_step`: mixes ``field`` (B, ...) and ``labels``, of which (B,) class
      numbers become (B, C) float32, to be read by `cross_entropy` or `binary_cross_entropy`.

    Raises:
      ValueError: alpha is not positive; when traced, a field of integers.

    Reference: arXiv:1710.09412, equation 1.

    Example:
      >>> batch = {"pixel_values": jnp.eye(2), "labels": jnp.array([0, 1]), "weight": jnp.ones(2)}
      >>> mixed = mixup(1.0, 2)(batch, jax.random.key(0))
      >>> bool(jnp.allclose(mixed["pixel_values"], mixed["labels"]))
      True
    """
    if not alpha > 0:
        raise ValueError(f"mixup: alpha must be positive, got {alpha}")

    def augment(batch: Mapping[str, Any], key: jax.Array) -> Mapping[str, Any]:
        values, labels = batch[field], batch["labels"]
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(f"mixup: {field} is {values.dtype}, expected floats")
        if labels.ndim == 1:
            labels = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
        order, ratio = jax.random.split(key)
        real = batch["weight"] > 0
        partner, own = partners(real, order), jax.random.beta(ratio, alpha, alpha, real.shape, jnp.float32)

        def mixed(x: jax.Array) -> jax.Array:
            share, kept = (jnp.expand_dims(row, tuple(range(1, x.ndim))) for row in (own.astype(x.dtype), real))
            return jnp.where(kept, share * x + (1 - share) * x[partner], x)

        return {**batch, field: mixed(values), "labels": mixed(labels)}

    return augment


def partners(real: jax.Array, key: jax.Array) -> jax.Array:
    """A random permutation of the real rows, (B,) of positions; any other row is its own partner.

    Example:
      >>> partners(jnp.array([True, False, True, False]), jax.random.key(0)).tolist() in ([0, 1, 2, 3], [2, 1, 0, 3])
      True
    """
    shuffled = jnp.argsort(jnp.where(real, jax.random.uniform(key, real.shape), 2.0))
    return jnp.zeros_like(shuffled).at[jnp.argsort(~real)].set(shuffled)  # both sorts are stable
