"""A run's checkpoints: in the background, retained by number, nothing lost to a fault, a full disk or a kill."""

import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import checkpoint
from jaxtransfer.checkpoint import Checkpointer, CheckpointError, DamagedError, arrays, manifest, store
from jaxtransfer.types import Lineage, State
from tests.checkpoint.states import assert_same, files, make, mesh_of, placed

LINEAGE = Lineage("memory", "d")


def tiny(step: int, size: int = 6) -> State:
    params = {"w": jnp.full(size, step, jnp.float32)}
    return State(jnp.int32(step), params, {}, (), jax.random.key(step), {})


@pytest.mark.parametrize("spread", [False, True], ids=["one device", "eight"])
def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path, devices, spread):
    state, frozen, lineage = make()
    if spread:
        state, frozen = placed((state, frozen), mesh_of(devices))
    expected = jax.tree.map(lambda x: jnp.array(x, copy=True), state)

    @lambda f: jax.jit(f, donate_argnums=0)
    def spoil(x):
        return jax.tree.map(lambda leaf: leaf if leaf is x.key else leaf * 0 - leaf, x)

    with Checkpointer(tmp_path, lineage=lineage) as saver:
        saver.save(3, state, frozen, {"position": 1})
        donated = jax.tree.leaves((state.params, state.opt_state))
        for _ in range(5):
            state = spoil(state)
        assert all(leaf.is_deleted() for leaf in donated)
        jax.block_until_ready(state)
        found, _, extra = saver.restore_latest((expected, frozen))
    assert_same(found, expected)
    assert extra == {"position": 1}


def test_the_writer_holds_no_view_that_prevents_donation(tmp_path):
    @lambda f: jax.jit(f, donate_argnums=0)
    def add_one(x):
        return x + 1.0

    array = add_one(add_one(jnp.zeros(8_000_000)))  # compiled; large enough to be still under way below
    wait = arrays.write_async(tmp_path / "arrays", {"w": array})
    add_one(array)
    assert array.is_deleted()
    wait()
    found = arrays.read(tmp_path / "arrays", {"w": jax.ShapeDtypeStruct(array.shape, array.dtype)})["w"]
    assert np.all(found == 2.0)


def test_saving_runs_in_the_background(tmp_path, monkeypatch):
    gate, seal = threading.Event(), manifest.seal
    monkeypatch.setattr(manifest, "seal", lambda *args: gate.wait(60) and seal(*args))
    with Checkpointer(tmp_path, lineage=LINEAGE) as saver:
        saver.save(1, tiny(1), {})
        assert checkpoint.steps(tmp_path) == []
        saver.protect(1)  # the step under way, without waiting for it
        gate.set()
        saver.wait()
        assert checkpoint.steps(tmp_path) == [1]


def test_the_last_and_the_best_stay_in_numeric_order(tmp_path):
    (tmp_path / "notes").mkdir()
    with Checkpointer(tmp_path, lineage=LINEAGE, keep=2) as saver:
        for step in (8, 9, 10, 11):
            saver.save(step, tiny(step), {})
            if step == 9:
                saver.protect(9)
        saver.wait()
        assert checkpoint.steps(tmp_path) == [9, 10, 11]
        saver.protect(11)
        saver.save(100, tiny(100), {})
        saver.wait()
        assert checkpoint.steps(tmp_path) == [11, 100]
        with pytest.raises(CheckpointError, match=r"no step 9 to protect, only .11, 100."):
            saver.protect(9)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["100", "11", "notes"]
    with Checkpointer(tmp_path, lineage=LINEAGE, keep=1, best=11, async_=False) as saver:
        saver.save(101, tiny(101), {})
        assert checkpoint.steps(tmp_path) == [11, 101]
    with pytest.raises(CheckpointError, match="keep=0"):
        Checkpointer(tmp_path, lineage=LINEAGE, keep=0)


@pytest.mark.parametrize("step", [-1, 3.0, True, "4", np.int64(4), None])
def test_a_step_is_a_whole_number(tmp_path, step):
    with Checkpointer(tmp_path, lineage=LINEAGE) as saver:
        with pytest.raises(CheckpointError, match="a step is an int of 0 or more, got "):
            saver.save(step, tiny(1), {})
        assert list(tmp_path.iterdir()) == []


def test_a_step_comes_after_the_last(tmp_path):
    with Checkpointer(tmp_path, lineage=LINEAGE, keep=1) as saver:
        saver.save(5, tiny(5), {})
        for step in (2, 5):
            with pytest.raises(CheckpointError, match=f"step {step} is not above 5, the last one here; go on"):
                saver.save(step, tiny(step), {})
        saver.save(6, tiny(6), {})
    assert checkpoint.steps(tmp_path) == [6]


