"""Loading against reading the same bytes, and host memory against the bytes: `python benchmarks/load.py [--layers 12]`.

`--processes 2 [--layers 68]` measures the memory of several processes instead (68 layers: 2.02 GB in files of 500 MB):
each has its share of 8 simulated devices, over which the parameters are split fsdp x tensor, and reads what they hold.
Goal of each: at most 1.25 x its own bytes and one stack of its layers' shards.

A BERT of random weights (12 layers: 438 MB) is written to a temporary folder and loaded in fresh processes, onto one
device and onto 8 simulated ones (sharded fsdp x tensor). Every ratio is of times taken in one process:

  read     the file by plain reads of 1 MiB
  sha256   the same and its SHA-256, which lineage records: what loading cannot do without
  load     `load`: hashing, copies turned to our layout, checks, arrays on devices, fingerprints

"cold" drops the file from the page cache first. Memory is the peak of anonymous memory (RssAnon, sampled every 2 ms)
above the baseline after imports and the start of the devices; "first" includes compiling, "again" does not.
Goal: at most 1.25 x the bytes.
"""

import argparse
import gc
import hashlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

GOAL = 1.25
DEVICES = 8


def rss_anon():
    """Anonymous memory of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def timed(work):
    """Seconds that `work()` takes, and the peak of anonymous memory meanwhile."""
    gc.collect()  # jax gives host memory back late
    done, peak = threading.Event(), [rss_anon()]

    def sample():
        while not done.wait(0.002):
            peak[0] = max(peak[0], rss_anon())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    peak[0] = max(peak[0], rss_anon())
    done.set()
    sampler.join()
    return seconds, peak[0]


def read(path, sink):
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sink(memoryview(buffer)[:count])


def drop_cache(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder, devices, repeats):
    """Runs in its own process; prints one line of JSON."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from jaxtransfer.models.registry import family
    from jaxtransfer.source import load

    mesh = Mesh(np.array(jax.devices()).reshape(-1, min(devices, 2)), ("fsdp", "tensor"))
    rules = family("bert").tensor_rules if devices > 1 else ()
    path = folder / "model.safetensors"
    size = path.stat().st_size

    def work():
        source = load(folder, mesh=mesh if devices > 1 else None, sharding=rules)
        jax.block_until_ready(source.params)
        held.append(
            sum(shard.data.nbytes for leaf in jax.tree.leaves(source.params) for shard in leaf.addressable_shards)
        )

    jobs = {"read": lambda: read(path, len), "sha256": lambda: read(path, hashlib.sha256().update), "load": work}
    held, seconds, memory = [], {}, {}
    jax.block_until_ready(jax.device_put(0.0))
    base = rss_anon()
    drop_cache(path)
    seconds["load, first"], memory["first"] = timed(work)
    for name, cold in (("cold", True), ("warm", False)):
        for repeat in range(repeats):
            order = jobs.items() if repeat % 2 else reversed(jobs.items())
            for job, run in order:
                if cold:
                    drop_cache(path)
                taken, peak = timed(run)
                seconds.setdefault(f"{job}, {name}", []).append(taken)
                if job == "load":
                    memory["again"] = max(memory.get("again", 0), peak)
    medians = {name: statistics.median(value) if isinstance(value, list) else value for name, value in seconds.items()}
    found = {"bytes": size, "held": held[0], "seconds": medians, "memory": {k: v - base for k, v in memory.items()}}
    print(json.dumps(found))


