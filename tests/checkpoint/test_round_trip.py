"""What was saved comes back, bit for bit: on any mesh, in any layout."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxtransfer import checkpoint, optim, tree
from jaxtransfer.checkpoint import arrays
from jaxtransfer.types import Lineage, State
from tests.checkpoint.states import (
    CUT,
    RULES,
    WHOLE,
    abstract,
    assert_same,
    canonical,
    files,
    is_trained,
    make,
    mesh_of,
    placed,
)

EXTRA = {"loader": {"position": 7}, "metrics": [0.25, None], "digest": "é"}


@pytest.fixture
def mixed(monkeypatch):
    """Some arrays written as one and others not: all have less than 64 kB here."""
    monkeypatch.setattr(arrays, "_SMALL", 32)


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("runs", [WHOLE, CUT, None], ids=["whole", "cut", "unstacked"])
@pytest.mark.parametrize("into", [WHOLE, CUT, None], ids=["whole", "cut", "unstacked"])
def test_any_layout_restores_into_any(tmp_path, runs, into):
    state, frozen, lineage = make(runs)
    path = checkpoint.save(tmp_path / "3", state, frozen, lineage, extra=EXTRA)
    want, rest, _ = make(into)
    found, kept, extra = checkpoint.restore(path, like=(abstract(want), rest), lineage=lineage)
    assert_same((found, kept), (want, rest))
    assert extra == EXTRA


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("into", [WHOLE, CUT, None], ids=["whole", "cut", "unstacked"])
def test_between_one_device_and_eight(tmp_path, devices, into):
    mesh = mesh_of(devices)
    state, frozen, lineage = make(CUT)
    one = checkpoint.save(tmp_path / "1", state, frozen, lineage)
    eight = checkpoint.save(tmp_path / "8", *placed((state, frozen), mesh), lineage)
    want, rest, _ = make(into)
    spread = placed((want, rest), mesh)
    for path in (one, eight):
        for like in ((want, rest), spread):
            found = checkpoint.restore(path, like=like, lineage=lineage)[:2]
            assert_same(found, (want, rest))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
                assert a.sharding.is_equivalent_to(b.sharding, a.ndim) and a.committed == b.committed


def test_rules_place_what_is_abstract(tmp_path, devices):
    mesh = mesh_of(devices)
    state, frozen, lineage = make(CUT)
    path = checkpoint.save(tmp_path / "3", state, frozen, lineage)
    want, rest, _ = make(WHOLE)
    found, _, _ = checkpoint.restore(path, like=(abstract(want), rest), mesh=mesh, sharding=RULES)
    assert_same(found, want)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    moment = found.opt_state.inner_states["rest"].inner_state[0].mu["blocks"]["0:3"]
    for leaf in (found.params["blocks"]["0:3"]["kernel"], moment["kernel"]):
        assert leaf.sharding.is_equivalent_to(split, 3)
    for leaf in (found.params["blocks"]["0:3"]["bias"], moment["bias"], found.key, found.step):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8


def test_abstract_with_sharding_goes_there(tmp_path, devices):
    state, frozen, lineage = make()
    path = checkpoint.save(tmp_path / "3", state, frozen, lineage)
    where = SingleDeviceSharding(devices[3])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)
    found, _, _ = checkpoint.restore(path, like=(like, frozen))
    assert_same(found, state)
    assert all(leaf.sharding.device_set == {devices[3]} for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("small", [0, 1 << 18], ids=["apart", "together"])
def test_every_dtype_key_and_numpy_leaf_comes_back(tmp_path, monkeypatch, small):
    monkeypatch.setattr(arrays, "_SMALL", small)
    patterns = np.arange(2**16, dtype=np.uint16)
    params = {
        "bf16": jax.lax.bitcast_convert_type(jnp.asarray(patterns), jnp.bfloat16),  # every NaN payload
        "f16": jnp.asarray(patterns.view(np.float16)),
        "big": jnp.int32(16777217),
        "f8": jnp.arange(4, dtype=jnp.float8_e4m3fn),
        "i4": jnp.arange(4, dtype=jnp.int4),
        "bool": jnp.array([True, False]),
        "a/b": jnp.zeros(1),
        "a.b %é@../": jnp.ones(1),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 4),
        "host": np.arange(3, dtype=np.int64) + 2**40,
    }
    state = State(jnp.int32(0), params, {}, (), jax.random.key(1, impl="unsafe_rbg"), {"none": np.zeros((0, 2))})
    path = checkpoint.save(tmp_path / "0", state, {}, Lineage("memory", "d"))
    for like in (state, (state, {})):
        found, _, _ = checkpoint.restore(path, like=like)
        assert_same(found, state)
    assert type(found.params["host"]) is np.ndarray
    assert str(jax.random.key_impl(found.params["keys"])) == "rbg"


def test_small_arrays_are_written_as_one(tmp_path, devices):
    many = {f"layer/{i}": jnp.full((i + 1,), i, jnp.bfloat16) for i in range(50)}
    wide = jnp.ones((1 << 14) + 1)  # four bytes too many
    split = jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh_of(devices), PartitionSpec("fsdp", "tensor")))
    whole = jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh_of(devices), PartitionSpec()))
    assert arrays.small(many | {"wide": wide, "split": split, "whole": whole}) == {*many, "whole"}
    arrays.write_async(tmp_path / "many", many, set(many))()
    arrays.write_async(tmp_path / "one", {"all": jnp.zeros(51 * 25, jnp.bfloat16)}, {"all"})()
    one, of_many = (sum(file.stat().st_size for file in files(tmp_path / name)) for name in ("one", "many"))
    assert abs(of_many - one) < 50  # as many bytes as there are numbers, whatever their names
    asked = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in many.items()}
    found = arrays.read(tmp_path / "many", asked, set(many))
    assert_same(found, many)
    assert all(array.flags.writeable and array.flags.aligned for array in found.values())


def test_only_what_differs_from_the_source_is_written(tmp_path):
    state, frozen, _ = make()
    frozen = frozen | {"wide": jnp.zeros((64, 1024))}
    lineage = Lineage("memory", "d", fingerprints=tree.fingerprint(frozen))

    def written(rest):
        path = checkpoint.save(tmp_path / str(len(list(tmp_path.iterdir()))), state, rest, lineage)
        assert_same(checkpoint.restore(path, like=(state, frozen), lineage=lineage)[1], rest)
        leaves = checkpoint.metadata(path)["leaves"]
        size = sum(file.stat().st_size for file in files(path / "arrays"))
        return {name for name, leaf in leaves.items() if leaf["written"] and name.startswith("frozen/")}, size

    none, small = written(frozen)
    assert none == set()
    one, large = written(frozen | {"wide": frozen["wide"].at[0, 0].set(-0.0)})  # one bit
    assert one == {"frozen/wide"}
    assert small < frozen["wide"].nbytes < large - small < 1.1 * frozen["wide"].nbytes
    layer = {"norm": frozen["blocks"]["0:3"]["norm"].at[1, 0].add(1.0)}  # one layer of a stack
    assert written(frozen | {"blocks": {"0:3": frozen["blocks"]["0:3"] | layer}})[0] == {"frozen/blocks/0:3/norm"}


def test_a_changed_layer_crosses_layouts(tmp_path):
    """Layers 0 and 1 are written, as one stack; layer 2 is the source's: together they are one stack again."""
    state, frozen, lineage = make(CUT)
    changed = frozen["blocks"]["0:2"] | {"norm": frozen["blocks"]["0:2"]["norm"] + 1.0}
    path = checkpoint.save(tmp_path / "3", state, frozen | {"blocks": frozen["blocks"] | {"0:2": changed}}, lineage)
    want, rest, _ = make(WHOLE)
    _, found, _ = checkpoint.restore(path, like=(want, rest), lineage=lineage)
    norm = rest["blocks"]["0:3"]["norm"]
    np.testing.assert_array_equal(found["blocks"]["0:3"]["norm"], norm.at[:2].add(1.0))


