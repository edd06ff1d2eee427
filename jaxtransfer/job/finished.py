"""The commands about a run's model: evaluate, predict, complete, export, merge."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.adapt import merge as fold
from jaxtransfer.adapt.adapters import AdapterError
from jaxtransfer.checkpoint.lock import RUN
from jaxtransfer.config import Config, ImageClassificationConfig
from jaxtransfer.data.dataset import from_records
from jaxtransfer.data.loader import Examples, batches
from jaxtransfer.data.sources import read
from jaxtransfer.data.text import end_tokens
from jaxtransfer.generation import stream_text
from jaxtransfer.job.checks import check_vocabulary
from jaxtransfer.job.models import (
    ADAPTER,
    CHECKPOINTS,
    EXPORT,
    PRETRAIN,
    RESULT,
    adapted,
    apart,
    beside,
    config_of,
    page_of,
    write_peft,
    write_whole,
)
from jaxtransfer.job.prepare import observing, splits
from jaxtransfer.job.summary import final
from jaxtransfer.job.tasks import make_task
from jaxtransfer.job.train import SPLITS
from jaxtransfer.models import apply, layout_of
from jaxtransfer.source import ExportError
from jaxtransfer.source import export as export_source
from jaxtransfer.tasks import Task, collect
from jaxtransfer.tree import stack
from jaxtransfer.types import Source


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


def predict(folder: Path, inputs: Sequence[str], *, context: str | None = None) -> Iterator[dict[str, Any]]:
    """What is said of each text, or of each image by its path: a label, several labels, entities, or an answer.

    Args:
      folder: of a run, finished or stopped.
      inputs: texts, paths of images, or questions.
      context: the text in which questions have their answers.

    Raises:
      DataError: a text is empty, an image cannot be read. ValueError: a context that is missing, or is not read.
    """
    config, source = config_of(folder), adapted(folder)
    if isinstance(config.task, ImageClassificationConfig):  # each input has its answer, or an error
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, on_bad="stop"))
    task = _task(config, source)
    if task.decode is None:
        told = "goes on with texts, it predicts no labels; see complete"
        told = told if task.name == "causal-lm" else "predicts no labels; it is a source for a task that does"
        raise ValueError(f"{folder}: a {task.name} model {told}")
    column = task.columns[0]
    named = "image" if column == "image" else "text"
    if (context is None) == ("context" in task.columns):
        told = "needs the text that holds the answers, --context" if context is None else "reads no --context"
        raise ValueError(f"{folder}: a {task.name} model {told}")
    beside = {} if context is None else {"context": context}
    dataset = from_records([{column: task.typed(given), **beside} for given in inputs], f"{named}s")
    observed = _observed(source, config, task, task.prepare(task.processor(source), dataset, train=False))
    for given, found in zip(inputs, task.decode(observed), strict=True):
        yield {named: given, **found.record(given)}


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
    processor = task.processor(source)
    return stream_text(
        source.model, source.params, processor, prompt, max_new_tokens=max_new_tokens, temperature=temperature,
        top_k=top_k, top_p=top_p, eos_token_id=end_tokens(source, processor), key=jax.random.key(seed),
        dtype=jnp.dtype(config.run.precision),
    )  # fmt: skip


def export(folder: Path, out: Path | None = None, *, format: str = "hf") -> Path:
    """The model of a run, finished or stopped, as a folder of its own.

    Raises:
      ExportError: what was trained stands beside its source, and is asked for as one model, or ``out`` is a folder that
        the run needs; PeftError: it cannot be written alone.
    """
    target = folder / f"{EXPORT}-{format}" if out is None else out
    config = config_of(folder)
    _check_free(target, folder, config)
    if not apart(config):
        return export_source(adapted(folder), target, format=format, metrics=_values(folder))
    if format == "peft":
        return write_peft(adapted(folder), target, _values(folder))
    held, packed = beside(config), " --dequantize" if config.adapt.quantize else ""
    if held in ("bottleneck", "prefix"):
        way = f"a {held} cannot be folded in, and only the run's own folder holds it"
    elif held is not None:
        way = f"a {held} cannot be folded in; --format peft writes it alone, where PEFT has its head"
    else:
        alone = ", --format peft writes it alone" if config.adapt.adapters else ""
        way = f"`jaxtransfer merge {folder}{packed}` folds it in{alone}"
    raise ExportError(f"{folder}: what it trained stands beside its source: {way}")


def merge(folder: Path, out: Path | None = None, *, dequantize: bool = False) -> dict[str, Any]:
    """The model of a run with its adapters folded in, as one folder: as Hugging Face lays it out, where it can.

    Args:
      folder: of a run, finished or stopped.
      out: None is ``merged`` in the run's folder.
      dequantize: consent to a quantised source becoming large again.

    Returns:
      ``merged``, the folder; ``note``, where it is no Hugging Face layout.

    Raises:
      AdapterError: there is nothing to merge, what is there is no weight's (a bottleneck, a prompt, a prefix), or the
        source is quantised and ``dequantize`` is not set. ExportError: ``out`` is a folder that the run needs.
    """
    config, target = config_of(folder), folder / "merged" if out is None else out
    _check_free(target, folder, config)
    if not apart(config):
        raise AdapterError(f"{folder}: its model is whole, there is nothing to merge; `jaxtransfer export` writes it")
    if (held := beside(config)) is not None:
        raise AdapterError(f"{folder}: a {held} is no part of a weight, and cannot be merged into one")
    if config.adapt.quantize and not dequantize:
        raise AdapterError(
            f"{folder}: its source is quantised, merging makes it as large as it was: say --dequantize, or "
            f"`jaxtransfer export {folder} --format peft`, which writes the adapters alone"
        )
    notes: list[str] = []
    merged = fold(adapted(folder), dequantize=dequantize)
    path = write_whole(merged, target, _values(folder), notes.append)
    return {"merged": path, **({"note": notes[0]} if notes else {})}


def _check_free(target: Path, folder: Path, config: Config) -> None:
    """An earlier export is replaced, but for what this run or another is put together from."""
    for run in target.resolve().parents:
        part = run / target.resolve().relative_to(run).parts[0]
        own = part.name in (EXPORT, ADAPTER, PRETRAIN, CHECKPOINTS)
        if own and part.exists() and (run / RUN).exists():
            raise ExportError(f"{target}: the run {run} is put together from it; name another folder")
    for kept in (Path(config.source.ref), *map(Path, config.source.alternatives)):
        if kept.exists() and kept.resolve() == target.resolve():
            raise ExportError(f"{target}: the run {folder} is put together from it; name another folder")


def _values(folder: Path) -> dict[str, Any]:
    """The metrics of a finished run, for the card."""
    metrics = final(page_of(folder))[1] if (folder / RESULT).exists() else {}
    return {name: metric["value"] for name, metric in metrics.items()}


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
    return collect((jax.device_get(forward(params, batch)) for batch in loader), examples.aside)
