"""Losses against their definitions in float64 and against torch, and what must not reach them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer.objectives import IGNORE, balanced, binary_cross_entropy, cross_entropy
from jaxtransfer.types import View
from tests.models.zoo import assert_close


def view(logits, labels, weight):
    batch = {"labels": jnp.asarray(labels, jnp.int32), "weight": jnp.asarray(weight, jnp.float32)}
    return View({}, {"logits": jnp.asarray(logits)}, batch, None, jnp.array(0, jnp.int32))


def expected(logits, labels, weight, smoothing):
    logits = np.asarray(logits, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    q = np.full(logits.shape, smoothing / logits.shape[-1])
    np.put_along_axis(q, np.asarray(labels)[..., None], 1 - smoothing + smoothing / logits.shape[-1], -1)
    return np.average(-(q * logp).sum(-1), weights=weight)


LOGITS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
LABELS = np.array([0, 2, 1, 1, 0])
WEIGHT = np.array([1, 1, 0.5, 0, 1], np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_mean(smoothing):
    loss, metrics = cross_entropy(smoothing)(view(LOGITS, LABELS, WEIGHT))
    np.testing.assert_allclose(loss, expected(LOGITS, LABELS, WEIGHT, smoothing), rtol=1e-6)
    hits = np.average(LOGITS.argmax(-1) == LABELS, weights=WEIGHT)
    np.testing.assert_allclose(metrics["accuracy"], hits, rtol=1e-6)
    assert (float(metrics["weight"]), float(metrics["loss"])) == (3.5, float(loss))


def test_smoothing_is_optax_smoothing():
    loss, _ = cross_entropy(0.2)(view(LOGITS, LABELS, np.ones(5)))
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 3), 0.2)
    np.testing.assert_allclose(loss, optax.softmax_cross_entropy(LOGITS, targets).mean(), rtol=1e-6)


def test_float32_whatever_the_logits():
    low = jnp.asarray(LOGITS, jnp.bfloat16)
    loss, metrics = cross_entropy()(view(low, LABELS, WEIGHT))
    assert {str(value.dtype) for value in (loss, *metrics.values())} == {"float32"}
    np.testing.assert_allclose(loss, expected(low.astype(jnp.float32), LABELS, WEIGHT, 0.0), rtol=1e-6)


def test_padding_rows_are_out_of_value_and_gradient():
    """Even where their logits are no numbers."""

    def loss(logits, weight):
        return cross_entropy(0.1)(view(logits, LABELS, weight))[0]

    spoilt = LOGITS.copy()
    spoilt[3] = np.nan
    assert float(loss(spoilt, WEIGHT)) == float(loss(LOGITS, WEIGHT))
    gradient = jax.grad(loss)(jnp.asarray(LOGITS), WEIGHT)
    assert (np.asarray(gradient[3]) == 0).all()
    assert np.abs(np.asarray(gradient[0])).sum() > 0


def test_no_weight_is_no_loss():
    loss, metrics = cross_entropy()(view(LOGITS, LABELS, np.zeros(5)))
    assert [float(value) for value in (loss, *metrics.values())] == [0, 0, 0, 0]


def test_microbatches_add_up():
    whole, _ = cross_entropy()(view(LOGITS, LABELS, WEIGHT))
    parts = [cross_entropy()(view(LOGITS[s], LABELS[s], WEIGHT[s])) for s in (slice(0, 2), slice(2, 5))]
    mean = sum(float(loss * m["weight"]) for loss, m in parts) / sum(float(m["weight"]) for _, m in parts)
    np.testing.assert_allclose(mean, whole, rtol=1e-6)


def test_tokens_with_ignored_ones():
    logits = np.stack([LOGITS, LOGITS[::-1]])
    labels = np.stack([LABELS, LABELS])
    labels[0, 3:] = IGNORE
    weight = np.array([1.0, 0.5])
    loss, metrics = cross_entropy()(view(logits, labels, weight))
    each = np.where(labels == IGNORE, 0.0, weight[:, None])
    want = expected(logits, np.where(labels == IGNORE, 0, labels), each, 0.0)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert float(metrics["weight"]) == each.sum()


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing: must be in \[0, 1\)"):
        cross_entropy(smoothing)


CLASSES = [0.5, 2.0, 3.0]
SOFT = np.random.default_rng(1).dirichlet(np.ones(3), 5).astype(np.float32)
MANY = np.random.default_rng(2).integers(0, 2, (5, 3)).astype(np.float32)


def soft_view(logits, labels, weight):
    batch = {"labels": jnp.asarray(labels), "weight": jnp.asarray(weight, jnp.float32)}
    return View({}, {"logits": jnp.asarray(logits)}, batch, None, jnp.array(0, jnp.int32))


@pytest.mark.parametrize("weights", [None, CLASSES])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_that_are_one_hot_are_labels(smoothing, weights):
    objective = cross_entropy(smoothing, class_weights=weights)
    loss, metrics = objective(view(LOGITS, LABELS, WEIGHT))
    soft, others = objective(soft_view(LOGITS, np.eye(3, dtype=np.float32)[LABELS], WEIGHT))
    np.testing.assert_allclose(soft, loss, rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-6, err_msg=name)


def test_soft_targets_by_the_definition():
    w, v = np.array(CLASSES), WEIGHT.astype(np.float64)
    logits = LOGITS.astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -(v[:, None] * w * SOFT * logp).sum() / (v[:, None] * w * SOFT).sum()
    loss, metrics = cross_entropy(class_weights=CLASSES)(soft_view(LOGITS, SOFT, WEIGHT))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], (v[:, None] * w * SOFT).sum(), rtol=1e-6)


@pytest.mark.parametrize("targets", [LABELS, SOFT])
def test_microbatches_of_weighted_classes_add_up(targets):
    objective, make = cross_entropy(0.1, class_weights=CLASSES), view if targets is LABELS else soft_view
    whole, together = objective(make(LOGITS, targets, WEIGHT))
    parts = [objective(make(LOGITS[s], targets[s], WEIGHT[s]))[1] for s in (slice(0, 2), slice(2, 5))]
    total = sum(float(part["weight"]) for part in parts)
    for name, value in {"loss": whole, "accuracy": together["accuracy"]}.items():
        mean = sum(float(part[name]) * float(part["weight"]) for part in parts) / total
        np.testing.assert_allclose(mean, value, rtol=1e-6, err_msg=name)


def test_balanced_classes_weigh_alike():
    counts = np.bincount(LABELS)
    weights = balanced(counts.tolist())
    np.testing.assert_allclose(counts * weights, np.full(3, 5 / 3))
    _, metrics = cross_entropy(class_weights=weights)(view(LOGITS, LABELS, np.ones(5)))
    recalls = [np.mean(LOGITS.argmax(-1)[LABELS == c] == c) for c in range(3)]
    np.testing.assert_allclose(metrics["accuracy"], np.mean(recalls), rtol=1e-6)


@pytest.mark.parametrize(("counts", "examples"), [([3, 0], None), ([3, 4], 4)])
def test_what_cannot_be_balanced(counts, examples):
    with pytest.raises(ValueError, match=r"balanced: \d training examples have label 1, so no weight balances it"):
        balanced(counts, examples)


def test_binary_cross_entropy_by_the_definition():
    p, v = np.array(CLASSES), WEIGHT.astype(np.float64)
    for smoothing in (0.0, 0.2):
        sigma = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
        y = (1 - smoothing) * MANY + smoothing / 2
        want = np.average(-(p * y * np.log(sigma) + (1 - y) * np.log(1 - sigma)).mean(-1), weights=v)
        loss, metrics = binary_cross_entropy(smoothing, pos_weight=CLASSES)(soft_view(LOGITS, MANY, WEIGHT))
        np.testing.assert_allclose(loss, want, rtol=1e-6)
    right = np.average(((LOGITS > 0) == (MANY > 0.5)).mean(-1), weights=v)
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)
    assert float(metrics["weight"]) == 3.5


def test_binary_cross_entropy_keeps_padding_out():
    def loss(logits):
        return binary_cross_entropy()(soft_view(logits, MANY, WEIGHT))[0]

    spoilt = jnp.asarray(LOGITS).at[3].set(jnp.inf)
    assert float(loss(spoilt)) == float(loss(LOGITS))
    assert (np.asarray(jax.grad(loss)(jnp.asarray(LOGITS))[3]) == 0).all()


@pytest.mark.parametrize(
    "objective", [lambda w: cross_entropy(class_weights=w), lambda w: binary_cross_entropy(pos_weight=w)]
)
def test_weights_that_do_not_fit(objective):
    for bad in ([1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, float("inf"), 1.0]):
        with pytest.raises(ValueError, match=r"weights?: must be positive numbers"):
            objective(bad)
    with pytest.raises(ValueError, match=r"weights?: 2 weights, but the model has 3 classes"):
        objective([1.0, 2.0])(soft_view(LOGITS, MANY, WEIGHT))


def theirs(make, labels):
    """Loss and gradient of a torch loss at `LOGITS`."""
    import torch

    logits = torch.tensor(LOGITS, requires_grad=True)
    loss = make(torch)(logits, torch.tensor(labels))
    loss.backward()
    return loss.item(), logits.grad.numpy()


def ours(objective, labels):
    def loss(logits):
        return objective(soft_view(logits, labels, np.ones(5)))[0]

    return jax.value_and_grad(loss)(jnp.asarray(LOGITS))


@pytest.mark.torch
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, CLASSES])
def test_cross_entropy_is_torchs(smoothing, weights):
    def make(torch):
        weight = None if weights is None else torch.tensor(weights)
        return torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)

    got = ours(cross_entropy(smoothing, class_weights=weights), LABELS)
    want = theirs(make, LABELS)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert_close(got[1], want[1])


@pytest.mark.torch
def test_soft_cross_entropy_is_torchs():
    got, want = (
        ours(cross_entropy(0.1), SOFT),
        theirs(lambda torch: torch.nn.CrossEntropyLoss(label_smoothing=0.1), SOFT),
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert_close(got[1], want[1])


@pytest.mark.torch
@pytest.mark.parametrize("weights", [None, CLASSES])
def test_binary_cross_entropy_is_torchs(weights):
    def make(torch):
        return torch.nn.BCEWithLogitsLoss(pos_weight=None if weights is None else torch.tensor(weights))

    got, want = ours(binary_cross_entropy(pos_weight=weights), MANY), theirs(make, MANY)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert_close(got[1], want[1])
