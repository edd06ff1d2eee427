"""Meshes of four axes.

* ``data``: copies, each with rows of its own;
* ``fsdp``: rows as well, and parameters split between uses of them;
* ``sequence``: the tokens of a row split; a layer gathers keys and values;
* ``tensor``: layers split, by heads and by features. Its devices are the nearest neighbours, as they talk most.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")
"""The axes over which the rows of a batch are split."""
SEQUENCE = "sequence"
"""The axis over which the tokens of a row are split."""


class ShardingError(ValueError):
    """A mesh or a spec that does not fit the devices, the model or a leaf; the message names which."""


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp``, ``sequence``, ``tensor``, all automatic: XLA propagates shardings.

    Raises:
      ShardingError: an axis is not positive, or the axes' product is not the number of devices.

    Example:
      >>> make_mesh(devices=jax.devices()[:1]).axis_names
      ('data', 'fsdp', 'sequence', 'tensor')
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = (data, fsdp, sequence, tensor)
    count = data * fsdp * sequence * tensor
    if min(shape) < 1 or count != len(devices):
        told = spelled(dict(zip(AXES, shape, strict=True)))
        raise ShardingError(f"mesh {told} needs {count} devices, there are {len(devices)}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spelled(shape: Mapping[str, int]) -> str:
    """The axes of a mesh in words, those of one device left out.

    Example:
      >>> spelled({"data": 2, "fsdp": 4, "tensor": 1}), spelled({"data": 1})
      ('data 2 x fsdp 4', 'of one device')
    """
    return " x ".join(f"{axis} {size}" for axis, size in shape.items() if size != 1) or "of one device"


def check_automatic(mesh: Any) -> None:
    """Raises :class:`ShardingError` for a mesh with an axis along which XLA may not propagate shardings."""
    odd = [
        (axis, kind.name) for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind.name != "Auto"
    ]
    if odd:
        raise ShardingError(
            f"the mesh's axis {odd[0][0]!r} is {odd[0][1]}, and rules shard along automatic ones: make it by "
            "make_mesh, or by jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * n)"
        )


def parts(mesh: Any, *axes: str) -> int:
    """Into how many parts a dimension is cut along axes of a mesh; those that it has not count as 1."""
    count = 1
    for axis in axes:
        count *= mesh.shape.get(axis, 1)
    return count
