"""What each device holds of a run, before there is any of it: abstract arrays with shardings, and their bytes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt.groups import FROZEN, STATS
from jaxtransfer.parallel import BATCH_AXES, shardings
from jaxtransfer.step import Step, init_state, places
from jaxtransfer.tree.paths import Params, flatten
from jaxtransfer.tree.rules import Rule, Rules
from jaxtransfer.tree.stacks import layers_of
from jaxtransfer.types import Model, State

OPTIMIZER, BATCH = "optimizer", "batch"


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
    """A step and what it is given, all of it abstract.

    Attributes:
      step: of `make_step`.
      state, frozen, batch: its arguments, `jax.ShapeDtypeStruct` with a sharding each where there is a mesh.
      labels: canonical path -> label.
      mesh: the devices.
    """

    step: Step
    state: State
    frozen: Params
    batch: Mapping[str, Any]
    labels: Mapping[str, str]
    mesh: Mesh

    def bytes(self) -> dict[str, int]:
        """Bytes that one device holds from step to step, by group: frozen ones first, the optimizer's after them."""
        found: dict[str, int] = {FROZEN: 0, STATS: 0}
        for tree in (self.frozen, self.state.stats, self.state.params):
            for path, leaf in flatten(tree).items():
                label = self.labels[layers_of(path)[0]]
                found[label] = found.get(label, 0) + shard_bytes(leaf)
        found[OPTIMIZER] = sum(map(shard_bytes, jax.tree.leaves(self.state.opt_state)))
        found[BATCH] = sum(map(shard_bytes, jax.tree.leaves(self.batch)))
        return {name: count for name, count in found.items() if count}

    @property
    def gradients(self) -> int:
        """Bytes of one device's gradients: a step forms one for every leaf that trains, and for no other."""
        return sum(map(shard_bytes, jax.tree.leaves(self.state.params)))


def blueprint(
    model: Model,
    params: Params,
    labels: Any,
    tx: optax.GradientTransformation,
    step: Step,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    *,
    mesh: Mesh,
    sharding: Rules,
) -> Blueprint:
    """The arguments of a step as `init_state` would make them, on devices that need not be here.

    Args:
      model, labels, tx: as `init_state` takes them.
      params: abstract.
      step: made of the same model, transformation, mesh and rules.
      batch: the shapes and dtypes of a batch over all devices.
      mesh, sharding: as `init_state` takes them.

    Raises:
      ValueError, TreeError, ShardingError: as `init_state`.
    """
    state, frozen = placed_state(model, params, labels, tx, mesh=mesh, sharding=sharding)
    rows = NamedSharding(mesh, P(BATCH_AXES))
    laid = {name: _at(leaf, rows) for name, leaf in batch.items()}
    return Blueprint(step, state, frozen, laid, flatten(labels), mesh)


def placed_state(
    model: Model, params: Params, labels: Any, tx: optax.GradientTransformation, *, mesh: Mesh, sharding: Rules
) -> tuple[State, Params]:
    """What `init_state` gives, as shapes with shardings; see `blueprint`.

    Raises:
      ValueError, TreeError, ShardingError: as `init_state`.
    """
    state, frozen = jax.eval_shape(
        lambda params, key: init_state(model, params, labels, tx, key), params, jax.random.key(0)
    )
    rules = tuple(Rule(rule[0], rule[1], optional=True) for rule in sharding)
    return _at(state, places(state, mesh, sharding)), _at(frozen, shardings(frozen, mesh, rules))


def _at(tree: Any, where: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)


def shard_bytes(leaf: Any) -> int:
    """Bytes of a leaf's part on one device."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
        return math.prod(leaf.shape) * leaf.dtype.itemsize
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
