"""Cross-entropy against its definition in float64, and what must not reach it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer.objectives import IGNORE, cross_entropy
from jaxtransfer.types import View


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
