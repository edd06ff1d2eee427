"""Task losses: ``objective(view) -> (loss, metrics)``, where ``metrics["weight"]`` is what the mean runs over."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtransfer.types import View

Objective = Callable[[View], tuple[jax.Array, dict[str, jax.Array]]]
IGNORE = -100
"""The label of a unit that is no part of the loss, such as the second piece of a word."""


def cross_entropy(label_smoothing: float = 0.0) -> Objective:
    """Weighted mean cross-entropy: ``sum_i w_i CE_i / sum_i w_i``, over examples or over tokens, in float32.

    With smoothing s and C classes, ``CE_i = -sum_c q_c log softmax(z_i)_c`` where ``q`` is ``1 - s + s/C`` at the label
    and ``s/C`` elsewhere (label smoothing with the uniform prior: Szegedy et al. 2016, section 7).

    The view's ``outputs["logits"]`` are (B, ..., C); its batch has integer ``labels`` (B, ...), of which those equal to
    `IGNORE` weigh nothing, and ``weight`` (B,).

    Args:
      label_smoothing: s, in [0, 1).

    Returns:
      An objective whose metrics are ``weight``, ``loss`` and ``accuracy``, float32 scalars. Where nothing weighs
      anything all are 0.

    Raises:
      ValueError: ``label_smoothing`` is not in [0, 1).

    Example:
      >>> batch = {"labels": jnp.array([0, 1]), "weight": jnp.array([1.0, 0.0])}
      >>> view = View({}, {"logits": jnp.zeros((2, 2))}, batch, None, jnp.array(0))
      >>> loss, metrics = cross_entropy()(view)
      >>> round(float(loss), 4), float(metrics["weight"])
      (0.6931, 1.0)
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: must be in [0, 1), got {label_smoothing}")

    def objective(view: View) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, labels = view.outputs["logits"].astype(jnp.float32), view.batch["labels"]
        counts = labels != IGNORE
        weight = jnp.expand_dims(view.batch["weight"].astype(jnp.float32), tuple(range(1, labels.ndim)))
        weight = jnp.where(counts, weight, 0.0)
        known = jnp.where(counts, labels, 0)
        logp = jax.nn.log_softmax(logits, axis=-1)
        losses = -jnp.take_along_axis(logp, known[..., None], axis=-1)[..., 0]
        if label_smoothing:
            losses = (1.0 - label_smoothing) * losses - label_smoothing * jnp.mean(logp, axis=-1)
        hits = (jnp.argmax(logits, axis=-1) == known).astype(jnp.float32)
        total = jnp.sum(weight)
        mean = weight / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        # Rows that weigh nothing are cut out, not multiplied by 0: theirs may be no number.
        loss = jnp.sum(jnp.where(weight > 0, losses * mean, 0.0))
        return loss, {"weight": total, "loss": loss, "accuracy": jnp.sum(hits * mean)}

    return objective
