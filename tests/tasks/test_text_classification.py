"""The task from records to predictions, with a tokenizer that a test can read."""

import types

import numpy as np
import pytest

from jaxtransfer.data import DataError, batches, from_records
from jaxtransfer.tasks import text_classification

RECORDS = [
    {"text": "good", "label": "good"},
    {"text": "so so bad", "label": "bad"},
    {"text": "good good good good good", "label": 1},
]


class Letters:
    """A token per word, its length, between 1 and 2; truncates like the real ones."""

    pad_token_id, pad_token_type_id = 9, 0
    backend_tokenizer = types.SimpleNamespace(no_truncation=lambda: None)

    def num_special_tokens_to_add(self):
        return 2

    def __call__(self, texts, *, truncation, max_length, padding, return_attention_mask):
        words = [[len(word) for word in text.split()] for text in texts]
        kept = [[1, *row[: max_length - 2], 2] for row in words]
        marks = [types.SimpleNamespace(overflowing=row[max_length - 2 :]) for row in words]

        class Out(dict):
            encodings = marks

        return Out(input_ids=kept)


@pytest.fixture
def task():
    return text_classification(["bad", "good"], max_length=6, pooling="mean")


def test_prepare_to_batches(task):
    examples = task.prepare(Letters(), from_records(RECORDS, "reviews"), train=True)
    assert [row.tolist() for row in examples.ragged["input_ids"]] == [[1, 4, 2], [1, 2, 2, 3, 2], [1, 4, 4, 4, 4, 2]]
    assert examples.fixed["labels"].tolist() == [1, 0, 1]
    assert examples.notes == ("reviews: 1 of 3 texts cut to 6 tokens",)
    (batch,) = batches(examples, batch=4, shuffle=False, buckets=(8,), epochs=1)
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    assert batch["input_ids"][0].tolist() == [1, 4, 2, 9, 9, 9, 9, 9]


def test_prepare_for_prediction(task):
    examples = task.prepare(Letters(), from_records([{"text": "good"}]), train=False)
    assert not examples.fixed
    assert examples.notes == ()


def test_head(task):
    assert (task.head.kind, task.head.labels, task.head.pooling) == ("sequence-classification", ("bad", "good"), "mean")
    assert task.columns == ("text", "label")


def test_decode(task):
    first, second = task.decode({"logits": np.log(np.array([[0.25, 0.75], [0.9, 0.1]]))})
    assert (first.label, second.label) == ("good", "bad")
    assert second.probability == pytest.approx(0.9)
    assert first.probabilities == pytest.approx({"bad": 0.25, "good": 0.75})


def test_metrics(task):
    found = task.metrics({"logits": np.array([[0.0, 1.0], [0.0, 1.0]]), "labels": np.array([1, 0])})
    assert found.keys() == {"accuracy", "macro_f1", "loss"}
    assert found["accuracy"].value == 0.5


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x", "label": "ugly"}, "record 0: label 'ugly' is unknown"),
        ({"text": " ", "label": 0}, "text is empty"),
    ],
)
def test_bad_records(record, message, task):
    with pytest.raises(DataError, match=message):
        task.prepare(Letters(), from_records([record]), train=False)


@pytest.mark.parametrize("labels", [[], ["one"], ["a", "b", "a"]])
def test_bad_labels(labels):
    with pytest.raises(ValueError, match="labels: must be two or more different names"):
        text_classification(labels)
