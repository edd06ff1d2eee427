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
from jaxtransfer.job import events, shown
from jaxtransfer.job.prepare import RETAIN, Job
from jaxtransfer.job.train import final_split
from jaxtransfer.optim import Row
from jaxtransfer.parallel.agreement import by_first
from jaxtransfer.run import Progress
from jaxtransfer.source.orbax_folder import sha256
from jaxtransfer.study import Curve, Study
from jaxtransfer.tasks import Metric, Task, confusion, roc
from jaxtransfer.types import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run has come to.

    Attributes:
      source: the adapted source.
      found: split -> what the task observes of it in the best state.
      metrics: split -> name -> Metric.
      study: the comparison with the control, or None; ``curve``: over budgets, or None.
      before: split -> name -> cell of the source before training, where it keeps its head.
      progress: of the run; ``seconds``: wall time.
      out: the run's folder; the curves are read from it.
      model: where the model was exported to.
    """

    source: Source
    found: Mapping[str, Mapping[str, np.ndarray]]
    metrics: Mapping[str, Mapping[str, Metric]]
    study: Study | None
    curve: Curve | None
    before: Mapping[str, Any] | None
    progress: Progress
    seconds: float
    out: Path
    model: Path


def build(job: Job, done: Outcome) -> dict[str, Any]:
    """The whole record, JSON-able."""
    split = final_split(job)
    lineage = dataclasses.asdict(done.source.lineage)
    del lineage["fingerprints"]
    task = {"title": _title(job), "task": job.task.name, "labels": list(job.task.head.labels)}
    measured = {name: cells(job.task, values) for name, values in done.metrics.items() if name != RETAIN}
    return {
        **task,
        "lineage": lineage,
        "groups": [dataclasses.asdict(row) for row in job.rows()],
        "curves": _curves(job, done.out),
        "before": None if done.before is None else done.before[split],
        "metrics": measured,
        "subgroups": {
            column: {value: cells(job.task, found) for value, found in values.items()}
            for column, values in shown.parts(job, split, done.found[split]).items()
        },
        **_mistakes(job, split, done.found[split]),
        "study": None if done.study is None else _plain(dataclasses.asdict(done.study)),
        "curve": None if done.curve is None else _plain(dataclasses.asdict(done.curve)),
        "forgetting": _forgetting(job, done),
        "run": {
            "steps": done.progress.batch,
            "epochs": round(done.progress.batch / job.epoch, 2),
            "best_step": done.progress.best_batch,
            "rejected_steps": done.progress.rejected,
            "metric": job.metric,
            "seconds": round(done.seconds, 1),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "transformers")},
            "out": str(done.out),
            "export": str(done.model),
            "files": {path.name: sha256(path) for path in sorted(done.model.glob("*.safetensors"))},
        },
        "config": configs.dump(job.config),
    }


def _title(job: Job) -> str:
    return f"{Path(job.config.out).name}: {job.task.name} on {job.trunk.lineage.ref}"


def cells(task: Task, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Metrics as a record holds them, with what their intervals are over."""
    over = "example" if task.decode is not None else "document"
    return {name: {**dataclasses.asdict(metric), "over": over} for name, metric in metrics.items()}


def _mistakes(job: Job, split: str, part: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What is wrong; where every example has one label also the confusion of classes, and of two classes the ROC."""
    if job.task.mistakes is not None:
        return {"wrong": list(job.task.mistakes(part))[: shown.SHOWN]}
    if not job.task.single_label:
        return {}
    return {
        "confusion": confusion(part["logits"], part["labels"]).tolist(),
        "wrong": shown.wrong(job, split, part),
        "roc": roc(part["logits"], part["labels"]),
    }


def _forgetting(job: Job, done: Outcome) -> dict[str, Any] | None:
    """The source's own domain, measured by the source and by what became of it."""
    if done.before is None or RETAIN not in done.before:
        return None
    return {
        "metric": job.metric,
        "lower_is_better": job.metric in job.task.minimize,
        "before": done.before[RETAIN],
        "after": cells(job.task, done.metrics[RETAIN]),
    }


def _curves(job: Job, out: Path) -> dict[str, list[Any]]:
    """Events of every run on all the data, by kind of run, each with its seed."""
    main = [{**event, "seed": job.config.run.seed} for event in events.lines(out / events.METRICS)]
    curves = {"transfer": main, "scratch": []}
    for path in sorted((out / "study").glob("*.json")):
        kind, _, seed = path.stem.partition("-")
        saved = json.loads(path.read_text(encoding="utf-8"))["events"]
        curves[kind] += [{**event, "seed": int(seed)} for event in saved]
    kept = ("kind", "step", "seed", *dict.fromkeys(("loss", *job.task.metric_names)))
    return {
        kind: [{key: row[key] for key in kept if key in row} for row in rows if row["kind"] in ("train", "eval")]
        for kind, rows in curves.items()
        if rows
    }


def _plain(value: Any) -> Any:
    """JSON has no infinity: an unbounded end of an interval is null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def is_there(path: Path) -> bool:
    """Whether a file of the run is there as the first process sees it: all go by that, or they would part ways."""
    return by_first(f"look for {path}", path.exists)


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
