"""Ranking metrics: exact values against definitions, intervals against the published estimator and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtransfer.tasks import ranking


def sample(n=200, share=0.3, skill=1.2, seed=0):
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < share
    return rng.normal(size=n) + skill * positive, positive


SCORED = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30).filter(
    lambda rows: len({positive for _, positive in rows}) == 2
)


@given(SCORED)
def test_the_area_is_the_share_of_pairs_in_order(rows):
    scores, positive = (np.array(column) for column in zip(*rows, strict=True))
    yes, no = scores[positive][:, None], scores[~positive]
    pairs = np.mean((yes > no) + 0.5 * (yes == no))
    found = ranking.auc(scores, positive)
    assert found.value == pytest.approx(pairs, abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert ranking.auc(-scores, positive).value == pytest.approx(1 - pairs, abs=1e-12)


@given(SCORED)
def test_average_precision_by_its_definition(rows):
    scores, positive = (np.array(column) for column in zip(*rows, strict=True))
    total = sum(np.mean(positive[scores >= t]) for t in scores[positive])
    found = ranking.average_precision(scores, positive)
    assert found.value == pytest.approx(total / positive.sum(), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_the_variance_of_the_area_is_delongs(share):
    scores, positive = sample(share=share)
    yes, no = scores[positive][:, None], scores[~positive][None]
    wins = (yes > no) + 0.5 * (yes == no)
    want = wins.mean(1).var(ddof=1) / wins.shape[0] + wins.mean(0).var(ddof=1) / wins.shape[1]
    _, influence = ranking._auc(scores, positive)
    assert np.sum(influence**2) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("one", [ranking._auc, ranking._average_precision])
def test_influence_is_the_derivative_by_an_examples_weight(one):
    """An example that occurs twice more, of very many, moves the value by twice its influence."""
    scores, positive = np.round(sample(60)[0], 1), sample(60)[1]
    copies = 400
    many = np.repeat(scores, copies), np.repeat(positive, copies)
    value, influence = one(scores, positive)
    moved = [
        one(np.append(many[0], [scores[i]] * 2), np.append(many[1], [positive[i]] * 2))[0] - value for i in range(60)
    ]
    m = positive.sum()
    bias = np.where(positive, math.sqrt((m - 1) / m), math.sqrt((59 - m) / (60 - m))) if one is ranking._auc else 1.0
    np.testing.assert_allclose(np.array(moved) * copies / 2, influence * bias, rtol=2e-2, atol=1e-5)


@given(SCORED, st.sampled_from([0.25, 0.5, 0.9, 1.0]))
def test_sensitivity_is_the_best_of_all_thresholds(rows, specificity):
    scores, positive = (np.array(column) for column in zip(*rows, strict=True))
    kept = [np.mean(scores[positive] >= t) for t in {*scores, 99} if np.mean(scores[~positive] < t) >= specificity]
    found = ranking.sensitivity_at(scores, positive, specificity)
    assert found.value == max(kept)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_sensitivity_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, positive = sample(500)
    fpr, tpr, _ = sklearn.roc_curve(positive, scores, drop_intermediate=False)
    assert ranking.sensitivity_at(scores, positive).value == tpr[fpr <= 0.1].max()


@pytest.mark.parametrize("specificity", [0.0, 1.1])
def test_specificity_out_of_range(specificity):
    with pytest.raises(ValueError, match=r"specificity: must be in \(0, 1\]"):
        ranking.sensitivity_at(*sample(), specificity)


METRICS = [ranking.auc, ranking.average_precision, ranking.sensitivity_at]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "share", "skill"), [(200, 0.3, 1.2), (60, 0.5, 3.0)])
def test_intervals_cover_the_truth(metric, n, share, skill):
    """The truth, from 200,000 examples, lies in most of 100 intervals; the second case is almost perfect."""
    truth = metric(*sample(200_000, share, skill, seed=999)).value
    found = [metric(*sample(n, share, skill, seed)) for seed in range(100)]
    assert sum(m.low <= truth <= m.high for m in found) >= 89
    assert np.mean([m.high - m.low for m in found]) < 0.4


@pytest.mark.parametrize("metric", METRICS)
def test_perfection_seen_is_not_perfection_known(metric):
    scores = np.arange(40.0)
    found = metric(scores, scores >= 20)
    assert found.value == found.high == 1.0 and 0.8 < found.low < 0.95
    rare = metric(np.arange(1000.0), np.arange(1000) >= 998)
    assert rare.value == 1.0 and rare.low < 0.75


def test_the_mean_over_columns_has_a_narrower_interval_than_one():
    columns = [sample(seed=seed) for seed in range(8)]
    scores, positive = (np.stack(arrays, 1) for arrays in zip(*columns, strict=True))
    together, alone = ranking.auc(scores, positive), [ranking.auc(*column) for column in columns]
    assert together.value == pytest.approx(np.mean([m.value for m in alone]))
    assert together.high - together.low < 0.5 * (alone[0].high - alone[0].low)
    same = ranking.auc(np.stack([columns[0][0]] * 8, 1), np.stack([columns[0][1]] * 8, 1))
    assert same.high - same.low == pytest.approx(alone[0].high - alone[0].low, rel=0.1)  # eight times the same


def test_a_long_roc_curve_is_thinned():
    scores, positive = sample(20_000)
    curve = ranking.roc(scores, positive)
    assert 100 < len(curve["fpr"]) <= 200
    assert (curve["fpr"][0], curve["tpr"][0], curve["fpr"][-1], curve["tpr"][-1]) == (0, 0, 1, 1)
    assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(ranking.auc(scores, positive).value, abs=1e-3)
    assert (np.diff(curve["fpr"]) >= 0).all() and (np.diff(curve["tpr"]) >= 0).all()
