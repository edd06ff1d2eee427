"""Two real processes of four devices each are one of eight: the same losses, whatever dies and wherever it goes on."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from jaxtransfer import checkpoint
from jaxtransfer.job import commands
from jaxtransfer.source import load
from jaxtransfer.tree import flatten
from tests import processes
from tests.job.world import World, console, lines

MESH = {"data": 2, "fsdp": 4}
STEPS, EVERY = 20, 2

AGREEING = """
import sys, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtransfer import parallel
parallel.join()
from jaxtransfer.parallel import distributed, make_mesh, put
from jaxtransfer.parallel.agreement import Agreement
from jaxtransfer.step import shard_batch

own = jax.process_index()

def refused(work):
    try:
        work()
    except distributed.ProcessError as error:
        return str(error)
    raise AssertionError("not refused")

assert distributed.gathered("names", f"I am {own}") == ["I am 0", "I am 1"]
assert distributed.gathered("names", "") == ["", ""]  # again, and empty
assert distributed.by_first("work", lambda: [own, "done"]) == [0, "done"]

def fail():
    raise ProcessError("the folder is full") if own else ValueError("the folder is full")

try:
    distributed.by_first("work", fail, error=KeyError)
except (KeyError, ValueError) as error:
    assert isinstance(error, ValueError if own == 0 else KeyError) and "the folder is full" in str(error)

try:
    with distributed.together("block", error=KeyError):
        if own:
            raise ValueError("no room")
except (KeyError, ValueError) as error:
    assert str(error) == ("no room" if own else "'process 1: no room'")

if own == 0:
    message = refused(lambda: distributed.gathered("late", "", timeout=1))
    assert message.startswith("late: process 1 of 2 did not come within 1 s; see its output"), message
    distributed.gathered("meet", "")
else:
    distributed.gathered("meet", "")
    message = refused(lambda: distributed.by_first("never", lambda: 1, timeout=1))
    assert message.startswith("never: process 0 was not done within 1 s"), message

mesh = make_mesh(data=2, fsdp=4)
total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))
ones = put(np.ones(8, np.float32), NamedSharding(mesh, P(("data", "fsdp"))))
agreed = Agreement("stop")
stopped = None
for call in range(30):
    signum = agreed(15 if own == 1 and call >= 4 else None)
    if signum is not None and stopped is None:
        stopped = (call, signum)
    float(total(ones))
    time.sleep(0.01 * own)
assert stopped is not None and distributed.gathered("stopped", str(stopped)) == [str(stopped)] * 2

traced = []

def slow(x):
    traced.append(own)
    time.sleep(2 * own)
    return x.sum()

began = time.monotonic()
step = distributed.in_step("slow", jax.jit(slow))
assert float(step(ones)) == float(step(ones)) == 8 and time.monotonic() - began > 1.9 and traced == [own]

def broken(x):
    return x.reshape(3) if own else x.sum()

try:
    distributed.in_step("broken", jax.jit(broken))(ones)
    raise AssertionError("a program that one cannot compile is run")
except (TypeError, distributed.ProcessError) as error:
    assert own or "process 1: cannot reshape" in str(error)

for axes, expected in [
    ({"data": 8}, (own, 2)), ({"data": 2, "tensor": 4}, (own, 2)), ({"tensor": 8}, (0, 1)),
    ({"fsdp": 4, "tensor": 2}, (own, 2)), ({"data": 2, "fsdp": 4}, (own, 2)),
]:
    mesh = make_mesh(**axes)
    index, count = distributed.share(mesh)
    assert (index, count) == expected, (axes, index, count)
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    mine = rows[index * 8 // count : (index + 1) * 8 // count]
    whole = shard_batch({"x": mine}, mesh)["x"]
    assert whole.shape == rows.shape
    for shard in whole.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), rows[shard.index])
