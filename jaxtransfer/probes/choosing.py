"""The strength of a probe's penalty by cross-validation on the training data alone, all fits at once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxtransfer.probes.checks import ProbeError, matrix, targets
from jaxtransfer.probes.linear import Probe, logistic

Loss = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `choose` found.

    Attributes:
      strength: the one of the least loss; of equal ones the first that was given.
      losses: of each strength, the mean over the examples, each held out once.
    """

    strength: float
    losses: tuple[float, ...]


def log_loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """``-log softmax(scores)_y``: (N, C), (N,) -> (N,)."""
    return -jnp.take_along_axis(jax.nn.log_softmax(scores, axis=1), labels[:, None], axis=1)[:, 0]


def zero_one(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the largest score is not the label's: (N, C), (N,) -> (N,)."""
    return (jnp.argmax(scores, axis=1) != labels).astype(scores.dtype)


def folds(labels: ArrayLike, count: int, seed: int = 0) -> np.ndarray:
    """Which of ``count`` parts holds out each example; of every class each holds out as many, give or take one.

    Args:
      labels: (N,) integers.
      count: at least 2, and no more than there are examples.
      seed: of the draw.

    Returns:
      (N,) int64.

    Raises:
      ProbeError: a class with one example, which would be missing where it is held out, or a count out of range.

    Example:
      >>> np.bincount(folds([0, 0, 1, 1], 2)).tolist()
      [2, 2]
    """
    y = np.asarray(labels)
    values, counts = np.unique(y, return_counts=True)
    if not 2 <= count <= len(y):
        raise ProbeError(f"folds: {count} parts of {len(y)} examples; take 2 to {len(y)}")
    if counts.min() < 2:
        raise ProbeError(
            f"folds: class {values[counts.argmin()]} has one example, and none is left of it where that is held out; "
            "choose a strength beforehand"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(y))
    order = shuffled[np.argsort(y[shuffled], kind="stable")]  # class by class, at random within each
    out = np.empty(len(y), np.int64)
    out[order] = np.arange(len(y)) % count
    return out


def choose(
    features: ArrayLike,
    labels: ArrayLike,
    classes: int,
    strengths: Sequence[float],
    *,
    probe: Probe = logistic,
    loss: Loss = log_loss,
    count: int = 5,
    seed: int = 0,
) -> Choice:
    """The strength under which examples that were held out are told best.

    Every strength is fitted to the rest of every part: all of them in one compiled program.

    Args:
      features: (N, d).
      labels: (N,), integers below ``classes``, two of each at least.
      classes: C.
      strengths: candidates, the strongest penalty first; of equally good ones the first is chosen.
      probe: `logistic`, `ridge`, or `standardised` of either.
      loss: `log_loss`, or `zero_one` where scores are no logits.
      count: parts, at most N.
      seed: of the parts.

    Raises:
      ProbeError: no strengths, or as `folds` and the probe; a fit that did not converge.

    Example:
      >>> from jaxtransfer.probes import ridge
      >>> x = np.random.default_rng(0).normal(size=(40, 30)) + 0.5 * (np.arange(40) % 2)[:, None]
      >>> choose(x, np.arange(40) % 2, 2, [1e4, 30.0, 1e-4], probe=ridge, loss=zero_one)
      Choice(strength=10000.0, losses=(0.125, 0.125, 0.45...))
    """
    x = matrix(features)
    y = targets(labels, len(x), classes, least=2)
    if not strengths:
        raise ProbeError("choose: no strengths to choose from")
    part = folds(np.asarray(y), min(count, len(x)), seed)
    kept = jnp.asarray(part[None, :] != np.arange(part.max() + 1)[:, None], x.dtype)
    losses, residual, goal = _held_out(x, y, kept, jnp.asarray(strengths, x.dtype), classes, probe, loss)
    for strength, value, left, least in zip(strengths, losses, residual, goal, strict=True):
        if not np.isfinite(value) or not left <= least:
            told = f"the gradient is {left:.1e}, not {least:.1e}" if np.isfinite(value) else "no number came of it"
            raise ProbeError(f"choose: strength {strength:g}: {told}; leave it out, or take a stronger penalty")
    found = np.asarray(losses, np.float64)
    return Choice(float(strengths[int(found.argmin())]), tuple(found.tolist()))


@functools.partial(jax.jit, static_argnames=("classes", "probe", "loss"))
def _held_out(
    x: jax.Array, y: jax.Array, kept: jax.Array, strengths: jax.Array, classes: int, probe: Probe, loss: Loss
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """By strength: the mean loss, the gradient that is left at most, and what it had to come down to."""

    def one(weights: jax.Array, strength: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        fitted = probe(x, y, classes, strength, weights=weights)
        return jnp.sum((1.0 - weights) * loss(fitted(x), y)), fitted.residual, fitted.goal

    over_strengths = jax.vmap(one, in_axes=(None, 0))
    sums, residuals, goals = jax.vmap(over_strengths, in_axes=(0, None))(kept, strengths)
    return jnp.sum(sums, axis=0) / len(x), jnp.max(residuals, axis=0), goals[0]
