r"""File formats: the bytes of one file into rows, each with the line that an error message names.

Text is decoded strictly, and only ``\n`` ends a line: real corpora hold the other characters that Python's
``splitlines`` breaks at.
"""

import csv
import io
import json
import re
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxtransfer.data.catalogs import first_line
from jaxtransfer.data.dataset import DataError, Row, check_columns

_LIMIT = threading.Lock()


def jsonl(data: bytes, name: str, encoding: str) -> Iterator[Row]:
    """JSON lines: one object a line, without a key twice."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    for number, line in _lines(data, name, encoding):
        try:
            values = decoder.decode(line)
        except DataError as error:
            raise DataError(f"{name}, line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            problem = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise DataError(f"{name}, line {number}: is not JSON ({problem}): {_short(line)}") from None
        if not isinstance(values, dict):
            raise DataError(f"{name}, line {number}: expected one JSON object a line, got {_short(line)}")
        yield Row(f"{name}, line", number, values)


def csv_(data: bytes, name: str, encoding: str, delimiter: str) -> Iterator[Row]:
    """Comma-separated values with a header line; a quoted field may hold delimiters, quotes and line ends."""
    text = decode(data, name, encoding).rstrip("\r\n")
    with _LIMIT:  # of a field, 131,072 characters, is the whole process's and not a reader's
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, len(text)))
        try:
            rows = list(_csv_rows(text, name, delimiter))
        finally:
            csv.field_size_limit(before)
    yield from rows


def _csv_rows(text: str, name: str, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header, line = next(reader, []), reader.line_num
        _check_header(header, name)
        for fields in reader:
            yield _row(name, line + 1, header, fields)
            line = reader.line_num
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: {error}") from None


def tsv(data: bytes, name: str, encoding: str, delimiter: str) -> Iterator[Row]:
    """Tab-separated values with a header line; quotes are characters like any other, as IANA has it."""
    header: list[str] | None = None
    for number, line in _lines(data, name, encoding):
        fields = line.split(delimiter)
        if header is None:
            header = fields
            _check_header(header, name)
        else:
            yield _row(name, number, header, fields)


def lines(data: bytes, name: str, encoding: str, pattern: str) -> Iterator[Row]:
    """Plain lines, each full-matched by a regular expression whose named groups are the columns."""
    regex = re.compile(pattern)
    for number, line in _lines(data, name, encoding):
        if (found := regex.fullmatch(line)) is None:
            raise DataError(f"{name}, line {number}: pattern {pattern!r} does not match {_short(line)}")
        yield Row(f"{name}, line", number, found.groupdict())


def conll(data: bytes, name: str, encoding: str, delimiter: str | None, wanted: Sequence[str]) -> Iterator[Row]:
    """Sentences with a blank line between them, a word a line: ``tokens`` its first field, ``tags`` its last.

    Another column is named by its number, 0 for the first. Fields stand between tabs if the file has any, else between
    spaces. Lines of ``-DOCSTART-`` part documents, and are no sentences.
    """
    text = decode(data, name, encoding)
    delimiter = delimiter or ("\t" if re.search(r"\S\t", text) else " ")
    sentence: list[list[str]] = []
    width = 0
    for number, line in enumerate([*text.split("\n"), ""], 1):
        line = line.removesuffix("\r")
        fields = [field for field in line.split(delimiter) if field or delimiter != " "] if line.strip() else []
        if fields and fields[0] != "-DOCSTART-":
            width = width or len(fields)
            if len(fields) != width:
                raise DataError(f"{name}, line {number}: {len(fields)} fields, the first has {width}: {_short(line)}")
            sentence.append(fields)
        elif sentence:
            yield Row(f"{name}, line", number - len(sentence), _sentence(sentence, name, wanted))
            sentence = []


def _sentence(lines: Sequence[Sequence[str]], name: str, wanted: Sequence[str]) -> dict[str, list[str]]:
    last = len(lines[0]) - 1
    places = {"tokens": 0, **({"tags": last} if last else {}), **{str(i): i for i in range(last + 1)}}
    check_columns(name, wanted, places)
    return {column: [fields[places[column]] for fields in lines] for column in wanted}


def squad(data: bytes, name: str, encoding: str, wanted: Sequence[str]) -> Iterator[Row]:
    """SQuAD's JSON: a row a question, with ``question``, ``context``, ``answers``, ``id`` and ``title``."""
    try:
        found = json.loads(decode(data, name, encoding))
    except (ValueError, RecursionError) as error:
        raise (
            error if isinstance(error, DataError) else DataError(f"{name}: is not JSON: {first_line(error)}")
        ) from None
    number = 0
    try:
        for article in found["data"]:
            for paragraph in article["paragraphs"]:
                shared = {"context": paragraph["context"], "title": article.get("title", "")}
                for asked in paragraph["qas"]:
                    given = asked["answers"]
                    held = {"text": [a["text"] for a in given], "answer_start": [a["answer_start"] for a in given]}
                    values = {
                        "question": asked["question"],
                        "id": asked.get("id", str(number)),
                        "answers": held,
                        **shared,
                    }
                    check_columns(name, wanted, values)
                    yield Row(f"{name}, question", number, values)
                    number += 1
    except (KeyError, TypeError, AttributeError) as error:
        told = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{name}, question {number}: is not laid out as SQuAD: {told}") from None