@pytest.mark.parametrize("marked", [False, True], ids=["no mark of ours", "no manifest"])
def test_what_is_no_checkpoint_makes_way(tmp_path, marked):
    with Checkpointer(tmp_path, lineage=LINEAGE) as saver:
        for step in (1, 2):
            saver.save(step, tiny(step), {})
        saver.wait()
        for name in ("manifest.json", *(() if marked else ("meta.json.gz",))):
            (tmp_path / "2" / name).unlink()
        (tmp_path / "3").mkdir()
        (tmp_path / "4").symlink_to("nowhere")
        with pytest.warns(UserWarning, match=r"/2: was no whole checkpoint \(now 2\.damaged\)") as caught:
            saver.save(2, tiny(2), {})
        assert len(caught) == 1
        saver.save(3, tiny(3), {})
        with pytest.warns(UserWarning, match=r"/4: .*now 4\.damaged"):
            saver.save(4, tiny(4), {})
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.damaged", "3", "4", "4.damaged"]


def test_nothing_is_deleted_unless_the_newest_is_whole(tmp_path, monkeypatch):
    publish = manifest.Draft.publish

    def spoiled(draft):
        publish(draft)
        path = max(files(draft.path / "arrays"), key=lambda file: file.stat().st_size)
        path.write_bytes(bytes(path.stat().st_size))

    with Checkpointer(tmp_path, lineage=LINEAGE, keep=1) as saver:
        saver.save(1, tiny(1), {})
        saver.wait()
        monkeypatch.setattr(manifest.Draft, "publish", spoiled)
        saver.save(2, tiny(2), {})
        with pytest.raises(DamagedError, match=r"2/arrays/.*damaged"):
            saver.wait()
        monkeypatch.undo()
        checkpoint.verify(tmp_path / "1")
        with pytest.warns(UserWarning, match="went back to step 1"):
            assert_same(saver.restore_latest(tiny(0))[0], tiny(1))


@pytest.mark.parametrize("async_", [True, False], ids=["async", "sync"])
def test_a_failed_write_is_one_line_and_leaves_the_rest(tmp_path, monkeypatch, async_):
    def full(*_):
        raise OSError(28, "Failed writing: " * 40 + "No space left on device")  # as TensorStore tells it, reason last

    saver = Checkpointer(tmp_path, lineage=LINEAGE, async_=async_)
    saver.save(1, tiny(1), {})
    saver.wait()
    monkeypatch.setattr(manifest, "seal", full)
    with pytest.raises(CheckpointError, match=r"/2: was not saved \(.*No space left on device\)") as caught:
        saver.save(2, tiny(2), {})
        saver.save(3, tiny(3), {})  # async: the error of 2 comes with the next call, and 3 is not begun
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(tmp_path))
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]
    saver.save(2, tiny(2), {})
    saver.close()
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    need = int(1.2 * store.snapshot(tiny(1, 1000), {}, LINEAGE, None).nbytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, need - 1))
    with Checkpointer(tmp_path, lineage=LINEAGE) as saver:
        with pytest.raises(CheckpointError, match=f"{need - 1:,} bytes free, a checkpoint takes {need:,}"):
            saver.save(1, tiny(1, 1000), {})
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, need))
        saver.save(1, tiny(1, 1000), {})


@pytest.mark.parametrize("async_", [True, False], ids=["async", "sync"])
def test_a_file_that_cannot_be_written_is_one_line_and_no_noise(tmp_path, capfd, caplog, async_):
    """The operating system's own limit on the size of a file stands for a disk that fills up while it is written."""
    with Checkpointer(tmp_path, lineage=LINEAGE, async_=async_) as saver:
        saver.save(1, tiny(1), {})
        saver.wait()
        big, before = tiny(2, 500_000), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(CheckpointError, match=r"/2: was not saved \(.*File too large") as caught:
                saver.save(2, big, {})
                saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "\n" not in str(caught.value)
        assert [entry.name for entry in tmp_path.iterdir()] == ["1"]
        saver.save(2, big, {})
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert capfd.readouterr() == ("", "") and caplog.records == []
    logging.getLogger("absl").warning("others are heard again")
    assert len(caplog.records) == 1


