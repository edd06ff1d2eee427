"""The parent of several processes: it passes on what they say, names the one that dies, and stops the others."""

import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from jaxtransfer import cli
from jaxtransfer.job.launch import launch
from jaxtransfer.parallel import ProcessError, join
from jaxtransfer.run import Interrupted
from tests import processes

module = importlib.import_module("jaxtransfer.job.launch")  # the package has the function by that name
FOLDER = Path(__file__).parent.parent / "configs" / "launch"
LISTENING = """
import os, signal, sys, time
index = int(os.environ["JAXTRANSFER_PROCESS"])
def obeyed(signum, frame):
    print("saved", flush=True)
    os._exit(128 + signum)
signal.signal(signal.SIGTERM, obeyed)
"""


@pytest.fixture
def children(tmp_path, monkeypatch):
    """A function that makes a program the one that is launched."""

    def entry(program: str) -> None:
        (tmp_path / "child.py").write_text(program)
        monkeypatch.setattr(module, "ENTRY", (sys.executable, str(tmp_path / "child.py")))

    return entry


def test_output_is_passed_on_and_the_environment_says_whom_to_join(children, capsys, monkeypatch):
    children(
        "import os, sys\n"
        "names = ['JAXTRANSFER_COORDINATOR', 'JAXTRANSFER_PROCESSES', 'JAXTRANSFER_PROCESS', 'JAX_NUM_CPU_DEVICES',"
        " 'JAX_LOCAL_DEVICE_IDS', 'XLA_FLAGS']\n"
        "print(*[os.environ[name] for name in names], sys.argv[1:])\n"
        "print('[Gloo] Rank 0 is connected to 1 peer ranks.')\n"
        "print('a warning', file=sys.stderr)\n"
    )
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=8")
    launch(["launch", "a.yaml"], processes=2, devices=3)
    said, errors = capsys.readouterr()
    lines = sorted(said.splitlines())
    assert [line[:4] for line in lines] == ["[0] ", "[1] "]
    ports = {re.search(r"127\.0\.0\.1:(\d+) ", line)[1] for line in lines}
    assert len(ports) == 1
    for index, (line, ids) in enumerate(zip(lines, ("0,1,2", "3,4,5"), strict=True)):
        assert f" 2 {index} 3 {ids} --xla_cpu_enable_fast_math=false ['launch', 'a.yaml']" in line
    assert sorted(errors.splitlines()) == ["[0] a warning", "[1] a warning"]


@pytest.mark.parametrize(
    ("death", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "process 1 of 3 was killed by SIGKILL"),
        ("print('no such file', file=sys.stderr); sys.exit(4)", "process 1 of 3 ended with 4"),
    ],
)
def test_the_process_that_dies_is_named_and_the_others_are_stopped(death, how, children, capsys):
    children(LISTENING + f"if index == 1:\n    {death}\ntime.sleep(600)\n")
    began = time.monotonic()
    with pytest.raises(ProcessError, match=how) as caught:
        launch([], processes=3)
    assert time.monotonic() - began < 30
    assert ("it said last: no such file" in str(caught.value)) == ("no such file" in death)
    assert sorted(capsys.readouterr().out.splitlines()) in (
        [],
        ["[0] saved"],
        ["[2] saved"],
        ["[0] saved", "[2] saved"],
    )


def test_one_that_jax_ends_for_another_s_sake_is_not_named(children):
    children(LISTENING + "os.kill(os.getpid(), signal.SIGABRT if index == 0 else signal.SIGSEGV)\n")
    with pytest.raises(ProcessError, match="process 1 of 2 was killed by SIGSEGV"):
        launch([], processes=2)


def test_what_does_not_stop_is_killed(children, monkeypatch):
    monkeypatch.setattr(module, "_KILL", 0.5)
    children(LISTENING + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif index:\n    sys.exit(3)\ntime.sleep(600)\n")
    began = time.monotonic()
    with pytest.raises(ProcessError, match="process 1 of 2 ended with 3"):
        launch([], processes=2)
    assert time.monotonic() - began < 30


def asking(signum, capfd):
    """Sends this process a signal, as soon as both of two processes are ready."""

    def ask() -> None:
        said, began = "", time.monotonic()
        while said.count("ready") < 2 and time.monotonic() - began < 60:
            said += capfd.readouterr().out
            time.sleep(0.05)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_one_that_ignores_a_signal_is_named(children, monkeypatch, capfd):
    monkeypatch.setattr(module, "STOP", 0.5)
    deaf = "if index:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    children(LISTENING + deaf + "print('ready', flush=True)\ntime.sleep(600)\n")
    thread = asking(signal.SIGTERM, capfd)
    with pytest.raises(ProcessError, match="process 1 of 2 was asked to stop, did not, and was killed"):
        launch([], processes=2)
    thread.join()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_after_they_have_saved(signum, children, capfd):
    children(LISTENING + "print('ready', flush=True)\ntime.sleep(600)\n")
    thread = asking(signum, capfd)
    with pytest.raises(Interrupted) as caught:
        launch([], processes=2)
    thread.join()
    assert caught.value.signum == signum
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] saved", "[1] saved"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_to_one_that_stops_all_is_a_signal(children):
    children(LISTENING + "time.sleep(1)\nobeyed(signal.SIGTERM, None)\n")
    with pytest.raises(Interrupted):
        launch([], processes=2)


