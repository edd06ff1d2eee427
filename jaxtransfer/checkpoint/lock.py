"""One writer for one run folder, and one run for one folder."""

import datetime
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from jaxtransfer.checkpoint.manifest import write_durably
from jaxtransfer.parallel import distributed

LOCK = "run.lock"
RUN = "run.json"


class RunFolderError(OSError):
    """A run's folder is in use by another process, or belongs to another run; the message says by or to whom."""


class RunLock:
    """The exclusive right to write into a run's folder; readers need none.

    The file ``run.lock`` names the holder: host, process, start. The operating system's lock on it decides (``flock``),
    which falls with the process, so a lock left by a process that died on this host is taken over. A file left by
    another host is not: from here it cannot be told whether its process still runs. Of several processes that run
    together the first holds the lock for all.

    Raises:
      RunFolderError: at once, where another process holds the lock; the message names it.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, RunLock(folder) as lock:
      ...     lock.path.name
      'run.lock'
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / LOCK
        self._handle: int | None = None

    def acquire(self) -> Self:
        """Takes the lock; see the class for what it raises."""
        distributed.by_first(f"lock {self.path}", self._acquire, error=RunFolderError)
        return self

    def _acquire(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._take(handle)
            except BaseException:
                os.close(handle)
                raise
            if self._is_current(handle):  # else its holder removed the file between our open and our lock
                break
            os.close(handle)
        os.truncate(handle, 0)
        start = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "start": start}
        os.pwrite(handle, json.dumps(holder).encode(), 0)
        os.fsync(handle)
        self._handle = handle

    def _take(self, handle: int) -> None:
        folder = self.path.parent
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"{folder}: another run is writing here, {_describe(_holder(handle))}; wait for it, stop it, or "
                "choose another folder"
            ) from None
        left = _holder(handle)
        if left and left.get("host") != socket.gethostname():
            raise RunFolderError(
                f"{folder}: locked by {_describe(left)} and never released; if that run is dead, remove {self.path}"
            )

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Gives the lock back and removes its file."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def _holder(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except ValueError:  # empty: just made, or its writer died before it wrote
        return {}
    return found if isinstance(found, dict) else {}


def _describe(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "a process that has only just begun"
    return f"process {holder.get('pid')} on host {holder.get('host')} since {holder.get('start')}"


def claim(folder: str | Path, identity: Mapping[str, Any]) -> None:
    """Makes a folder the folder of one run, or confirms that it is: ``run.json`` holds the run's identity.

    Args:
      folder: made where it does not exist; one without ``run.json`` must be empty (but for the lock).
      identity: JSON-able, what makes it this run: the digests of its configuration, source, data.

    Raises:
      RunFolderError: it belongs to another run (what differs is listed), or holds files that are not a run's.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     claim(folder, {"seed": 0})
      ...     claim(folder, {"seed": 0})  # the same run again: fine
    """
    distributed.by_first(f"claim {folder}", lambda: _claim(Path(folder), identity), error=RunFolderError)


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mine = json.loads(json.dumps(dict(identity)))
    path = folder / RUN
    if not path.exists():
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in (LOCK, f".{RUN}.new"))
        if foreign:
            raise RunFolderError(
                f"{folder}: holds files of no run ({', '.join(foreign[:5])}), no {RUN}; choose an empty folder"
            )
        write_durably(path, json.dumps(mine, indent=2, sort_keys=True).encode())
        return
    try:
        theirs = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); choose another folder") from None
    if theirs != mine:
        told = [row for key in sorted({*theirs, *mine}) for row in _apart(key, theirs.get(key), mine.get(key))]
        what = ", ".join(f"{key} is {_short(there)} there, {_short(here)} here" for key, there, here in told)
        raise RunFolderError(f"{folder}: belongs to another run: {what}; choose another folder, or remove this one")


def _apart(key: str, there: Any, here: Any) -> list[tuple[str, Any, Any]]:
    """Where two values differ: in lists and mappings that are alike but for some entries, these."""
    if there == here:
        return []
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        rows = [_apart(f"{key}[{i}]", *pair) for i, pair in enumerate(zip(there, here, strict=True))]
    elif isinstance(there, dict) and isinstance(here, dict) and there.keys() == here.keys():
        rows = [_apart(f"{key}.{name}", there[name], here[name]) for name in there]
    else:
        return [(key, there, here)]
    return [row for found in rows for row in found]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
