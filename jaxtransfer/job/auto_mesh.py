"""The mesh of ``mesh: auto``: by the number of devices, and by what one of them can hold."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxtransfer.adapt import groups
from jaxtransfer.config import Config, MeshConfig
from jaxtransfer.job import abstract
from jaxtransfer.job.meshes import abstract_mesh, divisible, lies
from jaxtransfer.job.optimization import optimizer_groups, recipe, thawed
from jaxtransfer.job.sources import sharding_rules
from jaxtransfer.models.api import abstract_init
from jaxtransfer.optim import optimizer
from jaxtransfer.parallel import spelled
from jaxtransfer.parallel.distributed import by_first
from jaxtransfer.plan import Topology
from jaxtransfer.plan.held import placed_state, shard_bytes
from jaxtransfer.tasks import Task
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import Model, Source

GIB = 2**30
_SHARE = 0.5
"""Of a device's memory, for what it holds from step to step and its gradients; the rest is for activations."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mesh, and in words why it is this one; nothing where the configuration says which."""

    mesh: MeshConfig
    why: str = ""


def chosen(config: Config, task: Task) -> Choice:
    """The mesh of a run on the devices that are here: the configuration's, or for ``auto`` one that fits.

    Raises:
      ConfigError: several processes, over all of whose devices a batch does not divide.
      SourceError, HubError, ConfigFieldError: the architecture cannot be read.
    """
    if isinstance(config.mesh, MeshConfig):
        return Choice(config.mesh)
    devices = jax.devices()
    trunk = abstract.architecture(config, task, lambda text: None)
    source = abstract.adapted(config, trunk, task)
    whole, memory = jax.process_count() > 1, _memory(devices)
    found = by_first(
        "mesh", lambda: dataclasses.asdict(fitting(config, source, len(devices), devices, memory, whole=whole))
    )
    return Choice(MeshConfig(**found["mesh"]), found["why"])


def on_slice(config: Config, source: Source, where: Topology, devices: Sequence[Any] | None) -> Choice:
    """The mesh of a run on a slice that need not be here: all of its devices.

    Raises:
      ConfigError: a batch does not divide over them.
    """
    if isinstance(config.mesh, MeshConfig):
        return Choice(config.mesh)
    return fitting(config, source, where.count, devices, where.chip.hbm, whole=True)


def _memory(devices: Sequence[Any]) -> float:
    """Bytes that one device can hold; of the host's, an equal share of each where it is their memory."""
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()


def fitting(
    config: Config, source: Source, count: int, devices: Sequence[Any] | None, memory: float, *, whole: bool
) -> Choice:
    """The mesh that `choose` takes for a run, for its phases and, where there is a study, for its control from scratch.

    Args:
      config: the configuration.
      source: adapted, with abstract parameters.
      count: of devices.
      devices: here or of a slice; None where there is no compiler for them.
      memory: bytes of one of them.
      whole: whether all of them must be in the mesh.
    """
    held = [_holding(each, source.model, source.params) for each in (config, *config.phasing())]
    if config.study is not None:
        held.append(_holding(config, source.model, abstract_init(source.model), thaw=True))
    shapes = divisible(count, config.data.batch, config.run.accumulate, whole=whole)
    if devices is not None:
        shapes = [shape for shape in shapes if lies(dataclasses.asdict(shape), devices[: shape.size])] or shapes
    return choose(shapes, lambda shape: max(bytes_of(shape) for bytes_of in held), memory, count)


def choose(shapes: Sequence[MeshConfig], held: Callable[[MeshConfig], float], memory: float, devices: int) -> Choice:
    """The first mesh on which a device holds at most half of its memory, else the last one.

    Args:
      shapes: from copies to all split, see `divisible`.
      held: bytes that one device of a mesh holds: frozen and trained parameters, optimizer, gradients.
      memory: bytes of a device.
      devices: how many there are.

    Example:
      >>> shapes = [MeshConfig(data=4), MeshConfig(data=2, fsdp=2), MeshConfig(fsdp=4)]
      >>> choose(shapes, lambda shape: 12 * 2**30 / shape.fsdp, 16 * 2**30, 4).mesh
      MeshConfig(data=2, fsdp=2, tensor=1, sequence=1)
    """
    mesh = next((shape for shape in shapes if held(shape) <= _SHARE * memory), shapes[-1])
    here, alone = held(mesh), held(shapes[0])
    told = f"of {memory / GIB:.2f} GiB a device holds {here / GIB:.2f}"
    if mesh.fsdp > 1:
        told += f" of parameters, optimizer and gradients, where whole copies were {alone / GIB:.2f}"
    else:
        told += " of parameters, optimizer and gradients, all of them"
    if here > _SHARE * memory:
        told += "; little is left for activations: quantise or train less (adapt), or take more devices"
    if left := devices - mesh.size:
        told += f"; {left} of {devices} devices are left out, as data.batch does not divide over more"
    return Choice(mesh, f"mesh: auto took {spelled(dataclasses.asdict(mesh))}: {told}")


def _holding(config: Config, model: Model, params: Params, *, thaw: bool = False) -> Callable[[MeshConfig], float]:
    """Mesh -> bytes that a device of it holds of a run."""
    rules = recipe(config, model)
    labels = groups.labels_of(model, thawed(rules) if thaw else rules, params)
    copies = 1  # of what trains: its gradient, that of the memory, the source's values
    if not thaw:
        copies += (config.objective.memory is not None) + bool(config.objective.anchored)
    tx = optimizer(labels, optimizer_groups(config, labels, 1, control=thaw))

    def held(shape: MeshConfig) -> float:
        mesh: Any = abstract_mesh(dataclasses.asdict(shape))
        state, frozen = placed_state(model, params, labels, tx, mesh=mesh, sharding=sharding_rules(mesh, model, params))
        return sum(map(shard_bytes, jax.tree.leaves((state, frozen, *[state.params] * copies))))

    return held
