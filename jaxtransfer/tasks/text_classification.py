"""Text classification: one label for each text."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.loader import Examples
from jaxtransfer.data.text import encode
from jaxtransfer.objectives.losses import cross_entropy
from jaxtransfer.tasks.metrics import classification, softmax
from jaxtransfer.tasks.task import Task
from jaxtransfer.types import Head


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest label, its probability, and the probabilities of all."""

    label: str
    probability: float
    probabilities: Mapping[str, float]


def text_classification(
    labels: Sequence[str], *, max_length: int = 128, label_smoothing: float = 0.0, pooling: str | None = None
) -> Task:
    """The task of telling texts apart by label; reads the columns ``text`` and ``label``.

    Args:
      labels: the classes in the order of the logits: ``dataset.classes("label")``, or names for those that the data
        numbers.
      max_length: tokens kept of each text, the special ones included.
      label_smoothing: of the training loss, in [0, 1).
      pooling: None for the family's own, ``"mean"`` for the mean over unmasked positions.

    Raises:
      ValueError: fewer than two labels, one twice, or an option out of range.

    Example:
      >>> task = text_classification(["bad", "good"])
      >>> task.decode(np.array([[0.0, 3.0]]))[0].label
      'good'
    """
    labels = tuple(labels)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"labels: must be two or more different names, got {list(labels)}")

    def prepare(tokenizer: Any, dataset: Dataset) -> Examples:
        target = "label" in dataset.columns
        fixed = {"labels": dataset.class_ids("label", labels)} if target else {}  # refuse before the long work
        encoded = encode(dataset.strings("text"), tokenizer, max_length)
        notes = dataset.notes
        if encoded.truncated:
            cut = f"{encoded.truncated} of {len(dataset)} texts cut to {max_length} tokens"
            notes = (*notes, f"{dataset.path}: {cut}")
        return Examples(ragged=encoded.fields, fixed=fixed, pad=encoded.pad, notes=notes)

    def decode(logits: np.ndarray) -> list[Prediction]:
        rows = softmax(logits)
        found = [dict(zip(labels, map(float, row), strict=True)) for row in rows]
        return [Prediction(labels[i], row[labels[i]], row) for i, row in zip(rows.argmax(-1), found, strict=True)]

    return Task(
        name="text-classification",
        columns=("text", "label"),
        head=Head("sequence-classification", labels, pooling),
        prepare=prepare,
        objective=cross_entropy(label_smoothing),
        metrics=classification,
        decode=decode,
    )
