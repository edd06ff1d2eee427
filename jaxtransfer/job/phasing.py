"""The phases before a run: each trained in a folder of its own, the next begun where the one before stood best."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtransfer.job import caching, events, record
from jaxtransfer.job.models import CHECKPOINTS, PHASE, phases_of, progress_of
from jaxtransfer.job.prepare import Job
from jaxtransfer.job.train import saved_best
from jaxtransfer.parallel import distributed
from jaxtransfer.phases import next_phase
from jaxtransfer.run import Progress, Stop
from jaxtransfer.step import bare, params_of, whole
from jaxtransfer.tree.paths import Params
from jaxtransfer.tree.stacks import unstack
from jaxtransfer.types import AUX, Source, State

Train = Callable[[Job, Path, Stop, events.Screen, str], tuple[Source, dict[str, Any], Progress]]


def gone_through(job: Job, stop: Stop, screen: events.Screen, train: Train) -> Job:
    """The job behind its phases: those that are not finished yet are trained now, or resumed.

    Args:
      job: its source has its weights.
      stop, screen: of the run.
      train: trains a job in a folder, resuming what is there: ``(job, folder, stop, screen, title)``.
    """
    begin = None
    for number, phase in enumerate(job.phases, 1):
        folder, last = Path(phase.config.out), phase
        phase = dataclasses.replace(phase, begin=begin)
        if not record.is_there(folder / PHASE):
            _train(phase, number, len(job.phases), stop, screen, train)
        following = job.phases[number] if number < len(job.phases) else job
        begin = _beginning(following, last, folder, number)
    return dataclasses.replace(job, begin=begin, notes=tuple(entry["operation"] for entry in phases_of(job)))


def _train(phase: Job, number: int, count: int, stop: Stop, screen: events.Screen, train: Train) -> None:
    folder, title = Path(phase.config.out), f"phase {number} of {count}"
    if distributed.is_first():
        folder.mkdir(parents=True, exist_ok=True)
    screen.say(f"{title}\n{record.table_of_groups(phase.rows())}")
    cached = caching.cached(phase, folder / caching.FOLDER, screen.say, stop.check)
    source, found, progress = train(cached, folder, stop, screen, title)
    done = {
        "groups": [dataclasses.asdict(row) for row in phase.rows()],
        "metrics": {split: record.cells(phase.task, phase.task.metrics(part)) for split, part in found.items()},
        "steps": progress.batch,
        "best_step": progress.best_batch,
        "operation": source.lineage.operations[-1],
    }
    distributed.by_first(f"write {folder / PHASE}", lambda: record.write_json(folder / PHASE, done))
    caching.discard(folder / caching.FOLDER)


def _beginning(job: Job, last: Job, folder: Path, number: int) -> Callable[[int], tuple[State, Params]]:
    """How a job begins behind the phase before it, which is finished: with its best state, read from its folder."""

    def begin(seed: int) -> tuple[State, Params]:
        state, frozen = saved_best(last, folder / CHECKPOINTS, last.start_of_all(seed), progress_of(folder))
        params = {**bare(params_of(state, frozen)), **_beside(job, unstack(whole(state, frozen)), seed)}
        state, frozen = next_phase(
            job.model, state, frozen, job.labels, job.tx, params=params, mesh=job.mesh, sharding=job.sharding,
            terms=job.terms.states,
        )  # fmt: skip
        # Each phase counts its own steps, which schedules of terms go by; so it draws from a key of its own.
        key = jax.random.fold_in(state.key, number)
        return dataclasses.replace(state, step=state.step * 0, key=key), frozen

    return begin


def _beside(job: Job, params: Params, seed: int) -> Params:
    """What trains beside the model: that of the phase before where a term goes on, else as it is drawn."""
    fresh, old = job.terms.beside(seed), params.get(AUX, {})
    return {AUX: {name: _same(old.get(name), node) for name, node in fresh[AUX].items()}} if fresh else {}


def _same(old: Any, new: Any) -> Any:
    shapes = [jax.tree.map(np.shape, tree) for tree in (old, new)]
    return old if shapes[0] == shapes[1] else new


def told(job: Job) -> list[str]:
    """The finished phases in words, for the record of the run."""
    out = []
    for number, entry in enumerate(phases_of(job), 1):
        split, cells = next(iter(entry["metrics"].items()))
        cell = cells[job.metric]["value"]
        out.append(f"phase {number}: {entry['steps']} steps, {split} {job.metric} {cell:.4g}")
    return out
