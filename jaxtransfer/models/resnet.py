"""ResNet (He et al. 2015, arXiv:1512.03385); ``downsample_in_bottleneck`` says which convolution has the stride.

Checkpoints of transformers, timm and torchvision are read. Those of the last two may be pickles, which are not; this
turns one into safetensors, for a folder with a ``config.json`` that describes it::

    python -c "import sys, torch, safetensors.torch
    safetensors.torch.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" resnet50.pth model.safetensors
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtransfer.models.api import STATS
from jaxtransfer.models.bert import export_architecture
from jaxtransfer.models.layers import ACTIVATIONS, BatchNorm, Conv, Linear, pixels, split
from jaxtransfer.models.names import Drop, Entry, NameTable, conv, linear, norm
from jaxtransfer.models.registry import ConfigFieldError, Family, read_fields, with_head
from jaxtransfer.models.stages import stages_of
from jaxtransfer.types import Carry, Head, Model, Stage

OUTPUTS = {"hidden": "last_hidden_state", "pooler_output": "pooler_output", "logits": "logits"}
STATISTICS = (r".*/norm/(mean|var|count)",)
COUNTS = (r".*/norm/count",)  # written since torch 0.4.1, so published files lack them
ARCHITECTURES: Mapping[str, str | None] = {"ResNetModel": None, "ResNetForImageClassification": "image-classification"}
HARMLESS = "out_features out_indices stage_names".split()  # of transformers' backbones


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """What a ResNet reads of its configuration, by Hugging Face's names."""

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False

    def __post_init__(self):
        for name, choices in (("layer_type", ("basic", "bottleneck")), ("hidden_act", sorted(ACTIVATIONS))):
            if getattr(self, name) not in choices:
                raise ConfigFieldError(f"config field {name}: {getattr(self, name)!r} is not one of {choices}")
        if len(self.hidden_sizes) != len(self.depths) or not self.depths:
            raise ConfigFieldError(
                f"config field depths={self.depths}: one number for each of hidden_sizes={self.hidden_sizes}"
            )
        least = 4 if self.layer_type == "bottleneck" else 1
        if min(self.num_channels, self.embedding_size, *self.depths) < 1 or min(self.hidden_sizes) < least:
            raise ConfigFieldError(
                "config fields num_channels, embedding_size and depths must be positive, hidden_sizes at least "
                f"{least}; found {self}"
            )

    @property
    def layers(self) -> int:
        """The number of convolutions in a layer."""
        return 3 if self.layer_type == "bottleneck" else 2


def moved(stats: Mapping[str, Mapping[str, Any]]) -> Carry:
    """The entry of new statistics among what a stage writes; none where nothing moved."""
    new = {name: node for name, node in stats.items() if node}
    return {STATS: new} if new else {}


class ConvNorm(nnx.Module):
    """A convolution without bias that keeps the size but for its stride, then batch normalisation."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, size, stride=stride, padding=size // 2, rngs=rngs)
        self.norm = BatchNorm(outputs)

    def __call__(self, x: jax.Array, carry: Carry, key: jax.Array | None) -> tuple[jax.Array, Mapping[str, Any]]:
        y, new = self.norm(self.conv(x, key), key, carry.get("weight"))
        return y, {"norm": new} if new else {}


class Embed(ConvNorm):
    """The stem: a 7x7 of stride 2, then maxima over 3x3 of stride 2: (B, H, W, C) -> (B, H / 4, W / 4, width)."""

    def __init__(self, c: ResNetConfig, rngs: nnx.Rngs):
        super().__init__(c.num_channels, c.embedding_size, 7, 2, rngs)
        self.c = c

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        y, new = super().__call__(pixels(carry, self.c.num_channels), carry, key)
        y = ACTIVATIONS[self.c.hidden_act](y)
        return {"hidden": max_pool(y), **moved(new)}


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum over 3x3 with stride 2, padded by minus infinity: (B, H, W, C) -> (B, H / 2, W / 2, C)."""
    edge = (1, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), edge, edge, (0, 0)))