def test_what_dead_writers_left_is_removed_and_what_lives_is_not(tmp_path):
    (tmp_path / ".7.tmp-0123456789ab" / "arrays").mkdir(parents=True)
    (tmp_path / ".5.trash-0123456789ab").mkdir()
    for name in (".cache", ".hidden.tmp-short", "7.tmp-0123456789ab"):
        (tmp_path / name).mkdir()
    draft = manifest.Draft(tmp_path / "8")
    Checkpointer(tmp_path, lineage=LINEAGE).close()
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {".cache", ".hidden.tmp-short", "7.tmp-0123456789ab", draft.folder.name}
    draft.abandon()


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/in: cannot hold checkpoints: Not a directory"):
        Checkpointer(tmp_path / "file" / "in", lineage=LINEAGE)
    with pytest.raises(CheckpointError, match=r"file/1: cannot be made: Not a directory"):
        checkpoint.save(tmp_path / "file" / "1", tiny(1), {}, LINEAGE)


def test_nothing_to_restore(tmp_path):
    with Checkpointer(tmp_path / "new", lineage=LINEAGE) as saver:
        assert saver.restore_latest(tiny(0)) is None


def test_every_file_and_folder_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")))), fsync(fd))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (rename(a, b), events.append(("rename", Path(b)))))
    path = checkpoint.save(tmp_path / "1", tiny(1), {}, LINEAGE)
    at = events.index(("rename", path))
    flushed = [str(event[1]).split(".tmp-")[-1].split("/", 1)[-1] for event in events[:at]]
    for file in [*files(path / "arrays"), path / "meta.json.gz"]:
        assert str(file.relative_to(path)) in flushed
        assert str(file.relative_to(path).parent) in flushed or file.parent == path
    assert flushed[-2].startswith(".manifest.json") and ("fsync", tmp_path) in events[at:]


WRITER = """
import sys, time
import jax, jax.numpy as jnp
from jaxtransfer.checkpoint import Checkpointer, latest
from jaxtransfer.types import Lineage, State

def state(step):
    return State(jnp.int32(step), {"w": jnp.full(50_000, step, jnp.float32)}, {}, (), jax.random.key(step), {})

with Checkpointer(sys.argv[1], lineage=Lineage("memory", "d"), keep=2) as saver:
    found = saver.restore_latest(state(0))
    step = 0 if found is None else int(found[0].step)
    print("begin", step, flush=True)
    while True:
        step += 1
        saver.save(step, state(step), {})
        saver.wait()
        print("confirmed", step, flush=True)
"""


def kill_rounds(root: Path, rounds: int) -> None:
    draw, confirmed = random.Random(rounds), 0
    for _ in range(rounds):
        writer = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WRITER, str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None and writer.stderr is not None
        begun = writer.stdout.readline().split()
        assert begun[:1] == ["begin"], writer.stderr.read()
        assert int(begun[1]) >= confirmed  # nothing confirmed is lost
        for _ in range(2):
            confirmed = int(writer.stdout.readline().split()[1])
        time.sleep(draw.uniform(0, 0.1))
        writer.kill()
        rest, errors = writer.communicate(timeout=60)
        assert errors == ""
        confirmed = max([confirmed, *(int(line.split()[1]) for line in rest.splitlines() if len(line.split()) == 2)])
        for step in (listed := checkpoint.steps(root)):
            found, _, _ = checkpoint.restore(root / str(step), like=tiny(0, 50_000))
            assert_same(found, tiny(step, 50_000))
        assert listed[-1] >= confirmed
    Checkpointer(root, lineage=LINEAGE).close()
    assert all(entry.name.isdigit() for entry in root.iterdir())


def test_kill_during_saves_loses_nothing_confirmed(tmp_path):
    kill_rounds(tmp_path, 3)


@pytest.mark.slow
def test_kill_during_saves_many_times(tmp_path):
    kill_rounds(tmp_path, 25)


def test_nothing_is_printed(tmp_path, capfd):
    with Checkpointer(tmp_path, lineage=LINEAGE) as saver:
        for step in range(1, 4):
            saver.save(step, tiny(step), {})
        saver.restore_latest(tiny(0))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert np.array_equal(checkpoint.restore(tmp_path / "3", like=tiny(0))[0].params["w"], tiny(3).params["w"])


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run/checkpoints", lineage=LINEAGE) as saver:
        saver.save(1, tiny(1), {"w": None})
    with Checkpointer("run/checkpoints", lineage=LINEAGE) as again:
        found = again.restore_latest((tiny(0), {"w": None}))
    assert found is not None
    assert_same(found[0], tiny(1))
