"""Causal attention: where tokens stand, what they may attend to, and the cache of keys and values for decoding.

The cache is one stacked array in the carry, updated by layer index: as inputs and outputs of a scan it would be copied
whole for every token.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.models import slots as slot
from jaxtransfer.models.attention import Span
from jaxtransfer.types import Carry


def empty_cache(layers: int, rows: int, length: int, kv_heads: int, width: int, dtype: Any) -> Carry:
    """A cache without tokens: ``key`` and ``value`` (layers, rows, kv_heads, length, width), ``valid``, ``length``.

    ``valid`` (rows, length) marks the slots that may be attended, ``length`` counts those in use. A head's slots lie
    side by side, as its product with a query wants them: with the heads of a slot side by side, XLA turned the whole
    cache for every token (12 layers, 8 rows, 160 slots, on a CPU: 18 ms a step against 5).
    """
    stored = {name: jnp.zeros((layers, rows, kv_heads, length, width), dtype) for name in ("key", "value")}
    return {**stored, "valid": jnp.zeros((rows, length), bool), "length": jnp.zeros((), jnp.int32)}


def context(carry: Carry, limit: int, *, windows: bool) -> tuple[jax.Array, Carry]:
    """Where the new tokens stand and what they may attend to.

    Args:
      carry: ``input_ids`` (B, T); maybe ``attention_mask`` (B, T), ``position_ids`` (B, T), ``cache``, and, for packed
        rows, ``segment_ids`` (B, T): tokens attend within their segment, 0 is padding.
      limit: the number of the model's positions.
      windows: whether any layer's attention is limited.

    Returns:
      Positions (B, T), and entries of the carry: ``mask`` (B, T, S), ``distance`` where a layer's attention is
      limited, in slots, (T, S), or behind a prompt (B, T, S); ``cache`` where there is one, with the new slots
      counted and marked, else ``segments`` (B, T), within which the mask is causal. A prompt that stands before the
      tokens here counts in T; its slots come on top of those the cache was made with.

    Raises:
      ValueError: the input is longer than the model or the cache, or its masks do not fit it.
    """
    ids, cache, lead = carry["input_ids"], carry.get("cache"), slot.lead(carry)
    if cache is not None and lead:
        cache = _with_prompt(cache, lead)
    slots = limit if cache is None else cache["valid"].shape[1]
    if ids.shape[1] + lead > slots or slots > limit:
        has = (
            f"the model has {limit} positions"
            if cache is None or slots > limit
            else f"the cache has {slots - lead} slots"
        )
        what = f"a prompt of {lead} and " if lead else ""
        raise ValueError(f"{what}input of length {ids.shape[1]} does not fit: {has}; set max_length")
    valid = carry.get("attention_mask", jnp.ones(ids.shape, bool)).astype(bool)
    if valid.shape != ids.shape:
        raise ValueError(f"attention_mask is {valid.shape}, input_ids {ids.shape}: it masks the new tokens alone")
    count = lead + ids.shape[1]
    valid = jnp.concatenate([jnp.ones((len(ids), lead), bool), valid], axis=1)
    start, entries = 0, {}
    if cache is not None:
        start = cache["length"]
        valid = jax.lax.dynamic_update_slice(cache["valid"], valid, (0, start))
        entries["cache"] = {**cache, "valid": valid, "length": start + count}
    queries = start + jnp.arange(count, dtype=jnp.int32)
    distance = queries[:, None] - jnp.arange(valid.shape[1], dtype=jnp.int32)[None]
    mask = (distance >= 0)[None] & valid[:, None]
    if (segments := carry.get("segment_ids")) is not None:
        if lead:
            raise ValueError("segment_ids: one prompt cannot stand before every segment of a packed row; do not pack")
        if cache is not None or "position_ids" not in carry:
            raise ValueError("segment_ids: packed rows need position_ids, which start anew in each, and no cache")
        mask &= (segments[:, :, None] == segments[:, None]) & (segments != 0)[:, None]
    if cache is None:
        entries["segments"] = (valid if segments is None else segments).astype(jnp.int32)
    if windows and (lead or "prompt" in (cache or ())):
        distance = _behind_prompt(distance, valid, queries, (cache or {}).get("prompt", lead))
    entries |= {"mask": mask} | ({"distance": distance} if windows else {})
    if "position_ids" not in carry:
        return jnp.broadcast_to(queries[None], (len(ids), count)), entries
    given = carry["position_ids"] + slot.prompt_length(carry)
    before = jnp.broadcast_to(jnp.arange(lead, dtype=given.dtype)[None], (len(ids), lead))
    return jnp.concatenate([before, given], axis=1), entries


def _behind_prompt(distance: jax.Array, valid: jax.Array, queries: jax.Array, length: Any) -> jax.Array:
    """Distances (B, T, S) without the padding between a prompt and a row's first token, which no window counts."""
    tokens = jnp.arange(valid.shape[1]) >= length
    gap = jnp.argmax(valid & tokens[None], axis=1).astype(jnp.int32) - length
    across = (queries >= length)[:, None] & ~tokens[None]
    return distance[None] - jnp.where(across[None], jnp.maximum(gap, 0)[:, None, None], 0)


