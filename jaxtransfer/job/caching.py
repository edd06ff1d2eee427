"""Frozen stages are computed once: where that is valid, what it takes, and the run that goes on from their output."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.data.loader import Examples
from jaxtransfer.features import FeatureError, Pass, Prefix, forward, frozen_prefix, frozen_stages, kept
from jaxtransfer.job.meshes import attention_of
from jaxtransfer.job.prepare import Job, Say, trained
from jaxtransfer.parallel.agreement import is_first
from jaxtransfer.tree.paths import flatten
from jaxtransfer.types import View

FOLDER = "features"
MEMORY = 1 << 30
"""Bytes of features that are held in memory; what is beyond goes to the run's folder until the run is finished."""


def frozen(job: Job) -> Prefix:
    """The stages that a run computes once for each example.

    Raises:
      FeatureError: there are none, or it would not be valid, or of no use; the message says why.
    """
    if job.config.run.cache == "off":
        raise FeatureError("run.cache is off")
    if not job.config.objective.plain:
        raise FeatureError("the objective reads more of the model than the task's loss does")
    if job.steps <= job.epoch:
        raise FeatureError("every example is seen once at the most")
    if job.task.augment is not None:
        raise FeatureError("inputs are mixed with one another, anew in every step")
    source = job.adapted(job.config.run.seed)
    count, _ = frozen_stages(job.model, job.labels)
    names = tuple(f"{stage.name}/" for stage in job.model.stages[:count])
    known = flatten(job.trunk.params)
    for path, leaf in flatten(source.params).items():
        if path.startswith(names) and known.get(path) is not leaf:
            raise FeatureError(f"{path} is frozen, but none of the source's own: it may differ by seed")

    def uses(params: Any, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        view = View(params, outputs, batch, jax.random.key(0), jnp.zeros((), jnp.int32))
        return job.task.objective(view), job.task.observe(outputs, batch)

    return frozen_prefix(
        job.model, source.params, job.labels, job.training, uses, length=max(job.config.buckets, default=0),
        precision=jnp.dtype(job.config.run.precision), attend=attention_of(job.config, job.model, source.params, None),
    )  # fmt: skip


def told(job: Job) -> str:
    """In words what a run computes once, or why it does not."""
    try:
        prefix = frozen(job)
    except FeatureError as error:
        return f"all stages run in every epoch: {error}"
    size = sum(_bytes(prefix, examples) for examples in (job.training, *job.examples.values()))
    return f"{_words(prefix)}: {_mebibytes(size)}"


def cached(job: Job, folder: Path, say: Say, check: Callable[[], None], *, traced: bool = False) -> Job:
    """The job with its frozen stages computed once, where that is valid; it says which.

    Args:
      job: ready to run; its source has its weights.
      folder: for what does not fit into memory.
      say: is told what is computed once, or why it is not.
      check: called before each batch of the pass that computes it; raises to stop.
      traced: as the job's optimizer was made.
    """
    try:
        prefix = frozen(job)
        _check_room(job, prefix, folder)
    except FeatureError as error:
        if _some_frozen(job):
            say(f"all stages run in every epoch: {error}")
        return job
    say(_words(prefix))
    params = job.adapted(job.config.run.seed).params
    where = {"mesh": job.mesh, "sharding": job.sharding, "terms": job.terms, "traced": traced}
    how = trained(job.config, job.task, prefix.rest(), params, job.steps, **where)
    run = forward(prefix, mesh=job.mesh, sharding=job.sharding)
    once = _Once(job, prefix, folder, say, check, run)
    return dataclasses.replace(job, step=how["step"], evaluate=how["evaluate"], features=once)


def fixed_fields(job: Job) -> frozenset[str] | None:
    """The fields of a batch that are read, where they have one shape in every batch; None where they have not."""
    if not isinstance(once := job.features, _Once):
        return None
    entries = once.prefix.entries
    varying = {*job.training.ragged, "attention_mask", *(name for name, entry in entries.items() if entry.ragged)}
    fields = {*once.prefix.reads, *entries, "index", "weight"}
    return None if fields & varying else frozenset(fields)


def discard(folder: Path) -> None:
    """What a finished run has no use for any more."""
    if is_first() and folder.exists():
        shutil.rmtree(folder)


@dataclasses.dataclass(eq=False)
class _Once:
    """Examples with the output of the frozen stages, computed when they are first asked for."""

    job: Job
    prefix: Prefix
    folder: Path
    say: Say
    check: Callable[[], None]
    forward: Callable[..., Any]  # compiled once for all splits
    held: int = 0
    known: dict[int, tuple[Examples, Examples]] = dataclasses.field(default_factory=dict)

    def __call__(self, examples: Examples) -> Examples:
        if id(examples) not in self.known:
            self.known[id(examples)] = examples, self._computed(examples)
        return self.known[id(examples)][1]

    def _computed(self, examples: Examples) -> Examples:
        job, size = self.job, _bytes(self.prefix, examples)
        inside = self.held + size <= MEMORY and jax.process_count() == 1
        params = job.start(job.config.run.seed)[1]
        how = (job.config.data.batch, job.config.buckets, job.mesh, job.sharding)
        once = Pass(self.prefix, params, *how, forward=self.forward)
        store = once.store(examples, None if inside else self.folder)
        self.held += size if inside else 0
        if not inside:
            there = f", {store.done:,} of them there already" if store.done else ""
            self.say(f"features of {len(examples):,} examples go to {self.folder}: {_mebibytes(size)}{there}")
        once.fill(store, examples, self.check)
        return kept(examples, store)


def _check_room(job: Job, prefix: Prefix, folder: Path) -> None:
    size = sum(_bytes(prefix, examples) for examples in (job.training, *job.examples.values()))
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if size > MEMORY and size > 0.9 * free:
        raise FeatureError(
            f"what {prefix.stop} gives would take {_mebibytes(size)}, and {folder} has {_mebibytes(free)} free"
        )


def _some_frozen(job: Job) -> bool:
    """Whether there is anything that a user could expect to be computed once."""
    return frozen_stages(job.model, job.labels)[0] > 0


def _bytes(prefix: Prefix, examples: Examples) -> int:
    return sum(entry.bytes(examples.lengths) for entry in prefix.entries.values())


def _words(prefix: Prefix) -> str:
    kept_ = ", ".join(prefix.entries)
    return (
        f"the {prefix.stages} frozen stages up to {prefix.stop}, of {len(prefix.model.stages)}, are computed once for "
        f"each example ({kept_})"
    )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
