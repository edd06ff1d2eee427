"""Quantised weights as leaf types: packed at rest, dequantised inside the product, never kept otherwise.

The backward pass of a product needs the weight again. It is handed the packed parts and unpacks them anew
(``jax.checkpoint``), so what a scan saves for it is the packed leaf.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtransfer.tree import weights
from jaxtransfer.tree.weights import Weight, Window

BLOCK = 64
"""Inputs that share a scale in NF4."""
GROUP = 64
"""Scales, of neighbouring outputs, that share a second scale (double quantisation)."""

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 4-bit NormalFloat's levels (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""
NF4_EDGES = tuple((low + high) / 2 for low, high in pairwise(NF4_LEVELS))
"""Midway between two levels the nearest changes."""


class Quantized(Weight):
    """The base of quantised weights."""

    def _through(self, fn: Callable[..., jax.Array], *args: Any) -> jax.Array:
        """``fn(weight, *args)`` with the packed parts, not the unpacked weight, saved for the backward pass."""
        run = jax.checkpoint(lambda packed, args: fn(packed.unpack(args[0].dtype), *args), prevent_cse=False)
        return run(self, args)

    def unpack(self, dtype: Any) -> jax.Array:
        """The weight in ``dtype``."""
        raise TypeError(f"{type(self).__name__} does not define unpack")

    def materialize(self) -> jax.Array:
        """The weight in its stored-as dtype."""
        return self.unpack(self.dtype)

    def linear(self, x: jax.Array, bias: Any, key: jax.Array | None) -> jax.Array:
        """``x W + bias``, W unpacked inside."""
        return self._through(lambda w, x, bias: weights.linear(x, w, bias), x, bias)

    def conv(self, x: jax.Array, bias: Any, key: jax.Array | None, how: Window) -> jax.Array:
        """``x * W + bias``, W unpacked inside."""
        return self._through(lambda w, x, bias: weights.conv(x, w, bias, None, how), x, bias)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Quantized):
    """``W = q s``, ``s`` by output channel: absolute-maximum, round to nearest, q in -127..127.

    Attributes:
      q: int8, the weight's shape.
      scale: float32, (out,).
      stands_for: the name of the dtype that the weight had.
    """

    whole_blocks: ClassVar[tuple[str, ...]] = ("q",)

    q: Any
    scale: Any
    stands_for: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return tuple(self.q.shape)

    @property
    def dtype(self) -> Any:
        """The dtype that the weight had."""
        return jnp.dtype(self.stands_for)

    def unpack(self, dtype: Any) -> jax.Array:
        """``q s``."""
        return self.q.astype(dtype) * self.scale.astype(dtype).reshape((1,) * (self.q.ndim - 1) + (-1,))

    def linear(self, x: jax.Array, bias: Any, key: jax.Array | None) -> jax.Array:
        """``(x q) s + bias``: the scale of an output acts on the product."""
        # Before it is scaled the product is up to 127 / max |W| times what it will be, which float16 may not hold.
        wide = jnp.float32 if x.dtype == jnp.float16 else x.dtype
        scale = self.scale.astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
        run = jax.checkpoint(lambda q, x: _product(x, q.astype(x.dtype), wide), prevent_cse=False)
        y = (run(self.q, x) * scale).astype(x.dtype)
        return y if bias is None else y + bias.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Rows ``q[i] s``."""
        rows = jnp.take(self.q, ids, axis=0, mode="clip").astype(dtype)
        return rows * self.scale.astype(dtype).reshape((1,) * (rows.ndim - 1) + (-1,))

    def specs(self, axes: Sequence[Any]) -> Mapping[str, P]:
        """``q`` as the weight, the scale as its outputs."""
        return {"q": P(*axes), "scale": P(axes[-1])}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(Quantized):
    """4-bit NormalFloat with double quantisation, two codes a byte: 0.52 byte a parameter (arXiv:2305.14314).

    ``W[i, o] = level[code[i, o]] s[i // 64, o]``, and the scales are 8-bit themselves, over the range of their group:
    ``s = centre + spread c / 127``.

    Blocks lie along the inputs and groups along the outputs. Nothing is known of a weight beyond its groups (the paper
    subtracts one mean of all scales, here it is the middle of each group), so a shard of whole blocks and groups is
    packed by itself to what it is packed to within the whole.

    Attributes:
      codes: uint8 (in / 2, out): of a block's 64 inputs, i in the low half of a byte and i + 32 in the high half.
      scales: int8 (in / 64, out): c.
      spread: float32 (in / 64, out / g): half of a group's range.
      centre: float32 (in / 64, out / g): the middle of it.
      stands_for: the name of the dtype that the weight had.
    """

    whole_blocks: ClassVar[tuple[str, ...]] = ("codes", "scales", "spread", "centre")

    codes: Any
    scales: Any
    spread: Any
    centre: Any
    stands_for: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        *lead, half, out = self.codes.shape
        return (*lead, 2 * half, out)

    @property
    def dtype(self) -> Any:
        """The dtype that the weight had."""
        return jnp.dtype(self.stands_for)

    def unpack(self, dtype: Any) -> jax.Array:
        """``level[code] s``, (in, out)."""
        half, out = self.codes.shape
        bytes_ = self.codes.reshape(-1, BLOCK // 2, out)
        codes = jnp.concatenate([bytes_ & 15, bytes_ >> 4], axis=1)
        return _scaled_level(codes, self.block_scales()[:, None, :]).reshape(2 * half, out).astype(dtype)

    def block_scales(self) -> jax.Array:
        """s: (in / 64, out), float32."""
        return _second(self.scales, self.spread, self.centre)

    def specs(self, axes: Sequence[Any]) -> Mapping[str, P]:
        """Every part as the weight: blocks follow the inputs, groups the outputs."""
        return dict.fromkeys(self.whole_blocks, P(*axes))


def _product(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    """``x w``, accumulated in ``dtype`` and left so."""
    how = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, how, preferred_element_type=None if dtype == x.dtype else dtype)


def _scaled_level(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """``NF4_LEVELS[codes] s`` as fifteen selects by bits, which fuse into the product; a gather would not.

    The levels are scaled before one is selected: sixteen constants would be broadcast to the weight's size outside of a
    scan over layers, and held there.
    """
    values = [jnp.float32(level) * scales for level in NF4_LEVELS]
    for bit in (1, 2, 4, 8):
        on = (codes & bit) != 0
        values = [jnp.where(on, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _second(scales: jax.Array, spread: jax.Array, centre: jax.Array) -> jax.Array:
    """``centre + spread c / 127``, the scales of the blocks."""
    blocks, out = scales.shape
    wide = scales.astype(jnp.float32).reshape(blocks, spread.shape[-1], -1)
    return (wide * (spread / 127.0)[..., None] + centre[..., None]).reshape(blocks, out)


def int8(weight: jax.Array, stands_for: str | None = None) -> Int8:
    """A float weight as `Int8`; a column of zeros has scale 1."""
    top = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=tuple(range(weight.ndim - 1)))
    weight, top = jax.lax.optimization_barrier((weight, top))  # or its float32 copy is kept for its second use
    scale = jnp.where(top > 0, top / 127.0, 1.0)
    q = jnp.round(weight.astype(jnp.float32) / scale.reshape((1,) * (weight.ndim - 1) + (-1,))).astype(jnp.int8)
    return Int8(q, scale, stands_for or str(weight.dtype))


def nf4(weight: jax.Array, stands_for: str | None = None) -> NF4:
    """A float matrix (in, out) as `NF4`; ``in`` must be a multiple of 64."""
    inputs, out = weight.shape
    blocks = weight.reshape(inputs // BLOCK, BLOCK, out)
    top = jnp.max(jnp.abs(blocks.astype(jnp.float32)), axis=1)
    blocks, top = jax.lax.optimization_barrier((blocks, top))  # as in `int8`
    top = top.reshape(inputs // BLOCK, -1, math.gcd(out, GROUP))
    low, high = jnp.min(top, axis=-1), jnp.max(top, axis=-1)
    spread, centre = (high - low) / 2, (high + low) / 2
    c = (top - centre[..., None]) / jnp.where(spread > 0, spread, 1.0)[..., None]
    scales = jnp.round(c * 127.0).astype(jnp.int8).reshape(-1, out)
    # Codes are chosen by the scales that will be used, those rounded to eight bits.
    used = _second(scales, spread, centre)[:, None, :]
    ratio = blocks.astype(jnp.float32) / jnp.where(used > 0, used, 1.0)
    codes = functools.reduce(jnp.add, [(ratio > edge).astype(jnp.uint8) for edge in NF4_EDGES])
    packed = codes[:, : BLOCK // 2] | (codes[:, BLOCK // 2 :] << 4)
    return NF4(packed.reshape(inputs // 2, out), scales, spread, centre, stands_for or str(weight.dtype))
