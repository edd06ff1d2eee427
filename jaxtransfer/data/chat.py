"""Conversations, rendered by a chat template into the documents that a language model learns from."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtransfer.data.catalogs import first_line
from jaxtransfer.data.dataset import DataError, Dataset, Row, half_character
from jaxtransfer.data.documents import Document, document, encode_pieces, spelled

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chats(dataset: Dataset, tokenizer: Any, template: str | None = None) -> list[Document]:
    """Conversations, of which the assistant's tokens are targets: the column ``messages`` of roles and contents.

    The template renders a conversation, special tokens included. Where it marks what the assistant says by
    ``{% generation %}``, that is what counts. Elsewhere it is what the rendering of the turns up to the assistant's
    adds to that of the turns before it with the prompt for an answer; by their tokens both have to be beginnings of
    the whole.

    Args:
      dataset: each record a list of ``{"role": ..., "content": ...}``.
      tokenizer: from `data.text.tokenizer`.
      template: of Jinja; None is the tokenizer's own.

    Raises:
      DataError: no template; a conversation that is none, that the template refuses, in which the assistant says
        nothing, or of which it renders a part otherwise than the whole.
    """
    try:
        chosen: str = tokenizer.get_chat_template(template)
    except ValueError:
        raise DataError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; set chat_template") from None
    found = []
    for i, row in enumerate(dataset.rows):
        messages = _messages(row)
        text = _render(row, messages, tokenizer, chosen)
        if half := half_character(text):
            raise DataError(f"{row.where}: messages, rendered, hold {half}")
        ids, ends = next(encode_pieces([text], tokenizer))
        count = _marked if _MARKS.search(chosen) else _turns
        found.append(document(i, ids, spelled(text, ends), count(row, messages, ids, tokenizer, chosen)))
        if not found[-1].counts.any():
            raise DataError(f"{row.where}: messages hold nothing that the assistant says")
    return found


def _messages(row: Row) -> Sequence[Mapping[str, Any]]:
    messages = row.values["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.where}: messages is {messages!r:.60}, expected a list of roles and contents")
    for turn in messages:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise DataError(f"{row.where}: messages hold {turn!r:.60}, expected a role and a content")
    return messages


def _render(row: Row, messages: Any, tokenizer: Any, template: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, **{"tokenize": False, **options})
    except ImportError:
        raise DataError(f"{row.where}: a chat template needs the package jinja2: pip install jinja2") from None
    except Exception as error:  # a template is a program, and raises what it likes
        raise DataError(f"{row.where}: the chat template refuses the messages: {first_line(error)}") from None


def _marked(row: Row, messages: Any, ids: list[int], tokenizer: Any, template: str) -> np.ndarray:
    """Which tokens the template marks as generated."""
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = _render(row, messages, tokenizer, template, **options)
    if found["input_ids"] != ids:
        raise DataError(f"{row.where}: the tokenizer adds tokens to what the chat template renders")
    return np.asarray(found["assistant_masks"], bool)


def _turns(row: Row, messages: Any, ids: list[int], tokenizer: Any, template: str) -> np.ndarray:
    """Which tokens the assistant's turns add."""
    counts = np.zeros(len(ids), bool)
    for k, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = _render(row, messages[:k], tokenizer, template, add_generation_prompt=True)
        after = _render(row, messages[: k + 1], tokenizer, template)
        (start, _), (stop, _) = encode_pieces([before, after], tokenizer)
        if ids[: len(start)] != start or ids[: len(stop)] != stop:
            raise DataError(
                f"{row.where}: the chat template renders the turns up to {k} otherwise than in the whole conversation, "
                "so that its tokens cannot be told apart; mark them in chat_template by {% generation %}"
            )
        counts[len(start) : len(stop)] = True
    return counts
