"""Four small convolutions: the embedding of small images that few-shot learning is measured with."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtransfer.models.foreign import from_nnx
from jaxtransfer.types import Source


def conv4(key: jax.Array, *, channels: int = 1, width: int = 64, blocks: int = 4) -> Source:
    """A source of fresh parameters: ``blocks`` times a 3x3 convolution, batch normalisation, ReLU and 2x2 max pooling.

    The embedding of Vinyals et al. 2016 (arXiv:1606.04080, section 4.1) and Snell et al. 2017: 28x28 images become 64
    numbers. It reads ``inputs`` (B, H, W, channels) and gives ``last_hidden_state`` (B, d), as a user's own model.

    Args:
      key: draws the parameters.
      channels: of the images.
      width: of the convolutions.
      blocks: by each of which height and width are halved.

    Example:
      >>> source = conv4(jax.random.key(0), width=8)
      >>> source.model.stages[0].fn(source.params["body"], {"inputs": jnp.ones((2, 28, 28, 1))}, None)["hidden"].shape
      (2, 8)
    """

    def make(key: jax.Array) -> nnx.Module:
        return _Conv4(channels, width, blocks, nnx.Rngs(key))

    return from_nnx(make(key), init=make)


class _Conv4(nnx.Module):
    def __init__(self, channels: int, width: int, blocks: int, rngs: nnx.Rngs):
        inputs = [channels, *[width] * (blocks - 1)]
        self.convs = nnx.List([nnx.Conv(n, width, (3, 3), rngs=rngs) for n in inputs])
        self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for _ in inputs])

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(_halved(norm(conv(x))))
        return jnp.reshape(x, (len(x), -1))


def _halved(x: jax.Array) -> jax.Array:
    """2x2 max pooling, without an odd last row or column.

    By reshaping: on a CPU the gradient of XLA's windows takes half of a whole training step. Of two at a time: that of
    `jnp.max` divides by how many equal the maximum, none where a compiler computes them twice with other roundings.
    """
    rows, height, width, channels = x.shape
    even = x[:, : height // 2 * 2, : width // 2 * 2]
    square = jnp.reshape(even, (rows, height // 2, 2, width // 2, 2, channels))
    column = jnp.maximum(square[:, :, 0], square[:, :, 1])
    return jnp.maximum(column[:, :, :, 0], column[:, :, :, 1])
