"""What a classifier says of an example; ``record`` is that in JSON, of the input as it was given."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtransfer.data.tagged import split_words
from jaxtransfer.tasks.metrics import softmax


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest label, its probability, and the probabilities of all."""

    label: str
    probability: float
    probabilities: Mapping[str, float]

    def record(self, given: str) -> dict[str, Any]:
        """The label and its probability."""
        return {"label": self.label, "probability": self.probability}


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """The labels of a probability above 0.5, maybe none, and the probabilities of all."""

    labels: tuple[str, ...]
    probabilities: Mapping[str, float]

    def record(self, given: str) -> dict[str, Any]:
        """The labels, and the probabilities of all."""
        return {"labels": list(self.labels), "probabilities": dict(self.probabilities)}


@dataclasses.dataclass(frozen=True)
class Answer:
    """Characters ``[start, stop)`` of a context, and its probability; an empty text where there is no answer."""

    text: str
    start: int
    stop: int
    probability: float

    def record(self, given: str) -> dict[str, Any]:
        """The answer and where it stands."""
        return {"answer": self.text, "start": self.start, "stop": self.stop, "probability": self.probability}


@dataclasses.dataclass(frozen=True)
class Entity:
    """Words ``[start, stop)`` of one type; the probability is that of its least sure tag."""

    label: str
    start: int
    stop: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Tagged:
    """The likeliest tag of each word, its probability, and the entities that tags mark: None where they mark none."""

    tags: tuple[str, ...]
    probabilities: tuple[float, ...]
    entities: tuple[Entity, ...] | None

    def record(self, given: str) -> dict[str, Any]:
        """Entities or tags, each with its characters ``[start, stop)`` in the text, that `split_words` splits."""
        spans = split_words(given)
        if self.entities is not None:
            found = [(e.label, spans[e.start][0], spans[e.stop - 1][1], e.probability) for e in self.entities]
        else:
            found = [(tag, *span, p) for tag, span, p in zip(self.tags, spans, self.probabilities, strict=True)]
        rows = [
            {"label": label, "text": given[start:stop], "start": start, "stop": stop, "probability": p}
            for label, start, stop, p in found
        ]
        return {"tags" if self.entities is None else "entities": rows}


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
