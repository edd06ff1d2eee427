"""Plots as inline SVG, coloured by the style sheet: lines, dots with intervals, data efficiency, ROC."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from jaxtransfer.report.axes import WIDTH, Axis, Point, axis, svg, text, thin
from jaxtransfer.report.markup import Html, join, tag

__all__ = ["Axis", "Point", "Row", "axis", "dot_plot", "efficiency", "lines", "roc", "thin"]


def lines(
    series: Mapping[str, Sequence[Sequence[Point]]],
    *,
    show: Callable[[float], str],
    percent: bool = False,
    most: float | None = None,
    dots: bool = False,
    about: str,
) -> Html:
    """Curves over steps: one colour for each series, one line for each of its runs.

    Args:
      series: name, which is also its class in the style sheet -> runs -> points (step, value).
      show: a value in words, for what appears over a point.
      percent: values are shares, drawn in percent.
      most: the most that a value can be; intervals that go beyond are cut there.
      dots: mark the points.
      about: what is drawn, for those who cannot see it.
    """
    scale = 100.0 if percent else 1.0
    points = [point for runs in series.values() for run in runs for point in run]
    positive = all(value >= 0 for _, value in points)
    x = axis([0.0, *(x for x, _ in points)], 46, WIDTH - 14, tight=True)
    y = axis((scale * y for _, y in points), 206, 12, count=4, low=0.0 if positive else None, high=_times(scale, most))
    grid = [_across(x, y, t, percent) for t in y.ticks]
    grid += [text(x.label(t) if t else "step 0", x(t), 225, "middle") for t in x.ticks]
    drawn = []
    for name, runs in series.items():
        for run in runs:
            place = [(x(step), y(scale * value)) for step, value in run]
            path = " ".join(f"{px},{py}" for px, py in place)
            drawn.append(tag("polyline", points=path, fill="none", class_=f"curve {name}"))
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
    return svg(join([*grid, *drawn]), 232, about)


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
    most: float | None = None,
    zero: bool = False,
    about: str,
) -> Html:
    """Values with their intervals, one below the other.

    Args:
      rows: from top to bottom; ``kind`` is the class in the style sheet.
      show: a value in words, for what appears over a point.
      percent: values are shares, drawn in percent.
      most: the most that a value can be; intervals that go beyond are cut there.
      zero: the values are differences, and zero is marked.
      about: what is drawn, for those who cannot see it.
    """
    scale = 100.0 if percent else 1.0
    seen = [v for row in rows for v in (row.value, row.low, row.high, *row.parts) if v is not None and math.isfinite(v)]
    low = None if most is None else 0.0
    left = 14 + 6.6 * min(24, max(len(row.name) for row in rows))
    seen += [0.0] if zero else []
    x = axis((scale * v for v in seen), left, WIDTH - 18, count=4, low=low, high=_times(scale, most))
    bottom = 12 + 34 * len(rows)
    grid = [
        tag("line", x1=x(t), x2=x(t), y1=8, y2=bottom, class_="zero" if zero and t == 0 else "grid")
        + text(x.label(t) + (" %" if percent and not zero else ""), x(t), bottom + 18, "middle")
        for t in x.ticks
    ]
    drawn = [_dots(row, 12 + 34 * index + 17, x, scale, show) for index, row in enumerate(rows)]
    return svg(join([*grid, *drawn]), bottom + 26, about)


def _dots(row: Row, y: float, x: Axis, scale: float, show: Callable[[float], str]) -> Html:
    name = row.name if len(row.name) <= 24 else f"{row.name[:11]}…{row.name[-12:]}"
    parts = [text(name, x.start - 12, y + 4, "end", row.name)]
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


def efficiency(
    series: Mapping[str, Mapping[int, Row]],
    *,
    names: Mapping[str, str],
    show: Callable[[float], str],
    percent: bool = False,
    most: float | None = None,
    unit: str,
    level: tuple[float, float, str] | None = None,
    about: str,
) -> Html:
    """Means over budgets on a logarithmic axis, with bands for their intervals and dots for their parts.

    Args:
      series: class in the style sheet -> budget -> its value; every series has the same budgets, the last is control.
      names: class -> what is written at the end of its line.
      show: a value in words, for what appears over a point.
      percent: values are shares, drawn in percent.
      most: the most that a value can be; intervals that go beyond are cut there.
      unit: what a budget counts.
      level: a budget, a value and words: a line at the value from the budget to the largest one.
      about: what is drawn, for those who cannot see it.
    """
    scale = 100.0 if percent else 1.0
    rows = [row for spots in series.values() for row in spots.values()]
    seen = [v for row in rows for v in (row.value, *row.parts)]
    reach = (max(seen) - min(seen)) / 2  # a band of two seeds may be wider than all there is to see
    ends = [min(max(v, min(seen) - reach), max(seen) + reach) for row in rows for v in _bounds(row) or ()]
    budgets = sorted(next(iter(series.values())))
    x = axis([math.log(budget) for budget in budgets], 50, WIDTH - 92, tight=True)
    low = 0.0 if min(seen) >= 0 else None
    y = axis((scale * v for v in [*seen, *ends]), 206, 12, count=4, low=low, high=_times(scale, most))
    drawn = [_across(x, y, t, percent) for t in y.ticks]
    edge = -math.inf
    for budget in budgets:
        if (place := x(math.log(budget))) - edge >= 26:
            drawn.append(text(f"{budget:,}", place, 225, "middle"))
            edge = place
    drawn.append(text(unit, (x.start + x.end) / 2, 243, "middle"))
    spots = {kind: [(x(math.log(b)), rows[b]) for b in budgets] for kind, rows in series.items()}
    drawn += [_band(places, y, scale, kind) for kind, places in spots.items()]
    if level is not None:
        start, height = x(math.log(level[0])), y(scale * level[1])
        drawn.append(tag("line", x1=start, x2=x.end, y1=height, y2=height, class_="zero"))
        drawn.append(tag("line", x1=start, x2=start, y1=height, y2=y.start, class_="zero"))
        control = list(series.values())[-1][budgets[0]].value
        side = 15 if control < level[1] else -6  # where the control comes from, the line of the transfer is not
        at, anchor = (start + 6, "start") if x.end - start > 110 else (x.end - 6, "end")
        drawn.append(tag("text", level[2], x=at, y=round(height + side, 2), text_anchor=anchor, class_="halo"))
    for kind, places in spots.items():
        path = " ".join(f"{px},{y(scale * row.value)}" for px, row in places)
        drawn.append(tag("polyline", points=path, fill="none", class_=f"curve {kind}"))
        drawn += [_spot(px, row, y, scale, show) for px, row in places]
    ends = _apart({kind: y(scale * places[-1][1].value) for kind, places in spots.items()})
    drawn += [tag("text", names[kind], x=x.end + 9, y=round(at + 4, 2), class_=kind) for kind, at in ends.items()]
    return svg(join(drawn), 250, about)


def _times(scale: float, most: float | None) -> float | None:
    return None if most is None else scale * most


def _across(x: Axis, y: Axis, value: float, percent: bool) -> Html:
    line = tag("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid")
    return line + text(y.label(value) + (" %" if percent else ""), x.start - 8, y(value) + 4, "end")


def _bounds(row: Row) -> tuple[float, float] | None:
    return (row.low, row.high) if row.low is not None and row.high is not None else None


def _band(places: Sequence[tuple[float, Row]], y: Axis, scale: float, kind: str) -> Html | None:
    """The area between the intervals' ends; where one has none, there is a gap."""
    parts: list[list[tuple[float, float, float]]] = [[]]
    for px, row in places:
        if ends := _bounds(row):
            parts[-1].append((px, y(scale * ends[0]), y(scale * ends[1])))
        else:
            parts.append([])
    return join(_area(part, kind) for part in parts if part)


