"""Texts into tokens with the source's own tokenizer, and lengths into a few static shapes."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.data.catalogs import first_line
from jaxtransfer.data.dataset import DataError
from jaxtransfer.types import Source

GENERATION = "generation_config.json"
# By these beginnings a tokenizer's files are told from the others of a source; no code is ever among them.
_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece", "chat_template")


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Texts as tokens.

    Attributes:
      fields: ``"input_ids"`` and, where the tokenizer gives them, ``"token_type_ids"``: per text (T_i,) int32.
      pad: the value that each field is padded with.
      truncated: the number of texts that were cut.
    """

    fields: Mapping[str, list[np.ndarray]]
    pad: Mapping[str, int]
    truncated: int


def tokenizer(source: Source) -> Any:
    """The source's own tokenizer, from its files alone: nothing is downloaded, no code of the source runs.

    Padding and truncation that the files fix are switched off: `encode` truncates, and the loader pads.

    Raises:
      DataError: the source has no tokenizer, or one that transformers cannot read without code of the source's.
    """
    # Read once, when transformers is imported: that torch is absent is no news here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    ref = source.lineage.ref
    files = {name: path for name, path in source.assets.get("files", {}).items() if name.startswith(_FILES)}
    if not files:
        raise DataError(f"{ref}: comes without tokenizer files (tokenizer.json, vocab.txt, ...)")
    kind = {"model_type": source.assets.get("config", {}).get("model_type", source.model.family)}
    # A folder of nothing else: transformers reads more of a configuration than the kind of model that it needs here.
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            Path(folder, name).symlink_to(Path(path).resolve())
        Path(folder, "config.json").write_text(json.dumps(kind), encoding="utf-8")
        try:
            found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers and tokenizers raise whatever the parsing met
            raise DataError(f"{ref}: its tokenizer cannot be read: {first_line(error)}") from None
    if not found.is_fast:
        raise DataError(f"{ref}: its tokenizer {type(found).__name__} has no tokenizer.json and cannot be converted")
    found.name_or_path = ref
    found.backend_tokenizer.no_padding()
    found.backend_tokenizer.no_truncation()
    return found


def end_tokens(source: Source, tokenizer: Any) -> tuple[int, ...]:
    """What ends a text of the source's: the tokenizer's own end token, then what its files name besides.

    Models that were taught to converse end a turn in another token than the tokenizer's end of a text.

    Args:
      source: a language model, with its files.
      tokenizer: from :func:`tokenizer`.

    Raises:
      DataError: a file that is not JSON, or names anything else than tokens.
    """
    ref, found = source.lineage.ref, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    fields = {"config.json": source.assets.get("config", {})}
    if (path := source.assets.get("files", {}).get(GENERATION)) is not None:
        try:
            fields[GENERATION] = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{ref}: {GENERATION}: cannot be read: {error}") from None
    for name, given in fields.items():
        if not isinstance(given, Mapping):
            raise DataError(f"{ref}: {name}: expected one JSON object")
        value = given.get("eos_token_id")
        tokens = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in tokens):
            raise DataError(f"{ref}: {name}: eos_token_id is {value!r:.60}, expected a token or a list of tokens")
        found += tokens
    return tuple(dict.fromkeys(found))


def encode(texts: Sequence[str], tokenizer: Any, max_length: int) -> Encoded:
    """Token ids of each text with the special tokens, cut to ``max_length`` tokens.

    Args:
      texts: N texts.
      tokenizer: from :func:`tokenizer`.
      max_length: in tokens, the special ones included.

    Raises:
      DataError: ``max_length`` leaves no room for a token of the text.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise DataError(f"max_length: {max_length} leaves no room beside {special} special tokens")
    try:
        out = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False, return_attention_mask=False)
    finally:
        tokenizer.backend_tokenizer.no_truncation()  # the call leaves it set
    fields = {name: [np.array(row, np.int32) for row in rows] for name, rows in out.items()}
    pad = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return Encoded(
        fields=fields,
        pad={name: pad.get(name) or 0 for name in fields},
        truncated=sum(bool(encoding.overflowing) for encoding in out.encodings),
    )


def windows(texts: Sequence[str], tokenizer: Any, max_length: int, **options: Any) -> Any:
    """All tokens of each text, in as many windows of at most ``max_length`` as it takes, special tokens in each.

    Args:
      texts: N texts.
      tokenizer: from :func:`tokenizer`.
      max_length: in tokens, the special ones included.
      options: further ones of transformers' tokenizers, such as ``return_offsets_mapping``.

    Returns:
      What transformers gives, a row a window: ``input_ids``, and the text that it is of,
      ``overflow_to_sample_mapping``.

    Raises:
      DataError: ``max_length`` leaves no room for a token of the text.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise DataError(f"max_length: {max_length} leaves no room beside {special} special tokens")
    options = {"truncation": True, "return_attention_mask": False, "return_token_type_ids": False, **options}
    try:
        return tokenizer(
            list(texts), max_length=max_length, padding=False, return_overflowing_tokens=True, **options
        )  # fmt: skip
    finally:
        tokenizer.backend_tokenizer.no_truncation()  # the call leaves it set


def bucket_lengths(lengths: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """The smallest bucket that holds each length: (N,) -> (N,).

    Raises:
      DataError: buckets that do not increase, or a length beyond the largest.

    Example:
      >>> bucket_lengths(np.array([3, 8, 9]), (8, 16)).tolist()
      [8, 8, 16]
    """
    edges = np.asarray(buckets, np.int64)
    if edges.ndim != 1 or not edges.size or edges[0] < 1 or (np.diff(edges) <= 0).any():
        raise DataError(f"buckets: must be increasing lengths, got {list(buckets)}")
    if (longest := int(np.max(lengths))) > edges[-1]:
        raise DataError(f"buckets: an example has {longest} tokens, the largest bucket {edges[-1]}")
    return edges[np.searchsorted(edges, lengths)]
