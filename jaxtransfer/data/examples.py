"""Examples ready for a model, by field, and the batch that some of them make."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxtransfer.data.dataset import DataError

Batch = dict[str, np.ndarray]


class Lazy(Protocol):
    """Fields of examples that are made when their batch is: images, decoded and augmented.

    A row depends on its example and its key alone, never on the batch or the process that it is made in.
    """

    @property
    def padding(self) -> Mapping[str, np.ndarray]:
        """The fields of a padding row; all rows have their dtypes and shapes, ragged ones but for the first axis."""
        ...

    @property
    def ragged(self) -> Collection[str]:
        """The fields of one row a token, (T_i, ...), which are padded with zeros to the length of their batch."""
        ...

    @property
    def random(self) -> bool:
        """Whether the rows of an example differ from key to key."""
        ...

    def __len__(self) -> int:
        """N."""
        ...

    def __call__(self, index: int, key: Sequence[int]) -> Mapping[str, np.ndarray]:
        """The fields of one example; ``key`` is ``(seed, epoch)``, whatever is random follows from it and the index."""
        ...

    def digest(self) -> str:
        """SHA-256 of all that the rows depend on, without making them."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples ready for a model, by field.

    Attributes:
      ragged: field -> one array (T_i, ...) per example, padded to the length of its batch: ``input_ids``.
      fixed: field -> an array (N, ...) of one row per example: ``labels``.
      lazy: further fields, made when their batch is; prefetched by threads.
      pad: the value that a ragged field is padded with, 0 by default.
      notes: what the preparation did to the data, for the log.
      aside: field -> (N,) objects of what is known of each example, no part of any batch: its words, its answers.
      kept: (N,) the row of the data set that each example comes from; None: one of each, in order.
    """

    ragged: Mapping[str, Sequence[np.ndarray]] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    lazy: Lazy | None = None
    pad: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    aside: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    kept: np.ndarray | None = None

    def __post_init__(self) -> None:
        sizes = {name: len(rows) for name, rows in {**self.ragged, **self.fixed, **self.aside}.items()}
        if self.lazy is not None:
            sizes |= dict.fromkeys(self.lazy.padding, len(self.lazy))
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise DataError(f"examples: every field needs the same number of rows, at least one; got {sizes}")

    def __len__(self) -> int:
        return len(next(iter({**self.ragged, **self.fixed}.values()), self.lazy or ()))

    def without(self, field: str) -> "Examples":
        """The same examples without a field; as they are where they have none of this name."""
        ragged, fixed = ({n: x for n, x in fields.items() if n != field} for fields in (self.ragged, self.fixed))
        return dataclasses.replace(self, ragged=ragged, fixed=fixed)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64: the length of each example, that of its longest ragged field; 0 where there is none."""
        rows = [[len(row) for row in field] for field in self.ragged.values()]
        return np.max(rows, axis=0) if rows else np.zeros(len(self), np.int64)

    def digest(self) -> str:
        """SHA-256 of all fields."""
        sha = hashlib.sha256()
        for name, rows in sorted({**self.ragged, **{name: [array] for name, array in self.fixed.items()}}.items()):
            sha.update(f"{name}|{self.pad.get(name, 0)}|".encode())
            for row in rows:
                sha.update(f"{row.dtype}{row.shape}".encode() + np.ascontiguousarray(row).data)
        if self.lazy is not None:
            sha.update(self.lazy.digest().encode())
        return sha.hexdigest()


def objects(values: Sequence[Any]) -> np.ndarray:
    """(N,) of dtype object, whatever the values are, for `Examples.aside`.

    Example:
      >>> objects([["two", "words"], ["and", "two"]]).shape
      (2,)
    """
    out = np.empty(len(values), object)
    for i, value in enumerate(values):  # at once, rows of one length would be columns
        out[i] = value
    return out


def collate(
    examples: Examples,
    index: np.ndarray,
    length: int,
    key: Sequence[int] = (0, 0),
    shown: np.ndarray | None = None,
) -> Batch:
    """One batch: ragged fields padded to ``length``; where ``index`` is -1 a row of padding with weight 0.

    Args:
      examples: N of them.
      index: (B,) positions of the examples, -1 on padding rows.
      length: T.
      key: ``(seed, epoch)``, for what is random in lazy fields.
      shown: (B,) the examples whose lazy fields the rows hold, where padding rows do not hold zeros.

    Returns:
      The examples' fields, ``attention_mask`` (B, T) int32 where there are ragged ones, ``weight`` (B,) float32 and
      ``index`` (B,) int32. The mask of a padding row holds one position, for a softmax over none is no number.
    """
    real, out = index >= 0, {}
    for name, rows in examples.ragged.items():
        block = np.full((len(index), length, *rows[0].shape[1:]), examples.pad.get(name, 0), rows[0].dtype)
        for row in np.flatnonzero(real):
            values = rows[index[row]]
            block[row, : len(values)] = values
        out[name] = block
    if out:
        lengths = [max(len(rows[i]) for rows in examples.ragged.values()) if i >= 0 else 1 for i in index]
        out["attention_mask"] = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int32)
    for name, array in examples.fixed.items():
        out[name] = array[index]  # a copy
        out[name][~real] = 0
    if (lazy := examples.lazy) is not None:
        made = [lazy(int(i), key) if i >= 0 else lazy.padding for i in (index if shown is None else shown)]
        for name in lazy.padding:
            rows = [row[name] for row in made]
            out[name] = _padded(rows, length) if name in lazy.ragged else np.stack(rows)
    return out | {"weight": real.astype(np.float32), "index": index.astype(np.int32)}


def _padded(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Rows (T_i, ...) as one block (B, T, ...), zeros behind them."""
    block = np.zeros((len(rows), length, *rows[0].shape[1:]), rows[0].dtype)
    for row, values in zip(block, rows, strict=True):
        row[: len(values)] = values
    return block
