"""Slices by name, ``v5e:4x4`` or ``h200:8``: how many devices of which kind, and what such a device can do."""

import dataclasses
import difflib
import importlib.metadata
import importlib.util
import math
import re
from os import environ
from typing import Any

import jax

GIB = 2**30


class TopologyError(ValueError):
    """A slice that does not exist, or one that nothing here can compile for."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do, by its maker's data sheet; a tpu7x has two devices a chip.

    Attributes:
      name: ``"v5e"``.
      hbm: bytes that a program may use (of TPUs as their compiler says, less than is on the chip).
      flops: dense bfloat16 operations a second.
      bandwidth: bytes a second between the device and its HBM.
      links: bytes a second that the device can send to others of its slice, over all its links together.
      tpu: whether libtpu compiles for it; of others there is arithmetic alone.
      cores: devices of each chip.
    """

    name: str
    hbm: float
    flops: float
    bandwidth: float
    links: float
    tpu: bool = True
    cores: int = 1


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 15.75 * GIB, 197e12, 819e9, 200e9),
        Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 600e9),
        Chip("v6e", 31.25 * GIB, 918e12, 1640e9, 400e9),
        Chip("tpu7x", 94.75 * GIB, 1153.5e12, 3690e9, 300e9, cores=2),
        Chip("a100", 79 * GIB, 312e12, 2039e9, 300e9, tpu=False),
        Chip("h100", 79 * GIB, 989e12, 3350e9, 450e9, tpu=False),
        Chip("h200", 140 * GIB, 989e12, 4800e9, 450e9, tpu=False),
        Chip("b200", 179 * GIB, 2250e12, 8000e9, 900e9, tpu=False),
    )
}
"""Devices by name."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice.

    Attributes:
      name: as it was asked for.
      chip: its devices' kind.
      shape: chips along each axis of the torus; of GPUs their number.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of devices."""
        return math.prod(self.shape) * self.chip.cores


def topology(name: str) -> Topology:
    """The slice of a name.

    Raises:
      TopologyError: there is none of that name; the nearest is named.

    Example:
      >>> topology("v5p:4x4x8").count, topology("tpu7x:2x2x1").count, topology("h200:8").count
      (128, 8, 8)
      >>> topology("v6:4x4")
      Traceback (most recent call last):
      jaxtransfer.plan.chips.TopologyError: topology 'v6:4x4': no chip is called 'v6'; did you mean v6e? known: ...
    """
    kind, _, shape = name.partition(":")
    if (chip := CHIPS.get(kind)) is None:
        near = difflib.get_close_matches(kind, CHIPS, 1, 0.0)[0]
        raise TopologyError(
            f"topology {name!r}: no chip is called {kind!r}; did you mean {near}? known: {', '.join(CHIPS)}"
        )
    axes = {"v5p": 3, "tpu7x": 3}.get(kind, 2) if chip.tpu else 1
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), shape):
        example = {1: "8", 2: "4x4", 3: "2x2x4"}[axes]
        raise TopologyError(
            f"topology {name!r}: {kind} is followed by {'its number' if axes == 1 else f'{axes} axes of chips'}, as in "
            f"{kind}:{example}"
        )
    return Topology(name, chip, tuple(map(int, shape.split("x"))))


def devices(where: Topology) -> list[Any]:
    """The devices of a slice, which need not be here, for their compiler.

    Raises:
      TopologyError: it is no slice of TPUs, libtpu is not installed or not the one of this jaxlib, or it knows no slice
        of that shape.
    """
    if not where.chip.tpu:
        raise TopologyError(f"topology {where.name!r}: no compiler for {where.chip.name} is at hand")
    check_libtpu()
    # Else a program that compiles for a slice asks the network which slice it runs on.
    environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is taken that others could want
    environ.setdefault("TPU_ACCELERATOR_TYPE", f"{where.chip.name}-{math.prod(where.shape)}")
    from jax.experimental import topologies

    try:
        found = list(topologies.get_topology_desc(platform="tpu", topology_name=where.name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(f"topology {where.name!r}: libtpu has no such slice: {first_line(error)}") from None
    if len(found) != where.count:
        raise TopologyError(f"topology {where.name!r}: expected {where.count} devices, libtpu knows {len(found)}")
    return found


def check_libtpu() -> None:
    """Raises :class:`TopologyError` where libtpu is missing, or is not the one that this jax was released with."""
    advice = "pip install 'jaxtransfer[plan]'"
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(f"compiling for TPUs needs libtpu, which is not installed: {advice}")
    jaxlib, have = importlib.metadata.version("jaxlib"), importlib.metadata.version("libtpu")
    pattern = r"libtpu\s*==\s*([\d.]+?)\.\*"
    named = [found[1] for line in importlib.metadata.requires("jax") or () if (found := re.match(pattern, line))]
    if named and not f"{have}.".startswith(f"{named[0]}."):
        raise TopologyError(
            f"libtpu {have} is not the one of jaxlib {jaxlib}, which was released with {named[0]}; another fails on "
            f"large slices: {advice}"
        )


def first_line(error: BaseException) -> str:
    """What an error of XLA says, without the status code before it and the traces behind it."""
    return str(error).strip().split("\n")[0].partition(": ")[2] or str(error)
