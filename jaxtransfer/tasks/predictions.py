"""What a classifier says of an example."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtransfer.tasks.metrics import softmax


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest label, its probability, and the probabilities of all."""

    label: str
    probability: float
    probabilities: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """The labels of a probability above 0.5, maybe none, and the probabilities of all."""

    labels: tuple[str, ...]
    probabilities: Mapping[str, float]


def likeliest(logits: np.ndarray, labels: Sequence[str]) -> list[Prediction]:
    """The one label of each of (N, C) logits.

    Example:
      >>> likeliest(np.array([[0.0, 3.0]]), ["bad", "good"])[0].label
      'good'
    """
    rows = softmax(logits)
    found = [dict(zip(labels, map(float, row), strict=True)) for row in rows]
    first = [labels[int(i)] for i in rows.argmax(-1)]
    return [Prediction(label, row[label], row) for label, row in zip(first, found, strict=True)]


def above_half(logits: np.ndarray, labels: Sequence[str]) -> list[LabelSet]:
    """The labels of each of (N, C) logits, decided one by one.

    Example:
      >>> above_half(np.array([[0.1, -2.0, 3.0]]), ["a", "b", "c"])[0].labels
      ('a', 'c')
    """
    rows = np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))
    found = [dict(zip(labels, map(float, row), strict=True)) for row in rows]
    return [LabelSet(tuple(name for name in labels if row[name] > 0.5), row) for row in found]


def different(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels of a classifier.

    Raises:
      ValueError: fewer than two, or one twice.
    """
    labels = tuple(labels)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"labels: must be two or more different names, got {list(labels)}")
    return labels