def parquet(data: bytes, name: str, wanted: Sequence[str]) -> Iterator[Row]:
    """The wanted columns of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        check_columns(name, wanted, file.schema_arrow.names)
        for start, values in enumerate(file.read(columns=list(wanted)).to_pylist()):
            yield Row(f"{name}, row", start, values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: is not readable as Parquet: {first_line(error)}") from None


def npz(data: bytes, name: str, wanted: Sequence[str]) -> Iterator[Row]:
    """The wanted arrays of an npz file, which agree in their length; labels (N, 1), as MedMNIST has them, are (N,)."""
    try:
        file = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise DataError(f"{name}: holds one array without a name, expected an npz of several")
        check_columns(name, wanted, file.files)
        arrays = {column: file[column] for column in dict.fromkeys(wanted)}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise error if isinstance(error, DataError) else DataError(f"{name}: is no npz: {first_line(error)}") from None
    shapes = {column: array.shape for column, array in arrays.items()}
    if len({shape[:1] for shape in shapes.values()}) != 1 or () in shapes.values():
        raise DataError(f"{name}: its arrays differ in their length: {shapes}")
    for number in range(len(next(iter(arrays.values())))):
        row = {column: array[number] for column, array in arrays.items()}
        yield Row(
            f"{name}, row", number, {c: v.item() if np.size(v) == 1 and v.ndim < 2 else v for c, v in row.items()}
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DataError(f"key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def decode(data: bytes, name: str, encoding: str) -> str:
    r"""Bytes into text, strictly; a byte order mark is dropped.

    Raises:
      DataError: bytes that are not text in this encoding, with their offset and line.

    Example:
      >>> decode(b"good\nbad \xff", "x.csv", "utf-8")
      Traceback (most recent call last):
      jaxtransfer.data.dataset.DataError: x.csv, line 2: byte 0xff at offset 9 is not utf-8; set encoding
    """
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} at offset {error.start} is not {encoding}; "
            "set encoding"
        ) from None


def _lines(data: bytes, name: str, encoding: str) -> Iterator[tuple[int, str]]:
    text = decode(data, name, encoding).rstrip("\r\n")
    for number, line in enumerate(text.split("\n") if text else [], 1):
        line = line.removesuffix("\r")
        if not line.strip():
            raise DataError(f"{name}, line {number}: is empty")
        yield number, line


def _check_header(header: list[str], name: str) -> None:
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"{name}: its header names {', '.join(twice)} twice")


def _row(name: str, number: int, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        raise DataError(
            f"{name}, line {number}: {len(fields)} fields, the header has {len(header)} ({', '.join(header)})"
        )
    return Row(f"{name}, line", number, dict(zip(header, fields, strict=True)))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
