"""The checkpoints of one run: written in the background, kept by number, the last good one found again."""

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from jax.sharding import Mesh

from jaxtransfer.checkpoint import store
from jaxtransfer.checkpoint.manifest import (
    CheckpointError,
    DamagedError,
    candidates,
    discard,
    steps,
    sweep,
    verify,
)
from jaxtransfer.checkpoint.reading import restore
from jaxtransfer.parallel import distributed
from jaxtransfer.source.writer import fsync
from jaxtransfer.tree.rules import Rules
from jaxtransfer.types import Lineage, State


class Checkpointer:
    """Saves a run's steps under ``root/<step>``, and keeps the last ``keep`` and the best.

    Use it as a context manager: leaving it waits for the save under way. It does not lock the folder; see `RunLock`.
    With several processes all make the same calls; the first decides what is there, and what goes.

    Args:
      root: the folder of the run's checkpoints; what dead writers left in it is removed.
      lineage: of the source; steps made from another source are refused.
      keep: how many of the last steps stay, at least one.
      best: a step that stays whatever comes; see :meth:`protect`.
      async_: write in the background; :meth:`save` then returns once the arrays have left the devices.
    """

    def __init__(
        self, root: str | Path, *, lineage: Lineage, keep: int = 2, best: int | None = None, async_: bool = True
    ):
        if keep < 1:
            raise CheckpointError(f"{root}: keep={keep}, but at least the last step must stay")
        self.root, self.lineage, self.keep, self.best, self.async_ = Path(root), lineage, keep, best, async_
        self._by_first("sweep", self._make)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last: int | None = None  # saved, or being saved

    def _make(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            sweep(self.root)
        except OSError as error:
            raise CheckpointError(
                f"{self.root}: cannot hold checkpoints: {error.strerror}; choose another folder"
            ) from error

    def _by_first(self, what: str, work: Callable[[], Any]) -> Any:
        return distributed.by_first(f"{what} {self.root}", work, error=CheckpointError)

    def save(self, step: int, state: State, frozen: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Saves a step; once it returns, the state may be donated.

        What stands in its place and is no checkpoint is set aside, renamed to ``<step>.damaged``, with a warning.

        Args:
          step: above the last one here, as retention goes by number.
          state: laid out as it is.
          frozen: the laid-out complement of ``state.params``.
          extra: JSON-able, handed back by ``restore``.

        Raises:
          CheckpointError: this save cannot begin (the step is no int of 0 or more, or not above the last, the disk is
            full), or the one before it failed.
        """
        if type(step) is not int or step < 0:
            raise CheckpointError(f"{self.root}: a step is an int of 0 or more, got {step!r}")
        self.wait()
        if name := self._by_first("clear", lambda: self._clear(step)):
            warnings.warn(f"{self.root / str(step)}: was no whole checkpoint (now {name})", stacklevel=2)
        path = self.root / str(step)
        snap = store.snapshot(state, frozen, self.lineage, extra)
        finish = store.begin(path, snap)
        if self.async_:
            self._thread = threading.Thread(target=self._finish, args=(finish,), name=f"save {path}")
            self._thread.start()
        else:
            self._conclude(finish)
        self._last = step

    def _clear(self, step: int) -> str:
        """Makes way for a step; the new name of what stood there, if anything did."""
        if (found := steps(self.root)) and step <= found[-1]:
            raise CheckpointError(
                f"{self.root}: step {step} is not above {found[-1]}, the last one here; go on from that one, or choose "
                "another folder"
            )
        path = self.root / str(step)
        free = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
        return "" if free or not os.path.lexists(path) else self._set_aside(step)

    def _finish(self, finish: Callable[[], None]) -> None:
        try:
            self._conclude(finish)
        except BaseException as error:  # raised where the caller can see it, by `wait`
            self._error = error

    def _conclude(self, finish: Callable[[], None]) -> None:
        finish()
        self._by_first("retire", self._retire)

    def _retire(self) -> None:
        """Deletes the steps that need not stay, but only once the newest of all is known to be whole to the byte."""
        found = steps(self.root)
        doomed = [step for step in found[: -self.keep] if step != self.best]
        if doomed:
            verify(self.root / str(found[-1]))
        for step in doomed:
            try:
                discard(self.root / str(step))
            except OSError as error:
                raise CheckpointError(f"{self.root / str(step)}: cannot be deleted: {error.strerror}") from error

    def protect(self, step: int) -> None:
        """Makes a step the best one, which stays; the one that was best before no longer does.

        Raises:
          CheckpointError: there is no such step, and it was not the one saved last.
        """
        if step != self._last and step not in (found := self._by_first("list", lambda: steps(self.root))):
            raise CheckpointError(f"{self.root}: has no step {step} to protect, only {found}")
        self.best = step

    def protect_again(self, step: int) -> str | None:
        """As `protect`, of a step that was the best before a restart; one that is damaged is set aside.

        Returns:
          None, or what is wrong with it, and its new name.
        """

        def wrong() -> str:
            try:
                verify(self.root / str(step))
            except DamagedError as error:
                there = (self.root / str(step)).is_dir()
                return f"{error} (now {self._set_aside(step)})" if there else str(error)
            return ""

        if told := self._by_first("verify", wrong):
            return told
        self.best = step
        return None

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: it failed, or the retention after it did.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """The same as :meth:`wait`, at the end."""
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore_latest(
        self, like: State | tuple[State, Any], *, mesh: Mesh | None = None, sharding: Rules = ()
    ) -> tuple[State, Any, dict[str, Any]] | None:
        """Restores the last good step, or returns None where there is none; arguments as for ``restore``.

        Later steps that are damaged are set aside, renamed to ``<step>.damaged``, with one warning.

        Raises:
          TreeError, CheckpointError: the last good step does not fit; nothing is set aside for that.
        """
        self.wait()
        damaged: list[str] = []
        restored = None
        for step in reversed(self._by_first("list", lambda: candidates(self.root))):
            try:
                restored = restore(self.root / str(step), like=like, mesh=mesh, sharding=sharding, lineage=self.lineage)
            except DamagedError as error:
                name = self._by_first("set aside", lambda step=step: self._set_aside(step))
                damaged.append(f"{error} (now {name})")
            if restored is not None:
                break
        if damaged:
            then = "no earlier step is left" if restored is None else f"went back to step {step}"
            warnings.warn(f"{self.root}: {'; '.join(damaged)}; {then}", stacklevel=2)
        return restored

    def _set_aside(self, step: int) -> str:
        names = (f"{step}.damaged{suffix}" for suffix in ("", *(f".{i}" for i in range(1, 1000))))
        name = next(name for name in names if not (self.root / name).exists())
        os.rename(self.root / str(step), self.root / name)
        fsync(self.root)
        return name
