"""Sections about how well it does: learning curves, metrics by split and by subgroup."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtransfer.report import plots
from jaxtransfer.report.markup import Html, absent, join, note, table, tag
from jaxtransfer.report.numerals import (
    bounded,
    count,
    ends,
    highest,
    is_share,
    many,
    named,
    number,
    shown,
    span,
    titled,
)

Record = Mapping[str, Any]
NAMES = {"transfer": "transfer", "scratch": "from scratch"}
BEFORE = "before training"
LEADING = (
    "bits_per_byte", "perplexity", "auc", "sensitivity_at_90", "f1", "exact_match", "accuracy", "macro_auc",
    "mean_average_precision",
)  # fmt: skip
MAX_CURVES, MAX_COLUMNS = 3, 4


def leading(metrics: Sequence[str]) -> list[str]:
    """The metrics, those that say most about their kind of task first."""
    return sorted(metrics, key=lambda name: LEADING.index(name) if name in LEADING else len(LEADING))


def main(record: Record) -> str:
    """The metric that the record is about."""
    for key in ("study", "curve"):
        if record.get(key):
            return record[key]["metric"]
    found = [metric for cells in (record.get("metrics") or {}).values() for metric in cells or ()]
    return leading(found)[0] if found else "accuracy"


def curves(record: Record) -> Html:
    """One plot for each quantity: the train loss, and of the evaluations the loss and what ``metrics`` holds."""
    rows = {name: value for name, value in (record.get("curves") or {}).items() if value}
    scored = [metric for cells in (record.get("metrics") or {}).values() for metric in cells or () if metric != "loss"]
    evaluated = [
        metric
        for metric in dict.fromkeys([main(record), *scored])
        if any(metric in row for recorded in rows.values() for row in recorded)
    ]
    wanted = [("train", "loss"), *(("eval", metric) for metric in [*evaluated[:MAX_CURVES], "loss"])]
    drawn = [figure for kind, metric in dict.fromkeys(wanted) if (figure := _curve(rows, kind, metric)) is not None]
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
        most=highest(metric),
        dots=kind == "eval",
        about=f"{title} by step: {', '.join(series)}",
    )
    keys = [tag("span", NAMES.get(name, name), class_=f"key {name}") for name in series]
    return figure(plot, title, *keys, tag("span", "; ".join(remarks), class_="remark") if remarks else None)


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
    """Metrics by split, the ROC curve where there is one, then metrics by subgroup of the examples."""
    splits = {name: cells for name, cells in (record.get("metrics") or {}).items() if cells}
    missing = [name for name in ("test", "validation") if name not in splits]
    parts = [absent(f"No metrics were recorded for: {', '.join(missing)}.")] if missing else []
    before = {BEFORE: record["before"]} if record.get("before") else {}
    if splits or before:
        parts += [note("Below each value its 95 % interval."), _scored("Split", before | splits, _roc(record, splits))]
    subgroups = {name: values for name, values in (record.get("subgroups") or {}).items() if values}
    for column, values in subgroups.items():
        parts += [tag("h3", f"By {column}"), _scored(column.capitalize(), values)]
    if not subgroups:
        parts.append(absent("No metrics by subgroup were recorded."))
    return join(parts)


def _roc(record: Record, splits: Mapping[str, Mapping[str, Record]]) -> Html | None:
    if not (curve := record.get("roc")):
        return None
    found = next((splits[name] for name in ("test", *splits) if name in splits), {})
    mark = None
    if (cell := found.get("sensitivity_at_90")) and bounded(cell):
        words = f"sensitivity {number(100 * cell['value'])} % at a specificity of 90 %"
        mark = (0.1, cell["value"], words)
    said = [f"AUC {shown('auc', found['auc']['value'])}"] if "auc" in found else []
    said += [f"positive: {record['labels'][1]}"] if len(record.get("labels") or ()) == 2 else []
    about = ", ".join(["ROC curve", *said])
    plot = plots.roc(curve["fpr"], curve["tpr"], mark=mark, about=about)
    return figure(plot, "ROC curve", tag("span", ", ".join(said), class_="remark") if said else None)


def _scored(name: str, rows: Mapping[str, Mapping[str, Record]], plot: Html | None = None) -> Html:
    """A table of groups and metrics, on its side where there are many of these, and beside it a plot.

    Without a plot of one's own it is one of the first metric between 0 and 1, or of the first.
    """
    wanted = leading(list(dict.fromkeys(metric for cells in rows.values() for metric in cells)))
    if len(wanted) > MAX_COLUMNS >= len(rows) or BEFORE in rows:
        columns = {"Metric": None, **{group.capitalize(): "num" for group in rows}}
        body = [[titled(metric), *(_maybe(metric, cells) for cells in rows.values())] for metric in wanted]
        body.insert(0, ["Over", *map(_over, rows.values())])
    else:
        columns = {name: None, "n": "num", **{titled(metric): "num" for metric in wanted}}
        body = [[group, _over(cells), *(_maybe(metric, cells) for metric in wanted)] for group, cells in rows.items()]
    if plot is None and wanted:
        first = next((metric for metric in wanted if highest(metric)), wanted[0])
        seen = {group: cells[first] for group, cells in rows.items() if first in cells}
        drawn = [
            plots.Row(group, found["value"], *ends(found), kind="before" if group == BEFORE else "transfer")
            for group, found in seen.items()
            if found["value"] is not None and math.isfinite(found["value"])
        ]
        plot = figure(dots(first, drawn), titled(first)) if drawn else None
    return tag("div", table(columns, body), plot, class_="beside")


def _maybe(metric: str, cells: Mapping[str, Record]) -> Html | str:
    return cell(metric, cells[metric]) if metric in cells else "–"


def cell(metric: str, found: Record) -> Html:
    """A value and below it its interval."""
    below = span(metric, found) if bounded(found) else "no interval"
    return join([shown(metric, found["value"]), tag("span", below, class_="below")])


def _over(cells: Mapping[str, Record]) -> str:
    """What the intervals of a row are over; all there is, should its metrics differ."""
    known = [found for found in cells.values() if found.get("n") is not None]
    said = (many(found["n"], found["over"]) if found.get("over") else count(found["n"]) for found in known)
    return ", ".join(dict.fromkeys(said)) or "–"


def dots(metric: str, rows: Sequence[plots.Row]) -> Html:
    """A dot plot of one metric."""
    about = f"{named(metric)}: " + ", ".join(f"{row.name} {shown(metric, row.value)}" for row in rows)
    percent, most = is_share(metric), highest(metric)
    return plots.dot_plot(rows, show=lambda value: shown(metric, value), percent=percent, most=most, about=about)


def figure(plot: Html, title: str, *more: Html | None) -> Html:
    """A plot under its title."""
    return tag("figure", tag("figcaption", tag("b", title), *more), plot)
