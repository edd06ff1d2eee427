"""The record that a task is."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.loader import Examples
from jaxtransfer.objectives.losses import Objective
from jaxtransfer.tasks.metrics import Metric
from jaxtransfer.types import Head, Source

Observed = Mapping[str, np.ndarray]
"""Of every example of an evaluation, in order: ``{"logits": (N, C), "labels": (N,)}``."""


class Prepare(Protocol):
    """Records into examples; without the target's column, for prediction, there are no ``labels``."""

    def __call__(self, processor: Any, dataset: Dataset, *, train: bool) -> Examples:
        """Examples to train on (augmented, packed), or to evaluate and predict."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a model learns, as functions; nothing else in the library knows one task from another.

    Attributes:
      name: ``"text-classification"``, ...
      columns: what it reads of a data set: the input first, the target last.
      head: what the model has to end in.
      fresh_head: whether a source gets a new head; otherwise it keeps the one that it was trained with.
      processor: ``processor(source)``: its tokenizer, or how its images are prepared.
      prepare: ``prepare(processor, dataset, train=...) -> Examples``.
      objective: ``objective(view) -> (loss, metrics)``.
      augment: ``augment(batch, key) -> batch``, on the device, in training; None where there is none.
      observe: ``observe(outputs, batch) -> {name: (B, ...)}``: what an evaluation keeps of every example; traced.
      metrics: ``metrics(observed) -> {name: Metric}`` over all examples of an evaluation.
      metric_names: the metrics that it gives, by one of which a run is chosen.
      minimize: the metrics of which less is better.
      metric: the metric that a run is chosen by where the configuration names none.
      decode: ``decode(observed) -> predictions``, one for each input; None where they are generated.
      breakdown: ``breakdown(observed) -> {what: {value: {name: Metric}}}``, such as by type; None where there is none.
      mistakes: ``mistakes(observed) -> [{"text", "label", "predicted", "probability"}]``, the most confident first,
        where it is not the one label of an example that can be wrong.
      single_label: whether each example has one of the head's labels.
      typed: from an input as it is typed to a value of the first column.
    """

    name: str
    columns: tuple[str, ...]
    head: Head
    processor: Callable[[Source], Any]
    prepare: Prepare
    objective: Objective
    observe: Callable[[Mapping[str, jax.Array], Mapping[str, Any]], Mapping[str, jax.Array]]
    metrics: Callable[[Observed], dict[str, Metric]]
    decode: Callable[[Observed], Sequence[Any]] | None
    metric_names: tuple[str, ...] = ("accuracy", "macro_f1", "loss")
    metric: str = "accuracy"
    minimize: frozenset[str] = frozenset({"loss"})
    fresh_head: bool = True
    breakdown: Callable[[Observed], Mapping[str, Mapping[str, Mapping[str, Metric]]]] | None = None
    mistakes: Callable[[Observed], Sequence[Mapping[str, Any]]] | None = None
    single_label: bool = False
    typed: Callable[[str], Any] = str
    augment: Callable[[Mapping[str, Any], jax.Array], Mapping[str, Any]] | None = None


def logits_and_labels(outputs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What a classifier's evaluation keeps: the logits, and the labels where there are any."""
    return {"logits": outputs["logits"], **({"labels": batch["labels"]} if "labels" in batch else {})}
