"""Writing safetensors: to a temporary file, synced, renamed, and read back bit by bit."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.source.safetensors import DTYPES, INDEX, WEIGHTS, SafetensorsError, TensorFile, check_name

SHARD_BYTES = 5_000_000_000
CHUNK = 1 << 24


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Path:
    """Writes one safetensors file atomically and compares what is on the disk with what was meant, bit by bit.

    Args:
      path: the file, replaced if it is there.
      tensors: name -> array; ml_dtypes' bfloat16 and float8 included. An array need not be contiguous.
      metadata: strings to store; Hugging Face's readers want ``{"format": "pt"}``.

    Raises:
      SafetensorsError: a name or dtype that the format does not allow, or a file that reads back differently.
      OSError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # keeps all aligned
    header = _header(order, tensors, metadata, path.name)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in order:
                for chunk in _chunks(tensors[name]):
                    file.write(chunk.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)
    _compare(path, tensors)
    return path


def write_folder(
    folder: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes ``model.safetensors``, or shards of at most ``shard_bytes`` (a tensor is never cut) and their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, array in tensors.items():
        if shards[-1] and filled + array.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    if len(shards) == 1:
        return [write(folder / WEIGHTS, tensors, metadata)]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    paths = [write(folder / name, shard, metadata) for name, shard in zip(names, shards, strict=True)]
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    total = {"total_size": sum(array.nbytes for array in tensors.values())}
    return [*paths, write_text(folder / INDEX, json.dumps({"metadata": total, "weight_map": weight_map}, indent=2))]


def write_text(path: Path, text: str) -> Path:
    """Writes a small new text file and syncs it."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return path


def fsync(path: Path) -> None:
    """Flushes one file or folder to the disk: of a folder, the renames in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(order: list[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], where: str) -> bytes:
    codes = {dtype: code for code, dtype in DTYPES.items()}
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        check_name(name, where)
        array = tensors[name]
        if array.dtype not in codes:
            raise SafetensorsError(f"{where}: tensor {name}: dtype {array.dtype} has no place in safetensors")
        table[name] = {"dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return raw + b" " * (-len(raw) % 8)


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of an array in C order, in pieces: a transposed view is never copied whole."""
    if array.ndim == 0 or array.nbytes <= CHUNK or not array.shape[0]:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return
    rows = max(1, CHUNK * array.shape[0] // array.nbytes)
    for start in range(0, array.shape[0], rows):
        yield np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8)


def _compare(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    written = TensorFile(path)
    for name, array in tensors.items():
        both = zip(_chunks(written.read(name)), _chunks(array), strict=True)
        if not all(np.array_equal(have, want) for have, want in both):
            raise SafetensorsError(f"{path}: tensor {name} reads back other than it was written; is the disk failing?")
