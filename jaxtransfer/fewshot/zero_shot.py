"""Classification without an example: by what a text entails, or by how near it is to a description of each label."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxtransfer.data.examples import Examples
from jaxtransfer.data.text import tokenizer
from jaxtransfer.features.extract import extract
from jaxtransfer.fewshot.drawing import FewShotError
from jaxtransfer.fewshot.embedding import embed_texts, in_order
from jaxtransfer.types import Source

TEMPLATE = "This is {}."


def entailment(labels: Sequence[str]) -> tuple[int, int]:
    """The positions of entailment and contradiction among the labels of a head, by their names.

    Args:
      labels: as ``id2label`` of the model's configuration orders them.

    Raises:
      FewShotError: not exactly one label begins with "entail", or with "contradict", in whatever case.

    Example:
      >>> entailment(["CONTRADICTION", "NEUTRAL", "ENTAILMENT"])
      (2, 0)
    """
    places = []
    for wanted in ("entail", "contradict"):
        found = [i for i, label in enumerate(labels) if label.lower().startswith(wanted)]
        if len(found) != 1:
            raise FewShotError(
                f"the head's labels are {', '.join(map(repr, labels)) or 'none'}: {len(found)} begin with {wanted!r}, "
                "where one must, so this is no model of natural-language inference; or name its labels in id2label"
            )
        places.append(found[0])
    return places[0], places[1]


def hypotheses(labels: Sequence[str], template: str = TEMPLATE) -> list[str]:
    """What is said of a text for each label.

    Raises:
      FewShotError: fewer than two labels, one twice or blank, or a template without the one place for it.

    Example:
      >>> hypotheses(["sport", "politics"])
      ['This is sport.', 'This is politics.']
    """
    if template.count("{}") != 1:
        raise FewShotError(f"template: {template!r} must have one place for the label, '{{}}'")
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise FewShotError(f"labels: expected two different ones at least, none blank; got {list(labels)}")
    return [template.replace("{}", label) for label in labels]


def entailed(logits: ArrayLike, entail: int, contradict: int, *, multi_label: bool = False) -> jax.Array:
    """Probabilities of labels from a model's logits about the hypothesis of each (Yin et al. 2019, arXiv:1909.00161).

    Of one label a text, ``softmax_c(z_c,entail)``; of several, each by itself, ``softmax(z_c,contradict,
    z_c,entail)_entail``: as transformers' zero-shot pipeline.

    Args:
      logits: z (N, C, K), of N texts with each of C hypotheses.
      entail, contradict: which of the K logits; see `entailment`.
      multi_label: whether a text may have any number of the labels.

    Returns:
      (N, C).

    Example:
      >>> z = jnp.array([[[0.0, 0.0, 2.0], [2.0, 0.0, 0.0]]])
      >>> entailed(z, 2, 0), entailed(z, 2, 0, multi_label=True)
      (Array([[0.880..., 0.119...]], dtype=float32), Array([[0.880..., 0.119...]], dtype=float32))
    """
    z = jnp.asarray(logits)
    if z.ndim != 3:
        raise FewShotError(f"entailed: expected logits (texts, labels, classes of the head), got {z.shape}")
    if multi_label:
        return jax.nn.sigmoid(z[..., entail] - z[..., contradict])
    return jax.nn.softmax(z[..., entail], axis=1)


def by_entailment(
    source: Source,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    template: str = TEMPLATE,
    multi_label: bool = False,
    max_length: int = 256,
    batch: int = 32,
) -> np.ndarray:
    """Probabilities of labels, by whether each text entails what the template says of it.

    Args:
      source: with a sequence-classification head that was trained on natural-language inference, and its tokenizer.
      texts: N.
      labels: C, as words that fit the template.
      template: with ``{}`` where the label stands.
      multi_label: whether a text may have any number of the labels.
      max_length: tokens that text and hypothesis may have together.
      batch: rows of a batch; there are N x C.

    Returns:
      (N, C) float32; see `entailed`.

    Raises:
      FewShotError: the head's labels are others, or `hypotheses` or the lengths are refused.
    """
    head = source.model.head
    if head is None or head.kind != "sequence-classification":
        raise FewShotError(
            f"by_entailment: the model ends in {'no head' if head is None else repr(head.kind)}, expected a "
            "sequence-classification head of natural-language inference; by_similarity needs none"
        )
    entail, contradict = entailment(head.labels)
    said = hypotheses(labels, template)
    if not texts:
        raise FewShotError("there are no texts")
    make = tokenizer(source)
    both = make([text for text in texts for _ in said], said * len(texts), padding=False, return_attention_mask=False)
    pad = {"input_ids": make.pad_token_id, "token_type_ids": make.pad_token_type_id}
    fields = {name: [np.array(row, np.int32) for row in rows] for name, rows in both.items()}
    examples = Examples(ragged=fields, pad={name: pad.get(name) or 0 for name in fields})
    logits = extract(source, in_order(examples, max_length, batch, len(said)), ["head"])["head"]
    return np.asarray(entailed(logits.reshape(len(texts), len(said), -1), entail, contradict, multi_label=multi_label))


def by_similarity(
    source: Source, texts: Sequence[str], descriptions: Sequence[str], *, max_length: int = 128, batch: int = 32
) -> np.ndarray:
    """Cosines of the embeddings of texts and of descriptions of the labels; the largest of a row is its label.

    Args:
      source: an encoder whose mean-pooled embeddings are near where meanings are, such as a sentence transformer.
      texts: N.
      descriptions: C, one of each label: the more like a text of it, the better.
      max_length: tokens that a text may have.
      batch: rows of a batch.

    Returns:
      (N, C) float32, from -1 to 1.

    Raises:
      FewShotError: no texts or fewer than two descriptions, or one that is too long.
    """
    said = hypotheses(descriptions, "{}")
    found = embed_texts(source, [*texts, *said], max_length=max_length, batch=batch)
    unit = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return unit[: len(texts)] @ unit[len(texts) :].T
