"""Against forgetting: the Fisher information of EWC, the path integral of SI, the projection of A-GEM."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtransfer.tree.paths import Params

Predict = Callable[[Params, Mapping[str, jax.Array]], jax.Array]


def fisher(
    predict: Predict,
    params: Params,
    examples: Mapping[str, jax.Array],
    *,
    kind: Literal["exact", "sampled", "empirical"] = "exact",
    labels: jax.Array | None = None,
    key: jax.Array | None = None,
    chunk: int = 8,
) -> Params:
    r"""The diagonal of the Fisher information, the mean over examples of each one's own squared gradient.

    ``F = E_x E_{y ~ p(y|x)} (d log p(y|x) / dw)^2`` (Kirkpatrick et al. 2017, arXiv:1612.00796). Squaring the gradient
    of a batch's mean instead, as some do, gives about a batch's size less. ``exact`` sums over the classes; ``sampled``
    draws one y an example from the prediction; ``empirical`` takes the labels given, which is another quantity, near
    the first where the model is right.

    Args:
      predict: ``predict(params, example) -> logits (C,)`` of one example, a row of ``examples`` without its axis.
      params: what is differentiated; leaves that are None take no part.
      examples: name -> (N, ...).
      kind: which of the three.
      labels: (N,) for ``empirical``.
      key: for ``sampled``.
      chunk: examples differentiated at a time; memory is that of so many gradients (times C for ``exact``).

    Raises:
      ValueError: labels or key are needed and not given, or given and not needed, or there are no examples.

    Example:
      >>> x = {"x": jnp.array([[1.0], [2.0]])}
      >>> found = fisher(lambda w, row: jnp.concatenate([w["w"] * row["x"], jnp.zeros(1)]), {"w": jnp.zeros(1)}, x)
      >>> found["w"].tolist()
      [0.625]
    """
    if (labels is None) == (kind == "empirical") or (key is None) == (kind == "sampled"):
        raise ValueError(f"fisher: empirical takes labels and sampled a key, neither the other; got kind={kind!r}")
    count = len(next(iter(examples.values()), ()))
    if not count or chunk < 1:
        raise ValueError(f"fisher: {count} examples in chunks of {chunk}; both must be positive")

    def of(row: tuple[Mapping[str, jax.Array], jax.Array]) -> Params:
        example, extra = row

        def log_probabilities(params: Params) -> jax.Array:
            return jax.nn.log_softmax(predict(params, example).astype(jnp.float32))

        if kind == "exact":
            slopes, weights = jax.jacrev(log_probabilities)(params), jnp.exp(log_probabilities(params))
            return jax.tree.map(lambda g: jnp.tensordot(weights.astype(g.dtype), g * g, 1), slopes)
        label = extra if kind == "empirical" else jax.random.categorical(extra, log_probabilities(params))
        return jax.tree.map(lambda g: g * g, jax.grad(lambda p: log_probabilities(p)[label])(params))

    extras = jnp.arange(count) if kind == "exact" else labels if key is None else jax.random.split(key, count)

    def add(total: Params, rows: Any) -> tuple[Params, None]:
        return jax.tree.map(lambda t, f: t + jnp.sum(f, axis=0), total, jax.vmap(of)(rows)), None

    whole = count - count % min(chunk, count)
    rows = jax.tree.map(lambda x: jnp.asarray(x), (dict(examples), extras))
    start, rest = (jax.tree.map(lambda x, part=part: x[part], rows) for part in (slice(whole), slice(whole, None)))
    split = jax.tree.map(lambda x: x.reshape(-1, min(chunk, count), *x.shape[1:]), start)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    total, _ = jax.lax.scan(add, zero, split)
    if whole < count:
        total, _ = add(total, rest)
    return jax.tree.map(lambda x: x / count, total)


class PathState(NamedTuple):
    """State of `path_integral`: the inner transformation's, and ``w`` by leaf."""

    inner: Any
    path: Params


def path_integral(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation that also sums ``w = -sum_t g_t * u_t`` by leaf, how much each parameter lowered the loss.

    Synaptic intelligence (Zenke et al. 2017, arXiv:1703.04200). ``g`` must be the gradient of the task's loss alone,
    without the penalty of tasks before. See `path_importance`.

    Example:
      >>> tx = path_integral(optax.sgd(0.5))
      >>> state = tx.init({"w": jnp.zeros(1)})
      >>> _, state = tx.update({"w": jnp.full(1, 2.0)}, state)
      >>> state.path["w"].tolist()
      [2.0]
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Params) -> PathState:
        return PathState(inner.init(params), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Params, state: PathState, params: Any = None, **extra: Any) -> tuple[Params, PathState]:
        updates: Any
        updates, held = inner.update(grads, state.inner, params, **extra)
        path: Any = jax.tree.map(lambda w, g, u: w - g * u, state.path, grads, updates)
        return updates, PathState(held, path)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def path_importance(path: Params, params: Params, before: Params, damping: float = 0.1) -> Params:
    """``max(w, 0) / ((p - p0)^2 + damping)``: SI's importances at the end of a task, for `regularisers.quadratic`.

    With ``quadratic``'s half the weight of its term is twice SI's c.

    Args:
      path: of `path_integral`.
      params: at the task's end.
      before: at its start.
      damping: xi > 0.

    Example:
      >>> w, now, then = ({"w": jnp.array([x])} for x in (2.0, 1.0, 0.0))
      >>> round(float(path_importance(w, now, then, damping=1.0)["w"][0]), 4)
      1.0
    """
    if damping <= 0:
        raise ValueError(f"path_importance: damping must be positive, got {damping}")
    return jax.tree.map(lambda w, p, q: jnp.maximum(w, 0.0) / ((p - q) ** 2 + damping), path, params, before)


def a_gem(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation of gradients that are first `project`-ed: ``update(g, state, params, reference=r)``.

    ``make_step(memory=...)`` hands ``reference`` over. Clipping inside ``tx`` measures what is left.

    Example:
      >>> tx = a_gem(optax.sgd(1.0))
      >>> g, r = {"w": jnp.array([1.0, -1.0])}, {"w": jnp.array([0.0, 2.0])}
      >>> updates, _ = tx.update(g, tx.init(g), reference=r)
      >>> updates["w"].tolist()
      [-1.0, -0.0]
    """
    inner = optax.with_extra_args_support(tx)

    def update(grads: Any, state: Any, params: Any = None, *, reference: Any, **extra: Any) -> tuple[Any, Any]:
        extra.pop("norm", None)  # that of the gradient before
        return inner.update(project(grads, reference), state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)  # type: ignore[arg-type]


def project(gradient: Params, reference: Params) -> Params:
    """A-GEM: a gradient that does not raise the loss on the memory, to first order (Chaudhry et al. 2019).

    ``g - (g.r / r.r) r`` where ``g.r < 0``, else g (arXiv:1812.00420, equation 11), over all leaves together. The inner
    product with the reference is then not negative.

    Args:
      gradient: g, of the task at hand.
      reference: r, of the memory's loss at the same parameters.

    Example:
      >>> g, r = {"w": jnp.array([1.0, -1.0])}, {"w": jnp.array([0.0, 2.0])}
      >>> project(g, r)["w"].tolist()
      [1.0, 0.0]
    """
    inner, norm = (jnp.asarray(optax.tree.vdot(x, reference)) for x in (gradient, reference))
    share = jnp.where(inner < 0, inner / jnp.where(norm > 0, norm, 1.0), 0.0)
    return jax.tree.map(lambda g, r: g - share.astype(g.dtype) * r, gradient, reference)
