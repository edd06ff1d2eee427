"""Where things lie on a mesh: batches, activations, what is gathered for its use, and what a step leaves behind."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.parallel import BATCH_AXES, SEQUENCE, ShardingError, gather, parts, shardings, state_shardings
from jaxtransfer.tree.paths import Params
from jaxtransfer.tree.rules import Rule, Rules
from jaxtransfer.types import Model, State


def shard_batch(batch: Mapping[str, Any], mesh: Mesh | None) -> Mapping[str, Any]:
    """A process's rows of the batch as global arrays, split over the mesh's batch axes; unchanged without a mesh."""
    if mesh is None:
        return batch
    where = NamedSharding(mesh, P(BATCH_AXES))
    return jax.tree.map(lambda value: jax.make_array_from_process_local_data(where, value), dict(batch))


def constraint(mesh: Mesh | None) -> Callable[[jax.Array], jax.Array] | None:
    """Activations are split by rows over the batch axes, and by tokens, (B, T, ...), over the sequence axis."""
    if mesh is None:
        return None
    cut = parts(mesh, SEQUENCE)

    def constrain(x: jax.Array) -> jax.Array:
        if cut == 1 or x.ndim < 3:
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES)))
        if x.shape[1] % cut:
            raise ShardingError(
                f"mesh: sequence = {cut} does not divide activations of {x.shape[1]} positions, {x.shape}; take "
                "lengths that it divides, or a mesh without this axis"
            )
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES, SEQUENCE)))

    return constrain


def gathered(model: Model, params: Params, mesh: Mesh | None, rules: Rules) -> Params:
    """What lies outside stacks ready for its use; a user's own model takes arrays alone."""
    return params if mesh is None else gather(params, mesh, rules, columns=model.family != "foreign")


def pin(tree: Params, mesh: Mesh | None, rules: Rules) -> Params:
    """A tree over part of the parameters, sharded as they are."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, _where(tree, mesh, rules))


def pin_state(state: State, mesh: Mesh | None, rules: Rules) -> State:
    """A state sharded as `init_state` made it, or the next step would be compiled anew and could not reuse buffers."""
    return state if mesh is None else jax.lax.with_sharding_constraint(state, places(state, mesh, rules))


def places(state: State, mesh: Mesh, rules: Rules) -> Any:
    """The sharding of every leaf of a state, concrete or abstract, as `init_state` makes it and a step keeps it."""
    params, stats = (_where(tree, mesh, rules) for tree in (state.params, state.stats))
    everywhere = NamedSharding(mesh, P())
    moments = state_shardings(state.opt_state, state.params, params, mesh)
    terms = jax.tree.map(lambda _: everywhere, state.terms)
    return State(everywhere, params, stats, moments, everywhere, terms)  # type: ignore[arg-type]


def _where(tree: Params, mesh: Mesh, rules: Rules) -> Any:
    return shardings(tree, mesh, tuple(Rule(rule[0], rule[1], optional=True) for rule in rules))
