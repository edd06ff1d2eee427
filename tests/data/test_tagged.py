"""Words and tags: how their files are read, and which token stands for a word."""

import copy

import numpy as np
import pytest

from jaxtransfer.data import DataError, DataSpec, from_records, read, tagged
from jaxtransfer.data.text import tokenizer
from jaxtransfer.source import load
from tests.job.world import write_source
from tests.language import byte_tokenizer

CONLL = b"-DOCSTART- -X- O\n\nEU NNP B-org\nrejects VBZ O\n\n\nPeter NNP B-person\nBlackburn NNP I-person\n"
COLUMNS = ("tokens", "tags")


@pytest.fixture
def write(tmp_path):
    def write(data: bytes, name="x.conll"):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return tokenizer(load(write_source(tmp_path_factory.mktemp("world") / "source"), head=None))


def test_conll_is_read_by_its_first_and_last_column_or_by_number(write):
    path = write(CONLL)
    first, second = read(path, COLUMNS)
    assert first == {"tokens": ["EU", "rejects"], "tags": ["B-org", "O"]}
    assert second["tags"] == ["B-person", "I-person"]
    assert read(path, COLUMNS).rows[1].where == f"{path}, line 7"
    named = read(DataSpec(path, columns={"tags": "1"}), COLUMNS)
    assert named[0]["tags"] == ["NNP", "VBZ"]


def test_tabs_part_fields_that_hold_spaces_and_windows_line_ends_are_read(write):
    found = read(write(b"New York\tB-place\r\n\t\r\n  \r\nhi\tO\r\n"), COLUMNS)
    assert [row["tokens"] for row in found] == [["New York"], ["hi"]]
    assert read(DataSpec(write(b"a|O\n", "x.txt"), format="conll", delimiter="|"), COLUMNS)[0]["tags"] == ["O"]
    assert read(write(b"one\ntwo\n\nthree\n"), ("tokens",))[0]["tokens"] == ["one", "two"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"EU B-org\nrejects\n", "line 2: 1 fields, the first has 2: 'rejects'"),
        (b"EU\nrejects\n", "no column 'tags'; it has tokens, 0"),
        (b"\n\n", "has no rows"),
        (b"\xff O\n", "byte 0xff at offset 0 is not utf-8"),
    ],
)
def test_what_is_no_conll_is_told_with_its_line(write, data, message):
    with pytest.raises(DataError, match=message):
        read(write(data), COLUMNS)


def test_tags_are_sorted_by_type_and_numbered_in_any_form():
    records = [
        {"tokens": ["a", "b", "c"], "tags": ["I-x10", "B-x10", "O"]},
        {"tokens": "d e", "tags": "B-x2 O"},
        {"tokens": np.array(["f"], object), "tags": np.array([1])},
    ]
    data = from_records(records[:2])
    assert tagged.names(data) == ("O", "B-x2", "B-x10", "I-x10")
    assert tagged.words(data) == [["a", "b", "c"], ["d", "e"]]
    found = tagged.ids(from_records(records), ["O", "B-x2", "B-x10", "I-x10"])
    assert [ids.tolist() for ids in found] == [[3, 2, 0], [1, 0], [1]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "record 0: 2 tags for 1 tokens"),
        ({"tokens": ["a"], "tags": ["X"]}, r"record 0: tags\[0\] 'X' is unknown; known: O, B-a"),
        ({"tokens": ["a"], "tags": [True]}, r"record 0: tags\[0\] is True, expected a name or a whole number"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, r"record 0: tokens\[1\] is ' ', expected a word"),
        ({"tokens": ["a\ud800"], "tags": ["O"]}, r"record 0: tokens\[0\] holds .*half of a surrogate pair"),
        ({"tokens": [], "tags": []}, "record 0: tokens is empty"),
        ({"tokens": 3, "tags": ["O"]}, "record 0: tokens is 3, expected a list of words"),
    ],
)
def test_bad_rows_are_told_with_their_place(letters, record, message):
    data = from_records([record])
    with pytest.raises(DataError, match=message):
        tagged.ids(data, ["O", "B-a"])
        tagged.encode(data, letters, 8)


def test_a_typed_text_is_split_as_corpora_are():
    text = "Don't call @anna or #JAX at 3.14 (the well-known π)!  東京タワー e.g. naïve"
    words = [text[start:stop] for start, stop in tagged.split_words(text)]
    assert words == [
        "Don't", "call", "@anna", "or", "#JAX", "at", "3.14", "(", "the", "well-known", "π", ")", "!",
        "東", "京", "タ", "ワ", "ー", "e.g", ".", "naïve",
    ]  # fmt: skip
    assert tagged.split_words("  ") == []


SENTENCES = [["lamp0", "was", "good1"], ["the", "a"] * 7, ["film", "\ufe0f", "dull"], ["and"]]


def begun(pieces, tokens):
    """By sentence the tokens that words begin with."""
    out = {}
    for ids, words, sentence in zip(pieces.input_ids, pieces.words, pieces.sentence, strict=True):
        assert len(ids) == len(words)
        out.setdefault(int(sentence), []).extend(
            (int(word), tokens.convert_ids_to_tokens(int(i))) for i, word in zip(ids, words, strict=True) if word >= 0
        )
    return out


def test_the_first_token_of_a_word_stands_for_it_in_whichever_piece_it_is(letters):
    pieces = tagged.encode(from_records([{"tokens": words} for words in SENTENCES]), letters, 7)
    assert pieces.sentence.tolist() == [0, 1, 1, 1, 2, 3]
    assert max(map(len, pieces.input_ids)) == 7
    found = begun(pieces, letters)
    assert found[0] == [(0, "lamp"), (1, "was"), (2, "good")]
    assert [word for word, _ in found[1]] == list(range(14))
    assert found[2] == [(0, "film"), (1, "[UNK]"), (2, "dull")], "of the second the tokenizer leaves nothing"
    assert letters.backend_tokenizer.truncation is None


def test_it_is_the_token_that_transformers_would_take(letters):
    data = from_records([{"tokens": words} for words in SENTENCES if "\ufe0f" not in words])
    found = begun(tagged.encode(data, letters, 32), letters)
    for number, row in enumerate(data.rows):
        encoded = letters(row.values["tokens"], is_split_into_words=True)
        first = {}
        for token, word in zip(encoded.tokens(), encoded.word_ids(), strict=True):
            if word is not None:
                first.setdefault(word, token)
        assert found[number] == sorted(first.items())


def test_a_token_that_begins_with_the_space_before_its_word_counts():
    tokens = byte_tokenizer()
    words = [["go", "on", "é"]]
    pieces = tagged.encode(from_records([{"tokens": row} for row in words]), tokens, 32)
    (ids,), (at,) = pieces.input_ids, pieces.words
    assert at[at >= 0].tolist() == [0, 1, 2]
    assert tokens.decode(ids[at >= 0][:1]).strip() == "g"


def test_there_must_be_room(letters):
    with pytest.raises(DataError, match="max_length: 2 leaves no room beside 2 special tokens"):
        tagged.encode(from_records([{"tokens": ["a"]}]), letters, 2)


def test_a_word_without_a_token_is_named_where_none_is_unknown(letters):
    poor = copy.deepcopy(letters)
    poor.unk_token = None
    with pytest.raises(DataError, match=r"record 0: tokens\[1\] '\\ufe0f' is read as no token of its own"):
        tagged.encode(from_records([{"tokens": ["a", "\ufe0f"]}]), poor, 8)
