"""Several processes as one: how they meet, which part of the data each has, and what is put where."""

import threading
from collections.abc import Callable
from os import environ
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.parallel.agreement import ProcessError as ProcessError
from jaxtransfer.parallel.agreement import by_first as by_first
from jaxtransfer.parallel.agreement import gathered as gathered
from jaxtransfer.parallel.agreement import is_first as is_first
from jaxtransfer.parallel.agreement import together as together
from jaxtransfer.parallel.mesh import BATCH_AXES

COORDINATOR, COUNT, INDEX = VARIABLES = ("JAXTRANSFER_COORDINATOR", "JAXTRANSFER_PROCESSES", "JAXTRANSFER_PROCESS")
"""The environment variables that say whom to join: host and port of process 0, how many they are, which this is."""

HEARTBEAT = 30
"""Seconds after which a process that is silent is dead, and jax ends the others."""

_COMPILE = 3600.0  # seconds that processes wait for the slowest to compile
_LEAVE = 20  # seconds that a process which is done, or has failed, waits for the others to leave


def join(*, timeout: float = 300, give_up: Callable[[str], None] | None = None) -> None:
    """Joins the processes that compute together; to be called before anything else of jax.

    By the environment variables of :data:`VARIABLES` where they are set, else as jax finds out on Cloud TPU, Slurm, GKE
    and Open MPI. Does nothing where they have met already.

    Args:
      timeout: seconds to wait for all to come.
      give_up: called with the error, from another thread, when they have not; it must end this process, or jax will,
        by an abort that no one can catch.

    Raises:
      ProcessError: some of the variables are set and not all, or there is nothing to join.
    """
    if jax.distributed.is_initialized():
        return
    where = _named()
    told = f"process {where[2]} of {where[1]}" if where else "this process"
    late = (
        f"{told}: not all processes came to {where[0] if where else 'the coordinator'} within {timeout:g} s; see that "
        "every one was started, and that this address can be reached from its host"
    )
    timer = threading.Timer(timeout, give_up or (lambda text: None), [late])
    timer.daemon = True
    timer.start()
    options: dict[str, Any] = {"initialization_timeout": int(timeout) + 30, "heartbeat_timeout_seconds": HEARTBEAT}
    if where:
        address, count, index = where
        options |= {"coordinator_address": address, "num_processes": count, "process_id": index}
        options |= {"cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(shutdown_timeout_seconds=_LEAVE, **options)
    except (ValueError, RuntimeError) as error:
        raise ProcessError(
            f"{told}: cannot join the others ({error}); run under Cloud TPU, Slurm, GKE or Open MPI, or set "
            f"{', '.join(VARIABLES)}, or start all on this machine with --processes"
        ) from None
    finally:
        timer.cancel()


def _named() -> tuple[str, int, int] | None:
    """Coordinator, count and index by the environment; None where it names none of them."""
    found = [environ.get(name) for name in VARIABLES]
    if not any(found):
        return None
    if None in found:
        raise ProcessError(f"{VARIABLES[found.index(None)]}: is not set, but others of {', '.join(VARIABLES)} are")
    address, count, index = map(str, found)
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count) and ":" in address):
        raise ProcessError(
            f"{COORDINATOR}={address} {COUNT}={count} {INDEX}={index}: must be HOST:PORT, a number, and one below it"
        )
    return address, int(count), int(index)


def share(mesh: Mesh | None) -> tuple[int, int]:
    """Which part of the rows of a batch this process gives to its devices: index, and the number of parts.

    Processes whose devices hold the same rows, being parts of one another's tensors, have the same part.

    Raises:
      ProcessError: its devices hold rows of several parts, or there are several processes and no mesh over them.

    Example:
      >>> share(None)
      (0, 1)
    """
    if mesh is None:
        if jax.process_count() > 1:
            raise ProcessError(
                f"a mesh is needed over the {jax.device_count()} devices of {jax.process_count()} processes"
            )
        return 0, 1
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.shape], dtype=int))
    where = NamedSharding(mesh, P(tuple(axis for axis in BATCH_AXES if axis in mesh.shape)))
    rows: dict[int, set[int]] = {index: set() for index in range(jax.process_count())}
    for device, (part,) in where.devices_indices_map((parts,)).items():
        rows[device.process_index].add(part.indices(parts)[0])
    mine = sorted(rows[jax.process_index()])
    if not mine:
        raise ProcessError(f"process {jax.process_index()} has no device in the mesh {dict(mesh.shape)}")
    block, index = len(mine), mine[0] // len(mine)
    whole = all(not held or held == set(mine) or not held & set(mine) for held in rows.values())
    if not whole or mine != list(range(index * block, (index + 1) * block)) or parts % block:
        raise ProcessError(
            f"the mesh {dict(mesh.shape)} gives process {jax.process_index()} the parts {mine} of {parts} of a batch; "
            "let the axes data and fsdp be multiples of the number of processes, or divide it"
        )
    return index, parts // block


def in_step(what: str, function: Any) -> Any:
    """A jitted function that no process runs before all have compiled it, for arguments of each kind.

    The first to run a collective operation waits for the others, on CPUs for 30 seconds; compiling can take longer.
    """
    if jax.process_count() == 1:
        return function
    compiled: dict[Any, Any] = {}

    def call(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        kind = structure, *((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
        if kind not in compiled:
            with together(f"compile {what}", timeout=_COMPILE):
                compiled[kind] = function.lower(*arguments).compile()
        return compiled[kind](*arguments)

    return call


def put(tree: Any, where: Any) -> Any:
    """`jax.device_put`, also where devices of other processes are among ``where``.

    What every process has made for itself is then taken to be the same on all, which `jax.device_put` would make sure
    of by sending all of it around; and typed keys, which it refuses there, are put as their data.

    Args:
      tree: arrays of this process, or spread over all of them.
      where: a sharding, or a tree of them.
    """
    return (
        jax.device_put(tree, where) if jax.process_count() == 1 else jax.tree.map(_put, tree, _broadcast(where, tree))
    )


def _broadcast(where: Any, tree: Any) -> Any:
    return jax.tree.map(lambda _: where, tree) if isinstance(where, Sharding) else where


def _put(leaf: Any, where: Sharding) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), where), impl=jax.random.key_impl(leaf))
    if where.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, where)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def collected(tree: Any) -> Any:
    """For several processes: the leaves in process 0's memory, one at a time; on the others shapes and dtypes alone.

    A leaf that is spread over processes is put together on every device for a moment, so it must fit one.
    """
    return tree if jax.process_count() == 1 else jax.tree.map(_collected, tree)


def _collected(leaf: Any) -> Any:
    from jax.experimental import multihost_utils

    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        whole = multihost_utils.process_allgather(leaf, tiled=True)
    else:
        whole = leaf
    return np.asarray(whole) if is_first() else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