def test_numbers_that_start_nothing_and_options_that_do_not_go_together(tmp_path, capsys):
    with pytest.raises(ValueError, match="0 processes"):
        launch([], processes=0)
    path = tmp_path / "a.yaml"
    path.write_text("source: {ref: x}\ndata: {train: {path: y}}\nrun: {steps: 1}\n")
    assert cli.main(["launch", str(path), "--devices-per-process", "4"]) == 2
    assert "is for the processes that --processes starts" in capsys.readouterr().err
    assert cli.main(["launch", str(path), "--processes", "2", "--run.step", "3"]) == 2
    assert "run.step" in capsys.readouterr().err


def joining(tmp_path, **where: str) -> tuple[int, str]:
    program = tmp_path / "join.py"
    program.write_text("from jaxtransfer.job import join\njoin(timeout=2)\nprint('joined')\n")
    own = {**processes.environment(1), **where}
    done = subprocess.run([sys.executable, str(program)], env=own, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr


def test_a_process_that_never_comes_is_an_error_with_a_way_out(tmp_path):
    port = processes.free_port()
    where = {"JAXTRANSFER_COORDINATOR": f"127.0.0.1:{port}", "JAXTRANSFER_PROCESSES": "2", "JAXTRANSFER_PROCESS": "0"}
    code, said = joining(tmp_path, **where)
    assert code == 6
    assert f"process 0 of 2: not all processes came to 127.0.0.1:{port} within 2 s; see that every one" in said


def test_nothing_to_join_is_an_error_with_a_way_out(tmp_path):
    code, said = joining(tmp_path)
    assert code == 1 and "cannot join the others" in said and "or start all on this machine with --processes" in said


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"PROCESSES": "2"}, "JAXTRANSFER_COORDINATOR: is not set, but others of"),
        ({"COORDINATOR": "host", "PROCESSES": "2", "PROCESS": "1"}, "must be HOST:PORT, a number, and one below it"),
        ({"COORDINATOR": "host:1", "PROCESSES": "2", "PROCESS": "2"}, "must be HOST:PORT, a number, and one below it"),
    ],
)
def test_variables_that_name_no_place_are_refused(where, said, monkeypatch):
    for name, value in where.items():
        monkeypatch.setenv(f"JAXTRANSFER_{name}", value)
    with pytest.raises(ProcessError, match=said):
        join()


def test_the_script_of_slurm_is_one_of_bash_and_calls_the_entry_point():
    path = FOLDER / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert re.search(r"^#SBATCH --nodes=\d+$", text, re.M) and re.search(r"^#SBATCH --ntasks-per-node=\d+$", text, re.M)
    assert re.search(r"^srun .*--kill-on-bad-exit=1.* jaxtransfer launch ", text.replace("\\\n", " "), re.M)


# What JobSet v1alpha2 and Job v1 require of the fields used, `kind` of each: (type, its fields) or a type.
POD = {
    "subdomain?": str, "restartPolicy": str, "nodeSelector": {"*": str},
    "containers": [{
        "name": str, "image": str, "command": [str], "ports?": [{"containerPort": int}],
        "env": [{"name": str, "value?": str, "valueFrom?": {"fieldRef": {"fieldPath": str}}}],
        "resources": {"limits": {"*": (int, str)}}, "volumeMounts": [{"name": str, "mountPath": str}],
    }],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
    "terminationGracePeriodSeconds": int,
}  # fmt: skip
JOBSET = {
    "apiVersion": str, "kind": str, "metadata": {"name": str, "annotations?": {"*": str}},
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{
            "name": str, "replicas": int,
            "template": {"spec": {
                "parallelism": int, "completions": int, "backoffLimit": int, "completionMode": str,
                "template": {"spec": POD},
            }},
        }],
    },
}  # fmt: skip


def check(value, schema, path: str) -> None:
    """Every field is known and has its type, and every field that is needed is there."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        known = {name.rstrip("?"): kind for name, kind in schema.items()}
        any_name = known.get("*")
        for name, item in value.items():
            assert name in known or any_name, f"{path}.{name}: unknown"
            check(item, known.get(name, any_name), f"{path}.{name}")
        missing = [name for name in schema if name != "*" and not name.endswith("?") and name not in value]
        assert not missing, f"{path}: lacks {missing}"
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for i, item in enumerate(value):
            check(item, schema[0], f"{path}[{i}]")
    else:
        assert isinstance(value, schema) and not isinstance(value, bool), f"{path}: {value!r} is no {schema}"


def test_the_job_set_of_gke_fits_its_schema_and_calls_the_entry_point():
    value = yaml.safe_load((FOLDER / "gke-jobset.yaml").read_text())
    check(value, JOBSET, "jobset")
    assert (value["apiVersion"], value["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = value["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:2] == ["jaxtransfer", "launch"]
    own = {entry["name"]: entry for entry in container["env"]}
    assert own["JAXTRANSFER_PROCESSES"]["value"] == str(spec["parallelism"])
    index = own["JAXTRANSFER_PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    host, port = own["JAXTRANSFER_COORDINATOR"]["value"].split(":")
    assert host == f"{value['metadata']['name']}-{job['name']}-0-0.{value['metadata']['name']}"
    assert int(port) == container["ports"][0]["containerPort"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    with pytest.raises(AssertionError, match=r"replicatedJobs.*lacks"):
        broken = {**value, "spec": {**value["spec"], "replicatedJobs": [{"name": "x", "replicas": 1}]}}
        check(broken, JOBSET, "jobset")
