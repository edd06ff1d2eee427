"""The loop: the only clock and the only order of events. It steps, evaluates, keeps the best, saves, stops, resumes.

The loop itself writes nothing: it hands events to callbacks, and states to a checkpointer.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np

from jaxtransfer.parallel.agreement import Agreement
from jaxtransfer.step import Step
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import State

Event = dict[str, Any]
Callback = Callable[[Event], None]
Evaluate = Callable[[State, Params], Mapping[str, float]]


class DivergenceError(RuntimeError):
    """The loss or the gradient was not finite too many times in a row."""


class Interrupted(BaseException):
    """A signal asked the run to stop; its state is saved. ``signum`` is the signal, ``further`` how to go on."""

    further = "the state is saved, `jaxtransfer resume` goes on"

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Saver(Protocol):
    """What the loop needs of a checkpointer."""

    def save(self, step: int, state: State, frozen: Params, extra: Mapping[str, Any] | None = None) -> None:
        """Saves a step."""
        ...

    def protect(self, step: int) -> None:
        """Keeps a step from being deleted: the best one."""
        ...

    def wait(self) -> None:
        """Waits until everything is on disk."""
        ...


class Data(Protocol):
    """What the loop needs of its data: batches, and a position that can be saved."""

    def __next__(self) -> Mapping[str, np.ndarray]:
        """The next batch."""
        ...

    def state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        ...


@dataclasses.dataclass
class Progress:
    """Where a run stands, beside its `State`: JSON-able, saved with every checkpoint, updated in place.

    Attributes:
      batch: batches consumed; the run ends when it reaches the number of steps.
      rejected: steps whose loss or gradient was not finite, in all; ``in_a_row``: up to now without a good one.
      best: the best value of the chosen metric, and ``best_batch`` where it was reached.
      stale: evaluations since then.
      evaluated: the batch after which the last evaluation was completed.
      window: sums of the training metrics since the last log line, and their number.
    """

    batch: int = 0
    rejected: int = 0
    in_a_row: int = 0
    best: float | None = None
    best_batch: int | None = None
    stale: int = 0
    evaluated: int = 0
    window: dict[str, float] = dataclasses.field(default_factory=dict)

    def load(self, record: Mapping[str, Any]) -> None:
        """Takes the values of a saved record."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, record[field.name])


class Stop:
    """A context in which SIGTERM and SIGINT ask for a stop instead of killing.

    A second signal leaves at once, without saving; a third kills. ``Stop.signum`` is the signal that came, or None.
    Of several processes that run together all stop at the same batch, whichever of them was asked to.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)):
        self.signum: int | None = None
        self._signals, self._old = signals, {}
        self._agreed = Agreement("stop")

    def __enter__(self) -> "Stop":
        self._old = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            for number in self._signals:  # whatever hangs on the way out
                signal.signal(number, signal.SIG_DFL)
            raise SystemExit(128 + signum)
        self.signum = signum

    def due(self) -> int | None:
        """The signal on which to stop now, or None; asked once a batch, by every process."""
        return self._agreed(self.signum)

    def check(self) -> None:
        """Raises :class:`Interrupted` if it is time to stop: for long work that the loop calls, as an evaluation."""
        if (signum := self.due()) is not None:
            raise Interrupted(signum)


@dataclasses.dataclass(frozen=True)
class Selection:
    """How the best state is chosen: ``metric`` on the evaluation's data, the larger the better unless ``minimize``.

    ``patience``: evaluations without a better value after which the run stops; None for never.
    """

    metric: str = "accuracy"
    minimize: bool = False
    patience: int | None = None

    def better(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far; one that is no number never is."""
        if not math.isfinite(value):
            return False
        return best is None or (value < best if self.minimize else value > best)


