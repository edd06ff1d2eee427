"""Terms that stay near the source: its values, its functions, its data."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.models.api import run_span
from jaxtransfer.objectives import distillation, regularisers, seen
from jaxtransfer.objectives.losses import Objective
from jaxtransfer.objectives.sums import Schedule, Term
from jaxtransfer.tree.paths import Params, flatten, unflatten
from jaxtransfer.types import AUX, View

REPLAY = "replay"
NEW = f"(head|{AUX})/.*"
"""The leaves that a source usually has not."""
_NOISE = 2**30  # no stage has this index, whose key would be the same


def l2_sp(alpha: float = 0.01, beta: float = 0.01, *, new: str = NEW, weight: float | Schedule = 1.0) -> Term:
    """`regularisers.l2_sp` of the trained leaves, a sum over parameters; ``new``: regex of those drawn anew."""

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        return regularisers.l2_sp(_trained(view), _old(_anchor(view, "l2_sp"), new), alpha, beta), {}

    return Term("l2_sp", loss, weight, anchored=True)


def ewc(name: str = "ewc", *, weight: float | Schedule = 1.0) -> Term:
    """`regularisers.quadratic` around ``constants["anchor"]`` under the importances ``constants[name]``.

    Elastic weight consolidation with `continual.fisher`, synaptic intelligence with `continual.path_importance`.
    """

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        if name not in view.constants:
            raise ValueError(f"{name}: reads importances; with_constants(frozen, {name}=fisher(...)) gives them")
        return regularisers.quadratic(_trained(view), _anchor(view, name), view.constants[name]), {}

    return Term(name, loss, weight, anchored=True)


def mixout(probability: float, *, new: str = NEW) -> Callable[[Params, Mapping[str, Any], jax.Array], Params]:
    """`regularisers.mixout` as ``make_step(perturb=...)`` takes it; ``new``: regex of leaves that are left alone."""

    def perturb(trained: Params, constants: Mapping[str, Any], key: jax.Array) -> Params:
        if "anchor" not in constants:
            raise ValueError(
                "mixout: reads the source's values; with_constants(frozen, anchor=state.params) gives them"
            )
        return regularisers.mixout(trained, _old(constants["anchor"], new), key, probability)

    return perturb


def spectral_shrinkage(layer: str, k: int = 1, *, weight: float | Schedule = 1e-3) -> Term:
    """`regularisers.spectral_shrinkage` of the features of a batch: BSS."""

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        return regularisers.spectral_shrinkage(seen.features(view, layer), k, weights=seen.weights(view)), {}

    return Term("bss", loss, weight, (layer,))


def r3f(layer: str, scale: float = 1e-5, *, weight: float | Schedule = 1.0) -> Term:
    """`distillation.symmetric_divergence` of the predictions with and without noise on the embeddings.

    Noise is uniform in ``[-scale, scale]`` at the boundary ``layer`` (Aghajanyan et al. 2021, arXiv:2008.03156). Both
    predictions are taken in evaluation mode, so that dropout is no part of the divergence, and in float32: noise of
    this size is less than half precision can tell.
    """

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        assert view.model is not None and view.key is not None
        entry = next(stage.writes[0] for stage in view.model.stages if stage.name == layer)
        params, dtype = seen.model_params(view), jnp.promote_types(view.dtype or jnp.float32, jnp.float32)
        clean = run_span(view.model, params, view.batch, None, layer, dtype=dtype)
        key = jax.random.fold_in(view.key, _NOISE)
        noise = jax.random.uniform(key, clean[entry].shape, jnp.float32, -scale, scale)
        noisy = {**clean, entry: clean[entry] + noise.astype(clean[entry].dtype)}
        first, second = (
            run_span(view.model, params, carry, layer, None, dtype=dtype)["logits"].astype(jnp.float32)
            for carry in (clean, noisy)
        )
        return distillation.symmetric_divergence(first, second, weights=seen.weights(view)), {}

    return Term("r3f", loss, weight)


def lwf(temperature: float = 2.0, *, weight: float | Schedule = 1.0) -> Term:
    """`distillation.logit_loss` to the source's own predictions on the batch: learning without forgetting.

    The source is ``constants["anchor"]`` under the frozen leaves, so its head must be the run's; where running
    statistics move, with its own as ``constants["statistics"]``.
    """

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        teacher = seen.again(view, _anchor(view, "lwf"))["logits"].astype(jnp.float32)
        return distillation.logit_loss(seen.logits(view), teacher, temperature, weights=seen.weights(view)), {}

    return Term("lwf", loss, weight, anchored=True)


def feature_distillation(layers: Sequence[str], *, weight: float | Schedule = 0.01) -> Term:
    """`distillation.feature_loss` to the source's activations at boundaries, the sum over them; as `lwf`.

    With ``constants["delta"]``, boundary -> weights (d,) of its channels (`distillation.channel_weights`), it is DELTA.
    """

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        taught = seen.again(view, _anchor(view, "feature_distillation"), capture=tuple(layers))["captured"]
        channels, apart = view.constants.get("delta", {}), jnp.zeros((), jnp.float32)
        for layer in layers:
            own, teacher = (x.astype(jnp.float32) for x in (seen.captured(view, layer), taught[layer]))
            mask, weights = seen.token_mask(view, own), seen.weights(view)
            apart += distillation.feature_loss(own, teacher, channels.get(layer), mask=mask, weights=weights)
        return apart, {}

    return Term("feature_distillation", loss, weight, tuple(layers), anchored=True)


def co_tuning(layer: str, *, weight: float | Schedule = 2.3) -> Term:
    """`distillation.soft_cross_entropy` of the source's own head, ``aux/co_tuning``, to its classes given the labels.

    You et al. 2020. ``constants["relation"]`` (C, Z) is `distillation.class_relation`; the head, linear on the features
    at ``layer``, is ``kernel`` (d, Z) and ``bias`` (Z,), put among the parameters by whoever composes the run.
    """

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        head = view.params[AUX]["co_tuning"]
        logits = seen.features(view, layer) @ head["kernel"] + head["bias"][None, :]
        taught = view.constants["relation"][view.batch["labels"]]
        return distillation.soft_cross_entropy(logits, taught, weights=seen.weights(view)), {}

    return Term("co_tuning", loss, weight, (layer,))


def replay(objective: Objective, *, weight: float | Schedule = 1.0) -> Term:
    """The task's loss on rows kept of the domain before, the batch's domain ``replay``."""

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        value, metrics = objective(view.domains[REPLAY])
        return value, {name: metric for name, metric in metrics.items() if name == "accuracy"}

    return Term("replay", loss, weight, domains=(REPLAY,))


def _trained(view: View) -> Params:
    return {name: node for name, node in view.trained.items() if name != AUX}


def _old(anchor: Params, new: str) -> Params:
    return unflatten({path: leaf for path, leaf in flatten(anchor).items() if not re.fullmatch(new, path)})


def _anchor(view: View, term: str) -> Params:
    if "anchor" not in view.constants:
        raise ValueError(
            f"{term}: reads the source's values; with_constants(frozen, anchor=state.params) gives them to the step"
        )
    return view.constants["anchor"]
