"""Labels without an example: by what the source's head is for, or refused by its name."""

import numpy as np
import pytest

from jaxtransfer.fewshot import FewShotError
from jaxtransfer.job import labelling
from jaxtransfer.job.labelling import zero_shot
from jaxtransfer.types import Head, Lineage, Model, Source

TEXTS, LABELS = ["a", "b"], ["sport", "politics"]


@pytest.fixture
def asked(monkeypatch):
    """The arguments of what classifies, which is told apart by the head of what is loaded."""
    found = {"head": None}

    def answer(name, scores):
        def call(source, texts, said, **how):
            found["call"] = (name, list(texts), list(said), how)
            return np.array(scores, np.float32)

        return call

    def load(ref, revision=None):
        return Source(Model("bert", None, (), {}, found["head"]), {}, Lineage(ref, ""))

    monkeypatch.setattr(labelling, "load", load)
    monkeypatch.setattr(labelling, "by_entailment", answer("entailment", [[0.75, 0.25], [0.625, 0.875]]))
    monkeypatch.setattr(labelling, "by_similarity", answer("similarity", [[0.5, -0.25], [0.0, 0.125]]))
    return found


def test_a_source_without_a_head_compares_embeddings(asked):
    assert zero_shot("x", TEXTS, LABELS) == [
        {"text": "a", "label": "sport", "similarity": 0.5},
        {"text": "b", "label": "politics", "similarity": 0.125},
    ]
    assert asked["call"] == ("similarity", TEXTS, LABELS, {})
    zero_shot("x", TEXTS, LABELS, template="about {}")
    assert asked["call"][2] == ["about sport", "about politics"]


def test_a_source_with_a_classifier_is_asked_what_is_entailed(asked):
    asked["head"] = Head("sequence-classification", ("entailment", "contradiction"))
    assert [row["label"] for row in zero_shot("x", TEXTS, LABELS)] == ["sport", "politics"]
    assert asked["call"][3] == {"template": "This is {}.", "multi_label": False}
    found = zero_shot("x", TEXTS, LABELS, multi_label=True)
    assert found[1] == {
        "text": "b", "labels": ["sport", "politics"], "probabilities": {"sport": 0.625, "politics": 0.875},
    }  # fmt: skip
    assert found[0]["labels"] == ["sport"]


def test_refused(asked):
    with pytest.raises(FewShotError, match="x: has no head, and similarities are no probabilities"):
        zero_shot("x", TEXTS, LABELS, multi_label=True)
    asked["head"] = Head("masked-lm")
    with pytest.raises(FewShotError, match="x: ends in a masked-lm head"):
        zero_shot("x", TEXTS, LABELS)
