"""Task losses: ``objective(view) -> (loss, metrics)``, where ``metrics["weight"]`` is what the mean runs over."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxtransfer.types import View

Objective = Callable[[View], tuple[jax.Array, dict[str, jax.Array]]]
IGNORE = -100
"""The label of a unit that is no part of the loss, such as the second piece of a word."""


def cross_entropy(label_smoothing: float = 0.0, *, class_weights: Sequence[float] | None = None) -> Objective:
    """Weighted mean cross-entropy over examples or over tokens, in float32.

    With the target ``q_i`` of unit i over C classes, class weights ``w`` (1 by default) and smoothing s,
    ``loss = sum_i v_i CE_i / sum_i v_i m_i``, where ``v_i`` is the row's weight,
    ``CE_i = -sum_c w_c ((1 - s) q_ic + s/C) log softmax(z_i)_c`` (smoothing with the uniform prior: Szegedy et al.
    2016, section 7) and ``m_i = sum_c w_c q_ic``: a class's weight multiplies its examples' losses and their weight in
    the mean, as in torch's ``CrossEntropyLoss(weight=w, label_smoothing=s)``.

    The view's ``outputs["logits"]`` are (B, ..., C); its batch has ``weight`` (B,) and ``labels``: integers (B, ...),
    of which those equal to `IGNORE` weigh nothing, or targets, floats (B, ..., C), such as mixup makes.

    Args:
      label_smoothing: s, in [0, 1).
      class_weights: w, one positive number for each class; see `balanced`.

    Returns:
      An objective whose metrics are ``weight`` (``sum_i v_i m_i``), ``loss`` and ``accuracy``, weighted likewise;
      float32 scalars. Where nothing weighs anything all are 0.

    Raises:
      ValueError: ``label_smoothing`` is not in [0, 1), a weight not positive, or, when traced, weights for another
        number of classes than the model has.

    Example:
      >>> batch = {"labels": jnp.array([0, 1]), "weight": jnp.array([1.0, 0.0])}
      >>> view = View({}, {"logits": jnp.zeros((2, 2))}, batch, None, jnp.array(0))
      >>> loss, metrics = cross_entropy()(view)
      >>> round(float(loss), 4), float(metrics["weight"])
      (0.6931, 1.0)
    """
    given = _checked("class_weights", label_smoothing, class_weights)

    def objective(view: View) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, labels = view.outputs["logits"].astype(jnp.float32), view.batch["labels"]
        logp, guess = jax.nn.log_softmax(logits, axis=-1), jnp.argmax(logits, axis=-1)
        w = _per_class("class_weights", given, logits)
        if jnp.issubdtype(labels.dtype, jnp.floating):
            targets = _times(labels.astype(jnp.float32), w)
            losses, mass = -jnp.sum(targets * logp, axis=-1), jnp.sum(targets, axis=-1)
            hits, counts = _taken(targets, guess), jnp.ones_like(mass, bool)
        else:
            counts = labels != IGNORE
            known = jnp.where(counts, labels, 0)
            mass = jnp.ones(labels.shape, jnp.float32) if w is None else w[known]
            losses, hits = -mass * _taken(logp, known), mass * (guess == known).astype(jnp.float32)
        if label_smoothing:
            losses = (1.0 - label_smoothing) * losses - label_smoothing * jnp.mean(_times(logp, w), axis=-1)
        rows = jnp.expand_dims(view.batch["weight"].astype(jnp.float32), tuple(range(1, mass.ndim)))
        return weighted_mean(losses, hits, mass, jnp.where(counts, rows, 0.0))

    return objective


def binary_cross_entropy(label_smoothing: float = 0.0, *, pos_weight: Sequence[float] | None = None) -> Objective:
    """Weighted mean binary cross-entropy of several labels an example, in float32: mean over rows and labels.

    ``-(p_c y log sigmoid(z) + (1 - y) log sigmoid(-z))``, as torch's ``BCEWithLogitsLoss(pos_weight=p)``; smoothing s
    moves each target y to ``(1 - s) y + s/2``.

    The view's ``outputs["logits"]`` are (B, C); its batch has ``labels`` (B, C), floats in [0, 1], and ``weight`` (B,).

    Args:
      label_smoothing: s, in [0, 1).
      pos_weight: p, one positive number for each label: how much its presence weighs against its absence.

    Returns:
      An objective with the metrics ``weight`` (the rows'), ``loss`` and ``accuracy``, the share of decisions that are
      right at a probability of 0.5; float32 scalars.

    Raises:
      ValueError: as `cross_entropy`.

    Example:
      >>> batch = {"labels": jnp.array([[1.0, 0.0]]), "weight": jnp.array([1.0])}
      >>> loss, _ = binary_cross_entropy()(View({}, {"logits": jnp.zeros((1, 2))}, batch, None, jnp.array(0)))
      >>> round(float(loss), 4)
      0.6931
    """
    given = _checked("pos_weight", label_smoothing, pos_weight)

    def objective(view: View) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, labels = view.outputs["logits"].astype(jnp.float32), view.batch["labels"].astype(jnp.float32)
        targets = (1.0 - label_smoothing) * labels + label_smoothing / 2
        present = _times(targets, _per_class("pos_weight", given, logits)) * jax.nn.log_sigmoid(logits)
        losses = -jnp.mean(present + (1.0 - targets) * jax.nn.log_sigmoid(-logits), axis=-1)
        hits = jnp.mean(((logits > 0) == (labels > 0.5)).astype(jnp.float32), axis=-1)
        return weighted_mean(losses, hits, jnp.ones_like(losses), view.batch["weight"].astype(jnp.float32))

    return objective


def balanced(counts: Sequence[int], examples: int | None = None) -> tuple[float, ...]:
    """Weights that make up for unequal numbers of examples.

    Of one label an example, class weights ``N / (C n_c)``, under which every class weighs the same in all. With
    several, ``(N - n_c) / n_c``: a label's presence then weighs as much in all as its absence.

    Args:
      counts: n, how many examples have each label.
      examples: N, where an example may have several labels.

    Raises:
      ValueError: a label that no example has, or, of several, that all have.

    Example:
      >>> balanced([30, 10]), balanced([30, 10], examples=40)
      ((0.666..., 2.0), (0.333..., 3.0))
    """
    for c, n in enumerate(counts):
        if n < 1 or (examples is not None and n >= examples):
            raise ValueError(f"balanced: {n} training examples have label {c}, so no weight balances it")
    if examples is not None:
        return tuple((examples - n) / n for n in counts)
    return tuple(sum(counts) / (len(counts) * n) for n in counts)


def weighted_mean(
    losses: jax.Array, hits: jax.Array, mass: jax.Array, rows: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """``sum rows * losses / sum rows * mass``. What weighs nothing is cut out: it may be no number."""
    total = jnp.sum(jnp.where(rows > 0, rows * mass, 0.0))
    share = rows / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    loss, accuracy = (jnp.sum(jnp.where(rows > 0, values * share, 0.0)) for values in (losses, hits))
    return loss, {"weight": total, "loss": loss, "accuracy": accuracy}


def _taken(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _checked(name: str, label_smoothing: float, weights: Sequence[float] | None) -> tuple[float, ...] | None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: must be in [0, 1), got {label_smoothing}")
    if weights is not None and not all(0 < w < math.inf for w in weights):
        raise ValueError(f"{name}: must be positive numbers, got {list(weights)}")
    return None if weights is None else tuple(map(float, weights))


def _per_class(name: str, weights: tuple[float, ...] | None, logits: jax.Array) -> jax.Array | None:
    if weights is None:
        return None
    if len(weights) != logits.shape[-1]:
        raise ValueError(f"{name}: {len(weights)} weights, but the model has {logits.shape[-1]} classes")
    return jnp.array(weights, jnp.float32)


def _times(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """(..., C) by (C,)."""
    return values if weights is None else values * jnp.expand_dims(weights, tuple(range(values.ndim - 1)))
