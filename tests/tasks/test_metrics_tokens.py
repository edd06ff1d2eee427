"""Entities and their scores, against what seqeval 1.2.2 says of the same tags."""

import random

import numpy as np
import pytest

from jaxtransfer.tasks.metrics_tokens import by_type, entities, mistakes, sentences, tagging

LABELS = ["O", "B-x", "I-x", "B-y", "I-y"]


def observed(truths, guesses, labels=LABELS, *, width=12, sure=0.5):
    """As an evaluation sees sentences of one piece: a special token first, then a token a word."""
    count = len(truths)
    out = {
        "words": np.full((count, width), -1), "guess": np.zeros((count, width), int),
        "labels": np.full((count, width), -100), "probability": np.full((count, width), sure),
        "sentence": np.arange(count), "nll": np.array([float(len(row)) for row in truths]),
    }  # fmt: skip
    for i, (truth, guess) in enumerate(zip(truths, guesses, strict=True)):
        for name, values in (("words", range(len(truth))), ("labels", map(labels.index, truth))):
            out[name][i, 1 : len(truth) + 1] = list(values)
        out["guess"][i, 1 : len(truth) + 1] = [labels.index(tag) for tag in guess]
    return out


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-x I-x O", [("x", 1, 3)]),
        ("I-x I-x", [("x", 0, 2)]),
        ("B-x B-x", [("x", 0, 1), ("x", 1, 2)]),
        ("B-x I-y", [("x", 0, 1), ("y", 1, 2)]),
        ("B-x E-x I-x", [("x", 0, 2), ("x", 2, 3)]),
        ("S-x S-x B-y-z I-y-z E-y-z", [("x", 0, 1), ("x", 1, 2), ("y-z", 2, 5)]),
        ("U-x L-x", [("x", 0, 1), ("x", 1, 2)]),
        ("O O", []),
    ],
)
def test_entities_of_every_scheme(tags, found):
    assert entities(tags.split()) == found


def drawn():
    draw = random.Random(0)
    truths = [[draw.choice(LABELS) for _ in range(draw.randint(1, 9))] for _ in range(200)]
    return truths, [[tag if draw.random() < 0.7 else draw.choice(LABELS) for tag in row] for row in truths]


def test_scores_are_those_of_seqeval():
    found = tagging(observed(*drawn()), LABELS)
    expected = {
        "f1": 0.7095310136157338, "precision": 0.7084592145015106, "recall": 0.7106060606060606,
        "macro_f1": 0.7094327093708855,
    }  # fmt: skip
    assert {name: found[name].value for name in expected} == pytest.approx(expected, abs=1e-12)
    assert found["loss"].value == pytest.approx(1.0)
    for metric in found.values():
        assert metric.low <= metric.value <= metric.high
        assert metric.n == 200
    assert found["f1"].high - found["f1"].low == pytest.approx(0.08, abs=0.02)


def test_types_add_up():
    data = observed(*drawn())
    parts, whole = by_type(data, LABELS), tagging(data, LABELS)
    assert list(parts) == ["x", "y"]
    assert np.mean([metrics["f1"].value for metrics in parts.values()]) == pytest.approx(whole["macro_f1"].value)


def test_without_entities_scores_are_zero_and_no_error():
    found = tagging(observed([["O", "O"]], [["O", "O"]]), LABELS)
    assert [found[name].value for name in ("f1", "precision", "recall", "accuracy")] == [0, 0, 0, 1]


def test_words_of_classes_are_counted_one_by_one():
    labels = ["NOUN", "VERB", "ADJ"]
    found = tagging(observed([["NOUN", "VERB", "ADJ"], ["NOUN"]], [["NOUN", "NOUN", "ADJ"], ["NOUN"]], labels), labels)
    assert found.keys() == {"macro_f1", "accuracy", "loss"}
    assert found["accuracy"].value == 0.75
    assert found["macro_f1"].value == pytest.approx((2 * 2 / 5 + 0 + 1) / 3)


def test_pieces_of_a_sentence_are_put_together():
    data = observed([["B-x", "I-x"], ["I-x", "O"]], [["B-x", "I-x"], ["I-x", "O"]])
    data["words"][1][data["words"][1] >= 0] += 2
    data["sentence"] = np.array([0, 0])
    (one,) = sentences(data)
    assert [LABELS[i] for i in one.guess] == ["B-x", "I-x", "I-x", "O"]
    assert tagging(data, LABELS)["f1"].n == 1


def test_mistakes_name_what_is_said_beside_what_is_true():
    data = observed([["B-x", "I-x", "O", "B-y"]], [["B-x", "O", "B-x", "O"]])
    data["probability"][0, 1:5] = [0.9, 0.8, 0.6, 0.7]
    assert mistakes(data, LABELS) == [
        (0.9, 0, ("x", 0, 2), ("x", 0, 1)),
        (0.7, 0, ("y", 3, 4), ("", 3, 4)),
        (0.6, 0, ("", 2, 3), ("x", 2, 3)),
    ]
    labels = ["NOUN", "VERB"]
    (wrong,) = mistakes(observed([["NOUN", "VERB"]], [["NOUN", "NOUN"]], labels), labels)
    assert wrong == (0.5, 0, ("VERB", 1, 2), ("NOUN", 1, 2))


def test_labels_are_needed():
    data = observed([["O"]], [["O"]])
    del data["labels"]
    with pytest.raises(ValueError, match="the sentences have no labels"):
        by_type(data, LABELS)
