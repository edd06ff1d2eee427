"""Several processes on one machine, under a parent that names the one that dies; or this one, joining the others."""

import collections
import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO, NoReturn, TextIO

from jaxtransfer.parallel import ProcessError
from jaxtransfer.parallel import join as join_processes
from jaxtransfer.parallel.distributed import COORDINATOR, COUNT, INDEX
from jaxtransfer.run import Interrupted

ENTRY = (sys.executable, "-m", "jaxtransfer")
"""What a process is started with, its arguments behind it."""

STOP = 120.0
"""Seconds that processes have to save and stop in once they are asked to."""

_KILL = 10.0  # seconds that they have once one of them is dead: a collective operation without it never ends
_SAME = 1.0  # seconds in which deaths count as one: that of the first, and of those that jax ends for it
_TAIL = 8  # lines of its stderr that are told of a dead process
_OBEYED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit codes of those that a signal stopped, and that have saved
_NOISE = re.compile(rb"\[Gloo\] Rank|peer ranks")  # said of every connection, in pieces, by code that knows no levels


def join(*, timeout: float) -> None:
    """Joins the processes of the cluster, or of `launch`; a process that never comes ends this one by an error.

    Raises:
      ProcessError: there is nothing to join.
    """
    join_processes(timeout=timeout, give_up=_give_up)


def _give_up(message: str) -> NoReturn:
    """Ends the process from a thread, where an error would end the thread alone."""
    print(f"jaxtransfer: error: {message}", file=sys.stderr, flush=True)
    os._exit(6)


def launch(arguments: Sequence[str], *, processes: int, devices: int | None = None) -> None:
    """Starts processes of ``python -m jaxtransfer`` that compute together, and waits until all are done.

    Their output is this one's, each line behind the number of its process. When one dies, the others are stopped. A
    signal to this process stops all, after they have saved; a second one kills them.

    Args:
      arguments: of each of them.
      processes: how many.
      devices: of each; on a CPU simulated.

    Raises:
      ProcessError: one died; it is named, with what it said last.
      Interrupted: a signal stopped all of them.
      ValueError: there is nothing to start.
    """
    if processes < 1 or (devices is not None and devices < 1):
        raise ValueError(f"launch: {processes} processes with {devices} devices; both must be at least 1")
    command = [*ENTRY, *arguments]
    address = f"127.0.0.1:{_free_port()}"
    watch = _Watch()
    old = {number: signal.signal(number, watch.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for index in range(processes):
            watch.start(command, _environment(address, index, processes, devices))
        watch.until_done()
    finally:
        watch.kill()
        for number, handler in old.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _environment(address: str, index: int, count: int, devices: int | None) -> dict[str, str]:
    own = {COORDINATOR: address, COUNT: str(count), INDEX: str(index), "PYTHONUNBUFFERED": "1"}
    if devices is None:
        return {**os.environ, **own}
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    ids = range(index * devices, (index + 1) * devices)
    own |= {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": " ".join(flags)}
    return {**os.environ, **own, "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, ids))}


class _Child:
    """A process, its output passed on line by line, and what it said last on stderr."""

    def __init__(self, index: int, command: Sequence[str], environment: dict[str, str], ended: queue.Queue["_Child"]):
        self.index, self.when = index, 0.0
        self.asked = self.forced = False  # by us: to stop, and killed because it did not
        self.tail: collections.deque[str] = collections.deque(maxlen=_TAIL)
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C at the terminal reaches the parent alone, which asks all once
        )  # fmt: skip
        pairs = [(self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)]
        self._pumps = [threading.Thread(target=self._pump, args=pair, daemon=True) for pair in pairs]
        for thread in (*self._pumps, threading.Thread(target=self._wait, args=(ended,), daemon=True)):
            thread.start()

    @property
    def code(self) -> int:
        """The exit code; below zero the signal that killed it."""
        return self.process.returncode

    def _pump(self, stream: IO[bytes], sink: TextIO) -> None:
        with stream:
            for raw in stream:
                if not _NOISE.search(raw):
                    self._say(raw.decode(errors="replace").rstrip("\n"), sink)

    def _say(self, line: str, sink: TextIO) -> None:
        if sink is sys.stderr and line.strip():
            self.tail.append(line.strip())
        with contextlib.suppress(OSError, ValueError):  # a reader that went away; the process goes on
            sink.write(f"[{self.index}] {line}\n")
            sink.flush()

    def _wait(self, ended: "queue.Queue[_Child]") -> None:
        self.process.wait()
        self.when = time.monotonic()
        for pump in self._pumps:
            pump.join(_SAME)
        ended.put(self)


class _Watch:
    """The processes, and how far they are from their end."""

    def __init__(self) -> None:
        self.children: list[_Child] = []
        self.asked: int | None = None  # the signal that asked this process to stop
        self._ended: queue.Queue[_Child] = queue.Queue()
        self._deadline = float("inf")

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """One more process."""
        self.children.append(_Child(len(self.children), command, environment, self._ended))

    def ask(self, signum: int, frame: FrameType | None = None) -> None:
        """Asks all to save and stop; kills them when asked again."""
        if self.asked is not None:
            self.kill()
        self.asked = signum
        self._stop_within(STOP)

    def kill(self) -> None:
        """Kills what still runs."""
        for child in self.children:
            if child.process.poll() is None:
                child.forced = True
                child.process.kill()

    def _stop_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)
        for child in self.children:
            if child.process.poll() is None:
                child.asked = True
                child.process.terminate()

    def until_done(self) -> None:
        """Waits for the end of all; stops the others once one has failed."""
        done: list[_Child] = []
        stop = float("inf")  # not at once: what dies of itself meanwhile may be what the first died of
        while len(done) < len(self.children):
            with contextlib.suppress(queue.Empty):
                done.append(self._ended.get(timeout=0.1))
                if done[-1].code not in (0, *_OBEYED):
                    stop = min(stop, done[-1].when + _SAME)
            if time.monotonic() > stop:
                stop = float("inf")
                self._stop_within(_KILL)
            if time.monotonic() > self._deadline:
                self.kill()
        failed = sorted((child for child in done if child.code), key=lambda child: child.when)
        if failed and all(child.code in (*_OBEYED, -signal.SIGTERM) for child in failed):
            raise Interrupted(self.asked or signal.SIGTERM)
        if failed:
            raise ProcessError(self._obituary(failed))

    def _obituary(self, failed: Sequence[_Child]) -> str:
        """Names the one that died first; of those that died with it, not one that jax ended for another's sake."""
        own = [child for child in failed if not child.asked]
        first = own or [child for child in failed if child.forced] or failed
        child = next((child for child in first if child.code != -signal.SIGABRT), first[0])
        how = f"was killed by {signal.Signals(-child.code).name}" if child.code < 0 else f"ended with {child.code}"
        if child.forced:
            how = "was asked to stop, did not, and was killed"
        said = f"; it said last: {' | '.join(child.tail)[-800:]}" if child.tail else ""
        return f"process {child.index} of {len(self.children)} {how}, and the others were stopped{said}"
