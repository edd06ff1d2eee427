"""The record of a finished run: what the report shows and ``result.json`` holds."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtransfer import config as configs
from jaxtransfer.checkpoint.manifest import write_durably
from jaxtransfer.job import events
from jaxtransfer.job.prepare import Job
from jaxtransfer.job.train import SPLITS, final_split
from jaxtransfer.optim import Row
from jaxtransfer.run import Progress
from jaxtransfer.study import Study
from jaxtransfer.tasks import collect as collect
from jaxtransfer.tasks import confusion
from jaxtransfer.types import Source

SHOWN = 20


def build(
    job: Job,
    source: Source,
    found: Mapping[str, Mapping[str, np.ndarray]],
    metrics: Mapping[str, Any],
    comparison: Study | None,
    progress: Progress,
    seconds: float,
    out: Path,
    model: Path,
) -> dict[str, Any]:
    """The whole record, JSON-able.

    Args:
      job: what ran.
      source: the adapted source.
      found: split -> logits and labels of the best state.
      metrics: split -> name -> Metric.
      comparison: with the control, or None.
      progress: of the run.
      seconds: wall time.
      out: the run's folder; the curves are read from it.
      model: where the model was exported to.
    """
    split = final_split(job)
    lineage = dataclasses.asdict(source.lineage)
    del lineage["fingerprints"]
    task = {"title": _title(job), "task": job.task.name, "labels": list(job.task.head.labels)}
    part = found[split]
    return {
        **task,
        "lineage": lineage,
        "groups": [dataclasses.asdict(row) for row in job.rows()],
        "curves": _curves(job, out),
        "metrics": {name: _cells(values) for name, values in metrics.items()},
        "subgroups": _subgroups(job, split, part),
        "confusion": confusion(part["logits"], part["labels"]).tolist(),
        "wrong": _wrong(job, split, part),
        "study": None if comparison is None else _plain(dataclasses.asdict(comparison)),
        "run": {
            "steps": progress.batch,
            "epochs": round(progress.batch / job.epoch, 2),
            "best_step": progress.best_batch,
            "rejected_steps": progress.rejected,
            "seconds": round(seconds, 1),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "transformers")},
            "out": str(out),
            "export": str(model),
        },
        "config": configs.dump(job.config),
    }


def _title(job: Job) -> str:
    return f"{Path(job.config.out).name}: {job.task.name} on {job.trunk.lineage.ref}"


def _cells(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {**dataclasses.asdict(metric), "over": "example"} for name, metric in metrics.items()}


def _curves(job: Job, out: Path) -> dict[str, list[Any]]:
    """Events of every run by kind of run, each with its seed."""
    main = [{**event, "seed": job.config.run.seed} for event in events.lines(out / events.METRICS)]
    curves = {"transfer": main, "scratch": []}
    for path in sorted((out / "study").glob("*.json")):
        kind, _, seed = path.stem.partition("-")
        saved = json.loads(path.read_text(encoding="utf-8"))["events"]
        curves[kind] += [{**event, "seed": int(seed)} for event in saved]
    kept = ("kind", "step", "seed", "loss", "accuracy", "macro_f1")
    return {
        kind: [{key: row[key] for key in kept if key in row} for row in rows if row["kind"] in ("train", "eval")]
        for kind, rows in curves.items()
        if rows
    }


def _subgroups(job: Job, split: str, part: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy by the values of each of the configuration's subgroup columns."""
    rows = job.data[split].rows
    out = {}
    for column in job.config.data.subgroups:
        values = np.array([str(row.values[column]) for row in rows])
        masks = {value: values == value for value in dict.fromkeys(values.tolist())}
        scores = {value: job.task.metrics(part["logits"][mask], part["labels"][mask]) for value, mask in masks.items()}
        out[column] = {value: _cells({"accuracy": found["accuracy"]}) for value, found in scores.items()}
    return out


def _wrong(job: Job, split: str, part: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The examples that the model got wrong, the most confident first."""
    labels = job.task.head.labels
    decoded = job.task.decode(part["logits"])
    rows = [
        {
            "text": job.data[split][i]["text"],
            "label": labels[part["labels"][i]],
            "predicted": found.label,
            "probability": found.probability,
        }
        for i, found in enumerate(decoded)
        if found.label != labels[part["labels"][i]]
    ]
    return sorted(rows, key=lambda row: -row["probability"])[:SHOWN]


def _plain(value: Any) -> Any:
    """JSON has no infinity: an unbounded end of an interval is null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes a file, whole or not at all."""
    write_durably(path, json.dumps(_plain(value), indent=1, allow_nan=False).encode())


def table_of_groups(rows: Sequence[Row]) -> str:
    """The freeze table as text, one line a group."""
    total = sum(row.parameters for row in rows)
    numbers = f"{'leaves':>8}{'parameters':>14}{'share':>8}{'MB':>9}{'rate':>10}"
    lines = [f"{'group':<10}{numbers}  {'optimizer':<10}{'MB':>8}"]
    for row in rows:
        rate = "-" if row.lr is None else f"{row.lr:g}"
        lines.append(
            f"{row.group:<10}{row.leaves:>8}{row.parameters:>14,}{row.parameters / total:>8.1%}{row.bytes / 1e6:>9.1f}"
            f"{rate:>10}  {row.optimizer or '-':<10}{row.optimizer_bytes / 1e6:>8.1f}"
        )
    return "\n".join(lines)


def final(page: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The split that results are reported on, and its metrics."""
    return next((split, page["metrics"][split]) for split in SPLITS if split in page["metrics"])


def summary(page: Mapping[str, Any], report: Path, out: Path) -> dict[str, Any]:
    """What a run ends by saying: accuracy and gain with intervals, paths, and what to type next."""
    split, metrics = final(page)
    accuracy = metrics["accuracy"]
    said = {
        "accuracy": f"{accuracy['value']:.1%} (95 % interval {accuracy['low']:.1%} to {accuracy['high']:.1%}, "
        f"{accuracy['n']} {split} examples)"
    }
    if page["study"] is not None:
        gain, metric = page["study"]["gain"], page["study"]["metric"]
        scale, unit = (1, "") if metric == "loss" else (100, " points")
        low, high, count = gain["low"], gain["high"], gain["n"]
        spread = "no interval" if low is None else f"95 % interval {scale * low:+.3g} to {scale * high:+.3g}"
        value = f"{scale * gain['value']:+.3g}{unit} of {metric}"
        said["gain over scratch"] = f"{value} ({spread}, {count} seed{'s' * (count > 1)}): {gain['verdict']}"
    said |= {"report": str(report), "model": page["run"]["export"]}
    return {**said, "try it": f'jaxtransfer predict {out} --text "a sentence of your own"'}
