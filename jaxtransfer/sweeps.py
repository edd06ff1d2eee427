"""Sweeps: several trainings as one program, `jax.vmap` of a step over their states against one frozen part.

What is frozen is not mapped over, so a trunk runs once for all of them and lies in memory once. Seeds and initial
parameters differ from state to state by themselves; rates and weight decay where they are part of the state, see
``traced`` of `optim.optimizer`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtransfer.step import Step
from jaxtransfer.tree.paths import Params, flatten
from jaxtransfer.types import State


class SweepError(ValueError):
    """States that one program cannot train together: where they differ, and in what."""


def sweep(step: Step, states: Sequence[State], *, batches: Literal["shared", "own"] = "shared") -> tuple[Step, State]:
    """A step over several states at once, and these states as one, each leaf with a leading axis.

    ``step(states, frozen, batch)`` gives of each state what the single step gives of it, to rounding: a step that is
    not finite leaves its own state alone as it was. Swept again, the outer axis comes first: seeds with batches of
    their own around rates that share them.

    Args:
      step: from `make_step`, or from a sweep.
      states: two or more, alike in structure, shapes and dtypes.
      batches: ``shared``: every state trains on the same batch; ``own``: the batch has a leading axis as well.

    Returns:
      The swept step, to which the states are donated, and the stacked states; metrics have a leading axis too.

    Raises:
      SweepError: fewer than two states, or states that are not alike; names the first leaf that differs.

    Example:
      >>> def step(state, frozen, batch):
      ...     return State(state.step + 1, {"w": state.params["w"] + frozen * batch}, {}, (), state.key, {}), {}
      >>> one = State(jnp.zeros((), int), {"w": jnp.zeros(())}, {}, (), jax.random.key(0), {})
      >>> both, states = sweep(step, [one, State(one.step, {"w": jnp.ones(())}, {}, (), one.key, {})])
      >>> both(states, jnp.array(10.0), jnp.array(2.0))[0].params["w"].tolist()
      [20.0, 21.0]
    """
    axis = {"shared": None, "own": 0}[batches]
    return jax.jit(jax.vmap(step, in_axes=(0, None, axis)), donate_argnums=0), stacked(states)


def sweep_eval(
    evaluate: Callable[[State, Params, Mapping[str, Any]], Any],
) -> Callable[[State, Params, Mapping[str, Any]], Any]:
    """An evaluation of several states on the same batch: its outputs have a leading axis."""
    return jax.jit(jax.vmap(evaluate, in_axes=(0, None, None)))


def stacked(states: Sequence[State]) -> State:
    """Several states as one with a leading axis on every leaf; the inverse of `unstacked`.

    Raises:
      SweepError: see `sweep`.
    """
    if len(states) < 2:
        raise SweepError(f"sweep: {len(states)} state(s); one needs no sweep")
    first = _kinds(states[0])
    for number, state in enumerate(states[1:], 1):
        other = _kinds(state)
        if other != first:
            path = next(path for path in sorted(first.keys() | other.keys()) if first.get(path) != other.get(path))
            raise SweepError(
                f"sweep: state {number} is not like state 0 at {path}: {other.get(path, 'nothing')} and "
                f"{first.get(path, 'nothing')}; train them in turn"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def unstacked(state: State) -> list[State]:
    """The single states of a stacked one."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(len(state.step))]


def _kinds(state: State) -> dict[str, str]:
    """What must agree: of every leaf its shape and dtype."""
    return {path.removeprefix("@"): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flatten(state).items()}
