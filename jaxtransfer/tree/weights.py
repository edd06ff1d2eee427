"""Weights: the small protocol through which layers use a weight, whatever it is made of.

A weight is an array, or a leaf type: a registered dataclass derived from :class:`Weight` that stands where the array
would (an adapter around a base, a quantised matrix). Layers call the functions here and never touch a weight otherwise.
"""

from typing import Any

import jax
import jax.numpy as jnp


class Weight:
    """The base of leaf types; a subclass is a frozen dataclass registered with ``jax.tree_util.register_dataclass``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that this weight stands for."""
        raise TypeError(f"{type(self).__name__} does not define shape")

    @property
    def dtype(self) -> Any:
        """The dtype of the matrix that this weight stands for."""
        raise TypeError(f"{type(self).__name__} does not define dtype")

    def materialize(self) -> jax.Array:
        """The array that this weight stands for."""
        raise TypeError(f"{type(self).__name__} cannot be materialized")

    def linear(self, x: jax.Array, bias: Any, key: jax.Array | None) -> jax.Array:
        """``x @ w + bias``; the default materializes the weight."""
        return linear(x, self.materialize(), bias, key)

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Rows of an embedding; the default materializes the weight."""
        return take(self.materialize(), ids, dtype)

    def transpose(self) -> Any:
        """The transposed weight, for tied heads; the default materializes the weight."""
        return self.materialize().T


def is_weight(x: Any) -> bool:
    """Whether a node is a leaf type."""
    return isinstance(x, Weight)


def linear(x: jax.Array, w: Any, bias: Any = None, key: jax.Array | None = None) -> jax.Array:
    """``y = x w + b`` in the dtype of ``x``: (..., in) x (in, out) -> (..., out).

    ``key`` is a dropout key for leaf types that need one; None in evaluation.

    Example:
      >>> linear(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(4)).shape
      (2, 4)
    """
    if is_weight(w):
        return w.linear(x, bias, key)
    y = jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
    return y if bias is None else y + jnp.reshape(bias.astype(x.dtype), (1,) * (y.ndim - 1) + (-1,))


def take(w: Any, ids: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Rows of an embedding matrix: (vocabulary, width), (...) -> (..., width), in ``dtype``."""
    if is_weight(w):
        return w.take(ids, dtype)
    return jnp.take(w, ids, axis=0, mode="clip").astype(dtype)


def transpose(w: Any) -> Any:
    """The transposed weight."""
    return w.transpose() if is_weight(w) else w.T


def materialize(w: Any) -> jax.Array:
    """The plain array that a weight stands for."""
    return w.materialize() if is_weight(w) else w
