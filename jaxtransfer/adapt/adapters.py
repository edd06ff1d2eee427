"""Makers: what rules choose for a weight, ``lora(8)`` or ``ia3()``, and what it makes of that weight."""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxtransfer.adapt.adapter_types import IA3, Adapter, DoRA, LoRA, column_norm
from jaxtransfer.adapt.vera import VeRA
from jaxtransfer.tree.weights import is_weight


class AdapterError(ValueError):
    """An adapter that does not fit its leaf, a name that is taken, or a merge that would lose something."""


class Make(Protocol):
    """``make(path, weight, key, name) -> weight``: an adapter around a weight."""

    def __call__(self, path: str, weight: Any, key: jax.Array, name: str) -> Adapter:
        """The adapter."""
        ...


def lora(rank: int, *, alpha: float | None = None, dropout: float = 0.0, rank_stabilized: bool = False) -> Make:
    """LoRA: ``W + s a b``, ``s = alpha / rank``; see :class:`~jaxtransfer.adapt.adapter_types.LoRA`.

    ``a`` is drawn from ``U(-1/sqrt(n), 1/sqrt(n))`` with n inputs and ``b`` is zero; on an embedding ``a`` is zero and
    ``b`` normal. So the function is unchanged at the start.

    Args:
      rank: r, at most the smaller side of the matrix.
      alpha: None is ``rank``, so that s is 1.
      dropout: of the adapter's input, in [0, 1).
      rank_stabilized: ``s = alpha / sqrt(rank)`` (rsLoRA).

    Raises:
      AdapterError: an option out of range.
    """
    return _low_rank(LoRA, rank, alpha, dropout, rank_stabilized)


def dora(rank: int, *, alpha: float | None = None, dropout: float = 0.0, rank_stabilized: bool = False) -> Make:
    """DoRA: LoRA on the direction of each output's weights, and a learned magnitude; arguments as `lora`."""
    return _low_rank(DoRA, rank, alpha, dropout, rank_stabilized)


def ia3(on: str = "output") -> Make:
    """(IA)3: gains on the outputs (keys, values), or on the inputs (the last linear of an MLP).

    Raises:
      AdapterError: ``on`` is neither ``"output"`` nor ``"input"``.
    """
    if on not in ("output", "input"):
        raise AdapterError(f"ia3: on must be 'output' or 'input', got {on!r}")

    def make(path: str, weight: Any, key: jax.Array, name: str) -> Adapter:
        if _kind(path, weight) == "embedding":
            raise AdapterError(f"{path}: (IA)3 is not defined on embeddings")
        width = weight.shape[-2 if on == "input" else -1]
        return IA3(weight, jnp.ones(width, jnp.float32), on, name, len(weight.shape))

    return make


def vera(rank: int, *, d: float = 0.1, dropout: float = 0.0) -> Make:
    """VeRA: trained gains around two random matrices that all layers share; see :class:`~jaxtransfer.adapt.vera.VeRA`.

    ``b`` is zero, so the function is unchanged at the start. `attach` draws the matrices once for all leaves.

    Args:
      rank: of the shared matrices; it costs one number a leaf, so it is larger than LoRA's, 256 or so.
      d: the start of the gains between the matrices.
      dropout: of the adapter's input, in [0, 1).

    Raises:
      AdapterError: an option out of range.
    """
    if rank < 1 or not 0.0 <= dropout < 1.0 or d == 0.0 or not math.isfinite(d):
        raise AdapterError(
            f"rank must be 1 or more, dropout in [0, 1), d finite and not zero; got {rank}, {dropout}, {d}"
        )

    def make(path: str, weight: Any, key: jax.Array, name: str) -> Adapter:
        if (where := _kind(path, weight)) != "dense":
            raise AdapterError(f"{path}: VeRA is defined on the kernels of linear layers, this one is of kind {where}")
        gains = jnp.full(rank, d, jnp.float32), jnp.zeros(weight.shape[-1], jnp.float32)
        return VeRA(weight, *gains, dropout, name)

    return make


def _low_rank(kind: type[LoRA], rank: int, alpha: float | None, dropout: float, stabilized: bool) -> Make:
    if rank < 1 or not 0.0 <= dropout < 1.0 or (alpha is not None and not 0 < alpha < math.inf):
        raise AdapterError(
            f"rank must be 1 or more, dropout in [0, 1), alpha positive and finite; got {rank}, {dropout}, {alpha}"
        )
    scale = (rank if alpha is None else alpha) / (rank**0.5 if stabilized else rank)

    def make(path: str, weight: Any, key: jax.Array, name: str) -> Adapter:
        where, shape = _kind(path, weight), tuple(weight.shape)
        if rank > min(shape[-2:]):
            raise AdapterError(f"{path}: rank {rank} is above the smaller side of its shape {shape}")
        if where == "embedding" and (kind is DoRA or dropout):
            raise AdapterError(f"{path}: {'DoRA' if kind is DoRA else 'dropout'} is not defined on embeddings")
        if where == "embedding":
            a = jnp.zeros((shape[0], rank), jnp.float32)
            b = jax.random.normal(key, (rank, shape[1]), jnp.float32)
        else:
            inputs = 1
            for size in shape[:-1]:
                inputs *= size
            a = jax.random.uniform(key, (*shape[:-1], rank), jnp.float32, -1.0, 1.0) * inputs**-0.5
            b = jnp.zeros((rank, shape[-1]), jnp.float32)
        s = jnp.asarray(scale, jnp.float32)
        if kind is LoRA:
            return LoRA(weight, a, b, s, dropout, name, len(shape))
        return DoRA(weight, a, b, s, dropout, name, len(shape), column_norm(weight, a, b, s))

    return make


def _kind(path: str, weight: Any) -> str:
    """``dense``, ``conv`` or ``embedding``: what a leaf is by its name and rank."""
    last, rank = path.rpartition("/")[2], len(weight.shape)
    kind = {("kernel", 2): "dense", ("kernel", 4): "conv", ("embedding", 2): "embedding"}.get((last, rank))
    if kind is None or not (is_weight(weight) or jnp.issubdtype(weight.dtype, jnp.floating)):
        raise AdapterError(
            f"{path}: a leaf of shape {tuple(weight.shape)} takes no adapter; kernels (in, out) or (h, w, in, out) and "
            "embeddings do: write a rule that ends in /kernel"
        )
    return kind