def fit(
    step: Step,
    state: State,
    frozen: Params,
    data: Data,
    *,
    steps: int,
    evaluate: Evaluate | None = None,
    every: int | None = None,
    checkpoint: Saver | None = None,
    save_every: int | None = None,
    callbacks: Iterable[Callback] = (),
    select: Selection | None = None,
    progress: Progress | None = None,
    stop: Stop | None = None,
    log_every: int = 10,
    max_rejected: int = 10,
    diagnose: Callable[[State, Params, Mapping[str, Any]], str] | None = None,
) -> State:
    """Runs the step over the data and returns the last state.

    Stopped at any point and resumed with the saved state, data position and `Progress`, it continues bit for bit.
    Nothing waits for a step before the next one is dispatched, but where its state is needed: to evaluate, to save, and
    while steps are rejected, so that a divergence is told with the state that diverged.

    Args:
      step: from `make_step`; the state is donated to it.
      state, frozen: from `init_state`, or restored.
      data: batches, and ``data.state()``.
      steps: batches to consume in all.
      evaluate: ``evaluate(state, frozen) -> {metric: value}``, after every ``every`` batches and at the end.
      every: None for the end only.
      checkpoint: saves after every ``save_every`` batches, after every evaluation, and when a signal comes.
      save_every: None for evaluations only.
      callbacks: each is given every event: ``train``, ``eval``, ``rejected``, ``stopped_early``, ``end``.
      select: how the best evaluation is chosen, one of finite numbers alone; its checkpoint is protected.
      progress: updated in place; give the one that was saved to resume.
      stop: asked after every batch whether a signal came.
      log_every: batches between two ``train`` events, which hold means over them.
      max_rejected: the run stops after so many steps in a row that were not finite.
      diagnose: then called with the state and the batch; returns where it saved them.

    Raises:
      DivergenceError: ``max_rejected`` steps in a row were not finite.
      ValueError: the data ends before ``steps``, or the evaluation lacks the metric to select by.
      Interrupted: a signal came; the state is saved.
    """
    loop = _Loop(
        step, frozen, data, steps, evaluate, every, checkpoint, save_every, tuple(callbacks), select or Selection(),
        progress or Progress(), stop or Stop(), log_every, max_rejected, diagnose,
    )  # fmt: skip
    return loop.run(state)


