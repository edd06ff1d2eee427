r"""Words and their tags: sentences that are split into words already, and how a text as it is typed is split."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import DataError, Dataset, Row, half_character
from jaxtransfer.data.text import windows
from jaxtransfer.tree.paths import natural

OUTSIDE = "O"
_SCHEME = re.compile(r"([BIESUL])-(.+)")
# Han characters and kana stand alone, as their corpora have them; names, numbers and what an apostrophe or a hyphen
# joins stay whole; of everything else each character is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[@#]?(?:(?![\u3040-\u30ff\u3400-\u9fff])\w)+(?:['’.-]\w+)*|[^\s\w]")


def split_words(text: str) -> list[tuple[int, int]]:
    """The words of a text as it is typed, each as its first character and the one behind its last.

    Example:
      >>> text = "@anna's in Paris."
      >>> [text[start:stop] for start, stop in split_words(text)]
      ["@anna's", 'in', 'Paris', '.']
    """
    return [found.span() for found in _WORD.finditer(text)]


def parts_of(tag: str) -> tuple[str, str]:
    """A tag's position in its entity and the entity's type; ``("", "")`` of what is outside.

    Example:
      >>> parts_of("B-person"), parts_of("O")
      (('B', 'person'), ('', ''))
    """
    found = _SCHEME.fullmatch(tag)
    return (found[1], found[2]) if found else ("", "")


def is_scheme(tags: Sequence[str]) -> bool:
    """Whether tags mark entities, by their beginnings and insides (IOB, IOBES, BILOU), and are no classes of words.

    Example:
      >>> is_scheme(["O", "B-person", "I-person"]), is_scheme(["NOUN", "VERB"])
      (True, False)
    """
    return len(tags) > 1 and all(tag == OUTSIDE or _SCHEME.fullmatch(tag) for tag in tags)


def words(dataset: Dataset, column: str = "tokens") -> list[list[str]]:
    """The words of every row, none of them blank; a text is split where it has spaces.

    Raises:
      DataError: a row without words, or a word that is no text, is blank, or holds half a character, with its line.
    """
    return [_words(row, column) for row in dataset.rows]


def _words(row: Row, column: str) -> list[str]:
    found = _listed(row, column, "words")
    if not found:
        raise DataError(f"{row.where}: {column} is empty")
    for i, word in enumerate(found):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{row.where}: {column}[{i}] is {word!r}, expected a word")
        if half := half_character(word):
            raise DataError(f"{row.where}: {column}[{i}] holds {half}")
    return found


def names(dataset: Dataset, column: str = "tags") -> tuple[str, ...]:
    """The different tags of a column: ``O`` first, then by type, an entity's beginning before its inside."""
    found = {tag for row in dataset.rows for tag in _tags(row, column)}
    return tuple(sorted(found, key=lambda tag: (tag != OUTSIDE, natural(parts_of(tag)[1] or tag), tag)))


def ids(dataset: Dataset, labels: Sequence[str], column: str = "tags", of: str = "tokens") -> list[np.ndarray]:
    """Each tag's position among ``labels``, of every row (W_i,) int32; a whole number that is no name counts.

    Raises:
      DataError: a tag that is not among them, or a row with more or fewer tags than words, with its line.
    """
    known = {str(i): i for i in range(len(labels))} | {label: i for i, label in enumerate(labels)}
    out = []
    for row in dataset.rows:
        tags, count = _tags(row, column), len(_listed(row, of, "words"))
        if len(tags) != count:
            raise DataError(f"{row.where}: {len(tags)} {column} for {count} {of}")
        for i, tag in enumerate(tags):
            if tag not in known:
                raise DataError(f"{row.where}: {column}[{i}] {tag!r} is unknown; known: {', '.join(labels)}")
        out.append(np.array([known[tag] for tag in tags], np.int32))
    return out


def _tags(row: Row, column: str) -> list[str]:
    found = _listed(row, column, "tags")
    for i, tag in enumerate(found):
        if isinstance(tag, bool) or not (isinstance(tag, (int, np.integer)) or (isinstance(tag, str) and tag.strip())):
            raise DataError(f"{row.where}: {column}[{i}] is {tag!r}, expected a name or a whole number")
    return [str(tag) for tag in found]


def _listed(row: Row, column: str, what: str) -> list:
    value = row.values[column]
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise DataError(f"{row.where}: {column} is {value!r}, expected a list of {what}")
    return list(value)


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """Sentences as tokens, those that are too long in several pieces.

    Attributes:
      input_ids: per piece (T_i,) int32.
      words: per piece (T_i,) int32: the word of its sentence that begins with this token, -1 where none does.
      sentence: (N,) int32: the row that each piece is of, in order.
      texts: the words of every row.
    """

    input_ids: list[np.ndarray]
    words: list[np.ndarray]
    sentence: np.ndarray
    texts: list[list[str]]


def encode(dataset: Dataset, tokenizer: Any, max_length: int, *, column: str = "tokens") -> Pieces:
    """Token ids of each sentence, its words between single spaces, and which token every word begins with.

    A word of which the tokenizer leaves nothing, such as a lone variation selector, is read as its unknown token, so
    that every word has a token that stands for it.

    Args:
      dataset: with a column of words.
      tokenizer: from `data.text.tokenizer`.
      max_length: of a piece, in tokens, the special ones included.
      column: the name of that column.

    Raises:
      DataError: as `words`; ``max_length`` leaves no room; a word that no token stands for.
    """
    sentences = words(dataset, column)
    found, lost = _pieces(sentences, tokenizer, max_length)
    if lost and tokenizer.unk_token is not None:
        read = list(sentences)
        for row, word in lost:
            read[row] = [*read[row][:word], tokenizer.unk_token, *read[row][word + 1 :]]
        found, lost = _pieces(read, tokenizer, max_length)
    if lost:
        row, word = lost[0]
        name = sentences[row][word]
        raise DataError(f"{dataset.rows[row].where}: {column}[{word}] {name!a} is read as no token of its own")
    ids, begun, sentence = found
    return Pieces(ids, begun, sentence, sentences)


def _pieces(
    sentences: Sequence[Sequence[str]], tokenizer: Any, size: int
) -> tuple[tuple[Any, ...], list[tuple[int, int]]]:
    """Tokens, words and sentence of each piece, and the words that no token begins: (sentence, word)."""
    out = windows([" ".join(sentence) for sentence in sentences], tokenizer, size, return_offsets_mapping=True)
    sentence = np.array(out["overflow_to_sample_mapping"], np.int32)
    bounds = np.searchsorted(sentence, np.arange(len(sentences) + 1))
    ids = [np.array(row, np.int32) for row in out["input_ids"]]
    begun: list[np.ndarray] = []
    lost: list[tuple[int, int]] = []
    for number, given in enumerate(sentences):
        spans = [np.array(out["offset_mapping"][i]) for i in range(bounds[number], bounds[number + 1])]
        stops = np.cumsum([len(word) + 1 for word in given]) - 1
        starts, (low, high) = stops - [len(word) for word in given], np.concatenate(spans).T
        word = np.searchsorted(stops, low, side="right")  # a token may begin with the space before its word
        some = np.flatnonzero((low < high) & (word < len(given)) & (high > starts[np.minimum(word, len(given) - 1)]))
        named, first = np.unique(word[some], return_index=True)
        flat = np.full(len(low), -1, np.int32)
        flat[some[first]] = named
        begun += np.split(flat, np.cumsum([len(span) for span in spans])[:-1])
        lost += [(number, int(i)) for i in np.setdiff1d(np.arange(len(given)), named)]
    return (ids, begun, sentence), lost
