"""Scores of sources: the published implementations' values on the digits, and what must hold of every one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtransfer import scores
from jaxtransfer.scores.features import ledoit_wolf

OF_FEATURES = {
    "logme": scores.logme,
    "h_score": scores.h_score,
    "transrate": scores.transrate,
    "gbc": scores.gbc,
    "parc": scores.parc,
    "knn": scores.knn,
}
OF_PROBABILITIES = {"leep": scores.leep, "nce": scores.nce}


@pytest.fixture(scope="module")
def digits():
    """Features, labels, permuted labels, and predictions of five classes by a random linear map."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x = x / 16
    logits = x @ np.random.default_rng(0).normal(size=(64, 5))
    theta = np.exp(logits - logits.max(axis=1, keepdims=True))
    return x, y, np.random.default_rng(1).permutation(y), theta / theta.sum(axis=1, keepdims=True)


def test_values_of_the_public_implementations(digits):
    x, y, permuted, theta = digits
    found = {
        "LogME": (scores.logme(x, y), 0.270278),
        "LogME permuted": (scores.logme(x, permuted), -0.219329),
        "H-score": (scores.h_score(x, y, shrink=False), 5.917909),
        "H-score shrunk": (scores.h_score(x, y), 5.851433),
        "LEEP": (scores.leep(theta, y), -1.944482),
        "LEEP permuted": (scores.leep(theta, permuted), -2.299763),
        "NCE": (scores.nce(theta, y), -1.899339),
        "TransRate": (scores.transrate(x, y), 29.828333),
        "1-NN": (scores.knn(x, y), 0.988314),
    }
    assert {name: round(ours, 6) for name, (ours, _) in found.items()} == {k: v for k, (_, v) in found.items()}


def test_parc_is_spearmans_correlation_and_the_published_number_splits_ties_by_rounding(digits):
    from scipy.stats import spearmanr

    x, y = digits[0][:500], digits[1][:500]
    scale = x.std(axis=0)
    alike = 1 - np.corrcoef((x - x.mean(axis=0)) / np.where(scale > 0, scale, 1))
    pairs = np.triu_indices(500, 1)
    by_correlation = (1 - np.corrcoef(np.eye(10)[y]))[pairs]
    assert len(np.unique(by_correlation)) > 2  # where there should be two
    assert 100 * spearmanr(alike[pairs], by_correlation)[0] == pytest.approx(41.668687, abs=0.02)
    assert scores.parc(x, y) == pytest.approx(100 * spearmanr(alike[pairs], np.round(by_correlation, 9))[0], abs=1e-9)


def test_ledoit_wolf_is_scikit_learns(digits):
    covariance = pytest.importorskip("sklearn.covariance")
    for rows in (40, 500):
        x = digits[0][:rows]
        ours, share = ledoit_wolf(x - x.mean(axis=0))
        theirs = covariance.LedoitWolf().fit(x)
        assert share == pytest.approx(theirs.shrinkage_, rel=1e-12)
        np.testing.assert_allclose(ours, theirs.covariance_, atol=1e-15)


def test_of_equal_classes_the_one_with_the_nearest_wins():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 2)), rng.integers(0, 4, 200)
    apart = ((x[:, None] - x[None]) ** 2).sum(-1)
    np.fill_diagonal(apart, np.inf)
    for k in (4, 5, 8):
        hits = []
        for i, row in enumerate(np.argsort(apart, axis=1)[:, :k]):
            votes = np.bincount(y[row], minlength=4)
            hits.append(next(y[j] for j in row if votes[y[j]] == votes.max()) == y[i])
        assert scores.knn(x, y, k=k) == np.mean(hits)


def test_knn_is_scikit_learns(digits):
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = digits[0][:300], digits[1][:300]
    for k in (1, 5):
        index = neighbors.NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x, return_distance=False)[:, 1:]
        votes = [np.bincount(y[row], minlength=10) for row in index]
        tied = [np.sum(v == v.max()) > 1 for v in votes]
        want = [v.argmax() == label for v, label in zip(votes, y, strict=True)]
        got = scores.knn(x, y, k=k)
        assert np.mean(want) - np.mean(tied) <= got <= np.mean(want) + np.mean(tied)
        if k == 1:
            assert got == np.mean(want)


