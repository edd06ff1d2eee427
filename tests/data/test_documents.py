"""Records into predictions: which tokens are read, which are targets, and what they spell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtransfer.data import DataError, from_records
from jaxtransfer.data.chat import chats
from jaxtransfer.data.documents import completions, fit, plain, prompt_tokens, spelled
from tests.language import BOS, CHAT, EOS, MARKED, byte_tokenizer, spell

BYTES = byte_tokenizer()
MERGED = byte_tokenizer(merges=[("a", "b"), ("Ã", "©"), ("Ġ", "ab")])
TEXTS = st.lists(st.text(alphabet="ab é\n€😀", min_size=1).filter(str.strip), min_size=1, max_size=5)


def targets(doc, tokenizer):
    return spell(tokenizer, doc.targets[doc.counts])


@given(TEXTS, st.booleans())
@settings(deadline=None)
def test_every_token_of_a_text_is_predicted_once(texts, merged):
    """And the bytes of the targets are those of the text, however it is split."""
    tokenizer = MERGED if merged else BYTES
    data = from_records([{"text": text} for text in texts])
    found, notes = plain(data, tokenizer)
    assert notes == ()
    for i, (doc, text) in enumerate(zip(found, texts, strict=True)):
        ids = tokenizer(text)["input_ids"]
        assert doc.record == i
        assert doc.inputs.tolist() == [EOS, *ids]
        assert doc.targets.tolist() == [*ids, EOS]
        assert doc.counts.all()
        assert doc.bytes.sum() == len(text.encode())
    pieces, _ = fit(found, data, 3, "split")
    assert max(map(len, pieces)) <= 3
    for i, doc in enumerate(found):
        own = [piece for piece in pieces if piece.record == i]
        for field in ("inputs", "targets", "counts", "bytes"):
            joined = np.concatenate([getattr(piece, field) for piece in own])
            np.testing.assert_array_equal(joined, getattr(doc, field))


def test_bytes_go_to_the_token_that_spells_them():
    (doc,), _ = plain(from_records([{"text": "ab éa"}]), MERGED)
    assert [spell(MERGED, [token]) for token in doc.targets] == ["ab", " ", "é", "a", "<eos>"]
    assert doc.bytes.tolist() == [2, 1, 2, 1, 0]
    assert doc.bytes.dtype == doc.inputs.dtype == doc.targets.dtype == np.int32


@given(st.text(), st.lists(st.integers(0, 12), min_size=1))
@settings(deadline=None)
def test_bytes_add_up_whatever_the_offsets(text, ends):
    found = spelled(text, ends)
    assert (len(found), found.sum()) == (len(ends), len(text.encode()))
    assert (found >= 0).all()


def test_beginning_of_sequence():
    (doc,), _ = plain(from_records([{"text": "ab"}]), byte_tokenizer(bos=True))
    assert doc.inputs[0] == BOS
    assert doc.targets[-1] == EOS
    (doc,), _ = plain(from_records([{"text": "abc"}]), byte_tokenizer(eos=False))
    assert (targets(doc, BYTES), doc.bytes.tolist()) == ("bc", [1, 1])
    with pytest.raises(DataError, match="records, record 0: text is one token, which leaves nothing to predict"):
        plain(from_records([{"text": "a"}]), byte_tokenizer(eos=False))


def test_special_tokens_in_a_text_are_told():
    found, notes = plain(from_records([{"text": "a<eos>b"}, {"text": "ab"}]), BYTES)
    assert found[0].targets.tolist().count(EOS) == 2
    assert notes == ("records: 1 of 2 texts hold special tokens of the tokenizer, read as such",)


@pytest.mark.parametrize("bos", [False, True])
def test_completions_alone_are_targets(bos):
    tokenizer = byte_tokenizer(bos=bos)
    (doc,), notes = completions(from_records([{"prompt": "Q: é?", "completion": " né"}]), tokenizer)
    assert spell(tokenizer, doc.inputs) == ("<bos>" if bos else "") + "Q: é? né"
    assert targets(doc, tokenizer) == " né<eos>"
    assert doc.bytes[doc.counts].sum() == len(" né".encode())
    assert doc.counts.tolist() == [False] * (5 + bos) + [True] * 5
    assert notes == ()


def test_a_prompt_is_cut_as_it_is_when_asked():
    """`a|b` is one token of the two together; the model is asked with `a` alone."""
    records = [{"prompt": "xa", "completion": "bab"}, {"prompt": "x", "completion": "ab"}]
    found, notes = completions(from_records(records), MERGED)
    assert [[spell(MERGED, [token]) for token in doc.targets[doc.counts]] for doc in found] == [
        ["b", "ab", "<eos>"],
        ["ab", "<eos>"],
    ]
    assert [doc.bytes[doc.counts].tolist() for doc in found] == [[1, 2, 0], [2, 0]]
    assert notes == ("records: 1 of 2 prompts end within a token; their completions are tokenised apart",)


def test_what_the_tokenizer_puts_behind_a_text_is_not_behind_a_prompt():
    from tokenizers import processors

    tokenizer = byte_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    (asked,) = prompt_tokens(["ab"], tokenizer)
    assert spell(tokenizer, asked) == "<bos>ab"
    (doc,), _ = completions(from_records([{"prompt": "ab", "completion": "c"}]), tokenizer)
    assert doc.inputs.tolist()[: len(asked)] == asked


def test_long_documents():
    data = from_records([{"text": "abcdefgh"}, {"text": "ab"}, {"text": "abcdefghijk"}], "books")
    found, _ = plain(data, BYTES)
    assert fit(found, data, 12, "error") == (found, ())
    told = "books, record 0: has 9 tokens, max_length is 4, which 2 of 3 documents exceed; say what to do"
    with pytest.raises(DataError, match=told):
        fit(found, data, 4, "error")
    cut, notes = fit(found, data, 4, "cut")
    assert [targets(doc, BYTES) for doc in cut] == ["abcd", "ab<eos>", "abcd"]
    assert notes == ("books: 2 of 3 documents cut to 4 tokens, 54.2% of all tokens left out",)
    pieces, notes = fit(found, data, 4, "split")
    assert [targets(doc, BYTES) for doc in pieces] == ["abcd", "efgh", "<eos>", "ab<eos>", "abcd", "efgh", "ijk<eos>"]
    assert [doc.record for doc in pieces] == [0, 0, 0, 1, 2, 2, 2]
    assert notes == ("books: 2 of 3 documents split into pieces of 4 tokens",)


def test_a_cut_that_leaves_no_target():
    data = from_records([{"prompt": "abcdef", "completion": "gh"}])
    found, _ = completions(data, BYTES)
    with pytest.raises(DataError, match="records, record 0: has no target within max_length, 5 tokens"):
        fit(found, data, 5, "cut")


TALK = [
    {"role": "user", "content": "hé"},
    {"role": "assistant", "content": "né"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "ok"},
]


def test_chat_by_what_each_turn_adds():
    tokenizer = byte_tokenizer(template=CHAT)
    (doc,) = chats(from_records([{"messages": TALK}]), tokenizer)
    assert (
        spell(tokenizer, [*doc.inputs, doc.targets[-1]]) == "<|user|>hé\n<|assistant|>né\n<|user|>so\n<|assistant|>ok\n"
    )
    assert targets(doc, tokenizer) == "né\nok\n"
    assert doc.bytes[doc.counts].sum() == len("né\nok\n".encode())


def test_chat_by_the_templates_marks():
    tokenizer = byte_tokenizer(template=CHAT)
    (doc,) = chats(from_records([{"messages": TALK}]), tokenizer, MARKED)
    assert targets(doc, tokenizer) == "néok"
    assert doc.bytes[doc.counts].sum() == len("néok".encode())


BAD_TALKS = {
    "no list": ("hi", CHAT, "messages is 'hi', expected a list of roles and contents"),
    "empty": ([], CHAT, r"messages is \[\], expected a list"),
    "no role": ([{"content": "x"}], CHAT, "messages hold .*, expected a role and a content"),
    "no assistant": (TALK[:1], CHAT, "messages hold nothing that the assistant says"),
    "half a character": ([*TALK[:1], {**TALK[1], "content": "\ud83d"}], CHAT, "messages, rendered, hold '.ud83d' at"),
    "refused": (TALK, "{{ raise_exception('no system prompt') }}", "template refuses the messages: no system prompt"),
    "not Jinja": (TALK, "{% for %}", "template refuses the messages: "),
    "other as a part": (
        TALK,
        "{{ messages | length }}" + CHAT,
        "renders the turns up to 1 otherwise than in the whole",
    ),
}


@pytest.mark.parametrize("name", BAD_TALKS)
def test_bad_chats(name):
    messages, template, message = BAD_TALKS[name]
    with pytest.raises(DataError, match=f"records, record 0: .*{message}") as caught:
        chats(from_records([{"messages": messages}]), byte_tokenizer(template=template))
    assert "\n" not in str(caught.value)


def test_no_chat_template():
    with pytest.raises(DataError, match="bytes: its tokenizer has no chat template; set chat_template"):
        chats(from_records([{"messages": TALK}]), BYTES)
