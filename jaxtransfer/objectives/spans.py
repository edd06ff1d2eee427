"""The loss of a span: where it begins and where it ends."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.objectives.losses import Objective, weighted_mean
from jaxtransfer.types import View

_NEVER = -1e30  # finite: an infinite difference has no gradient


def span_cross_entropy() -> Objective:
    """``loss = mean over rows of (CE(start) + CE(end)) / 2``, each a softmax over the tokens of the row, in float32.

    As in BERT (Devlin et al. 2019, arXiv:1810.04805, section 4.2), but that tokens of padding are in no softmax, so
    that a row's loss does not depend on its batch.

    The view's ``outputs`` are ``start_logits`` and ``end_logits`` (B, T); its batch has ``start_positions`` and
    ``end_positions`` (B,), ``attention_mask`` (B, T) and ``weight`` (B,).

    Returns:
      An objective with the metrics ``weight`` (the rows'), ``loss`` and ``accuracy``, the share of rows whose start and
      end are both the likeliest; float32 scalars.

    Example:
      >>> batch = {name: jnp.array([0]) for name in ("start_positions", "end_positions")}
      >>> batch |= {"attention_mask": jnp.array([[1, 1, 0]]), "weight": jnp.ones(1)}
      >>> view = View({}, {"start_logits": jnp.zeros((1, 3)), "end_logits": jnp.zeros((1, 3))}, batch, None, 0)
      >>> round(float(span_cross_entropy()(view)[0]), 4)
      0.6931
    """

    def objective(view: View) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses, hits = span_losses(view.outputs, view.batch)
        return weighted_mean(losses, hits, jnp.ones_like(losses), view.batch["weight"].astype(jnp.float32))

    return objective


def span_losses(outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Of each row the loss, and whether start and end are both the likeliest: (B,), (B,) float32."""
    losses, hits = [], []
    for name in ("start", "end"):
        logits = jnp.where(batch["attention_mask"] > 0, outputs[f"{name}_logits"].astype(jnp.float32), _NEVER)
        at = batch[f"{name}_positions"]
        losses.append(-jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), at[:, None], axis=-1)[:, 0])
        hits.append(jnp.argmax(logits, axis=-1) == at)
    return (losses[0] + losses[1]) / 2, (hits[0] & hits[1]).astype(jnp.float32)
