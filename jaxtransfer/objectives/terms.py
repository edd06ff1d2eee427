"""An objective as a sum of scheduled terms, each a function of the `View`; and the terms, method by method."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.models.api import apply, run_span
from jaxtransfer.objectives import adversarial, discrepancy, distillation, regularisers, seen, source_free
from jaxtransfer.objectives.losses import Objective
from jaxtransfer.objectives.rows import mean
from jaxtransfer.tree.paths import Params, flatten, unflatten
from jaxtransfer.types import AUX, TARGET, Model, View

Loss = Callable[[View], tuple[jax.Array, dict[str, Any]]]
Schedule = Callable[[jax.Array], jax.Array]
REPLAY = "replay"
NEW = f"(head|{AUX})/.*"
"""The leaves that a source usually has not."""
_NOISE = 2**30  # no stage has this index, whose key would be the same


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a term's own parameters depend on.

    Attributes:
      features: boundary -> the width d of its pooled activations.
      classes: C.
    """

    features: Mapping[str, int]
    classes: int


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of an objective.

    Attributes:
      name: names its metric, its parameters under ``aux/NAME`` and its entry in `State.terms`.
      loss: ``loss(view) -> (scalar, metrics)``, a mean over rows or a sum over parameters, as its docstring says; under
        ``metrics["state"]`` it may return a new state.
      weight: what it is multiplied by: a number, or a schedule of the step.
      capture: boundaries that it reads.
      domains: further domains that it reads.
      anchored: whether it reads ``view.constants["anchor"]``.
      aux: ``aux(model, key, shapes)``, parameters that train beside the model; None for none.
      state: ``state(shapes)``, what it carries from step to step; None for nothing.
    """

    name: str
    loss: Loss
    weight: float | Schedule = 1.0
    capture: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    anchored: bool = False
    aux: Callable[[Model, jax.Array, Shapes], Params] | None = None
    state: Callable[[Shapes], Any] | None = None


def total(objective: Objective | None, terms: Sequence[Term], *, weight: float = 1.0) -> Objective:
    """``weight * task + sum_k weight_k(step) * term_k``.

    Args:
      objective: the task's loss on the batch; None for none, as where the batch has no labels.
      terms: with different names.
      weight: of the task's loss.

    Returns:
      An objective whose metrics are the task's, each term's value by its name, and its metrics as ``NAME_metric``.
      Without a task ``metrics["weight"]`` is the number of rows.

    Raises:
      ValueError: two terms of one name, or nothing at all.

    Example:
      >>> still = Term("still", lambda view: (jnp.float32(2.0), {}), weight=0.5)
      >>> view = View({}, {}, {"weight": jnp.ones(3)}, None, jnp.array(0))
      >>> loss, metrics = total(None, [still])(view)
      >>> float(loss), float(metrics["still"]), float(metrics["weight"])
      (1.0, 2.0, 3.0)
    """
    names = [term.name for term in terms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two terms are called {twice[0]!r}; give one another name")
    if objective is None and not terms:
        raise ValueError("an objective without a task's loss needs a term")

    def summed(view: View) -> tuple[jax.Array, dict[str, Any]]:
        if objective is None:
            loss, metrics = jnp.zeros((), jnp.float32), {"weight": jnp.sum(view.batch["weight"].astype(jnp.float32))}
        else:
            loss, metrics = objective(view)
            loss, metrics = weight * loss, dict(metrics)
        states = dict(view.terms)
        for term in terms:
            if missing := [name for name in term.domains if name not in view.domains]:
                raise ValueError(f"{term.name}: reads the domain {missing[0]!r}; the batch has {_domains(view)}")
            value, own = term.loss(view)
            own = dict(own)
            if "state" in own:
                states[term.name] = own.pop("state")
            factor = term.weight(view.step) if callable(term.weight) else term.weight
            loss = loss + factor * value
            metrics |= {term.name: value, **{f"{term.name}_{name}": metric for name, metric in own.items()}}
        return loss, {**metrics, **({"terms": states} if states else {})}

    return summed


def _domains(view: View) -> str:
    return ", ".join(view.domains) or "no further domain"


def captures(terms: Sequence[Term]) -> tuple[str, ...]:
    """The boundaries that `make_step` must capture for the terms."""
    return tuple(dict.fromkeys(layer for term in terms for layer in term.capture))


def shapes_of(model: Model, params: Params, batch: Mapping[str, Any], terms: Sequence[Term]) -> Shapes:
    """The widths that the terms' own parameters depend on, from one batch, of arrays or abstract."""
    layers = captures(terms)
    found = jax.eval_shape(lambda p, b: apply(model, p, b, capture=layers), params, batch)
    return Shapes(
        {name: hidden.shape[-1] for name, hidden in found.get("captured", {}).items()},
        found["logits"].shape[-1] if "logits" in found else 0,
    )


