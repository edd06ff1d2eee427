"""Sources of data: local files and folders, packaged sets, TFDS and Hugging Face, all read into one `Dataset`.

Everything is checked before any work starts: a missing file or column, an unknown label, an empty text, a broken byte
or no rows at all is one :class:`DataError` that says where. Images are not opened here: see `data.images`.
"""

import dataclasses
import glob
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from jaxtransfer.data import catalogs, corpora, folders, formats, select
from jaxtransfer.data.dataset import DataError, Dataset, Row, digest_rows, rename

Format = Literal["jsonl", "csv", "tsv", "conll", "squad", "parquet", "npz"]
_SUFFIXES: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".conll": "conll",
    ".parquet": "parquet",
    ".npz": "npz",
}
_DELIMITERS = {"csv": ",", "tsv": "\t"}
# Names hold colons (`imdb:1.0.0`), and so do splits (`train[:9%]`): the greedy name leaves the shortest whole split.
_NAMED = re.compile(r"(tfds|hf):(?P<name>.+):(?P<split>[^:\[\]]+(\[[^\]]*\])?)")


@dataclasses.dataclass(frozen=True)
class DataSpec:
    r"""Which records to read, and how.

    Attributes:
      path: a local file, or a glob pattern of files read in sorted order (.jsonl, .json lines, .csv, .tsv, .conll,
        .parquet, .npz); a folder of class folders of images;
        ``packaged:reviews/train``, or ``packaged:digits`` (extra ``demo``);
        ``python:stdlib`` or ``python:PACKAGE``, the modules of either as texts;
        ``tfds:NAME:SPLIT`` or ``tfds:FOLDER:SPLIT``, a prepared ArrayRecord data set; ``hf:OWNER/NAME[/CONFIG]:SPLIT``
        (extra ``datasets``). Texts of a column ``image`` are paths, relative to the file that they are read from.
      columns: what the task calls a column -> what the file calls it (of an npz, its array), where they differ:
        ``{"text": "tweet"}``, ``{"image": "train_images", "label": "train_labels"}``; of .conll the number of a field.
      format: of a file whose suffix does not say; ``squad`` is one JSON object of articles, paragraphs and questions.
      encoding: of text.
      delimiter: one character instead of the comma of csv, the tab of tsv, or the tabs or spaces of conll.
      pattern: for plain lines: a regular expression that matches each line, its named groups are the columns:
        ``(?P<label>\S+) (?P<text>.*)``.
      unique: drop rows whose input (the task's first column) occurred before.
      without: a path, read in the same way, whose inputs are dropped here: the test set, from training.
      only: labels; the rows of all others are dropped.
      split: rows ``[start, stop)`` of the permutation ``numpy.random.RandomState(seed)`` of what is left then.
      per_class: the first so many rows of each label, in the order of that permutation.
      seed: of the permutation.
    """

    path: str
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    format: Format | None = None
    encoding: str = "utf-8"
    delimiter: str | None = None
    pattern: str | None = None
    unique: bool = False
    without: str | None = None
    only: tuple[str, ...] = ()
    split: tuple[int, int] | None = None
    per_class: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.path:
            raise DataError("path: must name a file or a data set, got an empty text")
        try:
            "a".encode(self.encoding)  # which codecs between bytes and bytes, or texts and texts, refuse too
        except (LookupError, ValueError):
            raise DataError(f"encoding: {self.encoding!r} is unknown; try utf-8 or latin-1") from None
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise DataError(f"delimiter: must be one character, got {self.delimiter!r}")
        if self.pattern is not None:
            self._check_pattern(self.pattern)
        if self.split is not None and not 0 <= self.split[0] < self.split[1]:
            raise DataError(f"split: must be [start, stop] with 0 <= start < stop, got {list(self.split)}")
        if len(set(self.only)) < len(self.only):
            raise DataError(f"only: names a label twice: {', '.join(self.only)}")
        if self.per_class is not None and self.per_class < 1:
            raise DataError(f"per_class: must be at least 1, got {self.per_class}")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"seed: must be in [0, 2**32), got {self.seed}")

    def _check_pattern(self, pattern: str) -> None:
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise DataError(f"pattern: {pattern!r} is not a regular expression: {error}") from None
        if not groups:
            raise DataError(f"pattern: {pattern!r} has no named group; write (?P<text>.*)")
        if self.format is not None or self.delimiter is not None:
            raise DataError("pattern: reads plain lines; give it without format and delimiter")


