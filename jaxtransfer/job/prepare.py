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
from jaxtransfer.config import Config, DataConfig, ObjectiveConfig
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.loader import Examples, Loader, batches
from jaxtransfer.data.pairing import Paired
from jaxtransfer.data.sources import DataSpec, read
from jaxtransfer.job import adapting, auto_mesh, checks
from jaxtransfer.job.meshes import attention_of, mesh_of
from jaxtransfer.job.optimization import by_age, labels_of, mastered, optimizer_groups, unread_rate
from jaxtransfer.job.sources import load_source, sharding_rules
from jaxtransfer.job.tasks import columns_of, make_task
from jaxtransfer.job.terms import DOMAINS, Terms, terms_of
from jaxtransfer.models import init
from jaxtransfer.models.api import abstract_init
from jaxtransfer.objectives.continual import a_gem
from jaxtransfer.optim import Group, Row, explain, optimizer
from jaxtransfer.parallel.distributed import in_step, share
from jaxtransfer.step import Step, init_state, make_eval, make_step
from jaxtransfer.tasks import Task
from jaxtransfer.tree.paths import Params, flatten
from jaxtransfer.tree.rules import Rules
from jaxtransfer.types import TARGET, Model, Source, State

Say = Callable[[str], None]
TRAIN, RETAIN = "train", "retain"


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A configuration, ready to run: one compiled step serves every seed and budget, transferred or from scratch.

    Where part of the source is frozen, the control from scratch has a step of its own, see `control`.

    Attributes:
      trunk: the source as loaded: bare, or with the head that the task goes on with.
      processor: the trunk's tokenizer, or how its images are prepared.
      data: by split: ``train``, ``validation``, ``test``, ``retain``, ``target``, ``replay``.
      training: the examples to train on.
      examples: those to measure, by split; the training data where no others are given.
      domains: further examples that every batch has some of, or that are read once: ``target``, ``replay``.
      terms: what is minimised beside the task's loss.
      labels: what trains; ``groups``: how; ``tx``: the two together.
      steps: batches of a run; ``epoch``: batches of an epoch.
      chosen: why this mesh, where the configuration leaves it open.
      before: the run that makes the source, until it has; the trunk then has no weights of its own yet.
      phases: what comes before this run, each as a job of its own; ``begin`` then gives what they have come to, and
        ``notes`` say what they did. See `phasing`.
      features: examples -> the same with the output of the frozen stages in place, which ``step`` and ``evaluate`` then
        go on from; None where these run all of the model. See `caching`.
    """

    config: Config
    trunk: Source
    task: Task
    processor: Any
    data: Mapping[str, Dataset]
    training: Examples
    examples: Mapping[str, Examples]
    domains: Mapping[str, Examples]
    terms: Terms
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
    chosen: str = ""
    before: "Job | None" = None
    phases: "tuple[Job, ...]" = ()
    begin: Callable[[int], tuple[State, Params]] | None = None
    notes: tuple[str, ...] = ()
    features: Callable[[Examples], Examples] | None = None

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
        if self.begin is not None and not scratch:
            return self.begin(seed)
        return self.start_of_all(seed, scratch=scratch)

    def start_of_all(self, seed: int, *, scratch: bool = False) -> tuple[State, Params]:
        """As `start`, of the source as it was before any phase."""
        key = jax.random.fold_in(jax.random.key(seed), 1)
        own = mastered(self.config, self.model, self.adapted(seed, scratch=scratch).params)
        params = {**own, **self.terms.beside(seed)}
        return init_state(
            self.model, params, self.labels, self.tx, key, mesh=self.mesh, sharding=self.sharding,
            terms=self.terms.states,
        )  # fmt: skip

    def loader(self, split: str, *, seed: int = 0, train: bool = False) -> Loader:
        """Batches of a split: shuffled without end to train on, or once in order; of them the rows of this process."""
        examples = self.training if train else self.examples[split]
        return self._batches(examples if self.features is None else self.features(examples), train, seed)

    def stream(self, seed: int) -> Loader | Paired:
        """Batches to train on, each with rows of every further domain that the objective reads."""
        main = self.loader(TRAIN, seed=seed, train=True)
        if not self.terms.domains:
            return main
        return Paired(main, {name: self._batches(self.domains[name], True, seed) for name in self.terms.domains})

    def _batches(self, examples: Examples, train: bool, seed: int) -> Loader:
        index, count = share(self.mesh)
        return batches(
            examples, batch=self.config.data.batch, buckets=self.config.buckets, shuffle=train, seed=seed,
            epochs=None if train else 1, process_index=index, process_count=count,
        )  # fmt: skip

    def constants(self, seed: int) -> dict[str, Any]:
        """What the objective knows beforehand: the source's values of what trains, and which of them matter."""
        if not self.terms.anchored:
            return {}
        state, frozen = self.start_of_all(seed)
        rows = self.domains.get("replay")
        return self.terms.constants(state, frozen, rows)

    def budgeted(self, budget: int, seed: int) -> "Job":
        """The same run with less to train on: the first ``budget`` examples of each class, as ``StudyConfig`` says."""
        data = self.data[TRAIN]
        rows = some_of(data, checks.class_numbers(self.task, data), budget, seed)
        return dataclasses.replace(self, training=self.task.prepare(self.processor, rows, train=True))

    @functools.cached_property
    def control(self) -> "Job":
        """The same run for a start from scratch: all of the bare architecture trains.

        Random layers that are frozen, packed or adapted would be no control; neither would an objective that holds to a
        source or reads another domain.
        """
        adapt = self.config.adapt
        whole = groups.FROZEN not in flatten(self.labels).values() and not adapt.adapters and not adapt.quantize
        if whole and self.config.objective.plain:
            return self
        bare = abstract_init(self.model)
        sharding = () if self.mesh is None else sharding_rules(self.mesh, self.model, bare)
        alone = dataclasses.replace(self.config, objective=ObjectiveConfig(), data=_labelled(self.config.data))
        terms = terms_of(alone, self.task, self.trunk, self.model, bare, self.steps)
        how = trained(alone, self.task, self.model, bare, self.steps, self.mesh, sharding, terms=terms, thaw=True)
        return dataclasses.replace(self, **how, terms=terms, sharding=sharding, features=None)

    def rows(self) -> list[Row]:
        """What trains and what it costs."""
        seed = self.config.run.seed
        return explain({**self.adapted(seed).params, **self.terms.beside(seed)}, self.labels, self.groups)

    def identity(self) -> dict[str, Any]:
        """What makes a run folder this run's: its configuration but for its places, its source, its data."""
        known = _dotted(dataclasses.asdict(self.config))
        places = ("out", "run.cache", "run.attention", "mesh")
        config = {key: value for key, value in known if key not in places and not key.startswith("mesh.")}
        data = {f"data {split}": data.digest for split, data in self.data.items()}
        if self.before is not None:
            data |= {f"pretrain data {split}": data.digest for split, data in self.before.data.items()}
        files = {f"source {name}": value for name, value in self.trunk.lineage.files.items()}
        return {**config, "source": self.trunk.lineage.digest, **files, **data}


