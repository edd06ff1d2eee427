"""How well scores rank positives above negatives: ROC and precision-recall, in numpy and exact; ties count half."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtransfer.tasks.intervals import Metric, bootstrapped, linearised, resample, undefined, wilson

_POINTS = 200
_Ranked = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]


def auc(scores: np.ndarray, positive: np.ndarray) -> Metric:
    """Area under the ROC curve: ``P(score of a positive > of a negative) + P(equal) / 2``.

    The interval is from the variance of DeLong et al. (1988), in the form of `linearised`, and never narrower than
    that of a proportion of ``4 m n / (m + n)`` for m positives and n negatives: near 1 the variance seen is too small.

    Args:
      scores: (N,) or (N, C): the mean over those columns that have both positives and negatives.
      positive: bool, of the same shape.

    Example:
      >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])).value
      0.75
    """
    return _mean_over_columns(_auc, scores, positive)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> Metric:
    """``sum_k (recall_k - recall_k-1) precision_k`` over the thresholds from the highest down, not interpolated.

    Args and what becomes of columns: see :func:`auc`. The interval is linearised too.

    Example:
      >>> round(average_precision(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])).value, 4)
      0.8333
    """
    return _mean_over_columns(_average_precision, scores, positive)


def sensitivity_at(scores: np.ndarray, positive: np.ndarray, specificity: float = 0.9) -> Metric:
    """The largest share of positives found by a threshold under which no more than ``1 - specificity`` negatives lie.

    With n negatives and ``k = floor((1 - specificity) n)``: the share of positives above the ``k+1``-st highest
    negative. The interval is the percentile one over resamples of the positives and of the negatives, so that the
    threshold's own uncertainty counts, and no narrower than Wilson's at the threshold found, which is not nothing at 1.

    Args:
      scores: (N,).
      positive: (N,) bool.
      specificity: in (0, 1].

    Raises:
      ValueError: a specificity out of range.

    Example:
      >>> sensitivity_at(np.arange(20.0), np.arange(20) >= 9).value
      1.0
    """
    if not 0 < specificity <= 1:
        raise ValueError(f"specificity: must be in (0, 1], got {specificity}")
    if not _defined(scores, positive):
        return undefined(len(scores))
    yes, no = scores[positive], scores[~positive]
    m, n = len(yes), len(no)
    rank = max(0, n - 1 - math.floor((1 - specificity) * n + 1e-9))  # of the threshold among ascending negatives

    def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
        level = np.partition(no[rng.integers(0, n, (rows, n))], rank, axis=-1)[:, rank]
        return (yes[rng.integers(0, m, (rows, m))] > level[:, None]).mean(-1)

    given = wilson(int((yes > np.partition(no, rank)[rank]).sum()), m)
    drawn = bootstrapped(given.value, resample(m + n, draw), m + n)
    return Metric(given.value, min(given.low, drawn.low), max(given.high, drawn.high), m + n)


def roc(scores: np.ndarray, positive: np.ndarray) -> dict[str, list[float]] | None:
    """The ROC curve from (0, 0) to (1, 1), thinned to about 200 points; None where positives or negatives lack.

    Args:
      scores: (N,).
      positive: (N,) bool.

    Returns:
      ``{"fpr": ..., "tpr": ...}``, to be joined by straight lines.

    Example:
      >>> roc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
      {'fpr': [0.0, 0.0, 0.5, 0.5, 1.0], 'tpr': [0.0, 0.5, 0.5, 1.0, 1.0]}
    """
    if not _defined(scores, positive):
        return None
    _, _, counts, hits = _groups(scores, positive)
    tpr = np.concatenate([[0.0], np.cumsum(hits) / hits.sum()])
    fpr = np.concatenate([[0.0], np.cumsum(counts - hits) / (counts - hits).sum()])
    turns = np.ones(len(tpr), bool)
    turns[1:-1] = np.abs(np.diff(tpr[:-1]) * np.diff(fpr[1:]) - np.diff(tpr[1:]) * np.diff(fpr[:-1])) > 1e-12
    fpr, tpr = fpr[turns], tpr[turns]
    if len(fpr) > _POINTS:  # evenly along the curve
        kept = np.unique(np.searchsorted(fpr + tpr, np.linspace(0, 2, _POINTS)).clip(0, len(fpr) - 1))
        fpr, tpr = fpr[kept], tpr[kept]
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist()}


def _defined(scores: np.ndarray, positive: np.ndarray) -> bool:
    """Whether there is something to rank; scores of a diverged model are not."""
    return bool(positive.any() and not positive.all() and np.isfinite(scores).all())


def _mean_over_columns(one: _Ranked, scores: np.ndarray, positive: np.ndarray) -> Metric:
    scores, positive = (array.reshape(len(array), -1) for array in (scores, positive))
    n = len(scores)
    known = [c for c in range(scores.shape[1]) if _defined(scores[:, c], positive[:, c])]
    if not known or not np.isfinite(scores).all():
        return undefined(n)
    value, influence, most = 0.0, np.zeros(n), 0.0
    for c in known:
        part, change = one(scores[:, c], positive[:, c])
        value, influence = value + part / len(known), influence + change / len(known)
        share = positive[:, c].mean()
        most += 4 * n * share * (1 - share)  # n where both are equally many, hardly any where one is rare
    return linearised(float(min(value, 1.0)), influence, most)


def _auc(scores: np.ndarray, positive: np.ndarray) -> tuple[float, np.ndarray]:
    """The area and DeLong's components, by the midranks of Sun and Xu (2014): O(N log N)."""
    yes, no = scores[positive], scores[~positive]
    m, n = len(yes), len(no)
    ranks = _midranks(scores)
    above = (ranks[positive] - _midranks(yes)) / n  # of each positive: the share of negatives below it
    below = 1 - (ranks[~positive] - _midranks(no)) / m
    area, influence = float(above.mean()), np.empty(m + n)
    influence[positive] = (above - area) / math.sqrt(m * max(m - 1, 1))
    influence[~positive] = (below - area) / math.sqrt(n * max(n - 1, 1))
    return area, influence


def _average_precision(scores: np.ndarray, positive: np.ndarray) -> tuple[float, np.ndarray]:
    """With weights w: ``AP = sum_i w_i y_i P_i / sum_i w_i y_i`` with ``P_i`` the precision at i's score."""
    _, group, counts, hits = _groups(scores, positive)
    seen, m = np.cumsum(counts), hits.sum()
    precision = np.cumsum(hits) / seen
    value = float(np.sum(hits * precision) / m)
    # One more example of weight w at a score changes the precision at every score below it.
    gain = np.cumsum((hits / seen)[::-1])[::-1][group]
    loss = np.cumsum((hits * precision / seen)[::-1])[::-1][group]
    return value, (positive * (precision[group] - value + gain) - loss) / m


def _groups(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Equal scores together, the highest first: minus scores, each example's group, examples and positives of each."""
    values, group, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    return values, group, counts, np.bincount(group, weights=positive, minlength=len(values))


def _midranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Any = np.cumsum(counts) - (counts - 1) / 2
    return ranks[group]
