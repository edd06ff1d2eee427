"""How well questions are answered: one answer of all windows of a text, exact match, F1 of words; on the host."""

import collections
import re
import string
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtransfer.tasks.intervals import Metric, bootstrap_mean, wilson
from jaxtransfer.tasks.predictions import Answer

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answered(observed: Mapping[str, np.ndarray], *, unanswerable: bool = False) -> list[Answer]:
    """The likeliest answer to each question over all windows of its context, by the sum of its logits.

    A probability is ``exp(z_start + z_end)`` over the sum of those of all spans of all windows. Where a question may
    have no answer, the least score that a window gives to having none competes (Devlin et al. 2019, section 4.3).

    Args:
      observed: by window (N,): ``row``, that of the question, in order; ``start`` and ``stop``, characters of its best
        span; ``score`` of that; ``total``, the logarithm of the sum over spans; ``null``, the score of no answer;
        ``context``, its text.
      unanswerable: whether a question may have none.
    """
    _, order = np.unique(observed["row"], return_inverse=True)
    out = []
    for rows in np.split(np.arange(len(order)), np.flatnonzero(np.diff(order)) + 1):
        best, null = rows[np.argmax(observed["score"][rows])], float(np.min(observed["null"][rows]))
        scores = [*observed["total"][rows], *([null] if unanswerable else [])]
        total = float(np.logaddexp.reduce(np.asarray(scores, np.float64)))
        score = float(observed["score"][best])
        if unanswerable and null > score:
            out.append(Answer("", 0, 0, float(np.exp(null - total))))
        else:
            start, stop = int(observed["start"][best]), int(observed["stop"][best])
            out.append(Answer(str(observed["context"][best])[start:stop], start, stop, float(np.exp(score - total))))
    return out


def expected(observed: Mapping[str, np.ndarray]) -> list[tuple[str, ...]]:
    """The true answers to each question, ``("",)`` where there is none."""
    _, first = np.unique(observed["row"], return_index=True)
    return [tuple(text for text, _ in observed["answers"][i]) or ("",) for i in first]


def answering(observed: Mapping[str, np.ndarray], *, unanswerable: bool = False) -> dict[str, Metric]:
    """F1 of words and exact match, as the SQuAD scorer has them (Rajpurkar et al. 2016), and the loss of a window.

    Both are of texts in lower case without punctuation and the articles a, an, the, against the true answer that fits
    best; see `overlap`. Exact match has Wilson's interval, the others that of a bootstrap over questions.

    Args:
      observed: as `answered`, with ``answers`` and ``nll`` (N,), in nats.
      unanswerable: whether a question may have none.
    """
    found, true = answered(observed, unanswerable=unanswerable), expected(observed)
    f1 = np.array([max(overlap(each.text, text) for text in texts) for each, texts in zip(found, true, strict=True)])
    _, order = np.unique(observed["row"], return_inverse=True)
    sizes = np.bincount(order).astype(np.float64)
    return {
        "f1": bootstrap_mean(f1),
        "exact_match": wilson(sum(map(is_right, found, true)), len(found)),
        "loss": bootstrap_mean(np.bincount(order, observed["nll"]) / sizes, sizes),
    }


def is_right(found: Answer, true: Sequence[str]) -> bool:
    """Whether an answer is, normalised, one of the true ones."""
    return normalized(found.text) in map(normalized, true)


def overlap(found: str, true: str) -> float:
    """``2 common / (words found + words true)``; of no words at all 1 if neither has any.

    Example:
      >>> overlap("the Denver Broncos", "Broncos"), overlap("", "")
      (0.666..., 1.0)
    """
    words, others = normalized(found).split(), normalized(true).split()
    if not words or not others:
        return float(words == others)
    common = (collections.Counter(words) & collections.Counter(others)).total()
    return 2 * common / (len(words) + len(others))


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces.

    Example:
      >>> normalized("The  U.S. Army!")
      'us army'
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
