"""The page: its head, then the sections in order."""

import difflib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jaxtransfer.report import errors, headline, origin, scores, transfer
from jaxtransfer.report.headline import verdict as verdict
from jaxtransfer.report.markup import Html, tag

Record = Mapping[str, Any]
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PARTS = {
    "Transfer against scratch": transfer.study,
    "Labels needed": transfer.efficiency,
    "Forgetting": transfer.forgetting,
    "Learning curves": scores.curves,
    "What trained": origin.groups,
    "Metrics": scores.metrics,
    "Confusion": errors.confusion,
    "What it got wrong": errors.wrong,
    "Where it comes from": origin.lineage,
    "The run": origin.run,
}
KEYS = (
    "title task labels verdict study curve forgetting before curves groups metrics roc subgroups confusion wrong "
    "lineage run config"
).split()
GENERATIVE = {"causal-lm", "masked-lm"}
"""Tasks whose answers are neither right nor wrong."""


STRUCTURED = {"token-classification", "question-answering"}
"""Tasks whose answers are no one class each, so that no matrix tells them."""


class RecordError(ValueError):
    """A record with an entry that no section reads."""


def render(record: Record) -> str:
    """The page as text. Every entry may be missing or None: its section then says so, or is left out as said below.

    Args:
      record: ``title``, ``task``, ``labels``: texts and the classes' names;
        ``verdict``: a sentence, instead of the one that ``study`` and ``curve`` give;
        ``study``: a ``study.Study`` as a dictionary: ``metric, seeds, transfer, scratch, gain, intervals``;
        ``curve``: a ``study.Curve`` as a dictionary; without one there is no such section;
        ``forgetting``: ``{"metric", "before", "after", "lower_is_better"}``, two times metric -> cell, of the source's
        own data; without it there is no such section;
        ``before``: metric -> cell of the target before training;
        ``curves``: ``"transfer"``, ``"scratch"`` -> rows ``{"kind": "train" | "eval", "step", "loss", ...}``, with
        ``"seed"`` where there are several runs; drawn are the train loss, and of ``eval`` the loss and ``metrics``;
        ``groups``: rows ``{"group", "leaves", "parameters", "bytes", "dtype", "lr", "optimizer", "optimizer_bytes"}``;
        ``metrics``: split -> metric -> cell, a cell being ``{"value", "low", "high", "n"}`` and, where it is known,
        ``"over"``: what n counts;
        ``roc``: ``{"fpr", "tpr"}``, drawn beside the metrics;
        ``subgroups``: a column of the data, or what answers are made up of, -> its value -> metric -> cell;
        ``confusion``: counts, a row for each true class, in the order of ``labels``;
        ``wrong``: ``{"label", "predicted", "probability"}`` of examples, with ``"text"`` or with ``"image"``, the data
        URI of a PNG; a generative task without these two has no such sections, one of many tags no confusion;
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
    left_out = _left_out(record)
    parts = (tag("section", tag("h2", name), part(record)) for name, part in PARTS.items() if name not in left_out)
    body = tag("body", tag("main", headline.header(record, title), headline.tiles(record), *parts))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _left_out(record: Record) -> set[str]:
    """Sections that are not about this kind of record; what is merely missing is said in its section."""
    out = {name for key, name in (("curve", "Labels needed"), ("forgetting", "Forgetting")) if not record.get(key)}
    if record.get("curve") and not record.get("study"):
        out.add("Transfer against scratch")
    if record.get("task") in GENERATIVE:
        kinds = (("confusion", "Confusion"), ("wrong", "What it got wrong"))
        out |= {name for key, name in kinds if not record.get(key)}
    elif record.get("task") in STRUCTURED and not record.get("confusion"):
        out.add("Confusion")
    return out
