"""Text classification: one label for each text."""

from collections.abc import Sequence
from typing import Any

from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.loader import Examples
from jaxtransfer.data.text import encode, tokenizer
from jaxtransfer.objectives.losses import cross_entropy
from jaxtransfer.tasks.metrics import classification
from jaxtransfer.tasks.predictions import different, likeliest
from jaxtransfer.tasks.task import Task, logits_and_labels
from jaxtransfer.types import Head


def text_classification(
    labels: Sequence[str],
    *,
    max_length: int = 128,
    label_smoothing: float = 0.0,
    pooling: str | None = None,
    fresh_head: bool = True,
) -> Task:
    """The task of telling texts apart by label; reads the columns ``text`` and ``label``.

    Args:
      labels: the classes in the order of the logits: ``dataset.classes("label")``, or names for those that the data
        numbers.
      max_length: tokens kept of each text, the special ones included.
      label_smoothing: of the training loss, in [0, 1).
      pooling: None for the family's own, ``"mean"`` for the mean over unmasked positions.
      fresh_head: whether the source gets a new head, or goes on with its own.

    Raises:
      ValueError: fewer than two labels, one twice, or an option out of range.

    Example:
      >>> task = text_classification(["bad", "good"])
      >>> task.head.labels
      ('bad', 'good')
    """
    labels = different(labels)

    def prepare(processor: Any, dataset: Dataset, *, train: bool) -> Examples:
        target = "label" in dataset.columns
        fixed = {"labels": dataset.class_ids("label", labels)} if target else {}  # refuse before the long work
        encoded = encode(dataset.strings("text"), processor, max_length)
        notes = dataset.notes
        if encoded.truncated:
            cut = f"{encoded.truncated} of {len(dataset)} texts cut to {max_length} tokens"
            notes = (*notes, f"{dataset.path}: {cut}")
        return Examples(ragged=encoded.fields, fixed=fixed, pad=encoded.pad, notes=notes)

    return Task(
        name="text-classification",
        columns=("text", "label"),
        head=Head("sequence-classification", labels, pooling),
        processor=tokenizer,
        prepare=prepare,
        objective=cross_entropy(label_smoothing),
        observe=logits_and_labels,
        metrics=lambda observed: classification(observed["logits"], observed["labels"]),
        decode=lambda observed: likeliest(observed["logits"], labels),
        fresh_head=fresh_head,
        single_label=True,
    )