class Block(nnx.Module):
    """``act(F(x) + shortcut(x))``, F of two or three convolutions: (B, H, W, in) -> (B, H / stride, W / stride, out).

    Args:
      sizes: the sizes of F's kernels.
      widths: the channels before F and behind each of its convolutions.
      strides: of F's convolutions.
      act: behind the sum; between the convolutions it is ReLU whatever the configuration says, as in transformers.
      shortcut: ``shortcut(x)`` without parameters; None for a projection where the shape changes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        act: str,
        rngs: nnx.Rngs,
        shortcut: Callable[[jax.Array], jax.Array] | None = None,
    ):
        self.names = tuple(f"layer{i}" for i in range(len(sizes)))
        for i, name in enumerate(self.names):
            setattr(self, name, ConvNorm(widths[i], widths[i + 1], sizes[i], strides[i], rngs))
        stride = max(strides)
        changes = stride != 1 or widths[0] != widths[-1]
        project = changes and shortcut is None
        self.shortcut = ConvNorm(widths[0], widths[-1], 1, stride, rngs) if project else None
        self.act, self.plain = act, shortcut if changes else None

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        x, stats, keys = carry["hidden"], {}, split(key, len(self.names) + 1)
        y = x
        for i, name in enumerate(self.names):
            y = jax.nn.relu(y) if i else y
            y, stats[name] = getattr(self, name)(y, carry, keys[i])
        if self.shortcut is not None:
            x, stats["shortcut"] = self.shortcut(x, carry, keys[-1])
        elif self.plain is not None:
            x = self.plain(x)
        return {"hidden": ACTIVATIONS[self.act](y + x), **moved(stats)}


def block(c: ResNetConfig, inputs: int, width: int, stride: int, rngs: nnx.Rngs) -> Block:
    """One layer of `resnet`."""
    if c.layer_type == "basic":
        return Block((3, 3), (inputs, width, width), (stride, 1), c.hidden_act, rngs)
    strides = (stride, 1, 1) if c.downsample_in_bottleneck else (1, stride, 1)
    return Block((1, 3, 1), (inputs, width // 4, width // 4, width), strides, c.hidden_act, rngs)


def pooler(carry: Carry) -> Carry:
    """The mean over height and width, in at least float32: (B, H, W, C) -> (B, C)."""
    return {"pooler_output": jnp.mean(carry["hidden"], (1, 2))}


class ClassifierHead(nnx.Module):
    """Logits of the pooled features, (B, C) -> (B, labels), drawn as torch draws a linear layer's weight."""

    def __init__(self, width: int, head: Head, rngs: nnx.Rngs):
        self.out = Linear(width, len(head.labels), std=(3 * width) ** -0.5, rngs=rngs)

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        return {"logits": self.out(carry["pooler_output"], key)}


def head_stages(family: str, width: int, head: Head | None) -> Sequence[Stage]:
    """The head's stage.

    Raises:
      ValueError: it is no head of images, pools in another way, or has no labels.
    """
    if head is None or head.stages:
        return () if head is None else head.stages
    if head.kind != "image-classification" or head.pooling is not None:
        raise ValueError(
            f"{family} has no head of kind {head.kind!r} with pooling {head.pooling!r}; it has image-classification "
            "over the mean (pooling=None), or give the head's own stages"
        )
    if not head.labels:
        raise ValueError(f"a {head.kind} head needs labels")
    return stages_of(["head"], partial(ClassifierHead, width, head), ClassifierHead.__call__, writes=("logits",))


def trunk_stages(
    embed: Sequence[Stage],
    make: Callable[..., Block],
    inputs: int,
    widths: Sequence[int],
    depths: Sequence[int],
    stride: int,
) -> list[Stage]:
    """``embed``, ``stage0/0``, ..., ``pooler``; blocks of one list that are alike share a function, and are scanned.

    Args:
      embed: the stem.
      make: ``make(inputs, width, stride, rngs)``.
      inputs: channels behind the stem.
      widths: channels of each list of blocks.
      depths: blocks of each list.
      stride: of the first block; later lists begin with a stride of 2.
    """
    stages = [*embed]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        plan = [(inputs, width, 2 if i else stride), *[(width, width, 1)] * (depth - 1)]
        for shape, alike in groupby(range(depth), key=plan.__getitem__):
            stages += stages_of([f"stage{i}/{j}" for j in alike], partial(make, *shape), Block.__call__)
        inputs = width
    pool = Stage("pooler", lambda params, carry, key: pooler(carry), lambda key: {}, ("pooler_output",))
    return [*stages, pool]


