"""Metrics against scikit-learn and against their definitions; intervals against simulation."""

import numpy as np
import pytest

from jaxtransfer.tasks import collect, confusion
from jaxtransfer.tasks.metrics import classification, softmax, wilson


def sample(n=300, classes=4, skill=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return rng.normal(size=(n, classes)) + skill * np.eye(classes)[labels], labels


@pytest.mark.parametrize("classes", [2, 4])
def test_against_scikit_learn(classes):
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = sample(classes=classes)
    found, predicted = classification(logits, labels), logits.argmax(-1)
    assert found["accuracy"].value == sklearn.accuracy_score(labels, predicted)
    np.testing.assert_allclose(
        found["macro_f1"].value, sklearn.f1_score(labels, predicted, average="macro"), rtol=1e-12
    )
    np.testing.assert_allclose(found["loss"].value, sklearn.log_loss(labels, softmax(logits)), rtol=1e-12)
    assert np.array_equal(confusion(logits, labels), sklearn.confusion_matrix(labels, predicted))


def test_classes_that_do_not_occur_do_not_count():
    sklearn = pytest.importorskip("sklearn.metrics")
    logits = np.eye(5)[[0, 1, 1, 2]]
    labels = np.array([0, 1, 2, 2])
    want = sklearn.f1_score(labels, logits.argmax(-1), average="macro")
    np.testing.assert_allclose(classification(logits, labels)["macro_f1"].value, want, rtol=1e-12)
    assert confusion(logits, labels).shape == (5, 5)


def test_wilson_reference_values():
    """Newcombe 1998, table I, method 3."""
    for hits, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        found = wilson(hits, n)
        np.testing.assert_allclose([found.low, found.high], [low, high], atol=5e-5)
    assert wilson(20, 20).high == 1.0


def test_intervals_hold_their_value_and_cover_the_truth():
    """The truth, from 200,000 examples, lies in most of 60 intervals of 200; in all it would be too wide."""
    truth = {name: metric.value for name, metric in classification(*sample(200_000)).items()}
    inside = dict.fromkeys(truth, 0)
    for seed in range(60):
        for name, metric in classification(*sample(200, seed=1 + seed)).items():
            assert metric.low <= metric.value <= metric.high
            assert metric.n == 200
            inside[name] += metric.low <= truth[name] <= metric.high
    assert all(52 <= count for count in inside.values()), inside


def test_loss_interval_is_the_normal_one_for_many_examples():
    logits, labels = sample(20_000)
    losses = -np.log(softmax(logits)[np.arange(len(labels)), labels])
    half = 1.96 * losses.std() / np.sqrt(len(losses))
    found = classification(logits, labels)["loss"]
    np.testing.assert_allclose([found.low, found.high], [losses.mean() - half, losses.mean() + half], rtol=3e-3)


def test_intervals_repeat():
    assert classification(*sample()) == classification(*sample())


def test_extreme_logits():
    found = classification(np.array([[1e4, -1e4], [-1e4, 1e4]]), np.array([0, 0]))
    assert found["loss"].value == 1e4
    assert classification(np.full((2, 2), np.inf), np.array([0, 1]))["loss"].value != found["loss"].value


def test_a_diverged_model_is_reported_as_nan():
    found = classification(np.full((3, 2), np.nan), np.array([0, 1, 1]))
    assert np.isnan(found["loss"].value)
    assert found["accuracy"].n == 3


BAD = {
    r"N > 0; got \(0, 2\)": (np.zeros((0, 2)), np.zeros(0)),
    r"got \(3, 2\), \(2,\)": (np.zeros((3, 2)), np.zeros(2)),
    r"labels must be in 0\.\.1, got 0\.\.2": (np.zeros((2, 2)), np.array([0, 2])),
    r"labels must be in 0\.\.1, got -100\.\.0": (np.zeros((2, 2)), np.array([0, -100])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        classification(*BAD[message])


def test_collect_orders_and_drops_padding():
    parts = [
        {"index": np.array([2, 0]), "logits": np.array([[2.0], [0.0]])},
        {"index": np.array([1, -1]), "logits": np.array([[1.0], [9.0]])},
    ]
    found = collect(parts)
    assert found["index"].tolist() == [0, 1, 2]
    assert found["logits"].tolist() == [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize(
    ("index", "message"), [([0, 0, 1], r"twice: \[0\], missing: \[\]"), ([0, 2, 3], r"missing: \[1\]")]
)
def test_collect_refuses(index, message):
    with pytest.raises(ValueError, match=message):
        collect([{"index": np.array(index)}])
