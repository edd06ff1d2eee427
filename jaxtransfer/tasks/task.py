"""The record that a task is."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.loader import Examples
from jaxtransfer.objectives.losses import Objective
from jaxtransfer.tasks.metrics import Metric
from jaxtransfer.types import Head


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model learns, as functions; nothing else in the library knows one task from another.

    Attributes:
      name: ``"text-classification"``, ...
      columns: what it reads of a data set: the input first, the target last.
      head: what the model has to end in.
      prepare: ``prepare(tokenizer, dataset) -> Examples``; without the target's column, for prediction, no ``labels``.
      objective: ``objective(view) -> (loss, metrics)``.
      metrics: ``metrics(logits, labels) -> {name: Metric}``, over all examples of an evaluation.
      decode: ``decode(logits) -> predictions``, one for each example.
    """

    name: str
    columns: tuple[str, ...]
    head: Head
    prepare: Callable[[Any, Dataset], Examples]
    objective: Objective
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, Metric]]
    decode: Callable[[np.ndarray], Sequence[Any]]
