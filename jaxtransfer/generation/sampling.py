"""From logits to tokens: greedy, or drawn after temperature, top-k and top-p."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.generation.prompts import GenerationError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn; None in its place is greedy: the likeliest token, the first of equals.

    Attributes:
      temperature: the logits are divided by it.
      top_p: keep the smallest set of the likeliest tokens whose probability reaches it; None keeps all.
      top_k: keep the k likeliest; None keeps all. Alone among these it recompiles when it changes.
    """

    temperature: float
    top_p: float | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})


def sampling(temperature: float, top_k: int | None, top_p: float | None, key: jax.Array | None) -> Sampling | None:
    """The record of `generate`'s options.

    Raises:
      GenerationError: an option out of range, one that greedy decoding would not read, or sampling without a key.
    """
    if not 0 <= temperature < float("inf"):
        raise GenerationError(f"temperature: {temperature} is not 0 (greedy) or a positive number")
    if top_k is not None and top_k < 1:
        raise GenerationError(f"top_k: {top_k} is not at least 1; None keeps all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise GenerationError(f"top_p: {top_p} is not above 0 and at most 1; None keeps all tokens")
    if temperature == 0:
        if top_k is not None or top_p is not None:
            raise GenerationError("temperature: 0 is greedy, where top_k and top_p mean nothing; give a positive one")
        return None
    if key is None:
        raise GenerationError(f"key: sampling at temperature {temperature} needs one, such as jax.random.key(0)")
    return Sampling(float(temperature), None if top_p in (None, 1) else float(top_p), top_k)


def draw(logits: jax.Array, how: Sampling | None, key: jax.Array | None, step: Any) -> jax.Array:
    """The next token of each row, (B, V) -> (B,) int32; row ``i`` draws with ``fold_in(fold_in(key, step), i)``."""
    if how is None or key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    rows = jnp.arange(logits.shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), rows)
    return jax.vmap(jax.random.categorical)(keys, warp(logits, how)).astype(jnp.int32)


def warp(logits: jax.Array, how: Sampling) -> jax.Array:
    """Temperature, then top-k, then top-p, in transformers' order and meaning: what is not kept becomes ``-inf``.

    Tokens as likely as the last one kept are kept too. Top-p: Holtzman et al. 2020, arXiv:1904.09751.

    Args:
      logits: (B, V), of any floating dtype; the result is float32.
      how: what to keep.

    Example:
      >>> jnp.exp(warp(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), Sampling(temperature=1.0, top_p=0.6))).round(3)
      Array([[0.5, 0.3, 0. ]], dtype=float32)
    """
    scores = logits.astype(jnp.float32) / how.temperature
    if how.top_k is not None:
        least = jax.lax.top_k(scores, min(how.top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if how.top_p is not None:
        scores = jnp.where(_nucleus(jax.nn.softmax(scores, axis=-1), how.top_p), scores, -jnp.inf)
    return scores


def _nucleus(probs: jax.Array, top_p: Any) -> jax.Array:
    """Where the tokens that are likelier sum to less than ``top_p``: (B, V) -> (B, V) boolean.

    By bisection for the least probability kept: to sort 50,000 logits takes XLA on a CPU longer than a whole step of a
    small model. The bits of floats that are not negative have the floats' order, so 31 halvings are exact.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        above = jnp.sum(jnp.where(bits > middle, probs, 0.0), axis=-1, keepdims=True)
        return jnp.where(above < top_p, low, middle), jnp.where(above < top_p, middle, high)

    high = bits.max(axis=-1, keepdims=True)
    return bits >= jax.lax.fori_loop(0, 31, halve, (jnp.full_like(high, -1), high))[1]
