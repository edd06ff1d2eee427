"""Pools: what several adaptations share is in one tree once, and every row of a batch runs under its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import generate
from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt.pooling import Rows, pool, select
from jaxtransfer.adapt.quantized import quantize
from jaxtransfer.models import apply
from jaxtransfer.tree import flatten
from jaxtransfer.tree.weights import is_weight
from tests.adapt.strategies import KEY, encoder, moved, normal, of, toy, toy_batch
from tests.models import decoder_zoo, zoo

NAMES = ("french", "german", "dutch")
ORDER = ("dutch", "french", "french", "german")
INNER = [(r"blocks/\d/up/kernel", at.lora(2)), (r"blocks/\d/mix/kernel", at.lora(1))]
OUTER = [
    (r"embed/word/embedding", at.lora(2)), (r"embed/patch/kernel", at.ia3()), (r"blocks/\d/up/kernel", at.dora(3)),
    (r"blocks/0/down/kernel", at.vera(4, d=0.5)), (r"blocks/1/down/kernel", at.ia3("input")),
]  # fmt: skip


@functools.cache
def adaptations():
    """Of one base, some of whose kernels are packed: adapters of every kind on every kind of weight, some on others."""
    base = quantize(toy(2), [(r"blocks/\d/up/kernel", "nf4"), (r"blocks/\d/down/kernel", "int8")])
    source = at.attach(at.attach(base, INNER, KEY), OUTER, KEY, name="outer")
    return base, {name: moved(source.params, seed) for seed, name in enumerate(NAMES)}


@jax.jit
def logits(params, batch):
    return apply(toy(2).model, params, batch)["logits"]


def size(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_every_row_runs_under_its_own_adapters_whatever_they_are():
    base, trees = adaptations()
    pooled, batch = pool(trees), toy_batch(len(ORDER))
    got = logits(select(pooled, ORDER), batch)
    alone = {name: logits(tree, batch) for name, tree in trees.items()}
    zoo.assert_close(got, jnp.stack([alone[name][row] for row, name in enumerate(ORDER)]))
    assert all(jnp.abs(alone[a] - alone[b]).max() > 1e-2 for a, b in [NAMES[:2], NAMES[1:]])
    again = logits(select(pooled, np.array([NAMES.index(name) for name in ORDER])), batch)
    assert jnp.array_equal(again, got)
    # The base is there once, and what is in the pool is the adapters'.
    own = sum(size(tree) - size(base.params) for tree in trees.values())
    assert size(pooled) <= size(base.params) + own
    plain = {path: leaf for path, leaf in flatten(base.params).items() if "@" not in path}
    kept = flatten(pooled)
    assert all(kept[path] is flatten(trees["french"])[path] for path in plain.keys() & kept.keys())


def test_positions_may_be_known_to_the_compiled_program_alone():
    _, trees = adaptations()
    pooled, batch = pool(trees), toy_batch(len(ORDER))
    run = jax.jit(lambda ids: apply(toy(2).model, select(pooled, ids), batch)["logits"])
    ids = np.array([NAMES.index(name) for name in ORDER], np.int32)
    zoo.assert_close(run(ids), logits(select(pooled, ORDER), batch))
    zoo.assert_close(run(ids[::-1].copy())[0], logits(trees[ORDER[-1]], batch)[0])
    assert run._cache_size() == 1


def test_dropout_draws_for_each_row():
    tree = at.attach(of({"out": {"kernel": normal(6, 5)}}), [("out/kernel", at.lora(2, dropout=0.5))], KEY).params
    pooled = pool({"one": moved(tree, 1), "two": moved(tree, 2)})
    kernel = select(pooled, [0, 0, 1])["out"]["kernel"]
    x = jnp.broadcast_to(normal(1, 6), (3, 6))
    found = kernel.linear(x, None, jax.random.key(3))
    assert not jnp.allclose(found[0], found[1], atol=1e-3)
    assert jnp.array_equal(kernel.linear(x, None, None)[0], kernel.linear(x, None, None)[1])


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_positions_are_those_of_every_row(name):
    base, batch = encoder(name, zoo.CLASSIFIER), zoo.inputs(len(ORDER))
    source = at.attach(base, [(r"embed/position/embedding|blocks/0/mlp/up/kernel", at.lora(2))], KEY)
    trees = {name: moved(source.params, seed) for seed, name in enumerate(NAMES)}
    run = jax.jit(lambda params: apply(base.model, params, batch)["logits"])
    alone = {name: run(tree) for name, tree in trees.items()}
    zoo.assert_close(run(select(pool(trees), ORDER)), jnp.stack([alone[name][i] for i, name in enumerate(ORDER)]))
    assert jnp.abs(alone["french"] - alone["dutch"]).max() > 1e-2
    with pytest.raises(ValueError, match="a batch of 2 rows has adapters selected for 3"):
        select(pool(trees), NAMES)["embed"]["position"]["embedding"].take(batch["input_ids"][:2], jnp.float32)


def test_one_batch_of_requests_is_continued_under_several_adapters():
    model, params = decoder_zoo.tiny("llama")
    base = dataclasses.replace(of(params), model=model)
    rules = [(r"blocks/\d+/(attention|mlp)/\w+/kernel", at.lora(2))]
    trees = {name: moved(at.attach(base, rules, KEY).params, seed) for seed, name in enumerate(NAMES[:2])}
    ids = np.array([[5, 6, 7], [5, 6, 7], [8, 3, 2]], np.int32)
    whose = ("german", "french", "german")
    got = np.asarray(generate(model, select(pool(trees), whose), ids, max_new_tokens=4))
    alone = {name: np.asarray(generate(model, tree, ids, max_new_tokens=4)) for name, tree in trees.items()}
    np.testing.assert_array_equal(got, [alone[name][row] for row, name in enumerate(whose)])
    assert not np.array_equal(got[0], got[1])


@pytest.fixture
def trees():
    source = of({"out": {"kernel": normal(6, 5), "bias": jnp.zeros(5)}})
    return {name: at.attach(source, [("out/kernel", at.lora(2))], jax.random.key(i)).params
            for i, name in enumerate(NAMES[:2])}  # fmt: skip


def test_what_cannot_be_pooled_is_named(trees):
    def attached(make, kernel=None):
        source = of({"out": {"kernel": normal(6, 5) if kernel is None else kernel, "bias": jnp.zeros(5)}})
        return at.attach(source, [("out/kernel", make)], KEY).params

    french = trees["french"]
    more = {"out": french["out"], "more": jnp.zeros(1)}
    other_bias = {"out": {**french["out"], "bias": jnp.ones(5)}}
    for others, message in (
        ({}, "no adapter tells 'french' apart"),
        ({"german": more}, "more is in one of 'french' and 'german' only"),
        ({"german": other_bias}, "out/bias: differs between 'french' and another, and is no adapter in both"),
        ({"german": attached(at.lora(3))}, r"'french' has LoRA\(a \(6, 2\).*, and 'german' has LoRA\(a \(6, 3\)"),
        ({"german": attached(at.dora(2))}, r"'german' has DoRA\(.*; a pool is of one form"),
        ({"german": attached(at.lora(2), normal(6, 5, seed=1))}, "out/kernel: its base differs between 'french' and"),
    ):
        with pytest.raises(at.AdapterError, match=message):
            pool({"french": french, **others})
    with pytest.raises(at.AdapterError, match="pool: no trees to pool"):
        pool({})


def test_what_cannot_be_selected_is_named(trees):
    pooled = pool(trees)
    for params, ids, message in (
        (trees["french"], [0], "select: nothing is pooled"),
        (select(pooled, [0, 1]), [0], "select: nothing is pooled"),
        (pooled, ["french", "greek"], "the pool of french, german has no 'greek'"),
        (pooled, [0, 2], "has no 2"),
        (pooled, [-1], "has no -1"),
        (pooled, [0.0, 1.0], r"ids are \(B,\) integers or names, got float64 of shape \(2,\)"),
        (pooled, [[0, 1]], r"got int64 of shape \(1, 2\)"),
    ):
        with pytest.raises(at.AdapterError, match=message):
            select(params, ids)


def test_a_pool_is_no_model_until_rows_have_chosen(trees):
    kernel = pool(trees)["out"]["kernel"]
    assert isinstance(kernel, Rows) and is_weight(kernel) and (kernel.shape, kernel.dtype) == ((6, 5), jnp.float32)
    with pytest.raises(TypeError, match=r"french, german are pooled: select\(params, ids\) says which is whose"):
        kernel.linear(normal(2, 6), None, None)
    with pytest.raises(TypeError, match="french, german are pooled, and stand for no one array"):
        kernel.materialize()
