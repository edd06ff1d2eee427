"""The loss of a language model, for logits that are the largest array of a step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.models.projection import PROJECTION
from jaxtransfer.objectives.chunked import chunk_count, chunked, map_chunks
from jaxtransfer.objectives.losses import IGNORE, Objective
from jaxtransfer.types import View


@jax.custom_vjp
def token_losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of every token and what else a loss is made of, in float32.

    With ``log Z = logsumexp(z)`` the loss is ``log Z - z_label``, and its gradient ``exp(z - log Z)`` less 1 at the
    label. It is formed from the logits at once, so besides these no array of their size is kept for the backward pass:
    under automatic differentiation the softmax would be, and the label's logit scattered into an array of zeros.

    Args:
      logits: (..., V).
      labels: (...) integers in [0, V); of others neither loss nor gradient means anything.

    Returns:
      Losses (...), log Z (...), and the mean of the logits (...), which label smoothing needs.

    Example:
      >>> losses, log_z, _ = token_losses(jnp.zeros((1, 4)), jnp.array([2]))
      >>> round(float(losses[0]), 4), round(float(log_z[0]), 4)
      (1.3863, 1.3863)
    """
    wide = logits.astype(jnp.float32)
    # A comparison and not a gather, so that logits which are sharded over the vocabulary stay so.
    target = jnp.sum(jnp.where(_at(labels, logits), wide, 0.0), axis=-1)
    log_z = jax.nn.logsumexp(wide, axis=-1)
    return log_z - target, log_z, jnp.mean(wide, axis=-1)


def _forward(logits: jax.Array, labels: jax.Array) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[Any, ...]]:
    out = token_losses(logits, labels)
    return out, (logits, labels, out[1])


def _backward(kept: tuple[Any, ...], by: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    logits, labels, log_z = kept
    loss, normaliser, mean = (part[..., None] for part in by)
    probabilities = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
    gradient = probabilities * (loss + normaliser) - jnp.where(_at(labels, logits), loss, 0.0) + mean / logits.shape[-1]
    return gradient.astype(logits.dtype), None


def _at(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Where the label is: (..., V)."""
    return jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]


token_losses.defvjp(_forward, _backward)


def _first_largest(logits: jax.Array) -> jax.Array:
    """``argmax`` as two reductions, each of which stays where the vocabulary is split; XLA sends all of it for one."""
    top = logits == jnp.max(logits, axis=-1, keepdims=True)
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(top, places, logits.shape[-1]), axis=-1)


def losses_of(outputs: Mapping[str, Any], labels: jax.Array) -> jax.Array:
    """Cross-entropy of every token, (B, T), from a model's outputs, in chunks where it pays; for evaluation."""
    projection = outputs.get(PROJECTION)
    if projection is None or (count := chunk_count(projection)) == 1:
        return token_losses(outputs["logits"], labels)[0]
    return map_chunks(lambda logits, labels: token_losses(logits, labels)[0], projection, labels, count)


def losses_and_hits(outputs: Mapping[str, Any], labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `losses_of` gives, and where the likeliest token is the label, 1 or 0: (B, T) float32 both."""

    def both(logits: jax.Array, labels: jax.Array) -> jax.Array:
        hits = (_first_largest(logits) == labels).astype(jnp.float32)
        return jnp.stack([token_losses(logits, labels)[0], hits], axis=-1)

    projection = outputs.get(PROJECTION)
    if projection is None or (count := chunk_count(projection)) == 1:
        found = both(outputs["logits"], labels)
    else:
        found = map_chunks(both, projection, labels, count)
    return found[..., 0], found[..., 1]


def language_model(label_smoothing: float = 0.0, z_loss: float = 0.0, *, chunks: int | None = None) -> Objective:
    """Mean cross-entropy of the tokens that count: ``sum_i w_i CE_i / sum_i w_i``.

    The view's ``outputs["logits"]`` are (B, T, V). Its batch has ``labels`` (B, T) that are aligned with them, so that
    ``labels[:, t]`` is the token after that at t; those equal to `IGNORE` weigh nothing, the others as much as their
    row's ``weight`` (B,). Where the logits would be large, and the view has what they are a ``projection`` of, the loss
    is summed over `chunked` logits, and they never exist whole.

    Args:
      label_smoothing: s in [0, 1): ``CE = (1 - s) (log Z - z_label) + s (log Z - mean z)``.
      z_loss: c >= 0: adds ``c (log Z)^2`` to the loss of a token, which keeps the logits from drifting (Chowdhery et
        al. 2022, arXiv:2204.02311, section 5).
      chunks: the number of chunks; None is as many as pay, see `chunk_count`.

    Returns:
      An objective whose metrics are ``weight``, the number of tokens that count, ``loss`` and ``accuracy``.

    Raises:
      ValueError: an option out of range.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: must be in [0, 1), got {label_smoothing}")
    if z_loss < 0:
        raise ValueError(f"z_loss: must be at least 0, got {z_loss}")
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks: must be at least 1, got {chunks}")

    def sums(logits: jax.Array, labels: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Loss and accuracy as sums over tokens, of which those of share 0 may be no number."""
        losses, log_z, mean = token_losses(logits, labels)
        if label_smoothing:
            losses = (1.0 - label_smoothing) * losses + label_smoothing * (log_z - mean)
        if z_loss:
            losses = losses + z_loss * log_z * log_z
        hits = (_first_largest(logits) == labels).astype(jnp.float32)
        loss, accuracy = (jnp.sum(jnp.where(share > 0, values * share, 0.0)) for values in (losses, hits))
        return loss, accuracy

    def objective(view: View) -> tuple[jax.Array, dict[str, jax.Array]]:
        labels = view.batch["labels"]
        projection: Any = view.outputs.get(PROJECTION)
        weight = jnp.where(labels == IGNORE, 0.0, view.batch["weight"].astype(jnp.float32)[:, None])
        total = jnp.sum(jnp.where(weight > 0, weight, 0.0))
        share = weight / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        count = 1 if projection is None else chunks or chunk_count(projection)
        if projection is None or count == 1:
            loss, accuracy = sums(view.outputs["logits"], labels, share)
        else:
            loss, accuracy = chunked(sums, projection, labels, share, count)
        return loss, {"weight": total, "loss": loss, "accuracy": accuracy}

    return objective
