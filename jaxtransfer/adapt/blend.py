"""Weight algebra: interpolation, soups, task vectors, averages of models that share an ancestor.

Models under LoRA are blended as the weights that their adapters stand for, exactly and without forming them: a mean of
products ``s a b`` is one product of the concatenated factors, so ranks add up. Over a quantised base that is the only
way; elsewhere `merge` first gives one array a weight.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.adapt.adapter_types import LoRA
from jaxtransfer.adapt.pooling import alike
from jaxtransfer.tree.diff import diff
from jaxtransfer.tree.paths import Params, flatten, unflatten
from jaxtransfer.tree.weights import SHARED, is_weight
from jaxtransfer.types import Head, Source


class BlendError(ValueError):
    """Models that cannot be blended: no common ancestor, other structures or labels, adapters that are not merged."""


def interpolate(first: Source, second: Source, alpha: float) -> Source:
    """``(1 - alpha) first + alpha second`` (WiSE-FT: Wortsman et al. 2022, arXiv:2109.01903).

    Between a model before and after fine-tuning it trades accuracy on the target for robustness; it covers the head, so
    both must end in the same one. Where a leaf is the same in both it stays so, bit for bit.

    Args:
      first: at ``alpha = 0``, returned bit for bit.
      second: at ``alpha = 1``, returned bit for bit.
      alpha: any finite number; outside [0, 1] it extrapolates.

    Raises:
      BlendError: no common ancestor, other structures or labels, adapters that are no LoRA, or ``alpha`` is not finite.

    Example:
      >>> from jaxtransfer.types import Lineage, Model
      >>> model = lambda x: Source(Model("foreign", None, (), {}), {"w": jnp.full(2, x)}, Lineage("base", "7f3a"))
      >>> interpolate(model(1.0), model(3.0), 0.25).params["w"]
      Array([1.5, 1.5], dtype=float32)
    """
    _check_finite("interpolate", {"alpha": alpha})
    check_related("interpolate", first, second)
    if alpha in (0, 1):
        params = (first, second)[int(alpha)].params
    else:
        params = _mean("interpolate", (first, second), (1 - alpha, alpha))
    return _blended(first, params, f"interpolate({alpha:g})")


def soup(sources: Sequence[Source], weights: Sequence[float] | None = None) -> Source:
    """The weighted mean of several fine-tunings of one model (model soups: Wortsman et al. 2022, arXiv:2203.05482).

    Args:
      sources: one or more.
      weights: of each; None is uniform. They are divided by their sum.

    Raises:
      BlendError: nothing to average, weights that are not finite or do not sum to a positive number, no common
        ancestor, other structures or labels, or adapters that are no LoRA.
    """
    if not sources:
        raise BlendError("soup: no models to average")
    weights = [1.0] * len(sources) if weights is None else list(weights)
    _check_finite("soup", {f"weights[{i}]": weight for i, weight in enumerate(weights)})
    if len(weights) != len(sources) or not 0 < sum(weights) < math.inf:
        raise BlendError(f"soup: {len(sources)} models need as many weights of a positive sum, got {weights}")
    for other in sources[1:]:
        check_related("soup", sources[0], other)
    shares = [weight / sum(weights) for weight in weights]

    params = _mean("soup", sources, shares)
    return _blended(sources[0], params, f"soup({', '.join(f'{share:.3g}' for share in shares)})")


def greedy_soup(sources: Sequence[Source], score: Callable[[Source], float]) -> tuple[Source, tuple[int, ...]]:
    """Adds models, the best first, as long as the mean does not get worse on held-out data (arXiv:2203.05482).

    Args:
      sources: one or more.
      score: of a model on validation data; more is better, and a model whose score is not finite is left out.

    Returns:
      The soup, and the positions of what went into it, in order.

    Raises:
      BlendError: no models, or none with a finite score; and what `soup` raises.
    """
    if not sources:
        raise BlendError("greedy_soup: no models to average")
    scores = [score(source) for source in sources]
    # Nothing compares with nan: it would come first, and no mean would be better.
    order = sorted((i for i, found in enumerate(scores) if math.isfinite(found)), key=lambda i: -scores[i])
    if not order:
        raise BlendError(f"greedy_soup: no model has a finite score, they are {', '.join(f'{x:g}' for x in scores)}")
    taken, best = [order[0]], scores[order[0]]
    for i in order[1:]:
        found = score(soup([sources[j] for j in [*taken, i]]))
        if math.isfinite(found) and found >= best:
            taken, best = [*taken, i], found
    return soup([sources[i] for i in taken]), tuple(taken)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaskVector:
    """What a fine-tuning changed (Ilharco et al. 2023, arXiv:2212.04089).

    Attributes:
      delta: the difference by path, float32.
      ancestor: the digest of the source that it is a difference from.
    """

    delta: Params
    ancestor: str = dataclasses.field(metadata={"static": True})


def task_vector(source: Source, ancestor: Source) -> TaskVector:
    """``source - ancestor``, in float32.

    Raises:
      BlendError: the ancestor is not one, the structures or labels differ (other heads), or adapters are not merged.
    """
    check_related("task_vector", source, ancestor)
    _check_plain("task_vector", source, ancestor)
    return TaskVector(jax.tree.map(_minus, source.params, ancestor.params), ancestor.lineage.digest)


def add_vectors(ancestor: Source, vectors: Mapping[str, tuple[float, TaskVector]]) -> Source:
    """``ancestor + sum_i c_i v_i``: learning several tasks by addition, forgetting one by a negative coefficient.

    Args:
      ancestor: what the vectors are differences from.
      vectors: name -> (coefficient, vector).

    Raises:
      BlendError: a vector of another ancestor or structure, a coefficient that is not finite, or adapters that are not
        merged.

    Example:
      >>> from jaxtransfer.types import Lineage, Model
      >>> model = lambda x: Source(Model("foreign", None, (), {}), {"w": jnp.full(2, x)}, Lineage("base", "7f3a"))
      >>> toxic = task_vector(model(3.0), model(1.0))
      >>> add_vectors(model(1.0), {"toxic": (-0.5, toxic)}).params["w"]
      Array([0., 0.], dtype=float32)
    """
    _check_finite("add_vectors", {f"the coefficient of {name!r}": c for name, (c, _) in vectors.items()})
    _check_plain("add_vectors", ancestor)
    params = ancestor.params
    for name, (coefficient, vector) in vectors.items():
        if vector.ancestor != ancestor.lineage.digest:
            raise BlendError(
                f"add_vectors: {name!r} is a difference from another model, {vector.ancestor[:12]}; this is "
                f"{ancestor.lineage.ref} ({ancestor.lineage.digest[:12]})"
            )
        if found := diff(params, vector.delta, dtypes=False):
            raise BlendError(f"add_vectors: {name!r} is no difference from this model: {found}")
        params = jax.tree.map(lambda p, v, c=coefficient: _add(p, c, v), params, vector.delta)
    names = ", ".join(f"{coefficient:g} {name}" for name, (coefficient, _) in vectors.items())
    return _blended(ancestor, params, f"add_vectors({names})")


def ema(average: Params, params: Params, decay: float) -> Params:
    """``decay average + (1 - decay) params``: the exponential moving average, one step of it; integers are taken over.

    Args:
      average: so far; start with the parameters themselves.
      params: now, of the same structure (canonical or laid out); adapters are averaged part by part.
      decay: in [0, 1).

    Raises:
      BlendError: ``decay`` is out of range, or the two are of other structures or shapes.

    Example:
      >>> ema({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.75)["w"]
      Array([0.25, 0.25], dtype=float32)
    """
    if not 0 <= decay < 1:
        raise BlendError(f"ema: decay must be in [0, 1), got {decay}")
    if found := diff(average, params, dtypes=False):
        raise BlendError(f"ema: the average is not of these parameters: {found}")
    return jax.tree.map(lambda a, p: _add(a, 1 - decay, _minus(p, a)) if _is_float(p) else p, average, params)


def check_related(what: str, first: Source, second: Source) -> None:
    """Two models must come from one source and be alike in structure and labels, or their mean means nothing.

    Raises:
      BlendError: they are not.
    """
    a, b = first.lineage, second.lineage
    if a.digest != b.digest or not a.digest:
        raise BlendError(
            f"{what}: the models have no common ancestor: one comes from {a.ref} ({a.digest[:12]}), the other from "
            f"{b.ref} ({b.digest[:12]})"
        )
    if found := diff(*(_shapes(source.params) for source in (first, second)), dtypes=False):
        raise BlendError(f"{what}: the models differ in structure: {found}")
    if apart := told_apart(first.model.head, second.model.head):
        raise BlendError(
            f"{what}: the models end in other heads: one in {apart[0]}, the other in {apart[1]}; tune them under one"
        )


def told_apart(first: Head | None, second: Head | None) -> tuple[str, str] | None:
    """What two heads say of themselves, where that differs: their kinds, or the labels in the order of the logits.

    Returns:
      None where they are alike as far as both say: there may be no head, and labels that are only numbered say nothing.

    Example:
      >>> head = lambda *labels: Head("stars", labels)
      >>> told_apart(head("no", "yes"), head("yes", "no"))
      ("a stars head of labels ['no', 'yes']", "a stars head of labels ['yes', 'no']")
      >>> told_apart(head("no", "yes"), head("LABEL_0", "LABEL_1"))
    """
    if first is None or second is None:
        return None
    a, b = (() if _is_numbered(head.labels) else head.labels for head in (first, second))
    if first.kind == second.kind and (a == b or not a or not b):
        return None
    return _told(first), _told(second)


def _told(head: Head) -> str:
    return f"a {head.kind} head" + (f" of labels {list(head.labels)}" if head.labels else "")


def _is_numbered(labels: Sequence[str]) -> bool:
    """Whether they are what stands for the labels where there were only so many."""
    return tuple(labels) == tuple(f"LABEL_{i}" for i in range(len(labels)))


def _check_finite(what: str, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise BlendError(f"{what}: {name} must be a finite number, got {value}")


def _shapes(params: Params) -> dict[str, jax.ShapeDtypeStruct]:
    """By path, what the weights stand for, adapted or not; what adapters share is no weight of the model."""
    flat = flatten(params, is_leaf=is_weight)
    kept = {path: leaf for path, leaf in flat.items() if not path.startswith(f"{SHARED}/")}
    return {path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for path, leaf in kept.items()}


def _check_plain(what: str, *sources: Source) -> None:
    for source in sources:
        flat = flatten(source.params, is_leaf=is_weight)
        if odd := [path for path, leaf in flat.items() if is_weight(leaf)]:
            raise BlendError(
                f"{what}: {odd[0]} of {source.lineage.ref} is {type(flat[odd[0]]).__name__}: merge them first"
            )


def _mean(what: str, sources: Sequence[Source], shares: Sequence[float]) -> Params:
    """``sum_i share_i W_i`` of every weight, where the shares sum to one."""
    flats = [flatten(source.params, is_leaf=is_weight) for source in sources]

    def mean(path: str, first: Any, *others: Any) -> Any:
        if any(map(is_weight, (first, *others))):
            return _mean_of_adapted(f"{what}: {path}", (first, *others), shares)
        # Around the first: what does not differ stays as it is.
        out = first
        for share, other in zip(shares[1:], others, strict=True):
            out = _add(out, share, _minus(other, first))
        return out

    return unflatten({path: mean(path, *(flat[path] for flat in flats)) for path in flats[0]})


def _mean_of_adapted(where: str, nodes: Sequence[Any], shares: Sequence[float]) -> Any:
    """As the shares sum to one the base stays, and ``sum_i share_i s_i a_i b_i`` is one product of wider factors."""
    first = nodes[0]
    if alike(nodes):
        return first
    factors: list[tuple[float, LoRA]] = []
    bases = []
    for node, share in zip(nodes, shares, strict=True):
        while type(node) is LoRA:
            factors.append((share, node))
            node = node.base
        bases.append(node)
    if not alike(bases):
        kinds = sorted({type(base).__name__ if is_weight(base) else "an array" for base in bases})
        raise BlendError(f"{where}: under LoRA lie different bases ({', '.join(kinds)}): merge the adapters first")
    a = jnp.concatenate([node.a for _, node in factors], axis=-1)
    b = jnp.concatenate([node.b * (node.scale * share) for share, node in factors], axis=0)
    one = jnp.ones((), jnp.float32)
    return dataclasses.replace(factors[0][1], base=bases[0], a=a, b=b, scale=one)


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
