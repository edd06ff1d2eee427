"""Metrics against scikit-learn and against their definitions; intervals against simulation."""

import math

import numpy as np
import pytest

from jaxtransfer.tasks import collect, confusion, roc
from jaxtransfer.tasks.metrics import bootstrap_mean, classification, diagnosis, multi_label, softmax, wilson


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


def test_a_class_of_two_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = sample(classes=2)
    logits = np.round(logits, 1)  # ties
    found, scores = diagnosis(logits, labels), logits[:, 1] - logits[:, 0]
    assert list(found) == ["balanced_accuracy", "auc", "average_precision", "sensitivity_at_90"]
    want = {
        "balanced_accuracy": sklearn.balanced_accuracy_score(labels, logits.argmax(-1)),
        "auc": sklearn.roc_auc_score(labels, scores),
        "average_precision": sklearn.average_precision_score(labels, scores),
    }
    for name, value in want.items():
        np.testing.assert_allclose(found[name].value, value, rtol=1e-12, err_msg=name)


def test_more_classes_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = sample(classes=4)
    found = diagnosis(logits, labels)
    assert list(found) == ["balanced_accuracy", "macro_auc"]
    want = sklearn.roc_auc_score(labels, softmax(logits), multi_class="ovr", average="macro")
    np.testing.assert_allclose(found["macro_auc"].value, want, rtol=1e-12)
    want = sklearn.balanced_accuracy_score(labels, logits.argmax(-1))
    np.testing.assert_allclose(found["balanced_accuracy"].value, want, rtol=1e-12)


def several(n=300, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, classes)) < [0.5, 0.3, 0.2, 0.1, 0.05]).astype(np.float32)
    return rng.normal(size=(n, classes)) - 0.5 + labels, labels


def test_several_labels_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = several()
    found, predicted, p = multi_label(logits, labels), logits > 0, 1 / (1 + np.exp(-logits))
    want = {
        "macro_auc": sklearn.roc_auc_score(labels, logits, average="macro"),
        "mean_average_precision": sklearn.average_precision_score(labels, logits, average="macro"),
        "macro_f1": sklearn.f1_score(labels, predicted, average="macro"),
        "micro_f1": sklearn.f1_score(labels, predicted, average="micro"),
        "exact_match": sklearn.accuracy_score(labels, predicted),
        "loss": np.mean([sklearn.log_loss(labels[:, c], p[:, c]) for c in range(5)]),
    }
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name].value, value, rtol=1e-9, err_msg=name)
        assert found[name].low < found[name].value < found[name].high and found[name].n == 300


def test_labels_that_nobody_has_do_not_count():
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = several(40)
    logits[:, 4], labels[:, 4], labels[:, 0] = -9.0, 0, 1
    found = multi_label(logits, labels)
    middle = sklearn.roc_auc_score(labels[:, 1:4], logits[:, 1:4], average="macro")
    np.testing.assert_allclose(found["macro_auc"].value, middle, rtol=1e-12)
    want = sklearn.f1_score(labels[:, :4], logits[:, :4] > 0, average="macro")
    np.testing.assert_allclose(found["macro_f1"].value, want, rtol=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_what_the_labels_do_not_define_is_nan_under_the_same_names(classes):
    some, none = diagnosis(*sample(classes=classes)), diagnosis(np.zeros((1, classes)), np.zeros(1))
    assert some.keys() == none.keys()
    assert math.isnan(none["auc" if classes == 2 else "macro_auc"].value)
    assert none["balanced_accuracy"].value == 1.0
    lost = diagnosis(np.full((4, classes), np.nan), np.arange(4) % classes)
    assert math.isnan(lost["auc" if classes == 2 else "macro_auc"].low)
    lost = multi_label(np.full((4, classes), np.nan), np.eye(4, classes))
    assert math.isnan(lost["macro_auc"].value) and math.isnan(lost["loss"].value)


def test_the_roc_curve_of_two_classes():
    logits, labels = sample(classes=2)
    curve = roc(logits, labels)
    area = np.trapezoid(curve["tpr"], curve["fpr"])
    np.testing.assert_allclose(area, diagnosis(logits, labels)["auc"].value, rtol=1e-12)
    assert roc(*sample(classes=3)) is None and roc(*several()) is None
    assert roc(logits, np.ones_like(labels)) is None


def test_a_mean_weighted_by_size():
    values, sizes = np.array([1.0, 2.0, 4.0]), np.array([1, 2, 1])
    assert bootstrap_mean(values, sizes).value == 2.25
    assert bootstrap_mean(values, np.full(3, 7)) == bootstrap_mean(values)


MANY = {
    r"expected logits and labels \(N, C\), N > 0; got \(3, 2\), \(3,\)": (np.zeros((3, 2)), np.zeros(3)),
    r"N > 0; got \(0, 2\), \(0, 2\)": (np.zeros((0, 2)), np.zeros((0, 2))),
    "must be 0 or 1": (np.zeros((1, 2)), np.array([[0.0, 0.5]])),
}


@pytest.mark.parametrize("message", MANY)
def test_bad_input_of_several_labels(message):
    with pytest.raises(ValueError, match=message):
        multi_label(*MANY[message])
