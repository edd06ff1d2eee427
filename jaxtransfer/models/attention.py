"""Attention: of long rows some queries at a time, or left to a kernel that is handed in from above."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.models.layers import at_least_float32, dropped, lean, softmax, survivors

SCORES = 2**24
"""Of a row, the scores that are in memory at once: 64 MiB, which stay on the chip of a TPU v5e or v6e."""
ROWS = 256
"""At least so many queries share a product with one head's keys: fewer would leave matrix units idle."""
_AT_ONCE = ContextVar("at_once", default=False)


@dataclasses.dataclass(frozen=True)
class Span:
    """What a mask says, for a kernel that is given no mask: tokens attend those of their own segment.

    Attributes:
      segments: (B, T) integers.
      causal: whether only those at or before their own place.
      window: of those only so many, a scalar that may be traced: ``near``, or more, which is all.
      near: the only limit there is.
      prompted: whether a soft prompt stands before the tokens, maybe with padding between that no window counts.
    """

    segments: jax.Array
    causal: bool = False
    window: jax.Array | None = None
    near: int = 0
    prompted: bool = False


Attend = Callable[..., jax.Array]
"""``attend(q, k, v, span, *, heads, kv_heads, scale, softcap, rate)``: what may stand in for `attention`'s own."""
_ATTEND: ContextVar[Attend | None] = ContextVar("attend", default=None)


@contextmanager
def attending(attend: Attend | None) -> Iterator[None]:
    """Attention that is traced in here is left to ``attend``, but for that over a cache."""
    token = _ATTEND.set(attend)
    try:
        yield
    finally:
        _ATTEND.reset(token)


@contextmanager
def at_once() -> Iterator[None]:
    """Attention that is traced in here scores all queries at once: nothing is computed twice, as a count wants it."""
    token = _AT_ONCE.set(True)
    try:
        yield
    finally:
        _AT_ONCE.reset(token)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    heads: int,
    rate: float = 0.0,
    key: jax.Array | None = None,
    kv_heads: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    span: Span | None = None,
) -> jax.Array:
    """``softmax(q k^T * scale + mask) v`` over ``heads`` heads, the softmax in at least float32.

    Of long rows some queries at a time are scored, those of `SCORES` scores, and in the backward pass once more: memory
    grows with the tokens, not with their square.

    Args:
      q: (B, T, heads * d); k, v: (B, S, kv_heads * d).
      mask: (B, S) or (B, T, S) boolean, true where a key may be attended; a row with none attends to all alike.
      heads: number of heads.
      rate: dropout of the attention probabilities, with ``key``.
      kv_heads: heads of keys and values, each shared by ``heads / kv_heads`` heads (Ainslie et al. 2023,
        arXiv:2305.13245); None is ``heads``.
      scale: None is ``1 / sqrt(d)``.
      softcap: scores become ``c tanh(scores / c)`` (Gemma 2).
      span: what a mask (B, T, S) says; one of (B, S) says it itself.
    """
    how: dict[str, Any] = {
        "heads": heads, "kv_heads": kv_heads or heads, "softcap": softcap,
        "scale": (q.shape[-1] // heads) ** -0.5 if scale is None else scale,
    }  # fmt: skip
    span = Span(mask) if mask.ndim == 2 else span
    if (attend := _ATTEND.get()) is not None and span is not None:
        return attend(q, k, v, span, rate=0.0 if key is None else rate, **how)
    own = partial(_attention, rate=rate, **how)
    count = q.shape[1]
    least = max(1, ROWS * (kv_heads or heads) // heads)
    parts = max(1, min(-(-heads * count * k.shape[1] // SCORES), count // least))
    parts = next((n for n in range(parts, 2 * parts) if count % n == 0), parts)
    return own(q, k, v, mask, key) if parts == 1 or _AT_ONCE.get() else _in_parts(parts, own, q, k, v, mask, key)


def _in_parts(
    parts: int, how: Any, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, key: jax.Array | None
) -> jax.Array:
    """Queries i, i + n, i + 2 n, ... at a time, for each i below n: tokens that lie on other devices stay there."""
    count = q.shape[1]
    missing = -count % parts

    def split_queries(x: jax.Array) -> jax.Array:  # (B, T, ...) -> (parts, B, T / parts, ...)
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(len(x), -1, parts, *x.shape[2:]), 2, 0)

    wide = [x.astype(at_least_float32(x.dtype)) for x in (k, v)]  # what the parts say of them is added up in float32

    def one(part: Any) -> jax.Array:
        q, own, key = part
        return how(q, *(x.astype(q.dtype) for x in wide), mask if own is None else own, key)

    masks = split_queries(mask) if mask.ndim == 3 else None
    keys = None if key is None else jax.random.split(key, parts)
    y = jax.lax.map(jax.checkpoint(one, prevent_cse=False), (split_queries(q), masks, keys))
    return jnp.moveaxis(y, 0, 2).reshape(len(q), -1, q.shape[-1])[:, :count]


def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, key: jax.Array | None,
    *, heads: int, rate: float, kv_heads: int, scale: float, softcap: float | None,
) -> jax.Array:  # fmt: skip
    d = q.shape[-1] // heads
    # For heads that share nothing an axis of length one would cost copies of the scores: XLA moves the others about it.
    g, sizes = ("", (heads,)) if heads == kv_heads else ("g", (kv_heads, heads // kv_heads))
    q = q.reshape(*q.shape[:-1], *sizes, d) * scale
    # Heads before tokens, written out: left to the products, XLA's forward pass takes 1.2 times as long on a CPU.
    q, k, v = (jnp.moveaxis(x, 1, -2) for x in (q, *(x.reshape(*x.shape[:-1], kv_heads, d) for x in (k, v))))
    scores = jnp.einsum(f"bk{g}td,bksd->bk{g}ts", q, k, preferred_element_type=at_least_float32(q.dtype))
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = jnp.expand_dims(mask, (*range(1, 1 + len(sizes)), *([-2] if mask.ndim == 2 else [])))
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    where, share = survivors(scores.shape, rate, key)

    def weighted(probs: jax.Array, v: jax.Array, where: jax.Array | None) -> jax.Array:
        return jnp.einsum(f"bk{g}ts,bksd->bk{g}td", dropped(probs.astype(v.dtype), where, share), v)

    # The softmax keeps its probabilities: those that are left of them need not be kept beside them.
    y = jnp.moveaxis(lean(weighted)(softmax(scores), v, where), -2, 1)
    return y.reshape(*y.shape[:2], heads * d)
