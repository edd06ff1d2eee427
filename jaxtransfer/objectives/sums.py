"""An objective as a sum of scheduled terms, each a function of the `View`."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.models.api import apply
from jaxtransfer.objectives.losses import Objective
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import AUX, Model, View

Loss = Callable[[View], tuple[jax.Array, dict[str, Any]]]
Schedule = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a term's own parameters depend on.

    Attributes:
      features: boundary -> the width d of its pooled activations.
      classes: C.
    """

    features: Mapping[str, int]
    classes: int


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of an objective.

    Attributes:
      name: names its metric, its parameters under ``aux/NAME`` and its entry in `State.terms`.
      loss: ``loss(view) -> (scalar, metrics)``, a mean over rows or a sum over parameters, as its docstring says; under
        ``metrics["state"]`` it may return a new state.
      weight: what it is multiplied by: a number, or a schedule of the step.
      capture: boundaries that it reads.
      domains: further domains that it reads.
      anchored: whether it reads ``view.constants["anchor"]``.
      aux: ``aux(model, key, shapes)``, parameters that train beside the model; None for none.
      state: ``state(shapes)``, what it carries from step to step; None for nothing.
    """

    name: str
    loss: Loss
    weight: float | Schedule = 1.0
    capture: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    anchored: bool = False
    aux: Callable[[Model, jax.Array, Shapes], Params] | None = None
    state: Callable[[Shapes], Any] | None = None


def total(objective: Objective | None, terms: Sequence[Term], *, weight: float = 1.0) -> Objective:
    """``weight * task + sum_k weight_k(step) * term_k``.

    Args:
      objective: the task's loss on the batch; None for none, as where the batch has no labels.
      terms: with different names.
      weight: of the task's loss.

    Returns:
      An objective whose metrics are the task's, each term's value by its name, and its metrics as ``NAME_metric``.
      Without a task ``metrics["weight"]`` is the number of rows.

    Raises:
      ValueError: two terms of one name, or nothing at all.

    Example:
      >>> still = Term("still", lambda view: (jnp.float32(2.0), {}), weight=0.5)
      >>> view = View({}, {}, {"weight": jnp.ones(3)}, None, jnp.array(0))
      >>> loss, metrics = total(None, [still])(view)
      >>> float(loss), float(metrics["still"]), float(metrics["weight"])
      (1.0, 2.0, 3.0)
    """
    names = [term.name for term in terms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two terms are called {twice[0]!r}; give one another name")
    if objective is None and not terms:
        raise ValueError("an objective without a task's loss needs a term")

    def summed(view: View) -> tuple[jax.Array, dict[str, Any]]:
        if objective is None:
            loss, metrics = jnp.zeros((), jnp.float32), {"weight": jnp.sum(view.batch["weight"].astype(jnp.float32))}
        else:
            loss, metrics = objective(view)
            loss, metrics = weight * loss, dict(metrics)
        states = dict(view.terms)
        for term in terms:
            if missing := [name for name in term.domains if name not in view.domains]:
                raise ValueError(f"{term.name}: reads the domain {missing[0]!r}; the batch has {_domains(view)}")
            value, own = term.loss(view)
            own = dict(own)
            if "state" in own:
                states[term.name] = own.pop("state")
            factor = term.weight(view.step) if callable(term.weight) else term.weight
            loss = loss + factor * value
            metrics |= {term.name: value, **{f"{term.name}_{name}": metric for name, metric in own.items()}}
        return loss, {**metrics, **({"terms": states} if states else {})}

    return summed


def _domains(view: View) -> str:
    return ", ".join(view.domains) or "no further domain"


def captures(terms: Sequence[Term]) -> tuple[str, ...]:
    """The boundaries that `make_step` must capture for the terms."""
    return tuple(dict.fromkeys(layer for term in terms for layer in term.capture))


def shapes_of(model: Model, params: Params, batch: Mapping[str, Any], terms: Sequence[Term]) -> Shapes:
    """The widths that the terms' own parameters depend on, from one batch, of arrays or abstract."""
    layers = captures(terms)
    found = jax.eval_shape(lambda p, b: apply(model, p, b, capture=layers), params, batch)
    return Shapes(
        {name: hidden.shape[-1] for name, hidden in found.get("captured", {}).items()},
        found["logits"].shape[-1] if "logits" in found else 0,
    )


def aux_of(terms: Sequence[Term], model: Model, key: jax.Array, shapes: Shapes) -> Params:
    """What trains beside the model, ``{"aux": {NAME: ...}}``; empty where nothing does.

    The key of a term follows from its name, so that adding one changes no other's.
    """
    made = {
        term.name: term.aux(model, jax.random.fold_in(key, zlib.crc32(term.name.encode()) >> 1), shapes)
        for term in terms
        if term.aux is not None
    }
    return {AUX: made} if made else {}


def states_of(terms: Sequence[Term], shapes: Shapes) -> Params:
    """The first `State.terms`."""
    return {term.name: term.state(shapes) for term in terms if term.state is not None}
