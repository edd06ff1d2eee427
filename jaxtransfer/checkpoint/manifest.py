"""The verified manifest: size and CRC-32 of every file, written last. What it does not confirm does not exist.

A checkpoint is a folder. It is written under a temporary name, every file and folder is flushed to the disk, the
manifest last, and only then is it renamed to its own name: a reader sees all of it or nothing. The manifest carries its
own checksum, so a change of any byte of any file is found before the byte is used.
"""

import fcntl
import gzip
import json
import os
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from jaxtransfer.parallel import distributed
from jaxtransfer.source.writer import fsync

MANIFEST = "manifest.json"
META = "meta.json.gz"  # names and fingerprints, hundreds of them: a seventh of its size so
FORMAT, VERSION = "jaxtransfer-checkpoint", 2
_STEP = re.compile(r"0|[1-9][0-9]*")
_LEFTOVER = re.compile(r"\..+\.(tmp|trash)-[0-9a-f]{12}")
_BLOCK = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or cannot be restored here; the message says what to do."""


class DamagedError(CheckpointError):
    """A checkpoint's files are not those that were written; the message names the first that differs."""


def steps(root: str | Path) -> list[int]:
    """The steps under ``root`` that can be restored, in numeric order: what discovery goes by.

    A folder counts if its name is a plain integer, it has a manifest of ours written for that name, and every file of
    the manifest is there with its size. Everything else (empty, foreign, half-deleted, copied, temporary, a link) is
    passed over. Checksums are left to :func:`verify` and ``restore``.

    Example:
      >>> steps("no/such/folder")
      []
    """
    return [step for step in candidates(root) if _is_whole(Path(root) / str(step))]


def latest(root: str | Path) -> int | None:
    """The last of :func:`steps`, or None."""
    return max(steps(root), default=None)


def candidates(root: str | Path) -> list[int]:
    """Steps that bear any mark of ours, whole or not, in numeric order."""
    root = Path(root)
    names = [entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)] if root.is_dir() else []
    ours = (name for name in names if _STEP.fullmatch(name))
    return sorted(int(name) for name in ours if any((root / name / mark).exists() for mark in (MANIFEST, META)))


def _is_whole(folder: Path) -> bool:
    try:
        return read_manifest(folder)["name"] == folder.name
    except DamagedError:
        return False


def verify(path: str | Path, *, only: str | None = None) -> None:
    """Reads every byte of a checkpoint, or ``only`` one of its files, and compares it with the manifest.

    Raises:
      DamagedError: the manifest or a file is missing or differs; the message names it.
    """
    folder = Path(path)
    files = {name: entry for name, entry in read_manifest(folder)["files"].items() if only in (None, name)}
    _compare(folder, files, _crc32s(folder, list(files)))


def verify_together(folder: Path) -> None:
    """As :func:`verify`, called by all processes at once: each reads its share of the files, and all raise alike."""
    files = read_manifest(folder)["files"]
    _compare(folder, files, _shared_crc32s(folder, files))


def _compare(folder: Path, files: Mapping[str, Mapping[str, Any]], sums: Mapping[str, str]) -> None:
    for name, entry in files.items():
        if (found := sums[name]).startswith("cannot"):
            raise DamagedError(f"{folder / name}: {found}")
        if found != entry["crc32"]:
            raise DamagedError(f"{folder / name}: damaged, its CRC-32 is {found}, {entry['crc32']} was written")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after the check of its own checksum and of the presence and sizes of the files."""
    path = folder / MANIFEST
    try:
        text = b"" if path.is_symlink() else path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror}); the folder is no whole checkpoint") from None
    body = text.split(b"\n", 1)[0]
    if text != _sealed(body):
        raise DamagedError(f"{path}: damaged, its own checksum does not match")
    manifest = json.loads(body)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {manifest.get('version')}, but {VERSION} is read here; use the jaxtransfer that wrote it"
        )
    present = dict(_files(folder))
    for name, entry in manifest["files"].items():
        if name not in present:
            raise DamagedError(f"{folder / name}: missing")
        if present[name] != entry["size"]:
            raise DamagedError(f"{folder / name}: {present[name]} bytes, {entry['size']} were written")
    return manifest


def packed(meta: Mapping[str, Any]) -> bytes:
    """What :data:`META` holds; the same for the same."""
    return gzip.compress(json.dumps(meta, sort_keys=True).encode(), mtime=0)


def unpacked(content: bytes) -> dict[str, Any]:
    """The inverse of :func:`packed`."""
    return json.loads(gzip.decompress(content))


def _sealed(body: bytes) -> bytes:
    return body + b"\n%08x\n" % zlib.crc32(body)


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Relative name and size of the regular files, links not followed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            info = path.lstat()
            if stat.S_ISREG(info.st_mode):
                yield path.relative_to(folder).as_posix(), info.st_size


def _crc32s(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # reading and zlib both run outside the interpreter's lock
        return dict(zip(names, pool.map(_crc32, [folder / name for name in names]), strict=True))


def _shared_crc32s(folder: Path, sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The sums of all files, of which each process reads its share, the largest dealt out first."""
    names = sorted(sizes, key=lambda name: (-sizes[name]["size"], name))
    mine = _crc32s(folder, names[jax.process_index() :: jax.process_count()])
    parts = distributed.gathered(f"read {folder}", json.dumps(mine))
    return {name: value for part in parts for name, value in json.loads(part).items()}


