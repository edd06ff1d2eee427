"""The head of the page: title, verdict, key numbers."""

import re
from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from jaxtransfer.report import origin
from jaxtransfer.report.markup import Html, tag
from jaxtransfer.report.numerals import bounded, count, duration, gained, many, named, number, shown, span, titled
from jaxtransfer.report.scores import leading, main
from jaxtransfer.report.transfer import amount, saved

Record = Mapping[str, Any]
WORDS = {"positive": "Transfer helped", "negative": "Transfer hurt", "none": "No difference shown"}
BESIDES = ("perplexity", "auc", "sensitivity_at_90", "macro_auc")
"""Metrics that have a tile even where the study is of another."""


def header(record: Record, title: str) -> Html:
    """Task, title and verdict."""
    labels = record.get("labels")
    about = [record.get("task"), f"{len(labels)} classes" if labels else None]
    small = " · ".join(part for part in about if part)
    sentence = re.sub(r"(?<=\d) (?=%|points|seed|times)", "\N{NO-BREAK SPACE}", verdict(record))
    return tag(
        "header",
        tag("p", small, class_="kicker") if small else None,
        tag("h1", title),
        tag("p", sentence, class_=f"verdict {_kind(record)}"),
    )


def verdict(record: Record) -> str:
    """Whether the transfer helped, in one sentence; where budgets of labels were compared, how many it saves.

    Example:
      >>> gain = {"value": 0.285, "low": 0.201, "high": 0.369, "verdict": "positive"}
      >>> scores = {"transfer": [0.90, 0.93], "scratch": [0.62, 0.64]}
      >>> print(verdict({"study": {"metric": "accuracy", "seeds": [0, 1], **scores, "gain": gain}}))
      Transfer helped: 91.5 % against 63.0 % from scratch, +28.5 points
      (95 % interval 20.1 to 36.9, 2 seeds): positive.
    """
    if record.get("verdict"):
        return record["verdict"]
    study, curve = record.get("study"), record.get("curve")
    if not study and not curve:
        return "There is no control from scratch, so whether the transfer helped is not known."
    said = [_compared(study)] if study else [_at_budgets(curve)] if curve else []
    return " ".join([*said, saved(curve)] if curve else said)


def _compared(study: Record) -> str:
    metric, gain, seeds = study["metric"], study["gain"], len(study["seeds"])
    transfer, scratch = (shown(metric, fmean(study[key])) for key in ("transfer", "scratch"))
    name = "" if metric == "accuracy" else f"{named(metric)} "
    change = f"{name}{transfer} against {scratch} from scratch, {gained(metric, gain['value'])}"
    if not bounded(gain):
        return f"Not settled: {change}, without an interval ({many(seeds, 'seed')}): {gain['verdict']}."
    interval = f"(95 % interval {span(metric, gain)}, {many(seeds, 'seed')})"
    return f"{WORDS[gain['verdict']]}: {change} {interval}: {gain['verdict']}."


def _at_budgets(curve: Record) -> str:
    found = Counter(point["gain"]["verdict"] for point in curve["points"])
    words = [f"{WORDS[kind]} at {found[kind]} of {many(found.total(), 'budget')}" for kind in WORDS if found[kind]]
    return f"{'; '.join([words[0], *(word[0].lower() + word[1:] for word in words[1:])])} ({named(curve['metric'])})."


def _kind(record: Record) -> str:
    if study := record.get("study"):
        return study["gain"]["verdict"]
    if curve := record.get("curve"):
        kinds = {point["gain"]["verdict"] for point in curve["points"]} - {"none"}
        return kinds.pop() if len(kinds) == 1 else "none"
    return "unknown"


def tiles(record: Record) -> Html | None:
    """The key numbers."""
    found = _tiles_of_transfer(record) or _tiles_of_metrics(record)
    found += [*_tile_of_forgetting(record.get("forgetting"))]
    if rows := record.get("groups"):
        some, every = origin.trained(rows)
        share = f"{number(100 * some / every)} %" if every else "none"
        found.append(_tile("Trained parameters", share, f"{count(some)} of {count(every)}"))
    run = record.get("run") or {}
    if run.get("seconds") is not None:
        steps = many(run["steps"], "step") if run.get("steps") is not None else ""
        found.append(_tile("Time", duration(run["seconds"]), steps))
    return tag("div", *found, class_="tiles") if found else None


def _tiles_of_transfer(record: Record) -> list[Html]:
    """Before training, after, from scratch and the gain: of the study, or of the curve's largest budget."""
    study, curve = record.get("study"), record.get("curve")
    if study:
        got, over = study, ""
    elif curve:
        got = curve["points"][-1]
        over = f" at {got['budget']:,}"
    else:
        return []
    metric, gain, ranges = main(record), got["gain"], got.get("intervals") or {}
    names = {"transfer": f"Transfer, {named(metric)}{over}", "scratch": f"From scratch{over}"}
    found = [*_before(record, metric)]
    found += [
        _tile(name, shown(metric, fmean(got[key])), _interval(metric, ranges.get(key) or {}), key)
        for key, name in names.items()
    ]
    found.append(_tile(f"Gain{over}", gained(metric, gain["value"]), _interval(metric, gain), gain["verdict"]))
    if curve and curve["saving"] is not None:
        times = f"{'≥ ' if curve['at_least'] else ''}{number(curve['saving'])} ×"
        kind = "positive" if gain["verdict"] == "positive" else "plain"
        found.append(_tile("Fewer labels", times, f"{amount(curve['needed'])} {curve['unit']}", kind))
    name, cells = _final(record)
    besides = [other for other in BESIDES if other in cells and other != metric][:2]
    return found + [_metric(name, other, cells[other]) for other in besides]


def _tiles_of_metrics(record: Record) -> list[Html]:
    name, cells = _final(record)
    return [*_before(record, main(record))] + [_metric(name, m, cells[m]) for m in leading(list(cells))[:3]]


def _before(record: Record, metric: str) -> list[Html]:
    cell = (record.get("before") or {}).get(metric)
    return [_tile(f"Before, {named(metric)}", shown(metric, cell["value"]), _interval(metric, cell))] if cell else []


def _tile_of_forgetting(got: Record | None) -> list[Html]:
    if not got:
        return []
    metric = got["metric"]
    before, after = (got[when][metric]["value"] for when in ("before", "after"))
    worse = (after > before) == bool(got["lower_is_better"]) and after != before
    below = f"{named(metric)}, {shown(metric, before)} to {shown(metric, after)}"
    return [_tile("On the source's data", gained(metric, after - before), below, "negative" if worse else "plain")]


def _final(record: Record) -> tuple[str, Mapping[str, Record]]:
    """The split that results are reported on, and its metrics."""
    splits = {name: cells for name, cells in (record.get("metrics") or {}).items() if cells}
    name = "test" if "test" in splits else next(iter(splits), "")
    return name, splits.get(name, {})


def _metric(split: str, metric: str, cell: Record) -> Html:
    return _tile(titled(f"{split} {metric}"), shown(metric, cell["value"]), _interval(metric, cell))


def _tile(name: str, value: str, below: str, kind: str = "plain") -> Html:
    texts = {"name": name, "value": value, "below": below}
    return tag("div", *(tag("div", text, class_=part) for part, text in texts.items()), class_=f"tile {kind}")


def _interval(metric: str, cell: Record) -> str:
    return f"{span(metric, cell)} (95 %)" if bounded(cell) else "no interval"
