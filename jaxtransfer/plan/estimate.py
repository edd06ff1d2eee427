"""A plan by arithmetic: what a step holds and sends, from its jaxpr and its mesh, where nothing is compiled."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from jaxtransfer.plan.flops import count, inner
from jaxtransfer.plan.held import Blueprint, shard_bytes

_MATERIALIZED = {
    "dot_general", "conv_general_dilated", "scan", "while", "cond", "jit", "pjit", "remat2", "checkpoint", "gather",
    "scatter", "scatter-add", "concatenate", "dynamic_update_slice", "reduce_sum", "reduce_max", "cumsum", "sort",
    "closed_call", "custom_vjp_call", "custom_jvp_call", "random_bits",
}  # fmt: skip
"""What makes an array of its own; all else is taken to be fused into what reads it."""

Size = Callable[[Any], float]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device: its temporaries, what moves to and from its HBM, what it sends, in bytes; its operations."""

    temporaries: float
    traffic: float
    sent: float
    flops: float


def trace(plan: Blueprint) -> Any:
    """The jaxpr of a step, over all devices, without what nothing reads."""
    jaxpr = jax.make_jaxpr(plan.step)(plan.state, plan.frozen, plan.batch).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def estimate(jaxpr: Any, plan: Blueprint, *, activations: float, layers: int, accumulate: int) -> Estimate:
    """What a traced step takes on one device of a mesh.

    Args:
      jaxpr: from `trace`, of this step on any mesh.
      plan: the step on the mesh in question.
      activations: bytes of the features between two layers, over all devices.
      layers: their number, each of which a mesh's ``tensor`` axis joins twice a pass.
      accumulate: microbatches.
    """
    shape = plan.mesh.shape
    rows, devices = shape["data"] * shape["fsdp"], math.prod(shape.values())
    temporaries = peak(jaxpr, _sizes(plan))
    gathered, gradients = _gathered(plan), plan.gradients
    fsdp, data, tensor = ((shape[axis] - 1) / shape[axis] for axis in ("fsdp", "data", "tensor"))
    sent = accumulate * (2 * gathered + gradients * shape["fsdp"]) * fsdp if shape["fsdp"] > 1 else 0.0
    sent += 2 * gradients * data + 6 * 2 * layers * activations / rows * tensor
    held = sum(plan.bytes().values())
    moved = 2 * held + 3 * accumulate * gathered + 2 * temporaries
    return Estimate(temporaries, moved, sent, count(jaxpr) / devices)


def peak(jaxpr: Any, size: Size) -> float:
    """The most bytes of results that are there at once while a program runs, its arguments aside.

    Element-wise operations are taken to be fused: what they read stays until what they give has been read.
    """
    source: dict[Any, set[Any]] = {}
    last: dict[Any, int] = {}
    for index, equation in enumerate(jaxpr.eqns):
        read = set().union(*(source.get(v, set()) for v in equation.invars if not isinstance(v, Literal)), set())
        last |= dict.fromkeys(read, index)
        own = equation.primitive.name in _MATERIALIZED
        for out in equation.outvars:
            source[out] = {out} if own else read
            last |= {out: index} if own else {}
    for out in jaxpr.outvars:
        for root in source.get(out, set()) if not isinstance(out, Literal) else ():
            last[root] = len(jaxpr.eqns)
    ends: dict[int, list[Any]] = {}
    for root, index in last.items():
        ends.setdefault(index, []).append(root)
    now = most = 0.0
    for index, equation in enumerate(jaxpr.eqns):
        now += sum(size(out) for out in equation.outvars if out in last and source[out] == {out})
        most = max(most, now + max((peak(j, size) for j in inner(equation.params)), default=0.0))
        now -= sum(size(root) for root in ends.get(index, ()))
    return most


def _sizes(plan: Blueprint) -> Size:
    """Bytes on one device: what is shaped as a parameter is split as it is, all else by rows."""
    shape = plan.mesh.shape
    rows = shape["data"] * shape["fsdp"]
    split: dict[tuple[int, ...], float] = {}
    for leaf in jax.tree.leaves((plan.state.params, plan.frozen)):
        whole = math.prod(leaf.shape) * leaf.dtype.itemsize
        if len(leaf.shape) > 1:
            split[leaf.shape] = shard_bytes(leaf) / whole
            split.setdefault(leaf.shape[1:], 1 / shape["tensor"])  # one layer of a stack, whole for its use

    def size(variable: Any) -> float:
        aval = variable.aval
        if not hasattr(aval, "shape") or not hasattr(aval.dtype, "itemsize"):
            return 0.0
        share = split.get(aval.shape, 1 / rows) if len(aval.shape) > 1 else 1.0
        return math.prod(aval.shape) * aval.dtype.itemsize * share

    return size


def _gathered(plan: Blueprint) -> float:
    """Bytes of the parameters that are split over ``fsdp``, on one device when they are whole, in half precision."""
    total = 0.0
    for leaf in jax.tree.leaves((plan.state.params, plan.frozen)):
        axes: Mapping[Any, Any] = dict.fromkeys(axis for entry in leaf.sharding.spec for axis in _names(entry))
        if "fsdp" in axes:
            total += shard_bytes(leaf) * plan.mesh.shape["fsdp"] * min(1.0, 2 / leaf.dtype.itemsize)
    return total


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
