"""One vector a text or image: the mean of the last hidden state."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtransfer.data.examples import Examples
from jaxtransfer.data.loader import batches
from jaxtransfer.data.text import encode, tokenizer
from jaxtransfer.features.extract import extract
from jaxtransfer.fewshot.drawing import FewShotError
from jaxtransfer.types import Source

BUCKETS = (16, 32, 64, 128, 256, 512)


def embed(source: Source, batches: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """The mean of the last hidden state over unmasked positions: what `prototypical` and `pair_similarity` train.

    Args:
      source: a model of any kind; neither its pooler nor its head runs.
      batches: a finite loader.

    Returns:
      (N, d) float32, in the order of the examples.

    Raises:
      FewShotError: no stage before the head writes a hidden state; FeatureError: as `extract`.
    """
    hidden = [s.name for s in source.model.stages if s.writes[0] == "hidden" and s.name.split("/")[0] != "head"]
    if not hidden:
        raise FewShotError(f"embed: no stage of this {source.model.family} model writes 'hidden'")
    return extract(source, batches, [hidden[-1]])[hidden[-1]]


def embed_texts(source: Source, texts: Sequence[str], *, max_length: int = 128, batch: int = 32) -> np.ndarray:
    """As `embed`, of texts, by the source's own tokenizer.

    Args:
      source: with its tokenizer.
      texts: N.
      max_length: tokens that a text may have, the special ones included.
      batch: rows of a batch.

    Returns:
      (N, d) float32.

    Raises:
      FewShotError: no texts, or one that is longer; DataError: the source has no tokenizer.
    """
    if not texts:
        raise FewShotError("there are no texts")
    encoded = encode(texts, tokenizer(source), max_length + 1)
    examples = Examples(ragged=encoded.fields, pad=encoded.pad)
    return embed(source, in_order(examples, max_length, batch))


def in_order(examples: Examples, max_length: int, batch: int, each: int = 1) -> Iterable[Mapping[str, Any]]:
    """Batches of few lengths, none above ``max_length``; a text has ``each`` examples.

    Raises:
      FewShotError: an example that is longer.
    """
    longest = int(examples.lengths.argmax())
    if (length := int(examples.lengths[longest])) > max_length:
        raise FewShotError(
            f"text {longest // each} is longer than max_length: {length} tokens or more, of {max_length}; cut it, or "
            "raise max_length as far as the model's positions reach"
        )
    buckets = sorted({min(bucket, max_length) for bucket in (*BUCKETS, max_length)})
    return batches(examples, batch=min(batch, len(examples)), shuffle=False, buckets=buckets, epochs=1)
