"""Checkpoints of several processes: each writes and reads its own part, and all agree on what is there."""

import shutil

import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtransfer import checkpoint
from tests import processes
from tests.checkpoint import states

PROGRAM = """
import sys
from pathlib import Path
import jax, numpy as np
from jaxtransfer import checkpoint, parallel, tree
parallel.join()
from jax.sharding import NamedSharding, PartitionSpec
from jaxtransfer.checkpoint import Checkpointer, CheckpointError, DamagedError, RunLock, arrays
from jaxtransfer.parallel import distributed, put
from tests.checkpoint import states

root, own = Path(sys.argv[1]), jax.process_index()
mesh = states.mesh_of(jax.devices())

def spec(x):
    split = x.ndim >= 2 and x.shape[-2] % 4 == 0 and x.shape[-1] % 2 == 0
    return NamedSharding(mesh, PartitionSpec(*(None,) * (x.ndim - 2), "fsdp", "tensor") if split else PartitionSpec())

def spread(values):
    return put(values, jax.tree.map(spec, values))

def check(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(y)[shard.index])

def refused(kind, work):
    try:
        work()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")

state, frozen, lineage = states.make()
like = states.abstract(state)
ours, kept = spread((state, frozen))
assert tree.fingerprint(kept) == tree.fingerprint(frozen)
with RunLock(root), Checkpointer(root, lineage=lineage) as saver:
    saver.save(1, ours, kept, {"process": own})
    saver.save(3, ours, kept)
    found, frozen_, extra = saver.restore_latest((like, kept), mesh=mesh, sharding=states.RULES)
    check(found, state)
    assert checkpoint.metadata(root / "1")["extra"] == {"process": 0} and checkpoint.steps(root) == [1, 3]
    split = found.params["head"]["kernel"]
    assert not split.is_fully_replicated and not split.is_fully_addressable

    cut, frozen_cut, _ = states.make(states.CUT)
    again, _, _ = checkpoint.restore(
        root / "3", like=(states.abstract(cut), spread(frozen_cut)), mesh=mesh, sharding=states.RULES
    )
    check(again, cut)

    message = refused(CheckpointError, lambda: saver.save(4, state, frozen))
    assert "lies on this process alone, one of 2; place it on a mesh over all of them" in message
    message = refused(CheckpointError, lambda: saver.save(3, ours, kept))
    assert "step 3 is not above 3, the last one here" in message
    distributed.gathered("here", "")
    if own == 0:
        file = max((root / "3").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    distributed.gathered("damaged", "")
    assert "damaged, its CRC-32 is" in refused(DamagedError, lambda: checkpoint.restore(root / "3", like=(like, kept)))

    really = Path.is_dir
    if own == 1:  # as on a disk of its own
        Path.is_dir = lambda path: ".tmp-" not in path.name and really(path)
    message = refused(CheckpointError, lambda: saver.save(5, ours, kept))
    assert "process 1 does not see what process 0 writes" in message
    Path.is_dir = really

    write = arrays.write_async
    if own == 1:
        def full(*args):
            wait = write(*args)
            def late():
                wait()
                raise OSError("the disk of this host is full")
            return late
        arrays.write_async = full
    saver.save(6, ours, kept)
    message = refused(CheckpointError, saver.wait)
    assert "6: was not saved" in message and "the disk of this host is full" in message
    assert own == 1 or "process 1: " in message
distributed.gathered("left", "")
assert not (root / "run.lock").exists()
print("all good", own)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder that two processes with four devices each have written steps into."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "program.py"
    script.write_text(PROGRAM)
    outputs = processes.run(script, folder / "run")
    assert [f"all good {index}" in output for index, output in enumerate(outputs)] == [True, True]
    return folder / "run"


def test_two_processes_save_restore_and_refuse_as_one(written):
    assert checkpoint.steps(written) == [1, 3]
    assert sorted(path.name for path in written.iterdir()) == ["1", "3"]
    writers = {path.name for path in (written / "1").rglob("ocdbt.process_*") if list(path.glob("d/*"))}
    assert writers == {"ocdbt.process_0", "ocdbt.process_1"}
    checkpoint.verify(written / "1")


@pytest.mark.parametrize("count", [8, 2])
def test_what_two_processes_wrote_is_read_by_one(count, written, devices):
    mesh = Mesh(np.asarray(devices[:count]).reshape(-1, 2), ("fsdp", "tensor"))
    state, frozen, lineage = states.make()
    found, kept, _ = checkpoint.restore(
        written / "1", like=(states.abstract(state), frozen), mesh=mesh, sharding=states.RULES, lineage=lineage
    )
    states.assert_same(found, state)
    states.assert_same(kept, frozen)
    assert found.params["head"]["kernel"].sharding.device_set == set(devices[:count])


def test_a_layout_is_put_together_where_it_goes(written, devices):
    """No leaf of another layout passes through the host: it is read as it will be split."""
    mesh = states.mesh_of(devices)
    like = states.abstract(states.make(states.CUT)[0])
    asked = {}
    real = checkpoint.reading.arrays.read

    def read(folder, wanted, together):
        asked.update(wanted)
        return real(folder, wanted, together)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.reading.arrays, "read", read)
        found, _, _ = checkpoint.restore(
            written / "1", like=(like, states.make(states.CUT)[1]), mesh=mesh, sharding=states.RULES
        )
    whole = asked["params/blocks/0:3/kernel"].sharding
    assert whole == NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    states.assert_same(found, states.make(states.CUT)[0])
    assert found.params["blocks"]["0:2"]["kernel"].sharding == whole


def test_a_copy_of_one_processes_part_is_no_checkpoint(written, tmp_path):
    shutil.copytree(written / "1", tmp_path / "1")
    shutil.rmtree(next((tmp_path / "1").rglob("ocdbt.process_1")))
    assert checkpoint.steps(tmp_path) == []
