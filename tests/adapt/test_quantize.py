"""Quantised weights: their error, their bytes, products that unpack inside, and what a scan keeps of them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt.quantized import QuantizeError, quantize
from jaxtransfer.adapt.quantized_types import NF4, NF4_LEVELS, Int8, int8, nf4
from jaxtransfer.models import apply, layout_of
from jaxtransfer.tree import combine, flatten, partition, stack
from jaxtransfer.tree.weights import Window, conv, is_weight, linear, take, transpose
from jaxtransfer.types import Lineage, Source
from tests.models import zoo


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def relative(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_int8_rounds_to_half_a_step_of_its_channel():
    w = normal(50, 6) * jnp.arange(6.0)[None]  # a channel of zeros among them
    packed = int8(w)
    step = jnp.max(jnp.abs(w), axis=0) / 127
    assert bool(jnp.all(jnp.abs(packed.materialize() - w) <= step[None] * 0.5001))
    assert packed.q.dtype == jnp.int8 and int(jnp.max(jnp.abs(packed.q))) == 127
    assert relative(packed.materialize()[:, 1:], w[:, 1:]) < 0.012


def test_nf4_takes_the_nearest_level_of_its_scale():
    w = normal(128, 256)
    packed = nf4(w)
    scales = np.repeat(np.asarray(packed.block_scales()), 64, axis=0)
    levels = np.asarray(NF4_LEVELS, np.float32)
    want = levels[np.abs(np.asarray(w)[..., None] / scales[..., None] - levels).argmin(-1)] * scales
    np.testing.assert_allclose(packed.materialize(), want, rtol=0, atol=1e-6)


def test_nf4_errs_as_its_definition_says_for_normal_weights():
    """Of N(0, 1) in blocks of 64: 0.0727 on average, 0.0919 in root mean square, as with scales of 32 bits."""
    w = normal(1024, 1024)
    blocks = np.asarray(w).reshape(16, 64, 1024)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    levels = np.asarray(NF4_LEVELS, np.float32)
    nearest = levels[np.abs((blocks / scale)[..., None] - levels).argmin(-1)] * scale - blocks
    for error in (nearest, np.asarray(nf4(w).materialize() - w)):
        assert np.abs(error).mean() == pytest.approx(0.0727, rel=0.01)
        assert np.sqrt(np.mean(error**2)) == pytest.approx(0.0919, rel=0.01)
    # Rounding the scales to eight bits costs next to nothing: half a step of their group's range at the most.
    top = scale[:, 0].reshape(16, 16, 64)
    step = (top.max(-1) - top.min(-1)) / 254
    assert np.all(np.abs(np.asarray(nf4(w).block_scales()).reshape(top.shape) - top) <= step[..., None] * 0.501)


def test_int8_errs_as_rounding_to_its_step_does():
    """Uniform in half a step to each side: a quarter of a step on average, a step over the root of twelve in square."""
    w = normal(1024, 512)
    step = np.abs(np.asarray(w)).max(axis=0) / 127
    error = np.asarray(int8(w).materialize() - w)
    assert np.abs(error).mean() == pytest.approx(step.mean() / 4, rel=0.01)
    assert np.sqrt(np.mean(error**2)) == pytest.approx(np.sqrt(np.mean(step**2) / 12), rel=0.01)


@pytest.mark.parametrize("axis", [0, 1])
def test_nf4_packs_a_shard_as_it_packs_it_within_the_whole(axis):
    """Nothing is shared beyond a block's or a group's numbers."""
    w = normal(256, 192) * jnp.arange(1.0, 193.0)[None]
    parts = [nf4(part) for part in jnp.split(w, [64 if axis == 0 else 128], axis=axis)]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=axis), *parts)
    assert all(
        bool(jnp.array_equal(a, b)) for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(nf4(w)), strict=True)
    )


@pytest.mark.parametrize("pack", [int8, nf4])
def test_weights_of_zero_and_of_one_value_are_exact(pack):
    w = jnp.concatenate([jnp.zeros((64, 64)), jnp.full((64, 64), -0.3)], axis=1)
    np.testing.assert_allclose(pack(w).materialize(), w, rtol=0, atol=1e-7)


def test_nf4_needs_half_a_byte_and_a_little_a_parameter():
    w = normal(1024, 512)
    packed = nf4(w)
    assert bytes_of(packed) / w.size < 0.52
    assert packed.shape == w.shape and packed.dtype == w.dtype


@pytest.mark.parametrize("pack", [int8, nf4])
def test_products_equal_those_of_the_unpacked_weight(pack):
    x, w, b = normal(2, 3, 64), normal(64, 10, seed=1), normal(10, seed=2)
    packed = pack(w)
    whole = packed.materialize()
    zoo.assert_close(linear(x, packed, b), linear(x, whole, b))
    zoo.assert_close(linear(normal(2, 10), transpose(packed)), linear(normal(2, 10), whole.T))
    ids = jnp.array([[0, 5, 63]])
    zoo.assert_close(take(packed, ids), take(whole, ids))
    zoo.assert_close(jax.grad(lambda x: jnp.sum(linear(x, packed, b) ** 2))(x),
                     jax.grad(lambda x: jnp.sum(linear(x, whole, b) ** 2))(x))  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-5])
def test_int8_holds_in_float16_what_the_weight_does(scale):
    """``x q`` alone is 127 / max |W| times the product, above what float16 holds."""
    x, w = jnp.abs(normal(2, 1024)).astype(jnp.float16) * 8, normal(1024, 4, seed=1) * scale
    packed = int8(w)

    def loss(x, w):
        return jnp.sum(linear(x, w).astype(jnp.float32))

    whole = packed.materialize()
    for got, want in (
        (linear(x, packed), linear(x, whole)),
        (jax.grad(loss)(x, packed), jax.grad(loss)(x, whole)),
    ):
        assert got.dtype == jnp.float16 and bool(jnp.all(jnp.isfinite(got)))
        assert relative(got.astype(jnp.float32), want.astype(jnp.float32)) < 0.01
    big = jnp.full((1, 1024), 10, jnp.float16)
    np.testing.assert_allclose(linear(big, int8(jnp.ones((1024, 2)))), jnp.full((1, 2), 10240.0), rtol=1e-3)


def test_int8_takes_convolutions():
    x, w = normal(2, 5, 5, 3), normal(3, 3, 3, 4, seed=1)
    zoo.assert_close(conv(x, int8(w), how=Window((2, 2))), conv(x, int8(w).materialize(), how=Window((2, 2))))


def big():
    model, params = zoo.tiny(hidden_size=64, intermediate_size=128, num_hidden_layers=8)
    return Source(model, params, Lineage("memory", ""))


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_qlora_trains_adapters_over_a_packed_base(method):
    source = quantize(big(), [(r"blocks/.*/kernel", method)])
    source = at.attach(source, [(r"blocks/.*/kernel", at.lora(2))], jax.random.key(0))
    model, tree = source.model, source.params
    laid = stack(tree, layout_of(model, tree))
    zoo.assert_close(apply(model, laid, zoo.inputs())["logits"], apply(model, tree, zoo.inputs())["logits"])
    train, frozen = partition(laid, lambda path: path.endswith(("@a", "@b")))

    @jax.jit
    def loss_and_grad(train, frozen):
        return jax.value_and_grad(lambda t: jnp.sum(apply(model, combine(t, frozen), zoo.inputs())["logits"] ** 2))(
            train
        )

    _, grads = loss_and_grad(train, frozen)
    assert all(float(jnp.abs(leaf).max()) > 0 for path, leaf in flatten(grads).items() if path.endswith("@b"))
    # Between the passes the scan keeps activations, and no array of the size of the stacked unpacked kernels.
    text = loss_and_grad.lower(train, frozen).compile().as_text()
    floats = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[(\d+(?:,\d+)+)\]", text)}
    kernels = {leaf.shape for path, leaf in flatten(stack(big().params, layout_of(model, big().params))).items()
               if path.startswith("blocks") and path.endswith("kernel")}  # fmt: skip
    assert kernels and not floats & kernels


def test_merging_a_quantised_base_is_asked_for():
    source = at.attach(quantize(big(), [(r"blocks/0/mlp/up/kernel", "nf4")]), [(r"blocks/0/mlp/up/kernel", at.lora(2))],
                       jax.random.key(0))  # fmt: skip
    with pytest.raises(at.AdapterError, match="the base of blocks/0/mlp/up/kernel is NF4"):
        at.merge(source)
    merged = at.merge(source, dequantize=True)
    assert not any(map(is_weight, jax.tree.leaves(merged.params, is_leaf=is_weight)))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([(r"blocks/0/mlp/up/kernel", "int3")], "'int3' is not one of int8, nf4"),
        ([(r"embed/word/embedding", "nf4")], "embed/word/embedding: NF4 takes matrices"),
        ([(r"blocks/0/mlp/up/bias", "int8")], r"int8 takes kernels and embeddings, got shape \(128,\)"),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name(rules, message):
    with pytest.raises(QuantizeError, match=message):
        quantize(big(), rules)


def test_quantising_twice_is_refused():
    once = quantize(big(), [(r"blocks/0/mlp/up/kernel", "int8")])
    assert isinstance(once.params["blocks"]["0"]["mlp"]["up"]["kernel"], Int8)
    with pytest.raises(QuantizeError, match="is a Int8 already"):
        quantize(once, [(r"blocks/0/mlp/up/kernel", "nf4")])


def test_bfloat16_weights_are_remembered_as_such():
    packed = nf4(normal(64, 8).astype(jnp.bfloat16))
    assert packed.materialize().dtype == jnp.bfloat16 and isinstance(dataclasses.replace(packed), NF4)
