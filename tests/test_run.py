"""The loop, driven by a step that only counts: the order of events, stopping and resuming, what is kept as the best."""

import copy
import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest

from jaxtransfer.run import DivergenceError, Interrupted, Progress, Selection, Stop, fit


class Data:
    """Batches that are their number."""

    def __init__(self, position=0, end=10**9):
        self.position, self.end = position, end

    def __next__(self):
        if self.position == self.end:
            raise StopIteration
        self.position += 1
        return {"x": np.full(2, self.position)}

    def state(self):
        return {"position": self.position}


class Saver:
    """Remembers what was saved, as JSON would, and in which order things happened."""

    def __init__(self, log=None):
        self.saved, self.best, self.log = {}, None, [] if log is None else log

    def save(self, step, state, frozen, extra=None):
        assert step not in self.saved, "a checkpoint is never written twice"
        self.saved[step] = (copy.deepcopy(state), json.loads(json.dumps(extra)))
        self.log.append(("save", step))

    def protect(self, step):
        assert step in self.saved
        self.best = step
        self.log.append(("protect", step))

    def wait(self):
        self.log.append(("wait",))


def step(state, frozen, batch):
    """Remembers the batches; those that ``frozen`` names are not finite."""
    value = int(batch["x"][0])
    finite = value not in frozen
    new = [*state, value] if finite else state
    loss = 1.0 / value if finite else math.nan
    return new, {"loss": np.float32(loss), "grad_norm": np.float32(value), "weight": np.float32(2), "finite": finite}