def build(
    raw: Mapping[str, Any], head: Head | None, *, pooler: bool | None = None, ignore: Collection[str] = ()
) -> Model:
    """A ResNet from its raw configuration; ``pooler`` is not read: the mean has no parameters and is always there."""
    return assemble(read_fields(raw, ResNetConfig, {}, ignore, harmless=HARMLESS), head)


def assemble(c: ResNetConfig, head: Head | None) -> Model:
    """The model: ``embed``, ``stage0/0`` ..., ``pooler``, ``head`` where there is one.

    ``last_hidden_state`` is (B, H, W, C) and ``pooler_output`` (B, C), where transformers has (B, C, H, W) and
    (B, C, 1, 1).
    """
    embed = stages_of(["embed"], partial(Embed, c), Embed.__call__)
    stride = 2 if c.downsample_in_first_stage else 1
    stages = trunk_stages(embed, partial(block, c), c.embedding_size, c.hidden_sizes, c.depths, stride)
    stages += head_stages("resnet", c.hidden_sizes[-1], head)
    return Model("resnet", c, tuple(stages), OUTPUTS, head, STATISTICS)


def rehead(model: Model, head: Head | None) -> Model:
    """The same trunk with another head, or bare."""
    return assemble(model.config, head)


def batch_norm(ours: str, theirs: str) -> tuple[Entry, ...]:
    """Rows of a batch normalisation."""
    return (
        *norm(ours, theirs),
        Entry(f"{ours}/mean", f"{theirs}.running_mean"),
        Entry(f"{ours}/var", f"{theirs}.running_var"),
        Entry(f"{ours}/count", f"{theirs}.num_batches_tracked", "count"),
    )


def conv_norm(ours: str, convolution: str, normalization: str) -> tuple[Entry, ...]:
    """Rows of a `ConvNorm`."""
    return (*conv(f"{ours}/conv", convolution, bias=False), *batch_norm(f"{ours}/norm", normalization))


def names(model: Model) -> NameTable:
    """Hugging Face's names."""
    layer = "encoder.stages.{i}.layers.{j}"
    pairs = [("embed", "embedder.embedder"), ("stage{i}/{j}/shortcut", f"{layer}.shortcut")]
    pairs += [(f"stage{{i}}/{{j}}/layer{k}", f"{layer}.layer.{k}") for k in range(model.config.layers)]
    trunk = [
        row for ours, theirs in pairs for row in conv_norm(ours, f"{theirs}.convolution", f"{theirs}.normalization")
    ]
    drops = (Drop(r"classifier\.1\.(weight|bias)", "the head of another task"),)
    return NameTable((*trunk, *linear("head/out", "classifier.1")), drops, "resnet.", optional=COUNTS)


def other_names(model: Model) -> dict[str, NameTable]:
    """The names of timm and torchvision, which are the same."""
    return {"timm and torchvision": torch_names(len(model.config.depths), model.config.layers, "fc")}


def torch_names(stages: int, layers: int, head: str) -> NameTable:
    """The names of torchvision's module, which most ResNets in torch were modelled on.

    Args:
      stages: number of lists of blocks.
      layers: convolutions of a block.
      head: name of the classifier.
    """
    rows = [*conv_norm("embed", "conv1", "bn1"), *linear("head/out", head)]
    for i in range(stages):
        ours, theirs = f"stage{i}/{{j}}", f"layer{i + 1}.{{j}}"
        rows += conv_norm(f"{ours}/shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
        for k in range(layers):
            rows += conv_norm(f"{ours}/layer{k}", f"{theirs}.conv{k + 1}", f"{theirs}.bn{k + 1}")
    return NameTable(tuple(rows), (Drop(rf"{head}\.(weight|bias)", "the head of another task"),), optional=COUNTS)


def export_config(model: Model, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an exported ResNet."""
    out = with_head(raw, model.head, export_architecture(model.head, ARCHITECTURES))
    return {**out, "model_type": "resnet", "num_channels": model.config.num_channels}


FAMILIES = {"resnet": Family("resnet", ARCHITECTURES, build, rehead, names, export_config, (), other_names)}
"""No rules of its own for ``tensor``: convolutions this narrow are cut by `parallel.fsdp` and by rows of the batch."""
