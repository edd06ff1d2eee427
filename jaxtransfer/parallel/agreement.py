"""What several processes say to each other outside of compiled programs.

It goes through the service that `jax.distributed` keeps on process 0, not through the devices: it can be said from any
thread, beside a step that runs, and its waits end. All processes must call the same functions with the same ``what`` in
the same order.
"""

import collections
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

T = TypeVar("T")

WAIT = 600.0
"""Seconds that processes wait for each other."""

_calls: collections.Counter[str] = collections.Counter()


class ProcessError(RuntimeError):
    """Another process did not come, or has failed; the message says which, and what to do."""


def is_first() -> bool:
    """Whether this process is the one that writes reports, exports and metrics."""
    return jax.process_index() == 0


def gathered(what: str, text: str, *, timeout: float = WAIT) -> list[str]:
    """The text of every process, in their order: a barrier that names who does not come.

    Raises:
      ProcessError: a process did not come within ``timeout`` seconds.

    Example:
      >>> gathered("example", "of one process")
      ['of one process']
    """
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return [text]
    client, folder = _client(), _numbered(what)
    client.key_value_set(f"{folder}/{index}", f"={text}")  # the service takes no empty values
    try:
        client.wait_at_barrier(folder, int(timeout * 1000))
    except jax.errors.JaxRuntimeError:
        there = {name.rsplit("/", 1)[1] for name, _ in client.key_value_dir_get(folder)}
        missing = [str(other) for other in range(count) if str(other) not in there]
        who = f"process {', '.join(missing)} of {count}" if missing else f"one of {count} processes"
        raise ProcessError(
            f"{what}: {who} did not come within {timeout:g} s; see its output, and start the run again, which goes on "
            "from its last checkpoint"
        ) from None
    found = {name.rsplit("/", 1)[1]: value[1:] for name, value in client.key_value_dir_get(folder)}
    return [found[str(other)] for other in range(count)]


def by_first(
    what: str, work: Callable[[], T], *, error: Callable[[str], Exception] = ProcessError, timeout: float = WAIT
) -> T:
    """Lets process 0 alone do some work, and gives its result, JSON-able, on all.

    Args:
      what: the name of the work.
      work: done while the others wait.
      error: of what is raised on the others where the work fails; process 0 raises what it raised.
      timeout: seconds that the others wait.

    Raises:
      ProcessError: process 0 did not come to an end.

    Example:
      >>> by_first("sum", lambda: 1 + 1)
      2
    """
    if jax.process_count() == 1:
        return work()
    client, name = _client(), f"{_numbered(what)}/first"
    if not is_first():
        try:
            told = json.loads(client.blocking_key_value_get(name, int(timeout * 1000)))
        except jax.errors.JaxRuntimeError:
            raise ProcessError(f"{what}: process 0 was not done within {timeout:g} s; see its output") from None
        if "error" in told:
            raise error(told["error"])
        return told["result"]
    try:
        result = work()
    except BaseException as failure:
        client.key_value_set(name, json.dumps({"error": str(failure) or type(failure).__name__}))
        raise
    client.key_value_set(name, json.dumps({"result": result}))
    return result


@contextlib.contextmanager
def together(what: str, *, error: Callable[[str], Exception] = ProcessError, timeout: float = WAIT) -> Iterator[None]:
    """A block that all processes run: where it fails on one, it fails on all, and the others say where.

    Raises:
      ProcessError: a process did not come to its end.
    """
    try:
        yield
    except Exception as failure:
        gathered(what, str(failure) or type(failure).__name__, timeout=timeout)
        raise
    failures = gathered(what, "", timeout=timeout)
    if any(failures):
        index, text = next((i, text) for i, text in enumerate(failures) if text)
        raise error(f"process {index}: {text}")


class Agreement:
    """A number that any process may come up with, and that all take up at the same call.

    Every process must make the same calls, with compiled programs over all of them in between: one that comes up with a
    number in a call has told the others before they can be more than a few calls ahead.
    """

    _LAG = 5  # calls that a process can be ahead of another: two with a program in between, the rest without

    def __init__(self, what: str):
        self._name = _numbered(what)
        self._calls = 0
        self._found: tuple[int, int] | None = None  # the number, and the call from which on it counts

    def __call__(self, mine: int | None) -> int | None:
        """The number that counts from this call on, or None; ``mine`` is what this process came up with."""
        if jax.process_count() == 1:
            return mine
        self._calls += 1
        if self._found is None:
            self._found = self._exchanged(mine)
        return self._found[0] if self._found is not None and self._calls >= self._found[1] else None

    def _exchanged(self, mine: int | None) -> tuple[int, int] | None:
        client = _client()
        if mine is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first: its number counts
                client.key_value_set(self._name, f"{mine} {self._calls + self._LAG}")
        try:
            number, call = client.key_value_try_get(self._name).split()
        except jax.errors.JaxRuntimeError:
            return None
        return int(number), int(call)


def _numbered(what: str) -> str:
    """A name of its own for every call: of the first, the second, ... of this ``what``."""
    _calls[what] += 1
    return f"jaxtransfer/{what}/{_calls[what]}"


def _client() -> Any:
    """The client of the service of `jax.distributed`, of which jax shows no public side; Orbax goes the same way."""
    from jax._src.distributed import global_state

    return global_state.client
