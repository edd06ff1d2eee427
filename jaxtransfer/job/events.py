"""What a run tells: lines of ``metrics.jsonl``, a progress bar at a terminal, plain lines elsewhere, TensorBoard."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtransfer.checkpoint.manifest import write_durably
from jaxtransfer.config import ConfigError
from jaxtransfer.run import Callback, Event, Progress

METRICS = "metrics.jsonl"


def jsonl(path: Path, progress: Progress) -> Callback:
    """Appends events to a file; lines that a run which goes on from ``progress`` writes again are removed first."""
    last = {"eval": progress.evaluated, "stopped_early": progress.evaluated, "end": -1}
    found = lines(path) if path.exists() else []
    kept = [event for event in found if event["step"] <= last.get(event["kind"], progress.batch)]
    write_durably(path, "".join(json.dumps(event) + "\n" for event in kept).encode())

    def write(event: Event) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**_finite(event), "time": round(time.time(), 3)}) + "\n")

    return write


def lines(path: Path) -> list[Event]:
    """The events of a file; a last line that was cut off by a crash is left out."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found


def _finite(event: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is no number is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}


def memory(events: list[Event]) -> Callback:
    """Collects events in a list."""
    return events.append


@contextlib.contextmanager
def tensorboard(folder: Path, *, after: int) -> Iterator[Callback]:
    """A context whose callback writes scalars for TensorBoard; what was written of steps beyond ``after`` is void.

    Raises:
      ConfigError: the extra ``tensorboard`` is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError("run.tensorboard: needs the extra: pip install 'jaxtransfer[tensorboard]'") from None

    def write(event: Event) -> None:
        for name, value in event.items():
            if isinstance(value, float) and math.isfinite(value):
                writer.add_scalar(f"{event['kind']}/{name}", value, event["step"])

    with SummaryWriter(str(folder), purge_step=after + 1) as writer:
        yield write


class Screen:
    """Progress on a console: a bar with speed and remaining time at a terminal, a line an event elsewhere.

    Use as a context manager; call :meth:`titled` for the callback of one run.
    """

    def __init__(self, console: Any):
        self.console = console
        self._bar: Any = None

    def __enter__(self) -> "Screen":
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text)

    def titled(self, title: str, steps: int, *, done: int = 0) -> Callback:
        """The callback of one run of ``steps`` batches."""
        if self._bar is None:
            began = [time.perf_counter(), done]
            return lambda event: self._line(title, event, began)
        task = self._bar.add_task(title, total=steps, completed=done, note="")
        return lambda event: self._update(task, title, event)

    def _update(self, task: int, title: str, event: Event) -> None:
        kind = event["kind"]
        if kind == "train":
            note = f"loss {event['loss']:.3f}  {event['per_second']:.0f}/s"
            self._bar.update(task, completed=event["step"], note=note)
        elif kind == "end":
            self._bar.update(task, completed=event["step"])
        else:
            self.say(f"{title}  step {event['step']}  {summary(event)}")

    def _line(self, title: str, event: Event, began: list[Any]) -> None:
        text = f"{title}  step {event['step']}/{event['steps']}  {summary(event)}"
        if event["kind"] == "train":
            taken = event["step"] - began[1]
            left = (time.perf_counter() - began[0]) / max(taken, 1) * (event["steps"] - event["step"])
            text += f"  {left:.0f} s left"
        if event["kind"] != "end":
            self.say(text)


def summary(event: Mapping[str, Any]) -> str:
    """An event in words: its kind and its numbers.

    Example:
      >>> summary({"kind": "eval", "step": 3, "steps": 9, "accuracy": 0.5, "improved": True})
      'eval  accuracy 0.5  best so far'
    """
    numbers = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in event.items()
        if name not in ("kind", "step", "steps", "improved") and value is not None
    ]
    best = ["best so far"] if event.get("improved") else []
    return "  ".join([event["kind"].replace("_", " "), *numbers, *best])
