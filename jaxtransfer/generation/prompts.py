"""Prompts as a batch: padded on the left, checked, of few static lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class GenerationError(ValueError):
    """A model, a prompt or an option that generation refuses, before anything is compiled."""


def left_pad(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as one batch: ``(input_ids, attention_mask)``, both (B, T) int32.

    Raises:
      GenerationError: no prompt, or one without tokens.

    Example:
      >>> left_pad([[5, 6, 7], [8]], pad=0)[0].tolist()
      [[5, 6, 7], [0, 0, 8]]
    """
    lengths = [len(row) for row in rows]
    if not lengths or not all(lengths):
        raise GenerationError(f"left_pad: every prompt needs a token, found lengths {lengths}")
    ids = np.full((len(rows), max(lengths)), pad, np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    return ids, mask


def prepare(input_ids: Any, attention_mask: Any, new: int, *, vocabulary: int, limit: int) -> dict[str, np.ndarray]:
    """The batch of the prefill: ``input_ids``, ``attention_mask``, ``position_ids``, each (B, `bucket` of T) int32.

    Args:
      input_ids: (B, T), padded on the left.
      attention_mask: (B, T), 0 at padding; None where there is none.
      new: how many tokens shall follow.
      vocabulary: the model's number of tokens.
      limit: the model's number of positions.

    Raises:
      GenerationError: shapes or dtypes that do not fit, padding on the right, holes, an empty row, a token outside the
        vocabulary, or more tokens than positions.
    """
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise GenerationError(f"input_ids: expected integers of shape (B, T), found {ids.dtype} of {ids.shape}")
    if mask.shape != ids.shape:
        raise GenerationError(f"attention_mask: is of shape {mask.shape}, input_ids of {ids.shape}")
    if not (leading := mask[:, -1] & (mask[:, :-1] <= mask[:, 1:]).all(axis=1)).all():
        row = int(np.argmin(leading))
        raise GenerationError(
            f"attention_mask: row {row} is empty, has a hole or is padded on the right; pad on the left, with left_pad"
        )
    if len(outside := np.argwhere(mask & ((ids < 0) | (ids >= vocabulary)))):
        row, column = outside[0]
        raise GenerationError(
            f"input_ids: token {ids[row, column]} in row {row} is outside the model's vocabulary of {vocabulary}"
        )
    longest = int(mask.sum(axis=1).max())
    if new < 1:
        raise GenerationError(f"max_new_tokens: {new} is not at least 1")
    if longest + new > limit:
        raise GenerationError(
            f"max_new_tokens: {new} after a prompt of {longest} exceed the model's {limit} positions; "
            "ask for fewer, or cut the prompt"
        )
    room = min(bucket(longest), limit - new) - longest
    ids, mask = (np.pad(x[:, -longest:], ((0, 0), (room, 0))).astype(np.int32) for x in (np.where(mask, ids, 0), mask))
    positions = np.maximum(mask.cumsum(axis=1, dtype=np.int32) - 1, 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def bucket(length: int) -> int:
    """The length that prompts of this length are padded to: multiples of 16, then four to eight an octave.

    Example:
      >>> [bucket(length) for length in (1, 17, 129, 1000)]
      [16, 32, 160, 1024]
    """
    step = max(16, 2 ** (length.bit_length() - 3))
    return -(-length // step) * step
