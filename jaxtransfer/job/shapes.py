"""The shapes of a run's batches, without its data."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtransfer.config import (
    CausalLMConfig,
    Config,
    ConfigError,
    ImageClassificationConfig,
    MaskedLMConfig,
    QuestionAnsweringConfig,
    TokenClassificationConfig,
)
from jaxtransfer.data.examples import Examples, collate
from jaxtransfer.data.images import Images
from jaxtransfer.data.packing import pack
from jaxtransfer.tasks import Task
from jaxtransfer.types import Source

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def batch_of(config: Config, task: Task, trunk: Source) -> Shapes:
    """The shapes of a batch of the longest bucket: what the loader would collate, of one made-up example."""
    how = config.task
    one = np.zeros(1, np.int32)
    if isinstance(how, ImageClassificationConfig):
        labels = np.zeros((1, len(task.head.labels)), np.float32) if how.multi_label else one
        processor = task.processor(trunk)
        if processor.size is None:
            raise ConfigError("task.size: the model fixes no size of images; set one", "task.size")
        examples = Examples(fixed={"labels": labels}, lazy=Images([None], processor, None, ""))
        found = collate(examples, np.array([-1]), 0)
    else:
        examples = _texts(how, config.buckets[-1], one)
        found = collate(examples, np.array([0]), config.buckets[-1])
    rows = config.data.batch
    return {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in found.items()}


def _texts(how: Any, length: int, one: np.ndarray) -> Examples:
    tokens = np.zeros(length, np.int32)
    if isinstance(how, MaskedLMConfig):
        whole = {"mask_token": one, "vocabulary": one, "document": one}
        return Examples(ragged={"input_ids": [tokens], "targets": [tokens]}, fixed=whole)
    if isinstance(how, TokenClassificationConfig):
        words = {"input_ids": [tokens], "words": [tokens], "labels": [tokens]}
        return Examples(ragged=words, fixed={"sentence": one})
    if isinstance(how, QuestionAnsweringConfig):
        spans = {name: one for name in ("row", "start_positions", "end_positions")}
        return Examples(ragged={"input_ids": [tokens], "offsets": [np.zeros((length, 2), np.int32)]}, fixed=spans)
    if not isinstance(how, CausalLMConfig):
        return Examples(ragged={"input_ids": [tokens]}, fixed={"labels": one})
    fields = {"input_ids": [tokens], "labels": [tokens]}
    if how.packing:
        fields = {name: list(rows) for name, rows in pack(fields, [[0]], length, {}).items()}
    return Examples(ragged=fields, fixed={"bytes": one, "document": one})
