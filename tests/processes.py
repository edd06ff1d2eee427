"""Starting several processes that compute together, as the tests of them do."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port of this machine that no one listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """The environment of a process with so many simulated devices."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": path,
    }  # fmt: skip


def start(script: Path, *arguments: object, count: int = 2, devices: int = 4) -> list[subprocess.Popen[str]]:
    """Processes of one program; each can `parallel.join` the others."""
    where = {"JAXTRANSFER_COORDINATOR": f"127.0.0.1:{free_port()}", "JAXTRANSFER_PROCESSES": str(count)}
    started = []
    for index in range(count):
        own = {**environment(devices), **where, "JAXTRANSFER_PROCESS": str(index)}
        command = [sys.executable, "-W", "error", str(script), *map(str, arguments)]
        output = tempfile.TemporaryFile("w+")  # a pipe would have to be read
        started.append(subprocess.Popen(command, env=own, stdout=output, stderr=subprocess.STDOUT, text=True))
        started[-1].output = output  # type: ignore[attr-defined]
    return started


def finish(started: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str]]:
    """Exit code and output of each, all ended."""
    try:
        for process in started:
            process.wait(timeout)
    finally:
        for process in started:
            process.kill()
            process.wait()
    found = []
    for process in started:
        output = process.output  # type: ignore[attr-defined]
        output.seek(0)
        found.append((process.returncode, output.read()))
        output.close()
    return found


def run(script: Path, *arguments: object, count: int = 2, devices: int = 4) -> list[str]:
    """The outputs of processes that must end well."""
    found = finish(start(script, *arguments, count=count, devices=devices))
    for index, (code, output) in enumerate(found):
        assert code == 0, f"process {index} of {count} ended with {code}:\n{output[-4000:]}"
    return [output for _, output in found]
