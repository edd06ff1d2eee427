"""Stopped after any step, between any two batches of an evaluation, and resumed: bit for bit the undisturbed run."""

import dataclasses
import signal

import jax
import numpy as np
import pytest

from jaxtransfer import checkpoint
from jaxtransfer.job import commands, events
from jaxtransfer.job.prepare import prepare
from jaxtransfer.run import Interrupted, Stop
from jaxtransfer.tree import flatten
from tests.job.world import World, console, lines

STEPS = 8
EVALUATIONS = 8  # batches: twice 2 of validation, then of the best state 2 of it and 3 of test, less the last


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two epochs of four steps of two microbatches, with dropout and two optimizers; compiled once for all tests."""
    root = tmp_path_factory.mktemp("resume")
    changes = {"run__accumulate": 2, "optimizer__groups": {"head": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}}
    adapt = {"train": "rules", "rules": [["head/.*", "head"], ["embed/.*", "frozen"], [".*", "trunk"]]}
    return prepare(World(root).config(root / "out", adapt=adapt, **changes), lambda text: None)


def halting(job, stop, what, count):
    """The same job, in which a signal comes during the ``count``-th call of its step or its evaluation."""
    fn, calls = getattr(job, what), []

    def call(*args):
        calls.append(1)
        if len(calls) == count:
            stop.signum = signal.SIGTERM
        return fn(*args)

    return dataclasses.replace(job, **{what: call})


def go(job, out, what=None, count=0):
    """One process's share of a run: what it leaves, or the signal that ended it."""
    stop = Stop()
    with events.Screen(console()) as screen:
        return commands._main_run(halting(job, stop, what, count) if what else job, out, stop, screen)


@pytest.fixture(scope="module")
def like(job):
    return job.start(0)


def left(job, like, out, result):
    """All that a finished run leaves, by name; arrays as bytes."""
    source, found, progress = result
    last = out / "checkpoints" / str(STEPS)
    state, frozen, extra = checkpoint.restore(last, like=like, lineage=job.trunk.lineage)
    arrays = {"key": jax.random.key_data(state.key), "params": state.params, "opt_state": state.opt_state}
    arrays |= {"step": state.step, "frozen": frozen, "best": source.params, "found": found}
    return {
        "arrays": {path: (x.dtype, x.shape, np.asarray(x).tobytes()) for path, x in flatten(arrays).items()},
        "progress": dataclasses.asdict(progress),
        "data": extra["data"],
        "lines": lines(out),
        "operations": source.lineage.operations,
    }


@pytest.fixture(scope="module")
def whole(job, like, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return left(job, like, out, go(job, out))


def test_the_undisturbed_run_is_one(job, whole, like):
    assert [line["step"] for line in whole["lines"] if line["kind"] == "train"] == [3, 6, 8]
    assert [line["step"] for line in whole["lines"] if line["kind"] == "eval"] == [4, 8]
    assert whole["data"]["position"] == STEPS
    start = {path: np.asarray(x).tobytes() for path, x in flatten({"params": like[0].params}).items()}
    assert all(whole["arrays"][path][2] != start[path] for path in start if "key/bias" not in path)
    assert sum(path.startswith("opt_state") for path in whole["arrays"]) > len(start)
    trunk = {path: np.asarray(x).tobytes() for path, x in flatten(job.trunk.params).items()}
    trunk = {path: data for path, data in trunk.items() if path.startswith("embed/")}
    assert trunk == {path: whole["arrays"][f"frozen/{path}"][2] for path in trunk}
    assert trunk == {path: whole["arrays"][f"best/{path}"][2] for path in trunk}


@pytest.mark.parametrize(
    ("what", "count"),
    [*(("step", n) for n in range(1, STEPS + 1)), *(("evaluate", n) for n in range(1, EVALUATIONS + 1))],
)
def test_resumed_is_undisturbed(what, count, job, like, whole, tmp_path):
    with pytest.raises(Interrupted) as stopped:
        go(job, tmp_path, what, count)
    assert stopped.value.signum == signal.SIGTERM
    assert left(job, like, tmp_path, go(job, tmp_path)) == whole


def test_a_best_step_that_is_damaged_is_set_aside_and_the_run_goes_on(job, like, tmp_path):
    with pytest.raises(Interrupted):
        go(job, tmp_path, "step", 6)
    largest = max((tmp_path / "checkpoints" / "4").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    screen = console()
    with events.Screen(screen) as shown:
        _, _, progress = commands._main_run(job, tmp_path, Stop(), shown)
    assert progress.batch == progress.best_batch == STEPS and (tmp_path / "checkpoints" / "4.damaged").is_dir()
    assert "the best step is lost" in screen.file.getvalue() and str(largest.name) in screen.file.getvalue()


def test_stopped_again_and_again_is_undisturbed(job, like, whole, tmp_path):
    halts = [("step", 2), ("evaluate", 1), ("evaluate", 1), ("step", 3), ("evaluate", 1), ("evaluate", 4)]
    for what, count in halts:
        with pytest.raises(Interrupted):
            go(job, tmp_path, what, count)
    assert left(job, like, tmp_path, go(job, tmp_path)) == whole
