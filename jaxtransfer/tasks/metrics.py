"""Metrics over all examples of an evaluation, each with its 95 % interval: numpy, float64, on the host."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from jaxtransfer.tasks import ranking
from jaxtransfer.tasks.intervals import Metric as Metric
from jaxtransfer.tasks.intervals import bootstrap_mean as bootstrap_mean
from jaxtransfer.tasks.intervals import bootstrapped, resample, weights
from jaxtransfer.tasks.intervals import wilson as wilson


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
        "macro_f1": _of_counts(counts, lambda hits, truths, guesses: macro_f1(hits, truths + guesses)),
        "loss": bootstrap_mean(losses),
    }


def diagnosis(logits: np.ndarray, labels: np.ndarray) -> dict[str, Metric]:
    """What accuracy hides where classes are unequal: the mean recall, and how well each class is ranked above the rest.

    ``balanced_accuracy``, the mean of the recalls of the classes that occur; of two classes, the second of which is
    the positive one, ``auc``, ``average_precision`` and ``sensitivity_at_90``, that at a specificity of 90 %; of more
    ``macro_auc``, the mean over each class against the rest. See `ranking`. A metric that the labels do not define is
    NaN.

    Args and errors: see :func:`classification`.
    """
    logits, labels = _checked(logits, labels)
    balanced = _of_counts(confusion(logits, labels), lambda hits, truths, _: _mean_recall(hits, truths))
    found = {"balanced_accuracy": balanced}
    if logits.shape[1] > 2:
        return found | {"macro_auc": ranking.auc(softmax(logits), labels[:, None] == np.arange(logits.shape[1]))}
    scores, positive = _scores(logits), labels == 1
    return found | {
        "auc": ranking.auc(scores, positive),
        "average_precision": ranking.average_precision(scores, positive),
        "sensitivity_at_90": ranking.sensitivity_at(scores, positive, 0.9),
    }


def multi_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, Metric]:
    """Metrics of several labels an example, each decided at a probability of 0.5.

    ``macro_auc`` and ``mean_average_precision`` are means over the labels that some examples have and some have not;
    ``macro_f1`` over those that occur or are predicted; ``micro_f1`` is over all decisions; ``exact_match`` the share
    of examples with every decision right; ``loss`` the mean binary cross-entropy. F1 and loss have the percentile
    interval of 1,000 resamples of the examples, exact match Wilson's.

    Args:
      logits: (N, C).
      labels: (N, C), 0 or 1.

    Raises:
      ValueError: no examples, shapes that do not agree, or labels other than 0 and 1.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape or not len(labels):
        raise ValueError(f"metrics: expected logits and labels (N, C), N > 0; got {logits.shape}, {labels.shape}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("metrics: labels of a multi-label task must be 0 or 1")
    truths, guesses, (n, classes) = labels == 1, logits > 0, logits.shape
    table = np.concatenate([truths & guesses, truths, guesses], axis=1).astype(np.float64)
    sums = np.concatenate([table.sum(0)[None], resample(n, lambda rng, rows: weights(rng, rows, n) @ table)])
    hits, both = sums[:, :classes], sums[:, classes : 2 * classes] + sums[:, 2 * classes :]
    f1 = {"macro_f1": macro_f1(hits, both), "micro_f1": macro_f1(hits.sum(-1)[:, None], both.sum(-1)[:, None])}
    return {
        "macro_auc": ranking.auc(logits, truths),
        "mean_average_precision": ranking.average_precision(logits, truths),
        **{name: bootstrapped(float(values[0]), values[1:], n) for name, values in f1.items()},
        "exact_match": wilson(int((truths == guesses).all(-1).sum()), n),
        "loss": bootstrap_mean(-_log_sigmoid(np.where(truths, logits, -logits)).mean(-1)),
    }


def roc(logits: np.ndarray, labels: np.ndarray) -> dict[str, list[float]] | None:
    """The ROC curve of two classes, the second the positive one: ``{"fpr": ..., "tpr": ...}``, about 200 points.

    None where there are more classes, several labels an example, or one of the two does not occur.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    return ranking.roc(_scores(logits), labels == 1) if logits.shape[1:] == (2,) and labels.ndim == 1 else None


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts by class: (N, C), (N,) -> (C, C) int64, labels down and predictions across."""
    logits, labels = _checked(logits, labels)
    classes = logits.shape[-1]
    cells = labels * classes + logits.argmax(-1)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float64."""
    return np.exp(_log_softmax(np.asarray(logits, np.float64)))


def collect(
    parts: Iterable[Mapping[str, np.ndarray]], aside: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of many batches as one, in the order of the examples and without padding rows.

    Args:
      parts: of each batch, and of each process, arrays with one row per example; ``index`` is among them, -1 on
        padding rows.
      aside: what is known of every example besides, in order.

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
    return {**out, **(aside or {})}


def macro_f1(hits: np.ndarray, both: np.ndarray) -> np.ndarray:
    """``mean_c 2 TP_c / (labels_c + predictions_c)`` over the classes that occur: (..., C), (..., C) -> (...)."""
    return (2 * hits / np.maximum(both, 1)).sum(-1) / np.maximum((both > 0).sum(-1), 1)


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.int64)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"metrics: expected logits (N, C) and labels (N,), N > 0; got {logits.shape}, {labels.shape}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"metrics: labels must be in 0..{logits.shape[1] - 1}, got {labels.min()}..{labels.max()}")
    return logits, labels


def _scores(logits: np.ndarray) -> np.ndarray:
    """The log odds of the second of two classes: probabilities round to 1 and would tie."""
    with np.errstate(invalid="ignore"):
        return logits[:, 1] - logits[:, 0]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a diverged model's loss is nan, which is what to report
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _log_sigmoid(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return -np.logaddexp(0, -logits)


def _mean_recall(hits: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """``mean_c TP_c / labels_c`` over the classes that occur: (..., C), (..., C) -> (...)."""
    return (hits / np.maximum(truths, 1)).sum(-1) / (truths > 0).sum(-1)


def _of_counts(counts: np.ndarray, statistic: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Metric:
    """A statistic of hits, labels and predictions by class, each (..., C).

    Resampled examples have multinomial confusion counts, so the counts are drawn directly: those of the cells that
    occur, no more than there are examples.
    """
    n, classes = int(counts.sum()), len(counts)
    cells = np.flatnonzero(counts)
    truth, guess = np.divmod(cells, classes)

    def by(ids: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        out, order = np.zeros((len(drawn), classes)), np.argsort(ids, kind="stable")
        found, starts = np.unique(ids[order], return_index=True)
        if len(found):
            out[:, found] = np.add.reduceat(drawn[:, order], starts, axis=1)
        return out

    def of(drawn: np.ndarray) -> np.ndarray:
        right = truth == guess
        return statistic(by(truth[right], drawn[:, right]), by(truth, drawn), by(guess, drawn))

    shares = counts.reshape(-1)[cells] / n
    resampled = resample(len(cells) + 3 * classes, lambda rng, rows: of(rng.multinomial(n, shares, size=rows)))
    return bootstrapped(float(of(counts.reshape(1, -1)[:, cells])[0]), resampled, n)