def _with_prompt(cache: Carry, length: int) -> Carry:
    """An empty cache with room for a prompt before its tokens, marked as holding it."""
    room = {name: jnp.pad(cache[name], [(0, 0)] * 3 + [(0, length), (0, 0)]) for name in ("key", "value")}
    valid = jnp.pad(cache["valid"], [(0, 0), (0, length)])
    return {**cache, **room, "valid": valid, "prompt": jnp.full((), length, jnp.int32)}


def checked(hidden: jax.Array, entries: Carry) -> jax.Array:
    """The embedded tokens; NaN where they do not fit into the cache, as a write behind its end would hit old slots."""
    if "cache" not in entries:
        return hidden
    fits = entries["cache"]["length"] <= entries["cache"]["valid"].shape[1]
    return jnp.where(fits, hidden, jnp.full_like(hidden, jnp.nan))


def attended(carry: Carry) -> jax.Array:
    """The mask of one layer, (B, T, S): its own window over the mask of all."""
    mask = carry["mask"]
    if "window" not in carry:
        return mask
    near = carry["distance"] < carry["window"]
    return mask & (near if near.ndim == 3 else near[None])


def span(carry: Carry, near: int | None = None) -> Span | None:
    """What `attended` says, for a kernel; of a cache nothing.

    Args:
      carry: of a layer.
      near: the model's window, where any layer has one.
    """
    if "segments" not in carry:
        return None
    prompted = "distance" in carry and carry["distance"].ndim == 3
    return Span(carry["segments"], causal=True, window=carry.get("window"), near=near or 0, prompted=prompted)


def remember(carry: Carry, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, Carry]:
    """Writes a layer's new keys and values (B, T, n) into the cache, if there is one.

    Returns:
      All keys and values, (B, S, n), and the written entries of the carry.
    """
    cache = carry.get("cache")
    if cache is None:
        return k, v, {}
    layer, start = carry["layer"], cache["length"] - k.shape[1]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        heads = new.reshape(*new.shape[:2], old.shape[2], old.shape[4]).swapaxes(1, 2)
        return jax.lax.dynamic_update_slice(old, heads[None].astype(old.dtype), (layer, 0, 0, start, 0))

    def all_of(stored: jax.Array) -> jax.Array:
        found = jax.lax.dynamic_index_in_dim(stored, layer, keepdims=False).swapaxes(1, 2)
        return found.reshape(*found.shape[:2], -1).astype(k.dtype)

    keys, values = put(cache["key"], k), put(cache["value"], v)
    return all_of(keys), all_of(values), {"cache": {**cache, "key": keys, "value": values}}
