"""Probes: exact where there is a closed form, equal to scikit-learn where there is none, refused by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from jaxtransfer import probes
from jaxtransfer.probes import ProbeError


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    return (found.data / 16).astype(np.float32), found.target


def blobs(rows=60, width=5, classes=3, apart=2.0, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    return (rng.normal(size=(rows, width)) + apart * np.eye(width)[y]).astype(np.float32), y


# --- prototypes and neighbours ---------------------------------------------------------------------------------------


def test_prototypes_are_the_class_means():
    x, y = blobs()
    found = probes.prototypes(x, y, 3)
    np.testing.assert_allclose(found, [x[y == c].mean(axis=0) for c in range(3)], rtol=1e-5, atol=1e-6)


def test_prototypes_with_one_shot_are_the_nearest_neighbour():
    x, y = blobs(rows=203, classes=3)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    bank, labels = x[:3], y[:3]
    by_prototype = probes.classify_by_prototypes(x[3:], probes.prototypes(bank, labels, 3))
    by_neighbour = probes.nearest_neighbours(x[3:], bank, labels, 3, k=1)
    np.testing.assert_array_equal(by_prototype.argmax(axis=1), by_neighbour.argmax(axis=1))
    np.testing.assert_array_equal(np.sort(by_neighbour, axis=1), np.tile([0.0, 0.0, 1.0], (200, 1)))


def test_classification_by_prototypes_is_the_softmax_of_squared_distances_far_from_the_origin_too():
    x, y = blobs()
    for shift in (0.0, 300.0):
        z, c = x + np.float32(shift), np.asarray(probes.prototypes(x, y, 3)) + np.float32(shift)
        apart = -((z[:, None].astype(np.float64) - c[None].astype(np.float64)) ** 2).sum(axis=2)
        wanted = jax.nn.log_softmax(apart.astype(np.float32), axis=1)
        np.testing.assert_allclose(probes.classify_by_prototypes(z, c), wanted, atol=1e-3 if shift else 2e-5)


def test_neighbours_vote_by_their_similarity_after_normalisation():
    bank, y = blobs(rows=12, width=4, classes=3, apart=1.0)
    z = np.array([[1.0, 2.0, 0.5, 0.1]], np.float32)
    similarity = (z / np.linalg.norm(z)) @ (bank / np.linalg.norm(bank, axis=1, keepdims=True)).T
    near = np.argsort(-similarity[0])[:5]
    votes = np.bincount(y[near], np.exp(similarity[0, near] / 0.2), minlength=3)
    found = probes.nearest_neighbours(7.0 * z, bank, y, 3, k=5, temperature=0.2)
    np.testing.assert_allclose(found[0], votes / votes.sum(), rtol=1e-5)


def test_neighbours_of_digits(digits):
    x, y = digits
    found = probes.nearest_neighbours(x[900:], x[:900], y[:900], 10, k=5)
    assert (found.argmax(axis=1) == y[900:]).mean() > 0.93
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-5)


# --- ridge -----------------------------------------------------------------------------------------------------------


def normal_equations(x, y, classes, penalty, weights):
    """The solution of the normal equations of rows with a column of ones, of which the penalty knows nothing."""
    x = np.concatenate([x.astype(np.float64), np.ones((len(x), 1))], axis=1)
    t = 2.0 * np.eye(classes)[y] - 1.0
    penalties = penalty * np.diag([1.0] * (x.shape[1] - 1) + [0.0])
    return np.linalg.solve((x.T * weights) @ x + penalties, (x.T * weights) @ t)


@pytest.mark.parametrize("rows, width", [(60, 5), (9, 20)])
def test_ridge_solves_the_normal_equations(rows, width):
    x, y = blobs(rows, width)
    weights = np.random.default_rng(1).uniform(0.2, 2.0, rows).astype(np.float32)
    weights[4] = 0.0
    for given in (None, weights):
        found = probes.ridge(x + 3.0, y, 3, 0.7, weights=given)
        wanted = normal_equations(x + 3.0, y, 3, 0.7, np.ones(rows) if given is None else given)
        np.testing.assert_allclose(found.kernel, wanted[:-1], atol=2e-5)
        np.testing.assert_allclose(found.bias, wanted[-1], atol=1e-4)


def test_ridge_is_scikit_learns(digits):
    x, y = digits
    wanted = RidgeClassifier(alpha=2.0, solver="cholesky").fit(x[:500].astype(np.float64), y[:500])
    found = probes.ridge(x[:500], y[:500], 10, 2.0)(x[500:700])
    np.testing.assert_allclose(found, wanted.decision_function(x[500:700]), atol=1e-4)


def test_ridge_without_a_penalty_is_the_least_norm_solution_where_there_are_many():
    x, y = blobs(rows=6, width=20)
    found = probes.ridge(x, y, 3, 0.0)
    np.testing.assert_allclose(found(x), 2.0 * np.eye(3)[y] - 1.0, atol=1e-4)
    centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=0)
    wanted = np.linalg.pinv(centred) @ (2.0 * np.eye(3)[y] - 2.0 / 3.0)
    np.testing.assert_allclose(found.kernel, wanted, atol=1e-4)


def test_many_heads_are_fitted_at_once():
    x, y = blobs()
    penalties = np.array([0.1, 1.0, 10.0], np.float32)
    many = jax.vmap(lambda penalty: probes.ridge(x, y, 3, penalty))(penalties)
    assert many.kernel.shape == (3, 5, 3)
    for i, penalty in enumerate(penalties):
        np.testing.assert_allclose(many.kernel[i], probes.ridge(x, y, 3, penalty).kernel, atol=1e-5)
    both = jax.vmap(lambda x, y: probes.ridge(x, y, 3, 1.0))(np.stack([x, 2 * x]), np.stack([y, (y + 1) % 3]))
    np.testing.assert_allclose(both.kernel[1], probes.ridge(2 * x, (y + 1) % 3, 3, 1.0).kernel, atol=1e-5)


# --- logistic regression ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10])
def test_logistic_regression_is_scikit_learns(digits, classes):
    x, y = digits[0][:300], digits[1][:300]
    y = y if classes == 10 else (y > 4).astype(int)
    for strength in (1e-3, 1.0, 30.0):
        wanted = LogisticRegression(C=strength, tol=1e-10, max_iter=20000).fit(x.astype(np.float64), y)
        found = probes.logistic(x, y, classes, strength, tolerance=2e-6)
        np.testing.assert_allclose(jax.nn.softmax(found(x), axis=1), wanted.predict_proba(x), atol=1e-4)
        kernel = found.kernel if classes > 2 else found.kernel[:, 1:] - found.kernel[:, :1]
        np.testing.assert_allclose(kernel.T, wanted.coef_, atol=2e-3 * np.abs(wanted.coef_).max())


def test_in_double_precision_logistic_regression_is_scikit_learns_to_many_digits(digits):
    x, y = digits[0][:200].astype(np.float64), digits[1][:200]
    wanted = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-12).fit(x, y)
    with jax.enable_x64(True):
        found = probes.logistic(x, y, 10, 1.0)
        assert found.kernel.dtype == jnp.float64
        np.testing.assert_allclose(jax.nn.softmax(found(x), axis=1), wanted.predict_proba(x), atol=1e-7)


def test_rows_of_no_weight_take_no_part():
    x, y = blobs()
    weights = np.ones(60, np.float32)
    weights[::4] = 0.0
    for probe in (probes.ridge, probes.logistic, probes.standardised(probes.ridge)):
        some, rest = probe(x, y, 3, 1.0, weights=weights), probe(x[weights > 0], y[weights > 0], 3, 1.0)
        np.testing.assert_allclose(some.kernel, rest.kernel, atol=1e-4)
        np.testing.assert_allclose(some.bias, rest.bias, atol=1e-4)


def test_standardised_is_as_a_scaler_before_the_probe():
    x, y = blobs()
    x = x * np.array([1, 10, 100, 0.1, 1], np.float32) + np.array([0, 5, -50, 3, 0], np.float32)
    x[:, 4] = 7.0  # without variance
    scaler = StandardScaler().fit(x)
    wanted = RidgeClassifier(alpha=3.0).fit(scaler.transform(x), y).decision_function(scaler.transform(x))
    found = probes.standardised(probes.ridge)(x, y, 3, 3.0)
    np.testing.assert_allclose(found(x), wanted, atol=1e-4)
    assert not np.asarray(found.kernel[4]).any()


# --- the choice of a strength ----------------------------------------------------------------------------------------


def test_folds_hold_out_as_many_of_every_class():
    y = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [23, 10, 2]))
    part = probes.folds(y, 5, seed=3)
    counts = np.array([np.bincount(part[y == c], minlength=5) for c in range(3)])
    assert (np.ptp(counts, axis=1) <= 1).all() and np.ptp(counts.sum(axis=0)) <= 1
    np.testing.assert_array_equal(part, probes.folds(y, 5, seed=3))
    assert (part != probes.folds(y, 5, seed=4)).any()


def test_the_choice_is_that_of_one_fit_after_another():
    x, y = blobs(rows=40, apart=1.0)
    strengths, part = [1e-3, 1e-1, 10.0], probes.folds(y, 4, seed=1)
    found = probes.choose(x, y, 3, strengths, count=4, seed=1)
    losses = np.zeros((3, 40))
    for i, strength in enumerate(strengths):
        for held in range(4):
            out = part == held
            fitted = LogisticRegression(C=strength, tol=1e-9, max_iter=5000).fit(x[~out], y[~out])
            losses[i, out] = -fitted.predict_log_proba(x[out])[np.arange(out.sum()), y[out]]
    np.testing.assert_allclose(found.losses, losses.mean(axis=1), rtol=1e-3)
    assert found.strength == strengths[int(losses.mean(axis=1).argmin())]


def test_of_equally_good_strengths_the_first_is_chosen():
    x, y = blobs(apart=50.0)
    found = probes.choose(x, y, 3, [10.0, 1.0, 0.1], probe=probes.ridge, loss=probes.zero_one)
    assert found == probes.Choice(10.0, (0.0, 0.0, 0.0))


# --- what is refused -------------------------------------------------------------------------------------------------

X, Y = np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1])
HASTY = functools.partial(probes.logistic, steps=1)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: probes.prototypes(X, [0, 0, 2, 2], 3), "class 1 of 3 has 0 examples, at least 1"),
        (lambda: probes.prototypes(X, [0, 0, 1], 2), r"expected \(4,\) integers, one a row, got \(3,\)"),
        (lambda: probes.prototypes(X, [0, 0, 1, 5], 2), "row 3 is 5, expected 0 to 1"),
        (lambda: probes.prototypes(X, Y, 1), "classes: 1"),
        (lambda: probes.prototypes(X[0], Y, 2), r"expected \(N, d\)"),
        (lambda: probes.prototypes(X / np.array([1, 1, np.nan, 1]), Y, 2), "row 0 of 4 is not finite"),
        (lambda: probes.classify_by_prototypes(X, X[:, :2]), "differ in width"),
        (lambda: probes.nearest_neighbours(X, X, Y, 2, k=5), "5 neighbours of 4 examples; take 1 to 4"),
        (lambda: probes.nearest_neighbours(X, X, Y, 2, k=1, temperature=0), "temperature"),
        (lambda: probes.nearest_neighbours(X, X[:, :3], Y, 2, k=1), "differ in width"),
        (lambda: probes.ridge(X, Y, 2, -1.0), "penalty: must not be negative, got -1"),
        (lambda: probes.ridge(X, Y, 2, [1.0, 2.0]), "jax.vmap fits several"),
        (lambda: probes.ridge(X, Y, 2, weights=[1.0]), r"weights: expected \(4,\)"),
        (lambda: probes.ridge(X, Y, 2)(X[:, :2]), "fitted to a width of 4"),
        (lambda: probes.logistic(X, Y, 2, 0.0), "C: must be positive, got 0"),
        (lambda: probes.logistic(X, Y, 2, 1e6, steps=3), "after 3 steps"),
        (lambda: probes.folds([0, 0, 1], 2), "class 1 has one example"),
        (lambda: probes.folds(Y, 5), "5 parts of 4 examples; take 2 to 4"),
        (lambda: probes.choose(X, Y, 2, []), "no strengths"),
        (lambda: probes.choose(X, [0, 0, 1, 1], 2, [1e-4, 1e3], probe=HASTY, count=2), "strength 1000: the gradient"),
        (lambda: probes.choose(X, [0, 1, 1, 1], 2, [1.0]), "class 0 of 2 has 1 examples, at least 2 are"),
    ],
)
def test_refused(call, words):
    with pytest.raises(ProbeError, match=words):
        call()


def test_half_precision_is_solved_in_single():
    x, y = blobs()
    half = x.astype(jnp.bfloat16)
    found = probes.ridge(half, y, 3, 1.0)
    assert found.kernel.dtype == jnp.float32
    np.testing.assert_allclose(found.kernel, probes.ridge(half.astype(np.float32), y, 3, 1.0).kernel, atol=1e-6)
