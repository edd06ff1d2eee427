"""Layers: small NNX modules, one-to-one with Hugging Face's modules, that touch weights only by the weight protocol."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.random import threefry2x32_p

from jaxtransfer.tree import weights
from jaxtransfer.types import Carry

Pointwise = Callable[..., jax.Array]


def lean(f: Pointwise) -> Pointwise:
    """A cheap function of which the backward pass keeps what goes in alone, and computes the rest once more.

    A scan writes down what is kept, of every layer: of a GELU four times its input, and an error function costs less
    than that.
    """
    return jax.checkpoint(f, prevent_cse=False)


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
    """``exp(x_i) / sum_j exp(x_j)`` over the last axis. The backward pass keeps this alone; of jax's own, two such."""
    return jax.nn.softmax(x, axis=-1)


@softmax.defjvp
def _softmax_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y = softmax(x)
    return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))


ACTIVATIONS: dict[str, Pointwise] = {
    "gelu": lean(lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu_new": lean(lambda x: jax.nn.gelu(x, approximate=True)),
    "gelu_pytorch_tanh": lean(lambda x: jax.nn.gelu(x, approximate=True)),
    "relu": jax.nn.relu,
    "silu": lean(jax.nn.silu),
    "swish": lean(jax.nn.silu),
    "tanh": jnp.tanh,
}
"""Activations by Hugging Face's names; ``gelu`` is the exact one."""


def gated(activation: str, gate: jax.Array, x: jax.Array) -> jax.Array:
    """``activation(gate) * x`` (Shazeer 2020, arXiv:2002.05202)."""
    return lean(lambda gate, x: ACTIVATIONS[activation](gate) * x)(gate, x)


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
        def normalised(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
            wide = x.astype(at_least_float32(x.dtype))
            mean = wide.mean(-1, keepdims=True)
            centred = wide - mean
            var = jnp.mean(centred * centred, axis=-1, keepdims=True)
            y = centred * jax.lax.rsqrt(var + self.eps)
            return (y * _row(scale, y) + _row(bias, y)).astype(x.dtype)

        return lean(normalised)(x, value_of(self.scale), value_of(self.bias))


def at_least_float32(dtype: Any) -> Any:
    """The dtype, or float32 where it is narrower (``jnp.promote_types`` raises under strict promotion)."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def value_of(variable: Any) -> jax.Array:
    """The array of a parameter that is no product's, whatever leaf stands there."""
    return weights.materialize(variable.get_value())


def _row(value: jax.Array, like: jax.Array) -> jax.Array:
    return value.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def pixels(carry: Carry, channels: int) -> jax.Array:
    """The images of a batch, checked: ``pixel_values`` (B, H, W, channels), normalised floats.

    Raises:
      ValueError: they are missing, or of another rank, dtype or number of channels.
    """
    if "pixel_values" not in carry:
        raise ValueError(f"pixel_values: the batch has none, only {', '.join(carry)}")
    x = carry["pixel_values"]
    if x.ndim != 4 or x.shape[-1] != channels:
        first = ": the channels come last" if x.ndim == 4 and x.shape[1] == channels else ""
        raise ValueError(
            f"pixel_values: expected (rows, height, width, {channels}), as num_channels={channels} says, found "
            f"{tuple(x.shape)}{first}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"pixel_values: expected normalised floats, found {x.dtype}")
    return x


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each entry with probability ``rate`` and scales the rest by ``1 / (1 - rate)``; identity without a key."""
    return dropped(x, *survivors(x.shape, rate, key))


def survivors(shape: tuple[int, ...], rate: float, key: jax.Array | None) -> tuple[jax.Array | None, float]:
    """Where `dropout` leaves the entries of an array, None for everywhere, and the share of these."""
    if key is None or rate == 0.0:
        return None, 1.0
    kept = min(max(round((1.0 - rate) * 2**16), 1), 2**16)  # of 2^16: the rate to the nearest that 16 bits can tell
    return _draw(key, shape) < kept, kept / 2**16


def dropped(x: jax.Array, where: jax.Array | None, share: float) -> jax.Array:
    """What `dropout` makes of an array whose `survivors` are drawn."""
    return x if where is None else jnp.where(where, x / share, jnp.zeros_like(x))


def _draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform integers below 2^16, each by its place alone, so that they are the same on every mesh.

    A block of threefry is 64 random bits. `jax.random` makes one number of them, here they make four: drawing is most
    of what dropout costs.
    """
    if jax.random.key_impl(key) != "threefry2x32":
        return jax.random.bits(key, shape, "uint16").astype(jnp.uint32)
    blocks, data = (*shape[:-1], -(-shape[-1] // 4)), jax.random.key_data(key)
    axes = [jax.lax.broadcasted_iota(jnp.uint32, blocks, axis) for axis in range(len(blocks))]
    high, low = (jnp.zeros(blocks, jnp.uint32) for _ in range(2))
    for axis, place in enumerate(axes):  # 32 bits for the last two axes, 32 for those before
        if axis < len(blocks) - 2:
            high = high * blocks[axis] + place
        else:
            low = low * blocks[axis] + place
    words = threefry2x32_p.bind(*(jnp.broadcast_to(word, blocks) for word in data), high, low)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return jnp.concatenate(halves, axis=-1)[..., : shape[-1]]


def split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """``jax.random.split`` that passes None through."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, computed in at least float32 (arXiv:1910.07467).

    ``offset``: the stored scale is that much less than the one applied (Gemma stores ``scale - 1``), and starts at
    ``1 - offset``.
    """

    def __init__(self, width: int, *, eps: float, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(width, 1.0 - offset))
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        def normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
            wide = x.astype(at_least_float32(x.dtype))
            y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
            return (y * (_row(scale, y) + self.offset)).astype(x.dtype)

        return lean(normalised)(x, value_of(self.scale))


class Conv(nnx.Module):
    """A convolution of (B, H, W, in) with square zero padding and no bias; kernel (k, k, in, out).

    Drawn from He's normal distribution over the fan out (He et al. 2015, arXiv:1502.01852): N(0, 2 / (k^2 out)).
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int, padding: int, rngs: nnx.Rngs):
        std = (2.0 / (size * size * outputs)) ** 0.5
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (size, size, inputs, outputs)) * std)
        self.how = weights.Window((stride, stride), ((padding, padding), (padding, padding)))

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return weights.conv(x, self.kernel.get_value(), None, key, self.how)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last, with running statistics (arXiv:1502.03167).

    ``y = (x - mean) / sqrt(var + eps) * scale + bias``, computed in at least float32. In evaluation, and wherever its
    statistics are :class:`~jaxtransfer.tree.weights.Fixed`, mean and variance are the running ones. In training they
    are those of the batch (of the whole of a sharded one), and the running ones move as torch moves them:
    ``running + momentum * (batch - running)``, the variance with Bessel's correction; ``count`` counts the batches.

    Args:
      x: (B, ..., width).
      key: any key in training, None in evaluation.
      weight: (B,) of the examples; what weighs nothing fills up the last batch of an epoch, and does not count.

    Returns:
      The output, and the new statistics by name: empty where they do not move.
    """

    eps, momentum = 1e-5, 0.1

    def __init__(self, width: int):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(
        self, x: jax.Array, key: jax.Array | None, weight: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        wide = x.astype(at_least_float32(x.dtype))
        if key is None or isinstance(self.mean.get_value(), weights.Fixed):
            centre, spread = (_row(value_of(running), wide) for running in (self.mean, self.var))
            return self._affine(wide - centre, spread).astype(x.dtype), {}
        if x.size // x.shape[-1] < 2:
            raise ValueError(f"batch statistics need more than one value a channel; the input is {x.shape}")
        rows = jnp.ones(len(x)) if weight is None else weight != 0
        live = rows.astype(wide.dtype).reshape(-1, *[1] * (x.ndim - 1))
        n = live.sum() * (x[0].size // x.shape[-1])

        def mean(values: jax.Array) -> jax.Array:
            return jnp.sum(values * live, range(x.ndim - 1), keepdims=True) / jnp.maximum(n, 1)

        centre = mean(wide)
        centred = wide - centre
        var = mean(centred * centred)
        new = {
            "mean": self._moved(self.mean, centre, n),
            "var": self._moved(self.var, var * (n / jnp.maximum(n - 1, 1)), n),
            "count": self.count.get_value() + (n > 0).astype(jnp.int32),
        }
        return self._affine(centred, var).astype(x.dtype), new

    def _affine(self, centred: jax.Array, var: jax.Array) -> jax.Array:
        scale = jax.lax.rsqrt(var + self.eps) * _row(value_of(self.scale), centred)
        return centred * scale + _row(value_of(self.bias), centred)

    def _moved(self, running: Any, batch: jax.Array, n: jax.Array) -> jax.Array:
        old = running.get_value()
        batch = jax.lax.stop_gradient(batch).reshape(-1).astype(old.dtype)
        return jnp.where(n > 0, old + self.momentum * (batch - old), old)
