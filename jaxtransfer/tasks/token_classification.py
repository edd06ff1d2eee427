"""Token classification: a tag for each word; entities by their beginnings and insides, parts of speech."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.data import tagged
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.examples import Examples, objects
from jaxtransfer.data.text import tokenizer
from jaxtransfer.objectives.losses import IGNORE, cross_entropy
from jaxtransfer.tasks.metrics_tokens import by_type, entities, mistakes, sentences, tagging
from jaxtransfer.tasks.predictions import Entity, Tagged, different
from jaxtransfer.tasks.task import Observed, Task
from jaxtransfer.types import Head


def token_classification(
    labels: Sequence[str], *, max_length: int = 128, label_smoothing: float = 0.0, fresh_head: bool = True
) -> Task:
    """The task of tagging every word; reads the columns ``tokens`` and ``tags``.

    ``loss = mean CE over words``. The first token of a word stands for it, as in BERT (Devlin et al. 2019, section
    5.3); what the others say is neither learned nor read. Where all tags are ``O`` or like ``B-person`` they mark
    entities, which `metrics_tokens.tagging` counts as the CoNLL scorer does, and the default metric is ``f1``; else
    words are counted, and it is ``accuracy``. Sentences of more than ``max_length`` tokens are split into pieces.

    Args:
      labels: the tags in the order of the logits: ``data.tagged.names(dataset)``.
      max_length: tokens of a piece, the special ones included.
      label_smoothing: of the training loss, in [0, 1).
      fresh_head: whether the source gets a new head, or goes on with its own.

    Raises:
      ValueError: fewer than two labels, one twice, or an option out of range.

    Example:
      >>> token_classification(["O", "B-person", "I-person"]).metric, token_classification(["NOUN", "VERB"]).metric
      ('f1', 'accuracy')
    """
    labels = different(labels)
    if max_length < 1:
        raise ValueError(f"max_length: must be at least 1, got {max_length}")

    def prepare(processor: Any, dataset: Dataset, *, train: bool) -> Examples:
        tags = tagged.ids(dataset, labels) if "tags" in dataset.columns else None  # refuse before the long work
        found = tagged.encode(dataset, processor, max_length)
        fields = {"input_ids": found.input_ids, "words": found.words}
        if tags is not None:
            pieces = zip(found.words, found.sentence, strict=True)
            fields["labels"] = [np.where(words < 0, np.int32(IGNORE), tags[i][words]) for words, i in pieces]
        notes, count = dataset.notes, len(found.sentence)
        if count > len(dataset):
            split = f"{len(dataset)} sentences split into {count} pieces of up to {max_length} tokens"
            notes = (*notes, f"{dataset.path}: {split}")
        pad = {"input_ids": processor.pad_token_id or 0, "words": -1, "labels": IGNORE}
        return Examples(
            ragged=fields, fixed={"sentence": found.sentence}, pad={name: pad[name] for name in fields}, notes=notes,
            kept=found.sentence, aside={"tokens": objects([found.texts[i] for i in found.sentence])},
        )  # fmt: skip

    scheme = tagged.is_scheme(labels)
    return Task(
        name="token-classification",
        columns=("tokens", "tags"),
        head=Head("token-classification", labels),
        processor=tokenizer,
        prepare=prepare,
        objective=cross_entropy(label_smoothing),
        observe=partial(_observe, max_length),
        metrics=lambda observed: tagging(observed, labels),
        metric_names=(*(("f1", "precision", "recall") if scheme else ()), "macro_f1", "accuracy", "loss"),
        metric="f1" if scheme else "accuracy",
        breakdown=lambda observed: {"type" if scheme else "tag": by_type(observed, labels)},
        mistakes=lambda observed: _mistakes(observed, labels),
        decode=lambda observed: _tagged(observed, labels),
        fresh_head=fresh_head,
        typed=lambda text: [text[start:stop] for start, stop in tagged.split_words(text)],
    )


def _observe(max_length: int, outputs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Of each token what is said of it, padded to one length: batches of every bucket become one array."""
    logp = jax.nn.log_softmax(outputs["logits"].astype(jnp.float32), axis=-1)
    guess, sure = jnp.argmax(logp, axis=-1), jnp.exp(jnp.max(logp, axis=-1))
    wide = {"words": (batch["words"], -1), "guess": (guess, 0), "probability": (sure, 0)}
    found = {"sentence": jnp.asarray(batch["sentence"])}
    if "labels" in batch:
        known = jnp.asarray(batch["labels"])
        losses = -jnp.take_along_axis(logp, jnp.maximum(known, 0)[..., None], axis=-1)[..., 0]
        found["nll"] = jnp.sum(jnp.where(known == IGNORE, 0.0, losses), axis=-1)
        wide["labels"] = known, IGNORE
    for name, (x, fill) in wide.items():
        found[name] = jnp.pad(x, ((0, 0), (0, max_length - x.shape[1])), constant_values=fill)
    return found


def _tagged(observed: Observed, labels: Sequence[str]) -> list[Tagged]:
    out = []
    for each in sentences(observed):
        tags, sure = tuple(labels[int(i)] for i in each.guess), tuple(map(float, each.probability))
        found = [Entity(kind, start, stop, min(sure[start:stop])) for kind, start, stop in entities(tags)]
        out.append(Tagged(tags, sure, tuple(found) if tagged.is_scheme(labels) else None))
    return out


def _mistakes(observed: Observed, labels: Sequence[str]) -> list[dict[str, Any]]:
    _, first = np.unique(observed["sentence"], return_index=True)
    words = observed["tokens"][first]

    def said(unit: tuple[str, int, int], sentence: Sequence[str]) -> str:
        kind, start, stop = unit
        return f"{kind}: {' '.join(sentence[start:stop])}" if kind else "nothing"

    found = [(p, words[i], true, guess) for p, i, true, guess in mistakes(observed, labels)]
    return [
        {"text": " ".join(text), "label": said(true, text), "predicted": said(guess, text), "probability": p}
        for p, text, true, guess in found
    ]
