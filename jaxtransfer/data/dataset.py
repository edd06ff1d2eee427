"""The record of what was read: rows with their places, texts and classes checked on the way out."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtransfer.tree.paths import natural

_WHOLE = re.compile(r"\s*[+-]?\d+\s*")
_HALF = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """Data that cannot be used: what is wrong, where, and what was expected."""


class Row(NamedTuple):
    """One record and its place: ``"reviews.csv, line"``, 7, ``{"text": ..., "label": ...}``."""

    place: str
    number: int
    values: dict[str, Any]

    @property
    def where(self) -> str:
        """The place in words: ``"reviews.csv, line 7"``."""
        return f"{self.place} {self.number}"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Records in memory: a sequence of dictionaries under the task's column names.

    Attributes:
      path: what was read.
      columns: the task's columns.
      rows: the records with the places they come from.
      digest: SHA-256 of the file read; of the files' SHA-256 where there are several; of names and sizes of a folder of
        images; of the records elsewhere.
      notes: what was left out and why, for the log.
    """

    path: str
    columns: tuple[str, ...]
    rows: Sequence[Row] = dataclasses.field(repr=False)
    digest: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index].values

    def strings(self, column: str) -> list[str]:
        """The texts of a column, none of them blank.

        Raises:
          DataError: a value that is no text or an empty one, or holds half a character, with its line.
        """
        for row in self.rows:
            value = row.values[column]
            if not isinstance(value, str):
                raise DataError(f"{row.where}: {column} is {value!r}, expected a text")
            if not value.strip():
                raise DataError(f"{row.where}: {column} is empty")
            if half := half_character(value):
                raise DataError(f"{row.where}: {column} holds {half}")
        return [row.values[column] for row in self.rows]

    def classes(self, column: str, *, multi_label: bool = False) -> tuple[str, ...]:
        """The different labels of a column in natural order; the integer 3 is the label ``"3"``.

        With ``multi_label`` a row has any number of them: see :meth:`multi_hot`.
        """
        if not multi_label:
            return tuple(sorted({label_of(row, column) for row in self.rows}, key=natural))
        rows = [_several(row, column) for row in self.rows]
        found = {label for row in rows for label in (row if isinstance(row, list) else map(str, range(len(row))))}
        return tuple(sorted(found, key=natural))

    def class_ids(self, column: str, labels: Sequence[str]) -> np.ndarray:
        """Each label's position among ``labels``: (N,) int32.

        A whole number that is no name counts into ``labels``, unless these are whole numbers in another order.

        Raises:
          DataError: a label that is not among them, with its line.

        Example:
          >>> from_records([{"label": "good"}, {"label": 0}]).class_ids("label", ["bad", "good"])
          array([1, 0], dtype=int32)
        """
        ids = _index(labels)
        return np.array([_positions(row, column, [label_of(row, column)], ids)[0] for row in self.rows], np.int32)

    def multi_hot(self, column: str, labels: Sequence[str]) -> np.ndarray:
        """Which of ``labels`` each row has: (N, C) float32 of 0 and 1.

        A value is a list of names, a text of names with ``|`` between them (empty for none), one whole number that
        counts into ``labels`` as in :meth:`class_ids`, or a vector of C zeros and ones.

        Raises:
          DataError: a label that is not among them, or a vector of another length, with its line.

        Example:
          >>> from_records([{"label": "cat|dog"}, {"label": ""}, {"label": [0, 1]}]).multi_hot("label", ["cat", "dog"])
          array([[1., 1.],
                 [0., 0.],
                 [0., 1.]], dtype=float32)
        """
        ids, out = _index(labels), np.zeros((len(self.rows), len(labels)), np.float32)
        for number, row in enumerate(self.rows):
            found = _several(row, column)
            if isinstance(found, list):
                out[number, _positions(row, column, found, ids)] = 1
            elif len(found) == len(labels):
                out[number] = found
            else:
                raise DataError(f"{row.where}: {column} has {len(found)} values for {len(labels)} labels")
        return out


