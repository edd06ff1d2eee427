"""Regularisers and distillation: zero with a finite gradient where nothing has moved, and their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtransfer.objectives import distillation as d
from jaxtransfer.objectives import regularisers as r

exactly = settings(max_examples=3, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def tree(seed: int):
    rng = np.random.default_rng(seed)
    return {
        "blocks": {"0:2": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)},
        "norm": jnp.asarray(rng.normal(size=3), jnp.float32),
    }


def still(gradient) -> bool:
    return all(bool((leaf == 0).all()) for leaf in jax.tree.leaves(gradient))


@exactly
@given(seeds)
def test_at_the_anchor_penalties_are_zero_with_zero_gradient(seed):
    w = tree(seed)
    ones = jax.tree.map(jnp.ones_like, w)
    for penalty in (lambda p: r.l2_sp(p, w), lambda p: r.quadratic(p, w, ones)):
        value, gradient = jax.value_and_grad(penalty)(w)
        assert float(value) == 0.0 and still(gradient)


@exactly
@given(seeds)
def test_penalties_are_their_equations(seed):
    w, w0 = tree(seed), tree(seed + 1)
    leaves = [np.asarray(a, np.float64) - np.asarray(b) for a, b in zip(*map(jax.tree.leaves, (w, w0)), strict=True)]
    want = 0.3 / 2 * sum(np.sum(x**2) for x in leaves)
    assert float(r.l2_sp(w, w0, alpha=0.3)) == pytest.approx(want, rel=1e-5)
    with_head = {**w, "head": jnp.array([1.0, 2.0])}
    assert float(r.l2_sp(with_head, w0, alpha=0.3, beta=0.2)) == pytest.approx(want + 0.2 / 2 * 5, rel=1e-5)
    weights = jax.tree.map(jnp.abs, tree(seed + 2))
    want = 0.5 * sum(np.sum(np.asarray(f) * x**2) for f, x in zip(jax.tree.leaves(weights), leaves, strict=True))
    assert float(r.quadratic(w, w0, weights)) == pytest.approx(want, rel=1e-5)


def test_leaves_that_do_not_train_take_no_part():
    w = {**tree(0), "frozen": None}
    assert float(r.l2_sp(w, {**tree(0), "frozen": jnp.ones(2)})) == 0.0


def test_penalties_name_the_leaf_that_does_not_fit():
    w = tree(0)
    with pytest.raises(ValueError, match=r"norm: is \(3,\) here and \(4,\) there"):
        r.l2_sp(w, {**w, "norm": jnp.zeros(4)})
    with pytest.raises(ValueError, match="head has an importance, but is not among the parameters"):
        r.quadratic(w, w, {"head": jnp.zeros(2)})


@exactly
@given(seeds, st.floats(0.05, 0.9))
def test_mixout_keeps_the_mean_and_is_the_identity_at_zero(seed, p):
    w, w0 = tree(seed), tree(seed + 1)
    same = r.mixout(w, w0, jax.random.key(0), 0.0)
    assert all(bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (w, same)), strict=True))
    keys = jax.random.split(jax.random.key(seed), 1000)
    many = jax.vmap(lambda key: r.mixout(w, w0, key, p))(keys)
    for mean, leaf, old in zip(*map(jax.tree.leaves, (jax.tree.map(lambda x: x.mean(0), many), w, w0)), strict=True):
        spread = np.abs(leaf - old) * np.sqrt(p / (1 - p) / 1000)
        assert bool((np.abs(mean - leaf) <= 5.5 * spread + 1e-5).all())
    # Each entry is one of two: the source's share taken out, or put in.
    one = jax.tree.leaves(r.mixout(w, w0, keys[0], p))
    for got, leaf, old in zip(one, jax.tree.leaves(w), jax.tree.leaves(w0), strict=True):
        kept, gone = (leaf - p * old) / (1 - p), old
        assert bool((np.isclose(got, kept, atol=1e-4) | np.isclose(got, gone, atol=1e-4)).all())


def test_mixout_leaves_new_leaves_alone_and_its_gradient_carries_the_factor():
    w0 = tree(0)
    w = {**w0, "head": jnp.ones(2)}
    assert r.mixout(w, w0, jax.random.key(0), 0.5)["head"] is w["head"]
    g = jax.grad(lambda w: r.mixout(w, w0, jax.random.key(0), 0.5)["norm"].sum())(w)["norm"]
    assert set(np.unique(g)) <= {0.0, 2.0}
    with pytest.raises(ValueError, match="probability must be in"):
        r.mixout(w, w0, jax.random.key(0), 1.0)


@exactly
@given(seeds)
def test_spectral_shrinkage_is_the_smallest_squares_and_finite_at_equal_ones(seed):
    f = np.random.default_rng(seed).normal(size=(5, 4)).astype(np.float32)
    want = np.sum(np.linalg.svd(f.astype(np.float64), compute_uv=False)[-2:] ** 2)
    assert float(r.spectral_shrinkage(jnp.asarray(f), 2)) == pytest.approx(want, rel=1e-4)
    assert bool(jnp.isfinite(jax.grad(lambda f: r.spectral_shrinkage(f, 2))(jnp.eye(4))).all())
    with pytest.raises(ValueError, match="k must be from 1 to 4"):
        r.spectral_shrinkage(jnp.asarray(f), 5)


@exactly
@given(seeds)
def test_distillation_is_the_divergence_zero_at_the_teacher(seed):
    rng = np.random.default_rng(seed)
    s, t = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(2))
    p, q = (np.exp(np.asarray(x, np.float64) / 2) for x in (t, s))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert float(d.logit_loss(s, t)) == pytest.approx(4 * np.mean(np.sum(p * np.log(p / q), axis=1)), rel=1e-4)
    value, gradient = jax.value_and_grad(d.logit_loss)(t, t)
    assert float(value) == 0.0 and float(jnp.max(jnp.abs(gradient))) < 1e-7
    assert still(jax.grad(d.logit_loss, argnums=1)(s, t))
    assert float(d.symmetric_divergence(s, t)) == pytest.approx(float(d.symmetric_divergence(t, s)), rel=1e-5)


def test_the_gradient_of_distillation_keeps_its_size_as_the_temperature_grows():
    s, t = jnp.array([[0.1, 0.0, -0.2]]), jnp.array([[-0.1, 0.3, 0.0]])
    sizes = [float(jnp.linalg.norm(jax.grad(lambda s, T=T: d.logit_loss(s, t, T))(s))) for T in (10.0, 100.0)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_feature_distance_does_not_depend_on_the_batch_and_weighs_channels():
    s, t = jnp.ones((4, 5, 3)), jnp.zeros((4, 5, 3))
    assert float(d.feature_loss(s, t)) == float(d.feature_loss(s[:2], t[:2])) == 7.5
    assert float(d.feature_loss(s, t, jnp.array([1.0, 0.0, 0.0]))) == 2.5
    assert still(jax.grad(d.feature_loss)(s, s))


def test_channels_weigh_what_the_loss_loses_without_them():
    features = jnp.asarray(np.random.default_rng(0).normal(size=(12, 4)), jnp.float32)
    head = jnp.array([3.0, 0.0, -1.0, 0.5])

    def loss(f):
        return jnp.mean((f @ head - features @ head) ** 2)

    grown = jnp.mean((features * head[None]) ** 2, axis=0)
    np.testing.assert_allclose(d.channel_weights(loss, features, 2.0), 4 * jax.nn.softmax(grown / 2.0), rtol=1e-5)
    assert np.array_equal(d.channel_weights(lambda f: jnp.zeros(()), features), np.ones(4))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        d.channel_weights(loss, features, 0.0)


def test_co_tuning_reads_the_relation_by_label():
    rng = np.random.default_rng(0)
    theta = rng.dirichlet(np.ones(4), size=20)
    labels = np.arange(20) % 3
    relation = d.class_relation(theta, labels, 3)
    np.testing.assert_allclose(relation.sum(1), 1)
    logits = jnp.asarray(rng.normal(size=(20, 4)), jnp.float32)
    want = -np.mean(np.sum(relation[labels] * np.asarray(jax.nn.log_softmax(logits, axis=-1)), axis=1))
    got = d.soft_cross_entropy(logits, jnp.asarray(relation[labels], jnp.float32))
    assert float(got) == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match="class 3 of 4 has no example"):
        d.class_relation(theta, labels, 4)
