"""Plots as inline SVG, coloured by the page's style sheet: learning curves, and dots with intervals."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from jaxtransfer.report.markup import Html, join, tag
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


def lines(
    series: Mapping[str, Sequence[Sequence[Point]]],
    *,
    show: Callable[[float], str],
    percent: bool = False,
    dots: bool = False,
    about: str,
) -> Html:
    """Curves over steps: one colour for each series, one line for each of its runs.

    Args:
      series: name, which is also its class in the style sheet -> runs -> points (step, value).
      show: a value in words, for what appears over a point.
      percent: values are shares, drawn in percent.
      dots: mark the points.
      about: what is drawn, for those who cannot see it.
    """
    scale = 100.0 if percent else 1.0
    points = [point for runs in series.values() for run in runs for point in run]
    positive = all(value >= 0 for _, value in points)
    x = axis([0.0, *(x for x, _ in points)], 46, WIDTH - 14, tight=True)
    y = axis(
        (scale * y for _, y in points), 206, 12, count=4, low=0.0 if positive else None, high=100.0 if percent else None
    )
    grid = [
        tag("line", x1=x.start, x2=x.end, y1=y(t), y2=y(t), class_="grid")
        + _text(y.label(t) + (" %" if percent else ""), x.start - 8, y(t) + 4, "end")
        for t in y.ticks
    ]
    grid += [_text(x.label(t) if t else "step 0", x(t), 225, "middle") for t in x.ticks]
    drawn = []
    for name, runs in series.items():
        for run in runs:
            place = [(x(step), y(scale * value)) for step, value in run]
            path = " ".join(f"{px},{py}" for px, py in place)
            drawn.append(tag("polyline", points=path, class_=f"curve {name}"))
            if dots or len(run) == 1:
                drawn += [
                    tag(
                        "circle",
                        tag("title", f"{name}, step {step:g}: {show(value)}"),
                        cx=px,
                        cy=py,
                        r=3,
                        class_=name,
                    )
                    for (px, py), (step, value) in zip(place, run, strict=True)
                ]
    return _svg(join([*grid, *drawn]), 232, about)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of :func:`dot_plot`: a value, its interval where it has one, and what it is the mean of."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    parts: tuple[float, ...] = ()
    kind: str = "transfer"


def dot_plot(
    rows: Sequence[Row],
    *,
    show: Callable[[float], str],
    percent: bool = False,
    zero: bool = False,
    about: str,
) -> Html:
    """Values with their intervals, one below the other.

    Args:
      rows: from top to bottom; ``kind`` is the class in the style sheet.
      show: a value in words, for what appears over a point.
      percent: values are shares, drawn in percent.
      zero: the values are differences, and zero is marked.
      about: what is drawn, for those who cannot see it.
    """
    scale = 100.0 if percent else 1.0
    seen = [v for row in rows for v in (row.value, row.low, row.high, *row.parts) if v is not None and math.isfinite(v)]
    low, high = (0.0, 100.0) if percent and not zero else (None, None)
    left = 14 + 6.6 * min(24, max(len(row.name) for row in rows))
    seen += [0.0] if zero else []
    x = axis((scale * v for v in seen), left, WIDTH - 18, count=4, low=low, high=high)
    bottom = 12 + 34 * len(rows)
    grid = [
        tag("line", x1=x(t), x2=x(t), y1=8, y2=bottom, class_="zero" if zero and t == 0 else "grid")
        + _text(x.label(t) + (" %" if percent and not zero else ""), x(t), bottom + 18, "middle")
        for t in x.ticks
    ]
    drawn = [_dots(row, 12 + 34 * index + 17, x, scale, show) for index, row in enumerate(rows)]
    return _svg(join([*grid, *drawn]), bottom + 26, about)


def _dots(row: Row, y: float, x: Axis, scale: float, show: Callable[[float], str]) -> Html:
    name = row.name if len(row.name) <= 24 else f"{row.name[:11]}…{row.name[-12:]}"
    parts = [_text(name, x.start - 12, y + 4, "end", row.name)]
    if row.low is not None and row.high is not None and math.isfinite(row.high - row.low):
        a, b = x(scale * row.low), x(scale * row.high)
        words = tag("title", f"{row.name}: 95 % interval {show(row.low)} to {show(row.high)}")
        parts.append(tag("line", words, x1=a, x2=b, y1=y, y2=y, class_=f"span {row.kind}"))
    parts += [
        tag(
            "circle",
            tag("title", f"{row.name}: {show(v)}"),
            cx=x(scale * v),
            cy=y,
            r=3.5,
            class_=f"part {row.kind}",
        )
        for v in row.parts
    ]
    value = tag("title", f"{row.name}: {show(row.value)}")
    parts.append(tag("circle", value, cx=x(scale * row.value), cy=y, r=5, class_=row.kind))
    return join(parts)


def _text(text: str, x: float, y: float, anchor: str, title: str | None = None) -> Html:
    return tag("text", text, None if title is None else tag("title", title), x=x, y=round(y, 2), text_anchor=anchor)


def _svg(body: Html, height: float, about: str) -> Html:
    return tag("svg", body, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=about)
