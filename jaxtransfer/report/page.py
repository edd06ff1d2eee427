"""The page: title, verdict, key numbers, then the sections in order."""

import difflib
import re
from collections.abc import Mapping
from importlib.resources import files
from statistics import fmean
from typing import Any

from jaxtransfer.report import errors, origin, scores
from jaxtransfer.report.markup import Html, tag
from jaxtransfer.report.numerals import bounded, count, duration, gained, many, named, number, shown, span

Record = Mapping[str, Any]
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PARTS = {
    "Transfer against scratch": scores.study,
    "Learning curves": scores.curves,
    "What trained": origin.groups,
    "Metrics": scores.metrics,
    "Confusion": errors.confusion,
    "What it got wrong": errors.wrong,
    "Where it comes from": origin.lineage,
    "The run": origin.run,
}
KEYS = "title task labels verdict study curves groups metrics subgroups confusion wrong lineage run config".split()
WORDS = {"positive": "Transfer helped", "negative": "Transfer hurt", "none": "No difference shown"}


class RecordError(ValueError):
    """A record with an entry that no section reads."""


def render(record: Record) -> str:
    """The page as text. Every entry may be missing or None: its section then says so.

    Args:
      record: ``title``, ``task``, ``labels``: texts and the classes' names;
        ``verdict``: a sentence, instead of the one that ``study`` gives;
        ``study``: a ``study.Study`` as a dictionary: ``metric, seeds, transfer, scratch, gain, intervals``;
        ``curves``: ``"transfer"``, ``"scratch"`` -> rows ``{"kind": "train" | "eval", "step", "loss", ...}``, with
        ``"seed"`` where there are several runs; drawn are the train loss, and of ``eval`` the loss and ``metrics``;
        ``groups``: rows ``{"group", "leaves", "parameters", "bytes", "dtype", "lr", "optimizer", "optimizer_bytes"}``;
        ``metrics``: split -> metric -> cell, a cell being ``{"value", "low", "high", "n"}`` and, where it is known,
        ``"over"``: what n counts;
        ``subgroups``: a column of the data -> its value -> metric -> cell;
        ``confusion``: counts, a row for each true class, in the order of ``labels``;
        ``wrong``: ``{"text", "label", "predicted", "probability"}`` of examples;
        ``lineage``: a ``types.Lineage`` as a dictionary, without fingerprints;
        ``run``: ``{"steps", "epochs", "seconds", "device", "versions", "out", "export", ...}``;
        ``config``: YAML.

    Raises:
      RecordError: an entry that no section reads.
    """
    for key in record:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(KEYS)}"
            raise RecordError(f"report: no section reads the entry {key!r}; {hint}")
    title = record.get("title") or "Untitled run"
    style = files("jaxtransfer.report").joinpath("style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(style)),
    )
    parts = (tag("section", tag("h2", name), part(record)) for name, part in PARTS.items())
    body = tag("body", tag("main", _header(record, title), _tiles(record), *parts))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def verdict(record: Record) -> str:
    """Whether the transfer helped, in one sentence.

    Example:
      >>> gain = {"value": 0.285, "low": 0.201, "high": 0.369, "verdict": "positive"}
      >>> scores = {"transfer": [0.90, 0.93], "scratch": [0.62, 0.64]}
      >>> print(verdict({"study": {"metric": "accuracy", "seeds": [0, 1], **scores, "gain": gain}}))
      Transfer helped: 91.5 % against 63.0 % from scratch, +28.5 points
      (95 % interval 20.1 to 36.9, 2 seeds): positive.
    """
    if record.get("verdict"):
        return record["verdict"]
    study = record.get("study")
    if not study:
        return "There is no control from scratch, so whether the transfer helped is not known."
    metric, gain, seeds = study["metric"], study["gain"], len(study["seeds"])
    transfer, scratch = (shown(metric, fmean(study[key])) for key in ("transfer", "scratch"))
    name = "" if metric == "accuracy" else f"{named(metric)} "
    change = f"{name}{transfer} against {scratch} from scratch, {gained(metric, gain['value'])}"
    if not bounded(gain):
        return f"Not settled: {change}, without an interval ({many(seeds, 'seed')}): {gain['verdict']}."
    interval = f"(95 % interval {span(metric, gain)}, {many(seeds, 'seed')})"
    return f"{WORDS[gain['verdict']]}: {change} {interval}: {gain['verdict']}."


def _header(record: Record, title: str) -> Html:
    study, labels = record.get("study"), record.get("labels")
    about = [record.get("task"), f"{len(labels)} classes" if labels else None]
    small = " · ".join(part for part in about if part)
    sentence = re.sub(r"(?<=\d) (?=%|points|seed)", "\N{NO-BREAK SPACE}", verdict(record))
    kind = study["gain"]["verdict"] if study else "unknown"
    return tag(
        "header",
        tag("p", small, class_="kicker") if small else None,
        tag("h1", title),
        tag("p", sentence, class_=f"verdict {kind}"),
    )


def _tiles(record: Record) -> Html | None:
    tiles = _study_tiles(record["study"]) if record.get("study") else _metric_tiles(record)
    if rows := record.get("groups"):
        some, every = origin.trained(rows)
        share = f"{number(100 * some / every)} %" if every else "none"
        tiles.append(_tile("Trained parameters", share, f"{count(some)} of {count(every)}"))
    run = record.get("run") or {}
    if run.get("seconds") is not None:
        steps = many(run["steps"], "step") if run.get("steps") is not None else ""
        tiles.append(_tile("Time", duration(run["seconds"]), steps))
    return tag("div", *tiles, class_="tiles") if tiles else None


def _study_tiles(study: Record) -> list[Html]:
    metric, gain, ranges = study["metric"], study["gain"], study.get("intervals") or {}
    names = {"transfer": f"Transfer, {named(metric)}", "scratch": "From scratch"}
    tiles = [
        _tile(name, shown(metric, fmean(study[key])), _interval(metric, ranges.get(key) or {}), key)
        for key, name in names.items()
    ]
    return [*tiles, _tile("Gain", gained(metric, gain["value"]), _interval(metric, gain), gain["verdict"])]


def _metric_tiles(record: Record) -> list[Html]:
    splits = {name: cells for name, cells in (record.get("metrics") or {}).items() if cells}
    if not splits:
        return []
    split = "test" if "test" in splits else next(iter(splits))
    return [
        _tile(f"{split.capitalize()} {named(metric)}", shown(metric, cell["value"]), _interval(metric, cell))
        for metric, cell in list(splits[split].items())[:3]
    ]


def _tile(name: str, value: str, below: str, kind: str = "plain") -> Html:
    texts = {"name": name, "value": value, "below": below}
    return tag("div", *(tag("div", text, class_=part) for part, text in texts.items()), class_=f"tile {kind}")


def _interval(metric: str, cell: Record) -> str:
    return f"{span(metric, cell)} (95 %)" if bounded(cell) else "no interval"
