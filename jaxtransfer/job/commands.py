"""The commands: run, resume, explain, inspect, evaluate, predict, export."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import checkpoint, report, study
from jaxtransfer import config as configs
from jaxtransfer.checkpoint.manifest import discard, write_durably
from jaxtransfer.config import Config
from jaxtransfer.data.dataset import from_records
from jaxtransfer.data.loader import Examples, batches
from jaxtransfer.data.sources import read
from jaxtransfer.data.text import tokenizer
from jaxtransfer.job import events, record
from jaxtransfer.job.prepare import Job, check_vocabulary, make_task, prepare, splits
from jaxtransfer.job.train import SPLITS, final_split, finished, predictions, saved_best, score, train
from jaxtransfer.models import apply
from jaxtransfer.models.registry import ConfigFieldError
from jaxtransfer.run import Progress, Stop
from jaxtransfer.source import export as export_source
from jaxtransfer.source import load
from jaxtransfer.tasks import Task
from jaxtransfer.tree import flatten, layout, stack
from jaxtransfer.tree.rules import Rules, as_rules, winning_rules
from jaxtransfer.types import Lineage, Source, State

CONFIG, RESULT, REPORT = "config.yaml", "result.json", "report.html"
CHECKPOINTS, DIAGNOSTIC, EXPORT, CONTROLS = "checkpoints", "diagnostic", "model", "study"


def run(config: Config, *, console: Any) -> dict[str, Any]:
    """Trains, compares with the control, evaluates, exports, reports: everything, into ``config.out``.

    A folder that holds an unfinished run of the same configuration, source and data is resumed; a finished one is not
    touched, its result is returned.

    Args:
      config: the configuration.
      console: a rich console, for progress.

    Returns:
      The summary: metrics with intervals, the gain, where everything is, what to type next.
    """
    out = Path(config.out)
    with Stop() as stop, events.Screen(console) as screen, checkpoint.RunLock(out):
        job = prepare(config, screen.say)
        checkpoint.claim(out, job.identity())
        if (out / RESULT).exists():
            screen.say(f"{out} holds this run, finished; remove the folder to run it again")
            return record.summary(_page(out), out / REPORT, out)
        if not (out / CONFIG).exists():
            write_durably(out / CONFIG, configs.dump(config).encode())
        screen.say(record.table_of_groups(job.rows()))
        began = time.time()
        source, found, progress = _main_run(job, out, stop, screen)
        metrics = {split: job.task.metrics(part["logits"], part["labels"]) for split, part in found.items()}
        comparison = _study(job, out, stop, screen, metrics)
        model = _export(source, out / EXPORT, metrics[final_split(job)], screen)
        page = record.build(job, source, found, metrics, comparison, progress, time.time() - began, out, model)
        report.write(page, out / REPORT)
        record.write_json(out / RESULT, page)
    return record.summary(page, out / REPORT, out)


def resume(folder: Path, *, console: Any) -> dict[str, Any]:
    """Goes on with the run of a folder, where its last good checkpoint stands.

    Raises:
      RunFolderError: the folder holds no run.
    """
    return run(dataclasses.replace(_config(folder), out=str(folder)), console=console)


def explain(config: Config) -> list[Any]:
    """What would train, how, and what it costs in bytes; nothing is compiled."""
    return list(prepare(config, lambda text: None).rows())


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


def evaluate(folder: Path, *, data: str | None = None) -> dict[str, Any]:
    """The metrics of a run's model, with intervals, on its own evaluation data or on another path read like it.

    Raises:
      DataError: the data cannot be used.
    """
    config, source = _config(folder), _adapted(folder)
    known = splits(config)
    split = next(name for name in SPLITS if name in known)
    spec = known[split] if data is None else dataclasses.replace(known[split], path=data, split=None, without=None)
    task = _task_of(config, source)
    logits, labels = _forward(source, config, task.prepare(tokenizer(source), read(spec)))
    metrics = task.metrics(logits, labels)
    return {"data": spec.path, **{name: dataclasses.asdict(metric) for name, metric in metrics.items()}}


def predict(folder: Path, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Label and probability of each text.

    Raises:
      DataError: a text is empty.
    """
    config, source = _config(folder), _adapted(folder)
    task = _task_of(config, source)
    dataset = from_records([{"text": text} for text in texts], "texts")
    logits, _ = _forward(source, config, task.prepare(tokenizer(source), dataset))
    for text, found in zip(texts, task.decode(logits), strict=True):
        yield {"text": text, "label": found.label, "probability": found.probability}


def export(folder: Path, out: Path | None = None, *, format: str = "hf") -> Path:
    """The model of a run, finished or stopped, as a folder of its own."""
    target = folder / f"{EXPORT}-{format}" if out is None else out
    metrics = record.final(_page(folder))[1] if (folder / RESULT).exists() else {}
    values = {name: metric["value"] for name, metric in metrics.items()}
    return export_source(_adapted(folder), target, format=format, metrics=values)


