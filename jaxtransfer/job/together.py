"""Several runs of one program, trained together: each gives what it would give by itself."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.data.loader import Batch, Loader
from jaxtransfer.job import events, record
from jaxtransfer.job.caching import fixed_fields
from jaxtransfer.job.prepare import TRAIN, Job
from jaxtransfer.job.train import final_split, selection
from jaxtransfer.run import Stop
from jaxtransfer.step import Step
from jaxtransfer.sweeps import sweep, sweep_eval
from jaxtransfer.tasks import collect
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import State

Best = tuple[Params, Params]
"""Parameters and statistics, with a leading axis over runs."""


def train_together(jobs: Sequence[Job], stop: Stop, screen: events.Screen) -> list[dict[str, Any]]:
    """Trains jobs that differ in seeds, rates and weight decay alone, as `run.fit` trains each.

    Args:
      jobs: of one program: the step and the evaluation of the first serve all; their rates are part of their states.
        Those of one seed stand together.
      stop: asked after every batch.
      screen: shows progress.

    Returns:
      For each job ``metrics`` of its best state, split -> name -> cell, and the ``step`` of that; of one that diverged
      cells without a value.

    Raises:
      Interrupted: a signal came; of a sweep nothing is kept but the features of frozen stages on disk.
    """
    first = jobs[0]
    bundles = _bundles(jobs)
    tracks = [_Track(first, len(bundle.jobs)) for bundle in bundles]
    tell, began, run = screen.titled(f"sweep of {len(jobs)}", first.steps), time.perf_counter(), first.config.run
    for at in range(1, first.steps + 1):
        for bundle, track in zip(bundles, tracks, strict=True):
            track.finite.append(bundle.advance(at - 1))
        stop.check()
        if at % run.log_every == 0 or at == first.steps:
            losses = np.concatenate([np.ravel(jax.device_get(bundle.metrics["loss"])) for bundle in bundles])
            speed = {"per_second": at * len(jobs) * first.config.data.batch / (time.perf_counter() - began)}
            tell({"kind": "train", "step": at, "steps": first.steps, "loss": float(losses.mean()), **speed})
        if "validation" in first.examples and (at == first.steps or at % (run.evaluate_every or first.epoch) == 0):
            for bundle, track in zip(bundles, tracks, strict=True):
                track.evaluated(at, bundle, stop)
            if all(track.done.all() for track in tracks):
                break
    tell({"kind": "end", "step": at, "steps": first.steps})
    rows = [row for bundle, track in zip(bundles, tracks, strict=True) for row in track.rows(bundle, at, stop)]
    places = [job for bundle in bundles for job in bundle.jobs]
    return [rows[places.index(job)] for job in jobs]


@dataclasses.dataclass
class _Bundle:
    """Runs that one call of a step advances.

    Attributes:
      jobs: in the order in which their states lie, seed by seed.
      state: stacked over ``axes`` leading axes: seeds, then what shares a seed's batches; none for a single run.
      step: over all of them; ``evaluate``: over one leading axis.
      data: a loader for each seed.
      fields: of a batch that are read, None for all.
    """

    jobs: Sequence[Job]
    axes: int
    state: State
    frozen: Params
    step: Step
    evaluate: Callable[..., Any]
    data: Sequence[Loader]
    fields: frozenset[str] | None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def advance(self, position: int) -> jax.Array:
        """One step of all; which of them were finite."""
        found = [self._read(loader.batch(position)) for loader in self.data]
        batch = found[0] if len(found) == 1 else {name: np.stack([b[name] for b in found]) for name in found[0]}
        self.state, self.metrics = self.step(self.state, self.frozen, batch)
        return self.metrics["finite"]

    def flat(self) -> Best:
        """Parameters and statistics with one leading axis over the runs."""
        axes = self.axes
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), (self.state.params, self.state.stats))

    def predictions(self, best: Best, split: str, stop: Stop) -> list[dict[str, np.ndarray]]:
        """Of each run what the task observes of a split, in the order of its examples."""
        count, one = len(self.jobs), jnp.zeros(len(self.jobs), jnp.int32)
        state = State(one, *best, (), jax.random.split(jax.random.key(0), count), {})
        parts: list[list[Mapping[str, np.ndarray]]] = [[] for _ in range(count)]
        for batch in self.jobs[0].loader(split):
            stop.check()
            found = jax.device_get(self.evaluate(state, self.frozen, self._read(batch)))
            for run, part in enumerate(parts):
                part.append({name: rows[run] for name, rows in found.items()})
        return [collect(part, self.jobs[0].examples[split].aside) for part in parts]

    def _read(self, batch: Batch) -> Batch:
        return batch if self.fields is None else {name: batch[name] for name in batch if name in self.fields}


def _bundles(jobs: Sequence[Job]) -> list[_Bundle]:
    """All runs as one bundle, or where batches differ in shape from seed to seed, one for each seed."""
    first, fields = jobs[0], fixed_fields(jobs[0])
    lanes = [
        [job for job in jobs if job.config.run.seed == seed] for seed in dict.fromkeys(j.config.run.seed for j in jobs)
    ]
    data = [first.loader(TRAIN, seed=lane[0].config.run.seed, train=True) for lane in lanes]
    evaluate, made = sweep_eval(first.evaluate), []
    shares: dict[int, Step] = {}
    for lane, loader in zip(lanes, data, strict=True):
        starts = [job.start(job.config.run.seed) for job in lane]
        step, state = first.step, starts[0][0]
        if len(lane) > 1:
            step, state = sweep(first.step, [start[0] for start in starts])
            step = shares.setdefault(len(lane), step)  # compiled once for all seeds
        frozen = starts[0][1] if not made else made[0].frozen
        made.append(_Bundle(lane, int(len(lane) > 1), state, frozen, step, evaluate, [loader], fields))
    if len(made) == 1 or (fields is None and len(data[0].shapes) > 1):
        return made
    step, state = sweep(made[0].step, [bundle.state for bundle in made], batches="own")
    every = [job for lane in lanes for job in lane]
    return [_Bundle(every, made[0].axes + 1, state, made[0].frozen, step, evaluate, data, fields)]


class _Track:
    """What `run.fit` keeps in mind of a run, of several at once: the best state, patience, rejected steps."""

    def __init__(self, job: Job, count: int) -> None:
        self._job, self._select = job, selection(job)
        self.finite: list[Any] = []
        self._values: list[float | None] = [None] * count
        self._at, self._stale = np.zeros(count, int), np.zeros(count, int)
        self._in_a_row, self._diverged = np.zeros(count, int), np.zeros(count, bool)
        self._best: Best | None = None
        self.done = np.zeros(count, bool)

    def evaluated(self, at: int, bundle: _Bundle, stop: Stop) -> None:
        """Measures the states after a batch, and keeps those that are better than before."""
        self._count()
        now = bundle.flat()
        improved = np.zeros(len(self.done), bool)
        for run, observed in enumerate(bundle.predictions(now, "validation", stop)):
            values = {name: metric.value for name, metric in self._job.task.metrics(observed).items()}
            value, whole = values[self._select.metric], bool(np.isfinite([*values.values()]).all())
            improved[run] = whole and not self.done[run] and self._select.better(value, self._values[run])
            if improved[run]:
                self._values[run], self._at[run] = value, at
        self._stale = np.where(improved, 0, self._stale + 1)
        if self._select.patience is not None:
            self.done |= self._stale >= self._select.patience
        self._best = jax.tree.map(jnp.copy, now) if self._best is None else _better(improved, now, self._best)

    def rows(self, bundle: _Bundle, at: int, stop: Stop) -> list[dict[str, Any]]:
        """Of each run the metrics of its best state, or of its last where none was measured, and when that was."""
        self._count()
        task, examples = self._job.task, self._job.examples
        best = bundle.flat() if self._best is None else _better(self._at == 0, bundle.flat(), self._best)
        splits = [split for split in ("validation", "test") if split in examples] or [final_split(self._job)]
        found = {split: bundle.predictions(best, split, stop) for split in splits}
        out = []
        for run, diverged in enumerate(self._diverged):
            cells = {split: record.cells(task, task.metrics(each[run])) for split, each in found.items()}
            if diverged:
                nothing = {"value": None, "low": None, "high": None}
                cells = {split: {name: nothing for name in row} for split, row in cells.items()}
            out.append({"metrics": cells, "step": None if diverged else int(self._at[run]) or at})
        return out

    def _count(self) -> None:
        """The steps since the last count: a run diverged that was not finite too many times in a row."""
        for finite in map(np.ravel, jax.device_get(self.finite)):
            self._in_a_row = np.where(finite, 0, self._in_a_row + 1)
            self._diverged |= ~self.done & (self._in_a_row >= self._job.config.run.max_rejected)
        self.finite = []
        self.done |= self._diverged


@jax.jit
def _better(improved: Any, new: Best, old: Best) -> Best:
    """The new values of the runs that improved, the old ones of the others."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(jnp.asarray(improved).reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)