def _area(part: Sequence[tuple[float, float, float]], kind: str) -> Html:
    if len(part) == 1:
        px, low, high = part[0]
        return tag("line", x1=px, x2=px, y1=low, y2=high, class_=f"span {kind}")
    around = [f"{px},{low}" for px, low, _ in part] + [f"{px},{high}" for px, _, high in part[::-1]]
    return tag("polygon", points=" ".join(around), class_=f"band {kind}")


def _spot(px: float, row: Row, y: Axis, scale: float, show: Callable[[float], str]) -> Html:
    words = f"{row.name}: {show(row.value)}"
    if ends := _bounds(row):
        words += f", 95 % interval {show(ends[0])} to {show(ends[1])}"
    parts = [tag("circle", cx=px, cy=y(scale * v), r=2.5, class_=f"part {row.kind}") for v in row.parts]
    return join([*parts, tag("circle", tag("title", words), cx=px, cy=y(scale * row.value), r=4, class_=row.kind)])


def _apart(places: Mapping[str, float], gap: float = 15.0) -> dict[str, float]:
    """Heights of labels at the lines' ends, moved so that none is over another."""
    out: dict[str, float] = {}
    for name in sorted(places, key=lambda name: places[name]):
        out[name] = max([places[name], *(height + gap for height in out.values())])
    return out


def roc(fpr: Sequence[float], tpr: Sequence[float], *, mark: tuple[float, float, str] | None, about: str) -> Html:
    """The ROC curve, in percent.

    Args:
      fpr: false positive rates, rising from 0 to 1.
      tpr: the true positive rates there.
      mark: a point on the curve and what is written beside it.
      about: what is drawn, for those who cannot see it.
    """
    x, y = Axis(0, 100, 20, 50, 350), Axis(0, 100, 20, 312, 12)
    drawn = [_across(x, y, t, True) for t in y.ticks]
    drawn += [tag("line", x1=x(t), x2=x(t), y1=y.start, y2=y.end, class_="grid") for t in x.ticks]
    drawn += [text(f"{x.label(t)} %", x(t), 331, "middle") for t in x.ticks]
    drawn.append(text("negatives that are taken for positive", 200, 350, "middle"))
    drawn.append(tag("line", x1=x(0), x2=x(100), y1=y(0), y2=y(100), class_="zero"))
    path = " ".join(f"{x(100 * a)},{y(100 * b)}" for a, b in zip(fpr, tpr, strict=True))
    drawn.append(tag("polyline", points=path, fill="none", class_="curve transfer"))
    if mark is not None:
        a, b, words = mark
        drawn.append(tag("circle", tag("title", words), cx=x(100 * a), cy=y(100 * b), r=4.5, class_="transfer"))
        drawn.append(tag("text", words, x=x(100 * a) + 12, y=round(y(100 * b) + 16, 2), class_="halo"))
    return svg(join(drawn), 358, about)