def _crc32(path: Path) -> str:
    """The sum as eight digits, or why the file cannot be read."""
    crc, block = 0, bytearray(_BLOCK)
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(block):
                crc = zlib.crc32(memoryview(block)[:count], crc)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return f"{crc:08x}"


class Draft:
    """A temporary folder that becomes ``path``, manifest and all, or nothing.

    The folder is locked while its writer lives (the kernel lets go when it dies): `sweep` removes the unlocked. Of
    several processes the first makes, locks, names and removes it.

    Args:
      path: the folder to be.
      check: called first, on the first process alone; what it raises is raised on all.

    Raises:
      CheckpointError: the folder cannot be made, or is not seen by all processes.
    """

    def __init__(self, path: Path, check: Callable[[], None] = lambda: None):
        self.path = path
        self._handle: int | None = None
        name = distributed.by_first(f"make {path}", lambda: self._make(check), error=CheckpointError)
        self.folder = path.parent / name
        seen = distributed.gathered(f"see {path}", "yes" if self.folder.is_dir() else "no")
        if "no" in seen:
            self.abandon()
            raise CheckpointError(
                f"{path}: process {seen.index('no')} does not see what process 0 writes; choose a folder on a file "
                "system that all processes share"
            )

    def _make(self, check: Callable[[], None]) -> str:
        check()
        folder = self.path.parent / f".{self.path.name}.tmp-{uuid.uuid4().hex[:12]}"
        try:
            folder.mkdir(parents=True)
            self._handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be made: {error.strerror}; choose a folder that can be written"
            ) from error
        with suppress(OSError):  # a file system without locks: `sweep` then leaves the folder alone
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder.name

    def publish(self) -> None:
        """Seals the folder and gives it its name."""
        files = summed(self.folder)
        distributed.by_first(f"publish {self.path}", lambda: self._publish(files), error=CheckpointError)

    def _publish(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        seal(self.folder, self.path.name, files)
        os.rename(self.folder, self.path)
        fsync(self.path.parent)
        self._close()

    def abandon(self) -> None:
        """Removes the folder."""
        if self._handle is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def summed(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sum of every file, of which each of several processes reads its share."""
    files = {name: {"size": size} for name, size in sorted(_files(folder))}
    sums = _shared_crc32s(folder, files)
    return {name: {**entry, "crc32": sums[name]} for name, entry in files.items()}


def seal(folder: Path, name: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Flushes every file and folder and then writes the manifest: what it lists is on the disk."""
    for file in files:
        fsync(folder / file)
    for parent, _, _ in os.walk(folder, topdown=False):
        fsync(Path(parent))
    body = json.dumps({"format": FORMAT, "version": VERSION, "name": name, "files": files}, sort_keys=True)
    write_durably(folder / MANIFEST, _sealed(body.encode()))


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file so that it is either the old or the new one, whole, even after a loss of power."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    fsync(path.parent)


def sweep(root: Path) -> None:
    """Removes what dead writers left: temporary folders that no one has locked, and trash."""
    for folder in root.iterdir():
        found = _LEFTOVER.fullmatch(folder.name)
        if found and (found[1] == "trash" or _is_abandoned(folder)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def discard(folder: Path) -> None:
    """Deletes a checkpoint: renamed first, so that it is never seen half-deleted."""
    trash = folder.with_name(f".{folder.name}.trash-{uuid.uuid4().hex[:12]}")
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)
