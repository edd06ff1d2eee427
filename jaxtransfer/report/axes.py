"""Axes and what every plot is made of: ranges laid over pixels, text, the frame of an inline SVG."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from jaxtransfer.report.markup import Html, tag
from jaxtransfer.report.numerals import number

Point = tuple[float, float]
WIDTH = 440


@dataclasses.dataclass(frozen=True)
class Axis:
    """A range of data laid over a range of pixels, with round ticks."""

    low: float
    high: float
    step: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value; what lies outside stops at the edge."""
        part = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + part * (self.end - self.start), 2)

    @property
    def ticks(self) -> list[float]:
        """The multiples of ``step`` in the range."""
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [self.step * k for k in range(first, last + 1)]

    def label(self, value: float) -> str:
        """A tick with the digits that the step needs."""
        return number(value, max(0, -math.floor(math.log10(self.step) + 1e-9)))


def axis(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    count: int = 5,
    low: float | None = None,
    high: float | None = None,
    tight: bool = False,
) -> Axis:
    """An axis over values, about ``count`` ticks long.

    Args:
      values: finite, at least one.
      start: pixel of the lower end.
      end: pixel of the upper end.
      count: number of steps between ticks, at the least half of it.
      low: bound of the lower end: what lies beyond is drawn at the edge.
      high: bound of the upper end.
      tight: the ends are the data's, not the next round ticks.

    Example:
      >>> [round(tick, 1) for tick in axis([0.13, 0.87], 0, 100).ticks]
      [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    values = list(values)
    a, b = min(values), max(values)
    if b - a <= 1e-9 * max(abs(a), abs(b)):
        pad = abs(a) / 10 or 1.0
        a, b = a - pad, b + pad
    raw = (b - a) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= raw * (1 - 1e-9))
    if not tight:
        a, b = step * math.floor(a / step + 1e-9), step * math.ceil(b / step - 1e-9)
    inner = (a if low is None else max(a, low), b if high is None else min(b, high))
    return Axis(*(inner if inner[0] < inner[1] else (a, b)), step, start, end)


def thin(points: Sequence[Point], limit: int = 120) -> tuple[list[Point], int]:
    """At most ``limit`` points, each the mean of its neighbourhood, and the size of a neighbourhood.

    Example:
      >>> thin([(0, 1.0), (1, 3.0), (2, 5.0)], limit=2)
      ([(0.5, 2.0), (2.0, 5.0)], 2)
    """
    width = max(1, math.ceil(len(points) / limit))
    if width == 1:
        return list(points), 1
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups], width


def text(words: str, x: float, y: float, anchor: str, title: str | None = None) -> Html:
    """A line of text; ``title`` is what the pointer is told."""
    return tag("text", words, None if title is None else tag("title", title), x=x, y=round(y, 2), text_anchor=anchor)


def svg(body: Html, height: float, about: str) -> Html:
    """A plot of so many units in height, read out as ``about``."""
    return tag("svg", body, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=about)
