"""From a configuration to all that a run needs: source, data, labels, optimizer, step; checked before work starts."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxtransfer.adapt import groups, swap_head
from jaxtransfer.config import Config, ConfigError
from jaxtransfer.data.dataset import DataError, Dataset
from jaxtransfer.data.loader import Examples, Loader, batches
from jaxtransfer.data.sources import DataSpec, read
from jaxtransfer.data.text import tokenizer
from jaxtransfer.models import apply, family, init
from jaxtransfer.optim import Group, GroupError, Row, explain, optimizer
from jaxtransfer.parallel import fsdp, make_mesh, shardings
from jaxtransfer.source import SourceError, load
from jaxtransfer.step import Step, init_state, make_eval, make_step
from jaxtransfer.tasks import Task, text_classification
from jaxtransfer.tree.paths import Params, flatten
from jaxtransfer.tree.rules import Rules
from jaxtransfer.types import Model, Source, State

Say = Callable[[str], None]
GROUPS = ("head", "trunk")
TASKS = {"text-classification": text_classification}


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A configuration, ready to run: one compiled step serves every seed, transferred or from scratch.

    Attributes:
      trunk: the source as loaded, without a head.
      data, examples: by split: ``train``, ``validation``, ``test``.
      labels: what trains; ``groups``: how; ``tx``: the two together.
      steps: batches of a run; ``epoch``: batches of an epoch.
    """

    config: Config
    trunk: Source
    task: Task
    data: Mapping[str, Dataset]
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

    def adapted(self, seed: int, *, scratch: bool = False) -> Source:
        """The source under a fresh head, or the same architecture from scratch: what a run of this seed starts from."""
        key = jax.random.fold_in(jax.random.key(seed), 0)
        source = swap_head(self.trunk, self.task.head, key)
        if not scratch and self.config.source.init == "pretrained":
            return source
        lineage = dataclasses.replace(
            source.lineage, fingerprints={}, operations=(*source.lineage.operations, f"init(seed={seed}): from scratch")
        )
        return dataclasses.replace(source, params=init(source.model, key), lineage=lineage)

    def start(self, seed: int, *, scratch: bool = False) -> tuple[State, Params]:
        """The first state of a run of this seed, and what is frozen in it."""
        key = jax.random.fold_in(jax.random.key(seed), 1)
        params = self.adapted(seed, scratch=scratch).params
        return init_state(self.model, params, self.labels, self.tx, key, mesh=self.mesh, sharding=self.sharding)

    def loader(self, split: str, *, seed: int = 0, train: bool = False) -> Loader:
        """Batches of a split: shuffled without end to train on, or once in order."""
        return batches(
            self.examples[split], batch=self.config.data.batch, buckets=self.config.data.buckets, shuffle=train,
            seed=seed, epochs=None if train else 1, process_index=jax.process_index(),
            process_count=jax.process_count(),
        )  # fmt: skip

    def rows(self) -> list[Row]:
        """What trains and what it costs."""
        return explain(self.adapted(self.config.run.seed).params, self.labels, self.groups)

    def identity(self) -> dict[str, Any]:
        """What makes a run folder this run's: its configuration but for ``out``, its source, its data."""
        config = {key: value for key, value in _dotted(dataclasses.asdict(self.config)) if key != "out"}
        data = {f"data {split}": data.digest for split, data in self.data.items()}
        return {**config, "source": self.trunk.lineage.digest, **data}


