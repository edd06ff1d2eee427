"""Training one seed: the loop with its evaluation, its best state and its events."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import checkpoint
from jaxtransfer.job.prepare import Job
from jaxtransfer.job.tasks import described
from jaxtransfer.run import Callback, Progress, Saver, Selection, Stop, fit
from jaxtransfer.step import CONSTANTS, bare, params_of, shard_batch
from jaxtransfer.tasks import collect
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import Source, State

SPLITS = ("test", "validation", "train")
"""Splits, in the order in which results are reported on the first that is there."""


def predictions(job: Job, state: State, frozen: Params, split: str, check: Callable[[], None]) -> dict[str, np.ndarray]:
    """What the task observes of a split, in the order of its examples; ``check`` is called before each batch."""
    parts = []
    for batch in job.loader(split):
        check()
        parts.append(jax.device_get(job.evaluate(state, frozen, shard_batch(batch, job.mesh))))
    return collect(parts, job.examples[split].aside)


def selection(job: Job) -> Selection:
    """How the best state is chosen."""
    metric = job.metric
    return Selection(metric, minimize=metric in job.task.minimize, patience=job.config.run.patience)


class Memory:
    """Keeps the best state in host memory: what a checkpointer is for a run that need not outlive its process."""

    def __init__(self) -> None:
        self._last: State | None = None
        self.best: State | None = None

    def save(self, step: int, state: State, frozen: Params, extra: Mapping[str, Any] | None = None) -> None:
        """Remembers a state."""
        kept = jax.tree.map(_kept, (state.params, state.stats))
        self._last = dataclasses.replace(state, params=kept[0], stats=kept[1], opt_state=())

    def protect(self, step: int) -> None:
        """The state last saved is the best."""
        self.best = self._last

    def wait(self) -> None:
        """Nothing is under way."""


def _kept(leaf: jax.Array) -> Any:
    """A copy in host memory; of what lies on several processes, where it is."""
    return np.array(leaf) if leaf.is_fully_addressable else jnp.copy(leaf)


def train(
    job: Job,
    state: State,
    frozen: Params,
    *,
    seed: int,
    saver: Saver,
    stop: Stop,
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
    position: Mapping[str, Any] | None = None,
    diagnose: Callable[[State, Params, Mapping[str, Any]], str] | None = None,
) -> State:
    """Runs `fit` as the configuration says, from the start or from a saved position."""
    run = job.config.run
    data = job.stream(seed)
    if position is not None:
        data.restore(position)

    def evaluate(state: State, frozen: Params) -> dict[str, float]:
        found = predictions(job, state, frozen, "validation", stop.check)
        return {name: metric.value for name, metric in job.task.metrics(found).items()}

    return fit(
        _stepping(job, job.constants(seed)), state, frozen, data,
        steps=job.steps,
        evaluate=evaluate if "validation" in job.examples else None,
        every=run.evaluate_every or job.epoch,
        checkpoint=saver,
        save_every=run.checkpoint_every or job.epoch,
        callbacks=callbacks,
        select=selection(job),
        progress=progress,
        stop=stop,
        log_every=run.log_every,
        max_rejected=run.max_rejected,
        diagnose=diagnose,
    )  # fmt: skip


def _stepping(job: Job, constants: Mapping[str, Any]) -> Callable[..., Any]:
    """The step, which puts rows on the mesh and knows the constants; these are saved nowhere."""

    def step(state: State, frozen: Params, batch: Mapping[str, Any]) -> Any:
        held = {**frozen, CONSTANTS: constants} if constants else frozen
        return job.step(state, held, shard_batch(batch, job.mesh))

    return step


def score(job: Job, seed: int, *, scratch: bool, stop: Stop, callbacks: Sequence[Callback]) -> float:
    """Trains one seed in memory and gives its metric on the test split (the validation split without one)."""
    state, frozen = job.start(seed, scratch=scratch)
    memory = Memory()
    last = train(job, state, frozen, seed=seed, saver=memory, stop=stop, callbacks=callbacks)
    best = last if memory.best is None else memory.best
    found = predictions(job, best, frozen, final_split(job), stop.check)
    return job.task.metrics(found)[job.metric].value


def final_split(job: Job) -> str:
    """The split that results are reported on."""
    return next(split for split in SPLITS if split in job.examples)


def finished(job: Job, seed: int, state: State, frozen: Params, progress: Progress) -> Source:
    """The adapted source of a finished run, for export; its lineage says what was done."""
    source = described(job.config, job.adapted(seed), job.processor)
    trained = ", ".join(f"{name}: {group.optimizer} {group.lr:g}" for name, group in job.groups.items())
    at = progress.best_batch or progress.batch
    note = f"fit(steps={at} of {job.steps}, batch={job.config.data.batch}, seed={seed}, {trained})"
    lineage = dataclasses.replace(source.lineage, operations=(*source.lineage.operations, *job.notes, note))
    return dataclasses.replace(source, params=bare(params_of(state, frozen)), lineage=lineage)


def saved_best(job: Job, root: Path, like: tuple[State, Params], progress: Progress) -> tuple[State, Params]:
    """The best step's state from its checkpoint; the last one where nothing was evaluated."""
    lineage = job.adapted(job.config.run.seed).lineage
    state, frozen, _ = checkpoint.restore(
        root / str(best_step(progress)), like=like, mesh=job.mesh, sharding=job.sharding, lineage=lineage
    )
    return state, frozen


def best_step(progress: Progress) -> int:
    """The best step; the last one where nothing was evaluated."""
    return progress.batch if progress.best_batch is None else progress.best_batch
