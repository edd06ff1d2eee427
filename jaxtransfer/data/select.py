"""Which of the rows that were read are used: no duplicates, some labels, a part of a permutation, so many of each."""

import collections
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import DataError, Row, label_of


def content(value: Any) -> str:
    r"""What makes two inputs the same: a text's words whatever their spacing, an image's bytes.

    Raises:
      DataError: a file that cannot be read.

    Example:
      >>> content(" so\n so ")
      'so so'
    """
    if isinstance(value, Path):
        try:
            value = value.read_bytes()
        except OSError as error:
            raise DataError(f"{value}: cannot be read: {error.strerror}") from None
    if isinstance(value, np.ndarray):
        value = f"{value.dtype}{value.shape}".encode() + value.tobytes()
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else " ".join(str(value).split())


def unique(rows: list[Row], column: str) -> list[Row]:
    """The rows whose input did not occur before."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(content(row.values[column]), row)
    return list(first.values())


def without(rows: list[Row], others: Sequence[Row], column: str) -> list[Row]:
    """The rows whose input does not occur in others."""
    seen = {content(row.values[column]) for row in others}
    return [row for row in rows if content(row.values[column]) not in seen]


def only(rows: list[Row], labels: Sequence[str], path: str) -> list[Row]:
    """The rows of some labels.

    Raises:
      DataError: no row has one of the labels.
    """
    known = collections.Counter(label_of(row, "label") for row in rows)
    if absent := [label for label in labels if label not in known]:
        raise DataError(f"{path}: only: no row has the label {absent[0]!r}; there are {', '.join(sorted(known))}")
    return [row for row in rows if label_of(row, "label") in labels]


def permuted(rows: list[Row], split: tuple[int, int] | None, seed: int, path: str) -> list[Row]:
    """Rows ``[start, stop)`` of the permutation; all of it without a split.

    Raises:
      DataError: a split that reaches beyond the rows.
    """
    start, stop = split or (0, len(rows))
    if stop > len(rows):
        raise DataError(f"{path}: split {[start, stop]} reaches beyond its {len(rows)} rows")
    order = np.random.RandomState(seed).permutation(len(rows))
    return [rows[i] for i in order[start:stop]]


def per_class(rows: list[Row], count: int, path: str) -> list[Row]:
    """The first ``count`` rows of each label.

    Raises:
      DataError: a label with fewer.
    """
    taken: dict[str, list[Row]] = {}
    for row in rows:
        taken.setdefault(label_of(row, "label"), []).append(row)
    for label, found in sorted(taken.items()):
        if len(found) < count:
            raise DataError(f"{path}: per_class: {count} rows of {label!r} are wanted, there are {len(found)}")
    kept = {id(row) for found in taken.values() for row in found[:count]}
    return [row for row in rows if id(row) in kept]
