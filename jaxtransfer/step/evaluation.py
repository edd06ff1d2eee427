"""The evaluation of a state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.models.api import apply
from jaxtransfer.models.attention import Attend
from jaxtransfer.models.projection import PROJECTION
from jaxtransfer.step.placing import constraint, gathered
from jaxtransfer.step.state import bare, whole
from jaxtransfer.tree.paths import Params
from jaxtransfer.tree.rules import Rules
from jaxtransfer.types import Model, State

Observe = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]


def make_eval(
    model: Model,
    outputs: Sequence[str] | Observe = ("logits",),
    *,
    mesh: Mesh | None = None,
    sharding: Rules = (),
    precision: Any = jnp.float32,
    attend: Attend | None = None,
) -> Callable[[State, Params, Mapping[str, Any]], dict[str, jax.Array]]:
    """A jitted evaluation: ``evaluate(state, frozen, batch)`` gives what is asked for, in evaluation mode.

    Args:
      model: the model.
      outputs: names of outputs of `apply`, or a function ``(outputs, batch) -> {name: (B, ...)}`` of them.
      mesh, sharding: as given to `init_state`; the outputs are then replicated.
      precision: dtype of activations.
      attend: as given to `make_step`.
    """

    def evaluate(state: State, frozen: Params, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        params = gathered(model, bare(whole(state, frozen)), mesh, sharding)
        also = (PROJECTION,) if callable(outputs) else ()
        found = apply(model, params, batch, dtype=precision, constrain=constraint(mesh), attend=attend, also=also)
        picked = dict(outputs(found, batch)) if callable(outputs) else _picked(found, outputs)
        return picked if mesh is None else jax.lax.with_sharding_constraint(picked, NamedSharding(mesh, P()))

    return jax.jit(evaluate)


def _picked(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"the model has no output {missing[0]!r}; it has {', '.join(found)}")
    return {name: found[name] for name in names}
