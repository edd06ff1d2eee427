"""Adapters as leaf types: each stands where a kernel stood, holds it as its base, and knows how to be applied.

A leaf type's parts are addressed behind an ``@``: ``blocks/3/attention/query/kernel@a``. What of it trains is what its
``trainable`` names; the base stays as it is, whatever it is made of (an array, a quantised weight, another adapter).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtransfer.models.layers import dropout, split
from jaxtransfer.tree import weights
from jaxtransfer.tree.weights import Weight, Window

NAME = "default"


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


class Adapter(Weight):
    """The base of adapters: a weight around another one, its ``base``."""

    trainable: ClassVar[tuple[str, ...]] = ()
    base: Any
    name: str
    rank_of_base: int
    """2 for a matrix, 4 for a convolution: known where the base itself is elsewhere, in the frozen partition."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the base."""
        return self.base.dtype

    def merged_bias(self, bias: Any) -> Any:
        """The bias beside the merged weight: what adapters further in make of it."""
        return self.base.merged_bias(bias) if isinstance(self.base, Adapter) else bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA(Adapter):
    """``W + s a b``, the product never formed (Hu et al. 2022, arXiv:2106.09685).

    ``y = x W + bias + s (dropout(x) a) b``.

    Attributes:
      base: W: a matrix (in, out), an embedding (count, width) or a convolution's kernel (h, w, in, out).
      a: (in, r), (count, r) or (h, w, in, r); b: (r, out).
      scale: s, float32: ``alpha / r``, or ``alpha / sqrt(r)`` (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732).
      rate: dropout of the input of ``a``.
      name: of the adapter.

    With leading axes on ``a``, ``b`` and ``scale`` it holds several adapters: see `attaching.select`.
    """

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")

    base: Any
    a: Any
    b: Any
    scale: Any
    rate: float = _static(0.0)
    name: str = _static(NAME)
    rank_of_base: int = _static(2)

    def delta(self) -> jax.Array:
        """``s a b``, formed: the shape of the base, float32."""
        a, b = (x.astype(jnp.float32) for x in (self.a, self.b))
        return jnp.tensordot(a, b, 1) * self.scale

    def materialize(self) -> jax.Array:
        """``W + s a b`` in the dtype of W; rounded once."""
        base = weights.materialize(self.base)
        return (base.astype(jnp.float32) + self.delta()).astype(base.dtype)

    def linear(self, x: jax.Array, bias: Any, key: jax.Array | None) -> jax.Array:
        """``x W + bias + s (dropout(x) a) b``."""
        inner, own = split(key, 2)
        y = weights.linear(x, self.base, bias, inner)
        return y + low_rank(dropout(x, self.rate, own), self.a, self.b, self.scale)

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Rows ``W[i] + s a[i] b``."""
        low = weights.take(self.a, ids, dtype) * self.scale.astype(dtype)
        return weights.take(self.base, ids, dtype) + weights.linear(low, self.b)

    def transpose(self) -> Weight:
        """``W^T + s b^T a^T``: a tied head reads the adapted embedding."""
        turned = weights.transpose(self.base)
        return dataclasses.replace(self, base=turned, a=self.b.T, b=self.a.T)

    def conv(self, x: jax.Array, bias: Any, key: jax.Array | None, how: Window) -> jax.Array:
        """``x * W + bias + s (dropout(x) * a) b``: ``a`` moves as W does, ``b`` acts on each position."""
        inner, own = split(key, 2)
        y = weights.conv(x, self.base, bias, inner, how)
        return y + self._low_conv(dropout(x, self.rate, own), how)

    def _low_conv(self, x: jax.Array, how: Window) -> jax.Array:
        return weights.linear(weights.conv(x, self.a, how=how) * self.scale.astype(x.dtype), self.b)

    def specs(self, axes: Sequence[Any]) -> Mapping[str, P]:
        """``a`` is split as W's inputs are, ``b`` as its outputs."""
        return {"a": P(*axes[:-1], None), "b": P(None, axes[-1]), "scale": P()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """``m V / |V|`` with ``V = W + s a b``, normed over inputs, the norm constant (Liu et al. 2024, arXiv:2402.09353).

    ``y = g (x W + s x a b) + bias`` with ``g = m / |V|``; where dropout acts, the base's share of what is added to
    ``x W`` sees the dropped input as well.

    Attributes:
      magnitude: m (out,), at the start ``|W|``.
    """

    trainable: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")

    magnitude: Any = None

    def gain(self) -> jax.Array:
        """``m / |V|`` by output, 0 where V is; the norm is taken without forming V, without gradient (section 4.3)."""
        norm = column_norm(self.base, self.a, self.b, self.scale)
        some = norm > 0
        # Both: a quotient that `where` does not choose would still make the gradient 0 / 0.
        return jnp.where(some, self.magnitude.astype(jnp.float32) / jnp.where(some, norm, 1.0), 0.0)

    def materialize(self) -> jax.Array:
        """``g (W + s a b)`` in the dtype of W."""
        base = weights.materialize(self.base)
        v = base.astype(jnp.float32) + self.delta()
        return (v * row(self.gain(), v)).astype(base.dtype)

    def linear(self, x: jax.Array, bias: Any, key: jax.Array | None) -> jax.Array:
        """``g (x W + s x a b) + bias``."""
        inner, own = split(key, 2)
        return self._scaled(
            x, bias, own, lambda x: weights.linear(x, self.base, None, inner),
            lambda x: low_rank(x, self.a, self.b, self.scale),
        )  # fmt: skip

    def conv(self, x: jax.Array, bias: Any, key: jax.Array | None, how: Window) -> jax.Array:
        """``g (x * W + s (x * a) b) + bias``."""
        inner, own = split(key, 2)
        return self._scaled(
            x, bias, own, lambda x: weights.conv(x, self.base, None, inner, how),
            lambda x: self._low_conv(x, how),
        )  # fmt: skip

    def _scaled(self, x: jax.Array, bias: Any, key: jax.Array | None, base: Any, low: Any) -> jax.Array:
        y = base(x)
        g = row(self.gain(), y)
        if key is None or self.rate == 0.0:
            y = g * (y + low(x))
        else:
            dropped = dropout(x, self.rate, key)
            y = y + (g - 1) * base(dropped) + g * low(dropped)
        bias = self.merged_bias(bias)
        return y if bias is None else y + row(bias, y)

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Not defined: the norm over inputs of an embedding is one over the vocabulary."""
        raise TypeError("DoRA is not defined on embeddings")

    def transpose(self) -> Weight:
        """Not defined, as `take`."""
        raise TypeError("DoRA is not defined on embeddings")

    def specs(self, axes: Sequence[Any]) -> Mapping[str, P]:
        """As LoRA's; the magnitude as W's outputs."""
        return {**super().specs(axes), "magnitude": P(axes[-1])}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IA3(Adapter):
    """``(x W + bias) g`` or ``(x g) W + bias``: learned gains, 1 at the start (Liu et al. 2022, arXiv:2205.05638).

    Attributes:
      gain: g, (out,), or (in,) where ``on`` is ``"input"``.
      on: ``"output"`` (keys and values) or ``"input"`` (the second linear of an MLP).
    """

    trainable: ClassVar[tuple[str, ...]] = ("gain",)

    base: Any
    gain: Any
    on: str = _static("output")
    name: str = _static(NAME)
    rank_of_base: int = _static(2)

    def linear(self, x: jax.Array, bias: Any, key: jax.Array | None) -> jax.Array:
        """The gains act after the bias, or before the matrix."""
        if self.on == "input":
            return weights.linear(x * row(self.gain, x), self.base, bias, key)
        y = weights.linear(x, self.base, bias, key)
        return y * row(self.gain, y)

    def conv(self, x: jax.Array, bias: Any, key: jax.Array | None, how: Window) -> jax.Array:
        """As `linear`, by channels."""
        if self.on == "input":
            return weights.conv(x * row(self.gain, x), self.base, bias, key, how)
        y = weights.conv(x, self.base, bias, key, how)
        return y * row(self.gain, y)

    def materialize(self) -> jax.Array:
        """W with its outputs, or inputs, scaled; the bias of an output gain is `merged_bias`'s."""
        base = weights.materialize(self.base)
        gain = self.gain[..., None] if self.on == "input" else self.gain
        return (base.astype(jnp.float32) * gain.astype(jnp.float32).reshape(_trailing(gain, base))).astype(base.dtype)

    def merged_bias(self, bias: Any) -> Any:
        """Gains on the output scale the bias too."""
        bias = super().merged_bias(bias)
        return bias if bias is None or self.on == "input" else (bias * self.gain.astype(bias.dtype))

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Not defined."""
        raise TypeError("(IA)3 is not defined on embeddings")

    transpose = take  # type: ignore[assignment]

    def specs(self, axes: Sequence[Any]) -> Mapping[str, P]:
        """The gains are split as what they scale is."""
        return {"gain": P(axes[-2] if self.on == "input" else axes[-1])}


def _trailing(x: Any, like: Any) -> tuple[int, ...]:
    return (1,) * (like.ndim - x.ndim) + tuple(x.shape)


def low_rank(x: jax.Array, a: Any, b: Any, scale: Any) -> jax.Array:
    """``(s x a) b``; where ``a`` is (B, in, r) row i of the batch has adapters of its own, and ``s`` is (B,).

    The scale acts where there are r numbers a token: on the product it would cost a pass over the layer's output, and
    another one over its gradient.
    """
    if a.ndim == 2:
        return weights.linear(weights.linear(x, a) * scale.astype(x.dtype), b)
    if a.shape[0] != x.shape[0]:
        raise ValueError(f"a batch of {x.shape[0]} rows has adapters selected for {a.shape[0]}")
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    low = jnp.einsum("bti,bir->btr", flat, a.astype(x.dtype)) * scale.astype(x.dtype)[:, None, None]
    y = jnp.einsum("btr,bro->bto", low, b.astype(x.dtype))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def column_norm(base: Any, a: Any, b: Any, scale: Any) -> jax.Array:
    """``|W + s a b|`` over inputs, float32, (out,), without a gradient and without forming the sum.

    ``|W|^2 + 2 s diag(b^T (a^T W)) + s^2 diag(b^T (a^T a) b)``.
    """
    w, a, b, s = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (weights.materialize(base), a, b, scale))
    w, a = w.reshape(-1, w.shape[-1]), a.reshape(-1, a.shape[-1])
    cross = jnp.sum(b * (a.T @ w), axis=0)
    low = jnp.sum(b * ((a.T @ a) @ b), axis=0)
    squares = jnp.sum(w * w, axis=0) + 2 * s * cross + s * s * low
    return jnp.sqrt(jnp.maximum(squares, 0.0))  # where the two cancel, rounding goes below


def row(value: Any, like: jax.Array) -> jax.Array:
    """A vector along the last axis of ``like``, in its dtype."""
    return weights.materialize(value).astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))
