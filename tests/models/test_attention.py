"""Attention of long rows, some queries at a time: what all at once gives, in memory that grows with the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.models import attention
from jaxtransfer.parallel import make_mesh

HEADS, WIDTH = 4, 8


def drawn(tokens, kv_heads, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, tokens, n * WIDTH)), dtype) for n in (HEADS, kv_heads, kv_heads)]


def masks(tokens):
    real = np.arange(tokens) < tokens - 3
    causal = np.tril(np.ones((tokens, tokens), bool)) & real[None, :]
    return {"padding": jnp.asarray(real[None].repeat(2, 0)), "causal": jnp.asarray(causal[None].repeat(2, 0))}


def graded(q, k, v, mask, **how):
    """The output, and the gradients of one of its functions."""

    def loss(q, k, v):
        y = attention.attention(q, k, v, mask, heads=HEADS, **how)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return y, *gradients


@pytest.fixture
def in_parts(monkeypatch):
    def patch(scores=1, rows=4):
        monkeypatch.setattr(attention, "SCORES", scores)
        monkeypatch.setattr(attention, "ROWS", rows)

    return patch


def loops(tokens, kv_heads=HEADS):
    """Lengths of the loops over queries."""
    shapes = [jax.ShapeDtypeStruct((2, tokens, n * WIDTH), jnp.float32) for n in (HEADS, kv_heads, kv_heads)]
    mask = jax.ShapeDtypeStruct((2, tokens), bool)
    jaxpr = jax.make_jaxpr(lambda *a: attention.attention(*a, heads=HEADS, kv_heads=kv_heads))(*shapes, mask)
    return [e.params["length"] for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan"]


@settings(max_examples=8, deadline=None)
@given(
    tokens=st.sampled_from([13, 16, 24]),
    kv_heads=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["padding", "causal"]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_queries_in_parts_give_what_they_give_at_once(tokens, kv_heads, kind, softcap):
    given = drawn(tokens, kv_heads)
    how = {"kv_heads": kv_heads, "softcap": softcap}
    whole = graded(*given, masks(tokens)[kind], **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES", 1)
        patch.setattr(attention, "ROWS", 4)
        assert loops(tokens, kv_heads)
        parted = graded(*given, masks(tokens)[kind], **how)
    for a, b in zip(whole, parted, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6 * float(jnp.abs(a).max()))


def test_parts_follow_from_the_scores_of_a_row_and_the_rows_of_a_product(in_parts):
    assert loops(64) == []
    in_parts(scores=HEADS * 64 * 64 // 4)
    assert loops(64) == [4]
    assert loops(62) == [31 // 8 + 1]  # no divisor below eight: the last part is filled up
    in_parts(scores=1, rows=32)
    assert loops(64) == [2]
    assert loops(64, kv_heads=1) == [8]  # heads that share keys share a product
    assert loops(31) == []


def test_gradients_of_keys_add_up_over_the_parts_in_float32(in_parts):
    tokens = 256
    half, mask = drawn(tokens, 1, jnp.bfloat16), masks(tokens)["causal"]
    exact = graded(*(x.astype(jnp.float32) for x in half), mask, kv_heads=1)
    whole = graded(*half, mask, kv_heads=1)
    in_parts()
    assert loops(tokens, 1) == [256]
    parted = graded(*half, mask, kv_heads=1)
    for a, b, c in zip(exact, whole, parted, strict=True):
        once, more = (float(jnp.abs(x.astype(jnp.float32) - a).mean()) for x in (b, c))
        assert more < 1.2 * once


def test_memory_of_a_long_row_is_below_its_scores():
    tokens, heads = 4096, 8
    shape = jax.ShapeDtypeStruct((1, tokens, heads * WIDTH), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, tokens), bool)
    step = jax.grad(lambda q, k, v, m: attention.attention(q, k, v, m, heads=heads).sum(), argnums=(0, 1, 2))
    memory = jax.jit(step).lower(shape, shape, shape, mask).compile().memory_analysis()
    assert memory.temp_size_in_bytes < heads * tokens * tokens * 4


def test_dropout_draws_for_each_part_and_the_same_on_every_mesh(in_parts):
    in_parts(rows=16)
    tokens = 64
    (q, k, v), mask = drawn(tokens, HEADS), masks(tokens)["padding"]
    attend = jax.jit(lambda q, k, v, m, key: attention.attention(q, k, v, m, heads=HEADS, rate=0.5, key=key))
    alike = jnp.broadcast_to(q[:, :1], q.shape)  # queries that differ in nothing but their dropout
    rows = np.asarray(attend(alike, k, v, mask, jax.random.key(0)))[0]
    assert len(np.unique(rows.round(6), axis=0)) == tokens
    one = attend(q, k, v, mask, jax.random.key(0))
    assert not np.array_equal(one, attend(q, k, v, mask, jax.random.key(1)))
    split = NamedSharding(make_mesh(data=2, sequence=4), P("data", "sequence"))
    placed = [jax.device_put(x, split) for x in (q, k, v)]
    np.testing.assert_allclose(attend(*placed, mask, jax.random.key(0)), one, atol=1e-6)
