"""Adapters: unchanged at the start, merged equals factored, gradients to the parts alone, on every kind of kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt.adapter_types import IA3, DoRA, LoRA, column_norm
from jaxtransfer.models import apply, layout_of
from jaxtransfer.tree import combine, flatten, partition, stack
from jaxtransfer.tree.rules import RuleError
from jaxtransfer.tree.weights import Window, conv, is_weight, linear, take, transpose
from jaxtransfer.types import Lineage, Model, Source
from tests.models import zoo

KEY = jax.random.key(0)
MAKES = {
    "lora": at.lora(3, alpha=6),
    "rslora": at.lora(3, alpha=6, rank_stabilized=True),
    "dora": at.dora(3),
    "ia3": at.ia3(),
    "ia3-input": at.ia3("input"),
}


def source(**kernels):
    params = {
        name: {"kernel": value, "bias": jnp.arange(value.shape[-1], dtype=value.dtype)}
        for name, value in kernels.items()
    }
    return Source(Model("foreign", None, (), {}), params, Lineage("memory", ""))


def moved(node, seed=1):
    """An adapter after some training: every trainable part has moved."""
    keys = jax.random.split(jax.random.key(seed), len(node.trainable))
    return dataclasses.replace(
        node, **{part: getattr(node, part) + 0.3 * jax.random.normal(k, getattr(node, part).shape)
                 for part, k in zip(node.trainable, keys, strict=True)}
    )  # fmt: skip


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_dense_kernel_is_unchanged_at_the_start_and_merges(make):
    x, w, b = normal(2, 5, 7), normal(7, 4, seed=1), normal(4, seed=2)
    start = make("w/kernel", w, KEY, "default")
    np.testing.assert_allclose(
        linear(x, start, b), linear(x, w, b), rtol=0, atol=0 if make is not MAKES["dora"] else 1e-6
    )
    adapter = moved(start)
    bias = adapter.merged_bias(b) if isinstance(adapter, IA3) else b
    zoo.assert_close(linear(x, adapter, b), linear(x, adapter.materialize(), bias))
    assert not jnp.allclose(linear(x, adapter, b), linear(x, w, b), atol=1e-2)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_convolution_is_unchanged_at_the_start_and_merges(make):
    how = Window((2, 1), ((1, 1), (0, 1)))
    x, w, b = normal(2, 6, 5, 4), normal(3, 2, 4, 6, seed=1), normal(6, seed=2)
    start = make("w/kernel", w, KEY, "default")
    zoo.assert_close(conv(x, start, b, how=how), conv(x, w, b, how=how), 1e-6)
    adapter = moved(start)
    bias = adapter.merged_bias(b) if isinstance(adapter, IA3) else b
    zoo.assert_close(conv(x, adapter, b, how=how), conv(x, adapter.materialize(), bias, how=how))


def test_an_embedding_takes_lora_and_a_tied_head_reads_it():
    table, ids = normal(11, 6), jnp.array([[1, 2, 10], [0, 0, 3]])
    start = at.lora(2)("e/embedding", table, KEY, "default")
    assert jnp.array_equal(take(start, ids), take(table, ids))
    adapter = moved(start)
    whole = adapter.materialize()
    zoo.assert_close(take(adapter, ids), take(whole, ids))
    x = normal(2, 3, 6, seed=4)
    zoo.assert_close(linear(x, transpose(adapter)), linear(x, whole.T))


def test_dora_is_the_paper_s_equation_and_its_norm_has_no_gradient():
    x, w = normal(5, 7), normal(7, 4, seed=1)
    adapter = moved(at.dora(3, alpha=2)("w/kernel", w, KEY, "default"))
    v = w + adapter.scale * adapter.a @ adapter.b
    np.testing.assert_allclose(
        column_norm(w, adapter.a, adapter.b, adapter.scale), jnp.linalg.norm(v, axis=0), rtol=1e-5
    )
    zoo.assert_close(linear(x, adapter), x @ (v / jnp.linalg.norm(v, axis=0, keepdims=True) * adapter.magnitude[None]))

    def ours(b):
        return jnp.sum(linear(x, dataclasses.replace(adapter, b=b)) ** 2)

    def paper(b):
        v = w + adapter.scale * adapter.a @ b
        norm = jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0, keepdims=True))
        return jnp.sum((x @ (v / norm * adapter.magnitude[None])) ** 2)

    zoo.assert_close(jax.grad(ours)(adapter.b), jax.grad(paper)(adapter.b))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dora_leaves_a_column_of_zeros_as_it_is_and_has_finite_gradients(rate):
    x, w, b = normal(5, 7), normal(7, 4, seed=1).at[:, 2].set(0.0), normal(4, seed=2)
    start = at.dora(3, dropout=rate)("w/kernel", w, KEY, "default")
    zoo.assert_close(linear(x, start, b, KEY), linear(x, w, b), 1e-6)
    assert jnp.array_equal(linear(x, start, b)[:, 2], linear(x, w, b)[:, 2])
    tuned = moved(start)  # V may be zero where m is not
    for node in (start, tuned, dataclasses.replace(tuned, b=tuned.b.at[:, 2].set(0.0))):
        zoo.assert_close(linear(x, node, b), linear(x, node.materialize(), b))
        grads = jax.grad(lambda node: jnp.sum(jnp.sin(linear(x, node, b, KEY))))(node)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_norm_of_columns_that_cancel_is_a_number():
    a, b = normal(512, 3), normal(3, 64, seed=1)
    assert jnp.isfinite(column_norm(-a @ b, a, b, jnp.float32(1.0))).all()


def test_dropout_acts_on_the_low_rank_path_alone_and_needs_a_key():
    x, w = normal(64, 7), normal(7, 4, seed=1)
    adapter = moved(at.lora(3, dropout=0.5)("w/kernel", w, KEY, "default"))
    assert jnp.array_equal(linear(x, adapter), linear(x, dataclasses.replace(adapter, rate=0.0)))
    dropped = linear(x, adapter, None, jax.random.key(1))
    assert not jnp.allclose(dropped, linear(x, adapter), atol=1e-3)
    many = jnp.stack([linear(x, adapter, None, jax.random.key(i)) for i in range(400)])
    np.testing.assert_allclose(many.mean((0, 1)), linear(x, adapter).mean(0), atol=0.05)


RULES = [(r"blocks/\d+/attention/(query|value)/kernel", at.lora(2)), (r"blocks/3/mlp/up/kernel", at.dora(2)),
         (r"blocks/\d+/mlp/down/kernel", at.ia3("input")), (r"embed/word/embedding", at.lora(1))]  # fmt: skip


def adapted():
    model, params = zoo.tiny()
    return at.attach(Source(model, params, Lineage("memory", "")), RULES, KEY)


def test_attached_to_a_model_scanned_and_unrolled_merged_and_factored_agree():
    model, params = zoo.tiny()
    start = adapted()
    plain = apply(model, params, zoo.inputs())["logits"]
    zoo.assert_close(apply(model, start.params, zoo.inputs())["logits"], plain, 1e-6)
    tuned = dataclasses.replace(
        start, params=jax.tree.map(lambda n: moved(n) if is_weight(n) else n, start.params, is_leaf=is_weight)
    )
    want = apply(model, tuned.params, zoo.inputs())["logits"]
    assert not jnp.allclose(want, plain, atol=1e-3)
    laid = stack(tuned.params, layout_of(model, tuned.params))
    zoo.assert_close(apply(model, laid, zoo.inputs())["logits"], want)
    merged = at.merge(tuned)
    assert not any(map(is_weight, jax.tree.leaves(merged.params, is_leaf=is_weight)))
    zoo.assert_close(apply(model, merged.params, zoo.inputs())["logits"], want)
    kept = at.merge(tuned, keep=True)
    zoo.assert_close(apply(model, kept.params, zoo.inputs())["logits"], want)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, at.unmerge(kept).params, tuned.params))


def test_gradients_flow_to_the_trainable_parts_only():
    model, _ = zoo.tiny()
    tree = adapted().params
    trainable = {f"{path}@{part}" for path, node in flatten(tree, is_leaf=is_weight).items() if is_weight(node)
                 for part in node.trainable}  # fmt: skip
    train, frozen = partition(tree, lambda path: path in trainable)
    grads = jax.jit(jax.grad(lambda t: jnp.sum(apply(model, combine(t, frozen), zoo.inputs())["logits"] ** 2)))(train)
    assert set(flatten(grads)) == trainable


def test_each_leaf_draws_from_its_own_path():
    model, params = zoo.tiny()
    whole, part = adapted().params, at.attach(Source(model, params, Lineage("memory", "")), RULES[:1], KEY).params
    one, other = (p["blocks"]["2"]["attention"]["query"]["kernel"].a for p in (whole, part))
    assert jnp.array_equal(one, other)
    assert not jnp.array_equal(one, whole["blocks"]["1"]["attention"]["query"]["kernel"].a)


def test_adapters_stack_by_name():
    src = source(w=normal(7, 4))
    once = at.attach(src, [("w/kernel", at.lora(2))], KEY)
    twice = at.attach(once, [("w/kernel", at.dora(1))], KEY, name="second")
    node = twice.params["w"]["kernel"]
    assert at.names_of(node) == ("second", "default") and isinstance(node, DoRA) and isinstance(node.base, LoRA)
    tuned = dataclasses.replace(moved(node), base=moved(node.base, 5))
    x = normal(3, 7, seed=3)
    zoo.assert_close(linear(x, tuned), linear(x, tuned.materialize()))
    with pytest.raises(at.AdapterError, match="w/kernel: has an adapter called 'default' already"):
        at.attach(twice, [("w/kernel", at.lora(1))], KEY)


def test_rows_of_a_batch_run_under_adapters_of_their_own():
    src = source(w=normal(7, 4))
    trees = {}
    for i, name in enumerate(("one", "two", "three")):
        tree = at.attach(src, [("w/kernel", at.lora(2, alpha=i + 1))], jax.random.key(i)).params
        trees[name] = {"w": {**tree["w"], "kernel": moved(tree["w"]["kernel"], i)}}
    pooled = at.pool(trees)
    x, ids = normal(4, 5, 7, seed=9), jnp.array([2, 0, 1, 2])
    got = linear(x, at.select(pooled, ids)["w"]["kernel"])
    want = jnp.stack([linear(x[i], list(trees.values())[ids[i]]["w"]["kernel"]) for i in range(4)])
    zoo.assert_close(got, want)
    with pytest.raises(ValueError, match="a batch of 3 rows has adapters selected for 4"):
        linear(x[:3], at.select(pooled, ids)["w"]["kernel"])
    with pytest.raises(at.AdapterError, match=r"w/kernel: differs between 'one'"):
        at.pool({"one": trees["one"], "plain": src.params})


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (
            [("w/kernel", at.lora(5))],
            at.AdapterError,
            r"w/kernel: rank 5 is above the smaller side of its shape \(7, 4\) \(chosen by rule 'w/kernel'\)",
        ),
        (
            [("w/kernel", None), (".*", at.lora(2))],
            at.AdapterError,
            r"[vw]/bias: a leaf of shape \(4,\) takes no adapter.*/kernel \(chosen by rule '\.\*', as 1 more\)",
        ),
        ([("x/kernel", at.lora(2))], RuleError, "matches none"),
    ],
)
def test_bad_rules(rules, error, message):
    with pytest.raises(error, match=message):
        at.attach(source(w=normal(7, 4), v=normal(7, 4)), rules, KEY)


def test_bad_options():
    for call in (
        lambda: at.lora(0),
        lambda: at.lora(2, dropout=1.0),
        lambda: at.lora(2, alpha=-1),
        lambda: at.lora(2, alpha=float("nan")),
        lambda: at.dora(2, alpha=float("inf")),
        lambda: at.ia3("x"),
    ):
        with pytest.raises(at.AdapterError):
            call()
    with pytest.raises(at.AdapterError, match="there are no adapters"):
        at.merge(source(w=normal(7, 4)))
    with pytest.raises(at.AdapterError, match="not defined on embeddings"):
        at.dora(1)("e/embedding", normal(11, 6), KEY, "default")
