"""VeRA: the paper's equation around matrices that are in the tree once, whatever the layers' shapes."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtransfer import checkpoint, heads, swap_head
from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import groups
from jaxtransfer.adapt.vera import VeRA
from jaxtransfer.models import apply, layout_of
from jaxtransfer.parallel import fsdp, make_mesh, shardings
from jaxtransfer.step import params_of
from jaxtransfer.tree import TreeError, fingerprint, flatten, stack
from jaxtransfer.tree.weights import linear, shares, with_shared
from jaxtransfer.types import Lineage, Model, Source
from tests import tiny
from tests.models import zoo

KEY = jax.random.key(0)
KERNELS = r"blocks/\d+/(attention|mlp)/\w+/kernel"
RULES = [(KERNELS, at.vera(5))]
A, B = "shared/vera/default/a", "shared/vera/default/b"


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def plain(**kernels):
    return Source(Model("foreign", None, (), {}), {n: {"kernel": w} for n, w in kernels.items()}, Lineage("memory", ""))


def trained(source):
    def move(node):
        gains = {part: getattr(node, part) for part in node.trainable}
        return dataclasses.replace(node, **{p: x + 0.5 * normal(*x.shape, seed=len(p)) for p, x in gains.items()})

    params = jax.tree.map(lambda x: move(x) if shares(x) else x, source.params, is_leaf=shares)
    return dataclasses.replace(source, params=params)


def logits(source, params=None):
    run = jax.jit(lambda p: apply(source.model, p, zoo.inputs())["logits"])
    return run(source.params if params is None else params)


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=2), rank=st.integers(1, 12)
)
def test_it_is_the_paper_s_equation_cut_from_matrices_of_the_largest_size(shapes, rank):
    source = plain(**{f"w{i}": normal(*shape, seed=i) for i, shape in enumerate(shapes)})
    start = at.attach(source, [(r"w\d/kernel", at.vera(rank, d=0.3))], KEY)
    shared = start.params["shared"]["vera"]["default"]
    assert shared["a"].shape == (max(i for i, _ in shapes), rank) and shared["b"].shape == (
        rank,
        max(o for _, o in shapes),
    )
    for i, (inputs, outputs) in enumerate(shapes):
        x, w, bias = normal(3, inputs, seed=9), source.params[f"w{i}"]["kernel"], normal(outputs, seed=8)
        first = with_shared(start.params[f"w{i}"]["kernel"], start.params["shared"])
        assert jnp.array_equal(linear(x, first, bias), linear(x, w, bias))
        node = with_shared(trained(start).params[f"w{i}"]["kernel"], start.params["shared"])
        low = shared["a"][:inputs] @ jnp.diag(node.d) @ shared["b"][:, :outputs] @ jnp.diag(node.b)
        zoo.assert_close(linear(x, node, bias), x @ (w + low) + bias[None])
        zoo.assert_close(node.materialize(), w + low)
    merged = at.merge(trained(start))
    assert "shared" not in merged.params and not any(map(shares, jax.tree.leaves(merged.params, is_leaf=shares)))


def attached():
    model, params = zoo.tiny()
    return at.attach(Source(model, params, Lineage("memory", "", fingerprints=fingerprint(params))), RULES, KEY)


def test_scanned_unrolled_merged_and_kept_agree_and_the_matrices_are_neither_stacked_nor_repeated():
    start = attached()
    zoo.assert_close(logits(start), logits(start, zoo.tiny()[1]), 1e-6)
    source = trained(start)
    want = logits(source)
    assert jnp.abs(want - logits(start)).max() > 1e-3
    laid = stack(source.params, layout_of(source.model, source.params))
    big = [path for path, leaf in flatten(laid).items() if leaf.shape[-2:] in ((12, 5), (5, 12))]
    assert big == [A, B] and laid["shared"]["vera"]["default"]["a"].ndim == 2
    zoo.assert_close(logits(source, laid), want)
    zoo.assert_close(logits(at.merge(source)), want)
    kept = at.merge(source, keep=True)
    zoo.assert_close(logits(kept), want)
    assert tiny.same_bits(at.unmerge(kept).params, source.params)


def test_it_stacks_on_other_adapters_and_on_itself_by_name():
    model, params = zoo.tiny()
    source = at.attach(Source(model, params, Lineage("memory", "")), RULES, KEY)
    source = at.attach(source, [(KERNELS, at.lora(2))], KEY, name="low")
    source = trained(at.attach(source, [(KERNELS, at.vera(3))], KEY, name="second"))
    assert {"default", "second"} == set(source.params["shared"]["vera"])
    zoo.assert_close(logits(at.merge(source)), logits(source))
    assert "shared" in swap_head(source, heads.classifier(2), KEY).params
    last = at.attach(source, [(KERNELS, at.dora(2))], KEY, name="last")
    assert shares(last.params["blocks"]["0"]["mlp"]["up"]["kernel"].base)
    assert not last.params["blocks"]["0"]["mlp"]["up"]["kernel"].base.shared, "the matrices are in the tree once"
    zoo.assert_close(logits(last), logits(source))


def test_training_moves_the_gains_alone_and_a_checkpoint_leaves_the_matrices_to_the_key(tmp_path):
    base = tiny.source()
    known = dataclasses.replace(base, lineage=dataclasses.replace(base.lineage, fingerprints=fingerprint(base.params)))
    source = at.attach(known, [(KERNELS, at.vera(8))], KEY)
    state, frozen, step = tiny.start(source, groups.adapters(source.model), tiny.Group(lr=1e-2))
    assert all(path.endswith(("@d", "@b")) or path.startswith("head/") for path in flatten(state.params))
    before = jax.tree.map(jnp.copy, frozen)
    losses = []
    for _ in range(8):
        state, metrics = step(state, frozen, tiny.batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and tiny.same_bits(frozen, before)
    moved = flatten(params_of(state, frozen))
    assert jnp.abs(moved["blocks/0/mlp/up/kernel@b"]).max() > 0
    path = checkpoint.save(tmp_path / "one", state, frozen, source.lineage)
    leaves = checkpoint.metadata(path)["leaves"]
    assert not [name for name, leaf in leaves.items() if name.startswith("frozen/") and leaf["written"]]
    again = at.attach(known, [(KERNELS, at.vera(8))], KEY)
    fresh, still, _ = tiny.start(again, groups.adapters(source.model), tiny.Group(lr=1e-2), key=9)
    got, kept, _ = checkpoint.restore(path, like=(fresh, still), lineage=source.lineage)
    assert tiny.same_bits(got, state) and tiny.same_bits(kept, frozen)
    other = at.attach(known, [(KERNELS, at.vera(8))], jax.random.key(1))
    fresh, still, _ = tiny.start(other, groups.adapters(source.model), tiny.Group(lr=1e-2), key=9)
    with pytest.raises(checkpoint.CheckpointError, match=f"{A}.*not bit-identical"):
        checkpoint.restore(path, like=(fresh, still), lineage=source.lineage)
    assert any(", key [0, 0]" in note for note in source.lineage.operations)


def test_a_mesh_gives_the_gradients_of_one_device(devices):
    source = at.attach(tiny.source(), [(KERNELS, at.vera(8))], KEY)
    source = trained(source)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rules = ((r"blocks/\d+/mlp/up/kernel", P("fsdp", "tensor")), *fsdp(source.params, mesh, min_size=64))
    places = flatten(shardings(source.params, mesh, rules))
    assert places["blocks/0/mlp/up/kernel@b"].spec == P("tensor") and places["blocks/0/mlp/up/kernel@d"].spec == P()
    assert places[A].spec == P("fsdp")
    found = []
    for how in ({}, {"mesh": mesh, "sharding": rules}):
        state, frozen, step = tiny.start(source, groups.adapters(source.model), tiny.PLAIN, donate=False, **how)
        after, _ = step(state, frozen, tiny.batch())
        found.append(tiny.gradients(state, after))
    assert tiny.apart(found[1], found[0]) <= 1e-5


def test_dropout_acts_on_the_adapter_alone_and_needs_a_key():
    source = trained(at.attach(plain(w=normal(7, 4)), [("w/kernel", at.vera(6, dropout=0.5))], KEY))
    node = with_shared(source.params["w"]["kernel"], source.params["shared"])
    x = normal(9, 7, seed=4)
    assert jnp.array_equal(linear(x, node), linear(x, dataclasses.replace(node, rate=0.0)))
    assert not jnp.allclose(linear(x, node, None, jax.random.key(1)), linear(x, node), atol=1e-3)
    still = dataclasses.replace(node, b=jnp.zeros(4))
    assert jnp.array_equal(linear(x, still, None, jax.random.key(1)), linear(x, node.base))


def test_what_does_not_fit_is_refused_by_name():
    source = plain(w=normal(7, 4), v=normal(3, 9))
    for call, message in (
        (lambda: at.vera(0), "rank must be 1 or more"),
        (lambda: at.vera(2, d=0.0), "d finite and not zero"),
        (lambda: at.vera(2, d=float("nan")), "d finite and not zero; got 2, 0.0, nan"),
        (lambda: at.attach(source, [("w/kernel", at.vera(2)), (".*", at.vera(3))], KEY), r"one rank, these.*\[2, 3\]"),
        (lambda: at.attach(at.attach(source, [("w/kernel", at.vera(2))], KEY), [("v/kernel", at.vera(2))], KEY),
         "there is one called 'default' already"),
        (lambda: at.vera(2)("e/embedding", normal(4, 3), KEY, "x"), "e/embedding: VeRA is .* of kind embedding"),
        (lambda: at.vera(2)("c/kernel", normal(2, 2, 4, 3), KEY, "x"), "c/kernel: VeRA is .* of kind conv"),
    ):  # fmt: skip
        with pytest.raises(at.AdapterError, match=message):
            call()
    tree = attached()
    lost = {name: node for name, node in tree.params.items() if name != "shared"}
    with pytest.raises(TypeError, match="VeRA 'default' needs its matrices, shared/vera/default/a and b"):
        apply(tree.model, lost, zoo.inputs())
    with pytest.raises(TreeError, match="no stage of the model owns or reads shared/vera/other/a"):
        more = {"vera": {**tree.params["shared"]["vera"], "other": {"a": np.zeros(2)}}}
        apply(tree.model, {**tree.params, "shared": more}, zoo.inputs())
    node = VeRA(normal(7, 4), jnp.ones(2), jnp.ones(4), shared={"a": normal(5, 2), "b": normal(2, 4)})
    with pytest.raises(TypeError, match=r"of rank 2 on 7 x 4 does not fit its matrices, \(5, 2\)"):
        node.materialize()
