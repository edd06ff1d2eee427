"""What terms see of a view: features at a boundary, logits, rows that count; and how they run the model again."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.models.api import apply, index_of, run_span
from jaxtransfer.tree.partition import combine
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import AUX, Model, View


def boundary(model: Model, layer: str | None = None) -> str:
    """The boundary whose activations are a term's features: a stage's name; None is the last before the head.

    Raises:
      ValueError: no stage is called so, or None of a model without a head.
    """
    names = [stage.name for stage in model.stages]
    if layer is None:
        if "head" not in names[1:]:
            raise ValueError(f"a model without a head has no boundary before it; name one of {', '.join(names)}")
        return names[names.index("head") - 1]
    return names[index_of(model, layer)]


def features(view: View, layer: str) -> jax.Array:
    """The captured activations at a boundary as rows, (B, d) float32: means over unmasked tokens, or over positions.

    Raises:
      ValueError: the boundary was not captured.
    """
    return pooled(_captured(view, layer), view.batch)


def pooled(hidden: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Activations (B, ..., d) as rows (B, d) float32: means over unmasked tokens, or over positions."""
    hidden = hidden.astype(jnp.float32)
    mask = batch.get("attention_mask")
    if hidden.ndim == 3 and mask is not None:
        kept = mask.astype(jnp.float32)[..., None]
        return jnp.sum(hidden * kept, axis=1) / jnp.maximum(jnp.sum(kept, axis=1), 1.0)
    return jnp.mean(hidden, axis=tuple(range(1, hidden.ndim - 1))) if hidden.ndim > 2 else hidden


def logits(view: View) -> jax.Array:
    """The logits, (B, C) float32.

    Raises:
      ValueError: they are not one row an example.
    """
    found = view.outputs["logits"]
    if found.ndim != 2:
        raise ValueError(f"terms of predictions read logits (B, C), one row an example; the model gives {found.shape}")
    return found.astype(jnp.float32)


def weights(view: View) -> jax.Array:
    """The weights of the rows, (B,) float32: 0 of those of padding."""
    return view.batch["weight"].astype(jnp.float32)


def token_mask(view: View, hidden: jax.Array) -> jax.Array | None:
    """Which tokens of activations (B, T, d) are none of padding, (B, T); None of others."""
    mask = view.batch.get("attention_mask")
    return mask if mask is not None and hidden.ndim == 3 and mask.shape == hidden.shape[:2] else None


def behind(view: View, layer: str, hidden: jax.Array, head: Params | None = None) -> jax.Array:
    """The logits (B, C) of other activations at a boundary, in evaluation mode; under another head where one is given.

    Args:
      view: of the rows.
      layer: the boundary.
      hidden: what stands there instead of the captured activations.
      head: parameters like the model's own.
    """
    model = _model(view)
    stage = model.stages[index_of(model, layer)]
    params = model_params(view) if head is None else {**model_params(view), "head": head}
    carry = {**view.batch, stage.writes[0]: hidden}
    return run_span(model, params, carry, layer, None, dtype=view.dtype)["logits"].astype(jnp.float32)


def again(view: View, trained: Params, *, capture: tuple[str, ...] = ()) -> dict[str, Any]:
    """The outputs of the rows under other values of the trained leaves, in evaluation mode: a teacher's.

    Raises:
      ValueError: running statistics move, and ``view.constants["statistics"]`` does not say what the teacher's are.
    """
    model = _model(view)
    params = _swapped(view.params, {name: node for name, node in trained.items() if name != AUX})
    if view.outputs.get("stats"):
        if "statistics" not in view.constants:
            raise ValueError(
                "the model's running statistics move, and with them a teacher that has none of its own; "
                "with_constants(frozen, anchor=state.params, statistics=state.stats) gives it those of the start"
            )
        params = _swapped(params, view.constants["statistics"])
    return apply(model, params, view.batch, capture=capture, dtype=view.dtype)


def model_params(view: View) -> Params:
    """The parameters of the model alone."""
    return {name: node for name, node in view.params.items() if name != AUX}


def _swapped(params: Params, trained: Params) -> Params:
    """The model's parameters with other values where there are any."""
    own = {name: node for name, node in params.items() if name != AUX}
    held = jax.tree.map(lambda new, old: old if new is None else None, trained, own, is_leaf=lambda x: x is None)
    return combine(trained, held)


def _captured(view: View, layer: str) -> jax.Array:
    found = view.outputs.get("captured", {})
    if layer not in found:
        raise ValueError(f"{layer}: is not captured; make_step(..., capture=[{layer!r}]) shows it to the objective")
    return found[layer]


def captured(view: View, layer: str) -> jax.Array:
    """The activations at a boundary as they are."""
    return _captured(view, layer)


def _model(view: View) -> Model:
    if view.model is None:
        raise ValueError("this term runs the model again, and the view has none; views of make_step do")
    return view.model
