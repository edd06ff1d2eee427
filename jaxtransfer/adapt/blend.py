"""Weight algebra: interpolation, soups, task vectors, averages of models that share an ancestor."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.tree.diff import diff
from jaxtransfer.tree.paths import Params
from jaxtransfer.tree.weights import is_weight
from jaxtransfer.types import Source


class BlendError(ValueError):
    """Models that cannot be blended: no common ancestor, other structures, or adapters that are not merged."""


def interpolate(first: Source, second: Source, alpha: float) -> Source:
    """``(1 - alpha) first + alpha second`` (WiSE-FT: Wortsman et al. 2022, arXiv:2109.01903).

    Between a model before and after fine-tuning it trades accuracy on the target for robustness; it covers the head, so
    both must end in the same one. Where a leaf is the same in both it stays so, bit for bit.

    Args:
      first: at ``alpha = 0``, returned bit for bit.
      second: at ``alpha = 1``, returned bit for bit.
      alpha: any number; outside [0, 1] it extrapolates.

    Raises:
      BlendError: no common ancestor, or other structures.
    """
    check_related("interpolate", first, second)
    if alpha in (0, 1):
        params = (first, second)[int(alpha)].params
    else:
        params = jax.tree.map(lambda a, b: _add(a, alpha, _minus(b, a)), first.params, second.params)
    return _blended(first, params, f"interpolate({alpha:g})")


def soup(sources: Sequence[Source], weights: Sequence[float] | None = None) -> Source:
    """The weighted mean of several fine-tunings of one model (model soups: Wortsman et al. 2022, arXiv:2203.05482).

    Args:
      sources: one or more.
      weights: of each; None is uniform. They are divided by their sum.

    Raises:
      BlendError: nothing to average, weights that do not sum to a positive number, no common ancestor.
    """
    if not sources:
        raise BlendError("soup: no models to average")
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if len(weights) != len(sources) or not sum(weights) > 0:
        raise BlendError(f"soup: {len(sources)} models need as many weights of a positive sum, got {weights}")
    for other in sources[1:]:
        check_related("soup", sources[0], other)
    shares = [weight / sum(weights) for weight in weights]

    def mean(first: Any, *others: Any) -> Any:
        # Around the first: what does not differ stays as it is.
        out = first
        for share, other in zip(shares[1:], others, strict=True):
            out = _add(out, share, _minus(other, first))
        return out

    params = jax.tree.map(mean, *(source.params for source in sources))
    return _blended(sources[0], params, f"soup({', '.join(f'{share:.3g}' for share in shares)})")


def greedy_soup(sources: Sequence[Source], score: Callable[[Source], float]) -> tuple[Source, tuple[int, ...]]:
    """Adds models, the best first, as long as the mean does not get worse on held-out data (arXiv:2203.05482).

    Args:
      sources: one or more.
      score: of a model on validation data; more is better.

    Returns:
      The soup, and the positions of what went into it, in order.
    """
    if not sources:
        raise BlendError("greedy_soup: no models to average")
    scores = [score(source) for source in sources]
    order = sorted(range(len(sources)), key=lambda i: -scores[i])
    taken, best = [order[0]], scores[order[0]]
    for i in order[1:]:
        found = score(soup([sources[j] for j in [*taken, i]]))
        if found >= best:
            taken, best = [*taken, i], found
    return soup([sources[i] for i in taken]), tuple(taken)


def task_vector(source: Source, ancestor: Source) -> Params:
    """``source - ancestor``, in float32: what fine-tuning changed (Ilharco et al. 2023, arXiv:2212.04089).

    Raises:
      BlendError: the ancestor is not one, or the structures differ (other heads).
    """
    check_related("task_vector", source, ancestor)
    return jax.tree.map(_minus, source.params, ancestor.params)


def add_vectors(ancestor: Source, vectors: Mapping[str, tuple[float, Params]]) -> Source:
    """``ancestor + sum_i c_i v_i``: learning several tasks by addition, forgetting one by a negative coefficient.

    Args:
      ancestor: what the vectors are differences from.
      vectors: name -> (coefficient, vector of `task_vector`).

    Raises:
      BlendError: a vector of another structure.
    """
    params = ancestor.params
    for name, (coefficient, vector) in vectors.items():
        if found := diff(params, vector, dtypes=False):
            raise BlendError(f"add_vectors: {name!r} is no difference from this model: {found}")
        params = jax.tree.map(lambda p, v, c=coefficient: _add(p, c, v), params, vector)
    names = ", ".join(f"{coefficient:g} {name}" for name, (coefficient, _) in vectors.items())
    return _blended(ancestor, params, f"add_vectors({names})")


def ema(average: Params, params: Params, decay: float) -> Params:
    """``decay average + (1 - decay) params``: the exponential moving average, one step of it; integers are taken over.

    Args:
      average: so far; start with the parameters themselves.
      params: now, of the same structure (canonical or laid out).
      decay: in [0, 1).

    Raises:
      BlendError: ``decay`` is out of range.

    Example:
      >>> ema({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.75)["w"]
      Array([0.25, 0.25], dtype=float32)
    """
    if not 0 <= decay < 1:
        raise BlendError(f"ema: decay must be in [0, 1), got {decay}")
    return jax.tree.map(lambda a, p: _add(a, 1 - decay, _minus(p, a)) if _is_float(p) else p, average, params)


def check_related(what: str, first: Source, second: Source) -> None:
    """Two models must come from one source and be alike in structure, or their mean means nothing.

    Raises:
      BlendError: they are not.
    """
    for source in (first, second):
        if any(map(is_weight, jax.tree.leaves(source.params, is_leaf=is_weight))):
            raise BlendError(f"{what}: {source.lineage.ref} holds adapters or quantised weights: merge them first")
    if first.lineage.digest != second.lineage.digest:
        raise BlendError(
            f"{what}: the models have no common ancestor: one comes from {first.lineage.ref} "
            f"({first.lineage.digest[:12]}), the other from {second.lineage.ref} ({second.lineage.digest[:12]})"
        )
    if found := diff(first.params, second.params, dtypes=False):
        raise BlendError(f"{what}: the models differ in structure: {found}")


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _minus(a: Any, b: Any) -> Any:
    if not _is_float(a):
        return jnp.zeros(jnp.shape(a), jnp.float32)
    return a.astype(jnp.float32) - b.astype(jnp.float32)


def _add(a: Any, share: float, change: Any) -> Any:
    """``a + share change`` in the dtype of ``a``; integers (counts) are those of the first model."""
    if not _is_float(a):
        return a
    return (a.astype(jnp.float32) + share * change).astype(a.dtype)


def _blended(source: Source, params: Params, note: str) -> Source:
    lineage = dataclasses.replace(source.lineage, operations=(*source.lineage.operations, note))
    return dataclasses.replace(source, params=params, lineage=lineage)
