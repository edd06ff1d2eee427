"""The loss of a language model against its definition, its gradient against automatic differentiation, its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.objectives import IGNORE, cross_entropy, language_model, token_losses
from jaxtransfer.types import View

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.normal(size=(3, 5, 11)).astype(np.float32)
LABELS = RNG.integers(0, 11, (3, 5)).astype(np.int32)
LABELS[0, 3:] = LABELS[2, 0] = IGNORE
WEIGHT = np.array([1.0, 1.0, 0.0], np.float32)


def view(logits, labels=LABELS, weight=WEIGHT):
    batch = {"labels": jnp.asarray(labels), "weight": jnp.asarray(weight)}
    return View({}, {"logits": jnp.asarray(logits)}, batch, None, jnp.array(0, jnp.int32))


def naive(logits, labels):
    wide = jnp.asarray(logits, jnp.float32)
    log_z = jax.nn.logsumexp(wide, axis=-1)
    return log_z - jnp.take_along_axis(wide, labels[..., None], axis=-1)[..., 0], log_z, wide.mean(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_is_cross_entropy_over_the_tokens_that_count(smoothing):
    loss, metrics = language_model(smoothing)(view(LOGITS))
    want, others = cross_entropy(smoothing)(view(LOGITS))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert metrics.keys() == others.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, others[name], rtol=1e-6)
    assert float(metrics["weight"]) == 8


def test_z_loss():
    plain, _ = language_model()(view(LOGITS))
    loss, _ = language_model(z_loss=0.01)(view(LOGITS))
    log_z = np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))
    counts = (LABELS != IGNORE) & (WEIGHT > 0)[:, None]
    np.testing.assert_allclose(loss - plain, 0.01 * (log_z[counts] ** 2).mean(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_of_every_part(dtype):
    """By random cotangents, against automatic differentiation of the definition."""
    labels = jnp.asarray(np.where(LABELS == IGNORE, 0, LABELS))
    by = tuple(jnp.asarray(RNG.normal(size=LABELS.shape), jnp.float32) for _ in range(3))
    logits = jnp.asarray(LOGITS, dtype)
    (out, pull), (want, pull_naive) = (jax.vjp(lambda z, f=f: f(z, labels), logits) for f in (token_losses, naive))
    for found, expected in zip(out, want, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    (found,), (expected,) = pull(by), pull_naive(by)
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), atol=1e-6 if dtype == jnp.float32 else 1e-2
    )


def test_what_does_not_count_is_out_of_value_and_gradient():
    def loss(logits):
        return language_model(0.1, 1e-3)(view(logits))[0]

    spoilt = LOGITS.copy()
    spoilt[2] = np.nan
    assert float(loss(spoilt)) == float(loss(LOGITS))
    gradient = np.abs(np.asarray(jax.grad(loss)(jnp.asarray(LOGITS)))).sum(-1)
    assert ((gradient > 0) == ((LABELS != IGNORE) & (WEIGHT > 0)[:, None])).all()


def test_no_token_is_no_loss():
    loss, metrics = language_model()(view(LOGITS, np.full_like(LABELS, IGNORE)))
    assert [float(value) for value in (loss, *metrics.values())] == [0, 0, 0, 0]


def test_extreme_logits():
    losses, *_ = token_losses(jnp.array([[1e4, -1e4], [1e4, -1e4]]), jnp.array([0, 1]))
    assert losses.tolist() == [0, 2e4]


def test_memory():
    """Of arrays as large as the logits: these, their gradient, and one more. Log-softmax takes four."""
    rows, tokens, vocabulary, width = 2, 64, 4096, 16

    def taken(objective):
        def loss(hidden, kernel, labels):
            return objective(view(hidden @ kernel, labels, np.ones(rows, np.float32)))[0]

        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, tokens, width), (width, vocabulary))]
        labels = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * rows * tokens * vocabulary)

    assert taken(language_model()) < 3.1
    assert taken(language_model(0.1, 1e-4)) < 3.1
    assert taken(cross_entropy()) > 3.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing: must be in \[0, 1\)"),
        ({"z_loss": -1.0}, "z_loss: must be at least 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        language_model(**options)
