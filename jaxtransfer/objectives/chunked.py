"""A loss over the logits of a language model, of which one chunk at a time exists."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.models.projection import Projection

Piece = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""``piece(logits (B, t, V), labels (B, t), share (B, t)) -> (loss, metric)``, both sums over tokens: scalars."""

_SMALL = 2**24
"""Fewer logits than these are not worth a loop."""
_TIMES = 4
"""How many times as large as the hidden states the logits of a chunk may be."""


def chunk_count(projection: Projection) -> int:
    """Into how many chunks to cut the tokens; 1 where it would not pay.

    The logits of a chunk are at most four times as large as ``hidden``: what they take follows from activations that
    are there anyway, whatever the batch and however it is sharded. They are not made smaller than that, as each chunk
    reads the kernel, and adds to the gradient of one that trains. A power of two divides most lengths.
    """
    rows, length, width = projection.hidden.shape
    if rows * length * projection.vocabulary < _SMALL:
        return 1
    wanted = -(-projection.vocabulary // (_TIMES * width))
    return min(length, 1 << (wanted - 1).bit_length())


def chunked(
    piece: Piece, projection: Projection, labels: jax.Array, share: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """``piece`` of all tokens, as the sum over chunks of them; the logits of one chunk exist at a time.

    Gradients are taken with the loss, chunk by chunk, while the logits are there: by ``hidden``, and by those parts of
    kernel and bias that are differentiated (for a frozen kernel none is formed). As the loss is a sum, the backward
    pass has only to scale them, and no product is taken twice (as in Liger Kernel: Hsu et al. 2024, arXiv:2410.10989).

    A chunk takes every ``count``-th token of each row, so a batch that is sharded by rows or by tokens stays so. The
    metric has no gradient. Dropout of the kernel's adapters is drawn for each chunk.

    Args:
      piece: a sum over tokens, in which those of share 0 count for nothing.
      projection: what the logits are a product of.
      labels: (B, T) integers.
      share: (B, T) float32, the weight of each token; without a gradient.
      count: the number of chunks.
    """
    leaves, treedef = jax.tree.flatten(dataclasses.replace(projection, hidden=None, key=None))

    def of_chunk(leaves: list[Any], key: Any, index: Any, hidden: Any, *chunk: Any) -> Any:
        return piece(_logits(jax.tree.unflatten(treedef, leaves), key, index, hidden), *chunk)

    zero = (jnp.zeros(()), jnp.zeros(()))

    @jax.custom_vjp
    def total(leaves: list[Any], hidden: Any, key: Any, *rest: Any) -> Any:
        def body(sums: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, of_chunk(leaves, key, *xs)), None

        return jax.lax.scan(body, zero, _chunks(count, hidden, *rest))[0]

    def forward(leaves: list[Any], hidden: Any, *rest: Any) -> Any:
        moving = [leaf.value for leaf in leaves if leaf.perturbed]
        key, *others = jax.tree.map(lambda leaf: leaf.value, rest, is_leaf=_is_primal)

        def body(carry: Any, xs: Any) -> Any:
            index, x, *chunk = xs

            def loss(moving: list[Any], x: Any) -> Any:
                given = iter(moving)
                whole = [next(given) if leaf.perturbed else leaf.value for leaf in leaves]
                return of_chunk(whole, key, index, x, *chunk)

            out, pull, metric = jax.vjp(loss, moving, x, has_aux=True)
            by_moving, by_x = pull(jnp.ones_like(out))
            return jax.tree.map(jnp.add, carry, ((out, metric), by_moving)), by_x if hidden.perturbed else None

        start = (zero, jax.tree.map(jnp.zeros_like, moving))
        (out, by_moving), by_x = jax.lax.scan(body, start, _chunks(count, hidden.value, *others))
        found = iter(by_moving)
        by_x = None if by_x is None else _joined(by_x, hidden.value.shape[1])
        return out, ([next(found) if leaf.perturbed else None for leaf in leaves], by_x)

    def backward(kept: Any, by: Any) -> Any:
        return *jax.tree.map(lambda x: x * by[0].astype(x.dtype), kept), None, None, None

    total.defvjp(forward, backward, symbolic_zeros=True)
    loss, metric = total(leaves, projection.hidden, projection.key, labels, share)
    return loss, jax.lax.stop_gradient(metric)


def map_chunks(
    fn: Callable[[jax.Array, jax.Array], jax.Array], projection: Projection, labels: jax.Array, count: int
) -> jax.Array:
    """``fn(logits (B, t, V), labels (B, t)) -> (B, t, ...)`` of each chunk, joined: (B, T, ...). For evaluation."""

    def body(index: Any, hidden: Any, labels: Any) -> jax.Array:
        return fn(_logits(projection, projection.key, index, hidden), labels)

    chunks = _chunks(count, projection.hidden, labels)
    return _joined(jax.lax.map(lambda xs: body(*xs), chunks), labels.shape[1])


def _logits(projection: Projection, key: Any, index: Any, hidden: jax.Array) -> jax.Array:
    live = None if key is None else jax.random.fold_in(key, index)
    return dataclasses.replace(projection, hidden=hidden, key=live).logits()


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _chunks(count: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The chunks' numbers, and arrays (B, T, ...) as (count, B, T / count, ...), filled up with zeros."""

    def cut(x: jax.Array) -> jax.Array:
        length = -(-x.shape[1] // count) * count
        x = jnp.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], length // count, count, *x.shape[2:]), 2, 0)

    return jnp.arange(count), *map(cut, arrays)


def _joined(chunks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_chunks`, of one array."""
    x = jnp.moveaxis(chunks, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
