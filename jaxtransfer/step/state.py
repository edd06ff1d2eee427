"""What a step changes and what it does not: laid out, split by label, and put together again."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt.groups import FROZEN, STATS
from jaxtransfer.adapt.heads import check_tied
from jaxtransfer.models.api import layout_of
from jaxtransfer.optim import master
from jaxtransfer.parallel import check_sequence, put, shardings, state_shardings
from jaxtransfer.tree.diff import TreeError
from jaxtransfer.tree.partition import combine, partition
from jaxtransfer.tree.paths import Params, flatten
from jaxtransfer.tree.rules import Rules
from jaxtransfer.tree.stacks import layers_of, stack, unstack
from jaxtransfer.types import AUX, Model, State

CONSTANTS = "constants"
"""Where in ``frozen`` lies what objectives know beforehand; no part of the model."""


def init_state(
    model: Model,
    params: Params,
    labels: Any,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    mesh: Mesh | None = None,
    sharding: Rules = (),
    terms: Params | None = None,
) -> tuple[State, Params]:
    """Lays the parameters out and splits them by label: what a step changes, and what it does not.

    Trainable leaves are copied (the state is donated) and kept in float32 at least; frozen ones keep their dtype.

    Args:
      model: the model; its layers are what is stacked.
      params: canonical parameters.
      labels: tree of labels over them: a group's name, ``frozen`` or ``stats``.
      tx: the transformation over the trainable partition.
      key: typed PRNG key of the run.
      mesh, sharding: where and how to place everything; see `parallel.shardings`.
      terms: the first state of the objective's terms, `objectives.states_of`.

    Raises:
      ValueError: nothing trains, an integer leaf would, or a tied head would over a frozen embedding.
      ShardingError: the rules do not fit the mesh, or tokens would be split of a model without attention.
      TreeError: labels and parameters differ in structure.
    """
    by_path = flatten(labels)
    if by_path.keys() != flatten(params).keys():
        raise TreeError(f"labels and params differ at {sorted(by_path.keys() ^ flatten(params).keys())[:6]}")
    if all(label in (FROZEN, STATS) for label in by_path.values()):
        raise ValueError("nothing trains: every label is 'frozen' or 'stats'")
    for path, leaf in flatten(params).items():
        if by_path[path] not in (FROZEN, STATS) and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{path} is {leaf.dtype} and cannot train; label it 'frozen' or 'stats'")
    check_tied(model, by_path)
    if mesh is not None:
        check_sequence(mesh, model, params)
    laid = stack(params, layout_of(model, params, labels))
    laid = jax.tree.map(jnp.asarray, laid) if mesh is None else put(laid, shardings(laid, mesh, sharding))

    def kind(path: str) -> str:
        return by_path[layers_of(path)[0]]

    frozen_leaves, live = partition(laid, lambda path: kind(path) == FROZEN)
    stats, trained = partition(live, lambda path: kind(path) == STATS)
    trained, stats = jax.tree.map(lambda x: jnp.array(x, master(x.dtype), copy=True), (trained, stats))
    init = jax.jit(tx.init)
    step = jnp.zeros((), jnp.int32)
    if mesh is not None:
        where = jax.tree.map(lambda x: x.sharding, trained)
        abstract = jax.eval_shape(tx.init, trained)
        init = jax.jit(tx.init, out_shardings=state_shardings(abstract, trained, where, mesh))
        step, key = put((step, key), NamedSharding(mesh, P()))
        terms = put(terms or {}, NamedSharding(mesh, P()))
    return State(step, trained, stats, init(trained), jnp.copy(key), dict(terms or {})), frozen_leaves


def whole(state: State, frozen: Params) -> Params:
    """The laid-out parameters of the whole model, and of what trains beside it."""
    return combine(combine(state.params, state.stats), without_constants(frozen)[0])


def params_of(state: State, frozen: Params) -> Params:
    """The canonical parameters of the whole model: for export, analysis, another phase."""
    return unstack(whole(state, frozen))


def bare(params: Params) -> Params:
    """The parameters of the model alone, without those that train beside it."""
    return {name: node for name, node in params.items() if name != AUX}


def with_constants(frozen: Params, **constants: Any) -> Params:
    """``frozen`` with what objectives know beforehand, which they find in ``view.constants``.

    Of a tree that is to stay while the state moves on, such as ``anchor=state.params``, the leaves are copied: a step
    is given the state to keep. What lies there is no part of the model, and is not saved.
    """
    held = jax.tree.map(jnp.copy, constants)
    return {**frozen, CONSTANTS: {**frozen.get(CONSTANTS, {}), **held}}


def without_constants(frozen: Params) -> tuple[Params, Mapping[str, Any]]:
    """The inverse of `with_constants`: the frozen leaves, and the constants."""
    return {name: node for name, node in frozen.items() if name != CONSTANTS}, frozen.get(CONSTANTS, {})
