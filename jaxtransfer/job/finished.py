"""The commands about a run's model: evaluate, predict, complete, export."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import checkpoint
from jaxtransfer import config as configs
from jaxtransfer.config import Config, ImageClassificationConfig
from jaxtransfer.data.dataset import from_records
from jaxtransfer.data.loader import Examples, batches
from jaxtransfer.data.sources import read
from jaxtransfer.generation import stream_text
from jaxtransfer.job.checks import check_vocabulary
from jaxtransfer.job.prepare import Job, observing, prepare, splits
from jaxtransfer.job.sources import check_head, placed
from jaxtransfer.job.summary import final
from jaxtransfer.job.tasks import make_task
from jaxtransfer.job.train import SPLITS, finished, saved_best
from jaxtransfer.models import apply, layout_of
from jaxtransfer.run import Progress
from jaxtransfer.source import export as export_source
from jaxtransfer.source import load
from jaxtransfer.tasks import LabelSet, Task, collect
from jaxtransfer.tree import stack
from jaxtransfer.types import Lineage, Source

CONFIG, RESULT, CHECKPOINTS, EXPORT = "config.yaml", "result.json", "checkpoints", "model"


def task_of(folder: Path) -> str:
    """The name of a run's task.

    Raises:
      RunFolderError: the folder holds no run.
    """
    return config_of(folder).task.kind


def evaluate(folder: Path, *, data: str | None = None) -> dict[str, Any]:
    """The metrics of a run's model, with intervals, on its own evaluation data or on another path read like it.

    Raises:
      DataError: the data cannot be used.
    """
    config, source = config_of(folder), adapted(folder)
    known = splits(config)
    split = next(name for name in SPLITS if name in known)
    spec = known[split]
    if data is not None:
        spec = dataclasses.replace(spec, path=data, split=None, per_class=None, without=None)
    task = _task(config, source)
    examples = task.prepare(task.processor(source), read(spec, task.columns), train=False)
    metrics = task.metrics(_observed(source, config, task, examples))
    return {"data": spec.path, **{name: dataclasses.asdict(metric) for name, metric in metrics.items()}}


def predict(folder: Path, inputs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Label and probability of each text, or of each image by its path; labels where an image may have several.

    Raises:
      DataError: a text is empty, an image cannot be read.
    """
    config, source = config_of(folder), adapted(folder)
    if isinstance(config.task, ImageClassificationConfig):  # each input has its answer, or an error
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, on_bad="stop"))
    task = _task(config, source)
    if task.decode is None:
        raise ValueError(f"{folder}: a {task.name} model goes on with texts, it predicts no labels; see complete")
    column = task.columns[0]
    values = [Path(given) if column == "image" else given for given in inputs]
    dataset = from_records([{column: value} for value in values], f"{column}s")
    observed = _observed(source, config, task, task.prepare(task.processor(source), dataset, train=False))
    for given, found in zip(inputs, task.decode(observed), strict=True):
        if isinstance(found, LabelSet):
            yield {column: given, "labels": list(found.labels), "probabilities": dict(found.probabilities)}
        else:
            yield {column: given, "label": found.label, "probability": found.probability}


def complete(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """How a run's language model goes on with a text, piece by piece; see `generation.stream_text`.

    Raises:
      GenerationError: the model is none, or an option is out of range.
    """
    config, source = config_of(folder), adapted(folder)
    task = _task(config, source)
    return stream_text(
        source.model, source.params, task.processor(source), prompt, max_new_tokens=max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, key=jax.random.key(seed),
        dtype=jnp.dtype(config.run.precision),
    )  # fmt: skip


def export(folder: Path, out: Path | None = None, *, format: str = "hf") -> Path:
    """The model of a run, finished or stopped, as a folder of its own."""
    target = folder / f"{EXPORT}-{format}" if out is None else out
    metrics = final(page_of(folder))[1] if (folder / RESULT).exists() else {}
    values = {name: metric["value"] for name, metric in metrics.items()}
    return export_source(adapted(folder), target, format=format, metrics=values)


def config_of(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
      RunFolderError: the folder holds no run.
    """
    path = folder / CONFIG
    if not path.exists():
        raise checkpoint.RunFolderError(f"{folder}: holds no run ({CONFIG} is missing)")
    return configs.load(path)


def page_of(folder: Path) -> dict[str, Any]:
    """The record of a finished run."""
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def adapted(folder: Path) -> Source:
    """The exported model of a finished run; of an unfinished one its best step so far."""
    if (folder / RESULT).exists():
        return dataclasses.replace(load(folder / EXPORT), lineage=Lineage(**page_of(folder)["lineage"]))
    config = config_of(folder)
    root, seed = folder / CHECKPOINTS, config.run.seed
    if (last := checkpoint.latest(root)) is None:
        raise checkpoint.RunFolderError(f"{folder}: has no model and no checkpoint yet; resume it")
    job = pretrained(prepare(dataclasses.replace(config, out=str(folder)), lambda text: None))
    progress = Progress()
    progress.load(checkpoint.metadata(root / str(last))["extra"]["progress"])
    return finished(job, seed, *saved_best(job, root, job.start(seed), progress), progress)


def pretrained(job: Job) -> Job:
    """A job with the source that another run has made for it, once that is finished; any other job as it is."""
    if job.before is None:
        return job
    folder = Path(job.before.config.out)
    head = None if job.task.fresh_head else "checkpoint"
    source = load(folder / EXPORT, head=head, dtype=job.config.source.dtype, **placed(job.mesh))
    check_head(source, job.task)
    made = page_of(folder)["lineage"]
    operations = tuple(made["operations"])
    lineage = dataclasses.replace(source.lineage, ref=made["ref"], license=made["license"], operations=operations)
    return dataclasses.replace(job, trunk=dataclasses.replace(source, lineage=lineage), before=None)


def _task(config: Config, source: Source) -> Task:
    labels = source.model.head.labels if source.model.head is not None else ()
    return make_task(config, None, labels)


def _observed(source: Source, config: Config, task: Task, examples: Examples) -> dict[str, np.ndarray]:
    """What the task observes of every example, in order."""
    check_vocabulary({"the data": examples}, source.model)
    params = stack(source.params, layout_of(source.model, source.params))
    precision, observe = jnp.dtype(config.run.precision), observing(task)
    forward = jax.jit(lambda params, batch: observe(apply(source.model, params, batch, dtype=precision), batch))
    loader = batches(examples, batch=config.data.batch, buckets=config.buckets, shuffle=False, epochs=1)
    return collect(jax.device_get(forward(params, batch)) for batch in loader)