def from_records(records: Sequence[Mapping[str, Any]], name: str = "records") -> Dataset:
    """A data set of records in memory.

    Raises:
      DataError: no records, or one with other columns than the first.
    """
    if not records:
        raise DataError(f"{name}: no records")
    columns = tuple(records[0])
    rows = [rename(Row(f"{name}, record", i, dict(r)), {c: c for c in columns}) for i, r in enumerate(records)]
    return Dataset(name, columns, rows, digest_rows(rows))


def rename(row: Row, wanted: Mapping[str, str]) -> Row:
    """The row's wanted columns alone, under the task's names.

    Raises:
      DataError: a column that the row has not.
    """
    for column in wanted.values():
        if column not in row.values:  # the message is made for the one row that needs it
            check_columns(row.where, wanted.values(), row.values)
    return row._replace(values={name: row.values[column] for name, column in wanted.items()})


def check_columns(where: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    """Raises :class:`DataError` for the first wanted column that is not among the known ones."""
    known = list(known)
    for column in wanted:
        if column not in known:
            raise DataError(f"{where}: no column {column!r}; it has {', '.join(map(str, known))}")


def label_of(row: Row, column: str) -> str:
    """The label of a row: a name, or a whole number as text.

    Raises:
      DataError: anything else.
    """
    value = row.values[column]
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, (int, np.integer)):
        return str(value).lower() if isinstance(value, bool) else str(int(value))
    raise DataError(f"{row.where}: {column} is {value!r}, expected a name or a whole number")


def half_character(text: str) -> str | None:
    r"""What a text holds that no encoding has, for a message; JSON can spell half of a pair of surrogates alone.

    Example:
      >>> half_character("good \ud800")
      "'\\ud800' at character 5, half of a surrogate pair"
    """
    found = _HALF.search(text)
    return found and f"{found[0]!r} at character {found.start()}, half of a surrogate pair"


def _several(row: Row, column: str) -> list[str] | np.ndarray:
    """The labels of a row that may have any number of them: by name, or a vector (C,) of 0 and 1."""
    value = row.values[column]
    if isinstance(value, str):
        return [name for part in value.split("|") if (name := part.strip())]
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return list(value)
    if not isinstance(value, (list, tuple, np.ndarray)):
        return [label_of(row, column)]
    vector = np.asarray(value)
    if vector.ndim != 1 or vector.dtype.kind not in "biuf" or not np.isin(vector, (0, 1)).all():
        raise DataError(f"{row.where}: {column} is {value!r}, expected names, or a vector of 0 and 1")
    return vector


def _index(labels: Sequence[str]) -> dict[str, int]:
    """Label -> position, the names first; a whole number that is no name counts, where it can mean nothing else."""
    names = {label: i for i, label in enumerate(labels)}
    if any(_WHOLE.fullmatch(label) and label != str(i) for label, i in names.items()):
        return names  # of classes 1 to 5, a 0 is a mistake and not the first
    return names | {str(i): i for i in range(len(labels)) if str(i) not in names}


def _positions(row: Row, column: str, found: Sequence[str], ids: Mapping[str, int]) -> list[int]:
    if unknown := [label for label in found if label not in ids]:
        known = ", ".join(list(ids)[: len(set(ids.values()))])
        raise DataError(f"{row.where}: {column} {unknown[0]!r} is unknown; known: {known}")
    return [ids[label] for label in found]


def digest_rows(rows: Sequence[Row]) -> str:
    """SHA-256 of the records, as JSON lines: the identity of data that has no file."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(json.dumps(row.values, sort_keys=True, default=_identity).encode() + b"\n")
    return sha.hexdigest()


def _identity(value: Any) -> str:
    """What stands for a value that JSON has not; numpy's ``repr`` leaves out the middle of an array."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()}"
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)
