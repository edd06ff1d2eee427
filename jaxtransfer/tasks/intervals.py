"""A value with its 95 % interval: Wilson's for proportions, linearised for ranks, bootstrapped for the rest."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
_SEED = 0
_BLOCK = 1 << 22  # numbers drawn at a time: 32 MB
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Metric:
    """A value with its 95 % interval, over ``n`` examples; all NaN where the data does not define it."""

    value: float
    low: float
    high: float
    n: int


def undefined(n: int) -> Metric:
    """What is known of a metric that the data does not define, such as an AUC without positives."""
    return Metric(math.nan, math.nan, math.nan, n)


def wilson(hits: int, n: int) -> Metric:
    """A proportion with Wilson's score interval (Wilson 1927).

    With ``p = hits / n``: ``(p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)``.

    Example:
      >>> wilson(90, 100)
      Metric(value=0.9, low=0.8256..., high=0.9447..., n=100)
    """
    return Metric(hits / n, *_score(hits / n, n), n)


def linearised(value: float, influence: np.ndarray, most: float) -> Metric:
    """A statistic in [0, 1], by how it changes with each example's weight: the infinitesimal jackknife.

    Its variance is ``v = sum_i influence_i^2`` (Jaeckel 1972), and its interval Wilson's for the effective number of
    examples ``value (1 - value) / v``: inside [0, 1], and never of no width, as ``value +- z sqrt(v)`` is at 1.

    Args:
      value: the statistic.
      influence: (N,) its derivatives by the examples' weights.
      most: bound of the effective number; it stands in where all influence is 0.
    """
    variance = float(np.sum(influence * influence))
    effective = min(value * (1 - value) / variance, float(most)) if variance else float(most)
    return Metric(value, *_score(value, effective), len(influence))


def bootstrapped(value: float, resampled: np.ndarray, n: int) -> Metric:
    """A value with the percentile interval of its resamples (Efron 1979), which always holds the value itself."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Metric(value, min(float(low), value), max(float(high), value), n)


def resample(n: int, draw: Callable[[np.random.Generator, int], np.ndarray]) -> np.ndarray:
    """The statistic of `RESAMPLES` resamples, ``draw(rng, rows)`` computing some of them at a time.

    Args:
      n: numbers that one resample needs, by which memory is bounded.
      draw: gives (rows, ...).
    """
    rng, rows = np.random.default_rng(_SEED), max(1, _BLOCK // n)
    return np.concatenate([draw(rng, min(rows, RESAMPLES - start)) for start in range(0, RESAMPLES, rows)])


def bootstrap_mean(values: np.ndarray, sizes: np.ndarray | None = None) -> Metric:
    """The mean of (N,) values, of which N are drawn with replacement; weighted by their sizes (N,), where given.

    Example:
      >>> bootstrap_mean(np.array([1.0, 3.0]), np.array([3.0, 1.0]))
      Metric(value=1.5, low=1.0, high=3.0, n=2)
    """
    n = len(values)
    sizes = np.ones(n) if sizes is None else np.asarray(sizes, np.float64)
    sums = values * sizes

    def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
        index = rng.integers(0, n, (rows, n))
        return sums[index].sum(-1) / sizes[index].sum(-1)

    return bootstrapped(float(sums.sum() / sizes.sum()), resample(n, draw), n)


def weights(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """(rows, n) float64: how often each of n examples occurs in each resample."""
    cells = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(cells.reshape(-1), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _score(p: float, n: float) -> tuple[float, float]:
    z2 = _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return min(max(0.0, centre - half), p), max(min(1.0, centre + half), p)
