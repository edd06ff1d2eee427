"""Rows of features by example: in memory, or in memory-mapped files that a stopped pass goes on with.

Rows lie in the order in which a pass over the data makes them, so they are written one behind the other. Of several
processes each writes a part of its own, and maps the others' when all are whole. A journal beside each part has a line
for every piece with its checksum: what a crash or a bad disk left behind is told by it, and made again.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxtransfer.features.extract import FeatureError
from jaxtransfer.features.prefix import Entry

_PIECE = 32 << 20  # bytes between two lines of the journal

Rows = Mapping[str, Sequence[np.ndarray]]


class Store:
    """The kept entries of N examples.

    Args:
      entries: what a row has.
      lengths: (N,) tokens of each example, for ragged entries.
      parts: for each process, the examples whose rows it makes, in that order; together every example once.
      own: this process's part; None for one that reads alone.
      folder: where files go; None keeps everything in memory, for one process.
      key: the identity of the rows, which is part of the files' names.

    Example:
      >>> store = Store({"x": Entry((2,), np.dtype("float32"), False)}, np.ones(3, int), [np.array([2, 0, 1])])
      >>> store.put({"x": np.arange(6, dtype=np.float32).reshape(3, 2)})
      >>> store.row(2)["x"].tolist(), store.whole
      ([0.0, 1.0], True)
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        lengths: np.ndarray,
        parts: Sequence[np.ndarray],
        *,
        own: int | None = 0,
        folder: Path | None = None,
        key: str = "",
    ) -> None:
        if folder is None and len(parts) > 1:
            raise FeatureError("a store of several processes' rows needs a folder that all of them see")
        self.entries, self.own = entries, own
        self._folder, self._parts = folder, parts
        self._key = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._where = _places(parts, len(lengths))
        self._starts = [_starts(lengths[order]) for order in parts]
        self._open: dict[tuple[str, int], np.ndarray] = {}
        self.done = 0
        if folder is not None and own is not None and len(parts[own]):
            self.done = self._journalled(own)
        self._written = self.done

    @property
    def bytes(self) -> int:
        """Of all rows of all processes."""
        return sum(self._shape(name, part)[1] for name in self.entries for part in range(len(self._parts)))

    @property
    def whole(self) -> bool:
        """Whether all rows that this process makes are there."""
        return self.own is None or self.done == len(self._parts[self.own])

    def put(self, rows: Rows) -> None:
        """The next rows of this process's part: entry -> an array for each; ragged ones without padding.

        Raises:
          FeatureError: the disk is full.
        """
        assert self.own is not None
        stop = self.done + len(next(iter(rows.values())))
        try:
            for name, values in rows.items():
                self._span(name, self.own, self.done, stop)[:] = (
                    np.concatenate(list(values)) if self.entries[name].ragged else np.stack(list(values))
                )
            self.done = stop
            self._note(self.own)
        except OSError as error:
            raise FeatureError(f"{self._folder}: the features cannot be written: {error.strerror}") from None

    def row(self, example: int) -> dict[str, np.ndarray]:
        """The entries of an example."""
        part, at = self._where[example]
        spans = {name: self._span(name, part, at, at + 1) for name in self.entries}
        return {name: span if self.entries[name].ragged else span[0] for name, span in spans.items()}

    def _span(self, name: str, part: int, start: int, stop: int) -> np.ndarray:
        """An entry's rows of a part from one to another."""
        if self.entries[name].ragged:
            start, stop = self._starts[part][start], self._starts[part][stop]
        return self._array(name, part)[start:stop]

    def _array(self, name: str, part: int) -> np.ndarray:
        if (name, part) not in self._open:
            shape, size = self._shape(name, part)
            if self._folder is None or not size:
                self._open[name, part] = np.empty(shape, self.entries[name].dtype)
            else:
                path = self._file(f"{name.replace('/', '.')}-{part}")
                if part == self.own and not (path.exists() and path.stat().st_size == size):
                    self._reserve(path, size)
                raw = np.memmap(path, np.uint8, "r+" if part == self.own else "r", shape=(size,))
                self._open[name, part] = raw.view(self.entries[name].dtype).reshape(shape)
        return self._open[name, part]

    def _shape(self, name: str, part: int) -> tuple[tuple[int, ...], int]:
        """Of an entry's array of a part: its shape and its bytes."""
        entry, order = self.entries[name], self._parts[part]
        shape = (int(self._starts[part][-1]) if entry.ragged else len(order), *entry.shape)
        return shape, int(np.prod(shape, dtype=np.int64)) * entry.dtype.itemsize

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._key}-{name}"

    @staticmethod
    def _reserve(path: Path, size: int) -> None:
        """A file of so many bytes that are really there: a map over a hole kills the process when the disk is full."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            try:
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
            except OSError:
                path.unlink()
                raise

    # --- the journal ---

    def _note(self, part: int) -> None:
        """A line for what was written since the last, where it is much or the end."""
        if self._folder is None:
            return
        spans = {name: self._span(name, part, self._written, self.done) for name in self.entries}
        if not self.whole and sum(span.nbytes for span in spans.values()) < _PIECE:
            return
        line = {"start": self._written, "stop": self.done, "crc32": _sums(spans)}
        with self._file(f"{part}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._written = self.done

    def _journalled(self, part: int) -> int:
        """The rows of this part that are there, whole; what follows a piece that is not is made again."""
        path, done, good = self._file(f"{part}.jsonl"), 0, []
        if not path.exists():
            return 0
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut off by a crash
                break
            spans = {name: self._span(name, part, done, line["stop"]) for name in self.entries}
            if line["start"] != done or _sums(spans) != line["crc32"]:
                break
            done, good = line["stop"], [*good, text]
        path.write_text("".join(f"{text}\n" for text in good), encoding="utf-8")
        return done


def _sums(spans: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: zlib.crc32(np.ascontiguousarray(span).view(np.uint8).data) for name, span in spans.items()}


def _places(parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """(N, 2): the part of each example, and its row there."""
    where = np.full((count, 2), -1, np.int64)
    for part, order in enumerate(parts):
        where[order] = np.stack([np.full(len(order), part), np.arange(len(order))], axis=1)
    return where


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """The rows of a `Store` as lazy fields of `Examples`, in place of those that they were made of.

    Attributes:
      store: whole.
      origin: the digest of the fields that it stands for: batches, and positions in them, are those of the originals.
    """

    store: Store
    origin: str
    count: int
    random = False

    @property
    def ragged(self) -> tuple[str, ...]:
        """Entries of one row a token."""
        return tuple(name for name, entry in self.store.entries.items() if entry.ragged)

    @property
    def padding(self) -> Mapping[str, np.ndarray]:
        """Zeros."""
        return {
            name: np.zeros((0, *entry.shape) if entry.ragged else entry.shape, entry.dtype)
            for name, entry in self.store.entries.items()
        }

    def __len__(self) -> int:
        return self.count

    def digest(self) -> str:
        """That of the fields that it stands for."""
        return self.origin

    def __call__(self, index: int, key: Sequence[int]) -> Mapping[str, np.ndarray]:
        """The entries of an example, the same for every key."""
        return self.store.row(index)
