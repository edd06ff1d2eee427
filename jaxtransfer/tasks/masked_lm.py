"""Masked language modelling: hidden tokens from all around them; on texts of a domain, continued pre-training."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.data.dataset import DataError, Dataset
from jaxtransfer.data.loader import Examples
from jaxtransfer.data.text import tokenizer, windows
from jaxtransfer.models.projection import PROJECTION, Projection
from jaxtransfer.objectives.language import language_model, losses_and_hits
from jaxtransfer.objectives.losses import IGNORE, Objective
from jaxtransfer.tasks.metrics_language import masked_language
from jaxtransfer.tasks.task import Task
from jaxtransfer.types import Head, Source, View

_AT_ONCE = 256  # rows that an evaluation hides tokens of together


def masked_lm(*, max_length: int = 128, mask_rate: float = 0.15, fresh_head: bool = False) -> Task:
    """The task of naming tokens that are hidden; reads the column ``text``.

    ``loss = mean CE over hidden tokens``. On unlabelled texts of the domain of a later task it is domain-adaptive
    pre-training (Gururangan et al. 2020, arXiv:2004.10964); the trunk that it leaves is that task's source.

    Texts of more than ``max_length`` tokens are split into pieces, each between special tokens of its own. Training
    hides other tokens in every step, on the device and by the step's key; evaluation hides the same ones in every
    piece, by its number, so that numbers can be compared.

    Args:
      max_length: tokens of a piece, the special ones included.
      mask_rate: the share of a piece's tokens that have to be named, in (0, 1); see `mask_tokens`.
      fresh_head: whether the source gets a new head, its decoder tied to the embedding where the model says so, or
        goes on with the one that it was pre-trained with.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> masked_lm().columns, masked_lm().metric_names
      (('text',), ('loss', 'perplexity', 'accuracy'))
    """
    if max_length < 1:
        raise ValueError(f"max_length: must be at least 1, got {max_length}")
    if not 0 < mask_rate < 1:
        raise ValueError(f"mask_rate: must be in (0, 1), got {mask_rate}")
    hide = jax.vmap(partial(mask_tokens, rate=mask_rate))

    def prepare(processor: Any, dataset: Dataset, *, train: bool) -> Examples:
        fields, document = _pieces(dataset, processor, max_length)
        notes, count = dataset.notes, len(document)
        if count > len(dataset):
            notes = (*notes, f"{dataset.path}: {len(dataset)} texts split into {count} pieces of up to {max_length}")
        whole = {"mask_token": processor.mask_token_id, "vocabulary": len(processor)}
        fixed = {"document": document, **{name: np.full(count, value, np.int32) for name, value in whole.items()}}
        if not train:
            fields = _hidden(jax.jit(hide), fields, fixed, max_length)
        pad = {"input_ids": processor.pad_token_id or 0, "targets": IGNORE, "labels": IGNORE}
        return Examples(
            ragged=fields, fixed=fixed, pad={name: pad[name] for name in fields}, notes=notes, kept=document
        )

    def augment(batch: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
        ids = batch["input_ids"]
        keys = jax.random.split(key, ids.shape[0])
        ids, labels = hide(ids, batch["targets"], keys, batch["mask_token"], batch["vocabulary"])
        return {**batch, "input_ids": ids, "labels": labels}

    return Task(
        name="masked-lm",
        columns=("text",),
        head=Head("masked-lm"),
        fresh_head=fresh_head,
        processor=_masking,
        prepare=prepare,
        augment=augment,
        objective=_objective(mask_rate),
        observe=partial(_observe, mask_rate),
        metrics=masked_language,
        metric_names=("loss", "perplexity", "accuracy"),
        metric="loss",
        minimize=frozenset({"loss", "perplexity"}),
        decode=None,
    )


def mask_tokens(
    ids: jax.Array, targets: jax.Array, key: jax.Array, mask_token: Any, vocabulary: Any, *, rate: float = 0.15
) -> tuple[jax.Array, jax.Array]:
    """Hides some tokens of a row, as in BERT's pre-training (Devlin et al. 2019, arXiv:1810.04805, section 3.1).

    Of the n tokens that may be hidden ``max(1, round(rate n))`` are, drawn without replacement. Each of them becomes
    the mask token with probability 0.8, any token of the vocabulary with 0.1, and stays itself with 0.1.

    Args:
      ids: (T,) integer tokens.
      targets: (T,) the same, and `IGNORE` where none may be hidden: special tokens and padding.
      key: typed PRNG key.
      mask_token: the token that stands for a hidden one.
      vocabulary: the number of tokens.
      rate: in (0, 1).

    Returns:
      The tokens (T,) that a model reads, and the labels (T,): the hidden tokens, `IGNORE` elsewhere.

    Example:
      >>> ids = jnp.array([1, 7, 8, 9, 2, 0])
      >>> targets = jnp.array([IGNORE, 7, 8, 9, IGNORE, IGNORE])
      >>> read, labels = mask_tokens(ids, targets, jax.random.key(0), 4, 10)
      >>> int((labels != IGNORE).sum()), bool((jnp.where(labels == IGNORE, read, labels) == ids).all())
      (1, True)
    """
    order, kind, other = jax.random.split(key, 3)
    may = targets != IGNORE
    rank = jnp.argsort(jnp.argsort(jnp.where(may, jax.random.uniform(order, ids.shape), 2.0)))
    n = jnp.sum(may)
    count = jnp.maximum(jnp.round(rate * n.astype(jnp.float32)).astype(jnp.int32), 1)
    chosen = may & (rank < count)
    draw = jax.random.uniform(kind, ids.shape)
    anything = jax.random.randint(other, ids.shape, 0, vocabulary, ids.dtype)
    read = jnp.where(draw < 0.8, mask_token, jnp.where(draw < 0.9, anything, ids))
    return jnp.where(chosen, read, ids), jnp.where(chosen, targets, IGNORE)


def _masking(source: Source) -> Any:
    """The source's tokenizer, which must have a token to hide others behind, and none that the model has not."""
    found, ref = tokenizer(source), source.lineage.ref
    if found.mask_token_id is None:
        raise DataError(f"{ref}: its tokenizer has no mask token, which masked-lm hides others behind")
    size = source.model.config.vocab_size
    if len(found) > size:
        raise DataError(f"{ref}: its tokenizer has {len(found)} tokens, any of which masked-lm draws, its model {size}")
    return found


