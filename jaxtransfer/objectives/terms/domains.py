"""Terms that adapt to a domain without labels, `TARGET`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.objectives import adversarial, discrepancy, seen, source_free
from jaxtransfer.objectives.losses import Objective
from jaxtransfer.objectives.rows import mean
from jaxtransfer.objectives.sums import Schedule, Shapes, Term
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import AUX, TARGET, Model, View


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
