"""Extractive question answering: the part of a text that answers a question."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.data import answers as data
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.examples import Examples, objects
from jaxtransfer.data.text import tokenizer
from jaxtransfer.objectives.spans import span_cross_entropy, span_losses
from jaxtransfer.tasks.metrics_answers import answered, answering, expected, is_right
from jaxtransfer.tasks.task import Observed, Task
from jaxtransfer.types import Head

_FIELDS = ("start_positions", "end_positions")


def question_answering(
    *,
    max_length: int = 384,
    stride: int = 128,
    max_answer: int = 30,
    unanswerable: bool = False,
    fresh_head: bool = True,
) -> Task:
    """The task of finding answers in texts; reads the columns ``question``, ``context`` and ``answers``.

    ``loss = (CE(start) + CE(end)) / 2``, see `objectives.span_cross_entropy`. A context that is too long is read in
    windows that overlap; one that does not hold the whole answer is taught to point at its first token, as is a
    question without an answer. The answer is the span of the highest ``z_start + z_end`` over all windows, of at most
    ``max_answer`` tokens of the context (Devlin et al. 2019, arXiv:1810.04805, section 4.2).

    Args:
      max_length: tokens of a window, the question and the special ones included.
      stride: tokens of the context that a window repeats of the one before.
      max_answer: tokens of an answer.
      unanswerable: whether a question may have no answer in its context, as in SQuAD 2.
      fresh_head: whether the source gets a new head, or goes on with its own.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> question_answering().columns, question_answering().metric_names
      (('question', 'context', 'answers'), ('f1', 'exact_match', 'loss'))
    """
    for name, value, least in (("max_length", max_length, 1), ("stride", stride, 0), ("max_answer", max_answer, 1)):
        if value < least:
            raise ValueError(f"{name}: must be at least {least}, got {value}")

    def prepare(processor: Any, dataset: Dataset, *, train: bool) -> Examples:
        known = "answers" in dataset.columns
        true = data.answers(dataset, unanswerable=unanswerable) if known else None  # refuse before the long work
        found = data.encode(dataset, processor, max_length, stride)
        count, notes = len(found.question), dataset.notes
        fixed: dict[str, np.ndarray] = {"row": found.question}
        aside = {name: [dataset[i][name] for i in found.question] for name in ("question", "context")}
        if true is not None:
            first = [next(iter(true[i]), None) for i in found.question]
            placed = [data.positions(*each) for each in zip(found.offsets, first, strict=True)]
            fixed |= dict(zip(_FIELDS, np.array(placed, np.int32).T, strict=True))
            aside["answers"] = [true[i] for i in found.question]
        if count > len(dataset):
            split = f"{len(dataset)} questions read in {count} windows of up to {max_length} tokens"
            notes = (*notes, f"{dataset.path}: {split}")
        pad = {"input_ids": processor.pad_token_id or 0, "token_type_ids": processor.pad_token_type_id or 0}
        return Examples(
            ragged={**found.fields, "offsets": found.offsets}, fixed=fixed, notes=notes, kept=found.question,
            pad={name: pad[name] for name in found.fields},
            aside={name: objects(values) for name, values in aside.items()},
        )  # fmt: skip

    return Task(
        name="question-answering",
        columns=("question", "context", "answers"),
        head=Head("question-answering"),
        processor=tokenizer,
        prepare=prepare,
        objective=span_cross_entropy(),
        observe=partial(_observe, max_answer),
        metrics=lambda observed: answering(observed, unanswerable=unanswerable),
        metric_names=("f1", "exact_match", "loss"),
        metric="f1",
        mistakes=partial(_mistakes, unanswerable),
        decode=partial(answered, unanswerable=unanswerable),
        fresh_head=fresh_head,
    )


def _observe(max_answer: int, outputs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Of each window its best span, and what it takes to compare it with those of other windows."""
    start, end = (outputs[f"{name}_logits"].astype(jnp.float32) for name in ("start", "end"))
    offsets = jnp.asarray(batch["offsets"])
    inside, size = offsets[..., 1] > 0, start.shape[1]
    length = jnp.arange(size)[None, :] - jnp.arange(size)[:, None] + 1
    allowed = inside[:, :, None] & inside[:, None, :] & ((length >= 1) & (length <= max_answer))[None]
    scores = jnp.where(allowed, start[:, :, None] + end[:, None, :], -jnp.inf).reshape(len(start), -1)
    first, last = jnp.divmod(jnp.argmax(scores, axis=-1), size)
    rows = jnp.arange(len(start))
    found = {
        "row": jnp.asarray(batch["row"]),
        "start": offsets[rows, first, 0],
        "stop": offsets[rows, last, 1],
        "score": jnp.max(scores, axis=-1),
        "total": jax.nn.logsumexp(scores, axis=-1),
        "null": start[:, 0] + end[:, 0],
    }
    return found | ({"nll": span_losses(outputs, batch)[0]} if _FIELDS[0] in batch else {})


def _mistakes(unanswerable: bool, observed: Observed) -> list[dict[str, Any]]:
    found, true = answered(observed, unanswerable=unanswerable), expected(observed)
    _, first = np.unique(observed["row"], return_index=True)
    rows = [
        {
            "text": question,
            "label": texts[0] or "nothing",
            "predicted": each.text or "nothing",
            "probability": each.probability,
        }
        for question, texts, each in zip(observed["question"][first], true, found, strict=True)
        if not is_right(each, texts)
    ]
    return sorted(rows, key=lambda row: -row["probability"])
