"""Which source suits a task, and which of its layers: scores and a quick probe of features that are extracted once."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtransfer import probes, scores
from jaxtransfer.checkpoint.manifest import write_durably
from jaxtransfer.config import Config, ConfigError
from jaxtransfer.data.dataset import DataError, Dataset
from jaxtransfer.data.loader import Examples, Loader, batches
from jaxtransfer.data.sources import read
from jaxtransfer.features import FeatureError, extract, hidden_boundaries, last_boundary
from jaxtransfer.job.meshes import make_mesh_of
from jaxtransfer.job.prepare import TRAIN, Say, splits
from jaxtransfer.job.sources import placed, sharding_rules
from jaxtransfer.job.tasks import columns_of, make_task
from jaxtransfer.models.names import MappingError
from jaxtransfer.models.registry import ConfigFieldError
from jaxtransfer.parallel.distributed import share
from jaxtransfer.source import SafetensorsError, SourceError, load
from jaxtransfer.tasks import Task
from jaxtransfer.tasks.metrics import softmax, wilson
from jaxtransfer.tree.diff import TreeError
from jaxtransfer.types import Source

_UNREADABLE = (SourceError, OSError, DataError, MappingError, ConfigFieldError, SafetensorsError, TreeError)
_CLASSIFIES = ("sequence-classification", "image-classification")
_NEIGHBOURS = 5
_PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""Of the probe, over the number of examples: of standardised features 1 halves what is told by one of them alone."""

Score = Callable[[np.ndarray, np.ndarray], float]
OF_FEATURES: Mapping[str, Score] = {
    "logme": scores.logme,
    "h_score": scores.h_score,
    "transrate": scores.transrate,
    "knn": functools.partial(scores.knn, k=_NEIGHBOURS),
    "gbc": scores.gbc,
    "parc": scores.parc,
}
OF_PROBABILITIES: Mapping[str, Score] = {"leep": scores.leep, "nce": scores.nce}


def rank(
    config: Config, sources: Sequence[str], *, layers: bool = False, to: Path | None = None, say: Say = print
) -> dict[str, Any]:
    """Ranks sources, and layers of them, for the task of a configuration, without fine-tuning any.

    Features are mean-pooled hidden states of the training data, extracted once from each source. The scores are of
    these and their labels (see `scores`); the probe is a standardised ridge classifier fitted to them, its penalty
    chosen on them alone, and its accuracy that on the validation data, or without these on every fifth example of the
    training data, which then takes no part in anything else. Test data are not read.

    Args:
      config: names the data and the task; its own source is not among those ranked unless it is named again.
      sources: references, as ``source.ref``.
      layers: a row for every layer of each source, not for the last hidden state alone.
      to: a file that the result goes to as JSON.
      say: is told what a user should know.

    Returns:
      ``ranking``, a row each, the best probe first; ``unread``, the sources that could not be read and why;
      ``examples`` and ``held_out``, how many there were.

    Raises:
      ConfigError: the task has no single label for an example, or ``to`` can be no file.
      SourceError, OSError, ...: none of the sources can be read; the first one's reason.
    """
    if to is not None and (to.is_dir() or not to.parent.is_dir()):
        raise ConfigError(f"--to: {to} can be no file: it is a folder, or stands in one that is not there", "")
    data, held_out = _data(config)
    task = make_task(config, data)
    if not task.single_label:
        raise ConfigError(f"task.kind: {task.name} has no single label an example, which scores need", "task.kind")
    rows: list[dict[str, Any]] = []
    unread: list[dict[str, str]] = []
    failures: list[Exception] = []
    for ref in dict.fromkeys(sources):
        try:
            rows += _Ranked(config, ref, task, say).rows(data, held_out, layers=layers)
        except _UNREADABLE as error:
            failures.append(error)
            unread.append({"source": ref, "reason": " ".join(str(error).split())})
    if not rows:
        raise failures[0]
    rows.sort(key=lambda row: -row["probe"]["value"])
    columns = [name for name in (*OF_FEATURES, *OF_PROBABILITIES) if any(row.get(name) is not None for row in rows)]
    first = ("source", *(("layer",) if layers else ()), "probe")
    found = {
        "ranking": [{name: row.get(name) for name in (*first, *columns)} for row in rows],
        "unread": unread,
        "examples": len(data),
        "held_out": len(held_out),
    }
    if to is not None:
        write_durably(to, json.dumps(found, indent=1, allow_nan=False).encode())
    return found


