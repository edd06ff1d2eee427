"""What must fit together before work starts: task and metric, data and model, batch and devices, budgets and data."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.adapt import heads
from jaxtransfer.config import Config, ConfigError, MaskedLMConfig, MeshConfig
from jaxtransfer.config.decode import nearest
from jaxtransfer.data.dataset import DataError, Dataset
from jaxtransfer.data.loader import Examples
from jaxtransfer.job.meshes import check_rows
from jaxtransfer.job.optimization import UNTIE
from jaxtransfer.models import apply
from jaxtransfer.tasks import Task
from jaxtransfer.tree.paths import flatten
from jaxtransfer.types import Model, Source


def check_task(config: Config, task: Task) -> None:
    """The metric is one of the task's, and only what keeps its head can be asked what it forgets."""
    metric = config.run.metric
    if metric is not None and metric not in task.metric_names:
        near = nearest(metric, task.metric_names)
        known = ", ".join(task.metric_names)
        raise ConfigError(f"run.metric: {task.name} is not measured by {metric!r}{near}; known: {known}", "run.metric")
    if config.data.replay is not None and isinstance(config.task, MaskedLMConfig):
        told = "data.replay: masked-lm hides tokens of the training data alone; read both as one, by a pattern of paths"
        raise ConfigError(told, "data.replay")
    if config.data.retain is not None and task.fresh_head:
        raise ConfigError(
            f"data.retain: {task.name} puts a fresh head on its source, so there is no measure from before; it is for "
            "tasks that keep the source's head, such as causal-lm", "data.retain",
        )  # fmt: skip


def check_vocabulary(examples: Mapping[str, Examples], model: Model) -> None:
    """A token beyond the model's vocabulary would be read as another one."""
    for split, rows in examples.items():
        if (ids := {**rows.ragged, **rows.fixed}.get("input_ids")) is None:
            continue
        top, size = max(int(np.max(row)) for row in ids), model.config.vocab_size
        if top >= size:
            raise DataError(f"{split}: token {top} is beyond the vocabulary of {size}; another model's tokenizer?")


def check_shapes(config: Config, mesh: MeshConfig, source: Source, training: Examples) -> None:
    """The longest text or the images must fit the model, and a batch divide into microbatches and over devices."""
    if training.lazy is None:
        ids = jax.ShapeDtypeStruct((1, config.buckets[-1]), jnp.int32)
        field, batch = "task.max_length", {"input_ids": ids, "attention_mask": ids}
    else:
        made = training.lazy.padding
        field = "task.size"
        batch = {name: jax.ShapeDtypeStruct((1, *row.shape), row.dtype) for name, row in made.items()}
    try:
        jax.eval_shape(partial(apply, source.model), source.params, batch)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}", field) from None
    check_rows(dataclasses.asdict(mesh), config.data.batch, config.run.accumulate)


def check_tied(model: Model, labels: Any) -> None:
    """A head that trains must not read an embedding that is frozen."""
    try:
        heads.check_tied(model, flatten(labels))
    except ValueError as error:
        raise ConfigError(f"adapt: {error}{UNTIE}", "adapt") from None


def check_budgets(config: Config, task: Task, train: Dataset) -> None:
    """Every budget of the study must be there, in every class."""
    budgets = config.study.budgets if config.study is not None else None
    if budgets is None:
        return
    classes = class_numbers(task, train)
    counts = [len(train)] if classes is None else np.bincount(classes, minlength=len(task.head.labels)).tolist()
    where = int(np.argmin(counts))
    if budgets[-1] > counts[where]:
        what = "" if classes is None else f" of {task.head.labels[where]!r}"
        raise ConfigError(
            f"study.budgets: {budgets[-1]} examples{what} are wanted, {train.path} has {counts[where]}", "study.budgets"
        )


def class_numbers(task: Task, dataset: Dataset) -> np.ndarray | None:
    """The class of each row, (N,); None where rows have none, or several."""
    if not task.single_label:
        return None
    return dataset.class_ids(task.columns[-1], task.head.labels)
