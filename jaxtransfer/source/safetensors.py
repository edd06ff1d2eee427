"""A strict reader of safetensors: the header is checked in full before a byte of data is touched.

The file is mapped, so `TensorFile.read` costs no memory and slices read only the pages that they touch.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtransfer.source.strictjson import INDEX_BYTES, parse_object, printable, read_object

HEADER_BYTES = 100_000_000
TOKENS = 1_000_000  # JSON separators in a header, about 14 for a tensor
RANK = 32
NAME_LENGTH = 512

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "BOOL": np.dtype("?"),
}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".hdf5", ".npy", ".npz")
CONVERTER = (
    "only safetensors are read, since such files can run code; convert once where you trust the file: "
    "transformers' save_pretrained(folder) with torch installed, or the Space safetensors/convert on the Hub"
)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsError(ValueError):
    """A weights file that is damaged, malformed, or of a format that is not read; names the file."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype, shape, and its bytes ``[start, stop)`` counted from the file's beginning."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file, checked and mapped read-only.

    Attributes:
      path: the file.
      tensors: name -> :class:`TensorInfo`, in the order of the data.
      metadata: the strings that the writer stored.

    Raises:
      SafetensorsError: the file is no well-formed safetensors file; the message says what is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        refuse_suffix(self.path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(file.read(9), size, self.path.name)
            file.seek(8)
            raw = file.read(length)
        if len(raw) < length:
            raise SafetensorsError(f"{self.path.name}: truncated in the header")
        self.tensors, self.metadata = parse_header(raw, size - 8 - length, self.path.name)
        self._bytes = np.memmap(self.path, np.uint8, "r", shape=(size,))

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the mapped file: slicing it reads only the pages under the slice."""
        info = self.tensors[name]
        raw = self._bytes[info.start : info.stop].view(np.ndarray)
        if info.dtype == np.bool_ and raw.size and raw.max() > 1:
            raise SafetensorsError(f"{self.path.name}: BOOL tensor {name} holds bytes other than 0 and 1")
        return raw.view(info.dtype).reshape(info.shape)


def refuse_suffix(path: Path) -> None:
    """Raises :class:`SafetensorsError` for the formats of pickles and their like."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise SafetensorsError(f"{path.name}: {CONVERTER}")


def _header_length(head: bytes, size: int, where: str) -> int:
    """The header's length from the first nine bytes of a file."""
    length = int.from_bytes(head[:8], "little")
    if len(head) == 9 and length <= min(HEADER_BYTES, size - 8) and head[8:] == b"{":
        return length
    if re.match(rb"PK|\x80[\x00-\x05]|\x89HDF|[(c\]}]", head):
        raise SafetensorsError(f"{where}: is a pickle or an archive by its content, whatever its name; {CONVERTER}")
    if len(head) < 9:
        raise SafetensorsError(f"{where}: {size} bytes are too few for a safetensors file; truncated?")
    if length > HEADER_BYTES:
        raise SafetensorsError(f"{where}: a header of {length} bytes, where the format allows {HEADER_BYTES}")
    if length > size - 8:
        raise SafetensorsError(f"{where}: a header of {length} bytes in a file of {size}; truncated?")
    raise SafetensorsError(f"{where}: the header does not begin with '{{'; is it a safetensors file?")


def parse_header(raw: bytes, data_bytes: int, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a header, every field of it checked.

    Args:
      raw: the header's JSON.
      data_bytes: the length of the data behind it.
      where: the file's name, for messages.

    Raises:
      SafetensorsError: what is wrong, and with which tensor.
    """
    table = parse_object(raw, f"{where}: header", SafetensorsError, tokens=TOKENS)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorsError(f"{where}: __metadata__ must map strings to strings")
    tensors = {name: _tensor(name, entry, 8 + len(raw), where) for name, entry in table.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    at = 8 + len(raw)
    for name, info in tensors.items():
        if info.start != at:
            what = "overlaps the tensor before it" if info.start < at else "leaves a hole before it"
            raise SafetensorsError(f"{where}: tensor {name} {what}")
        at = info.stop
    if at != 8 + len(raw) + data_bytes:
        have, want = data_bytes, at - 8 - len(raw)
        problem = "truncated" if have < want else "bytes left over"
        raise SafetensorsError(f"{where}: {problem}: the tensors take {want} bytes, the file has {have}")
    return tensors, metadata


def _tensor(name: str, entry: Any, base: int, where: str) -> TensorInfo:
    check_name(name, where)

    def bad(what: str) -> SafetensorsError:
        return SafetensorsError(f"{where}: tensor {name}: {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        keys = printable(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
        raise bad(f"expected dtype, shape and data_offsets, found {keys}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise bad(f"dtype {printable(code)} is not one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > RANK:
        raise bad(f"shape must be a list of at most {RANK} sizes, found {printable(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise bad(f"data_offsets must be two numbers, found {printable(offsets)}")
    dtype = DTYPES[code]
    # Empty tensors too: numpy computes strides from the sizes that are not zero.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise bad(f"shape {printable(shape)} overflows")
    need = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != need:
        raise bad(f"{code} of shape {shape} takes {need} bytes, its offsets {offsets} say {offsets[1] - offsets[0]}")
    return TensorInfo(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def check_name(name: str, where: str) -> None:
    """Raises :class:`SafetensorsError` for a tensor name that is empty, too long, path-like, or not printable."""
    if not name or len(name) > NAME_LENGTH:
        what = "is empty" if not name else f"has {len(name)} characters, the limit is {NAME_LENGTH}"
    elif not name.isprintable():  # control characters, ANSI escapes, surrogates, bidirectional marks
        what = "holds characters that do not print"
    elif re.match(r"[/~]|[A-Za-z]:", name) or "\\" in name or not {".", ".."}.isdisjoint(name.split("/")):
        what = "looks like a path"
    elif name != name.strip():
        what = "begins or ends with a space"
    else:
        return
    raise SafetensorsError(f"{where}: the tensor name {printable(name)} {what}")


def open_weights(files: Mapping[str, Path]) -> dict[str, TensorFile]:
    """The weight files of a folder: ``model.safetensors`` alone, or the shards that its index lists.

    Args:
      files: file name -> path, as a resolved reference has them.

    Returns:
      Tensor name -> the file that holds it.

    Raises:
      SafetensorsError: a malformed file, or an index and shards that do not agree.
    """
    if WEIGHTS in files:
        single = TensorFile(files[WEIGHTS])
        return dict.fromkeys(single.tensors, single)
    weight_map = read_index(files[INDEX])
    absent = sorted({shard for shard in weight_map.values() if shard not in files})
    if absent:
        raise SafetensorsError(f"{INDEX}: the shards {', '.join(absent[:4])} are not in the folder")
    shards = {shard: TensorFile(files[shard]) for shard in sorted(set(weight_map.values()))}
    held = [(name, shard) for shard, file in shards.items() for name in file.tensors]
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise SafetensorsError(f"{INDEX}: tensor {printable(name)} is not in {shard}")
    if stray := [f"{name} in {shard}" for name, shard in held if weight_map.get(name) != shard]:
        raise SafetensorsError(f"{INDEX}: does not list tensor {', '.join(stray[:4])}")
    return {name: shards[shard] for name, shard in held}


def read_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor name -> plain name of a ``.safetensors`` file beside the index.

    Raises:
      SafetensorsError: the index is malformed, or a file name is no plain one.
    """
    weight_map = read_object(path, INDEX_BYTES, SafetensorsError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SafetensorsError(f"{path.name}: has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors", shard):
            raise SafetensorsError(
                f"{path.name}: tensor {printable(name)} is said to be in {printable(shard)}, "
                "which is no plain name of a .safetensors file"
            )
    return weight_map
