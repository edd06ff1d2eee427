"""The ResNets of He et al. 2015 (arXiv:1512.03385, section 4.2) for 32x32 images: 20, 32, 44, 56, 110 layers deep.

Their shortcuts have no parameters ("option A"): every second row and column, and new channels of zeros. transformers
has no such model, so ``model_type: cifar-resnet`` and the architectures' names are ours; the tensors' names are those
of https://github.com/akamaster/pytorch_resnet_cifar10, whose images are normalised by ImageNet's mean and deviation.
"""

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtransfer.models import resnet
from jaxtransfer.models.bert import export_architecture
from jaxtransfer.models.layers import pixels
from jaxtransfer.models.names import NameTable
from jaxtransfer.models.registry import ConfigFieldError, Family, read_fields, with_head
from jaxtransfer.models.stages import stages_of
from jaxtransfer.types import Carry, Head, Model

ARCHITECTURES: Mapping[str, str | None] = {
    "CifarResNetModel": None,
    "CifarResNetForImageClassification": "image-classification",
}


@dataclasses.dataclass(frozen=True)
class CifarResNetConfig:
    """What the family reads of its configuration: ``depth = 2 * lists * blocks + 2`` layers with weights."""

    depth: int
    num_channels: int = 3
    hidden_sizes: tuple[int, ...] = (16, 32, 64)

    def __post_init__(self):
        sizes = self.hidden_sizes
        if not sizes or min(sizes) < 1 or any((b - a) % 2 or b < a for a, b in pairwise(sizes)):
            raise ConfigFieldError(
                f"config field hidden_sizes={sizes}: each must be positive and exceed the one before by an even "
                "number, or a shortcut cannot pad it on both sides"
            )
        if self.depth < 2 + 2 * len(sizes) or (self.depth - 2) % (2 * len(sizes)):
            raise ConfigFieldError(
                f"config field depth={self.depth}: expected 2 + {2 * len(sizes)} n for {len(sizes)} hidden_sizes"
            )
        if self.num_channels < 1:
            raise ConfigFieldError(f"config field num_channels={self.num_channels} must be positive")


class Embed(resnet.ConvNorm):
    """The stem, a 3x3: (B, H, W, C) -> (B, H, W, width)."""

    def __init__(self, c: CifarResNetConfig, rngs: nnx.Rngs):
        super().__init__(c.num_channels, c.hidden_sizes[0], 3, 1, rngs)
        self.channels = c.num_channels

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        y, new = super().__call__(pixels(carry, self.channels), carry, key)
        return {"hidden": jax.nn.relu(y), **resnet.moved(new)}


def shortcut(x: jax.Array, stride: int, width: int) -> jax.Array:
    """Every ``stride``-th row and column, between zeros: (B, H, W, C) -> (B, H / stride, W / stride, width)."""
    more = (width - x.shape[-1]) // 2
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (more, more)))


def block(inputs: int, width: int, stride: int, rngs: nnx.Rngs) -> resnet.Block:
    """A layer of two 3x3 convolutions."""
    plain = partial(shortcut, stride=stride, width=width)
    return resnet.Block((3, 3), (inputs, width, width), (stride, 1), "relu", rngs, plain)


def assemble(c: CifarResNetConfig, head: Head | None) -> Model:
    """``embed``, ``stage0/0`` ..., ``pooler``, ``head`` where there is one; outputs as those of ``resnet``."""
    sizes = c.hidden_sizes
    depths = [(c.depth - 2) // (2 * len(sizes))] * len(sizes)
    embed = stages_of(["embed"], partial(Embed, c), Embed.__call__)
    stages = resnet.trunk_stages(embed, block, sizes[0], sizes, depths, 1)
    stages += resnet.head_stages("cifar-resnet", sizes[-1], head)
    return Model("cifar-resnet", c, tuple(stages), resnet.OUTPUTS, head, resnet.STATISTICS)


def build(
    raw: Mapping[str, Any], head: Head | None, *, pooler: bool | None = None, ignore: Collection[str] = ()
) -> Model:
    """The model from its raw configuration; ``pooler`` is not read, see `resnet.build`."""
    return assemble(read_fields(raw, CifarResNetConfig, {}, ignore), head)


def rehead(model: Model, head: Head | None) -> Model:
    """The same trunk with another head, or bare."""
    return assemble(model.config, head)


def names(model: Model) -> NameTable:
    """The repository's names; its files have no ``num_batches_tracked``."""
    return resnet.torch_names(len(model.config.hidden_sizes), 2, "linear")


def export_config(model: Model, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an exported model."""
    out = with_head(raw, model.head, export_architecture(model.head, ARCHITECTURES))
    return {**out, "model_type": "cifar-resnet", "num_channels": model.config.num_channels}


FAMILIES = {"cifar-resnet": Family("cifar-resnet", ARCHITECTURES, build, rehead, names, export_config, (), hub=False)}
