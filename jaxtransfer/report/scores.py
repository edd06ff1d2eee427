"""Sections about how well it does: transfer against scratch, learning curves, metrics."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from jaxtransfer.report import plots
from jaxtransfer.report.markup import Html, absent, join, note, table, tag
from jaxtransfer.report.numerals import bounded, count, gained, is_share, many, named, shown, span

Record = Mapping[str, Any]
NAMES = {"transfer": "transfer", "scratch": "from scratch"}


def study(record: Record) -> Html:
    """Transfer and control by seed, and the gain."""
    if not (got := record.get("study")):
        return absent("No control from scratch was recorded.")
    metric, gain, ranges = got["metric"], got["gain"], got.get("intervals") or {}
    rows = [
        plots.Row(name, fmean(got[key]), *_ends(ranges.get(key) or {}), parts=tuple(got[key]), kind=key)
        for key, name in NAMES.items()
    ]
    pairs = [a - b for a, b in zip(got["transfer"], got["scratch"], strict=True)]
    sign = -1.0 if sum(pairs) * gain["value"] < 0 else 1.0  # of a loss, less is a gain
    change = plots.Row("gain", gain["value"], *_ends(gain), parts=tuple(sign * p for p in pairs), kind="gain")
    said = f"Small dots are the seeds {', '.join(map(str, got['seeds']))}, large dots their means, bars the 95 % "
    plot = plots.dot_plot(
        [change],
        show=lambda value: gained(metric, value),
        percent=is_share(metric),
        zero=True,
        about=f"Gain: {gained(metric, gain['value'])}",
    )
    figures = [
        _figure(_dots(metric, rows), _title(metric)),
        _figure(plot, f"Gain in {named(metric)}" + (", points" if is_share(metric) else "")),
    ]
    explained = note(said, "intervals by Student's t; that of the gain is over the differences of paired seeds.")
    return join([explained, tag("div", *figures, class_="figures")])


def curves(record: Record) -> Html:
    """One plot for each quantity: the train loss, and of the evaluations the loss and what ``metrics`` holds."""
    rows = {name: value for name, value in (record.get("curves") or {}).items() if value}
    main = (record.get("study") or {}).get("metric", "accuracy")
    scored = [metric for cells in (record.get("metrics") or {}).values() for metric in cells or ()]
    wanted = [("train", "loss"), *(("eval", metric) for metric in dict.fromkeys([main, *scored, "loss"]))]
    drawn = [figure for kind, metric in wanted if (figure := _curve(rows, kind, metric)) is not None]
    if not drawn:
        return absent("No metrics by step were recorded.")
    lacking = [name for key, name in NAMES.items() if key not in rows]
    alone = note(f"No curves were recorded for: {', '.join(lacking)}.") if lacking else None
    return join([alone, tag("div", *drawn, class_="figures")])


def _curve(rows: Mapping[str, Sequence[Record]], kind: str, metric: str) -> Html | None:
    series: dict[str, list[list[plots.Point]]] = {}
    width, lost = 1, 0
    for name, recorded in rows.items():
        runs, skipped = _runs(recorded, kind, metric)
        lost += skipped
        if runs:
            thinned = [plots.thin(run) for run in runs]
            series[name] = [points for points, _ in thinned]
            width = max(width, *(each for _, each in thinned))
    if not series:
        return None
    remarks = [f"means over {width} records"] if width > 1 else []
    remarks += [f"{many(lost, 'value')} not finite, left out"] if lost else []
    title = f"{'Train' if kind == 'train' else 'Validation'} {named(metric)}"
    plot = plots.lines(
        series,
        show=lambda value: shown(metric, value),
        percent=is_share(metric),
        dots=kind == "eval",
        about=f"{title} by step: {', '.join(series)}",
    )
    keys = [tag("span", NAMES.get(name, name), class_=f"key {name}") for name in series]
    return _figure(plot, title, *keys, tag("span", "; ".join(remarks), class_="remark") if remarks else None)


def _runs(rows: Sequence[Record], kind: str, metric: str) -> tuple[list[list[plots.Point]], int]:
    """Points by step for each seed, and how many values were not finite."""
    runs: dict[Any, list[plots.Point]] = {}
    lost = 0
    for row in rows:
        if row.get("kind") != kind or metric not in row:
            continue
        if row[metric] is None or not math.isfinite(row[metric]):
            lost += 1
        else:
            runs.setdefault(row.get("seed"), []).append((row["step"], row[metric]))
    return [sorted(run) for run in runs.values()], lost


def metrics(record: Record) -> Html:
    """Metrics by split, then by subgroup of the examples."""
    splits = {name: cells for name, cells in (record.get("metrics") or {}).items() if cells}
    missing = [name for name in ("test", "validation") if name not in splits]
    parts = [absent(f"No metrics were recorded for: {', '.join(missing)}.")] if missing else []
    if splits:
        parts += [note("Below each value its 95 % interval."), _scored("Split", splits)]
    subgroups = {name: values for name, values in (record.get("subgroups") or {}).items() if values}
    for column, values in subgroups.items():
        parts += [tag("h3", f"By {column}"), _scored(column.capitalize(), values)]
    if not subgroups:
        parts.append(absent("No metrics by subgroup were recorded."))
    return join(parts)


def _scored(name: str, rows: Mapping[str, Mapping[str, Record]]) -> Html:
    """A table with a row for each group and a column for each metric; beside it a plot of the first that is a share."""
    wanted = list(dict.fromkeys(metric for cells in rows.values() for metric in cells))
    columns = {name: None, "n": "num", **{_title(metric): "num" for metric in wanted}}
    body = [
        [group, _over(cells), *(_cell(metric, cells[metric]) if metric in cells else "–" for metric in wanted)]
        for group, cells in rows.items()
    ]
    parts = [table(columns, body)]
    first = next((metric for metric in wanted if is_share(metric)), None)
    if first is not None:
        seen = {group: cells[first] for group, cells in rows.items() if first in cells}
        dots = [plots.Row(group, cell["value"], *_ends(cell)) for group, cell in seen.items()]
        parts.append(_figure(_dots(first, dots), _title(first)))
    return tag("div", *parts, class_="beside")


def _cell(metric: str, cell: Record) -> Html:
    below = span(metric, cell) if bounded(cell) else "no interval"
    return join([shown(metric, cell["value"]), tag("span", below, class_="below")])


def _over(cells: Mapping[str, Record]) -> str:
    """What the intervals of a row are over; all there is, should its metrics differ."""
    known = [cell for cell in cells.values() if cell.get("n") is not None]
    said = (many(cell["n"], cell["over"]) if cell.get("over") else count(cell["n"]) for cell in known)
    return ", ".join(dict.fromkeys(said)) or "–"


def _ends(cell: Record) -> tuple[float | None, float | None]:
    return (cell["low"], cell["high"]) if bounded(cell) else (None, None)


def _dots(metric: str, rows: Sequence[plots.Row]) -> Html:
    about = f"{named(metric)}: " + ", ".join(f"{row.name} {shown(metric, row.value)}" for row in rows)
    return plots.dot_plot(rows, show=lambda value: shown(metric, value), percent=is_share(metric), about=about)


def _title(metric: str) -> str:
    name = named(metric)
    return name[:1].upper() + name[1:]


def _figure(plot: Html, title: str, *more: Html | None) -> Html:
    return tag("figure", tag("figcaption", tag("b", title), *more), plot)
