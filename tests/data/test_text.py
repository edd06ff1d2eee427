"""Tokens by the source's own tokenizer, and lengths into buckets."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxtransfer.data import DataError, encode, tokenizer
from jaxtransfer.data.text import bucket_lengths, end_tokens
from jaxtransfer.types import Lineage, Model, Source
from tests.language import byte_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "##s"]


def source_of(folder, kind="bert"):
    files = {path.name: path for path in folder.iterdir()}
    model = Model(kind, None, (), {})
    return Source(model, {}, Lineage("tiny", ""), {"config": {"model_type": kind}, "files": files})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A word-piece tokenizer whose file fixes padding and truncation, as real ones do."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_padding(length=16)
    made.enable_truncation(8)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}))
    (folder / "evil.py").write_text("raise SystemExit('code of the source ran')")
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    return tokenizer(source_of(folder))


def test_encode(tiny):
    out = encode(["good films", "bad"], tiny, 32)
    assert [row.tolist() for row in out.fields["input_ids"]] == [[2, 5, 7, 8, 3], [2, 6, 3]]
    assert [row.tolist() for row in out.fields["token_type_ids"]] == [[0] * 5, [0] * 3]
    assert {row.dtype for rows in out.fields.values() for row in rows} == {np.dtype(np.int32)}
    assert out.pad == {"input_ids": 0, "token_type_ids": 0}
    assert out.truncated == 0


def test_encode_counts_what_it_cuts(tiny):
    out = encode(["good " * 10, "bad", "bad bad"], tiny, 4)
    assert [len(row) for row in out.fields["input_ids"]] == [4, 3, 4]
    assert out.fields["input_ids"][0].tolist() == [2, 5, 5, 3]
    assert out.truncated == 1
    with pytest.raises(DataError, match="max_length: 2 leaves no room beside 2 special tokens"):
        encode(["good"], tiny, 2)


def test_fixed_padding_and_truncation_are_off(tiny):
    assert len(tiny.backend_tokenizer.encode("good " * 20).ids) == 22
    encode(["good " * 20], tiny, 4)
    assert len(tiny.backend_tokenizer.encode("good " * 20).ids) == 22  # and stay off


def test_no_tokenizer(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(DataError, match="tiny: comes without tokenizer files"):
        tokenizer(source_of(tmp_path))


def test_broken_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match="tiny: its tokenizer cannot be read") as caught:
        tokenizer(source_of(tmp_path))
    assert "\n" not in str(caught.value)


def test_code_of_the_source_is_not_run(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    try:  # transformers either takes a class of its own or refuses
        assert len(encode(["good"], tokenizer(source_of(tmp_path)), 8).fields["input_ids"][0]) == 3
    except DataError as error:
        assert "\n" not in str(error)


def test_nothing_is_printed(folder, tmp_path):
    """Without torch in particular: transformers has something to say about that."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from jaxtransfer.data import encode, tokenizer\n"
        "from jaxtransfer.types import Lineage, Model, Source\n"
        f"files = {{p.name: p for p in Path({str(folder)!r}).iterdir()}}\n"
        "source = Source(Model('bert', None, (), {}), {}, Lineage('x', ''), {'files': files})\n"
        "encode(['good ' * 600], tokenizer(source), 8)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (found.stdout, found.stderr) == ("", "")


def test_a_text_ends_where_any_of_the_files_says(folder, tmp_path, tiny):
    """The tokenizer's end, then config.json's, then generation_config.json's."""
    file = tmp_path / "generation_config.json"

    def ends(config, generation):
        file.write_text(generation)
        source = dataclasses.replace(source_of(folder), assets={"config": config, "files": {file.name: file}})
        return end_tokens(source, byte_tokenizer())

    assert ends({"eos_token_id": 7}, '{"eos_token_id": [7, 9, 0]}') == (0, 7, 9)
    assert ends({}, "{}") == (0,)
    assert end_tokens(source_of(folder), tiny) == ()
    with pytest.raises(DataError, match=r"tiny: config\.json: eos_token_id is 'x', expected a token or a list"):
        ends({"eos_token_id": "x"}, "{}")
    with pytest.raises(DataError, match=r"tiny: generation_config\.json: cannot be read"):
        ends({}, "{")
    with pytest.raises(DataError, match=r"generation_config\.json: expected one JSON object"):
        ends({}, "[3]")


def test_minilm(minilm_folder):
    real = tokenizer(source_of(minilm_folder))
    assert real.backend_tokenizer.padding is None
    assert real.backend_tokenizer.truncation is None
    out = encode(["The cat sits outside", "word " * 400], real, 256)
    assert out.fields["input_ids"][0].tolist() == [101, 1996, 4937, 7719, 2648, 102]
    assert (len(out.fields["input_ids"][1]), out.truncated) == (256, 1)
    assert set(out.fields) == {"input_ids", "token_type_ids"}


@pytest.mark.parametrize("buckets", [(), (8, 8), (16, 8), (0, 8)])
def test_bad_buckets(buckets):
    with pytest.raises(DataError, match="buckets: must be increasing"):
        bucket_lengths(np.array([1]), buckets)


def test_too_long_for_the_buckets():
    with pytest.raises(DataError, match="an example has 17 tokens, the largest bucket 16"):
        bucket_lengths(np.array([3, 17]), (8, 16))


def test_a_chat_template_in_a_file_of_its_own(folder, tmp_path):
    for path in folder.glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = tokenizer(source_of(tmp_path))
    assert found.apply_chat_template([{"role": "user", "content": "good"}], tokenize=False) == "good"
