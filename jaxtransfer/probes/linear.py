"""Linear probes: ridge regression in closed form, logistic regression to convergence.

Both centre the features and solve in the coordinates of their singular vectors. The bias is not penalised, so this
changes nothing but the conditioning; and under ``jax.vmap`` over strengths the decomposition is made once for all.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxtransfer.probes.checks import ProbeError, matrix, targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """``scores = x kernel + bias``: a pytree, as which many heads are one with a leading axis.

    Attributes:
      kernel: (d, C).
      bias: (C,).
      residual: scalar; the largest entry of the gradient that is left where the fit ended, 0 of a closed form.
      goal: scalar; what it had to come down to.
    """

    kernel: jax.Array
    bias: jax.Array
    residual: jax.Array
    goal: jax.Array

    def __call__(self, features: ArrayLike) -> jax.Array:
        """The scores (M, C) of features (M, d); for `logistic` they are logits."""
        x = matrix(features)
        if x.shape[1] != self.kernel.shape[0]:
            raise ProbeError(f"features {x.shape}: the probe was fitted to a width of {self.kernel.shape[0]}")
        return x @ self.kernel.astype(x.dtype) + self.bias.astype(x.dtype)[None, :]


Probe = Callable[..., Linear]
"""``probe(features, labels, classes, strength, *, weights=None)``."""


def ridge(
    features: ArrayLike,
    labels: ArrayLike,
    classes: int,
    penalty: ArrayLike = 1.0,
    *,
    weights: ArrayLike | None = None,
) -> Linear:
    """One-vs-rest least squares in closed form: ``min_W,b sum_i w_i |x_i W + b - t_i|^2 + penalty |W|^2``.

    The targets ``t`` are 1 for the example's class and -1 for the others. At a penalty of 0 it is the solution of the
    least norm. What differs in ``penalty``, ``weights`` or features alone can be fitted at once by ``jax.vmap``.

    Args:
      features: x (N, d).
      labels: (N,), integers below ``classes``.
      classes: C, at least 2.
      penalty: not negative.
      weights: w (N,), not negative, 1 by default; a row of weight 0 takes no part.

    Raises:
      ProbeError: shapes, labels or a penalty that do not fit, or a class without examples.

    Example:
      >>> probe = ridge([[0.0], [1.0], [4.0], [5.0]], [0, 0, 1, 1], classes=2, penalty=0.0)
      >>> jnp.argmax(probe([[2.0], [3.0]]), axis=1).tolist()
      [0, 1]
    """
    x, y, w, strength = _inputs(features, labels, classes, "penalty", penalty, weights, zero=True)
    return _ridge(x, y, w, strength, classes)


@functools.partial(jax.jit, static_argnames="classes")
def _ridge(x: jax.Array, y: jax.Array, w: jax.Array, penalty: jax.Array, classes: int) -> Linear:
    t = 2.0 * jax.nn.one_hot(y, classes, dtype=x.dtype) - 1.0
    mean, (u, s, vt) = _decomposed(x, w)
    level = (w @ t) / jnp.sum(w)
    root = jnp.sqrt(w)[:, None]
    small = s <= max(x.shape) * jnp.finfo(s.dtype).eps * s[0]
    gain = jnp.where(small, 0.0, s / jnp.where(small, 1.0, s * s + penalty))
    kernel = vt.T @ (gain[:, None] * (u.T @ (root * (t - level[None, :]))))
    return Linear(kernel, level - mean @ kernel, *jnp.zeros((2,), x.dtype))


def logistic(
    features: ArrayLike,
    labels: ArrayLike,
    classes: int,
    C: ArrayLike = 1.0,
    *,
    weights: ArrayLike | None = None,
    tolerance: float | None = None,
    steps: int = 1000,
) -> Linear:
    """Logistic regression: ``min_W,b C sum_i w_i CE(x_i W + b, y_i) + |W|^2 / 2``, by L-BFGS to convergence.

    As scikit-learn's ``LogisticRegression(C)``, which of two classes penalises the one vector that tells them apart:
    there ``|W|^2`` is ``|W_1 - W_0|^2``. What differs in ``C``, ``weights`` or features alone can be fitted at once by
    ``jax.vmap``. (L-BFGS: Liu & Nocedal 1989.)

    Args:
      features: x (N, d); `standardised` makes their scale no matter.
      labels: y (N,), integers below ``classes``.
      classes: at least 2.
      C: inverse strength of the penalty, positive.
      weights: w (N,), not negative, 1 by default; a row of weight 0 takes no part.
      tolerance: on the largest entry of the gradient of the mean loss, in coordinates in which the curvature is about
        1; by default 1e-5, in float64 1e-9.
      steps: at most.

    Raises:
      ProbeError: shapes, labels or a strength that do not fit, a class without examples, or no convergence. In traced
        code, where it cannot be raised, ``residual`` and ``goal`` tell of the last.

    Example:
      >>> probe = logistic([[0.0], [1.0], [4.0], [5.0]], [0, 0, 1, 1], classes=2, C=10.0)
      >>> [round(p, 3) for p in jax.nn.softmax(probe([[2.5]]))[0].tolist()]
      [0.5, 0.5]
    """
    x, y, w, strength = _inputs(features, labels, classes, "C", C, weights, zero=False)
    goal = (1e-9 if x.dtype == jnp.float64 else 1e-5) if tolerance is None else tolerance
    probe = _logistic(x, y, w, strength, classes, goal, steps)
    if not isinstance(probe.residual, Tracer) and not float(probe.residual) <= goal:
        raise ProbeError(
            f"logistic: the gradient is {float(probe.residual):.1e} after {steps} steps, not {goal:.1e}: take more "
            f"steps, or a smaller C than {float(strength):g}"
        )
    return probe


@functools.partial(jax.jit, static_argnames=("classes", "steps"))
def _logistic(
    x: jax.Array, y: jax.Array, w: jax.Array, strength: jax.Array, classes: int, goal: Any, steps: int
) -> Linear:
    total = jnp.sum(w)
    mean, (_, s, vt) = _decomposed(x, w)
    penalty = 1.0 / (strength * total)
    # In the singular vectors' coordinates the curvature is about diag(s^2 / 4 total + penalty): scaled to 1 by this.
    scale = 1.0 / jnp.sqrt(s * s / (4.0 * total) + penalty)
    # Rows of the scaled features; not u s / sqrt(w), which is not defined where w is 0.
    z = (x - mean[None, :]) @ (vt.T * scale[None, :])
    share = w / total

    def logits(theta: Any) -> jax.Array:
        out = z @ theta["kernel"] + theta["bias"][None, :]
        return jnp.concatenate([-out / 2.0, out / 2.0], axis=1) if classes == 2 else out

    def objective(theta: Any) -> jax.Array:
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits(theta), axis=1), y[:, None], axis=1)[:, 0]
        return share @ losses + 0.5 * penalty * jnp.sum((scale[:, None] * theta["kernel"]) ** 2)

    columns = 1 if classes == 2 else classes
    start = {"kernel": jnp.zeros((len(s), columns), x.dtype), "bias": jnp.zeros((columns,), x.dtype)}
    theta, residual = minimise(objective, start, goal, steps)
    kernel = vt.T @ (scale[:, None] * theta["kernel"])
    bias = theta["bias"] - mean @ kernel
    if classes == 2:
        kernel, bias = jnp.concatenate([-kernel, kernel], axis=1) / 2.0, jnp.concatenate([-bias, bias]) / 2.0
    return Linear(kernel, bias, residual, jnp.asarray(goal, x.dtype))


def minimise(objective: Callable[[Any], jax.Array], start: Any, goal: Any, steps: int) -> tuple[Any, jax.Array]:
    """L-BFGS from ``start`` until no entry of the gradient is larger than ``goal``: the end, and the largest there."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # on which optax counts
        tx = optax.lbfgs()
        value_and_grad = optax.value_and_grad_from_state(objective)

        def largest(state: Any) -> jax.Array:
            return optax.tree.norm(optax.tree.get(state, "grad"), ord="inf")

        def step(carry: Any) -> Any:
            theta, state, count, _ = carry
            value, grad = value_and_grad(theta, state=state)
            updates, state = tx.update(grad, state, theta, value=value, grad=grad, value_fn=objective)
            return optax.apply_updates(theta, updates), state, count + 1, largest(state)

        def going(carry: Any) -> jax.Array:
            _, _, count, residual = carry
            return (count < steps) & ~(residual <= goal)

        first = (
            start,
            tx.init(start),
            jnp.zeros((), jnp.int32),
            jnp.full((), jnp.inf, jax.tree.leaves(start)[0].dtype),
        )
        theta, _, _, residual = jax.lax.while_loop(going, step, first)
    return theta, residual


