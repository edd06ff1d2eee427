"""From a configuration to all that a run needs: source, data, labels, optimizer, step; checked before work starts."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtransfer.adapt import groups
from jaxtransfer.config import Config
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.loader import Examples, Loader, batches
from jaxtransfer.data.sources import DataSpec, read
from jaxtransfer.job import adapting, checks
from jaxtransfer.job.optimization import optimizer_groups, recipe, thawed
from jaxtransfer.job.sources import load_source, make_mesh_of, sharding_rules
from jaxtransfer.job.tasks import columns_of, make_task
from jaxtransfer.models import init
from jaxtransfer.models.api import abstract_init
from jaxtransfer.optim import Group, Row, explain, optimizer
from jaxtransfer.parallel.distributed import in_step, share
from jaxtransfer.step import Step, init_state, make_eval, make_step
from jaxtransfer.tasks import Task
from jaxtransfer.tree.paths import Params, flatten
from jaxtransfer.tree.rules import Rules
from jaxtransfer.types import Model, Source, State

Say = Callable[[str], None]
TRAIN, RETAIN = "train", "retain"


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A configuration, ready to run: one compiled step serves every seed and budget, transferred or from scratch.

    Where part of the source is frozen, the control from scratch has a step of its own, see `control`.

    Attributes:
      trunk: the source as loaded: bare, or with the head that the task goes on with.
      processor: the trunk's tokenizer, or how its images are prepared.
      data: by split: ``train``, ``validation``, ``test``, ``retain``.
      training: the examples to train on.
      examples: those to measure, by split; the training data where no others are given.
      labels: what trains; ``groups``: how; ``tx``: the two together.
      steps: batches of a run; ``epoch``: batches of an epoch.
      before: the run that makes the source, until it has; the trunk then has no weights of its own yet.
    """

    config: Config
    trunk: Source
    task: Task
    processor: Any
    data: Mapping[str, Dataset]
    training: Examples
    examples: Mapping[str, Examples]
    model: Model
    labels: Any
    groups: Mapping[str, Group]
    tx: optax.GradientTransformation
    step: Step
    evaluate: Callable[[State, Params, Mapping[str, Any]], Mapping[str, jax.Array]]
    steps: int
    epoch: int
    mesh: Mesh | None
    sharding: Rules
    before: "Job | None" = None

    @property
    def metric(self) -> str:
        """The metric that the best step is chosen by, and that a study compares."""
        return self.config.run.metric or self.task.metric

    def adapted(self, seed: int, *, scratch: bool = False) -> Source:
        """What a run of this seed starts from: the adapted source, or the bare architecture from scratch."""
        if not scratch and self.config.source.init == "pretrained":
            return adapting.begun(self.config, self.trunk, self.task, seed)
        key = jax.random.fold_in(jax.random.key(seed), 0)
        source = adapting.headed(self.config, self.trunk, self.task, key)
        lineage = dataclasses.replace(
            source.lineage, fingerprints={}, operations=(*source.lineage.operations, f"init(seed={seed}): from scratch")
        )
        # The job's own model: its functions are compiled already.
        return dataclasses.replace(source, model=self.model, params=init(self.model, key), lineage=lineage)

    def start(self, seed: int, *, scratch: bool = False) -> tuple[State, Params]:
        """The first state of a run of this seed, and what is frozen in it."""
        key = jax.random.fold_in(jax.random.key(seed), 1)
        params = self.adapted(seed, scratch=scratch).params
        return init_state(self.model, params, self.labels, self.tx, key, mesh=self.mesh, sharding=self.sharding)

    def loader(self, split: str, *, seed: int = 0, train: bool = False) -> Loader:
        """Batches of a split: shuffled without end to train on, or once in order; of them the rows of this process."""
        index, count = share(self.mesh)
        return batches(
            self.training if train else self.examples[split], batch=self.config.data.batch,
            buckets=self.config.buckets, shuffle=train, seed=seed, epochs=None if train else 1,
            process_index=index, process_count=count,
        )  # fmt: skip

    def budgeted(self, budget: int, seed: int) -> "Job":
        """The same run with less to train on: the first ``budget`` examples of each class, as ``StudyConfig`` says."""
        data = self.data[TRAIN]
        rows = some_of(data, checks.class_numbers(self.config, self.task, data), budget, seed)
        return dataclasses.replace(self, training=self.task.prepare(self.processor, rows, train=True))

    @functools.cached_property
    def control(self) -> "Job":
        """The same run for a start from scratch: all of the bare architecture trains.

        Random layers that are frozen, packed or adapted would be no control.
        """
        adapt = self.config.adapt
        if groups.FROZEN not in flatten(self.labels).values() and not adapt.adapters and not adapt.quantize:
            return self
        bare = abstract_init(self.model)
        sharding = () if self.mesh is None else sharding_rules(self.mesh, self.model, bare)
        how = trained(self.config, self.task, self.model, bare, self.steps, self.mesh, sharding, thaw=True)
        return dataclasses.replace(self, **how, sharding=sharding)

    def rows(self) -> list[Row]:
        """What trains and what it costs."""
        return explain(self.adapted(self.config.run.seed).params, self.labels, self.groups)

    def identity(self) -> dict[str, Any]:
        """What makes a run folder this run's: its configuration but for its places, its source, its data."""
        known = _dotted(dataclasses.asdict(self.config))
        config = {key: value for key, value in known if key != "out" and not key.startswith("mesh.")}
        data = {f"data {split}": data.digest for split, data in self.data.items()}
        if self.before is not None:
            data |= {f"pretrain data {split}": data.digest for split, data in self.before.data.items()}
        return {**config, "source": self.trunk.lineage.digest, **data}


