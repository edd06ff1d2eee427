"""Activations at stage boundaries, one pass over the data: what probes, scores and neighbours are computed of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.models.api import index_of, layout_of, run_span
from jaxtransfer.parallel import BATCH_AXES, gather
from jaxtransfer.tree.rules import Rules
from jaxtransfer.tree.stacks import stack
from jaxtransfer.types import Source

Pooling = Literal["mean", "first", "tokens"]
POOLINGS: tuple[Pooling, ...] = ("mean", "first", "tokens")
Batches = Iterable[Mapping[str, Any]]


class FeatureError(ValueError):
    """Features that cannot be extracted, or not be kept: what is wrong, and what to do."""


def extract(
    source: Source,
    batches: Batches,
    boundaries: Sequence[str] = (),
    *,
    pooling: Pooling = "mean",
    precision: Any = jnp.float32,
    mesh: Mesh | None = None,
    sharding: Rules = (),
) -> dict[str, Any]:
    """Activations of a frozen model at stage boundaries, in evaluation mode, in one pass over the data.

    ``mean``: ``sum_t m_t h_t / sum_t m_t`` over the tokens of ``attention_mask``, over all positions of what has none;
    ``first``: the first of these, the class token; ``tokens``: every real token, or every position of an image, by
    itself. What has no positions, (B, d), stays as it is.

    Args:
      source: a model and its parameters, canonical or laid out; stages behind the last boundary do not run.
      batches: a finite loader; rows of padding (``index`` -1, or ``weight`` 0 where there is no index) are left out.
      boundaries: names of stages; by default the last before a head that gives a hidden state.
      pooling: how positions become one row.
      precision: dtype of activations.
      mesh, sharding: where the parameters lie, as given to `load`; the features are then the same on every process.

    Returns:
      Boundary -> (N, d) float32, in the order of ``index``, or in that of the rows without one; with ``tokens``, a
      list of N arrays (T_i, d).

    Raises:
      FeatureError: no batches, an unknown pooling, or one that activations of this shape do not have.
      ValueError: a boundary that is no stage.

    Example:
      >>> from jaxtransfer.models import from_function
      >>> source = from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(2)})
      >>> extract(source, [{"inputs": np.ones((3, 2), np.float32), "weight": np.array([1, 1, 0])}])["body"].shape
      (2, 2)
    """
    if pooling not in POOLINGS:
        raise FeatureError(f"pooling: {pooling!r} is not one of {', '.join(POOLINGS)}")
    model = source.model
    names = tuple(boundaries) or (last_boundary(source),)
    stop = max(names, key=lambda name: index_of(model, name))
    params = stack(source.params, layout_of(model, source.params))

    def forward(params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        how = {"capture": names, "dtype": precision, "constrain": by_rows(mesh)}
        carry = run_span(model, gather(params, mesh, sharding) if mesh else params, batch, None, stop, **how)
        mask = batch.get("attention_mask")
        found = {name: pooled(name, carry["captured"][name], mask, pooling) for name in names}
        kept = {name: batch[name] for name in ("index", "weight") if name in batch}
        out = {"features": found, "mask": None if mask is None else mask > 0, **kept}
        return out if mesh is None else jax.lax.with_sharding_constraint(out, NamedSharding(mesh, P()))

    found = [_real(part) for part in ahead(jax.jit(forward), params, batches, mesh)]
    if not found:
        raise FeatureError("batches: there are none to extract features of; a loader without end, or one used up?")
    return _in_order(found, names, pooling)


def hidden_boundaries(source: Source) -> list[str]:
    """The stages before a head that give a hidden state, in depth order: an embedding, layers, a last norm."""
    stages = [stage for stage in source.model.stages if stage.name.split("/")[0] != "head"]
    return [stage.name for stage in stages if stage.writes[0] == "hidden"]


def last_boundary(source: Source) -> str:
    """The last stage before a head that gives a hidden state; of a model without one, its last stage."""
    return (hidden_boundaries(source) or [source.model.stages[-1].name])[-1]


def pooled(name: str, x: jax.Array, mask: Any, pooling: Pooling) -> jax.Array:
    """Activations (B, d), (B, T, d) or (B, H, W, d) as float32 rows: (B, d), or with ``tokens`` (B, positions, d)."""
    x = x.astype(jnp.float32)
    if x.ndim == 2:
        return x[:, None] if pooling == "tokens" else x
    if x.ndim not in (3, 4) or (pooling == "first" and x.ndim == 4):
        raise FeatureError(f"pooling: {name} gives activations {x.shape}, of which {pooling!r} is not defined")
    if pooling == "first" and mask is not None:
        return x[jnp.arange(len(x)), jnp.argmax(mask, axis=1)]  # behind the padding, where that is on the left
    if pooling == "first":
        return x[:, 0]
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    if pooling == "tokens":
        return flat
    if mask is None or mask.shape != flat.shape[:2]:
        return jnp.mean(flat, axis=1)
    m = mask.astype(jnp.float32)[..., None]
    return jnp.sum(flat * m, axis=1) / jnp.maximum(jnp.sum(m, axis=1), jnp.ones(()))


def ahead(
    fn: Callable[..., Any],
    params: Any,
    batches: Batches,
    mesh: Mesh | None,
    fetch: Callable[[Any], Any] = jax.device_get,
) -> Iterable[Any]:
    """``fn(params, batch)`` of every batch on the host, the next one under way while the last is read."""
    flying = None
    for batch in batches:
        made = fn(params, on_mesh(batch, mesh))
        if flying is not None:
            yield fetch(flying)
        flying = made
    if flying is not None:
        yield fetch(flying)


def on_mesh(batch: Mapping[str, Any], mesh: Mesh | None) -> Mapping[str, Any]:
    """A process's rows of a batch as global arrays, split over the mesh's batch axes; unchanged without a mesh."""
    if mesh is None:
        return dict(batch)
    where = NamedSharding(mesh, P(BATCH_AXES))
    return {name: jax.make_array_from_process_local_data(where, np.asarray(x)) for name, x in batch.items()}


def by_rows(mesh: Mesh | None) -> Callable[[jax.Array], jax.Array] | None:
    """Activations stay split by rows between stages."""
    if mesh is None:
        return None
    return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES)))


def _real(part: Mapping[str, Any]) -> dict[str, Any]:
    """A batch's rows without padding."""
    if "index" in part:
        kept = part["index"] >= 0
    else:
        rows = len(next(iter(part["features"].values())))
        kept = part.get("weight", np.ones(rows)) > 0
    return {
        "index": part["index"][kept] if "index" in part else None,
        "mask": None if part["mask"] is None else part["mask"][kept],
        "features": {name: x[kept] for name, x in part["features"].items()},
    }


def _in_order(found: Sequence[Mapping[str, Any]], names: Sequence[str], pooling: Pooling) -> dict[str, Any]:
    """All batches' rows in the order of their examples."""
    if found[0]["index"] is None:
        order = np.arange(sum(len(part["features"][names[0]]) for part in found))
    else:
        order = np.argsort(np.concatenate([part["index"] for part in found]), kind="stable")
    if pooling != "tokens":
        return {name: np.concatenate([part["features"][name] for part in found])[order] for name in names}
    out = {}
    for name in names:
        rows = [row for part in found for row in _tokens(part["features"][name], part["mask"])]
        out[name] = [rows[i] for i in order]
    return out


def _tokens(x: np.ndarray, mask: np.ndarray | None) -> list[np.ndarray]:
    """Of each row its real tokens; all positions of what is no text."""
    if mask is None or x.shape[1] == 1:
        return [row.copy() for row in x]
    return [row[real] for row, real in zip(x, mask, strict=True)]