def prepare(config: Config, say: Say) -> Job:
    """Everything that a run needs; every mistake in configuration, source and data comes to light here.

    Args:
      config: the configuration.
      say: is told what a user should know: alternatives taken, texts cut, rows dropped.

    Raises:
      ConfigError, DataError, SourceError, RuleError, GroupError, ...: see the rooms' own functions.
    """
    data = {split: read(spec, _columns(config, split)) for split, spec in splits(config).items()}
    task = make_task(config, data[TRAIN])
    checks.check_task(config, task)
    chosen = auto_mesh.chosen(config, task)
    mesh = mesh_of(chosen.mesh)
    if chosen.why:
        say(chosen.why)
    trunk = load_source(config, task, mesh, say)
    processor = task.processor(trunk)
    training = task.prepare(processor, data[TRAIN], train=True)
    domains = {split: task.prepare(processor, data[split], train=True) for split in DOMAINS if split in data}
    if TARGET in domains:  # a language model's labels are its texts
        domains[TARGET] = domains[TARGET].without("labels")
    beside = (TRAIN, RETAIN, *DOMAINS)
    measured = {split: rows for split, rows in data.items() if split not in beside} or {TRAIN: data[TRAIN]}
    measured |= {RETAIN: data[RETAIN]} if RETAIN in data else {}
    examples = {split: task.prepare(processor, rows, train=False) for split, rows in measured.items()}
    checks.check_vocabulary({TRAIN: training, **examples, **domains}, trunk.model)
    all_examples = (training, *examples.values(), *domains.values())
    for note in dict.fromkeys(note for example in all_examples for note in example.notes):
        say(note)
    source = adapting.begun(config, trunk, task, config.run.seed)
    checks.check_shapes(config, chosen.mesh, source, training)
    checks.check_budgets(config, task, data[TRAIN])
    epoch = -(-len(training) // config.data.batch)
    steps = config.run.steps or epoch * (config.run.epochs or 0)
    terms = terms_of(config, task, trunk, source.model, source.params, steps)
    params = {**source.params, **terms.beside(config.run.seed)}
    sharding = () if mesh is None else sharding_rules(mesh, source.model, params)
    how = trained(config, task, source.model, params, steps, mesh, sharding, terms=terms)
    adapting.check_labels(config, source, adapting.puts(config, trunk, task, config.run.seed), how["labels"])
    if own := unread_rate(config, how["labels"], steps):
        say(f"nothing that trains reads optimizer.lr: {own}")
    part = config.pretraining()
    job = Job(
        config=config, trunk=trunk, task=task, processor=processor, data=data, training=training, examples=examples,
        domains=domains, terms=terms, model=source.model, **how, steps=steps, epoch=epoch, mesh=mesh, sharding=sharding,
        chosen=chosen.why, before=None if part is None else prepare(part, say),
    )  # fmt: skip
    return dataclasses.replace(job, phases=tuple(_phase(job, each, source) for each in config.phasing()))


def _phase(job: Job, config: Config, source: Source) -> Job:
    """One phase of a job: the same source, data and task; what trains, and how, is its own."""
    steps = config.run.steps or job.epoch * (config.run.epochs or 0)
    terms = terms_of(config, job.task, job.trunk, job.model, source.params, steps)
    params = {**source.params, **terms.beside(config.run.seed)}
    sharding = () if job.mesh is None else sharding_rules(job.mesh, job.model, params)
    where = {"mesh": job.mesh, "sharding": sharding, "terms": terms}
    how = trained(config, job.task, job.model, params, steps, **where)
    adapting.check_labels(config, source, (), how["labels"])
    return dataclasses.replace(job, config=config, **how, steps=steps, terms=terms, sharding=sharding, before=None)


def trained(
    config: Config,
    task: Task,
    model: Model,
    params: Params,
    steps: int,
    mesh: Mesh | None,
    sharding: Rules,
    *,
    terms: Terms | None = None,
    thaw: bool = False,
    traced: bool = False,
) -> dict[str, Any]:
    """What trains and how: ``labels``, ``groups``, ``tx``, ``step`` and ``evaluate``.

    With ``thaw`` what would be frozen trains too; with ``traced`` rates are state, see `optim.optimizer`. ``params``
    are of the model and of what trains beside it.
    """
    labels = labels_of(config, model, params, thaw=thaw)
    checks.check_tied(model, labels)
    how = optimizer_groups(config, labels, steps, control=thaw)
    if config.phases and not thaw:
        labels, parts = by_age(config, model, params, labels)
        how = {name: how[label] for name, label in parts.items()}
    decay = config.optimizer.layer_decay
    scales = None if decay is None else groups.layerwise_decay(model, params, decay)
    tx = optimizer(labels, how, clip=config.optimizer.clip, scales=scales, traced=traced)
    where = {
        "mesh": mesh, "sharding": sharding, "precision": jnp.dtype(config.run.precision),
        "attend": attention_of(config, model, params, mesh),
    }  # fmt: skip
    if config.objective.memory:
        tx = a_gem(tx)
    step = make_step(
        model, task.objective if terms is None else terms.objective, tx, **where, remat=config.run.remat,
        accumulate=config.run.accumulate, augment=task.augment, **({} if terms is None else terms.options),
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
    named = {name: getattr(data, name) for name in (TRAIN, "validation", "test", RETAIN, *DOMAINS)}
    return {split: spec for split, spec in named.items() if spec is not None}


def _columns(config: Config, split: str) -> tuple[str, ...]:
    """What is read of a split: of the target, and of what no loss is taken of, no labels."""
    columns = columns_of(config)
    if split == TARGET or (split == TRAIN and config.objective.task == 0):
        return columns[: max(1, len(columns) - 1)]
    return columns if split in (RETAIN, *DOMAINS) else (*columns, *config.data.subgroups)


def _labelled(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, target=None, replay=None)


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
