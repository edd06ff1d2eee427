"""Packing: documents of many lengths into rows of one, each a segment that attends to itself alone.

All lengths are known, so a document goes where it fits best, the longest first; the same documents give the same rows.
"""

import bisect
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtransfer.data.dataset import DataError

Fields = Mapping[str, Sequence[np.ndarray]]


def plan(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which documents share a row: best-fit decreasing, which needs at most 11/9 of the fewest rows (Johnson 1973).

    Args:
      lengths: tokens of each document, at least 1.
      size: tokens of a row.

    Returns:
      The documents of each row, in order; each document occurs once.

    Raises:
      DataError: a document longer than a row, or of no tokens.

    Example:
      >>> plan([3, 8, 5, 2], 8)
      [[1], [0, 2], [3]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # the tokens left in each row and the row, sorted
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = lengths[document]
        if not 0 < need <= size:
            raise DataError(f"packing: document {document} has {need} tokens, a row holds 1 to {size}")
        tightest = bisect.bisect_left(room, (need, -1))
        if tightest < len(room):
            left, row = room.pop(tightest)
            rows[row].append(document)
        else:
            left, row = size, len(rows)
            rows.append([document])
        bisect.insort(room, (left - need, row))
    return [sorted(row) for row in rows]


def pack(fields: Fields, rows: Sequence[Sequence[int]], size: int, pad: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The documents of each row one after the other, and which is which.

    Args:
      fields: field -> (T_i,) of each document, the same lengths in every field.
      rows: from :func:`plan`.
      size: S, tokens of a row.
      pad: the value that fills a field up, 0 by default.

    Returns:
      The fields (N, S), ``segment_ids`` (N, S) int32, which count a row's documents from 1 and are 0 on padding, and
      ``position_ids`` (N, S) int32, which begin at 0 in each.

    Example:
      >>> ids = {"input_ids": [np.array([5, 6, 7]), np.array([8, 9])]}
      >>> {name: rows.tolist() for name, rows in pack(ids, [[0, 1]], 6, {}).items()}
      {'input_ids': [[5, 6, 7, 8, 9, 0]], 'segment_ids': [[1, 1, 1, 2, 2, 0]], 'position_ids': [[0, 1, 2, 0, 1, 0]]}
    """
    out = {name: np.full((len(rows), size), pad.get(name, 0), values[0].dtype) for name, values in fields.items()}
    segments, positions = (np.zeros((len(rows), size), np.int32) for _ in range(2))
    for row, documents in enumerate(rows):
        start = 0
        for segment, document in enumerate(documents, 1):
            for name, values in fields.items():
                stop = start + len(values[document])
                out[name][row, start:stop] = values[document]
            segments[row, start:stop], positions[row, start:stop] = segment, np.arange(stop - start)
            start = stop
    return {**out, "segment_ids": segments, "position_ids": positions}