@dataclasses.dataclass
class _Loop:
    """One run of `fit`; the fields are its arguments."""

    step: Step
    frozen: Params
    data: Data
    steps: int
    evaluate: Evaluate | None
    every: int | None
    checkpoint: Saver | None
    save_every: int | None
    callbacks: tuple[Callback, ...]
    select: Selection
    progress: Progress
    stop: Stop
    log_every: int
    max_rejected: int
    diagnose: Callable[[State, Params, Mapping[str, Any]], str] | None
    saved: int = 0
    flying: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None  # metrics and batch of a step not waited for
    clock: float = 0.0

    def run(self, state: State) -> State:
        now = self.progress
        self.saved = now.batch
        exhausted = self._exhausted()
        if self._due(now.batch) and now.evaluated < now.batch:  # a stop came before or in this evaluation
            exhausted = self._evaluation(state)
        self.clock = time.perf_counter()
        while now.batch < self.steps and not exhausted:
            state = self._advance(state)
            if (signum := self.stop.due()) is not None:
                self._land(state)
                self._save(state)
                raise Interrupted(signum)
            if self.flying is not None:
                continue
            if self._due(now.batch):
                exhausted = self._evaluation(state)
            elif self._due_to_save(now.batch):
                self._save(state)
            self.clock = time.perf_counter()
        self._save(state)
        self._emit("end", rejected=now.rejected, best=now.best, best_step=now.best_batch)
        if self.checkpoint is not None:
            self.checkpoint.wait()
        return state

    def _advance(self, state: State) -> State:
        """Dispatches a step, then counts the one before it; waits for both where this one's state is needed."""
        batch = self._next(state)
        state, metrics = self.step(state, self.frozen, batch)
        self._land(state)
        self.flying = (metrics, batch)
        at = self.progress.batch + 1
        needed = at == self.steps or self._due(at) or self._due_to_save(at)
        if needed or self.progress.in_a_row or self.max_rejected == 1:
            self._land(state)
        return state

    def _land(self, state: State) -> None:
        """Counts the step that was not waited for, if there is one."""
        if self.flying is None:
            return
        (metrics, batch), self.flying = self.flying, None
        metrics, began = jax.device_get(metrics), self.clock
        self.clock = time.perf_counter()
        self.progress.batch += 1
        self._account(metrics, state, batch, self.clock - began)

    def _next(self, state: State) -> Mapping[str, Any]:
        try:
            return next(self.data)
        except StopIteration:
            self._land(state)
            raise ValueError(f"the data ended after {self.progress.batch} of {self.steps} batches; repeat it") from None

    def _due_to_save(self, batch: int) -> bool:
        return bool(self.save_every) and batch - self.saved >= (self.save_every or 0)

    def _due(self, batch: int) -> bool:
        if self.evaluate is None or batch == 0:
            return False
        return batch == self.steps or (bool(self.every) and batch % self.every == 0)

    def _account(self, metrics: Mapping[str, Any], state: State, batch: Mapping[str, Any], seconds: float) -> None:
        """Counts a step: rejected, or into the window of the next log line."""
        now = self.progress
        values = {name: float(value) for name, value in metrics.items() if name != "finite"}
        if metrics["finite"]:
            now.in_a_row = 0
            for name, value in {**values, "steps": 1.0, "seconds": seconds}.items():
                now.window[name] = now.window.get(name, 0.0) + value
        else:
            now.rejected, now.in_a_row = now.rejected + 1, now.in_a_row + 1
            self._emit("rejected", loss=values["loss"], grad_norm=values["grad_norm"], in_a_row=now.in_a_row)
            if now.in_a_row >= self.max_rejected:
                raise DivergenceError(
                    f"loss or gradient was not finite {now.in_a_row} times in a row, up to step {now.batch} (loss "
                    f"{values['loss']}, gradient norm {values['grad_norm']}){self._diagnosis(state, batch)}; lower the "
                    "learning rate or clip"
                )
        if now.window and (now.batch % self.log_every == 0 or now.batch == self.steps):
            count, seconds = now.window.pop("steps"), now.window.pop("seconds")
            per_second = now.window.pop("weight", 0.0) / seconds if seconds > 0 else 0.0
            means = {name: total / count for name, total in now.window.items()}
            now.window = {}
            self._emit("train", **means, per_second=per_second)

    def _diagnosis(self, state: State, batch: Mapping[str, Any]) -> str:
        if self.diagnose is None:
            return ""
        try:
            return f"; state and batch are in {self.diagnose(state, self.frozen, batch)}"
        except Exception as error:  # the divergence is the news, not that it could not be written down
            return f"; state and batch were not saved: {error}"

    def _evaluation(self, state: State) -> bool:
        """Evaluates, keeps the best, saves; true if patience is at an end."""
        now = self.progress
        assert self.evaluate is not None
        try:
            values = {name: float(value) for name, value in self.evaluate(state, self.frozen).items()}
        except Interrupted:
            self._save(state)
            raise
        if self.select.metric not in values:
            raise ValueError(f"no metric {self.select.metric!r} to choose by; the evaluation gives {', '.join(values)}")
        now.evaluated = now.batch
        whole = all(map(math.isfinite, values.values()))  # an accuracy can be finite where every logit is NaN
        improved = whole and self.select.better(values[self.select.metric], now.best)
        if improved:
            now.best, now.best_batch, now.stale = values[self.select.metric], now.batch, 0
        else:
            now.stale += 1
        self._emit("eval", **values, improved=improved)
        self._save(state)
        if improved and self.checkpoint is not None:
            self.checkpoint.protect(now.batch)
        if self._exhausted() and now.batch < self.steps:
            self._emit("stopped_early", stale=now.stale)
        return self._exhausted()

    def _exhausted(self) -> bool:
        return self.select.patience is not None and self.progress.stale >= self.select.patience

    def _save(self, state: State) -> None:
        """Saves, unless this very step was saved: before an evaluation that a stop cut short."""
        if self.checkpoint is not None and self.saved != self.progress.batch:
            self.saved = self.progress.batch
            extra = {"progress": dataclasses.asdict(self.progress), "data": self.data.state()}
            self.checkpoint.save(self.progress.batch, state, self.frozen, extra)
        if self.checkpoint is not None and self.stop.signum is not None:
            self.checkpoint.wait()

    def _emit(self, kind: str, **values: Any) -> None:
        event = {"kind": kind, "step": self.progress.batch, "steps": self.steps, **values}
        for callback in self.callbacks:
            callback(event)
