"""One writer for one folder, one folder for one run."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from jaxtransfer.checkpoint import RunFolderError, RunLock, claim

HOLDER = """
import sys, time
from jaxtransfer.checkpoint import RunLock
lock = RunLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_the_second_writer_is_refused_at_once_and_told_by_whom(tmp_path):
    with RunLock(tmp_path / "run") as lock:
        held = json.loads(lock.path.read_text())
        assert held["host"] == socket.gethostname() and held["pid"] == os.getpid() and held["start"]
        match = f"another run is writing here, process {os.getpid()} on host {socket.gethostname()} since 20"
        with pytest.raises(RunFolderError, match=match):
            RunLock(tmp_path / "run").acquire()
    assert not lock.path.exists()
    with RunLock(tmp_path / "run"):
        pass


def test_a_live_holder_is_respected_and_a_dead_one_taken_over(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"process {holder.pid} on host"):
            RunLock(tmp_path).acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        assert (tmp_path / "run.lock").exists()  # stale
        with RunLock(tmp_path) as lock:
            assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    finally:
        holder.kill()
        holder.wait(30)
        holder.stdout.close()


def test_a_lock_of_another_host_is_not_taken_over(tmp_path):
    (tmp_path / "run.lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "2020"}))
    with pytest.raises(RunFolderError, match=r"locked by process 1 on host elsewhere.*remove .*run\.lock"):
        RunLock(tmp_path).acquire()
    (tmp_path / "run.lock").write_text("")  # its writer died between making and filling it
    with RunLock(tmp_path):
        pass


def test_claim(tmp_path):
    run = tmp_path / "a" / "run"
    with RunLock(run):
        claim(run, {"seed": 0, "config": "abc", "sizes": (1, 2)})
        claim(run, {"seed": 0, "config": "abc", "sizes": (1, 2)})
        with pytest.raises(RunFolderError) as caught:
            claim(run, {"seed": 1, "config": "abc", "rate": 0.1})
    assert "belongs to another run: rate is None there, 0.1 here, seed is 0 there, 1 here" in str(caught.value)
    assert json.loads((run / "run.json").read_text())["seed"] == 0


def test_of_nested_values_what_differs_is_told(tmp_path):
    def identity(alpha):
        return {"adapters": [{"method": "ia3"}, {"method": "lora", "targets": "x" * 99, "alpha": alpha}], "seed": 0}

    claim(tmp_path, identity(16.0))
    with pytest.raises(RunFolderError, match=r"another run: adapters\[1\]\.alpha is 16\.0 there, 32\.0 here; choose"):
        claim(tmp_path, identity(32.0))
    with pytest.raises(RunFolderError, match=r"another run: adapters is \[\{.* here; choose"):
        claim(tmp_path, {"adapters": [], "seed": 0})


def test_claim_refuses_foreign_and_broken_folders(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        RunFolderError, match=r"holds files of no run .thesis\.tex., no run\.json; choose an empty folder"
    ):
        claim(tmp_path, {"seed": 0})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json: cannot be read"):
        claim(tmp_path, {"seed": 0})