def aux_of(terms: Sequence[Term], model: Model, key: jax.Array, shapes: Shapes) -> Params:
    """What trains beside the model, ``{"aux": {NAME: ...}}``; empty where nothing does.

    The key of a term follows from its name, so that adding one changes no other's.
    """
    made = {
        term.name: term.aux(model, jax.random.fold_in(key, zlib.crc32(term.name.encode()) >> 1), shapes)
        for term in terms
        if term.aux is not None
    }
    return {AUX: made} if made else {}


def states_of(terms: Sequence[Term], shapes: Shapes) -> Params:
    """The first `State.terms`."""
    return {term.name: term.state(shapes) for term in terms if term.state is not None}


# -- staying near the source -------------------------------------------------------------------------------------------


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


# -- domain adaptation -------------------------------------------------------------------------------------------------


def coral(layer: str, *, weight: float | Schedule = 1.0) -> Term:
    """`discrepancy.coral` between the features of the batch and of the target."""
    return _between("coral", discrepancy.coral, layer, weight)


def mmd(
    layer: str,
    scales: Sequence[float] = discrepancy.SCALES,
    *,
    unbiased: bool = False,
    weight: float | Schedule = 1.0,
) -> Term:
    """`discrepancy.mmd` between the features of the batch and of the target: DAN."""
    return _between("mmd", functools.partial(discrepancy.mmd, scales=scales, unbiased=unbiased), layer, weight)


def _between(name: str, distance: Callable[..., jax.Array], layer: str, weight: float | Schedule) -> Term:
    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        both = (view, view.domains[TARGET])
        source, target = (seen.features(rows, layer) for rows in both)
        counted = dict(zip(("source_weights", "target_weights"), map(seen.weights, both), strict=True))
        return distance(source, target, **counted), {}

    return Term(name, loss, weight, (layer,), (TARGET,))


def dann(layer: str, steps: int, *, width: int = 256, weight: float | Schedule = 1.0) -> Term:
    """A discriminator of the domains behind a reversed gradient, whose scale is `adversarial.ramp` of ``step/steps``.

    Ganin et al. 2016, arXiv:1505.07818. The discriminator learns at full rate from the start; the features feel it
    as the ramp says. ``weight`` multiplies both.
    """

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        source, target = seen.features(view, layer), seen.features(view.domains[TARGET], layer)
        return _adversarial(view, "dann", source, target, steps, seen.weights(view), seen.weights(view.domains[TARGET]))

    def aux(model: Model, key: jax.Array, shapes: Shapes) -> Params:
        return adversarial.init_discriminator(key, shapes.features[layer], width)

    return Term("dann", loss, weight, (layer,), (TARGET,), aux=aux)


def cdan(
    layer: str,
    steps: int,
    *,
    entropy: bool = True,
    random: int | None = None,
    width: int = 256,
    weight: float | Schedule = 1.0,
) -> Term:
    """As `dann`, on features conditioned by the predictions (Long et al. 2018, arXiv:1705.10667).

    Args:
      layer: the boundary of the features.
      steps: of the run, for the ramp.
      entropy: whether rows weigh by the certainty of their predictions (CDAN+E).
      random: the width of a fixed random map instead of the product ``d C``; for many classes or wide features.
      width: of the discriminator's hidden layers.
      weight: of the term.
    """

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        rows = (view, view.domains[TARGET])
        found = [(seen.features(each, layer), seen.logits(each)) for each in rows]
        if random is None:
            inputs = [adversarial.conditioned(*each) for each in found]
        else:
            inputs = [adversarial.random_map(jax.random.key(0), *each, random) for each in found]
        weights = [seen.weights(each) for each in rows]
        if entropy:
            weights = [adversarial.entropy_weights(z, weights=w) for (_, z), w in zip(found, weights, strict=True)]
        return _adversarial(view, "cdan", inputs[0], inputs[1], steps, *weights)

    def aux(model: Model, key: jax.Array, shapes: Shapes) -> Params:
        inputs = shapes.features[layer] * shapes.classes if random is None else random
        return adversarial.init_discriminator(key, inputs, width)

    return Term("cdan", loss, weight, (layer,), (TARGET,), aux=aux)


