"""Quantised weights as leaf types: packed at rest, dequantised inside the product, never kept otherwise.

The backward pass of a product needs the weight again. It is handed the packed parts and unpacks them anew
(``jax.checkpoint``), so what a scan saves for it is the packed leaf.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxtransfer.tree import fingerprint, weights
from jaxtransfer.tree.paths import flatten, unflatten
from jaxtransfer.tree.rules import Rules, match_paths
from jaxtransfer.tree.weights import Weight, Window, is_weight
from jaxtransfer.types import Source

BLOCK = 64
"""Inputs that share a scale in NF4."""
GROUP = 256
"""Scales that share a second scale (double quantisation)."""

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 4-bit NormalFloat's levels (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""


class QuantizeError(ValueError):
    """A leaf that cannot be quantised as asked."""


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
        scale = self.scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        run = jax.checkpoint(lambda q, x: weights.linear(x, q.astype(x.dtype)), prevent_cse=False)
        y = run(self.q, x) * scale
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

    ``W[i, o] = level[code[i, o]] * s[i // 64, o]``, and the scales themselves are 8-bit:
    ``s = (c / 127) S[group] + mean``.

    Blocks lie along the inputs and groups along the outputs, so a split of either axis never cuts a block as long as
    the parts are whole blocks and groups.

    Attributes:
      codes: uint8 (in / 2, out): input 2 i in the low half of a byte, 2 i + 1 in the high half.
      scales: int8 (in / 64, out): c.
      group: float32 (in / 64, out / g): S.
      mean: float32 scalar.
      stands_for: the name of the dtype that the weight had.
    """

    whole_blocks: ClassVar[tuple[str, ...]] = ("codes", "scales")

    codes: Any
    scales: Any
    group: Any
    mean: Any
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
        levels = jnp.asarray(NF4_LEVELS, jnp.float32)
        half, out = self.codes.shape
        low, high = self.codes & 15, self.codes >> 4
        codes = jnp.stack([low, high], axis=1).reshape(2 * half, out)
        scales = self._scales()
        values = levels[codes].reshape(scales.shape[0], -1, out) * scales[:, None, :]
        return values.reshape(2 * half, out).astype(dtype)

    def _scales(self) -> jax.Array:
        blocks, out = self.scales.shape
        groups = self.group.shape[-1]
        wide = self.scales.astype(jnp.float32).reshape(blocks, groups, out // groups)
        return (wide * (self.group[..., None] / 127.0)).reshape(blocks, out) + self.mean

    def specs(self, axes: Sequence[Any]) -> Mapping[str, P]:
        """Every part as the weight: blocks follow the inputs, groups the outputs."""
        return {"codes": P(*axes), "scales": P(*axes), "group": P(*axes), "mean": P()}


def int8(weight: jax.Array) -> Int8:
    """A float weight as `Int8`; a column of zeros has scale 1."""
    wide = weight.astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=tuple(range(wide.ndim - 1)))
    scale = jnp.where(top > 0, top / 127.0, 1.0)
    q = jnp.round(wide / scale.reshape((1,) * (wide.ndim - 1) + (-1,))).astype(jnp.int8)
    return Int8(q, scale, str(weight.dtype))


def nf4(weight: jax.Array) -> NF4:
    """A float matrix (in, out) as `NF4`; ``in`` must be a multiple of 64."""
    inputs, out = weight.shape
    groups = out // math.gcd(out, GROUP)
    blocks = weight.astype(jnp.float32).reshape(inputs // BLOCK, BLOCK, out)
    top = jnp.max(jnp.abs(blocks), axis=1)
    mean = jnp.mean(top)
    centred = (top - mean).reshape(-1, groups, out // groups)
    group = jnp.max(jnp.abs(centred), axis=-1)
    safe = jnp.where(group > 0, group, 1.0)
    scales = jnp.round(centred / safe[..., None] * 127.0).astype(jnp.int8).reshape(-1, out)
    packed = NF4(jnp.zeros((inputs // 2, out), jnp.uint8), scales, group, mean, str(weight.dtype))
    used = packed._scales()
    edges = jnp.asarray(np.convolve(NF4_LEVELS, [0.5, 0.5], "valid"), jnp.float32)
    # Codes are chosen by the scales that will be used, those rounded to eight bits.
    ratio = (blocks / jnp.where(used > 0, used, 1.0)[:, None, :]).reshape(inputs, out)
    codes = jnp.searchsorted(edges, ratio).astype(jnp.uint8).reshape(inputs // 2, 2, out)
    return dataclasses.replace(packed, codes=codes[:, 0] | (codes[:, 1] << 4))


def _nf4_checked(path: str, weight: jax.Array) -> NF4:
    if weight.ndim != 2 or weight.shape[0] % BLOCK or path.endswith("/embedding"):
        raise QuantizeError(
            f"{path}: NF4 takes matrices (in, out) with a multiple of {BLOCK} inputs, got {tuple(weight.shape)}"
            f"{' of an embedding' if path.endswith('/embedding') else ''}; use int8, or leave it out of the rule"
        )
    return jax.jit(nf4)(weight)


def _int8_checked(path: str, weight: jax.Array) -> Int8:
    if weight.ndim < 2:
        raise QuantizeError(f"{path}: int8 takes kernels and embeddings, got shape {tuple(weight.shape)}")
    return jax.jit(int8)(weight)


METHODS: Mapping[str, Callable[[str, jax.Array], Quantized]] = {"int8": _int8_checked, "nf4": _nf4_checked}
"""Quantisations by name."""


def quantize(source: Source, rules: Rules) -> Source:
    """Quantises the leaves that rules choose, one after the other.

    Args:
      source: of plain parameters.
      rules: path -> ``"int8"``, ``"nf4"`` or None.

    Raises:
      RuleError: a rule matches nothing or never wins.
      QuantizeError: a leaf cannot take its method, is quantised already, or the method is unknown.
    """
    flat = flatten(source.params, is_leaf=is_weight)
    known = dict(source.lineage.fingerprints)
    chosen = {path: how for path, how in match_paths(rules, list(flat), default=None).items() if how is not None}
    for path, method in chosen.items():
        original = not is_weight(flat[path]) and fingerprint({path: flat[path]})[path] == known.get(path)
        flat[path] = quantized(path, flat[path], method)
        if original:  # what the source's own leaf is packed to, the source stands for
            known |= fingerprint({path: flat[path]})
    note = f"quantize({len(chosen)} leaves: {', '.join(sorted(set(chosen.values())))})"
    operations = (*source.lineage.operations, note)
    lineage = dataclasses.replace(source.lineage, operations=operations, fingerprints=known)
    return dataclasses.replace(source, params=unflatten(flat), lineage=lineage)


def quantized(path: str, weight: Any, method: str) -> Quantized:
    """One weight, quantised."""
    if method not in METHODS:
        raise QuantizeError(f"quantize: {method!r} is not one of {', '.join(METHODS)}")
    if is_weight(weight):
        raise QuantizeError(f"{path}: is a {type(weight).__name__} already; quantise before adapters are attached")
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise QuantizeError(f"{path}: is {weight.dtype}, which is no float to quantise")
    return METHODS[method](path, weight)
