"""The other seeds, the controls from scratch, and both at every budget; each fit is kept in a file of its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtransfer import study
from jaxtransfer.job import events, record
from jaxtransfer.job.checks import class_numbers
from jaxtransfer.job.prepare import TRAIN, Job
from jaxtransfer.job.train import final_split, score
from jaxtransfer.parallel.agreement import by_first, is_first
from jaxtransfer.run import Stop

FOLDER = "study"


def compare(job: Job, out: Path, stop: Stop, screen: events.Screen, metrics: Mapping[str, Any]) -> study.Study | None:
    """Transfer and control by seed, on all training data; ``metrics`` are those of the run itself."""
    plan = job.config.study
    if plan is None:
        return None
    values: dict[str, list[float]] = {"transfer": [], plan.control: []}
    for kind in values:
        for seed in plan.seeds:
            if kind == "transfer" and seed == job.config.run.seed:
                values[kind].append(metrics[final_split(job)][job.metric].value)
            else:
                values[kind].append(_fit(job, out / FOLDER / f"{kind}-{seed}.json", stop, screen))
    return study.compare(job.metric, plan.seeds, *values.values(), lower_is_better=job.metric in job.task.minimize)


def curve(job: Job, out: Path, stop: Stop, screen: events.Screen) -> study.Curve | None:
    """Transfer and control by budget and seed; None without budgets."""
    plan = job.config.study
    if plan is None or plan.budgets is None:
        return None
    values: dict[str, dict[int, list[float]]] = {"transfer": {}, plan.control: {}}
    for budget in plan.budgets:
        for seed in plan.seeds:
            less = job.budgeted(budget, seed)
            for kind, found in values.items():
                path = out / FOLDER / f"budget-{budget}" / f"{kind}-{seed}.json"
                found.setdefault(budget, []).append(_fit(less, path, stop, screen, f", {budget} examples"))
    unit = "documents" if job.task.decode is None else "examples"
    if class_numbers(job.task, job.data[TRAIN]) is not None:
        unit = "labels per class"
    return study.curve(
        job.metric, plan.budgets, *values.values(), lower_is_better=job.metric in job.task.minimize,
        unit=unit,
    )  # fmt: skip


def _fit(job: Job, path: Path, stop: Stop, screen: events.Screen, more: str = "") -> float:
    """The metric of one seed, ``KIND-SEED.json``; trained where its file is not there yet, so a stop costs one fit."""
    if not record.is_there(path):
        kind, _, seed = path.stem.partition("-")
        if is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
        trace: list[Any] = []
        title = f"{'transfer' if kind == 'transfer' else f'from {kind}'}, seed {seed}{more}"
        callbacks = [events.memory(trace), screen.titled(title, job.steps)]
        scratch = kind != "transfer"
        value = score(job.control if scratch else job, int(seed), scratch=scratch, stop=stop, callbacks=callbacks)
        by_first(f"write {path}", lambda: record.write_json(path, {"value": value, "events": trace}))
    return json.loads(path.read_text(encoding="utf-8"))["value"]