assert "a mesh is needed over the 8 devices of 2 processes" in refused(lambda: distributed.share(None))
scattered = [jax.devices()[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
assert "gives process" in refused(lambda: distributed.share(make_mesh(data=8, devices=scattered)))
assert "has no device in the mesh" in refused(
    lambda: distributed.share(make_mesh(data=4, devices=jax.devices()[4 * (1 - own) :][:4]))
)

key = put(jax.random.key(7), NamedSharding(mesh, P()))
found = distributed.collected({"ones": ones, "mine": np.arange(2)})
if own == 0:
    np.testing.assert_array_equal(found["ones"], np.ones(8))
    np.testing.assert_array_equal(jax.random.key_data(key).addressable_data(0), jax.random.key_data(jax.random.key(7)))
else:
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in found.values())
print("all agree", own)
"""


def test_processes_agree_and_a_barrier_names_the_one_that_does_not_come(tmp_path):
    (tmp_path / "program.py").write_text(AGREEING)
    outputs = processes.run(tmp_path / "program.py")
    assert ["all agree 0" in outputs[0], "all agree 1" in outputs[1]] == [True, True]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def config_of(world, out, **changes):
    run = {"steps": STEPS, "checkpoint_every": EVERY, "evaluate_every": STEPS // 2, "log_every": 1}
    return world.config(out, **{"run": run, "data__batch": 8, "mesh": MESH, **changes})


@pytest.fixture(scope="module")
def recipe(world):
    """The file of the configuration; `--out` is given to every launch."""
    raw = {**world.raw, "mesh": MESH}
    raw["data"] = {**raw["data"], "batch": 8}
    raw["run"] = {"steps": STEPS, "checkpoint_every": EVERY, "evaluate_every": STEPS // 2, "log_every": 1}
    path = world.root / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def undisturbed(world):
    """The run in one process on one device."""
    out = world.root / "undisturbed"
    commands.run(config_of(world, out, mesh={}), console=console())
    return out


def launched(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "jaxtransfer", "launch", "--processes", "2", "--devices-per-process", "4"]
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=processes.environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def wait_for(condition, process, seconds: float = 120) -> None:
    began = time.monotonic()
    while not condition():
        assert process.poll() is None and time.monotonic() - began < seconds, process.communicate(timeout=60)
        time.sleep(0.01)


def child(parent: "subprocess.Popen[str]", index: int) -> psutil.Process:
    """The process of that number."""
    found = psutil.Process(parent.pid).children()
    return next(each for each in found if each.environ().get("JAXTRANSFER_PROCESS") == str(index))


@pytest.fixture(scope="module")
def killed(world, recipe):
    """The folder of a run of two processes of which one was killed after a checkpoint, and what the parent said."""
    out = world.root / "killed"
    parent = launched(recipe, "--out", out)
    wait_for(lambda: checkpoint.latest(out / "checkpoints") is not None, parent)
    child(parent, 1).send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, errors = parent.communicate(timeout=120)
    return out, parent.returncode, errors, time.monotonic() - began


def test_the_launcher_names_the_process_that_was_killed_and_stops_the_other(killed):
    out, code, errors, seconds = killed
    last = [line for line in errors.splitlines() if line.startswith("jaxtransfer: error: ")]
    assert code == 6 and len(last) == 1, errors[-3000:]
    assert last[0].startswith("jaxtransfer: error: process 1 of 2 was killed by SIGKILL, and the others were stopped")
    assert seconds < 120
    assert not (out / "result.json").exists() and checkpoint.latest(out / "checkpoints") < STEPS


def assert_same_run(found: Path, expected: Path) -> None:
    """The same events with the same numbers, the same exported weights."""
    for ours, theirs in zip(lines(found), lines(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            same = pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value
            assert ours[name] == same, (theirs["step"], name, ours[name], value)
    assert json.loads((found / "result.json").read_text())["metrics"].keys() >= {"test", "validation"}
    ours, theirs = (flatten(load(folder / "model").params) for folder in (found, expected))
    for path, leaf in theirs.items():
        if path.endswith("key/bias"):  # without a gradient, but for rounding, of which Adam makes steps
            continue
        np.testing.assert_allclose(np.asarray(ours[path]), np.asarray(leaf), rtol=1e-3, atol=1e-5, err_msg=path)


def copied(killed, to: Path) -> Path:
    shutil.copytree(killed[0], to)
    (to / "run.lock").unlink(missing_ok=True)
    return to


@pytest.mark.slow
def test_two_processes_go_on_and_finish_as_one_would_have(killed, undisturbed, recipe, tmp_path):
    out = copied(killed, tmp_path / "two")
    parent = launched(recipe, "--out", out)
    said, errors = parent.communicate(timeout=400)
    assert parent.returncode == 0, errors[-3000:]
    assert "[0] resumed at step" in said and "[1]" not in said
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize("mesh", [{"fsdp": 2}, pytest.param(MESH, marks=pytest.mark.slow)], ids=["two", "eight"])
def test_one_process_goes_on_where_two_stopped(mesh, killed, undisturbed, world, devices, tmp_path):
    out = copied(killed, tmp_path / "one")
    commands.run(config_of(world, out, mesh=mesh), console=console())
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_at_one_step(recipe, undisturbed, tmp_path):
    out = tmp_path / "run"
    parent = launched(recipe, "--out", out)
    wait_for(lambda: checkpoint.latest(out / "checkpoints") is not None, parent)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=120)
    assert parent.returncode == 130, errors[-3000:]
    assert "the state is saved" in errors.splitlines()[-1]
    parent = launched(recipe, "--out", out)
    _, errors = parent.communicate(timeout=400)
    assert parent.returncode == 0, errors[-3000:]
    assert_same_run(out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_survivor_ends_by_itself_within_two_minutes(victim, recipe, tmp_path):
    """Where no parent watches, as on a cluster."""
    program = tmp_path / "one.py"
    program.write_text("import sys\nfrom jaxtransfer.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    out = tmp_path / "run"
    started = processes.start(program, "launch", recipe, "--out", out)
    try:
        wait_for(lambda: checkpoint.latest(out / "checkpoints") is not None, started[0])
        started[victim].kill()
        assert started[1 - victim].wait(120) not in (0, None)
    finally:
        processes.finish(started)


@pytest.mark.slow
def test_a_study_and_adapters_run_in_two_processes(recipe, tmp_path):
    out = tmp_path / "run"
    options = ["--study", "{seeds: [0, 1]}", "--run.steps", "8", "--run.evaluate_every", "4"]
    options += ["--adapt", "{train: adapters, adapters: [{method: lora, targets: '.*/(query|value)/kernel', rank: 2}]}"]
    parent = launched(recipe, "--out", out, *options)
    _, errors = parent.communicate(timeout=400)
    assert parent.returncode == 0, errors[-3000:]
    assert len(json.loads((out / "result.json").read_text())["study"]["transfer"]) == 2


@pytest.mark.slow
def test_phases_run_in_two_processes(world, recipe, tmp_path):
    phases = [{"adapt": {"train": "head"}, "run": {"steps": 4}}]
    changes = {"run": {"steps": 6, "checkpoint_every": 2, "evaluate_every": 3, "log_every": 1}, "phases": phases}
    options = ["--phases", json.dumps(phases), "--run.steps", "6", "--run.evaluate_every", "3"]
    parent = launched(recipe, "--out", tmp_path / "two", *options)
    _, errors = parent.communicate(timeout=400)
    assert parent.returncode == 0, errors[-3000:]
    commands.run(config_of(world, tmp_path / "one", mesh={}, **changes), console=console())
    for part in ("phase-1", "."):
        runs = (tmp_path / "one" / part, tmp_path / "two" / part)
        one, two = ([line["loss"] for line in lines(run) if line["kind"] == "train"] for run in runs)
        assert len(one) == len(two) > 0
        np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.slow
def test_each_of_two_processes_holds_its_own_part_of_a_model_in_memory_and_no_more():
    """The benchmark with a model of 200 MB; of 2 GB it is the benchmark's own default."""
    command = [sys.executable, str(processes.ROOT / "benchmarks" / "load.py"), "--processes", "2", "--layers", "4"]
    done = subprocess.run(command, env=processes.environment(1), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("met)") == 4 and "MISSED" not in done.stdout, done.stdout
