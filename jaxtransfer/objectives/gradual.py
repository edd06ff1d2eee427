"""Gradual self-training: of domains that drift, each is labelled by the model of the one before."""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

S = TypeVar("S")
Rows = TypeVar("Rows")


def self_train(
    state: S,
    domains: Iterable[Rows],
    predict: Callable[[S, Rows], jax.Array],
    train: Callable[[S, Rows, jax.Array, jax.Array], S],
    *,
    drop: float = 0.1,
) -> S:
    """Goes through unlabelled domains in order, and learns each from its own predictions (arXiv:2002.11361).

    ``theta_k = train(theta_{k-1}, x_k, argmax predict(theta_{k-1}, x_k))`` over the surest rows of ``x_k``. Where each
    domain is near the one before, most labels are right every time; the last domain alone, far from the source, would
    be labelled wrongly. What the paper finds indispensable is ``train``'s part: hard labels, and regularisation.

    Args:
      state: what was learned on the source: parameters, or a whole `State`.
      domains: of each the unlabelled rows, (N, ...) or a tree of these; those nearest to the source first.
      predict: ``predict(state, rows) -> logits (N, C)``.
      train: ``train(state, rows, labels (N,), kept (N,)) -> state``; rows that are not kept must weigh nothing.
      drop: the share of each domain that is left out, the least sure, in [0, 1).

    Raises:
      ValueError: ``drop`` is out of range.

    Example:
      >>> centre = lambda at, x, labels, kept: float(x[kept].mean())  # between two groups
      >>> drifts = [jnp.array([-1.0, 1.0]) + shift for shift in (0.5, 1.0, 1.5)]
      >>> self_train(0.0, drifts, lambda at, x: jnp.stack([at - x, x - at], axis=1), centre, drop=0.0)
      1.5
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop: must be in [0, 1), got {drop}")
    for rows in domains:
        state = train(state, rows, *surest(predict(state, rows), drop))
    return state


def surest(logits: Any, drop: float) -> tuple[jax.Array, jax.Array]:
    """The predicted classes (N,), and which are among the ``ceil((1 - drop) N)`` most probable ones, (N,) bool.

    Example:
      >>> labels, kept = surest(jnp.array([[5.0, 0.0], [0.0, 0.1], [0.0, 3.0]]), 0.4)
      >>> labels.tolist(), kept.tolist()
      ([0, 1, 1], [True, False, True])
    """
    logp = jnp.max(jax.nn.log_softmax(jnp.asarray(logits), axis=-1), axis=-1)
    rank = jnp.argsort(jnp.argsort(-logp))  # both stable, so of equally sure rows the first are kept
    count = math.ceil(round((1 - drop) * len(logp), 6))  # 0.9 of 10 is 9 and not 9.000000000000002
    return jnp.argmax(jnp.asarray(logits), axis=-1), rank < count