class World:
    """Everything that a run of the counting step leaves behind."""

    def __init__(self, scores=(), bad=(), steps=8, **options):
        self.log, self.events, self.stop, self.progress = [], [], Stop(), Progress()
        self.saver, self.data, self.state = Saver(self.log), Data(), []
        self.scores, self.bad = dict(enumerate(scores, 1)), frozenset(bad)
        self.options = {"steps": steps, "every": 4, "log_every": 3, **options}
        self.halt = None  # what to stop in: ("step", 3) or ("evaluate", 4)

    def step(self, state, frozen, batch):
        if self.halt == ("step", int(batch["x"][0])):
            self.stop.signum = signal.SIGTERM
        return step(state, frozen, batch)

    def evaluate(self, state, frozen):
        if self.halt == ("evaluate", self.progress.batch):
            self.stop.signum = signal.SIGTERM
        self.stop.check()
        every = self.options["every"]
        return {
            "accuracy": self.scores.get(self.progress.batch // every if every else 1, 0.0),
            "sum": float(sum(state)),
        }

    def fit(self, **options):
        self.state = fit(
            self.step,
            self.state,
            self.bad,
            self.data,
            evaluate=self.evaluate,
            checkpoint=self.saver,
            callbacks=[self.events.append],
            progress=self.progress,
            stop=self.stop,
            **{**self.options, **options},
        )
        return self

    def resumed(self):
        """The same run in a new process, from its last checkpoint and what the log keeps of its events."""
        last = max(self.saver.saved)
        state, extra = self.saver.saved[last]
        other = World(bad=self.bad, **self.options)
        other.scores, other.saver, other.log = self.scores, self.saver, self.log
        other.state, other.data = copy.deepcopy(state), Data(extra["data"]["position"])
        other.progress.load(extra["progress"])
        kept = {"eval": other.progress.evaluated}
        other.events = [event for event in self.events if event["step"] <= kept.get(event["kind"], last)]
        return other

    def kinds(self, *names):
        return [(event["kind"], event["step"]) for event in self.events if not names or event["kind"] in names]


def without_time(events):
    return [json.dumps({key: value for key, value in event.items() if key != "per_second"}) for event in events]


def comparable(progress):
    record = dataclasses.asdict(progress)
    record["window"].pop("seconds", None)
    return record


def test_the_order_of_events():
    world = World(scores=[0.5, 0.6], log_every=2).fit()
    train = [("train", n) for n in (2, 4, 6, 8)]
    assert world.kinds() == [*train[:2], ("eval", 4), *train[2:], ("eval", 8), ("end", 8)]
    assert world.log == [("save", 4), ("protect", 4), ("save", 8), ("protect", 8), ("wait",)]
    assert world.state == [1, 2, 3, 4, 5, 6, 7, 8]
    assert world.events[0] == {
        "kind": "train", "step": 2, "steps": 8, "loss": 0.75, "grad_norm": 1.5,
        "per_second": world.events[0]["per_second"],
    }  # fmt: skip
    assert world.events[0]["per_second"] > 0
    assert world.events[-1] == {"kind": "end", "step": 8, "steps": 8, "rejected": 0, "best": 0.6, "best_step": 8}


HALTS = [*[("step", n) for n in range(1, 9)], ("evaluate", 4), ("evaluate", 8)]


@pytest.mark.parametrize("second", [None, ("evaluate", 8)], ids=["once", "twice"])
@pytest.mark.parametrize("halt", HALTS, ids=str)
def test_a_run_stopped_anywhere_goes_on_as_if_it_had_not_been(halt, second):
    whole = World(scores=[0.7, 0.4], bad={3, 7}).fit()
    world = World(scores=[0.7, 0.4], bad={3, 7})
    for where in [halt] if second is None else [halt, second]:
        world.halt = where
        with pytest.raises(Interrupted, match="stopped by SIGTERM") as stopped:
            world.fit()
        assert stopped.value.signum == signal.SIGTERM
        assert world.log[-1] == ("wait",)  # on disk before the process ends
        world = world.resumed()
    world.fit()
    assert world.state == whole.state
    assert without_time(world.events) == without_time(whole.events)
    assert comparable(world.progress) == comparable(whole.progress)
    assert world.saver.best == whole.saver.best == 4


def test_saving_every_few_steps_beside_evaluations():
    world = World(scores=[0.5, 0.4], save_every=3).fit()
    assert [entry for entry in world.log if entry[0] == "save"] == [("save", n) for n in (3, 4, 7, 8)]


def test_without_evaluation_the_last_state_is_saved():
    world = World(save_every=5)
    fit(step, [], frozenset(), world.data, steps=8, checkpoint=world.saver, save_every=5, progress=world.progress)
    assert list(world.saver.saved) == [5, 8]
    assert world.progress.best_batch is None


def test_evaluation_at_the_end_only():
    assert World(scores=[0.5], every=None).fit().kinds("eval") == [("eval", 8)]


def test_early_stopping_counts_evaluations_without_a_better_value():
    world = World(scores=[0.5, 0.7, 0.6, 0.7, 0.9], steps=20, select=Selection(patience=2)).fit()
    assert world.kinds("eval", "stopped_early", "end") == [
        ("eval", 4), ("eval", 8), ("eval", 12), ("eval", 16), ("stopped_early", 16), ("end", 16),
    ]  # fmt: skip
    assert (world.progress.best, world.progress.best_batch, world.saver.best) == (0.7, 8, 8)
    again = world.resumed()
    before = len(again.events)
    again.fit()
    assert [event["kind"] for event in again.events[before:]] == ["end"]
    assert again.state == world.state


def test_a_loss_is_minimized():
    select = Selection("sum", minimize=True)
    assert World(scores=[0, 0], select=select).fit().saver.best == 4
    assert World(scores=[0, 0], select=Selection("sum")).fit().saver.best == 8


@pytest.mark.parametrize("scores", [[math.nan, 0.1], [math.inf, 0.1], [-math.inf, 0.1]])
def test_what_is_no_number_is_never_the_best(scores):
    world = World(scores=scores).fit()
    assert (world.progress.best, world.saver.best) == (0.1, 8)
    world = World(scores=[0.1, scores[0]]).fit()
    assert (world.progress.best, world.saver.best, world.progress.stale) == (0.1, 4, 1)


def test_an_evaluation_with_any_number_that_is_none_is_never_the_best():
    world = World(scores=[0.9, 0.1])
    world.evaluate = lambda state, frozen: {"accuracy": 0.5, "loss": math.nan if len(state) == 4 else 1.0}
    assert (world.fit().progress.best_batch, world.saver.best) == (8, 8)


def test_a_metric_that_the_evaluation_lacks_is_named():
    with pytest.raises(ValueError, match="no metric 'f1' to choose by; the evaluation gives accuracy, sum"):
        World(select=Selection("f1")).fit()


def test_rejected_steps_are_counted_and_left_out_of_the_means():
    world = World(bad={2, 3, 5}).fit()
    rejected = [event for event in world.events if event["kind"] == "rejected"]
    assert [(event["step"], event["in_a_row"]) for event in rejected] == [(2, 1), (3, 2), (5, 1)]
    assert (world.progress.rejected, world.progress.in_a_row) == (3, 0)
    first = next(event for event in world.events if event["kind"] == "train")
    assert (first["step"], first["loss"]) == (3, 1.0)  # of batch 1 alone


def test_a_window_of_rejected_steps_alone_says_nothing():
    assert World(bad={1, 2, 3}).fit().kinds("train") == [("train", 6), ("train", 8)]


def test_too_many_in_a_row_end_the_run():
    given = []

    def diagnose(state, frozen, batch):
        given.append((list(state), batch["x"].tolist()))
        return "the/folder"

    world = World(bad={2, 4, 5, 6}, scores=[0.5], max_rejected=3, diagnose=diagnose)
    with pytest.raises(DivergenceError, match=r"3 times in a row, up to step 6 .* are in the/folder; lower"):
        world.fit()
    assert given == [([1, 3], [6, 6])]
    assert list(world.saver.saved) == [4]
    assert world.kinds("rejected") == [("rejected", n) for n in (2, 4, 5, 6)]


def test_a_diagnosis_that_fails_does_not_hide_the_divergence():
    def diagnose(*_):
        raise OSError("the disk is full")

    with pytest.raises(DivergenceError, match="were not saved: the disk is full; lower"):
        World(bad={1}, max_rejected=1, diagnose=diagnose).fit()


def test_data_that_ends_too_early_is_said():
    world = World()
    world.data = Data(end=5)
    with pytest.raises(ValueError, match="the data ended after 5 of 8 batches"):
        world.fit()


def test_a_failed_save_ends_the_run_at_once():
    world = World(scores=[0.5])
    world.saver.save = lambda *_: (_ for _ in ()).throw(OSError("full"))
    with pytest.raises(OSError, match="full"):
        world.fit()
    assert world.progress.batch == 4


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_a_second_leaves_and_a_third_would_kill(signum):
    before = signal.getsignal(signum)
    with Stop() as stop:
        stop.check()
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        with pytest.raises(Interrupted) as asked:
            stop.check()
        assert asked.value.signum == signum
        with pytest.raises(SystemExit) as forced:
            os.kill(os.getpid(), signum)
        assert forced.value.code == 128 + signum
        assert signal.getsignal(signum) == signal.SIG_DFL
    assert signal.getsignal(signum) == before


def test_progress_is_whole_in_json():
    progress = Progress(3, 1, 0, 0.5, 2, 1, 2, {"loss": 0.1, "seconds": 0.2, "steps": 1.0})
    other = Progress()
    other.load(json.loads(json.dumps(dataclasses.asdict(progress))))
    assert other == progress
    with pytest.raises(KeyError):
        other.load({"batch": 1})


class Metric:
    """A number on a device: that it is read, which waits for its step, is written down."""

    def __init__(self, log, at, value):
        self.log, self.at, self.value = log, at, value

    def __array__(self, dtype=None, copy=None):
        if self.log is not None:
            self.log.append(("read", self.at))
        return np.asarray(self.value, dtype)


def test_a_step_is_waited_for_once_the_next_is_dispatched_or_its_state_is_needed():
    log = []

    def dispatched(state, frozen, batch):
        at = int(batch["x"][0])
        log.append(("step", at))
        state, metrics = step(state, frozen, batch)
        return state, {name: Metric(log if name == "loss" else None, at, x) for name, x in metrics.items()}

    world = World(scores=[0.5, 0.6], bad={6}, every=4, save_every=2)
    world.step = dispatched
    world.fit()
    assert log == [
        ("step", 1), ("step", 2), ("read", 1), ("read", 2),  # to save
        ("step", 3), ("step", 4), ("read", 3), ("read", 4),  # to evaluate
        ("step", 5), ("step", 6), ("read", 5), ("read", 6),
        ("step", 7), ("read", 7),  # as the sixth was rejected
        ("step", 8), ("read", 8),
    ]  # fmt: skip
    log.clear()
    fit(dispatched, [], frozenset(), Data(), steps=4, log_every=1)
    assert log == [
        ("step", 1), ("step", 2), ("read", 1), ("step", 3), ("read", 2), ("step", 4), ("read", 3), ("read", 4),
    ]  # fmt: skip
    log.clear()
    with pytest.raises(DivergenceError):
        fit(dispatched, [], {3}, Data(), steps=4, max_rejected=1)
    assert log == [(what, n) for n in range(1, 4) for what in ("step", "read")]
