"""Did the transfer help? Seeds paired with a control from scratch at the same budget, and intervals."""

import dataclasses
import math
from collections.abc import Sequence
from statistics import fmean, stdev

LEVEL = 0.95


class StudyError(ValueError):
    """Numbers that cannot be compared: none at all, not paired, or not finite."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds with its 95 % interval; one seed leaves the interval unbounded."""

    value: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True)
class Gain:
    """How much better the transfer is than its control, and whether the interval leaves zero.

    Attributes:
      value: mean of the paired differences, positive where the transfer is better.
      low: lower end of the 95 % interval.
      high: upper end of the 95 % interval.
      n: number of pairs.
      verdict: ``"positive"`` if low > 0, ``"negative"`` if high < 0, else ``"none"``.
    """

    value: float
    low: float
    high: float
    n: int
    verdict: str


@dataclasses.dataclass(frozen=True)
class Study:
    """A metric of transfer and control by seed, and what follows; a report reads it as a dictionary.

    Attributes:
      metric: the metric's name.
      seeds: one for each pair.
      transfer: the metric of the transfer, by seed.
      scratch: the metric of the control from scratch at the same budget, by seed.
      gain: of the transfer over the control.
      intervals: ``"transfer"`` and ``"scratch"`` -> their means with intervals.
    """

    metric: str
    seeds: tuple[int, ...]
    transfer: tuple[float, ...]
    scratch: tuple[float, ...]
    gain: Gain
    intervals: dict[str, Interval]


def compare(
    metric: str,
    seeds: Sequence[int],
    transfer: Sequence[float],
    scratch: Sequence[float],
    *,
    lower_is_better: bool = False,
) -> Study:
    """The whole comparison of a transfer with its control, paired by seed.

    Raises:
      StudyError: the numbers of seeds, transfers and controls differ, or see :func:`interval`.

    Example:
      >>> compare("accuracy", [0, 1, 2], [0.91, 0.92, 0.93], [0.62, 0.65, 0.61]).gain.verdict
      'positive'
    """
    if not len(seeds) == len(transfer) == len(scratch):
        raise StudyError(
            f"compare {metric}: {len(seeds)} seeds, {len(transfer)} values of the transfer and {len(scratch)} of the "
            "control; run both once for every seed"
        )
    return Study(
        metric=metric,
        seeds=tuple(seeds),
        transfer=tuple(transfer),
        scratch=tuple(scratch),
        gain=gain(transfer, scratch, lower_is_better=lower_is_better),
        intervals={"transfer": interval(transfer), "scratch": interval(scratch)},
    )


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student's 95 % interval over seeds: ``mean ± t(0.975, n - 1) * stdev / sqrt(n)``.

    One value says nothing about its spread: the interval is then the whole line.

    Raises:
      StudyError: there is no value, or one is not finite.

    Example:
      >>> interval([0.25, 0.5, 0.75])
      Interval(value=0.5, low=-0.121..., high=1.121..., n=3)
    """
    if not values:
        raise StudyError("interval: no values")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise StudyError(f"interval: value {index} of {len(values)} is {value}")
    mean, n = fmean(values), len(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, n)
    half = t_quantile(0.5 + LEVEL / 2, n - 1) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def gain(transfer: Sequence[float], control: Sequence[float], *, lower_is_better: bool = False) -> Gain:
    """Interval of the paired differences ``transfer - control``; minus the transfer gap of Wang et al. (2019).

    Args:
      transfer: a metric by seed.
      control: the same metric from scratch at the same budget, in the same order of seeds.
      lower_is_better: the metric is a loss; the differences are then ``control - transfer``.

    Raises:
      StudyError: the two differ in length, or see :func:`interval`.

    Example:
      >>> gain([0.91, 0.92], [0.92, 0.91]).verdict, gain([0.3, 0.31], [0.5, 0.52], lower_is_better=True).verdict
      ('none', 'positive')
    """
    if len(transfer) != len(control):
        raise StudyError(f"gain: {len(transfer)} values of the transfer, {len(control)} of the control; pair them")
    sign = -1.0 if lower_is_better else 1.0
    got = interval([sign * (a - b) for a, b in zip(transfer, control, strict=True)])
    verdict = "positive" if got.low > 0 else "negative" if got.high < 0 else "none"
    return Gain(got.value, got.low, got.high, got.n, verdict)


def t_quantile(probability: float, df: int) -> float:
    """The quantile of Student's t with ``df`` degrees of freedom, by bisection of its distribution function.

    Args:
      probability: in (0, 1).
      df: a positive integer.

    Raises:
      StudyError: an argument is out of range.

    Example:
      >>> round(t_quantile(0.975, 2), 4)
      4.3027
    """
    if not 0.0 < probability < 1.0 or df < 1:
        raise StudyError(f"t_quantile: probability {probability} and df {df}, expected one in (0, 1) and df >= 1")
    if probability < 0.5:
        return -t_quantile(1.0 - probability, df)
    target = 2.0 * probability - 1.0
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:  # until the two are neighbouring floats
        low, high = (middle, high) if _central(middle, df) < target else (low, middle)
    return math.tan(low) * math.sqrt(df)


def _central(theta: float, df: int) -> float:
    """P(|T| <= tan(theta) sqrt(df)), a finite sum for integer df: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    return 2.0 / math.pi * (theta + sine * total) if odd else sine * total
