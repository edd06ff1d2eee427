"""From a configuration to its task, whose classes may be those of the training data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer.config import (
    CausalLMConfig,
    Config,
    ConfigError,
    ImageClassificationConfig,
    MaskedLMConfig,
    QuestionAnsweringConfig,
    TextClassificationConfig,
    TokenClassificationConfig,
)
from jaxtransfer.data import tagged
from jaxtransfer.data.dataset import DataError, Dataset
from jaxtransfer.data.processor import ImageProcessor
from jaxtransfer.tasks import (
    Task,
    causal_lm,
    image_classification,
    masked_lm,
    question_answering,
    text_classification,
    token_classification,
)
from jaxtransfer.types import Source


def described(config: Config, source: Source, processor: Any) -> Source:
    """The source with what its files have to say of the run: how images are prepared, if labels exclude each other."""
    raw = {key: value for key, value in source.assets.get("config", {}).items() if key != "problem_type"}
    if isinstance(config.task, ImageClassificationConfig) and config.task.multi_label:
        raw["problem_type"] = "multi_label_classification"
    known = {"processor": processor} if isinstance(processor, ImageProcessor) else {}
    return dataclasses.replace(source, assets={**source.assets, "config": raw, **known})


def columns_of(config: Config) -> tuple[str, ...]:
    """The columns that the configuration's task reads of its data."""
    task = config.task
    if isinstance(task, CausalLMConfig):
        return _causal(task).columns
    if isinstance(task, MaskedLMConfig):
        return ("text",)
    if isinstance(task, TokenClassificationConfig):
        return ("tokens", "tags")
    if isinstance(task, QuestionAnsweringConfig):
        return ("question", "context", "answers")
    return ("text" if isinstance(task, TextClassificationConfig) else "image", "label")


def make_task(config: Config, train: Dataset | None, labels: Sequence[str] = ()) -> Task:
    """The task of a configuration.

    Args:
      config: the configuration.
      train: the training data, whose labels are the classes where the configuration names none; None for a model that
        is trained already.
      labels: the classes of such a model.

    Raises:
      ConfigError: options that exclude each other; DataError: training data of one class.
    """
    task = config.task
    try:
        if isinstance(task, CausalLMConfig):
            return _causal(task)
        if isinstance(task, MaskedLMConfig):
            return masked_lm(
                max_length=task.max_length, mask_rate=task.mask_rate, fresh_head=task.head == "fresh"
            )  # fmt: skip
        if isinstance(task, QuestionAnsweringConfig):
            return question_answering(
                max_length=task.max_length, stride=task.stride, max_answer=task.max_answer,
                unanswerable=task.unanswerable, fresh_head=task.head == "fresh",
            )  # fmt: skip
        classes = tuple(labels) or task.labels or _classes(config, train)
        if isinstance(task, TextClassificationConfig):
            return text_classification(
                classes, max_length=task.max_length, label_smoothing=task.label_smoothing, pooling=task.pooling,
                fresh_head=task.head == "fresh",
            )  # fmt: skip
        if isinstance(task, TokenClassificationConfig):
            return token_classification(
                classes, max_length=task.max_length, label_smoothing=task.label_smoothing,
                fresh_head=task.head == "fresh",
            )  # fmt: skip
        return _images(task, classes, train)
    except (ConfigError, DataError):
        raise
    except ValueError as error:
        raise ConfigError(f"task.{error}", "task") from None


def _causal(task: CausalLMConfig) -> Task:
    return causal_lm(
        max_length=task.max_length, packing=task.packing, completion_only=task.completion_only, chat=task.chat,
        chat_template=task.chat_template, long=task.long, label_smoothing=task.label_smoothing, z_loss=task.z_loss,
    )  # fmt: skip


def _images(task: ImageClassificationConfig, classes: Sequence[str], train: Dataset | None) -> Task:
    weights, counts = task.class_weights if train is not None else None, None  # of the training loss alone
    if train is not None and weights == "balanced":
        if task.multi_label:
            counts = train.multi_hot("label", classes).sum(0).astype(int).tolist()
        else:
            counts = np.bincount(train.class_ids("label", classes), minlength=len(classes)).tolist()
    return image_classification(
        classes, multi_label=task.multi_label, size=task.size, channels=task.channels, mean=task.mean, std=task.std,
        augment=task.augment, on_bad=task.on_bad, label_smoothing=task.label_smoothing, class_weights=weights,
        counts=counts, examples=None if train is None else len(train), mixup=task.mixup, pooling=task.pooling,
        fresh_head=task.head == "fresh",
    )  # fmt: skip


def _classes(config: Config, train: Dataset | None) -> tuple[str, ...]:
    several = isinstance(config.task, ImageClassificationConfig) and config.task.multi_label
    if train is None:
        found = ()
    elif isinstance(config.task, TokenClassificationConfig):
        found = tagged.names(train)
    else:
        found = train.classes("label", multi_label=several)
    if len(found) < 2:
        path = config.data.train.path
        raise DataError(f"{path}: has the one label {', '.join(found)}; a classifier needs two or more")
    return found
