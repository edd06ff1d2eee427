"""Layers: small NNX modules, one-to-one with Hugging Face's modules, that touch weights only by the weight protocol."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtransfer.tree import weights

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Activations by Hugging Face's names; ``gelu`` is the exact one."""


class Linear(nnx.Module):
    """``y = x w + b``; kernel (in, out) from N(0, std^2), bias zero."""

    def __init__(self, inputs: int, outputs: int, *, std: float = 0.02, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)) * std)
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        bias = None if self.bias is None else self.bias.get_value()
        return weights.linear(x, self.kernel.get_value(), bias, key)


class Embedding(nnx.Module):
    """Rows, in at least float32, of a matrix (count, width) from N(0, std^2)."""

    def __init__(self, count: int, width: int, *, std: float = 0.02, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (count, width)) * std)

    def __call__(self, ids: jax.Array) -> jax.Array:
        matrix = self.embedding.get_value()
        return weights.take(matrix, ids, at_least_float32(matrix.dtype))


class LayerNorm(nnx.Module):
    """``(x - mean) / sqrt(var + eps) * scale + bias`` over the last axis, computed in at least float32."""

    def __init__(self, width: int, *, eps: float):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(at_least_float32(x.dtype))
        mean = wide.mean(-1, keepdims=True)
        centred = wide - mean
        var = jnp.mean(centred * centred, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(var + self.eps)
        return (y * _row(self.scale, y) + _row(self.bias, y)).astype(x.dtype)


def at_least_float32(dtype: Any) -> Any:
    """The dtype, or float32 where it is narrower (``jnp.promote_types`` raises under strict promotion)."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _row(variable: Any, like: jax.Array) -> jax.Array:
    value = weights.materialize(variable.get_value()).astype(like.dtype)
    return value.reshape((1,) * (like.ndim - 1) + (-1,))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each entry with probability ``rate`` and scales the rest by ``1 / (1 - rate)``; identity without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """``jax.random.split`` that passes None through."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, heads: int, rate: float, key: jax.Array | None
) -> jax.Array:
    """``softmax(q k^T / sqrt(d) + mask) v`` over ``heads`` heads, the softmax in at least float32.

    Args:
      q: (B, T, heads * d); k, v: (B, S, heads * d).
      mask: (B, S) or (B, T, S) boolean, true where a key may be attended; a row with none attends to all alike.
      heads: number of heads.
      rate: dropout of the attention probabilities, with ``key``.
    """
    d = q.shape[-1] // heads
    q, k, v = (x.reshape(*x.shape[:-1], heads, d) for x in (q, k, v))
    wide = at_least_float32(q.dtype)
    scores = jnp.einsum("bthd,bshd->bhts", q * d**-0.5, k, preferred_element_type=wide)
    mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    probs = dropout(jax.nn.softmax(scores, axis=-1).astype(v.dtype), rate, key)
    y = jnp.einsum("bhts,bshd->bthd", probs, v)
    return y.reshape(*y.shape[:-2], heads * d)
