"""Did the transfer help? Seeds paired with a control from scratch at the same budget, and intervals."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
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


@dataclasses.dataclass(frozen=True)
class Point:
    """Transfer and control at one budget: as `Study`, whose seeds are those of the `Curve`."""

    budget: int
    transfer: tuple[float, ...]
    scratch: tuple[float, ...]
    gain: Gain
    intervals: dict[str, Interval]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Data efficiency: a metric of transfer and control over budgets of labels; a report reads it as a dictionary.

    Attributes:
      metric: the metric's name.
      unit: what a budget counts: ``"labels per class"``, ``"examples"``.
      points: in the order of their budgets.
      reached: the control's mean at the largest budget.
      needed: the budget at which the transfer reaches that: where the line through its means, straight over the
        logarithm of the budget, first gets there; None where it never does.
      saving: how many times fewer labels that is, ``largest budget / needed``; None likewise.
      at_least: the transfer is there at the smallest budget already, so that it may need fewer yet.
      lower_is_better: the metric is a loss.
    """

    metric: str
    unit: str
    points: tuple[Point, ...]
    reached: float
    needed: float | None
    saving: float | None
    at_least: bool
    lower_is_better: bool


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


def curve(
    metric: str,
    budgets: Sequence[int],
    transfer: Mapping[int, Sequence[float]],
    scratch: Mapping[int, Sequence[float]],
    *,
    lower_is_better: bool = False,
    unit: str = "labels per class",
) -> Curve:
    """The data-efficiency curve of a transfer and its control, paired by seed at every budget.

    Args:
      metric: its name.
      budgets: how much labelled data there was to train on; positive.
      transfer: budget -> the metric by seed.
      scratch: the same of the control, in the same order of seeds.
      lower_is_better: the metric is a loss.
      unit: what a budget counts.

    Raises:
      StudyError: no budget, one that is not positive or occurs twice, or one without values; or see :func:`compare`.

    Example:
      >>> transfer, scratch = {5: [0.70, 0.72], 50: [0.90, 0.91]}, {5: [0.40, 0.45], 50: [0.80, 0.82]}
      >>> found = curve("accuracy", [5, 50], transfer, scratch)
      >>> round(found.needed, 1), round(found.saving, 1)
      (16.3, 3.1)
    """
    budgets = sorted(budgets)
    if not budgets or budgets[0] <= 0 or len(set(budgets)) < len(budgets):
        raise StudyError(f"curve {metric}: budgets must be different positive numbers, got {budgets}")
    points = []
    for budget in budgets:
        if budget not in transfer or budget not in scratch:
            lacking = "transfer" if budget not in transfer else "control"
            raise StudyError(f"curve {metric}: no values of the {lacking} at budget {budget}")
        a, b = transfer[budget], scratch[budget]
        got = compare(metric, range(len(a)), a, b, lower_is_better=lower_is_better)
        points.append(Point(budget, got.transfer, got.scratch, got.gain, got.intervals))
    reached = points[-1].intervals["scratch"].value
    sign = -1.0 if lower_is_better else 1.0
    needed = _crossing(budgets, [sign * point.intervals["transfer"].value for point in points], sign * reached)
    saving = None if needed is None else budgets[-1] / needed
    return Curve(metric, unit, tuple(points), reached, needed, saving, needed == budgets[0], lower_is_better)


def _crossing(budgets: Sequence[int], values: Sequence[float], level: float) -> float | None:
    """The smallest budget at which the values, straight over the budget's logarithm between them, reach the level."""
    if values[0] >= level:
        return float(budgets[0])
    for (a, low), (b, high) in pairwise(zip(budgets, values, strict=True)):
        if high >= level:
            return a * (b / a) ** ((level - low) / (high - low))
    return None


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
