"""Meshes of three axes: ``data`` (copies), ``fsdp`` (parameters split, gathered for use), ``tensor`` (layers split)."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""The axes over which the rows of a batch are split."""


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp``, ``tensor``, each of automatic type (XLA propagates shardings).

    Raises:
      ValueError: an axis is not positive, or the axes' product is not the number of devices.

    Example:
      >>> make_mesh(devices=jax.devices()[:1]).axis_names
      ('data', 'fsdp', 'tensor')
    """
    devices = list(jax.devices() if devices is None else devices)
    if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != len(devices):
        raise ValueError(
            f"mesh data {data} x fsdp {fsdp} x tensor {tensor} needs {data * fsdp * tensor} devices, there are "
            f"{len(devices)}"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
