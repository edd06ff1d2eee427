"""Losses of domain adaptation: what holds exactly of each, against its equation written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtransfer.objectives import adversarial, discrepancy, distillation, regularisers, source_free

exactly = settings(max_examples=3, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def rows(seed: int, n: int = 6, d: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), jnp.float32)


def finite(tree) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


@exactly
@given(seeds)
def test_coral_is_its_equation_zero_on_equals_and_symmetric(seed):
    s, t = rows(seed), 2.0 * rows(seed + 1, 5)
    want = np.sum((np.cov(np.asarray(s, np.float64).T) - np.cov(np.asarray(t, np.float64).T)) ** 2) / (4 * 9)
    assert float(discrepancy.coral(s, t)) == pytest.approx(want, rel=1e-5)
    assert float(discrepancy.coral(t, s)) == pytest.approx(want, rel=1e-5)
    assert float(discrepancy.coral(s, s)) == 0.0
    assert finite(jax.grad(discrepancy.coral)(s, s))
    # The means play no part: another loss has a term for them.
    assert float(discrepancy.coral(s, s + 7.0)) == pytest.approx(0.0, abs=1e-9)


def kernel_mean(x: np.ndarray, y: np.ndarray, width: float, off_diagonal: bool = False) -> float:
    apart = ((x[:, None] - y[None]) ** 2).sum(-1)
    k = np.mean([np.exp(-apart / (2 * a * width)) for a in discrepancy.SCALES], axis=0)
    return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) if off_diagonal else k.mean()


@exactly
@given(seeds)
def test_mmd_is_its_equation_zero_on_equals_and_symmetric(seed):
    s, t = rows(seed), rows(seed + 1, 5) + 1.0
    x, y = np.asarray(s, np.float64), np.asarray(t, np.float64)
    both = np.concatenate([x, y])
    width = ((both[:, None] - both[None]) ** 2).sum(-1).mean()
    for unbiased in (False, True):
        want = sum(kernel_mean(z, z, width, unbiased) for z in (x, y)) - 2 * kernel_mean(x, y, width)
        assert float(discrepancy.mmd(s, t, unbiased=unbiased)) == pytest.approx(want, abs=2e-6)
    assert float(discrepancy.mmd(t, s)) == pytest.approx(float(discrepancy.mmd(s, t)), abs=1e-6)
    assert float(discrepancy.mmd(s, s)) == pytest.approx(0.0, abs=1e-6)
    assert finite(jax.grad(discrepancy.mmd)(s, s))
    assert finite(jax.grad(discrepancy.mmd)(jnp.ones((3, 2)), jnp.ones((3, 2))))


def test_the_unbiased_mmd_is_zero_in_the_mean():
    draw = jax.random.normal(jax.random.key(0), (400, 2, 8, 3))
    found = jax.vmap(lambda x: discrepancy.mmd(x[0], x[1], unbiased=True))(draw)
    assert abs(float(found.mean())) < 3 * float(found.std()) / 20
    assert float(jax.vmap(lambda x: discrepancy.mmd(x[0], x[1]))(draw).min()) >= 0  # the biased one never negative


@exactly
@given(seeds)
def test_class_confusion_is_its_equation(seed):
    z = 3.0 * rows(seed, 7, 4)
    p = np.exp(np.asarray(z, np.float64) / 2.5)
    p /= p.sum(1, keepdims=True)
    h = -(p * np.log(p)).sum(1)
    w = 7 * (1 + np.exp(-h)) / (1 + np.exp(-h)).sum()
    m = p.T @ np.diag(w) @ p
    m /= m.sum(1, keepdims=True)
    assert float(discrepancy.class_confusion(z)) == pytest.approx((m.sum() - np.trace(m)) / 4, rel=1e-5)
    assert finite(jax.grad(discrepancy.class_confusion)(1e4 * z))


@exactly
@given(seeds, st.floats(0.0, 2.0))
def test_gradient_reversal_is_the_identity_and_minus_lambda_times_the_gradient(seed, scale):
    x, w = rows(seed), rows(seed + 1, 3, 2)

    def loss(x, scale, through):
        return jnp.sum(jnp.tanh(through(x, scale) @ w) ** 2)

    plain = jax.jit(jax.grad(lambda x: loss(x, 0.0, lambda x, _: x)))(x)
    got = jax.jit(jax.grad(lambda x, s: loss(x, s, adversarial.reverse_gradient)))(x, jnp.float32(scale))
    np.testing.assert_allclose(got, -np.float32(scale) * plain, rtol=1e-6, atol=1e-7)
    assert bool((adversarial.reverse_gradient(x, scale) == x).all())


def test_the_ramp_is_that_of_both_papers():
    steps = np.array([0.1, 0.5])  # 1,000 and 5,000 of 10,000
    np.testing.assert_allclose(adversarial.ramp(steps), [0.462117, 0.986614], atol=1e-6)


def test_a_discriminator_that_tells_nothing_loses_log_two_and_one_that_learns_tells():
    zero = jnp.zeros(5)
    loss, accuracy = adversarial.domain_loss(zero, zero[:3])
    assert float(loss) == pytest.approx(np.log(2)) and float(accuracy) == 0.0
    # Both domains weigh the same, whatever their rows.
    loss, accuracy = adversarial.domain_loss(jnp.full(8, 2.0), jnp.full(2, 2.0))
    assert float(accuracy) == 0.5
    assert float(loss) == pytest.approx((np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 2, rel=1e-6)
    s, t = rows(0, 32) + 1.0, rows(1, 32) - 1.0
    params = adversarial.init_discriminator(jax.random.key(0), 3, 16)

    def total(params):
        return adversarial.domain_loss(adversarial.discriminate(params, s), adversarial.discriminate(params, t))

    @jax.jit
    def descend(params):
        return jax.tree.map(lambda w, g: w - 0.3 * g, params, jax.grad(lambda p: total(p)[0])(params))

    for _ in range(60):
        params = descend(params)
    assert float(total(params)[1]) > 0.9


def test_row_weights_of_the_domain_loss():
    z, w = jnp.array([1.0, 5.0]), jnp.array([1.0, 0.0])
    weighted = adversarial.domain_loss(z, z, w, w)[0]
    assert float(weighted) == pytest.approx(float(adversarial.domain_loss(z[:1], z[:1])[0]))


@exactly
@given(seeds)
def test_cdan_sees_the_outer_product_without_gradient_to_the_predictions(seed):
    f, z = rows(seed), rows(seed + 1, 6, 4)
    p = np.asarray(jax.nn.softmax(z, axis=-1))
    np.testing.assert_allclose(
        adversarial.conditioned(f, z), np.einsum("bi,bc->bic", f, p).reshape(6, 12), rtol=1e-5, atol=1e-7
    )
    to_features, to_logits = jax.grad(lambda f, z: jnp.sum(adversarial.conditioned(f, z) ** 2), argnums=(0, 1))(f, z)
    assert bool(jnp.any(to_features != 0)) and not bool(jnp.any(to_logits))
    weights = adversarial.entropy_weights(z)
    h = -(p * np.log(p)).sum(1)
    np.testing.assert_allclose(weights, (1 + np.exp(-h)) / (1 + np.exp(-h)).mean(), rtol=1e-5)
    assert not bool(jnp.any(jax.grad(lambda z: adversarial.entropy_weights(z)[0])(z)))


def test_the_random_map_has_the_inner_products_of_the_multilinear_one():
    f, z = rows(0, 4, 8), rows(1, 4, 3)
    exact, near = adversarial.conditioned(f, z), adversarial.random_map(jax.random.key(0), f, z, 40_000)
    want = exact @ exact.T
    np.testing.assert_allclose(near @ near.T, want, atol=0.05 * float(jnp.max(jnp.abs(want))))
    with pytest.raises(ValueError, match="100 features x 50 classes are 5000"):
        adversarial.conditioned(jnp.zeros((2, 100)), jnp.zeros((2, 50)))


@exactly
@given(seeds)
def test_information_maximisation_is_its_equation_within_its_bounds(seed):
    z = 4.0 * rows(seed, 9, 5)
    p = np.asarray(jax.nn.softmax(z.astype(jnp.float32), axis=-1), np.float64)
    h = lambda q: -(q * np.log(q)).sum(-1)  # noqa: E731
    assert float(source_free.information_maximisation(z)) == pytest.approx(h(p).mean() - h(p.mean(0)), abs=1e-5)
    assert float(source_free.entropy(z)) == pytest.approx(h(p).mean(), abs=1e-5)
    assert -np.log(5) - 1e-6 <= float(source_free.information_maximisation(z)) <= 1e-6


def test_certainty_to_the_last_bit_has_a_finite_gradient():
    z = jnp.array([[1e4, 0.0], [0.0, 1e4], [jnp.inf, 0.0]])[:2] * 1e30
    for loss in (source_free.entropy, source_free.information_maximisation):
        value, gradient = jax.value_and_grad(loss)(z)
        assert finite((value, gradient))


def test_centroid_labels_are_those_of_the_authors_two_rounds():
    f, z = rows(0, 40, 4) + 2.0 * jnp.eye(4)[jnp.arange(40) % 3], rows(1, 40, 3)
    unit = np.concatenate([f, np.ones((40, 1), np.float32)], axis=1)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    weights = np.asarray(jax.nn.softmax(z, axis=-1))
    for _ in range(2):
        centroids = weights.T @ unit / (1e-8 + weights.sum(0)[:, None])
        labels = (unit @ (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).T).argmax(1)
        weights = np.eye(3)[labels]
    np.testing.assert_array_equal(source_free.centroid_labels(f, z), labels)


def test_a_class_that_loses_all_rows_keeps_its_centroid():
    f = jnp.array([[1.0, 0.0], [1.0, 0.01]])
    found = source_free.centroid_labels(f, jnp.array([[9.0, 0.0], [9.0, 0.0]]), rounds=3)
    assert bool(((found >= 0) & (found < 2)).all())


def test_pseudo_labels_count_only_what_is_kept():
    z = jnp.array([[9.0, 0.0], [0.1, 0.0], [0.0, 9.0]])
    labels, kept = source_free.confident_labels(z)
    assert kept.tolist() == [True, False, True]
    want = np.mean([np.log1p(np.exp(-9.0))] * 2)
    assert float(source_free.pseudo_label_loss(z, labels, kept)) == pytest.approx(want, rel=1e-3)
    assert float(source_free.pseudo_label_loss(z, labels, jnp.zeros(3, bool))) == 0.0


def test_classifier_discrepancy_is_symmetric_and_within_its_bound():
    a, b = rows(0, 5, 3), rows(1, 5, 3)
    assert float(discrepancy.classifier_discrepancy(a, b)) == float(discrepancy.classifier_discrepancy(b, a))
    far = discrepancy.classifier_discrepancy(jnp.array([[99.0, 0.0]]), jnp.array([[0.0, 99.0]]))
    assert float(far) == pytest.approx(1.0)


BAD = {
    "a row has no covariance": lambda: discrepancy.coral(jnp.ones((1, 2)), jnp.ones((3, 2))),
    "a row alone": lambda: discrepancy.mmd(jnp.ones((1, 2)), jnp.ones((3, 2)), unbiased=True),
    "scales": lambda: discrepancy.mmd(jnp.ones((2, 2)), jnp.ones((3, 2)), scales=()),
    "temperature": lambda: discrepancy.class_confusion(jnp.ones((2, 2)), 0.0),
    "rounds": lambda: source_free.centroid_labels(jnp.ones((2, 2)), jnp.ones((2, 2)), 0),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_told(what):
    with pytest.raises(ValueError, match=r"at least|must be"):
        BAD[what]()


def discriminated(s, t, w=None, v=None):
    return adversarial.domain_loss(s[:, 0], t[:, 0], w, v)[0]


BY_ROWS = {
    "entropy": lambda s, t, w=None, v=None: source_free.entropy(t, weights=v),
    "information_maximisation": lambda s, t, w=None, v=None: source_free.information_maximisation(t, weights=v),
    "mcc": lambda s, t, w=None, v=None: discrepancy.class_confusion(t, weights=v),
    "mcd": lambda s, t, w=None, v=None: discrepancy.classifier_discrepancy(t, 2.0 * t, weights=v),
    "coral": lambda s, t, w=None, v=None: discrepancy.coral(s, t, source_weights=w, target_weights=v),
    "mmd": lambda s, t, w=None, v=None: discrepancy.mmd(s, t, source_weights=w, target_weights=v),
    "unbiased mmd": lambda s, t, w=None, v=None: discrepancy.mmd(
        s, t, unbiased=True, source_weights=w, target_weights=v
    ),
    "dann": discriminated,
    "cdan": lambda s, t, w=None, v=None: discriminated(
        s, t, adversarial.entropy_weights(s, weights=w), adversarial.entropy_weights(t, weights=v)
    ),
    "lwf": lambda s, t, w=None, v=None: distillation.logit_loss(t, 2.0 * t, weights=v),
    "r3f": lambda s, t, w=None, v=None: distillation.symmetric_divergence(t, 2.0 * t, weights=v),
    "distillation": lambda s, t, w=None, v=None: distillation.feature_loss(t, 2.0 * t, weights=v),
    "co-tuning": lambda s, t, w=None, v=None: distillation.soft_cross_entropy(t, jnp.abs(t), weights=v),
    "bss": lambda s, t, w=None, v=None: regularisers.spectral_shrinkage(t, 2, weights=v),
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_rows_of_padding_change_nothing(name):
    """Of any number: the value and the gradient are those of the rows that count alone."""
    loss = BY_ROWS[name]
    for n, m in ((5, 2), (2, 4)):
        s, t = rows(n, n), rows(n + 10, m) + 0.5
        wanted, slopes = jax.value_and_grad(loss, argnums=(0, 1))(s, t)
        padded = [jnp.concatenate([x, jnp.full((6 - len(x), 3), 50.0)]) for x in (s, t)]
        counted = [jnp.asarray(np.arange(6) < len(x), jnp.float32) for x in (s, t)]
        found, bent = jax.value_and_grad(loss, argnums=(0, 1))(*padded, *counted)
        assert float(found) == pytest.approx(float(wanted), rel=1e-5, abs=1e-6)
        for x, g in zip(bent, slopes, strict=True):
            np.testing.assert_allclose(x[: len(g)], g, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(x[len(g) :], 0.0, atol=1e-7)


@pytest.mark.parametrize("name", BY_ROWS)
def test_a_domain_of_padding_alone_is_nothing(name):
    s, none = rows(0), jnp.zeros(6)
    value, slopes = jax.value_and_grad(BY_ROWS[name], argnums=(0, 1))(s, s, none, none)
    assert float(value) == 0.0 and finite(slopes)
