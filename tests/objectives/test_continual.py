"""Fisher information against its closed form, SI's path, A-GEM's inner product."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtransfer.objectives import continual, regularisers

N, D, C = 21, 3, 4


@pytest.fixture(scope="module")
def logistic():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    params = {"kernel": jnp.asarray(rng.normal(size=(D, C)), jnp.float32), "frozen": None}
    return params, {"x": x}, lambda params, row: row["x"] @ params["kernel"]


def test_the_exact_fisher_of_logistic_regression_is_the_closed_form(logistic):
    params, examples, predict = logistic
    p = np.asarray(jax.nn.softmax(examples["x"] @ params["kernel"], axis=-1), np.float64)
    x = np.asarray(examples["x"], np.float64)
    want = np.einsum("nd,nc->dc", x**2, p * (1 - p)) / N
    for chunk in (1, 8, 100):
        found = continual.fisher(predict, params, examples, chunk=chunk)
        np.testing.assert_allclose(found["kernel"], want, rtol=1e-5)
        assert found["frozen"] is None


def test_the_sampled_fisher_is_the_exact_one_in_the_mean(logistic):
    params, examples, predict = logistic
    exact = continual.fisher(predict, params, examples)["kernel"]
    many = {"x": jnp.tile(examples["x"], (60, 1))}
    sampled = continual.fisher(predict, params, many, kind="sampled", key=jax.random.key(0), chunk=210)["kernel"]
    np.testing.assert_allclose(sampled, exact, rtol=0.3)
    again = continual.fisher(predict, params, many, kind="sampled", key=jax.random.key(0), chunk=630)["kernel"]
    np.testing.assert_allclose(sampled, again, rtol=1e-4)  # the chunk changes nothing


def test_the_empirical_fisher_squares_each_examples_gradient_not_the_batchs(logistic):
    params, examples, predict = logistic
    labels = jnp.arange(N) % C
    found = continual.fisher(predict, params, examples, kind="empirical", labels=labels)["kernel"]
    residual = np.eye(C)[labels] - np.asarray(jax.nn.softmax(examples["x"] @ params["kernel"], axis=-1))
    slopes = np.einsum("nd,nc->ndc", examples["x"], residual)
    np.testing.assert_allclose(found, np.mean(slopes**2, axis=0), rtol=1e-4)
    assert float(np.mean(slopes, axis=0).__pow__(2).sum()) < 0.5 * float(found.sum())


def test_the_fisher_refuses_what_its_kind_does_not_read(logistic):
    params, examples, predict = logistic
    for given_too_much in ({"kind": "empirical"}, {"kind": "sampled"}, {"labels": jnp.zeros(N, int)}):
        with pytest.raises(ValueError, match="empirical takes labels and sampled a key"):
            continual.fisher(predict, params, examples, **given_too_much)
    with pytest.raises(ValueError, match="0 examples"):
        continual.fisher(predict, params, {"x": examples["x"][:0]})


def test_ewc_holds_what_matters():
    """Two directions, one of which the first task does not see: only that one moves to the second task's optimum."""
    x = jnp.array([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    anchor = {"w": jnp.array([0.3, 0.0])}
    importance = continual.fisher(lambda p, row: jnp.stack([row["x"] @ p["w"], 0.0]), anchor, {"x": x})

    def loss(p):
        return jnp.sum((p["w"] - 1.0) ** 2) / 2 + 100 * regularisers.quadratic(p, anchor, importance)

    p = anchor
    for _ in range(200):
        p = jax.tree.map(lambda w, g: w - 0.01 * g, p, jax.grad(loss)(p))
    assert abs(float(p["w"][0]) - 0.3) < 0.02 < 0.5 < float(p["w"][1])


def test_the_path_integral_is_the_loss_that_descent_took_away():
    centre = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}

    def loss(p):
        return sum(jnp.sum((p[k] - centre[k]) ** 2) for k in p) / 2

    tx = continual.path_integral(optax.sgd(0.01))
    start = p = jax.tree.map(jnp.zeros_like, centre)
    state = tx.init(p)

    @jax.jit
    def step(p, state):
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    for _ in range(900):
        p, state = step(p, state)
    taken = sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(state.path))
    assert taken == pytest.approx(float(loss(start) - loss(p)), rel=0.01)
    importance = continual.path_importance(state.path, p, start, damping=1e-3)
    # A quadratic loss of curvature 1 has importance 1/2 everywhere: twice the Taylor coefficient, halved.
    for leaf in jax.tree.leaves(importance):
        np.testing.assert_allclose(leaf, 0.5, rtol=0.03)
    with pytest.raises(ValueError, match="damping"):
        continual.path_importance(state.path, p, start, damping=0.0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_a_projected_gradient_never_raises_the_memorys_loss(seed):
    rng = np.random.default_rng(seed)
    g, r = (
        {"a": jnp.asarray(rng.normal(size=4), jnp.float32), "b": jnp.asarray(rng.normal(size=2), jnp.float32)}
        for _ in range(2)
    )
    found = continual.project(g, r)
    inner = float(optax.tree.vdot(found, r))
    assert inner >= -1e-5 * float(optax.tree.vdot(r, r))
    if float(optax.tree.vdot(g, r)) >= 0:
        assert all(bool((x == y).all()) for x, y in zip(*map(jax.tree.leaves, (g, found)), strict=True))
    same = continual.project(g, jax.tree.map(jnp.zeros_like, r))
    assert all(bool((x == y).all()) for x, y in zip(*map(jax.tree.leaves, (g, same)), strict=True))
