"""What a run ends by saying: its metric and its gain with intervals, paths, and what to type next."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from jaxtransfer.job.train import SPLITS

_TOLD = ("f1", "exact_match", "bits_per_byte", "accuracy", "auc", "sensitivity_at_90", "macro_auc")
_SHARES = {"accuracy", "balanced_accuracy", "exact_match", "sensitivity_at_90"}
_NAMES = {
    "auc": "AUC",
    "macro_auc": "macro AUC",
    "f1": "F1",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "sensitivity_at_90": "sensitivity at 90% specificity",
}
_NEXT = {
    "text-classification": 'predict {out} --text "a sentence of your own"',
    "token-classification": 'predict {out} --text "a sentence of your own"',
    "question-answering": 'predict {out} --text "a question" --context "a text with its answer"',
    "causal-lm": 'predict {out} --text "a beginning of your own"',
    "masked-lm": "run CONFIG --source.ref {model}",
    "image-classification": "predict {out} --image your.png",
}


def of(page: Mapping[str, Any], report: Path, out: Path) -> dict[str, Any]:
    """The summary of a record."""
    split, metrics = final(page)
    before = page.get("before") or {}
    said = {}
    for name in dict.fromkeys((*_TOLD, page["run"]["metric"])):
        if (cell := metrics.get(name)) is None:
            continue
        earlier = f"{number(name, before[name]['value'])} -> " if name in before else ""
        said[_named(name)] = f"{earlier}{number(name, cell['value'])} ({_interval(name, cell)}, {_over(cell, split)})"
    if (study := page["study"]) is not None:
        metric, scratch = study["metric"], study["scratch"]
        said["from scratch"] = f"{number(metric, fmean(scratch))} of {_named(metric)} ({_seeds(len(scratch))})"
        said["gain over scratch"] = _gain(metric, study["gain"])
    if (curve := page.get("curve")) is not None:
        said["labels needed"] = _saving(curve)
    if (forgot := page.get("forgetting")) is not None:
        name = forgot["metric"]
        values = " -> ".join(number(name, forgot[when][name]["value"]) for when in ("before", "after"))
        said["on the source's data"] = f"{values} of {_named(name)}"
    said |= {"report": str(report), "model": page["run"]["export"]}
    model = Path(page["run"]["export"])
    model = model if model.name == "model" else out / "merged"  # adapters are no source before they are merged
    return {**said, "try it": f"jaxtransfer {_NEXT[page['task']].format(out=out, model=model)}"}


def final(page: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The split that results are reported on, and its metrics."""
    return next((split, page["metrics"][split]) for split in SPLITS if split in page["metrics"])


def number(metric: str, value: float | None) -> str:
    """A metric's value: shares in per cent.

    Example:
      >>> number("accuracy", 0.9123), number("bits_per_byte", 2.34567), number("auc", None)
      ('91.2%', '2.346', 'undefined')
    """
    if value is None:
        return "undefined"
    return f"{value:.1%}" if metric in _SHARES else f"{value:.3f}"


def _named(metric: str) -> str:
    return _NAMES.get(metric, metric.replace("_", " "))


def _interval(metric: str, cell: Mapping[str, Any]) -> str:
    if cell["low"] is None or cell["high"] is None:
        return "no interval"
    return f"95 % interval {number(metric, cell['low'])} to {number(metric, cell['high'])}"


def _over(cell: Mapping[str, Any], split: str) -> str:
    return f"{cell['n']} {split} {cell['over']}s"


def _gain(metric: str, gain: Mapping[str, Any]) -> str:
    scale, unit = (100, " points") if metric in _SHARES or metric.endswith("f1") else (1, "")
    low, high = gain["low"], gain["high"]
    spread = "no interval" if low is None else f"95 % interval {scale * low:+.3g} to {scale * high:+.3g}"
    value = f"{scale * gain['value']:+.3g}{unit} of {_named(metric)}"
    return f"{value} ({spread}, {_seeds(gain['n'])}): {gain['verdict']}"


def _saving(curve: Mapping[str, Any]) -> str:
    """How much less data the transfer needs for what the control reaches with most."""
    unit, most = curve["unit"], curve["points"][-1]["budget"]
    if curve["needed"] is None:
        return f"more than {most} {unit}: the transfer does not reach what they give from scratch"
    least = "at most " if curve["at_least"] else "about "
    fewer = f"{curve['saving']:.1f} times fewer" + (" or better" if curve["at_least"] else "")
    return f"{least}{curve['needed']:.0f} {unit} for what {most} give from scratch: {fewer}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count > 1)}"
