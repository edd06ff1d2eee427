"""Questions about texts and the answers that stand in them: checked, and as windows of tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import DataError, Dataset, Row
from jaxtransfer.data.text import windows

Answer = tuple[str, int]
"""A text, and the character of the context that it begins at."""


def answers(dataset: Dataset, *, unanswerable: bool = False, column: str = "answers") -> list[tuple[Answer, ...]]:
    """The answers to every row's question, as SQuAD has them: ``{"text": [...], "answer_start": [...]}``.

    Args:
      dataset: with a column of answers, and ``context``.
      unanswerable: whether a question may have none.
      column: the name of the former.

    Raises:
      DataError: a value of another form, no answer, or one that does not stand where it is said to, with its line.
    """
    out = []
    for row, context in zip(dataset.rows, dataset.strings("context"), strict=True):
        found = _answers(row, column)
        if not found and not unanswerable:
            raise DataError(f"{row.where}: {column} is empty; where a question may have no answer, set unanswerable")
        for text, start in found:
            there = context[start : start + len(text)] if start >= 0 else ""
            if there != text or not text:
                raise DataError(f"{row.where}: {column} {text!r:.60}: at character {start} of context is {there!r:.60}")
        out.append(found)
    return out


def _answers(row: Row, column: str) -> tuple[Answer, ...]:
    value = row.values[column]
    if isinstance(value, (list, tuple)) and all(isinstance(each, Mapping) for each in value):
        value = {name: [each.get(name) for each in value] for name in ("text", "answer_start")}
    if not isinstance(value, Mapping) or not {"text", "answer_start"} <= value.keys():
        raise DataError(f"{row.where}: {column} is {value!r:.80}, expected text and answer_start of each answer")
    texts, starts = (list(np.atleast_1d(np.asarray(value[name], object))) for name in ("text", "answer_start"))
    if len(texts) != len(starts):
        raise DataError(f"{row.where}: {column} has {len(texts)} texts and {len(starts)} places")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, (int, np.integer)):
            raise DataError(f"{row.where}: {column} is {value!r:.80}, expected texts and whole numbers")
    return tuple((text, int(start)) for text, start in zip(texts, starts, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Questions with their contexts, those that are too long in several windows that overlap.

    Attributes:
      fields: per window ``input_ids`` and, where the tokenizer gives them, ``token_type_ids``, (T_i,) int32.
      offsets: per window (T_i, 2) int32: each token's characters ``[start, stop)`` in the context; 0, 0 of others.
      question: (N,) int32: the row that each window is of, in order.
    """

    fields: Mapping[str, list[np.ndarray]]
    offsets: list[np.ndarray]
    question: np.ndarray


def encode(dataset: Dataset, tokenizer: Any, max_length: int, stride: int) -> Windows:
    """Each question before its context, of which a window holds as much as there is room for.

    Args:
      dataset: with the columns ``question`` and ``context``.
      tokenizer: from `data.text.tokenizer`.
      max_length: of a window, in tokens, the question and the special ones included.
      stride: tokens of the context that a window repeats of the one before.

    Raises:
      DataError: an empty text, or a question that leaves the context no more than ``stride`` tokens.
    """
    questions, contexts = dataset.strings("question"), dataset.strings("context")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    sizes = tokenizer(questions, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for row, ids in zip(dataset.rows, sizes, strict=True):
        if (room := max_length - special - len(ids)) <= stride:
            raise DataError(
                f"{row.where}: question has {len(ids)} tokens, which leave {max(room, 0)} of max_length {max_length} "
                f"to its context: no more than stride, {stride}"
            )
    types = "token_type_ids" in tokenizer.model_input_names
    out = windows(
        questions, tokenizer, max_length, text_pair=contexts, truncation="only_second", stride=stride,
        return_offsets_mapping=True, return_token_type_ids=types,
    )  # fmt: skip
    names = ("input_ids", *(["token_type_ids"] if types else []))
    offsets = []
    for spans, encoding in zip(out["offset_mapping"], out.encodings, strict=True):
        second = np.array([part == 1 for part in encoding.sequence_ids])
        offsets.append(np.where(second[:, None], np.array(spans), 0).astype(np.int32))
    fields = {name: [np.array(row, np.int32) for row in out[name]] for name in names}
    return Windows(fields, offsets, np.array(out["overflow_to_sample_mapping"], np.int32))


def positions(offsets: np.ndarray, answer: Answer | None) -> tuple[int, int]:
    """The first and the last token of an answer; the first token of all, twice, where the window does not hold it.

    Args:
      offsets: (T, 2), as `Windows` has them.
      answer: None where there is none.

    Example:
      >>> spans = np.array([[0, 0], [0, 0], [0, 3], [4, 9], [0, 0]])
      >>> positions(spans, ("fox", 5)), positions(spans, ("the fox", 0)), positions(spans, ("dog", 20))
      ((3, 3), (2, 3), (0, 0))
    """
    if answer is None:
        return 0, 0
    low, high = answer[1], answer[1] + len(answer[0])
    inside = np.flatnonzero((offsets[:, 1] > low) & (offsets[:, 0] < high))
    held = np.flatnonzero(offsets[:, 1])
    if not len(inside) or offsets[held[0], 0] > low or offsets[held[-1], 1] < high:
        return 0, 0
    return int(inside[0]), int(inside[-1])
