"""The task from questions to answers: what is learned, what is read, and the scores of SQuAD."""

import jax
import numpy as np
import pytest

from jaxtransfer.data import DataError, batches, from_records
from jaxtransfer.source import load
from jaxtransfer.tasks import collect, question_answering
from jaxtransfer.tasks.metrics_answers import normalized, overlap
from tests.job.world import write_source

CONTEXT = "the lamp0 was good and the chair was dull and a book"
RECORDS = [
    {"question": "the film", "context": CONTEXT, "answers": {"text": ["chair", "the chair"], "answer_start": [27, 23]}},
    {"question": "a", "context": "the lamp", "answers": {"text": ["lamp"], "answer_start": [4]}},
]
TASK = question_answering(max_length=12, stride=2, max_answer=3)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return TASK.processor(load(write_source(tmp_path_factory.mktemp("world") / "source"), head=None))


def test_windows_point_at_the_first_answer_or_at_their_first_token(processor):
    examples = TASK.prepare(processor, from_records(RECORDS, "memory"), train=True)
    assert examples.notes == ("memory: 2 questions read in 4 windows of up to 12 tokens",)
    (batch,) = batches(examples, batch=5, shuffle=False, buckets=(12,), epochs=1)
    assert batch["row"].tolist() == [0, 0, 0, 1, 0]
    assert batch["offsets"].shape == (5, 12, 2)
    said = []
    for start, end, spans, row in zip(
        batch["start_positions"], batch["end_positions"], batch["offsets"], batch["row"], strict=True
    ):
        context = RECORDS[row]["context"]
        said.append(context[spans[start, 0] : spans[end, 1]] if start else None)
    assert said[:1] + said[3:] == [None, "lamp", None]
    assert "chair" in said[1:3]
    assert set(said[1:3]) <= {"chair", None}


def observed(processor, records, points, task=TASK):
    """What an evaluation sees of logits: ``points[row]`` = the words that start and end are drawn to, and how much."""
    examples = task.prepare(processor, from_records(records), train=False)
    parts = []
    for batch in batches(examples, batch=2, shuffle=False, buckets=(8, 12), epochs=1):
        outputs = {f"{name}_logits": np.zeros(batch["input_ids"].shape, np.float32) for name in ("start", "end")}
        for i, (spans, row) in enumerate(zip(batch["offsets"], batch["row"], strict=True)):
            for name, word, much in points[row]:
                at = records[row]["context"].find(word) if word else 0
                places = np.flatnonzero((spans[:, 0] == at) & (spans[:, 1] > 0)) if word else [0]
                outputs[f"{name}_logits"][i, places] = much
        parts.append({**jax.device_get(jax.jit(task.observe)(outputs, batch)), "index": batch["index"]})
    return collect(parts, examples.aside)


def test_the_answer_is_the_best_span_of_all_windows(processor):
    points = [
        [("start", "chair", 5), ("end", "dull", 7), ("end", "lamp0", 9)],
        [("start", "lamp", 3), ("end", "the", 9)],
    ]
    first, second = TASK.decode(observed(processor, RECORDS, points))
    assert (first.text, first.start, first.stop) == ("chair was dull", 27, 41), "an end before the start is no span"
    assert first.text == CONTEXT[first.start : first.stop]
    assert 0 < first.probability < 1
    assert second.text == "the", "the best span that is one"
    short = [[("start", "chair", 5), ("end", "book", 4)], []]
    assert TASK.decode(observed(processor, RECORDS, short))[0].text != "chair was dull and a book", "too long"
    assert first.record("the film") == {"answer": first.text, "start": 27, "stop": 41, "probability": first.probability}


def test_probabilities_are_over_all_spans_of_all_windows(processor):
    found = observed(processor, RECORDS, [[("start", "chair", 5), ("end", "chair", 5)], []])
    first, second = TASK.decode(found)
    inside = [found["total"][found["row"] == row] for row in (0, 1)]
    assert first.probability == pytest.approx(np.exp(10) / np.exp(inside[0]).sum(), rel=1e-5)
    assert second.probability == pytest.approx(1 / 3, rel=1e-5), "the, lamp, the lamp"


def test_scores_are_those_of_squad(processor):
    right = [("start", "lamp", 9), ("end", "lamp", 9)]
    found = TASK.metrics(observed(processor, RECORDS, [[("start", "the chair", 9), ("end", "chair", 9)], right]))
    assert set(found) == set(TASK.metric_names)
    assert (found["exact_match"].value, found["exact_match"].n) == (1.0, 2)
    partly = observed(processor, RECORDS, [[("start", "chair", 9), ("end", "dull", 9)], right])
    found = TASK.metrics(partly)
    assert found["exact_match"].value == 0.5
    assert found["f1"].value == pytest.approx((2 * 1 / (3 + 1) + 1) / 2)
    (wrong,) = TASK.mistakes(partly)
    assert (wrong["text"], wrong["label"], wrong["predicted"]) == ("the film", "chair", "chair was dull")
    assert found["loss"].value > 0


@pytest.mark.parametrize(
    ("text", "found"),
    [("The  U.S.  Army!", "us army"), ("an apple, a pear", "apple pear"), ("the", ""), ("Theatre", "theatre")],
)
def test_texts_are_compared_as_squad_compares_them(text, found):
    assert normalized(text) == found


def test_overlap_counts_words_as_often_as_they_occur():
    assert overlap("b b c", "b c c") == pytest.approx(2 * 2 / 6)
    assert overlap("", "x") == overlap("x", "the") == 0
    assert overlap("the", "a") == 1


def test_no_answer_competes_where_a_question_may_have_none(processor):
    task = question_answering(max_length=12, stride=2, unanswerable=True)
    none = {"text": [], "answer_start": []}
    records = [RECORDS[0], {**RECORDS[1], "answers": none}]
    with pytest.raises(DataError, match=r"record 1: answers is empty; .* set unanswerable"):
        TASK.prepare(processor, from_records(records), train=True)
    points = [[("start", "chair", 9), ("end", "chair", 9), ("start", "", 4)], [("start", "", 4)]]
    found = observed(processor, records, points, task)
    first, second = task.decode(found)
    assert (first.text, second.text) == ("chair", "")
    assert second.probability == pytest.approx(np.exp(4) / (np.exp(4) + 3), rel=1e-5)
    assert task.metrics(found)["exact_match"].value == task.metrics(found)["f1"].value == 1
    assert TASK.decode(observed(processor, RECORDS, points))[1].text, "elsewhere something is always said"


def test_without_answers_there_are_none_to_point_at(processor):
    examples = TASK.prepare(processor, from_records([{"question": "a", "context": "the lamp"}]), train=False)
    assert set(examples.fixed) == {"row"}
    assert set(examples.aside) == {"question", "context"}


@pytest.mark.parametrize("options", [{"max_length": 0}, {"stride": -1}, {"max_answer": 0}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: must be at least"):
        question_answering(**options)
