"""Causal language modelling: each token from those before it, in texts, in completions, in an assistant's turns."""

from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.data.chat import chats
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.documents import Document, Long, completions, fit, plain
from jaxtransfer.data.loader import Examples
from jaxtransfer.data.packing import pack, plan
from jaxtransfer.data.text import tokenizer
from jaxtransfer.objectives.language import language_model, losses_of
from jaxtransfer.objectives.losses import IGNORE
from jaxtransfer.tasks.metrics_language import language
from jaxtransfer.tasks.task import Task
from jaxtransfer.types import Head


def causal_lm(
    *,
    max_length: int = 512,
    packing: bool = True,
    completion_only: bool = False,
    chat: bool = False,
    chat_template: str | None = None,
    long: Long = "error",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Task:
    """The task of predicting every next token; its source keeps the head that it was pre-trained with.

    It reads the column ``text``; or ``prompt`` and ``completion``, of which the latter alone is learned; or
    ``messages``, of which the assistant's are learned. `data.documents` and `data.chat` say how each becomes tokens.

    ``labels`` (B, T) are aligned with ``input_ids``: the token after it, or `IGNORE`. Packed rows have ``segment_ids``
    and ``position_ids`` as well, by which a document attends to itself alone, from position 0; so a loss does not
    depend on packing. Only what is trained on is packed. What is measured keeps a row for each document, or piece of
    one, which a loader's buckets pad.

    Args:
      max_length: tokens that a row reads.
      packing: whether rows to train on hold several documents.
      completion_only: reads prompts and completions.
      chat: reads conversations.
      chat_template: of Jinja, instead of the tokenizer's own.
      long: what happens to a document of more tokens: ``"error"``; ``"cut"`` to its beginning; ``"split"`` into pieces
        that know nothing of each other, for texts only.
      label_smoothing, z_loss: of the training loss; see `objectives.language_model`.

    Raises:
      ValueError: options out of range, or that exclude each other.

    Example:
      >>> causal_lm(completion_only=True).columns
      ('prompt', 'completion')
    """
    if max_length < 1:
        raise ValueError(f"max_length: must be at least 1, got {max_length}")
    if long not in get_args(Long):
        raise ValueError(f"long: {long!r} is not one of {', '.join(get_args(Long))}")
    if completion_only and chat:
        raise ValueError("completion_only: reads prompts and completions, chat reads messages; ask for one of them")
    if chat_template is not None and not chat:
        raise ValueError("chat_template: is read with chat=True only")
    if long == "split" and (completion_only or chat):
        raise ValueError("long: 'split' parts an answer from its question; say 'cut', or 'error'")

    def documents(processor: Any, dataset: Dataset) -> tuple[list[Document], tuple[str, ...]]:
        if chat:
            return chats(dataset, processor, chat_template), ()
        return (completions if completion_only else plain)(dataset, processor)

    def prepare(processor: Any, dataset: Dataset, *, train: bool) -> Examples:
        found, notes = documents(processor, dataset)
        found, more = fit(found, dataset, max_length, long)
        notes = (*dataset.notes, *notes, *more)
        pad = {"input_ids": processor.pad_token_id or 0, "labels": IGNORE}
        if not (train and packing):
            each = _sums(found, [[i] for i in range(len(found))])
            return Examples(ragged=_fields(found), fixed=each, pad=pad, notes=notes, kept=each["document"])
        rows = plan([len(doc) for doc in found], max_length)
        full = sum(map(len, found)) / (len(rows) * max_length)
        told = f"{dataset.path}: {len(found)} segments packed into {len(rows)} rows of {max_length}, {full:.1%} full"
        packed = {name: list(field) for name, field in pack(_fields(found), rows, max_length, pad).items()}
        return Examples(ragged=packed, fixed=_sums(found, rows), pad=pad, notes=(*notes, told))

    return Task(
        name="causal-lm",
        columns=("messages",) if chat else ("prompt", "completion") if completion_only else ("text",),
        head=Head("causal-lm"),
        fresh_head=False,
        processor=tokenizer,
        prepare=prepare,
        objective=language_model(label_smoothing, z_loss),
        observe=_observe,
        metrics=language,
        metric_names=("loss", "perplexity", "bits_per_byte"),
        metric="bits_per_byte",
        minimize=frozenset({"loss", "perplexity", "bits_per_byte"}),
        decode=None,
    )


def _fields(documents: list[Document]) -> dict[str, list[np.ndarray]]:
    """What a model reads of each document, and what it has to name."""
    labels = [np.where(doc.counts, doc.targets, np.int32(IGNORE)) for doc in documents]
    return {"input_ids": [doc.inputs for doc in documents], "labels": labels}


def _sums(documents: list[Document], rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Of each row the bytes that its targets spell, and the record that its first document is of."""
    spelled = [sum(int(documents[i].bytes[documents[i].counts].sum()) for i in row) for row in rows]
    return {
        "bytes": np.array(spelled, np.int32),
        "document": np.array([documents[row[0]].record for row in rows], np.int32),
    }


def _observe(outputs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Of each row the negative log-likelihood of its targets, in nats, their number and their bytes."""
    labels = jnp.asarray(batch["labels"])
    counts = labels != IGNORE
    nll = jnp.sum(jnp.where(counts, losses_of(outputs, labels), 0.0), axis=-1)
    return {"nll": nll, "tokens": jnp.sum(counts, axis=-1), "bytes": batch["bytes"], "document": batch["document"]}
