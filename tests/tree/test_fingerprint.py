import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtransfer.tree import digest, fingerprint, layout, stack, unstack
from tests.tree.trees import draw

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "int8": np.int8,
    "int32": np.int32,
    "float64": np.float64,
    "int64": np.int64,
    "bool": np.bool_,
}
SHAPE = (5, 7)


def array(dtype, seed=0):
    """Random bits, so NaNs, infinities and subnormals too."""
    raw = np.random.default_rng(seed).integers(0, 256, (*SHAPE, np.dtype(dtype).itemsize), dtype=np.uint8)
    return raw[..., 0] > 127 if dtype is np.bool_ else raw.view(dtype)[..., 0]


def of(x):
    return fingerprint({"w": x})["w"]


@pytest.mark.parametrize("name", DTYPES)
@given(data=st.data())
def test_a_flip_of_any_bit_shows(name, data):
    dtype = DTYPES[name]
    before = array(dtype, data.draw(st.integers(0, 3)))
    after = before.copy()
    index = data.draw(st.integers(0, after.size - 1))
    if dtype is np.bool_:
        after.reshape(-1)[index] ^= True
    else:
        byte = index * after.itemsize + data.draw(st.integers(0, after.itemsize - 1))
        after.reshape(-1).view(np.uint8)[byte] ^= 1 << data.draw(st.integers(0, 7))
    assert of(after) != of(before)
    assert of(before.copy()) == of(before)


def test_each_lane_alone_is_a_bijection_of_one_element():
    """All 2**16 values of a half-precision scalar give as many fingerprints, in either half of the 64 bits."""
    bits = jnp.arange(2**16, dtype=jnp.uint16)
    found = fingerprint({f"0:{2**16}": jax.lax.bitcast_convert_type(bits, jnp.float16)}).values()
    assert len({value[:8] for value in found}) == len({value[8:] for value in found}) == 2**16


def test_a_flip_of_an_input_bit_flips_every_output_bit_half_the_time():
    values = np.random.default_rng(0).integers(0, 2**32, (64, 1), dtype=np.uint32)
    flipped = values ^ (np.uint32(1) << np.arange(32, dtype=np.uint32))[None]
    table = np.concatenate([values, flipped], axis=1).reshape(-1)
    found = fingerprint({f"0:{len(table)}": jnp.asarray(table)})
    words = np.array([int(found[str(i)], 16) for i in range(len(table))], np.uint64).reshape(64, 33)
    changed = (words[:, :1] ^ words[:, 1:])[..., None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    rate = changed.mean((0, 1))
    assert (0.4 < rate).all() and (rate < 0.6).all()


@given(st.permutations(range(6)))
def test_order_counts(order):
    x = np.arange(6, dtype=np.float32)
    assert (of(x[list(order)]) == of(x)) == (list(order) == list(range(6)))


def test_zeros_of_several_lengths_and_both_signs_differ():
    found = [of(np.zeros(n, np.float32)) for n in range(1, 6)] + [of(-np.zeros(1, np.float32))]
    assert len(set(found)) == len(found)


def test_stacked_or_not_is_the_same():
    layers = {str(i): {"k": draw((3, 2), "float32", i), "b": draw((), "float16", i)} for i in range(11)}
    tree = {"blocks": layers, "head": draw((4,), "int8", 0)}
    laid = stack(tree, layout(tree))
    plain = fingerprint(tree)
    assert fingerprint(laid) == plain == fingerprint(unstack(laid))
    assert set(plain) == {*(f"blocks/{i}/{part}" for i in range(11) for part in "bk"), "head"}


def test_sharded_or_not_is_the_same(devices):
    mesh = jax.sharding.Mesh(np.array(devices).reshape(4, 2), ("x", "y"))
    tree = {"w": draw((8, 6), "float32", 0), "blocks": {"0:2": {"k": draw((2, 8), "float16", 1)}}}
    spec = {"w": ("x", "y"), "blocks": {"0:2": {"k": (None, "x")}}}
    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*s))), tree, spec
    )
    assert len(placed["w"].sharding.device_set) == 8
    assert fingerprint(placed) == fingerprint(tree)


def test_eight_byte_arrays_are_the_same_on_the_host_and_on_the_device():
    tree = {"a": array(np.float64), "blocks": {"0:5": array(np.int64)}, "c": np.array(3.0)}
    host = fingerprint(tree)
    with jax.enable_x64(True):
        device = jax.tree.map(jnp.asarray, tree)
        assert device["a"].dtype == jnp.float64
        assert fingerprint(device) == host
    assert len(set(host.values())) == 7


def test_keys_have_fingerprints():
    assert of(jax.random.key(0)) != of(jax.random.key(1))


def test_digest_covers_paths_dtypes_shapes_and_bytes():
    base = {"a": np.zeros((2, 3), np.float32), "b": np.ones(1, np.int8)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].view(np.int32), "b": base["b"]},
        {"a": -base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    found = [digest(tree) for tree in (base, *others)]
    assert len(set(found)) == len(found) and all(len(value) == 64 for value in found)
    assert digest({"b": base["b"], "a": jnp.asarray(base["a"])}) == found[0]
    assert digest({"a": np.asfortranarray(draw((2, 3), "float32", 1))}) == digest({"a": draw((2, 3), "float32", 1)})
    assert digest({"a": np.zeros(2, ml_dtypes.bfloat16)}) != digest({"a": np.zeros(2, np.float16)})
