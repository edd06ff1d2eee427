"""What episodes and pairs are drawn from, and the endless stream of batches that a draw by position makes."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.data.examples import Batch, Examples, collate
from jaxtransfer.data.text import bucket_lengths


class FewShotError(ValueError):
    """Examples, labels, a model or a setting that few-shot or zero-shot transfer refuses; the message names it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Members:
    """Examples by class.

    Attributes:
      names: (C,) the labels that occur, sorted.
      order: (N,) the examples, class by class.
      starts: (C + 1,) where each class begins in ``order``.
    """

    names: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """(C,) how many examples each class has."""
        return np.diff(self.starts)

    def digest(self) -> str:
        """SHA-256 of which example is of which class."""
        return hashlib.sha256(self.order.astype("<i8").tobytes() + self.starts.astype("<i8").tobytes()).hexdigest()


def members(labels: ArrayLike, least: int, use: str) -> Members:
    """The examples of each class.

    Args:
      labels: (N,) integers, not necessarily from 0 on.
      least: examples that every class must have.
      use: what they are drawn for, for the message.

    Raises:
      FewShotError: labels that are no integers, a single class, or one with too few examples.

    Example:
      >>> members([7, 3, 7], 1, "episodes").order.tolist()
      [1, 0, 2]
    """
    y = np.asarray(labels)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise FewShotError(f"{use}: labels must be (N,) integers, got {y.dtype} of shape {y.shape}")
    names, counts = np.unique(y, return_counts=True)
    if len(names) < 2:
        raise FewShotError(f"{use}: {len(y)} examples of {len(names)} class; there is nothing to tell apart")
    if counts.min() < least:
        few = [f"class {name} has {count}" for name, count in zip(names, counts, strict=True) if count < least]
        raise FewShotError(f"{use}: every class needs {least} examples; {', '.join(few[:6])} ({len(few)} such classes)")
    return Members(names, np.argsort(y, kind="stable"), np.concatenate([[0], np.cumsum(counts)]))


class Stream:
    """Batches without end, each a function of its position: what `fit` takes, and goes on with exactly.

    Args:
      batch: ``batch(position) -> arrays``.
      identity: what the batches depend on besides; a saved position counts in no other stream.
    """

    def __init__(self, batch: Callable[[int], Batch], identity: Sequence[Any]) -> None:
        self.batch, self.position = batch, 0
        self._identity = hashlib.sha256(repr(tuple(identity)).encode()).hexdigest()

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        made = self.batch(self.position)
        self.position += 1
        return made

    def state(self) -> dict[str, Any]:
        """The position, and the identity of the stream that it counts in; plain values for JSON."""
        return {"position": self.position, "schedule": self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state` was taken.

        Raises:
          FewShotError: the state is another stream's.
        """
        if state["schedule"] != self._identity:
            raise FewShotError(
                f"the saved position counts in stream {state['schedule'][:12]}, this is {self._identity[:12]}: "
                "examples, labels, sizes, buckets or seed have changed"
            )
        self.position = int(state["position"])


def rows(examples: Examples, index: np.ndarray, buckets: Sequence[int]) -> Batch:
    """Some examples as one batch, padded to the smallest bucket that holds them all.

    Raises:
      DataError: as `bucket_lengths`.
    """
    length = int(bucket_lengths(examples.lengths[index].max(), buckets)) if examples.ragged else 0
    return collate(examples, index, length)
