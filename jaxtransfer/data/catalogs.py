"""Catalogues of data sets: TFDS and Hugging Face, read record by record into rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import DataError, Row, check_columns


def tfds(path: str, name: str, split: str, encoding: str, wanted: Sequence[str]) -> Iterator[Row]:
    """A prepared ArrayRecord data set through TFDS's `data_source`: no TensorFlow, and nothing is downloaded."""
    from tensorflow_datasets.core import decode, read_only_builder

    found = read_only_builder.builder_from_directory if Path(name).is_dir() else read_only_builder.builder_from_files
    try:
        builder: Any = found(name)
        features = builder.info.features
        check_columns(path, wanted, features)
        skip = {key: decode.SkipDecoding() for key in features if key not in wanted}
        records = builder.as_data_source(split, decoders=skip)
        yield from _rows(path, (records[i] for i in range(len(records))), features, encoding, wanted)
    except DataError:
        raise
    except Exception as error:  # tfds has kinds of its own for a dozen causes
        raise DataError(f"{path}: is no prepared ArrayRecord data set: {first_line(error)}") from None


def hf(path: str, name: str, split: str, encoding: str, wanted: Sequence[str]) -> Iterator[Row]:
    """A Hugging Face data set; its files are read, its code never runs."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: needs the package datasets: pip install 'jaxtransfer[datasets]'") from None
    owner, *rest = name.split("/")
    try:
        records: Any = datasets.load_dataset("/".join([owner, *rest[:1]]), *rest[1:2], split=split)
        check_columns(path, wanted, records.column_names)
        yield from _rows(path, records.select_columns(list(wanted)), records.features, encoding, wanted)
    except DataError:
        raise
    except Exception as error:  # so have the hub, the network and every file format
        raise DataError(f"{path}: cannot be loaded: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """What a foreign library said, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rows(path: str, records: Any, features: Any, encoding: str, wanted: Sequence[str]) -> Iterator[Row]:
    for number, record in enumerate(records):
        row = Row(f"{path}, record", number, {})
        for key in wanted:
            try:
                row.values[key] = _plain(record[key], features[key], encoding)
            except UnicodeDecodeError as error:
                raise DataError(f"{row.where}: {key} is not {encoding}: byte at offset {error.start}") from None
        yield row


def _plain(value: Any, feature: Any, encoding: str) -> Any:
    """Bytes as text, numpy's scalars as Python's, and the numbers of classes by their names."""
    if isinstance(value, bytes):
        return value.decode(encoding)
    if isinstance(value, (np.generic, np.ndarray)) and np.ndim(value) == 0:
        value = value.item()
    names = getattr(feature, "names", None)
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