def _main_run(job: Job, out: Path, stop: Stop, screen: events.Screen) -> tuple[Source, dict[str, Any], Progress]:
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
            saver.best = progress.best_batch
            screen.say(f"resumed at step {progress.batch} of {job.steps}")
        callbacks = [
            events.jsonl(out / events.METRICS, progress),
            screen.titled(f"transfer, seed {seed}", job.steps, done=progress.batch),
        ]
        if job.config.run.tensorboard:
            callbacks.append(stack.enter_context(events.tensorboard(out / "tensorboard", after=progress.batch)))

        def diagnose(state: State, frozen: Any, batch: Mapping[str, Any]) -> str:
            where = out / DIAGNOSTIC
            if where.exists():  # of an earlier attempt
                discard(where)
            rows = {name: np.asarray(value).tolist() for name, value in batch.items()}
            return str(checkpoint.save(where, state, frozen, lineage, extra={"batch": rows}))

        last = train(
            job, state, frozen, seed=seed, saver=saver, stop=stop, callbacks=callbacks, progress=progress,
            position=position, diagnose=diagnose,
        )  # fmt: skip
    best = (last, frozen)
    if progress.best_batch not in (None, progress.batch):
        best = saved_best(job, root, best, progress)
    held_out = [split for split in ("validation", "test") if split in job.examples] or ["train"]
    found = {split: predictions(job, *best, split, stop.check) for split in held_out}
    return finished(job, seed, *best, progress), found, progress


def _study(job: Job, out: Path, stop: Stop, screen: events.Screen, metrics: Mapping[str, Any]) -> study.Study | None:
    """The other seeds and the controls from scratch; each is kept in a file, so that a stop costs one of them."""
    plan = job.config.study
    if plan is None:
        return None
    metric = job.config.run.metric
    values: dict[str, list[float]] = {"transfer": [], plan.control: []}
    for kind in values:
        for seed in plan.seeds:
            path = out / CONTROLS / f"{kind}-{seed}.json"
            if kind == "transfer" and seed == job.config.run.seed:
                values[kind].append(metrics[final_split(job)][metric].value)
                continue
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                trace: list[Any] = []
                title = "transfer" if kind == "transfer" else f"from {kind}"
                callbacks = [events.memory(trace), screen.titled(f"{title}, seed {seed}", job.steps)]
                value = score(job, seed, scratch=kind == plan.control, stop=stop, callbacks=callbacks)
                record.write_json(path, {"value": value, "events": trace})
            values[kind].append(json.loads(path.read_text(encoding="utf-8"))["value"])
    return study.compare(metric, plan.seeds, *values.values(), lower_is_better=metric == "loss")


def _export(source: Source, path: Path, metrics: Mapping[str, Any], screen: events.Screen) -> Path:
    """Hugging Face layout where a class of theirs computes the model, Orbax where none does."""
    values = {name: metric.value for name, metric in metrics.items()}
    try:
        return export_source(source, path, format="hf", metrics=values)
    except ConfigFieldError as error:
        screen.say(f"exported as orbax: {error}")
        return export_source(source, path, format="orbax", metrics=values)


def _config(folder: Path) -> Config:
    path = folder / CONFIG
    if not path.exists():
        raise checkpoint.RunFolderError(f"{folder}: holds no run ({CONFIG} is missing)")
    return configs.load(path)


def _page(folder: Path) -> dict[str, Any]:
    """The record of a finished run."""
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def _adapted(folder: Path) -> Source:
    """The exported model of a finished run; of an unfinished one its best step so far."""
    if (folder / RESULT).exists():
        return dataclasses.replace(load(folder / EXPORT), lineage=Lineage(**_page(folder)["lineage"]))
    config = _config(folder)
    root, seed = folder / CHECKPOINTS, config.run.seed
    if (last := checkpoint.latest(root)) is None:
        raise checkpoint.RunFolderError(f"{folder}: has no model and no checkpoint yet; resume it")
    job = prepare(config, lambda text: None)
    progress = Progress()
    progress.load(checkpoint.metadata(root / str(last))["extra"]["progress"])
    return finished(job, seed, *saved_best(job, root, job.start(seed), progress), progress)


def _task_of(config: Config, source: Source) -> Task:
    labels = source.model.head.labels if source.model.head is not None else ()
    return make_task(dataclasses.replace(config, task=dataclasses.replace(config.task, labels=labels)), None)


def _forward(source: Source, config: Config, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Logits of every example, in order, and its label where it has one."""
    check_vocabulary({"the data": examples}, source.model)
    params = stack(source.params, layout(source.params))
    precision = jnp.dtype(config.run.precision)
    forward = jax.jit(lambda params, batch: apply(source.model, params, batch, dtype=precision)["logits"])
    parts = []
    for batch in batches(examples, batch=config.data.batch, buckets=config.data.buckets, shuffle=False, epochs=1):
        logits = np.asarray(forward(params, batch))
        parts.append({"logits": logits, "index": batch["index"], "labels": batch.get("labels", batch["index"])})
    found = record.collect(parts)
    return found["logits"], found["labels"]