def test_meta_says_what_a_reader_needs(tmp_path):
    state, frozen, lineage = make(CUT)
    meta = checkpoint.metadata(checkpoint.save(tmp_path / "3", state, frozen, lineage, extra=EXTRA))
    kernel = meta["leaves"]["params/blocks/0:2/kernel"]
    assert kernel == {"shape": [2, 8, 4], "dtype": "float32", "key": None, "written": True, "small": True}
    assert meta["leaves"]["frozen/embed/embedding"]["written"] is False
    assert meta["leaves"]["key"]["key"] == "threefry2x32"
    assert meta["lineage"]["digest"] == lineage.digest and meta["lineage"]["operations"] == ["made by hand"]
    assert meta["versions"]["jax"] == jax.__version__
    file = tmp_path / "3" / "meta.json.gz"
    assert json.loads(gzip.decompress(file.read_bytes())) == meta
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(checkpoint.DamagedError, match=r"meta\.json\.gz: damaged"):
        checkpoint.metadata(tmp_path / "3")


def test_optimizers_that_map_over_stacks_cross_layouts(tmp_path):
    """Their state names a run of layers twice, and counts per layer; both are carried over."""

    def begin(runs):
        state, frozen, lineage = make(runs)
        labels = tree.map_with_path(lambda path, _: "all" if is_trained(path) else "frozen", canonical())
        tx = optim.optimizer(labels, {"all": optim.Group("adafactor", lr=0.1)})
        _, opt_state = jax.jit(tx.update)(state.params, jax.jit(tx.init)(state.params), state.params)
        return dataclasses.replace(state, opt_state=opt_state), frozen, lineage

    path = checkpoint.save(tmp_path / "3", *begin(CUT))
    want, rest, _ = begin(WHOLE)
    found, _, _ = checkpoint.restore(path, like=(want, rest))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found.opt_state), jax.tree.leaves(want.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # computed twice, in two layouts
    assert_same(found.params, want.params)
