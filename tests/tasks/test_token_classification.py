"""The task from sentences to tags: what is learned, what is read, what is said of a text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.data import DataError, batches, from_records
from jaxtransfer.objectives import IGNORE
from jaxtransfer.source import load
from jaxtransfer.tasks import collect, token_classification
from jaxtransfer.types import View
from tests.job.world import write_source

LABELS = ("O", "B-object", "I-object")
TASK = token_classification(LABELS, max_length=8)
RECORDS = [
    {"tokens": ["the", "lamp0", "chair", "was", "good"], "tags": ["O", "B-object", "I-object", "O", "O"]},
    {"tokens": ["a", "and"] * 4, "tags": ["O"] * 7 + ["B-object"]},
]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return TASK.processor(load(write_source(tmp_path_factory.mktemp("world") / "source"), head=None))


def batch_of(examples):
    (batch,) = batches(examples, batch=4, shuffle=False, buckets=(8,), epochs=1)
    return batch


def test_only_first_tokens_have_labels(processor):
    examples = TASK.prepare(processor, from_records(RECORDS, "memory"), train=True)
    batch = batch_of(examples)
    x = IGNORE
    assert batch["labels"].tolist()[:3] == [
        [x, 0, 1, x, 2, 0, 0, x],
        [x, 0, 0, 0, 0, 0, 0, x],
        [x, 0, 1, x, x, x, x, x],
    ]
    assert batch["words"].tolist()[2] == [-1, 6, 7, -1, -1, -1, -1, -1]
    assert batch["sentence"].tolist() == [0, 1, 1, 0]
    assert set(batch["labels"][3].tolist()) == {IGNORE}, "a row of padding"
    assert examples.notes == ("memory: 2 sentences split into 3 pieces of up to 8 tokens",)
    assert examples.kept.tolist() == [0, 1, 1]


def test_the_loss_is_the_mean_over_words(processor):
    batch = batch_of(TASK.prepare(processor, from_records(RECORDS), train=True))
    logits = jax.random.normal(jax.random.key(0), (4, 8, 3))
    loss, metrics = TASK.objective(View({}, {"logits": logits}, batch, None, jnp.array(0)))
    known = batch["labels"] != IGNORE
    logp = np.asarray(jax.nn.log_softmax(logits))[known]
    assert float(metrics["weight"]) == known.sum() == 13
    assert float(loss) == pytest.approx(-logp[np.arange(13), batch["labels"][known]].mean(), rel=1e-6)


def observed(processor, records, say, labels=LABELS, task=TASK):
    """What an evaluation sees of logits that say a tag of each word, ``say[sentence][word]``."""
    examples = task.prepare(processor, from_records(records), train=False)
    parts = []
    for batch in batches(examples, batch=2, shuffle=False, buckets=(5, 8), epochs=1):
        logits = np.zeros((*batch["words"].shape, len(labels)), np.float32)
        for row, words in enumerate(batch["words"]):
            for place in np.flatnonzero(words >= 0):
                logits[row, place, labels.index(say[batch["sentence"][row]][words[place]])] = 3
        found = jax.jit(task.observe)({"logits": logits}, batch)
        parts.append({**jax.device_get(found), "index": batch["index"]})
    return collect(parts, examples.aside)


def test_what_is_said_of_pieces_becomes_entities_of_sentences(processor):
    said = [["O", "B-object", "I-object", "O", "O"], ["O"] * 5 + ["B-object", "I-object", "I-object"]]
    records = [{"tokens": record["tokens"]} for record in RECORDS]
    first, second = TASK.decode(observed(processor, records, said))
    sure = float(np.exp(3) / (np.exp(3) + 2))
    assert first.tags == ("O", "B-object", "I-object", "O", "O")
    assert [(e.label, e.start, e.stop) for e in first.entities] == [("object", 1, 3)]
    assert [(e.label, e.start, e.stop) for e in second.entities] == [("object", 5, 8)], "across the cut"
    assert second.entities[0].probability == pytest.approx(sure, rel=1e-6)


def test_metrics_and_mistakes(processor):
    said = [["O", "B-object", "I-object", "O", "O"], ["O"] * 6 + ["B-object", "O"]]
    found = observed(processor, RECORDS, said)
    metrics = TASK.metrics(found)
    assert set(metrics) == set(TASK.metric_names)
    assert {name: metrics[name].value for name in ("f1", "precision", "recall")} == dict.fromkeys(
        ("f1", "precision", "recall"), 0.5
    )
    assert metrics["accuracy"].value == pytest.approx(11 / 13)
    right, wrong = (-np.log(np.exp(x) / (np.exp(3) + 2)) for x in (3, 0))
    assert metrics["loss"].value == pytest.approx((11 * right + 2 * wrong) / 13, rel=1e-5)
    assert TASK.breakdown(found)["type"]["object"]["recall"].value == 0.5
    rows = TASK.mistakes(found)
    assert [(row["label"], row["predicted"]) for row in rows] == [
        ("nothing", "object: a"), ("object: and", "nothing"),
    ]  # fmt: skip
    assert rows[0]["text"] == "a and a and a and a and"


def test_a_text_is_answered_by_its_characters(processor):
    text = "the lamp0, chair"
    words = TASK.typed(text)
    assert words == ["the", "lamp0", ",", "chair"]
    (found,) = TASK.decode(observed(processor, [{"tokens": words}], [["O", "B-object", "I-object", "I-object"]]))
    (entity,) = found.record(text)["entities"]
    assert (entity["label"], entity["text"], text[entity["start"] : entity["stop"]]) == (
        "object",
        *["lamp0, chair"] * 2,
    )


def test_tags_of_words_are_told_one_by_one(processor):
    labels = ("NOUN", "VERB")
    task = token_classification(labels, max_length=8)
    assert (task.metric, task.metric_names) == ("accuracy", ("macro_f1", "accuracy", "loss"))
    (found,) = task.decode(observed(processor, [{"tokens": ["lamp", "was"]}], [["NOUN", "VERB"]], labels, task))
    assert found.entities is None
    assert [(row["label"], row["text"]) for row in found.record("lamp was")["tags"]] == [
        ("NOUN", "lamp"),
        ("VERB", "was"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["O"]}, "labels: must be two or more different names"),
        ({"labels": ["O", "O"]}, "labels: must be two or more different names"),
        ({"labels": LABELS, "max_length": 0}, "max_length: must be at least 1, got 0"),
        ({"labels": LABELS, "label_smoothing": 1.0}, r"label_smoothing: must be in \[0, 1\)"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        token_classification(**options)


def test_tags_are_checked_before_the_long_work():
    with pytest.raises(DataError, match=r"record 0: tags\[0\] 'X' is unknown; known: O, B-object, I-object"):
        TASK.prepare(None, from_records([{"tokens": ["a"], "tags": ["X"]}]), train=True)
