"""Means over the rows of a batch, of which those of padding weigh nothing."""

import jax
import jax.numpy as jnp


def mean(values: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """``sum_i w_i v_i / sum_i w_i`` over rows, (B, ...) -> (...); 0 where nothing weighs anything.

    What weighs nothing is cut out: it may be no number.

    Args:
      values: (B, ...).
      weights: (B,), or None for 1.

    Example:
      >>> float(mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0])))
      2.0
    """
    if weights is None:
        return jnp.mean(values, axis=0)
    w = ones(values, weights)
    rows = jnp.expand_dims(w, tuple(range(1, values.ndim)))
    return jnp.sum(jnp.where(rows > 0, rows * values, 0.0), axis=0) / jnp.maximum(jnp.sum(w), 1e-30)


def ones(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The weights, (B,) in the values' dtype; 1 where none are given."""
    return jnp.ones(len(values), values.dtype) if weights is None else weights.astype(values.dtype)
