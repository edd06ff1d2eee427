"""The command about a source as it is: labels for texts, of which it was shown no example."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer.fewshot import FewShotError, by_entailment, by_similarity, hypotheses
from jaxtransfer.fewshot.zero_shot import TEMPLATE
from jaxtransfer.source import load


def zero_shot(
    ref: str,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    template: str | None = None,
    multi_label: bool = False,
    revision: str | None = None,
) -> list[dict[str, Any]]:
    """The label of each text, by a source that was trained on natural-language inference, or by its embeddings.

    A source with a sequence-classification head is asked what each text entails; one without a head, how similar texts
    and labels are.

    Args:
      ref: as for `load`.
      texts: what is labelled.
      labels: words, or descriptions.
      template: what is said of a text, with ``{}`` for the label; by default "This is {}." where it is entailed, and
        the label alone where it is embedded.
      multi_label: whether a text may have any number of the labels; only by entailment.
      revision: of a hub id.

    Returns:
      A record a text: ``label`` and ``probability``, or ``labels`` and ``probabilities``, or ``label`` and
      ``similarity``.

    Raises:
      FewShotError: a head of another kind or with other labels, several labels by similarity, or as `by_entailment`
        and `by_similarity`.
    """
    source = load(ref, revision=revision)
    head = source.model.head
    if head is not None and head.kind != "sequence-classification":
        raise FewShotError(
            f"{ref}: ends in a {head.kind} head; zero-shot takes a model of natural-language inference, or an encoder "
            "of sentences without a head"
        )
    if head is None:
        if multi_label:
            raise FewShotError(f"{ref}: has no head, and similarities are no probabilities: multi-label needs them")
        scores, name = by_similarity(source, texts, hypotheses(labels, template or "{}")), "similarity"
    else:
        how = {"template": template or TEMPLATE, "multi_label": multi_label}
        scores, name = by_entailment(source, texts, labels, **how), "probability"
    if multi_label:
        return [
            {
                "text": text,
                "labels": [label for label, p in zip(labels, row, strict=True) if p > 0.5],
                "probabilities": dict(zip(labels, map(float, row), strict=True)),
            }
            for text, row in zip(texts, scores, strict=True)
        ]
    best = [int(np.argmax(row)) for row in scores]
    return [
        {"text": text, "label": labels[i], name: float(row[i])}
        for text, row, i in zip(texts, scores, best, strict=True)
    ]