@functools.cache
def standardised(probe: Probe) -> Probe:
    """A probe fitted to ``(x - mean) / deviation`` by column, given back in the features' own coordinates.

    Mean and deviation are those of the rows that it is fitted to, by their weights: inside a cross-validation none of
    what is held out. A column without variance is left out.

    Args:
      probe: `ridge`, `logistic`, or one of the same arguments.

    Example:
      >>> fit = standardised(ridge)
      >>> x = jnp.array([[0.0, 1.0], [1.0, 0.0], [4.0, 1.0], [5.0, 0.0]])
      >>> a, b = (fit(x * jnp.array([[1.0, by]]), [0, 0, 1, 1], 2, 1.0) for by in (1.0, 100.0))
      >>> bool(jnp.allclose(a.kernel[1], 100 * b.kernel[1], atol=1e-6)), bool(jnp.allclose(a.bias, b.bias))
      (True, True)
    """

    def fit(
        features: ArrayLike,
        labels: ArrayLike,
        classes: int,
        strength: ArrayLike,
        *,
        weights: Any = None,
        **options: Any,
    ) -> Linear:
        x = matrix(features)
        share = jnp.ones((len(x),), x.dtype) if weights is None else jnp.asarray(weights, x.dtype)
        share = share / jnp.sum(share)
        mean = share @ x
        deviation = jnp.sqrt(share @ jnp.square(x - mean[None, :]))
        flat = deviation <= 8 * jnp.finfo(x.dtype).eps * jnp.sqrt(share @ (x * x))
        inverse = jnp.where(flat, 0.0, 1.0 / jnp.where(flat, 1.0, deviation))
        found = probe((x - mean[None, :]) * inverse[None, :], labels, classes, strength, weights=weights, **options)
        kernel = found.kernel * inverse[:, None]
        return Linear(kernel, found.bias - mean @ kernel, found.residual, found.goal)

    return fit


def _inputs(
    features: Any, labels: Any, classes: int, name: str, strength: Any, weights: Any, *, zero: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x = matrix(features)
    y = targets(labels, len(x), classes)
    w = jnp.ones((len(x),), x.dtype) if weights is None else jnp.asarray(weights, x.dtype)
    if w.shape != (len(x),):
        raise ProbeError(f"weights: expected ({len(x)},), one a row, got {w.shape}")
    level = jnp.asarray(strength, x.dtype)
    if level.ndim:
        raise ProbeError(f"{name}: expected one number, got {level.shape}; jax.vmap fits several at once")
    if not isinstance(level, Tracer) and not (level >= 0 if zero else level > 0):
        raise ProbeError(f"{name}: must {'not be negative' if zero else 'be positive'}, got {float(level):g}")
    return x, y, w, level


def _decomposed(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    """The weighted mean (d,), and the thin singular value decomposition of the centred rows times ``sqrt(w)``."""
    mean = (w @ x) / jnp.sum(w)
    return mean, jnp.linalg.svd(jnp.sqrt(w)[:, None] * (x - mean[None, :]), full_matrices=False)