def _data(config: Config) -> tuple[Dataset, Dataset]:
    """The training data, and what the probe is measured on."""
    named = {name: spec for name, spec in splits(config).items() if name in (TRAIN, "validation")}
    found = {name: read(spec, columns_of(config)) for name, spec in named.items()}
    data = found[TRAIN]
    if "validation" in found:
        return data, found["validation"]
    order = np.random.RandomState(0).permutation(len(data))
    parts = (np.sort(order[len(data) // 5 :]), np.sort(order[: len(data) // 5]))
    if not len(parts[1]):
        raise DataError(f"{data.path}: {len(data)} examples cannot be parted; give data.validation")
    kept, held_out = (dataclasses.replace(data, rows=[data.rows[i] for i in part], notes=()) for part in parts)
    return kept, held_out


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """One source under the task's data."""

    config: Config
    ref: str
    task: Task
    say: Say

    def rows(self, data: Dataset, held_out: Dataset, *, layers: bool) -> list[dict[str, Any]]:
        """A row a layer."""
        source = self._source()
        processor = self.task.processor(source)
        examples = [self.task.prepare(processor, part, train=False) for part in (data, held_out)]
        for note in dict.fromkeys(note for rows in examples for note in rows.notes):
            self.say(f"{self.ref}: {note}")
        y, y_held_out = (rows.fixed["labels"] for rows in examples)
        names = hidden_boundaries(source) if layers else [last_boundary(source)]
        own = _classifies(source)
        x = self._features(source, examples[0], [*names, *own])
        x_held_out = self._features(source, examples[1], names)
        out = []
        for name in names:
            row = {"source": self.ref, "layer": name, **self._scored(OF_FEATURES, x[name], y)}
            if own and name == names[-1]:
                row |= self._scored(OF_PROBABILITIES, softmax(x[own[0]]), y)
            hits = probe(x[name], y, x_held_out[name], len(self.task.head.labels)) == y_held_out
            out.append({**row, "probe": dataclasses.asdict(wilson(int(hits.sum()), len(hits)))})
        return out

    def _source(self) -> Source:
        given, own = self.config.source, self.ref == self.config.source.ref
        options = {"dtype": given.dtype, "ignore": given.ignore, **placed(make_mesh_of(self.config))}
        if own:
            options |= {"config": given.config, "revision": given.revision}
        return load(self.ref, head="checkpoint", **options)

    def _features(self, source: Source, examples: Examples, names: Sequence[str]) -> dict[str, np.ndarray]:
        mesh = make_mesh_of(self.config)
        sharding = () if mesh is None else sharding_rules(mesh, source.model, source.params)
        precision = jnp.dtype(self.config.run.precision)
        return extract(source, self._loader(examples), names, precision=precision, mesh=mesh, sharding=sharding)

    def _loader(self, examples: Examples) -> Loader:
        index, count = share(make_mesh_of(self.config))
        return batches(
            examples, batch=self.config.data.batch, buckets=self.config.buckets, shuffle=False, epochs=1,
            process_index=index, process_count=count,
        )  # fmt: skip

    def _scored(self, named: Mapping[str, Score], x: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
        """Every score that applies; of those that do not the reason is told."""
        out: dict[str, float | None] = {}
        for name, score in named.items():
            try:
                with np.errstate(all="ignore"):
                    value = score(x, y)
                if not np.isfinite(value):
                    raise scores.ScoreError(f"it is {value} of these features")
                out[name] = value
            except scores.ScoreError as error:
                self.say(f"{self.ref}: no {name}: {error}")
                out[name] = None
        return out


def _classifies(source: Source) -> list[str]:
    """The stage that gives a source's own predictions, where it is a classifier."""
    head, last = source.model.head, source.model.stages[-1]
    own = head is not None and head.kind in _CLASSIFIES and len(head.labels) > 1 and last.writes[0] == "logits"
    return [last.name] if own else []


def probe(features: np.ndarray, labels: np.ndarray, others: np.ndarray, classes: int) -> np.ndarray:
    """What a standardised ridge classifier, its penalty chosen on what it is fitted to, takes other examples for.

    Args:
      features: (N, d).
      labels: (N,) integers below ``classes``.
      others: (M, d).
      classes: C; those without examples are never predicted.

    Returns:
      (M,) integers.
    """
    there, y = np.unique(labels, return_inverse=True)
    if len(there) < 2:
        raise FeatureError(f"the probe has examples of {len(there)} of {classes} classes, and needs two")
    fit = probes.standardised(probes.ridge)
    penalties = [penalty * len(y) for penalty in _PENALTIES]
    penalty = penalties[2]
    if np.bincount(y).min() > 1:
        penalty = probes.choose(features, y, len(there), penalties, probe=fit, loss=probes.zero_one).strength
    return there[np.argmax(np.asarray(fit(features, y, len(there), penalty)(others)), axis=1)]
