"""The vision transformers' shared parts: patches and their positions, pre-norm blocks, pooler and classifier.

``vit``, ``deit`` and ``dinov2`` differ in their special tokens, in the scale of their layers and in what their heads
read; `vit` says how, by one :class:`Variant` and a name table.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxtransfer.models import slots
from jaxtransfer.models.attention import attention
from jaxtransfer.models.interpolation import resize_grid
from jaxtransfer.models.layers import ACTIVATIONS, LayerNorm, Linear, dropout, gated, pixels, split, value_of
from jaxtransfer.models.registry import ConfigFieldError
from jaxtransfer.tree import weights
from jaxtransfer.tree.rules import Rule
from jaxtransfer.types import Carry, Head

CLASSIFIER, DISTILLED = "image-classification", "distilled-image-classification"


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """What a vision transformer reads of its configuration, by Hugging Face's names; sizes are (height, width).

    ``drop_path_rate`` grows linearly with depth, from 0 in the first layer (Huang et al. 2016, arXiv:1603.09382).
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    intermediate_size: int | None = None
    mlp_ratio: float = 4.0
    num_channels: int = 3
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True

    def __post_init__(self):
        for name in ("hidden_act", "pooler_act"):
            if getattr(self, name) not in ACTIVATIONS:
                raise ConfigFieldError(f"config field {name}: {getattr(self, name)!r} is not one of {[*ACTIVATIONS]}")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ConfigFieldError(
                f"config field hidden_size={self.hidden_size} does not divide by num_attention_heads="
                f"{self.num_attention_heads}"
            )
        sizes = (self.image_size, self.patch_size)
        if any(len(size) != 2 or min(size) < 1 for size in sizes) or any(i % p for i, p in zip(*sizes, strict=True)):
            raise ConfigFieldError(
                f"config field image_size={self.image_size}: height and width must be multiples of patch_size="
                f"{self.patch_size}"
            )
        if not 0 <= self.drop_path_rate < 1 or self.num_channels < 1:
            raise ConfigFieldError(
                f"config fields drop_path_rate={self.drop_path_rate}, num_channels={self.num_channels}: expected "
                "[0, 1) and at least 1"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """The number of patches by axis."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def inner(self) -> int:
        """The width between the two layers of the perceptron."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        wide = int(self.hidden_size * self.mlp_ratio)
        return (int(wide * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else wide


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a family differs from ViT.

    Attributes:
      tokens: special tokens before the patches: the class token, and DeiT's distillation token.
      dino: layers are scaled and have no dropout behind their projections, positions follow the image's size, the
        pooler is the class token itself, and a classifier reads it beside the mean of the patches.
      unread: fields of the record that this family's configuration has not.
    """

    tokens: int = 1
    dino: bool = False
    unread: tuple[str, ...] = ("mlp_ratio", "layerscale_value", "use_swiglu_ffn", "use_mask_token")


class Patch(nnx.Module):
    """The projection of patches, a convolution whose stride is its kernel: (B, H, W, C) -> (B, h, w, d)."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        shape = (*c.patch_size, c.num_channels, c.hidden_size)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * c.initializer_range)
        self.bias = nnx.Param(jnp.zeros(c.hidden_size))
        self.how = weights.Window(stride=(c.patch_size[0], c.patch_size[1]))

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return weights.conv(x, self.kernel.get_value(), self.bias.get_value(), key, self.how)


class Embed(nnx.Module):
    """Special tokens and patches with their positions: (B, H, W, C) -> (B, tokens + h * w, d).

    ``bool_masked_pos`` (B, h * w), where DINOv2 is given it, says which patches its mask token stands for.
    """

    def __init__(self, c: ViTConfig, v: Variant, rngs: nnx.Rngs):
        def draw(count: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), (1, count, c.hidden_size)) * c.initializer_range)

        self.patch, self.cls = Patch(c, rngs), draw(1)
        self.distillation = draw(1) if v.tokens == 2 else None
        self.mask = nnx.Param(jnp.zeros((1, c.hidden_size))) if v.dino and c.use_mask_token else None
        self.position = draw(v.tokens + c.grid[0] * c.grid[1])
        self.c, self.v = c, v

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        kp, kd = split(key, 2)
        images = pixels(carry, self.c.num_channels)
        grid = self.grid(*images.shape[1:3])
        x = self.patch(images, kp).reshape(images.shape[0], grid[0] * grid[1], -1)
        if "bool_masked_pos" in carry:
            if self.mask is None:
                raise ValueError("bool_masked_pos: the model has no mask token")
            x = jnp.where(carry["bool_masked_pos"].astype(bool)[..., None], _vector(self.mask, x), x)
        tokens = (token for token in (self.cls, self.distillation) if token is not None)
        special = [jnp.broadcast_to(_vector(token, x), (len(x), 1, x.shape[-1])) for token in tokens]
        position = value_of(self.position)
        if grid != self.c.grid:
            position = resize_grid(position, self.v.tokens, self.c.grid, grid)
        x = jnp.concatenate([*special, x], axis=1) + position.astype(x.dtype)
        return {"hidden": dropout(x, self.c.hidden_dropout_prob, kd)}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The patches of an image of this size: whole ones, and for ViT and DeiT as many as the configuration says."""
        down, across = self.c.patch_size
        if height % down or width % across:
            raise ValueError(
                f"pixel_values: images of {height} x {width} do not divide into patches of patch_size={down} x {across}"
            )
        if not self.v.dino and (height, width) != tuple(self.c.image_size):
            raise ValueError(
                f"pixel_values: images of {height} x {width}, but image_size={self.c.image_size}: resize them, or adapt"
                f" the model once: resize.resize_positions(source, ({height}, {width}))"
            )
        return height // down, width // across


def _vector(variable: Any, like: jax.Array) -> jax.Array:
    """A vector's parameter in the dtype of the activations, to be broadcast over rows and positions."""
    return value_of(variable).astype(like.dtype).reshape(1, 1, -1)


class Attention(nnx.Module):
    """Self-attention of the normalised input; DINOv2 scales it."""

    def __init__(self, c: ViTConfig, v: Variant, rngs: nnx.Rngs):
        d, std = c.hidden_size, c.initializer_range
        self.norm = LayerNorm(d, eps=c.layer_norm_eps)
        self.query = Linear(d, d, std=std, bias=c.qkv_bias, rngs=rngs)
        self.key = Linear(d, d, std=std, bias=c.qkv_bias, rngs=rngs)
        self.value = Linear(d, d, std=std, bias=c.qkv_bias, rngs=rngs)
        self.output = Linear(d, d, std=std, rngs=rngs)
        self.scale = nnx.Param(jnp.full(d, c.layerscale_value)) if v.dino else None
        self.c = c

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        kq, kk, kv, ka, ko = split(key, 5)
        x, everywhere = self.norm(x), jnp.ones((1, x.shape[1]), bool)
        q, k, v = self.query(x, kq), self.key(x, kk), self.value(x, kv)
        c = self.c
        y = attention(q, k, v, everywhere, heads=c.num_attention_heads, rate=c.attention_probs_dropout_prob, key=ka)
        y = self.output(y, ko)
        return y if self.scale is None else y * _vector(self.scale, y)


class MLP(nnx.Module):
    """A perceptron of the normalised input, ``down(act(up))`` or SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, c: ViTConfig, v: Variant, rngs: nnx.Rngs):
        d, std = c.hidden_size, c.initializer_range
        self.norm = LayerNorm(d, eps=c.layer_norm_eps)
        self.up = Linear(d, c.inner * (2 if c.use_swiglu_ffn else 1), std=std, rngs=rngs)
        self.down = Linear(c.inner, d, std=std, rngs=rngs)
        self.scale = nnx.Param(jnp.full(d, c.layerscale_value)) if v.dino else None
        self.c = c

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        ku, kd = split(key, 2)
        y = self.up(self.norm(x), ku)
        if self.c.use_swiglu_ffn:
            gate, y = jnp.split(y, 2, axis=-1)
            y = gated("silu", gate, y)
        else:
            y = ACTIVATIONS[self.c.hidden_act](y)
        y = self.down(y, kd)
        return y if self.scale is None else y * _vector(self.scale, y)


class Block(nnx.Module):
    """One layer, pre-norm: ``x + attention(norm(x))``, ``x + mlp(norm(x))``: (B, T, d) -> (B, T, d)."""

    def __init__(self, c: ViTConfig, v: Variant, rngs: nnx.Rngs):
        self.attention, self.mlp = Attention(c, v, rngs), MLP(c, v, rngs)
        self.rate = 0.0 if v.dino else c.hidden_dropout_prob

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        x = carry["hidden"]
        for name, part, live in zip(("attention", "mlp"), (self.attention, self.mlp), split(key, 2), strict=True):
            kp, kd, kr = split(live, 3)
            y = slots.adapted(dropout(part(x, kp), self.rate, kd), carry, name)
            x = x + drop_path(y, carry.get("drop_path"), kr)
        return {"hidden": x}


def drop_path(x: jax.Array, rate: Any, key: jax.Array | None) -> jax.Array:
    """Zeroes examples with probability ``rate`` and scales the others by ``1 / (1 - rate)``; identity without a key."""
    if key is None or rate is None:
        return x
    kept = 1.0 - jnp.asarray(rate, jnp.float32)
    keep = jax.random.bernoulli(key, kept, (len(x), 1, 1))
    return jnp.where(keep, x / kept.astype(x.dtype), jnp.zeros_like(x))


class Norm(LayerNorm):
    """The last normalisation; DINOv2's pooler is the class token behind it."""

    def plain(self, carry: Carry, key: jax.Array | None) -> Carry:
        return {"hidden": self(carry["hidden"])}

    def pooled(self, carry: Carry, key: jax.Array | None) -> Carry:
        hidden = self(carry["hidden"])
        return {"hidden": hidden, "pooler_output": hidden[:, 0]}


class Pooler(nnx.Module):
    """``act(W h_0 + b)`` of the class token."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.dense = Linear(c.hidden_size, c.pooler_output_size or c.hidden_size, std=c.initializer_range, rngs=rngs)
        self.act = c.pooler_act

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        return {"pooler_output": ACTIVATIONS[self.act](self.dense(carry["hidden"][:, 0], key))}


class ClassifierHead(nnx.Module):
    """Logits of an image, (B, labels); a distilled head averages those of both its tokens."""

    def __init__(self, c: ViTConfig, v: Variant, head: Head, rngs: nnx.Rngs):
        both = v.dino and head.pooling is None
        out = partial(Linear, c.hidden_size * (2 if both else 1), len(head.labels), std=c.initializer_range, rngs=rngs)
        self.out = out()
        self.distillation = out() if head.kind == DISTILLED else None
        self.tokens, self.both, self.mean = v.tokens, both, head.pooling == "mean"

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        hidden, (ko, kd) = carry["hidden"], split(key, 2)
        parts = [hidden[:, 0]] if not self.mean else []
        parts += [hidden[:, self.tokens :].mean(1)] if self.mean or self.both else []
        logits = self.out(jnp.concatenate(parts, axis=-1), ko)
        if self.distillation is None:
            return {"logits": logits}
        distilled = self.distillation(hidden[:, 1], kd)
        return {"logits": (logits + distilled) / 2, "cls_logits": logits, "distillation_logits": distilled}


TENSOR_RULES = (
    Rule(r"blocks/\d+/attention/(query|key|value)/kernel", P("fsdp", "tensor"), optional=True),
    Rule(r"blocks/\d+/attention/(query|key|value)/bias", P("tensor"), optional=True),
    Rule(r"blocks/\d+/attention/output/kernel", P("tensor", "fsdp"), optional=True),
    Rule(r"blocks/\d+/mlp/up/kernel", P("fsdp", "tensor"), optional=True),
    Rule(r"blocks/\d+/mlp/up/bias", P("tensor"), optional=True),
    Rule(r"blocks/\d+/mlp/down/kernel", P("tensor", "fsdp"), optional=True),
    Rule(r"embed/patch/kernel", P(None, None, None, "fsdp"), optional=True),
)
"""Megatron's split of a block over ``tensor``, the other axis over ``fsdp``."""
