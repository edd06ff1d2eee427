"""Surgery on shapes: other images, patches, input channels or vocabularies for a model that is already trained.

Each function gives a new source, whose configuration says what changed, so that an export says it too; parameters that
keep their shape are shared, not copied.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.models.api import abstract_init
from jaxtransfer.models.interpolation import resize_grid, resize_matrix
from jaxtransfer.models.layers import at_least_float32
from jaxtransfer.models.registry import family
from jaxtransfer.tree.diff import diff
from jaxtransfer.tree.paths import Params, flatten, unflatten
from jaxtransfer.tree.weights import is_weight
from jaxtransfer.types import Model, Source

POSITION, PATCH, WORD = "embed/position", "embed/patch/kernel", "embed/word/embedding"


class ResizeError(ValueError):
    """A model that has not what is to be resized, or a size that it cannot take."""


def resize_positions(source: Source, image_size: int | tuple[int, int]) -> Source:
    """A vision transformer for images of another size: its positions are interpolated once, bicubic as torch does it.

    ``P' = A P B^T`` over the grid of patches, A and B of `interpolation.resize_matrix`; special tokens keep theirs.

    Args:
      source: ViT, DeiT or DINOv2 (which interpolates by itself in every forward pass otherwise).
      image_size: (height, width) in pixels, or one number for both; multiples of the patch.

    Raises:
      ResizeError: the model has no positions of patches.
      ConfigFieldError: the size does not divide into patches, or, for DINOv2, the patches form no square.
    """
    size = _pair(image_size)
    return _with_positions(source, {}, {"image_size": size}, f"resize_positions(image_size={size})")


def patch_size(
    source: Source, size: int | tuple[int, int], *, image_size: int | tuple[int, int] | None = None
) -> Source:
    """A vision transformer with patches of another size: ``w' = pinv(B^T) w`` (Beyer et al. 2023, arXiv:2212.08013).

    B enlarges or shrinks a patch bilinearly. Where it enlarges, ``<B x, w'> = <x, w>`` for every patch x: an enlarged
    patch is projected to what it was before. Positions follow the new grid, as in `resize_positions`.

    Args:
      source: ViT, DeiT or DINOv2.
      size: (height, width) of a patch in pixels, or one number for both.
      image_size: of the images to come; None keeps that of the model.

    Raises:
      ResizeError, ConfigFieldError: as `resize_positions`.
    """
    size = _pair(size)
    kernel = _leaf(source, PATCH, "no projection of patches")
    config = {"patch_size": size} | ({} if image_size is None else {"image_size": _pair(image_size)})
    _reconfigured(source.model, config)  # complains of sizes before they are used
    turns = (
        np.linalg.pinv(resize_matrix(old, new, "bilinear").T) for old, new in zip(kernel.shape[:2], size, strict=True)
    )
    resized = jnp.einsum(
        "ai,bj,ijcd->abcd",
        *(_wide(turn, kernel) for turn in turns),
        _wide(kernel, kernel),
        precision=jax.lax.Precision.HIGHEST,
    )
    note = ", ".join(f"{name}={value}" for name, value in config.items())
    return _with_positions(source, {PATCH: resized.astype(kernel.dtype)}, config, f"patch_size({note})")


def input_channels(source: Source, channels: int) -> Source:
    """A model for images with another number of channels: ``w'_j = sum_i M_ji w_i`` over its first kernel's channels.

    Columns of M sum to one: old channel ``i`` is shared out equally among the new ones ``j`` with ``j % old == i``, or,
    where those are fewer, added to channel ``i % new``. So an image whose channels are all alike gives what it gave
    before: a grey one to a model of one channel what it gave thrice to a model of three.

    Raises:
      ResizeError: the model has no first convolution over ``num_channels``, or ``channels`` is less than one.
    """
    old = getattr(source.model.config, "num_channels", 0)
    embed = flatten({"embed": source.params.get("embed", {})}, is_leaf=is_weight)
    first = [path for path, leaf in embed.items() if len(leaf.shape) == 4 and leaf.shape[2] == old]
    if len(first) != 1:
        raise ResizeError(f"input_channels: a {source.model.family} model has no one convolution over num_channels")
    if channels < 1:
        raise ResizeError(f"input_channels: expected at least one channel, got {channels}")
    kernel = _leaf(source, first[0], "no first convolution")
    share = np.zeros((channels, old))
    for i in range(max(channels, old)):
        share[i % channels, i % old] = 1.0
    share /= share.sum(0, keepdims=True)
    mixed = jnp.einsum(
        "ji,abid->abjd", _wide(share, kernel), _wide(kernel, kernel), precision=jax.lax.Precision.HIGHEST
    )
    changes = {first[0]: mixed.astype(kernel.dtype)}
    return _rebuilt(source, {"num_channels": channels}, changes, f"input_channels({channels})")


def vocabulary(source: Source, size: int, key: jax.Array, *, mean: bool = True, shrink: bool = False) -> Source:
    """A model of language with another number of tokens; embeddings and heads over the vocabulary follow, tied or not.

    Args:
      source: a model with a word embedding.
      size: the number of tokens; ids up to the old number keep their rows.
      key: draws the new rows.
      mean: new rows are the mean of the old ones with noise of 1e-9 of their variance (Hewitt 2021), as transformers
        adds them; False draws them as the model draws its own, which can take probability from every other token.
      shrink: whether rows may be dropped from the end.

    Raises:
      ResizeError: the model has no word embedding, rows would be dropped unasked, or the padding token among them.
    """
    pad = getattr(source.model.config, "pad_token_id", None)
    old = _leaf(source, WORD, "no word embedding").shape[0]
    if size < old and not shrink:
        raise ResizeError(
            f"vocabulary: {size} tokens are fewer than the model's {old}; shrink=True drops the last rows"
        )
    if size < 1 or (pad is not None and pad >= size):
        raise ResizeError(f"vocabulary: pad_token_id={pad} is not among {size} tokens")
    model = _reconfigured(source.model, {"vocab_size": size})
    have, wanted, changes = flatten(source.params, is_leaf=is_weight), flatten(abstract_init(model)), {}
    for i, (path, leaf) in enumerate(wanted.items()):
        if path in have and have[path].shape != leaf.shape:
            live = jax.random.fold_in(key, i)
            whole = _leaf(source, path, "")
            axis = next(n for n, length in enumerate(leaf.shape) if length != whole.shape[n])
            new = _rows(whole, axis, size - old, live) if mean else _drawn(model, path, live)
            kept = jax.lax.slice_in_dim(whole, 0, min(old, size), axis=axis)
            added = jax.lax.slice_in_dim(new, new.shape[axis] - max(size - old, 0), new.shape[axis], axis=axis)
            changes[path] = jnp.concatenate([kept, added.astype(whole.dtype)], axis)
    return _rebuilt(source, {"vocab_size": size}, changes, f"vocabulary({size})")


def _rows(whole: jax.Array, axis: int, count: int, key: jax.Array) -> jax.Array:
    """The mean along an axis, with noise, ``count`` times."""
    wide = _wide(whole, whole)
    centre, spread = wide.mean(axis, keepdims=True), wide.std(axis, keepdims=True)
    shape = tuple(max(count, 0) if n == axis else length for n, length in enumerate(whole.shape))
    return jnp.broadcast_to(centre, shape) + 1e-9**0.5 * spread * jax.random.normal(key, shape, wide.dtype)


def _drawn(model: Model, path: str, key: jax.Array) -> jax.Array:
    """A parameter as the model draws it."""
    stage = next(stage for stage in model.stages if path.startswith(f"{stage.name}/"))
    return flatten({stage.name: stage.init(key)})[path]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _wide(x: Any, like: jax.Array) -> jax.Array:
    """In the dtype that a parameter like this one is computed in."""
    return jnp.asarray(x, at_least_float32(like.dtype))


def _leaf(source: Source, path: str, lack: str) -> jax.Array:
    """The array at a path."""
    leaf = flatten(source.params, is_leaf=is_weight).get(path)
    if leaf is None:
        raise ResizeError(f"a {source.model.family} model has {lack}: nothing at {path} to resize")
    if is_weight(leaf):
        raise ResizeError(f"{path} is a {type(leaf).__name__}, not an array: resize before attaching or quantising")
    return jnp.asarray(leaf)


def _with_positions(source: Source, changes: Params, config: Mapping[str, Any], note: str) -> Source:
    """The source with another configuration, and its positions on the new grid."""
    table = _leaf(source, POSITION, "no positions of patches")
    old, new = source.model.config.grid, _reconfigured(source.model, config).config.grid
    if old != new:
        wide = _wide(table, table)
        changes = {
            **changes,
            POSITION: resize_grid(wide, table.shape[1] - old[0] * old[1], old, new).astype(table.dtype),
        }
    return _rebuilt(source, config, changes, note)


def _reconfigured(model: Model, config: Mapping[str, Any]) -> Model:
    """The same model under a configuration with other fields."""
    changed = dataclasses.replace(model, config=dataclasses.replace(model.config, **config))
    return family(model.family).rehead(changed, model.head)


def _rebuilt(source: Source, config: Mapping[str, Any], changes: Params, note: str) -> Source:
    model = _reconfigured(source.model, config)
    params = unflatten({**flatten(source.params, is_leaf=is_weight), **changes})
    diff(abstract_init(model), params, dtypes=False).check(note)
    lineage = dataclasses.replace(source.lineage, operations=(*source.lineage.operations, note))
    sizes = {"image_size": config["image_size"]} if "image_size" in config else {}
    return dataclasses.replace(source, model=model, params=params, lineage=lineage, assets={**source.assets, **sizes})
