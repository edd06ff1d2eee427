"""Catalogues of data sets: TFDS, Hugging Face and scikit-learn's digits, read record by record into rows.

Images stay as they are stored, in bytes: they are decoded batch by batch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import DataError, Row, check_columns

DIGITS = "packaged:digits"


def tfds(path: str, name: str, split: str, encoding: str, wanted: Sequence[str]) -> Iterator[Row]:
    """A prepared ArrayRecord data set through TFDS's `data_source`: no TensorFlow, and nothing is downloaded."""
    from tensorflow_datasets.core import decode, read_only_builder

    found = read_only_builder.builder_from_directory if Path(name).is_dir() else read_only_builder.builder_from_files
    try:
        builder: Any = found(name)
        features = builder.info.features
        check_columns(path, wanted, features)
        plain = [key for key in features if not hasattr(features[key], "feature")]  # sequences cannot be skipped
        skip = {key: decode.SkipDecoding() for key in plain if key not in wanted or _is_image(features[key])}
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
        features = records.features
        for key in wanted:
            if _is_image(features[key]):
                records = records.cast_column(key, datasets.Image(decode=False))
        yield from _rows(path, records.select_columns(list(wanted)), features, encoding, wanted)
    except DataError:
        raise
    except Exception as error:  # so have the hub, the network and every file format
        raise DataError(f"{path}: cannot be loaded: {first_line(error)}") from None


def digits() -> Iterator[Row]:
    """scikit-learn's 1,797 handwritten digits: (8, 8) uint8, its 17 levels of grey spread over 0 to 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(f"{DIGITS}: needs the package scikit-learn: pip install 'jaxtransfer[demo]'") from None
    found: Any = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)
    for number, (image, label) in enumerate(zip(images, found.target, strict=True)):
        yield Row(f"{DIGITS}, record", number, {"image": image, "label": int(label)})


def first_line(error: Exception) -> str:
    """What a foreign library said, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rows(path: str, records: Any, features: Any, encoding: str, wanted: Sequence[str]) -> Iterator[Row]:
    for key in wanted:
        if _is_image(features[key]) and getattr(features[key], "np_dtype", None) == np.float32:
            raise DataError(f"{path}: {key} holds images of floats; images are 8 bits a channel")
    for number, record in enumerate(records):
        row = Row(f"{path}, record", number, {})
        for key in wanted:
            try:
                row.values[key] = _plain(record[key], features[key], encoding)
            except UnicodeDecodeError as error:
                raise DataError(f"{row.where}: {key} is not {encoding}: byte at offset {error.start}") from None
        yield row


def _is_image(feature: Any) -> bool:
    """Of TFDS and of Hugging Face alike; by name, for only one of the packages is imported."""
    return any(kind.__name__ == "Image" for kind in type(feature).__mro__)


def _plain(value: Any, feature: Any, encoding: str) -> Any:
    """Bytes as text, numpy's scalars as Python's, and the numbers of classes, one or several, by their names."""
    if _is_image(feature):
        return (value["bytes"] or Path(value["path"])) if isinstance(value, dict) else value
    if isinstance(value, bytes):
        return value.decode(encoding)
    if isinstance(value, (np.generic, np.ndarray)) and np.ndim(value) == 0:
        value = value.item()
    if getattr(getattr(feature, "feature", None), "names", None):
        return [_plain(each, feature.feature, encoding) for each in np.asarray(value)]
    names = getattr(feature, "names", None)
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
