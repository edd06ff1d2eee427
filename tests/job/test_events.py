"""What a run tells: lines in a file that no resumption doubles, lines or a bar on a console, TensorBoard."""

import json
import math
import sys

import pytest

from jaxtransfer.config import ConfigError
from jaxtransfer.job import events
from jaxtransfer.run import Progress
from tests.job.world import console, lines


def event(kind, step, **values):
    return {"kind": kind, "step": step, "steps": 8, **values}


STORY = [event("train", 3, loss=0.5), event("eval", 4, accuracy=0.5), event("rejected", 5), event("train", 6, loss=0.4),
         event("eval", 8, accuracy=0.6), event("stopped_early", 8), event("end", 8)]  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "evaluated", "kept"),
    [(0, 0, 0), (3, 0, 1), (4, 0, 1), (4, 4, 2), (5, 4, 3), (6, 4, 4), (8, 4, 4), (8, 8, 6)],
)
def test_lines_that_will_be_written_again_are_removed(tmp_path, batch, evaluated, kept):
    write = events.jsonl(tmp_path / "metrics.jsonl", Progress())
    for item in STORY:
        write(item)
    events.jsonl(tmp_path / "metrics.jsonl", Progress(batch=batch, evaluated=evaluated))(event("end", 8))
    assert lines(tmp_path) == [*STORY[:kept], event("end", 8)]


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write = events.jsonl(path, Progress())
    write(event("train", 3, loss=0.5))
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [line["step"] for line in events.lines(path)] == [3]
    events.jsonl(path, Progress(batch=8))(event("end", 8))
    assert lines(tmp_path) == [event("train", 3, loss=0.5), event("end", 8)]


def test_what_is_no_number_is_null(tmp_path):
    events.jsonl(tmp_path / "metrics.jsonl", Progress())(event("rejected", 1, loss=math.nan, grad_norm=math.inf))
    assert lines(tmp_path) == [event("rejected", 1, loss=None, grad_norm=None)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["time"] > 1e9


def test_lines_on_a_plain_console_with_the_time_that_is_left(monkeypatch):
    clock = iter([100.0, 104.0, 112.0])
    monkeypatch.setattr(events.time, "perf_counter", lambda: next(clock))
    screen = console()
    with events.Screen(screen) as shown:
        tell = shown.titled("transfer, seed 0", 8, done=2)
        tell(event("train", 4, loss=0.5, per_second=20.0))
        tell(event("eval", 4, accuracy=0.5, improved=True))
        tell(event("train", 6, loss=0.25, per_second=20.0))
        tell(event("end", 8, rejected=0))
    assert screen.file.getvalue().splitlines() == [
        "transfer, seed 0  step 4/8  train  loss 0.5  per_second 20  8 s left",
        "transfer, seed 0  step 4/8  eval  accuracy 0.5  best so far",
        "transfer, seed 0  step 6/8  train  loss 0.25  per_second 20  6 s left",
    ]


def test_a_bar_at_a_terminal():
    screen = console(terminal=True)
    with events.Screen(screen) as shown:
        for seed in range(2):
            tell = shown.titled(f"transfer, seed {seed}", 8, done=seed)
            tell(event("train", 4, loss=0.5, per_second=20.0))
            tell(event("eval", 4, accuracy=0.5, improved=False))
            tell(event("rejected", 5, loss=math.nan, grad_norm=math.inf, in_a_row=1))
            tell(event("stopped_early", 6, stale=2))
            tell(event("end", 6, rejected=1))
        shown.say("[red]a line[/red]")
        assert [task.completed for task in shown._bar.tasks] == [6, 6]
    said = screen.file.getvalue()
    for part in (
        "transfer, seed 1",
        "6/8",
        "loss 0.500  20/s",
        "eval  accuracy 0.5",
        "rejected",
        "stopped early",
        "[red]",
    ):
        assert part in said, part
    assert said.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_the_bar_is_taken_down_when_the_run_fails():
    screen = console(terminal=True)
    with pytest.raises(RuntimeError), events.Screen(screen):
        raise RuntimeError
    assert screen.file.getvalue().rstrip().endswith("\x1b[?25h")


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with events.tensorboard(tmp_path, after=0) as write:
        for item in STORY:
            write(item)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    assert all(tag in data for tag in (b"train/loss", b"eval/accuracy"))


def test_tensorboard_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    says = r"run.tensorboard: needs the extra: pip install 'jaxtransfer\[tensorboard\]'"
    with pytest.raises(ConfigError, match=says), events.tensorboard(tmp_path, after=0):
        pass