def measure_one_of_several(folder):
    """Runs in each of several processes, which join; prints one line of JSON."""
    import jax

    from jaxtransfer import parallel
    from jaxtransfer.models.registry import family
    from jaxtransfer.parallel import distributed, fsdp, make_mesh
    from jaxtransfer.source import load
    from jaxtransfer.tree import flatten

    parallel.join()
    mesh = make_mesh(fsdp=DEVICES // 2, tensor=2)

    def sharding(model, params):
        return (*family("bert").tensor_rules, *fsdp(params, mesh))

    def own(leaf):
        return sum(shard.data.nbytes for shard in leaf.addressable_shards)

    def work():
        found.clear()
        found.update(flatten(load(folder, mesh=mesh, sharding=sharding).params))
        jax.block_until_ready(found)

    found, memory = {}, {}
    distributed.put(0.0 * jax.numpy.arange(8), jax.NamedSharding(mesh, jax.P("fsdp")))
    distributed.gathered("begin", "")
    base = rss_anon()
    for path in folder.glob("*.safetensors"):
        drop_cache(path)
    for when in ("first", "again"):
        seconds, peak = timed(work)
        memory[when] = peak - base
        stacks = {}
        for path, leaf in found.items():
            kind = re.sub(r"/\d+/", "/*/", path)
            stacks[kind] = stacks.get(kind, 0) + own(leaf)
        held = sum(stacks.values())
        distributed.gathered("loaded", "")
        found.clear()
    print("\n" + json.dumps({"held": held, "stack": max(stacks.values()), "memory": memory, "seconds": seconds}))


def several(folder, count):
    """Starts the processes and tells of each its memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for index in range(count):
        where = {"JAXTRANSFER_COORDINATOR": address, "JAXTRANSFER_PROCESSES": str(count)}
        own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // count), "JAXTRANSFER_PROCESS": str(index)}
        command = [sys.executable, __file__, "--measure", folder, "0"]
        environment = {**os.environ, "XLA_FLAGS": "", **where, **own}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    print(f"\n{count} processes of {DEVICES // count} devices: files of {size / 1e6:.0f} MB")
    for index, process in enumerate(started):
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"process {index} ended with {process.returncode}")
        found = json.loads(output.splitlines()[-1])
        bound = GOAL * found["held"] + found["stack"]
        told = f"{found['held'] / 1e6:.0f} MB of its own, the largest stack {found['stack'] / 1e6:.0f} MB"
        print(f"  process {index}: {told}, loaded again in {found['seconds']:.1f} s")
        for when, peak in found["memory"].items():
            told = f"{peak / 1e6:.0f} MB = {peak / found['held']:.2f} x its own"
            print(f"    peak anonymous memory, {when}: {told} (goal {bound / 1e6:.0f}: ", end="")
            print("met)" if peak <= bound else "MISSED)")


def write_checkpoint(folder, layers, shard_bytes):
    """A random BERT in Hugging Face layout."""
    import numpy as np

    from jaxtransfer.models.api import abstract_init
    from jaxtransfer.models.names import turn
    from jaxtransfer.models.registry import family
    from jaxtransfer.source.writer import write_folder
    from jaxtransfer.tree import flatten

    config = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522, "hidden_size": 768}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 12, "intermediate_size": 3072}
    bert = family("bert")
    model = bert.build(config, None, pooler=True)
    shapes = flatten(abstract_init(model))
    rng = np.random.default_rng(0)
    rows = bert.names(model).export_names(shapes, with_prefix=False)
    tensors = {
        name: turn(rng.standard_normal(shapes[path].shape, dtype=np.float32), how) for path, (name, how) in rows.items()
    }
    write_folder(folder, tensors, {"format": "pt"}, shard_bytes=shard_bytes)
    (folder / "config.json").write_text(json.dumps(config))


def report(devices, found):
    mega, seconds, plural = found["bytes"] / 1e6, found["seconds"], "s" if devices > 1 else ""
    print(f"\n{devices} device{plural}: a file of {mega:.0f} MB, {found['held'] / 1e6:.0f} MB on the devices")
    for cache in ("cold", "warm"):
        plain, hashed, load = (seconds[f"{job}, {cache}"] for job in ("read", "sha256", "load"))
        print(f"  {cache}: read {plain:.2f} s, sha256 {hashed:.2f} s, load {load:.2f} s ({mega / 1e3 / load:.2f} GB/s)")
        print(f"        load = {load / plain:.2f} x read = {load / hashed:.2f} x sha256")
    print(f"  first load in the process, cold, compiling the fingerprints: {seconds['load, first']:.2f} s")
    for when, peak in found["memory"].items():
        ratio = peak / found["held"]
        print(f"  peak anonymous memory, {when}: {peak / 1e6:.0f} MB = {ratio:.2f} x the bytes held", end="")
        print(f" (goal {GOAL}: {'met' if ratio <= GOAL else 'MISSED'})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, help="by default 12; of several processes 68")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "DEVICES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure and arguments.measure[1] == "0":
        return measure_one_of_several(Path(arguments.measure[0]))
    if arguments.measure:
        return measure(Path(arguments.measure[0]), int(arguments.measure[1]), arguments.repeats)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.processes > 1:
            write_checkpoint(Path(folder), arguments.layers or 68, 500_000_000)
            return several(folder, arguments.processes)
        write_checkpoint(Path(folder), arguments.layers or 12, 5_000_000_000)
        for devices in (1, DEVICES):
            flags = f"--xla_force_host_platform_device_count={devices}"
            command = [sys.executable, __file__, "--repeats", str(arguments.repeats), "--measure", folder, str(devices)]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            report(devices, json.loads(done.stdout))


if __name__ == "__main__":
    main()