def _task(seed: int, classes: int, apart: float):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(90) % classes)
    return rng.normal(size=(90, 6)) + apart * rng.normal(size=(classes, 6))[y], y


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(2, 5))
def test_permuted_labels_score_less_and_bounds_hold(seed, classes):
    f, y = _task(seed, classes, 4.0)
    mixed = np.random.default_rng(seed + 1).permutation(y)
    theta = np.exp(f - f.max(axis=1, keepdims=True))
    theta /= theta.sum(axis=1, keepdims=True)
    for name, score in OF_FEATURES.items():
        if name != "transrate" or classes > 3:  # blind to two classes opposite each other
            assert score(f, y) > score(f, mixed), name
    for name, score in OF_PROBABILITIES.items():
        assert score(theta, mixed) < score(theta, y) <= 0, name
    assert scores.h_score(f, y, shrink=False) <= classes - 1 + 1e-9
    assert -100 <= scores.parc(f, y) <= 100 and 0 <= scores.knn(f, y, k=3) <= 1 and scores.gbc(f, y) <= 0


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_neither_the_order_of_rows_nor_the_classes_numbers_matter(seed):
    f, y = _task(seed, 3, 2.0)
    theta = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
    order = np.random.default_rng(seed).permutation(len(y))
    for name, score in {**OF_FEATURES, **OF_PROBABILITIES}.items():
        values = theta if name in OF_PROBABILITIES else f
        assert score(values[order], 7 - 2 * y[order]) == pytest.approx(score(values, y), rel=1e-9), name


def test_transrate_sees_nothing_of_two_classes_opposite_each_other():
    half = np.random.default_rng(0).normal(size=(45, 6)) + 4.0
    assert scores.transrate(np.concatenate([half, -half]), np.repeat([0, 1], 45)) == pytest.approx(0.0, abs=1e-9)


def test_rotations_change_none_but_parc_and_the_diagonal():
    f, y = _task(0, 3, 2.0)
    q = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0]
    for name in ("logme", "h_score", "transrate", "knn"):
        assert OF_FEATURES[name](f @ q, y) == pytest.approx(OF_FEATURES[name](f, y), rel=1e-9), name
    # Diagonal on principal components, so rotated back first.
    assert scores.gbc(f @ q, y) == pytest.approx(scores.gbc(f, y), rel=1e-9)


def test_more_columns_than_rows():
    rng = np.random.default_rng(0)
    y = np.arange(24) % 3
    f = rng.normal(size=(24, 100)) + 3 * np.eye(100)[y]
    wide = np.concatenate([f, np.zeros((24, 50))], axis=1)
    for name in ("transrate", "knn", "gbc"):
        assert OF_FEATURES[name](wide, y) == pytest.approx(OF_FEATURES[name](f, y), rel=1e-9), name
    assert np.isfinite([scores.logme(wide, y), scores.h_score(wide, y)]).all()


def test_gbc_of_two_gaussians_in_closed_form():
    f = np.array([[-1.0], [1.0], [3.0], [5.0]])
    # Means 0 and 4, variances 1: D_B = 16 / 8.
    assert scores.gbc(f, [0, 0, 1, 1], components=None) == pytest.approx(-2 * np.exp(-2.0))
    assert scores.gbc(f, [0, 0, 1, 1], components=None, spherical=True) == pytest.approx(-2 * np.exp(-2.0))


def test_a_source_class_that_is_never_predicted_takes_no_part():
    theta = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    assert scores.leep(theta, [0, 1]) == scores.leep(theta[:, :2], [0, 1])
    assert np.isfinite(scores.nce(theta, [0, 1]))


BAD = {
    "shapes": ((np.zeros((3, 2)), [0, 1]), r"features must be \(N, D\).*\(3, 2\) and \(2,\)"),
    "one class": ((np.zeros((2, 2)), [1, 1]), "2 rows of 1 class"),
    "floats": ((np.zeros((2, 2)), [0.0, 1.0]), "labels must be integers"),
    "nan": (([[0.0], [np.nan]], [0, 1]), "row 1 of 2 is not finite"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_scored_is_told(what):
    (features, labels), message = BAD[what]
    for score in OF_FEATURES.values():
        with pytest.raises(scores.ScoreError, match=message):
            score(features, labels)


def test_options_and_distributions_out_of_range_are_told():
    with pytest.raises(scores.ScoreError, match="row 1 is no distribution"):
        scores.leep([[0.5, 0.5], [3.0, -2.0]], [0, 1])
    with pytest.raises(scores.ScoreError, match="k must be from 1 to 1"):
        scores.knn([[0.0], [1.0]], [0, 1], k=2)
    with pytest.raises(scores.ScoreError, match="eps"):
        scores.transrate([[0.0], [1.0]], [0, 1], eps=0.0)
    with pytest.raises(scores.ScoreError, match="class number 1 has one row"):
        scores.gbc([[0.0], [1.0], [2.0]], [0, 1, 0])


def test_parc_draws_rows_by_its_seed():
    f, y = _task(0, 3, 2.0)
    drawn = [scores.parc(f, y, most=40, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
