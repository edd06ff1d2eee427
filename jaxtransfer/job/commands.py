"""The commands about runs and sources: run, resume, explain, inspect. Those about a run's model are in `finished`."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer import checkpoint, report
from jaxtransfer import config as configs
from jaxtransfer.checkpoint.manifest import discard, write_durably
from jaxtransfer.config import Config
from jaxtransfer.job import caching, events, explained, models, phasing, record, studies, summary
from jaxtransfer.job.models import CHECKPOINTS, CONFIG, RESULT, config_of, page_of, pretrained
from jaxtransfer.job.prepare import RETAIN, TRAIN, Job, prepare
from jaxtransfer.job.train import final_split, finished, predictions, saved_best, train
from jaxtransfer.parallel import distributed
from jaxtransfer.parallel.distributed import share
from jaxtransfer.run import DivergenceError, Progress, Stop
from jaxtransfer.source import load
from jaxtransfer.tree import flatten
from jaxtransfer.tree.rules import Rules, as_rules, winning_rules
from jaxtransfer.types import Source, State

REPORT, BEFORE, DIAGNOSTIC = "report.html", "before.json", "diagnostic"
_REPORT = 3600.0  # seconds for the first process to write the model and the report, while the others wait


def run(config: Config, *, console: Any) -> dict[str, Any]:
    """Trains, compares with the control, evaluates, exports, reports: everything, into ``config.out``.

    A folder that holds an unfinished run of the same configuration, source and data is resumed; a finished one is not
    touched, its result is returned. Where ``pretrain`` makes the source, that is a run of its own, in ``pretrain``.

    Of several processes that have joined all call it; the first alone writes and tells what there is to tell.

    Args:
      config: the configuration.
      console: a rich console, for progress.

    Returns:
      The summary: metrics with intervals, the gain, where everything is, what to type next.
    """
    out = Path(config.out)
    console.quiet = console.quiet or not distributed.is_first()
    with Stop() as stop, events.Screen(console) as screen, checkpoint.RunLock(out):
        job = prepare(config, screen.say)
        page = _run(job, out, stop, screen)
    return summary.of(page, out / REPORT, out)


def _run(job: Job, out: Path, stop: Stop, screen: events.Screen) -> dict[str, Any]:
    """The record of a run, done now unless it is there; its folder is locked."""
    checkpoint.claim(out, job.identity())
    if record.is_there(out / RESULT):
        screen.say(f"{out} holds this run, finished; remove the folder to run it again")
        return page_of(out)
    if not record.is_there(out / CONFIG) and distributed.is_first():
        write_durably(out / CONFIG, configs.dump(job.config).encode())
    screen.say(record.table_of_groups(job.rows()))
    began = time.time()
    if job.before is not None:
        folder = Path(job.before.config.out)
        with checkpoint.RunLock(folder):
            _run(job.before, folder, stop, screen)
        job = pretrained(job)
    before = _measured_before(job, out, stop)
    job = phasing.gone_through(job, stop, screen, _main_run)
    job = caching.cached(job, out / caching.FOLDER, screen.say, stop.check)
    source, found, progress = _main_run(job, out, stop, screen)
    metrics = {split: job.task.metrics(part) for split, part in found.items()}
    _check_finite(job, metrics, progress)
    comparison = studies.compare(job, out, stop, screen, metrics)
    curve = studies.curve(job, out, stop, screen)
    values = {name: metric.value for name, metric in metrics[final_split(job)].items()}
    source = dataclasses.replace(source, params=distributed.collected(source.params))

    def conclude() -> None:
        model = models.write(source, out, job.config, progress, values, screen.say)
        page = record.build(
            job,
            record.Outcome(
                source=source, found=found, metrics=metrics, study=comparison, curve=curve, before=before,
                progress=progress, seconds=time.time() - began, out=out, model=model,
            ),
        )  # fmt: skip
        if job.phases:
            page["run"]["phases"] = phasing.told(job)
        report.write(page, out / REPORT)
        record.write_json(out / RESULT, page)

    distributed.by_first(f"report {out}", conclude, timeout=_REPORT)
    caching.discard(out / caching.FOLDER)
    return page_of(out)


def _check_finite(job: Job, metrics: Mapping[str, Mapping[str, Any]], progress: Progress) -> None:
    """A model whose loss is no number is no model, whatever its accuracy says; its checkpoints stay.

    Raises:
      DivergenceError: it is one.
    """
    split = final_split(job)
    if (loss := metrics[split].get("loss")) is not None and not math.isfinite(loss.value):
        raise DivergenceError(
            f"the loss on {split} is {loss.value} after {progress.batch} steps, {progress.rejected} of which were not "
            "finite: there is no model to write; lower the learning rate or clip"
        )


def resume(folder: Path, *, console: Any) -> dict[str, Any]:
    """Goes on with the run of a folder, where its last good checkpoint stands.

    Raises:
      RunFolderError: the folder holds no run.
    """
    return run(dataclasses.replace(config_of(folder), out=str(folder)), console=console)


def explain(config: Config) -> dict[str, Any]:
    """What would train, how, and what it costs in bytes; which adapter sits where, what is packed.

    Returns:
      ``groups``, a row each, and where there are any, ``adapters`` and ``quantized``; the groups of phases before.
    """
    job = prepare(config, lambda text: None)
    before = {f"phase {i}": explained.tables(phase)["groups"] for i, phase in enumerate(job.phases, 1)}
    return {**before, **explained.tables(job)}


def inspect(ref: str, *, rules: Rules = (), revision: str | None = None) -> dict[str, Any]:
    """A source's lineage and parameters, and which of the given rules wins each.

    Raises:
      RuleError: a rule is no regular expression; SourceError and others: see `load`.
    """
    source = load(ref, revision=revision)
    flat = flatten(source.params)
    winners = winning_rules(rules, list(flat))
    named = as_rules(rules)

    def row(path: str) -> dict[str, Any]:
        leaf, index = flat[path], winners[path]
        out = {"path": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype), "bytes": int(leaf.nbytes)}
        return {**out, "rule": None if index is None else named[index].pattern} if rules else out

    head = source.model.head
    return {
        "family": source.model.family,
        "head": None if head is None else head.kind,
        "parameters": sum(int(leaf.size) for leaf in flat.values()),
        "lineage": source.lineage,
        "leaves": [row(path) for path in flat],
    }


def _measured_before(job: Job, out: Path, stop: Stop) -> dict[str, Any] | None:
    """Metrics of a source that keeps its head, before any training, on the final split and on its own domain."""
    if job.task.fresh_head:
        return None
    if not record.is_there(out / BEFORE):
        start = unprompted(*job.start(job.config.run.seed))
        found = {
            split: record.cells(job.task, job.task.metrics(predictions(job, *start, split, stop.check)))
            for split in (final_split(job), RETAIN)
            if split in job.examples
        }
        distributed.by_first(f"write {out / BEFORE}", lambda: record.write_json(out / BEFORE, found))
    return json.loads((out / BEFORE).read_text(encoding="utf-8"))


def unprompted(state: State, frozen: Any) -> tuple[State, Any]:
    """A run's start without what changes the function before it is trained: prompts and prefixes."""

    def without(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {name: without(child) for name, child in node.items() if name not in ("prompt", "prefix")}

    bare = dataclasses.replace(state, params=without(state.params), stats=without(state.stats))
    return bare, without(frozen)


def _main_run(
    job: Job, out: Path, stop: Stop, screen: events.Screen, title: str = ""
) -> tuple[Source, dict[str, Any], Progress]:
    """Trains the run's own seed with checkpoints, resuming what is there; its best state on every held-out split."""
    seed, root, progress = job.config.run.seed, out / CHECKPOINTS, Progress()
    state, frozen = job.start(seed)
    position = None
    lineage = job.adapted(seed).lineage
    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(checkpoint.Checkpointer(root, lineage=lineage, keep=job.config.run.keep))
        restored = saver.restore_latest((state, frozen), mesh=job.mesh, sharding=job.sharding)
        if restored is not None:
            state, frozen, extra = restored
            progress.load(extra["progress"])
            position = extra["data"]
            if progress.best_batch is not None and (told := saver.protect_again(progress.best_batch)):
                progress.best, progress.best_batch, progress.stale = None, None, 0
                screen.say(f"the best step is lost: {told}; the best of what follows takes its place")
            screen.say(f"resumed at step {progress.batch} of {job.steps}")
        callbacks = [screen.titled(f"{title or _title(job)}, seed {seed}", job.steps, done=progress.batch)]
        if distributed.is_first():
            callbacks.append(events.jsonl(out / events.METRICS, progress))
        if distributed.is_first() and job.config.run.tensorboard:
            callbacks.append(stack.enter_context(events.tensorboard(out / "tensorboard", after=progress.batch)))

        def diagnose(state: State, frozen: Any, batch: Mapping[str, Any]) -> str:
            where = out / DIAGNOSTIC
            if record.is_there(where):  # of an earlier attempt
                distributed.by_first(f"discard {where}", lambda: discard(where))
            rows = {name: np.asarray(value).tolist() for name, value in batch.items()}
            if share(job.mesh)[1] > 1:
                parts = map(json.loads, distributed.gathered(f"rows {where}", json.dumps(rows)))
                rows = {f"{name}, part {i}": value for i, part in enumerate(parts) for name, value in part.items()}
            return str(checkpoint.save(where, state, frozen, lineage, extra={"batch": rows}))

        last = train(
            job, state, frozen, seed=seed, saver=saver, stop=stop, callbacks=callbacks, progress=progress,
            position=position, diagnose=diagnose,
        )  # fmt: skip
    best = (last, frozen)
    if progress.best_batch not in (None, progress.batch):
        best = saved_best(job, root, best, progress)
    held_out = [split for split in ("validation", "test", RETAIN) if split in job.examples] or [TRAIN]
    found = {split: predictions(job, *best, split, stop.check) for split in held_out}
    return finished(job, seed, *best, progress), found, progress


def _title(job: Job) -> str:
    return "transfer" if job.config.source.init == "pretrained" else "from scratch"