def read(spec: DataSpec | str, columns: Sequence[str] = ("text", "label")) -> Dataset:
    r"""Reads the task's columns of every record.

    Args:
      spec: what to read; a text is the path of a `DataSpec`.
      columns: the task's names of the columns it needs, the input first.

    Raises:
      DataError: the file, data set, split or a column is missing, the content is malformed, or no rows are left.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = pathlib.Path(folder, "reviews.csv")
      ...     _ = file.write_text("text,label\nlovely,good\n")
      ...     read(str(file))[0]
      {'text': 'lovely', 'label': 'good'}
    """
    spec = DataSpec(spec) if isinstance(spec, str) else spec
    if unknown := [name for name in spec.columns if name not in columns]:
        raise DataError(f"columns: {unknown[0]!r} is no column of this task; it reads {', '.join(columns)}")
    if (spec.only or spec.per_class) and "label" not in columns:
        raise DataError("only and per_class: select by the column label, which is not read here")
    wanted = {column: spec.columns.get(column, column) for column in columns}
    rows, digest, notes = _rows(spec, spec.path, wanted)
    total = len(rows)
    if spec.unique:
        rows = select.unique(rows, columns[0])
        notes.append(f"{spec.path}: dropped {total - len(rows)} of {total} rows, duplicates of earlier ones")
    if spec.without is not None:
        others, other_digest, _ = _rows(spec, spec.without, wanted)
        before, rows = len(rows), select.without(rows, others, columns[0])
        notes.append(f"{spec.path}: dropped {before - len(rows)} of {before} rows, they occur in {spec.without}")
        digest = hashlib.sha256(f"{digest}\n{other_digest}\n".encode()).hexdigest()
    if spec.only:
        before, rows = len(rows), select.only(rows, spec.only, spec.path)
        notes.append(f"{spec.path}: kept {len(rows)} of {before} rows, of the labels {', '.join(spec.only)}")
    if spec.split is not None or spec.per_class is not None:
        rows = select.permuted(rows, spec.split, spec.seed, spec.path)
    if spec.per_class is not None:
        before, rows = len(rows), select.per_class(rows, spec.per_class, spec.path)
        notes.append(f"{spec.path}: kept {len(rows)} of {before} rows, {spec.per_class} of each label")
    if not rows:
        raise DataError(f"{spec.path}: no rows are left without {spec.without}")
    return Dataset(spec.path, tuple(columns), rows, digest, tuple(notes))


def _rows(spec: DataSpec, path: str, wanted: Mapping[str, str]) -> tuple[list[Row], str, list[str]]:
    """All rows of one path under the task's names, the digest of what was read, and what was passed over."""
    notes: list[str] = []
    if path.startswith(("tfds:", "hf:")):
        if (named := _NAMED.fullmatch(path)) is None:
            raise DataError(f"{path}: expected {path.partition(':')[0]}:NAME:SPLIT, such as tfds:ag_news_subset:train")
        load = catalogs.tfds if path.startswith("tfds:") else catalogs.hf
        found = load(path, named["name"], named["split"], spec.encoding, list(wanted.values()))
        rows = [rename(row, wanted) for row in found]
        digest = digest_rows(rows)
    elif path.startswith("python:"):
        found, notes = corpora.python_sources(path)
        rows = [rename(row, wanted) for row in found]
        digest = digest_rows(rows)
    elif path == catalogs.DIGITS:
        rows = [rename(row, wanted) for row in catalogs.digits()]
        digest = digest_rows(rows)
    else:
        parts = [_read(spec, name, wanted) for name in _files(path)]
        rows = [row for part, _, _ in parts for row in part]
        digests = [digest for _, digest, _ in parts]
        digest = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
        notes = [note for _, _, part in parts for note in part]
    if not rows:
        raise DataError(f"{path}: has no rows")
    return rows, digest, notes


def _read(spec: DataSpec, name: str, wanted: Mapping[str, str]) -> tuple[list[Row], str, list[str]]:
    """The rows of one file or folder, its digest, and what was passed over."""
    if Path(name).is_dir():
        if spec.format or spec.delimiter or spec.pattern:
            raise DataError(f"{name}: is a folder of images; format, delimiter and pattern are for files")
        rows, digest, notes = folders.folder(name, list(wanted.values()))
        return [rename(row, wanted) for row in rows], digest, notes
    data = _bytes(name)
    rows = [rename(row, wanted) for row in _parse(spec, name, data, wanted)]
    for row in rows:
        if isinstance(image := row.values.get("image"), str) and image:
            row.values["image"] = Path(name).parent / image
    return rows, hashlib.sha256(data).hexdigest(), []


def _files(path: str) -> list[str]:
    if path.startswith("packaged:"):
        name = path.removeprefix("packaged:")
        folder = Path(__file__).parent
        known = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.glob("*/*.jsonl"))
        if name not in known:
            raise DataError(f"{path}: is not in the package; it holds {', '.join(['digits', *known])}")
        return [str(folder / f"{name}.jsonl")]
    if Path(path).exists() or not glob.has_magic(path):
        return [path]
    if not (found := sorted(glob.glob(path))):
        raise DataError(f"{path}: matches no file")
    return found


def _bytes(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{name}: no such file (relative paths start at {Path.cwd()})") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None


def _parse(spec: DataSpec, name: str, data: bytes, wanted: Mapping[str, str]) -> Iterator[Row]:
    if spec.pattern is not None:
        return formats.lines(data, name, spec.encoding, spec.pattern)
    kind = spec.format or _SUFFIXES.get(Path(name).suffix.lower())
    if kind is None:
        raise DataError(f"{name}: its suffix is none of {', '.join(_SUFFIXES)}; set format, or pattern for plain lines")
    if kind in _DELIMITERS:
        reader = formats.csv_ if kind == "csv" else formats.tsv
        return reader(data, name, spec.encoding, spec.delimiter or _DELIMITERS[kind])
    if kind == "conll":
        return formats.conll(data, name, spec.encoding, spec.delimiter, list(wanted.values()))
    if kind == "squad" and spec.delimiter is None:
        return formats.squad(data, name, spec.encoding, list(wanted.values()))
    if spec.delimiter is not None:
        raise DataError(f"{name}: delimiter is for csv, tsv and conll, this file is read as {kind}")
    if kind in ("parquet", "npz"):
        return (formats.parquet if kind == "parquet" else formats.npz)(data, name, list(wanted.values()))
    return formats.jsonl(data, name, spec.encoding)