def prepare(config: Config, say: Say) -> Job:
    """Everything that a run needs; every mistake in configuration, source and data comes to light here.

    Args:
      config: the configuration.
      say: is told what a user should know: alternatives taken, texts cut, rows dropped.

    Raises:
      ConfigError, DataError, SourceError, RuleError, GroupError, ...: see the rooms' own functions.
    """
    columns = columns_of(config)
    data = {
        split: read(spec, columns if split == RETAIN else (*columns, *config.data.subgroups))
        for split, spec in splits(config).items()
    }
    task = make_task(config, data[TRAIN])
    checks.check_task(config, task)
    mesh = make_mesh_of(config)
    trunk = load_source(config, task, mesh, say)
    processor = task.processor(trunk)
    training = task.prepare(processor, data[TRAIN], train=True)
    measured = {split: rows for split, rows in data.items() if split not in (TRAIN, RETAIN)} or {TRAIN: data[TRAIN]}
    measured |= {RETAIN: data[RETAIN]} if RETAIN in data else {}
    examples = {split: task.prepare(processor, rows, train=False) for split, rows in measured.items()}
    checks.check_vocabulary({TRAIN: training, **examples}, trunk.model)
    for note in dict.fromkeys(note for example in (training, *examples.values()) for note in example.notes):
        say(note)
    source = adapting.begun(config, trunk, task, config.run.seed)
    checks.check_shapes(config, source, training)
    checks.check_budgets(config, task, data[TRAIN])
    epoch = -(-len(training) // config.data.batch)
    steps = config.run.steps or epoch * (config.run.epochs or 0)
    sharding = () if mesh is None else sharding_rules(mesh, source.model, source.params)
    how = trained(config, task, source.model, source.params, steps, mesh, sharding)
    adapting.check_labels(config, source, adapting.puts(config, trunk, task, config.run.seed), how["labels"])
    part = config.pretraining()
    return Job(
        config=config, trunk=trunk, task=task, processor=processor, data=data, training=training, examples=examples,
        model=source.model, **how, steps=steps, epoch=epoch, mesh=mesh, sharding=sharding,
        before=None if part is None else prepare(part, say),
    )  # fmt: skip


def trained(
    config: Config,
    task: Task,
    model: Model,
    params: Params,
    steps: int,
    mesh: Mesh | None,
    sharding: Rules,
    *,
    thaw: bool = False,
) -> dict[str, Any]:
    """What trains and how: ``labels``, ``groups``, ``tx``, ``step`` and ``evaluate``.

    With ``thaw`` what would be frozen trains too.
    """
    rules = recipe(config, model)
    labels = groups.labels_of(model, thawed(rules) if thaw else rules, params)
    checks.check_tied(model, labels)
    how = optimizer_groups(config, labels, steps, control=thaw)
    decay = config.optimizer.layer_decay
    scales = None if decay is None else groups.layerwise_decay(model, params, decay)
    tx = optimizer(labels, how, clip=config.optimizer.clip, scales=scales)
    where = {"mesh": mesh, "sharding": sharding, "precision": jnp.dtype(config.run.precision)}
    step = make_step(
        model, task.objective, tx, **where, remat=config.run.remat, accumulate=config.run.accumulate,
        augment=task.augment,
    )  # fmt: skip
    evaluate = make_eval(model, observing(task), **where)
    compiled = {"step": in_step("step", step), "evaluate": in_step("evaluate", evaluate)}
    return {"labels": labels, "groups": how, "tx": tx, **compiled}


def observing(task: Task) -> Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]:
    """What an evaluation keeps of every example, and which example it is."""
    return lambda outputs, batch: {**task.observe(outputs, batch), "index": batch["index"]}


def splits(config: Config) -> dict[str, DataSpec]:
    """The data sets that a configuration names."""
    data = config.data
    named = {TRAIN: data.train, "validation": data.validation, "test": data.test, RETAIN: data.retain}
    return {split: spec for split, spec in named.items() if spec is not None}


def some_of(dataset: Dataset, classes: np.ndarray | None, budget: int, seed: int) -> Dataset:
    """The first ``budget`` rows of each class in a permutation by the seed; of all rows where there are no classes."""
    order = np.random.RandomState(seed).permutation(len(dataset))
    classes = np.zeros(len(dataset), np.int32) if classes is None else classes
    taken = [order[classes[order] == number][:budget] for number in np.unique(classes)]
    order = order[np.isin(order, np.concatenate(taken))]
    return dataclasses.replace(dataset, rows=[dataset.rows[i] for i in order], notes=())


def _dotted(record: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as pairs of dotted key and value."""
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
