"""From a configuration to the abstract step of its run: the architecture is read, no weights and no data are."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxtransfer.adapt import quantized
from jaxtransfer.config import Config, ConfigError
from jaxtransfer.job import adapting
from jaxtransfer.job.prepare import trained
from jaxtransfer.job.shapes import Shapes, batch_of
from jaxtransfer.job.sources import check_head, sharding_rules
from jaxtransfer.job.tasks import make_task
from jaxtransfer.models.api import abstract_init, apply, layout_of
from jaxtransfer.parallel import make_mesh, spelled
from jaxtransfer.parallel.mesh import AXES
from jaxtransfer.plan import Blueprint, Topology, blueprint
from jaxtransfer.source.load import checkpoint_head, described, read_config
from jaxtransfer.source.resolve import HubError, SourceError, resolve
from jaxtransfer.tasks import Task
from jaxtransfer.tree.paths import flatten, unflatten
from jaxtransfer.tree.stacks import stack
from jaxtransfer.types import Head, Lineage, Source


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """A run's model, adapted, and its batches, as shapes; steps for any mesh are made of it.

    Attributes:
      source: with abstract parameters, adapters and quantised weights among them.
      batch: of the longest bucket, over all devices.
    """

    config: Config
    task: Task
    source: Source
    batch: Shapes

    def on(self, mesh: Any, **run: Any) -> Blueprint:
        """The step on a mesh, of devices or abstract, with fields of ``run`` set otherwise."""
        config = dataclasses.replace(self.config, run=dataclasses.replace(self.config.run, **run))
        model, params = self.source.model, self.source.params
        rules = sharding_rules(mesh, model, params)
        how = trained(config, self.task, model, params, config.run.steps or 1000, mesh, rules)
        return blueprint(model, params, how["labels"], how["tx"], how["step"], self.batch, mesh=mesh, sharding=rules)


def draft(config: Config, say: Any) -> Draft:
    """The model and the batches of a configuration, without weights and without data.

    Where the data name the classes, two stand for them: they change nothing of size.

    Raises:
      SourceError, HubError, ConfigFieldError: the architecture cannot be read; ConfigError: the task or its adapters do
        not fit it.
    """
    if not config.objective.plain:
        raise ConfigError(
            "objective: a plan counts the task's loss alone; leave terms, mixout and memory out", "objective"
        )
    labels = getattr(config.task, "labels", ()) or ("0", "1")
    task = make_task(config, None, labels)
    trunk = architecture(config, task, say)
    source = _adapted(config, trunk, task)
    batch = batch_of(config, task, trunk)
    laid = stack(source.params, layout_of(source.model, source.params))
    try:
        jax.eval_shape(functools.partial(apply, source.model), laid, batch)
    except ValueError as error:
        raise ConfigError(f"task: {error}", "task") from None
    return Draft(config, task, source, batch)


def architecture(config: Config, task: Task, say: Any) -> Source:
    """The source as `load` would give it, quantised where the configuration asks for it, with abstract parameters.

    Their dtype is the configuration's, else the one that the model's own says it is stored in.
    """
    source, failures = config.source, []
    for ref in (source.ref, *source.alternatives):
        own = ref == source.ref
        given = source.config if own else None
        try:
            found = resolve(ref, source.revision if own else None, weights=False, config=given)
        except (SourceError, HubError, OSError) as error:
            failures.append(error)
            continue
        for missed in (source.ref, *source.alternatives)[: len(failures)]:
            say(f"source {missed}: is not there, the architecture of {ref} stands in for it")
        raw, kind = read_config(found, given)
        head: Head | None = None if task.fresh_head else task.head
        if not task.fresh_head and source.init == "pretrained" and config.pretrain is None:
            head = checkpoint_head(kind, raw, found.ref)
        model = kind.build(raw, head, ignore=source.ignore)
        dtype = jnp.dtype(source.dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32")
        params = _packed(config, jax.tree.map(functools.partial(_cast, dtype), abstract_init(model)))
        made = described(Source(model, {}, Lineage(found.ref, "", operations=("abstract",))), found, raw)
        trunk = dataclasses.replace(made, params=params)
        check_head(trunk, task)
        return trunk
    raise failures[0]


def _cast(dtype: Any, leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)


def _packed(config: Config, params: Any) -> Any:
    flat = flatten(params)
    try:
        methods = quantized.methods_of(config.adapt.quantize, flat) if config.adapt.quantize else {}
    except ValueError as error:
        raise adapting.quantize_error(error) from None
    return unflatten({**flat, **{path: quantized.abstract(path, flat[path], how) for path, how in methods.items()}})


def _adapted(config: Config, trunk: Source, task: Task) -> Source:
    """The source under its head, with its adapters: what `adapting.begun` makes of it, as shapes."""
    made: list[Source] = []

    def begin(params: Any) -> Any:
        made.append(adapting.begun(config, dataclasses.replace(trunk, params=params), task, config.run.seed))
        return made[0].params

    params = jax.eval_shape(begin, trunk.params)
    return dataclasses.replace(made[0], params=params)


def abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices, for arithmetic."""
    sizes = tuple(shape.get(axis, 1) for axis in AXES)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(shape: Mapping[str, int], where: Topology, rows: int, accumulate: int) -> None:
    """Raises :class:`ConfigError` where the mesh is not all of the slice, or a batch does not divide over it."""
    count = int(np.prod(list(shape.values())))
    if count != where.count:
        raise ConfigError(
            f"mesh: {spelled(shape)} is {count} devices, {where.name} has {where.count}; plan --search finds a mesh",
            "mesh",
        )
    parts = shape["data"] * shape["fsdp"] * accumulate
    if rows % parts:
        raise ConfigError(
            f"data.batch: {rows} rows do not divide by {parts}: run.accumulate {accumulate} x mesh.data "
            f"{shape['data']} x mesh.fsdp {shape['fsdp']}", "data.batch",
        )  # fmt: skip


def device_mesh(shape: Mapping[str, int], devices: Any) -> Mesh:
    """A mesh of devices.

    Raises:
      ConfigError: its axes are no axes of the slice, nor products of them.
    """
    try:
        return make_mesh(**shape, devices=devices)
    except NotImplementedError:
        raise ConfigError(
            f"mesh: {spelled(shape)} does not lie along the axes of the slice: each must be a product of some of them; "
            "plan --search finds such a mesh", "mesh",
        ) from None  # fmt: skip
