"""Where restored leaves go: where those of ``like`` are, or by rules onto a mesh, or to the default device."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxtransfer.checkpoint.leaves import named
from jaxtransfer.checkpoint.manifest import CheckpointError
from jaxtransfer.parallel import shardings, state_shardings
from jaxtransfer.tree import flatten, map_with_path
from jaxtransfer.tree.rules import Rules
from jaxtransfer.types import State


def places_of(
    state: State, frozen: Any, others: Mapping[str, Any], mesh: Mesh | None, rules: Rules
) -> dict[str, Sharding | None]:
    """The sharding of each leaf by name; None is the default device, to which the leaf is not bound.

    Args:
      state, frozen: of concrete or abstract arrays.
      others: frozen leaves that were not asked for, by path: a rule may be theirs.
      mesh: where leaves go that have no sharding of their own.
      rules: as `parallel.shardings` takes them.

    Raises:
      CheckpointError: rules without a mesh.
      ShardingError, RuleError: the rules do not fit.
    """
    if mesh is None and rules:
        raise CheckpointError("restore: sharding rules without a mesh; pass the mesh that they are for")
    own = {name: _own(leaf) for name, leaf in named(state, frozen)[0].items()}
    if mesh is None or None not in own.values():
        return own
    by_rule = _by_rule(state, frozen, others, mesh, rules)
    return {name: by_rule[name] if place is None else place for name, place in own.items()}


def _own(leaf: Any) -> Sharding | None:
    """A leaf's sharding; an array that is bound to no device counts as having none."""
    return None if isinstance(leaf, jax.Array) and not leaf.committed else getattr(leaf, "sharding", None)


def _by_rule(
    state: State, frozen: Any, others: Mapping[str, Any], mesh: Mesh, rules: Rules
) -> dict[str, NamedSharding]:
    """Parameters by the rules, optimizer leaves as their parameter, everything else on every device."""
    parts = (state.params, state.stats, frozen)
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_path = shardings({**others, **flatten(parts[0]), **flatten(parts[1]), **flatten(parts[2])}, mesh, rules)
    params, stats, kept = (map_with_path(lambda path, _: by_path[path], part) for part in parts)
    moments = state_shardings(state.opt_state, state.params, params, mesh)
    terms = jax.tree.map(lambda _: everywhere, state.terms)
    return named(State(everywhere, params, stats, moments, everywhere, terms), kept)[0]  # type: ignore[arg-type]