def prepare(config: Config, say: Say) -> Job:
    """Everything that a run needs; every mistake in configuration, source and data comes to light here.

    Args:
      config: the configuration.
      say: is told what a user should know: alternatives taken, texts cut, rows dropped.

    Raises:
      ConfigError, DataError, SourceError, RuleError, GroupError, ...: see the rooms' own functions.
    """
    if config.study is not None and config.source.init == "scratch":
        raise ConfigError("study: compares with a start from scratch, which source.init already asks for", "study")
    columns = ("text", "label", *config.data.subgroups)
    data = {split: read(spec, columns) for split, spec in splits(config).items()}
    task = make_task(config, data["train"])
    mesh = make_mesh_of(config)
    trunk = load_source(config, mesh, say)
    tokens = tokenizer(trunk)
    examples = {split: task.prepare(tokens, rows) for split, rows in data.items()}
    check_vocabulary(examples, trunk.model)
    for example in examples.values():
        for note in example.notes:
            say(note)
    source = swap_head(trunk, task.head, jax.random.key(config.run.seed))
    check_shapes(config, source)
    epoch = -(-len(examples["train"]) // config.data.batch)
    steps = config.run.steps or epoch * (config.run.epochs or 0)
    labels = groups.labels_of(source.model, recipe(config, source.model), source.params)
    how = optimizer_groups(config, labels, steps)
    decay = config.optimizer.layer_decay
    scales = None if decay is None else groups.layerwise_decay(source.model, source.params, decay)
    tx = optimizer(labels, how, clip=config.optimizer.clip, scales=scales)
    sharding = () if mesh is None else sharding_rules(mesh, source.model, source.params)
    precision = jnp.dtype(config.run.precision)
    step = make_step(
        source.model, task.objective, tx, mesh=mesh, sharding=sharding, precision=precision, remat=config.run.remat,
        accumulate=config.run.accumulate,
    )  # fmt: skip
    return Job(
        config, trunk, task, data, examples, source.model, labels, how, tx, step,
        make_eval(source.model, mesh=mesh, sharding=sharding, precision=precision), steps, epoch, mesh, sharding,
    )  # fmt: skip


def splits(config: Config) -> dict[str, DataSpec]:
    """The splits that a configuration names."""
    named = {"train": config.data.train, "validation": config.data.validation, "test": config.data.test}
    return {split: spec for split, spec in named.items() if spec is not None}


def make_task(config: Config, train: Dataset | None) -> Task:
    """The task; without labels in the configuration, its classes are those of the training data."""
    labels = config.task.labels or (train.classes("label") if train is not None else ())
    if len(labels) < 2:
        path = config.data.train.path
        raise DataError(f"{path}: has the one label {', '.join(labels)}; a classifier needs two or more")
    return TASKS[config.task.kind](
        labels, max_length=config.task.max_length, label_smoothing=config.task.label_smoothing,
        pooling=config.task.pooling,
    )  # fmt: skip


def load_source(config: Config, mesh: Mesh | None, say: Say) -> Source:
    """The bare trunk from the first reference that is there, straight onto the mesh; what was taken instead is said."""
    refs = (config.source.ref, *config.source.alternatives)
    failures = []
    for ref in refs:
        revision = config.source.revision if ref == config.source.ref else None
        try:
            source = load(
                ref, head=None, dtype=config.source.dtype, revision=revision, ignore=config.source.ignore, mesh=mesh,
                sharding=() if mesh is None else partial(sharding_rules, mesh),
            )  # fmt: skip
        except (SourceError, OSError) as error:
            failures.append(error)
            continue
        for missed, failure in zip(refs, failures, strict=False):
            say(f"source {missed}: not taken, {ref} stands in for it ({failure})")
        return source
    raise failures[0]


def check_vocabulary(examples: Mapping[str, Examples], model: Model) -> None:
    """A token beyond the model's vocabulary would be read as another one."""
    size = model.config.vocab_size
    for split, rows in examples.items():
        top = max(int(ids.max()) for ids in rows.ragged["input_ids"])
        if top >= size:
            raise DataError(f"{split}: token {top} is beyond the vocabulary of {size}; another model's tokenizer?")


def check_shapes(config: Config, source: Source) -> None:
    """The longest text must fit the model's positions, and a batch divide into microbatches and over devices."""
    ids = jax.ShapeDtypeStruct((1, config.task.max_length), jnp.int32)
    try:
        jax.eval_shape(partial(apply, source.model), source.params, {"input_ids": ids, "attention_mask": ids})
    except ValueError as error:
        raise ConfigError(f"task.max_length: {error}", "task.max_length") from None
    parts = config.run.accumulate * config.mesh.data * config.mesh.fsdp
    if config.data.batch % parts:
        raise ConfigError(
            f"data.batch: {config.data.batch} rows do not divide by {parts}: run.accumulate {config.run.accumulate} x "
            f"mesh.data {config.mesh.data} x mesh.fsdp {config.mesh.fsdp}", "data.batch"
        )  # fmt: skip


def recipe(config: Config, model: Model) -> Rules:
    """Which rules say what trains."""
    adapt = config.adapt
    if adapt.train == "rules":
        return adapt.rules
    if adapt.train == "last":
        try:
            return groups.last(model, adapt.last or 0)
        except ValueError as error:
            raise ConfigError(f"adapt.last: {error}", "adapt.last") from None
    return groups.full(model) if adapt.train == "full" else groups.head_only(model)


def optimizer_groups(config: Config, labels: Any, steps: int) -> dict[str, Group]:
    """Label -> `Group`: the settings of all, and what a group has of its own.

    The recipes' labels need no entry in the configuration; any other does, or a slip such as ``frozn`` would train.
    """
    used = set(flatten(labels).values())
    if used <= {groups.FROZEN, groups.STATS}:
        raise GroupError("adapt: nothing trains, every parameter is frozen")
    out = {}
    for label in sorted({*config.optimizer.groups, *(used & set(GROUPS))}):
        given = dataclasses.asdict(config.optimizer.group(label)).items()
        own = {name: value for name, value in given if value is not None}
        warmup = int(own.pop("warmup") * steps)
        out[label] = Group(own.pop("name"), warmup=warmup, steps=steps, **own)
    return out


def make_mesh_of(config: Config) -> Mesh | None:
    """The mesh over the first devices; None for one device."""
    shape = dataclasses.asdict(config.mesh)
    count = shape["data"] * shape["fsdp"] * shape["tensor"]
    if count == 1:
        return None
    if count > jax.device_count():
        raise ConfigError(f"mesh: {shape} needs {count} devices, there are {jax.device_count()}", "mesh")
    return make_mesh(**shape, devices=jax.devices()[:count])


def sharding_rules(mesh: Mesh, model: Model, params: Params) -> Rules:
    """How parameters, concrete or abstract, are placed: the family's rules for ``tensor``, the generic for ``fsdp``.

    Raises:
      ShardingError: a leaf that does not divide.
    """
    tensor = family(model.family).tensor_rules if mesh.shape["tensor"] > 1 else ()
    rules = (*tensor, *fsdp(params, mesh))
    shardings(params, mesh, rules)
    return rules


def _dotted(record: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as pairs of dotted key and value."""
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
