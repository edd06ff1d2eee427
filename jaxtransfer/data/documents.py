"""Documents: the token sequences that a language model learns from, which tokens are targets, and what they spell.

A sequence of n + 1 tokens is n predictions: the model reads all but the last, and has to name all but the first.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from jaxtransfer.data.dataset import DataError, Dataset

Long = Literal["error", "cut", "split"]
"""What happens to a document of more tokens than a row holds."""
_AT_ONCE = 256  # texts tokenised together: the offsets of all at once would outweigh the corpus


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """The predictions of one record, aligned: position t reads ``inputs[t]`` and has to name ``targets[t]``.

    Attributes:
      inputs, targets: (n,) int32 tokens.
      counts: (n,) bool, which targets the loss is over.
      bytes: (n,) int32, the bytes of UTF-8 that each target that counts spells.
      record: the record's number in its data set.
    """

    inputs: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    bytes: np.ndarray
    record: int

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, part: slice) -> "Document":
        return Document(self.inputs[part], self.targets[part], self.counts[part], self.bytes[part], self.record)


def plain(dataset: Dataset, tokenizer: Any) -> tuple[list[Document], tuple[str, ...]]:
    """Texts of which every token is a target: the column ``text``.

    A text follows the tokenizer's beginning-of-sequence token (where there is none, its end-of-sequence token, as in
    GPT-2's training), so that its first token is predicted too and the bytes of the targets are those of the text. It
    ends in the end-of-sequence token, which spells no byte but has to be predicted. With a tokenizer that has neither,
    the first token is unpredicted and its bytes do not count.

    Returns:
      The documents, and notes for the log.

    Raises:
      DataError: a value that is no text or an empty one, or nothing to predict.
    """
    end, special = _some(tokenizer.eos_token_id), tokenizer.all_special_ids
    start = _some(tokenizer.bos_token_id) or end
    texts, found, odd = dataset.strings("text"), [], 0
    for i, (ids, ends) in enumerate(encode_pieces(texts, tokenizer)):
        odd += bool(np.isin(ids, special).any())
        spells = np.pad(spelled(texts[i], ends), (len(start), len(end)))
        found.append(document(i, [*start, *ids, *end], spells, np.ones(len(spells), bool)))
        if not len(found[-1]):
            raise DataError(f"{dataset.rows[i].where}: text is one token, which leaves nothing to predict")
    told = f"{dataset.path}: {odd} of {len(found)} texts hold special tokens of the tokenizer, read as such"
    return found, (told,) if odd else ()


def completions(dataset: Dataset, tokenizer: Any) -> tuple[list[Document], tuple[str, ...]]:
    """What follows a prompt, of which alone the tokens are targets: the columns ``prompt`` and ``completion``.

    The prompt's tokens are those of the prompt alone, as when a model is asked: `prompt_tokens`. The completion's are
    the rest of the two together; where together they are cut differently at the seam, which the notes count, those of
    the completion alone. It ends in the end-of-sequence token.

    Returns:
      The documents, and notes for the log.

    Raises:
      DataError: a value that is no text or an empty one.
    """
    prompts, texts = dataset.strings("prompt"), dataset.strings("completion")
    start, end = len(next(prompt_tokens([""], tokenizer))), _some(tokenizer.eos_token_id)
    whole = encode_pieces([prompt + text for prompt, text in zip(prompts, texts, strict=True)], tokenizer)
    parts = zip(prompt_tokens(prompts, tokenizer), encode_pieces(texts, tokenizer), whole, strict=True)
    found, seams = [], 0
    for i, (prompt, (ids, ends), (both, both_ends)) in enumerate(parts):
        before = len(prompt)
        own = before - start
        if both[:own] == prompt[start:]:
            ids, ends = both[own:], [at - len(prompts[i]) for at in both_ends[own:]]
        else:
            seams += 1
        counts = np.arange(before + len(ids) + len(end)) >= before
        spells = np.pad(spelled(texts[i], ends), (before, len(end)))
        found.append(document(i, [*prompt, *ids, *end], spells, counts))
    told = f"{dataset.path}: {seams} of {len(found)} prompts end within a token; their completions are tokenised apart"
    return found, (told,) if seams else ()


def document(record: int, tokens: Sequence[int], spells: np.ndarray, counts: np.ndarray) -> Document:
    """The predictions of a sequence, from its n + 1 tokens, the bytes that each spells, and which of them count."""
    ids = np.asarray(tokens, np.int32)
    return Document(ids[:-1], ids[1:], counts[1:], spells[1:].astype(np.int32), record)


def fit(
    documents: Sequence[Document], dataset: Dataset, size: int, long: Long
) -> tuple[list[Document], tuple[str, ...]]:
    """The documents with none longer than ``size``: the long ones refused, cut, or split into pieces.

    Each piece is a document of its own, of the same record. Every prediction of the whole is made in one piece, so
    nothing is lost but the context before it.

    Returns:
      The documents, and notes for the log.

    Raises:
      DataError: a document is longer and ``long`` is ``"error"``, or has no target left after the cut.
    """
    over = [doc for doc in documents if len(doc) > size]
    if not over:
        return list(documents), ()
    which = f"{len(over)} of {len(documents)} documents"
    if long == "error":
        raise DataError(
            f"{dataset.rows[over[0].record].where}: has {len(over[0])} tokens, max_length is {size}, which {which} "
            "exceed; say what to do with them: long: cut, or split"
        )
    if long == "split":
        pieces = [doc[at : at + size] for doc in documents for at in range(0, len(doc), size)]
        return pieces, (f"{dataset.path}: {which} split into pieces of {size} tokens",)
    cut = [doc[:size] for doc in documents]
    for doc in cut:
        if not doc.counts.any():
            raise DataError(f"{dataset.rows[doc.record].where}: has no target within max_length, {size} tokens")
    lost = sum(len(doc) - size for doc in over) / sum(map(len, documents))
    return cut, (f"{dataset.path}: {which} cut to {size} tokens, {lost:.1%} of all tokens left out",)


def prompt_tokens(prompts: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """The tokens of each prompt, the same in training and when a model is asked.

    The beginning-of-sequence token is before them where the tokenizer itself puts one. What it puts behind a text is
    not: a text that goes on has not ended.
    """
    bos, own = tokenizer.bos_token_id, tokenizer.backend_tokenizer.encode("").ids
    start = own[:1] if own[:1] == [bos] else []
    for ids, _ in encode_pieces(prompts, tokenizer):
        yield [*start, *ids]


def encode_pieces(texts: Sequence[str], tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of each text, without any that is not in it, and the character that each ends before."""
    for low in range(0, len(texts), _AT_ONCE):
        part = list(texts[low : low + _AT_ONCE])
        for found in tokenizer.backend_tokenizer.encode_batch(part, add_special_tokens=False):
            yield found.ids, [end for _, end in found.offsets]


def spelled(text: str, ends: Sequence[int]) -> np.ndarray:
    """Bytes of UTF-8 that each token adds to those before it: (n,), which add up to the bytes of the text.

    A character that takes several tokens counts with the first; what no token holds, with the token after it, and at
    the end of the text with the last.

    Args:
      text: the text.
      ends: (n,) the characters that the tokens end before.

    Example:
      >>> spelled("né!", [1, 2, 2, 3]).tolist()
      [1, 2, 0, 1]
    """
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])
    reached = np.maximum.accumulate(np.clip(np.asarray(ends, np.int64), 0, len(codes)))
    reached[-1:] = len(codes)
    return np.diff(before[reached], prepend=0)


def _some(token: int | None) -> list[int]:
    return [] if token is None else [token]
