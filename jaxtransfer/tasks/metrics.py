"""Metrics over all examples of an evaluation, each with its 95 % interval: numpy, float64, on the host."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
_RESAMPLES = 1000
_SEED = 0
_BLOCK = 1 << 22  # indices drawn at a time: 32 MB


@dataclasses.dataclass(frozen=True)
class Metric:
    """A value with its 95 % interval, over ``n`` examples."""

    value: float
    low: float
    high: float
    n: int


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, Metric]:
    """Accuracy, macro-F1 and cross-entropy.

    Accuracy has Wilson's interval. The others have the percentile interval of 1,000 bootstrap resamples of the
    examples, drawn with a fixed seed (Efron 1979). F1 is averaged over the classes that occur among the labels or the
    predictions, as scikit-learn does.

    Args:
      logits: (N, C).
      labels: (N,) integers in [0, C).

    Raises:
      ValueError: no examples, or shapes that do not agree.

    Example:
      >>> found = classification(np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0]]), np.array([0, 1, 0]))
      >>> {name: round(metric.value, 3) for name, metric in found.items()}
      {'accuracy': 0.667, 'macro_f1': 0.667, 'loss': 0.794}
    """
    logits, labels = _checked(logits, labels)
    counts, losses = confusion(logits, labels), -_log_softmax(logits)[np.arange(len(labels)), labels]
    return {
        "accuracy": wilson(int(np.trace(counts)), len(labels)),
        "macro_f1": _bootstrap_counts(counts),
        "loss": _bootstrap_mean(losses),
    }


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts by class: (N, C), (N,) -> (C, C) int64, labels down and predictions across."""
    logits, labels = _checked(logits, labels)
    classes = logits.shape[-1]
    cells = labels * classes + logits.argmax(-1)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def wilson(hits: int, n: int) -> Metric:
    """A proportion with Wilson's score interval (Wilson 1927).

    With ``p = hits / n``: ``(p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)``.

    Example:
      >>> wilson(90, 100)
      Metric(value=0.9, low=0.8256..., high=0.9447..., n=100)
    """
    p, z2 = hits / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Metric(p, min(max(0.0, centre - half), p), max(min(1.0, centre + half), p), n)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float64."""
    return np.exp(_log_softmax(np.asarray(logits, np.float64)))


def collect(parts: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of many batches as one, in the order of the examples and without padding rows.

    Args:
      parts: of each batch, and of each process, arrays with one row per example; ``index`` is among them, -1 on
        padding rows.

    Raises:
      ValueError: an example that occurs twice or not at all.

    Example:
      >>> collect([{"index": np.array([1, -1]), "x": np.array([5, 0])}, {"index": np.array([0]), "x": np.array([4])}])
      {'index': array([0, 1]), 'x': array([4, 5])}
    """
    parts = list(parts)
    merged = {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}
    order = np.argsort(merged["index"], kind="stable")[np.count_nonzero(merged["index"] < 0) :]
    out = {name: array[order] for name, array in merged.items()}
    if not np.array_equal(out["index"], np.arange(len(order))):
        counts = np.bincount(out["index"])
        raise ValueError(
            f"collect: every example must occur once; twice: {np.flatnonzero(counts > 1)[:6].tolist()}, "
            f"missing: {np.flatnonzero(counts == 0)[:6].tolist()}"
        )
    return out


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.int64)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"metrics: expected logits (N, C) and labels (N,), N > 0; got {logits.shape}, {labels.shape}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"metrics: labels must be in 0..{logits.shape[1] - 1}, got {labels.min()}..{labels.max()}")
    return logits, labels


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a diverged model's loss is nan, which is what to report
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _macro_f1(counts: np.ndarray) -> np.ndarray:
    """``mean_c 2 TP_c / (labels_c + predictions_c)`` over the classes that occur: (..., C, C) -> (...)."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    both = counts.sum(-1) + counts.sum(-2)
    return (2 * hits / np.maximum(both, 1)).sum(-1) / (both > 0).sum(-1)


def _bootstrap_counts(counts: np.ndarray) -> Metric:
    """Macro-F1: resampled examples have multinomial confusion counts, so the counts are drawn directly."""
    n = int(counts.sum())
    drawn = np.random.default_rng(_SEED).multinomial(n, counts.reshape(-1) / n, size=_RESAMPLES)
    return _percentiles(float(_macro_f1(counts)), _macro_f1(drawn.reshape(-1, *counts.shape)), n)


def _bootstrap_mean(values: np.ndarray) -> Metric:
    rng, n = np.random.default_rng(_SEED), len(values)
    rows = max(1, _BLOCK // n)
    sizes = [min(rows, _RESAMPLES - start) for start in range(0, _RESAMPLES, rows)]
    means = [values[rng.integers(0, n, (size, n))].mean(-1) for size in sizes]
    return _percentiles(float(values.mean()), np.concatenate(means), n)


def _percentiles(value: float, resampled: np.ndarray, n: int) -> Metric:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Metric(value, float(low), float(high), n)
