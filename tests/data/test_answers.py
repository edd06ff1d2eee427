"""Questions, contexts, answers: how their files are read, and which tokens of which window an answer is."""

import json

import numpy as np
import pytest

from jaxtransfer.data import DataError, DataSpec, answers, from_records, read
from jaxtransfer.data.text import tokenizer
from jaxtransfer.source import load
from tests.job.world import write_source

COLUMNS = ("question", "context", "answers")


def squad(*asked, context="the lamp was good", **more):
    """SQuAD's JSON of one paragraph; each question with its (answer, place)s."""
    rows = [
        {"id": str(i), "question": question, "answers": [{"text": t, "answer_start": s} for t, s in found]}
        for i, (question, found) in enumerate(asked)
    ]
    return {"version": "1.1", "data": [{"title": "x", "paragraphs": [{"context": context, "qas": rows}]}], **more}


@pytest.fixture
def write(tmp_path):
    def write(value):
        path = tmp_path / "x.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return DataSpec(str(path), format="squad")

    return write


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokenizer(load(write_source(tmp_path_factory.mktemp("world") / "source"), head=None))


def test_squad_is_a_row_a_question(write):
    found = read(write(squad(("what", [("lamp", 4), ("the lamp", 0)]), ("how", [("good", 13)]))), COLUMNS)
    assert [row["question"] for row in found] == ["what", "how"]
    assert answers.answers(found) == [(("lamp", 4), ("the lamp", 0)), (("good", 13),)]
    assert found.rows[1].where.endswith("x.json, question 1")
    assert read(write(squad(("what", [("lamp", 4)]))), ("id", "title"))[0] == {"id": "0", "title": "x"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "x.json: is not JSON: "),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, "question 0: is not laid out as SQuAD: no key 'context'"),
        ([1], "is not laid out as SQuAD: list indices must be integers"),
        (squad(), "has no rows"),
    ],
)
def test_what_is_no_squad_is_told(write, value, message):
    with pytest.raises(DataError, match=message):
        read(write(value), COLUMNS)


def test_answers_may_stand_in_any_of_the_usual_forms():
    there = {"text": ["lamp"], "answer_start": [4]}
    forms = [
        there,
        [{"text": "lamp", "answer_start": 4}],
        {k: np.array(v) for k, v in there.items()},
        {"text": "lamp", "answer_start": 4},
    ]
    data = from_records([{"question": "q", "context": "the lamp", "answers": form} for form in forms])
    assert answers.answers(data) == [(("lamp", 4),)] * 4


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": ["lamp"], "answer_start": [5]}, r"record 0: answers 'lamp': at character 5 of context is 'amp'"),
        ({"text": ["p"], "answer_start": [-1]}, r"record 0: answers 'p': at character -1 of context is ''"),
        ({"text": [""], "answer_start": [0]}, r"record 0: answers ''"),
        ({"text": ["lamp"], "answer_start": []}, "record 0: answers has 1 texts and 0 places"),
        ({"text": ["lamp"], "answer_start": ["4"]}, "expected texts and whole numbers"),
        ({"text": [], "answer_start": []}, "answers is empty; where a question may have no answer, set unanswerable"),
        ("lamp", "answers is 'lamp', expected text and answer_start of each answer"),
    ],
)
def test_answers_that_are_not_there_are_told_with_their_place(value, message):
    with pytest.raises(DataError, match=message):
        answers.answers(from_records([{"question": "q", "context": "the lamp", "answers": value}]))


def test_a_context_that_is_no_text_is_told():
    with pytest.raises(DataError, match="record 0: context is None, expected a text"):
        answers.answers(
            from_records([{"question": "q", "context": None, "answers": {"text": ["a"], "answer_start": [0]}}])
        )


def test_no_answer_is_one_where_that_was_asked_for():
    data = from_records([{"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}}])
    assert answers.answers(data, unanswerable=True) == [()]


CONTEXT = "the lamp0 was good and the chair was dull and a book"


def test_windows_overlap_and_every_answer_is_whole_in_one(tokens):
    data = from_records([{"question": "the film", "context": CONTEXT}, {"question": "a", "context": "the lamp"}])
    found = answers.encode(data, tokens, 12, 2)
    assert found.question.tolist() == [0, 0, 0, 1]
    assert max(map(len, found.offsets)) == 12
    whole = []
    for ids, spans, types in zip(
        found.fields["input_ids"][:3], found.offsets, found.fields["token_type_ids"], strict=False
    ):
        assert len(ids) == len(spans) == len(types)
        inside = spans[:, 1] > 0
        assert ids[:4].tolist() == tokens("the film")["input_ids"], "the question stands first"
        assert not inside[:4].any()
        assert not inside[-1]
        assert types[inside].all()
        whole.append([CONTEXT[low:high] for low, high in spans[inside]])
    assert whole[0][-2:] == whole[1][:2], "a window repeats two tokens of the one before"
    assert tokens.backend_tokenizer.truncation is None
    for answer in ("lamp0", "the chair", "a book"):
        start = CONTEXT.index(answer)
        places = [answers.positions(spans, (answer, start)) for spans in found.offsets[:3]]
        kept = [(spans, place) for spans, place in zip(found.offsets, places, strict=False) if place != (0, 0)]
        assert kept
        for spans, (first, last) in kept:
            assert CONTEXT[spans[first, 0] : spans[last, 1]] == answer


def test_an_answer_of_a_part_of_a_token_is_that_token(tokens):
    (spans,) = answers.encode(from_records([{"question": "a", "context": "the lamp"}]), tokens, 12, 0).offsets
    first, last = answers.positions(spans, ("am", 5))
    assert spans[first].tolist() == spans[last].tolist() == [4, 8]
    assert answers.positions(spans, None) == (0, 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"question": "the " * 7, "context": "a"},
            r"record 0: question has 7 tokens, which leave 2 of max_length 12 to",
        ),
        ({"question": "the", "context": " "}, "record 0: context is empty"),
        ({"question": "", "context": "a"}, "record 0: question is empty"),
    ],
)
def test_texts_that_leave_no_room_or_are_empty(tokens, record, message):
    with pytest.raises(DataError, match=message):
        answers.encode(from_records([record]), tokens, 12, 2)
