"""Meshes of a configuration's axes: over devices, over those of a slice, or of none; and what must divide over them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxtransfer.config import Config, ConfigError, MeshConfig
from jaxtransfer.models.attention import Attend
from jaxtransfer.parallel import make_mesh, spelled, splash
from jaxtransfer.parallel.families import has_attention
from jaxtransfer.parallel.mesh import AXES
from jaxtransfer.plan import Topology
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import Model


def mesh_of(shape: MeshConfig) -> Mesh | None:
    """The mesh over the first devices; None for one device.

    Raises:
      ConfigError: it needs more devices than there are, or is not all of several processes'.
    """
    axes, count = dataclasses.asdict(shape), shape.size
    if jax.process_count() > 1 and count != jax.device_count():
        raise ConfigError(
            f"mesh: {spelled(axes)} is of {count} devices, but the {jax.process_count()} processes have "
            f"{jax.device_count()}; make it as large", "mesh",
        )  # fmt: skip
    if count == 1:
        return None
    if count > jax.device_count():
        raise ConfigError(f"mesh: {spelled(axes)} needs {count} devices, there are {jax.device_count()}", "mesh")
    return make_mesh(**axes, devices=jax.devices()[:count])


def make_mesh_of(config: Config) -> Mesh | None:
    """The mesh where nothing trains and several sources share it: for ``auto`` copies, on as many devices as can be.

    Raises:
      ConfigError: as `mesh_of` and `divisible`.
    """
    if isinstance(config.mesh, MeshConfig):
        return mesh_of(config.mesh)
    return mesh_of(divisible(jax.device_count(), config.data.batch, 1, whole=jax.process_count() > 1)[0])


def divisible(count: int, rows: int, accumulate: int, *, whole: bool) -> list[MeshConfig]:
    """Meshes of data and fsdp that a batch divides over, of as many devices as it does; the shortest fsdp first.

    Raises:
      ConfigError: it must be all devices, and over these it does not.

    Example:
      >>> [(mesh.data, mesh.fsdp) for mesh in divisible(6, 16, 2, whole=False)]
      [(4, 1), (2, 2), (1, 4)]
    """
    used = max((n for n in range(1, count + 1) if rows % (n * accumulate) == 0), default=1)
    if whole and used != count:
        raise ConfigError(
            f"data.batch: {rows} rows in {accumulate} microbatches do not divide over {count} devices, all of which "
            f"mesh: auto must take here; take a multiple of {count * accumulate}", "data.batch",
        )  # fmt: skip
    return [MeshConfig(data=used // n, fsdp=n) for n in range(1, used + 1) if used % n == 0]


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
    check_rows(shape, rows, accumulate)


def check_rows(shape: Mapping[str, int], rows: int, accumulate: int) -> None:
    """Raises :class:`ConfigError` where a batch does not divide into microbatches and over a mesh."""
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


def lies(shape: Mapping[str, int], devices: Any) -> bool:
    """Whether a mesh lies along the axes of the slice that its devices are."""
    try:
        device_mesh(shape, devices)
    except ConfigError:
        return False
    return True


def attention_of(config: Config, model: Model, params: Params, mesh: Mesh | None) -> Attend | None:
    """What attention is left to.

    Raises:
      ConfigError: a kernel that the devices have not, or a model without attention of ours.
    """
    if config.run.attention == "xla":
        return None
    kind = (jax.devices() if mesh is None else mesh.devices.flat)[0].platform
    if kind != "tpu":
        raise ConfigError(
            f"run.attention: splash is a kernel of TPUs, and these devices are {kind}s; take xla", "run.attention"
        )
    if model.family == "foreign" or not has_attention(params):
        raise ConfigError(
            f"run.attention: splash has nothing to do for a {model.family} model, which has no attention of this "
            "library; take xla",
            "run.attention",
        )
    return splash(mesh)