def _pieces(dataset: Dataset, processor: Any, size: int) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
    """``input_ids`` and ``targets`` of each piece, and the record that it is of."""
    out = windows(dataset.strings("text"), processor, size)
    ids = [np.array(row, np.int32) for row in out["input_ids"]]
    never = np.array(processor.all_special_ids)
    targets = [np.where(np.isin(row, never), np.int32(IGNORE), row) for row in ids]
    return {"input_ids": ids, "targets": targets}, np.array(out["overflow_to_sample_mapping"], np.int32)


def _hidden(hide: Any, fields: Mapping[str, Any], fixed: Mapping[str, Any], size: int) -> dict[str, list[np.ndarray]]:
    """``input_ids`` and ``labels`` of each piece, whose number alone says what is hidden."""
    lengths = [len(row) for row in fields["input_ids"]]
    read: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for low in range(0, len(lengths), _AT_ONCE):
        rows = range(low, min(low + _AT_ONCE, len(lengths)))
        block = {name: np.full((_AT_ONCE, size), IGNORE, np.int32) for name in ("input_ids", "targets")}
        for name, array in block.items():
            for place, i in enumerate(rows):
                array[place, : lengths[i]] = fields[name][i]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(low, low + _AT_ONCE))
        one = [np.full(_AT_ONCE, fixed[name][0]) for name in ("mask_token", "vocabulary")]
        found = jax.device_get(hide(block["input_ids"], block["targets"], keys, *one))
        for rows_of, array in zip((read, labels), found, strict=True):
            rows_of += [array[place, : lengths[i]] for place, i in enumerate(rows)]
    return {"input_ids": read, "labels": labels}


def _objective(rate: float) -> Objective:
    """`language_model` at the hidden tokens alone, so that no logits of others are computed."""
    loss = language_model()

    def objective(view: View) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs, labels = _at_hidden(view.outputs, view.batch["labels"], rate)
        return loss(dataclasses.replace(view, outputs=outputs, batch={**view.batch, "labels": labels}))

    return objective


def _at_hidden(outputs: Mapping[str, Any], labels: jax.Array, rate: float) -> tuple[dict[str, Any], jax.Array]:
    """Outputs and labels at K positions of each row, (B, K), among which all hidden tokens are.

    `mask_tokens` hides at most ``floor(rate T) + 1`` of T.
    """
    length = labels.shape[1]
    _, places = jax.lax.top_k((labels != IGNORE).astype(jnp.int32), min(int(rate * length) + 1, length))

    def taken(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, places[..., None], axis=1)

    labels = jnp.take_along_axis(labels, places, axis=1)
    projection: Projection | None = outputs.get(PROJECTION)
    if projection is None:
        return {"logits": taken(outputs["logits"])}, labels
    projection = dataclasses.replace(projection, hidden=taken(projection.hidden))
    return {PROJECTION: projection, "logits": projection.logits()}, labels


def _observe(rate: float, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Of each row the negative log-likelihood of its hidden tokens, in nats, their number, and how many are named."""
    outputs, labels = _at_hidden(outputs, jnp.asarray(batch["labels"]), rate)
    counts = labels != IGNORE
    nll, hits = (jnp.sum(jnp.where(counts, each, 0.0), axis=-1) for each in losses_and_hits(outputs, labels))
    return {"nll": nll, "hits": hits, "tokens": jnp.sum(counts, axis=-1), "document": batch["document"]}
