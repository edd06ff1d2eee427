"""Parameters in Orbax's format: every model of the zoo, whatever its head; read back only if nothing has changed."""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtransfer.adapt.quantized import quantized
from jaxtransfer.source.placing import of_whole
from jaxtransfer.source.resolve import MARKER, SourceError
from jaxtransfer.source.strictjson import printable
from jaxtransfer.tree import flatten, unflatten
from jaxtransfer.tree.fingerprint import digest_of
from jaxtransfer.types import Head

FOLDER = "params"


def write(params: Any, folder: Path) -> None:
    """Writes canonical parameters under ``folder``.

    Raises:
      OSError: also where Orbax wraps the system's error (a full disk, mostly) in a ValueError.
    """
    from orbax.checkpoint import v1 as ocp

    try:
        with _quiet():
            ocp.save(str(folder / FOLDER), params)
    except ValueError as error:
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
        raise


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the stored parameters, by its path under ``folder``."""
    files = sorted(path for path in (folder / FOLDER).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def verify(folder: Path, record: Mapping[str, Any], ref: str) -> None:
    """Checks every file against the record before Orbax sees one: it reads most damage without a word, and some loudly.

    Raises:
      SourceError: a file is missing, extra or not what was written.
    """
    wanted, there = record.get("files"), hashes(folder)
    if not isinstance(wanted, dict):
        raise SourceError(f"{ref}: {MARKER} does not list the files of the parameters")
    if wrong := sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name)):
        raise SourceError(f"{ref}: {printable(wrong[0])} is damaged: it is not what was exported")


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_paths(folder: Path, ref: str) -> dict[str, Any]:
    """Canonical path -> shape and dtype of what is stored under ``folder``."""
    from orbax.checkpoint import v1 as ocp

    with _quiet(), _damage(ref):
        return flatten(ocp.metadata(str((folder / FOLDER).resolve())).metadata)


def read(
    folder: Path,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    where: Mapping[str, Any],
    methods: Mapping[str, str],
    record: Mapping[str, Any],
    ref: str,
) -> dict[str, Any]:
    """Parameters written by :func:`write`, each on its devices; those to be quantised are read one by one.

    Orbax reads most damaged bytes back without a word, hence the comparison with the recorded digest.

    Args:
      leaves: path -> what is stored, all of it, in natural order.
      where: of `placing.shardings`.
      methods: path -> how the leaf is quantised, where it is.

    Raises:
      SourceError: damaged files, or values that are not those that were written.
    """
    from orbax.checkpoint import v1 as ocp

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def some(paths: Iterable[str]) -> dict[str, jax.Array]:
        like: dict[str, Any] = dict.fromkeys(leaves, ocp.PLACEHOLDER)
        for path in paths:
            leaf, sharding = leaves[path], of_whole(where[path]) or default
            like[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        with _quiet(), _damage(ref):
            found = flatten(ocp.load(str((folder / FOLDER).resolve()), unflatten(like)))
        return {path: found[path] for path in paths}

    made: dict[str, Any] = some([path for path in leaves if path not in methods])

    def in_order() -> Iterator[tuple[str, jax.Array]]:
        for path in leaves:
            leaf = some([path])[path] if path in methods else made[path]
            yield path, leaf
            if path in methods:
                made[path] = jax.block_until_ready(quantized(path, leaf, methods[path], where=where[path]))

    if digest_of(in_order()) != record.get("digest"):
        raise SourceError(
            f"{ref}: the parameters are not those that were exported: another digest; the files are damaged"
        )
    return {path: made[path] for path in leaves}


def head_record(head: Head | None) -> dict[str, Any] | None:
    """A head as plain JSON; heads with stages of their own are code and have no such form."""
    if head is None:
        return None
    return {"kind": head.kind, "labels": list(head.labels), "pooling": head.pooling, "width": head.width}


def head_of(record: Any, ref: str) -> Head | None:
    """The inverse of :func:`head_record`."""
    if record is None:
        return None
    wanted = {"kind": str, "labels": list, "pooling": (str, type(None)), "width": (int, type(None))}
    if not isinstance(record, dict) or set(record) != set(wanted):
        raise SourceError(f"{ref}: the recorded head must have exactly {', '.join(wanted)}")
    if wrong := [name for name, kind in wanted.items() if not isinstance(record[name], kind)]:
        raise SourceError(f"{ref}: the recorded head has a wrong {wrong[0]}")
    return Head(record["kind"], tuple(map(str, record["labels"])), record["pooling"], record["width"])


@contextlib.contextmanager
def _damage(ref: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged files surface as anything from KeyError to XlaRuntimeError
        reason = str(error).strip().split("\n")[0][:200]
        raise SourceError(f"{ref}: the Orbax files cannot be read: {type(error).__name__}: {reason}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs every step of a save and load; warnings and errors still show."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
