"""Gradual self-training on two Gaussians that turn: it keeps what training on the last domain alone loses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.objectives.gradual import self_train, surest

N, MEAN, NOISE = 400, 1.0, 0.4


def domain(angle, seed):
    """Two Gaussians at plus and minus a direction, and which is which."""
    rng = np.random.default_rng(seed)
    labels = np.arange(N) % 2
    at = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))]) * MEAN
    x = np.where(labels[:, None] == 1, at, -at) + NOISE * rng.standard_normal((N, 2))
    return jnp.array(x, jnp.float32), labels


def predict(w, x):
    return jnp.stack([-x @ w, x @ w], axis=1)


@jax.jit
def train(w, x, labels, kept):
    """Logistic regression, regularised, from where it stands."""

    def loss(w):
        nll = -jnp.take_along_axis(jax.nn.log_softmax(predict(w, x)), labels[:, None], axis=1)[:, 0]
        return jnp.sum(jnp.where(kept, nll, 0.0)) / jnp.sum(kept.astype(jnp.float32)) + 0.05 * w @ w

    return jax.lax.fori_loop(0, 200, lambda _, w: w - 0.5 * jax.grad(loss)(w), w)


def accuracy(w, x, labels):
    return float((np.asarray(predict(w, x)).argmax(1) == labels).mean())


@pytest.fixture(scope="module")
def source():
    x, labels = domain(0, 0)
    return train(jnp.zeros(2), x, jnp.asarray(labels), jnp.ones(N, bool))


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_a_drift_is_followed_and_a_leap_is_not(source, drop):
    turned = [domain(angle, angle) for angle in range(10, 131, 10)]
    x, labels = turned[-1]
    best = accuracy(train(jnp.zeros(2), x, jnp.asarray(labels), jnp.ones(N, bool)), x, labels)
    how = functools.partial(self_train, predict=predict, train=train, drop=drop)
    gradual = accuracy(how(source, [rows for rows, _ in turned]), x, labels)
    direct = accuracy(how(source, [x] * len(turned)), x, labels)
    assert best > 0.98
    assert gradual > best - 0.01
    assert direct < 0.1, "the same number of rounds, each surer of what is wrong"


def test_each_domain_is_learned_from_the_labels_of_the_one_before():
    """By hand: the state tells which model labelled what, in what order."""
    seen = []

    def noted(state, rows, labels, kept):
        seen.append((state, rows.tolist(), labels.tolist(), kept.tolist()))
        return state + 1

    domains = [jnp.array([-1.0, 2.0]), jnp.array([1.0, 3.0])]
    out = self_train(0, domains, lambda at, x: jnp.stack([at + 0.5 - x, x - at - 0.5], axis=1), noted, drop=0.5)
    assert out == 2
    assert seen == [(0, [-1.0, 2.0], [0, 1], [True, False]), (1, [1.0, 3.0], [0, 1], [False, True])]
    assert self_train("as it was", [], predict, train) == "as it was"


@pytest.mark.parametrize("drop, kept", [(0.0, 10), (0.1, 9), (0.15, 9), (0.3, 7), (0.95, 1)])
def test_the_least_sure_share_is_dropped(drop, kept):
    logits = jnp.array(np.random.default_rng(0).permutation(10)[:, None] * np.array([1.0, -1.0]), jnp.float32)
    labels, found = surest(logits, drop)
    assert int(found.sum()) == kept
    assert set(np.flatnonzero(found)) == set(np.argsort(-np.asarray(logits[:, 0]))[:kept])
    assert labels.tolist() == [0] * 10
    assert surest(jnp.zeros((10, 2)), drop)[1].tolist() == [True] * kept + [False] * (10 - kept)


@pytest.mark.parametrize("drop", [-0.1, 1.0])
def test_a_share_out_of_range(drop):
    with pytest.raises(ValueError, match=rf"drop: must be in \[0, 1\), got {drop}"):
        self_train(0, [], predict, train, drop=drop)