def _adversarial(
    view: View, name: str, source: jax.Array, target: jax.Array, steps: int, *weights: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    scale = adversarial.ramp(jnp.minimum(view.step.astype(jnp.float32) / steps, 1.0))
    told = [
        adversarial.discriminate(view.params[AUX][name], adversarial.reverse_gradient(x, scale))
        for x in (source, target)
    ]
    loss, accuracy = adversarial.domain_loss(*told, *weights)
    return loss, {"accuracy": accuracy}


def mcc(temperature: float = 2.5, *, weight: float | Schedule = 1.0) -> Term:
    """`discrepancy.class_confusion` of the target's predictions."""
    return _of_target("mcc", functools.partial(discrepancy.class_confusion, temperature=temperature), weight)


def entropy(*, weight: float | Schedule = 1.0) -> Term:
    """`source_free.entropy` of the target's predictions: what TENT minimises by its normalisations alone."""
    return _of_target("entropy", source_free.entropy, weight)


def information_maximisation(*, weight: float | Schedule = 1.0) -> Term:
    """`source_free.information_maximisation` of the target's predictions: the first part of SHOT."""
    return _of_target("information_maximisation", source_free.information_maximisation, weight)


def pseudo_labels(threshold: float = 0.95, *, weight: float | Schedule = 1.0) -> Term:
    """Cross-entropy of the target to its own sure predictions (Lee 2013), over the rows that are sure."""

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        rows = view.domains[TARGET]
        z, counted = seen.logits(rows), seen.weights(rows)
        labels, kept = source_free.confident_labels(z, threshold)
        share = mean(kept.astype(jnp.float32), counted)
        return source_free.pseudo_label_loss(z, labels, kept & (counted > 0)), {"kept": share}

    return Term("pseudo_labels", loss, weight, domains=(TARGET,))


def _of_target(name: str, of: Callable[..., jax.Array], weight: float | Schedule) -> Term:
    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        rows = view.domains[TARGET]
        return of(seen.logits(rows), weights=seen.weights(rows)), {}

    return Term(name, loss, weight, domains=(TARGET,))


def centroid_labels(layer: str, momentum: float = 0.95, *, weight: float | Schedule = 0.3) -> Term:
    """Cross-entropy of the target to the class of the nearest centroid: the second part of SHOT, step by step.

    Liang et al. 2020, arXiv:2002.08546, take the centroids of the whole target anew in every epoch
    (`source_free.centroid_labels`). Here sums of features by class, weighted by the predictions, are carried from step
    to step, ``S <- m S + p' f``: no pass over the target stops the training. The angle alone decides, so a class's
    centroid need not be divided by its mass.
    """

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        rows = view.domains[TARGET]
        z, f = seen.logits(rows), source_free.unit(jax.lax.stop_gradient(seen.features(rows, layer)))
        held, counted = view.terms["centroid_labels"], seen.weights(rows)
        p = counted[:, None] * jax.lax.stop_gradient(jax.nn.softmax(z, axis=-1))
        sums = momentum * held + p.T @ f
        labels = jnp.argmax(f @ source_free.normalised(sums).T, axis=-1)
        agreed = mean((labels == jnp.argmax(z, axis=-1)).astype(jnp.float32), counted)
        value = source_free.pseudo_label_loss(z, labels, counted > 0)
        return value, {"agreed": agreed, "state": sums}

    def state(shapes: Shapes) -> jax.Array:
        return jnp.zeros((shapes.classes, shapes.features[layer] + 1), jnp.float32)

    return Term("centroid_labels", loss, weight, (layer,), (TARGET,), state=state)


def mcd(objective: Objective, layer: str, *, weight: float | Schedule = 1.0) -> Term:
    """Two heads that agree on the source and differ on the target, where the features make them agree.

    `discrepancy.classifier_discrepancy` (Saito et al. 2018, arXiv:1712.02560) of the model's head and of a second one
    under ``aux/mcd``, behind a reversed gradient: the heads make it large and the features make it small in one step,
    where the paper alternates. The second head learns the task's loss on the batch as the first does.

    Args:
      objective: the task's.
      layer: the boundary before the head.
      weight: of the term.
    """

    def loss(view: View) -> tuple[jax.Array, dict[str, Any]]:
        target, second = view.domains[TARGET], view.params[AUX]["mcd"]
        hidden = adversarial.reverse_gradient(seen.captured(target, layer), 1.0)
        first, other = (seen.behind(target, layer, hidden, head) for head in (None, second))
        apart = discrepancy.classifier_discrepancy(first, other, weights=seen.weights(target))
        own = seen.behind(view, layer, seen.captured(view, layer), second)
        task, _ = objective(dataclasses.replace(view, outputs={**view.outputs, "logits": own}))
        return task - apart, {"apart": apart}

    def aux(model: Model, key: jax.Array, shapes: Shapes) -> Params:
        return next(stage for stage in model.stages if stage.name == "head").init(key)

    return Term("mcd", loss, weight, (layer,), (TARGET,), aux=aux)


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
