"""Adapters through the whole spine: labels, step, optimizer, mesh, checkpoint, merge and export."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtransfer import checkpoint, export, load
from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import groups, heads, quantize, swap_head
from jaxtransfer.models import apply, family
from jaxtransfer.parallel import ShardingError, fsdp, make_mesh, shardings
from jaxtransfer.step import params_of
from jaxtransfer.tree import fingerprint, flatten
from jaxtransfer.tree.weights import is_weight
from tests import tiny

KERNELS = r"blocks/\d+/(attention|mlp)/\w+/kernel"
MAKES = {"lora": at.lora(2), "dora": at.dora(2), "ia3": at.ia3()}


def wide():
    """Dimensions that are two of NF4's blocks of 64 at least."""
    source = tiny.source(hidden_size=128, intermediate_size=128, num_hidden_layers=2)
    return dataclasses.replace(
        source, lineage=dataclasses.replace(source.lineage, fingerprints=fingerprint(source.params))
    )


def adapted(make, base=None):
    source = wide()
    if base:
        source = quantize(source, [(KERNELS, base)])
    return at.attach(source, [(KERNELS, make)], jax.random.key(3))


def bases(params):
    return {path: leaf for path, leaf in flatten(params).items() if "@base" in path}


@pytest.mark.parametrize("name", MAKES)
def test_training_moves_the_adapter_and_the_head_and_no_base(name):
    source = adapted(MAKES[name])
    state, frozen, step = tiny.start(source, groups.adapters(source.model))
    trained = set(flatten(state.params))
    assert all("@" in path or path.startswith("head/") for path in trained)
    before = bases(params_of(state, frozen))
    losses = []
    for _ in range(12):
        state, metrics = step(state, frozen, tiny.batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    after = params_of(state, frozen)
    assert tiny.same_bits(bases(after), before)
    tuned = dataclasses.replace(source, params=after)
    got, want = (apply(s.model, s.params, tiny.batch())["logits"] for s in (at.merge(tuned), tuned))
    np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()))


def under_a_head(make, base=None, seed=5):
    """A fresh head and the last layer under adapters of one kind."""
    source = swap_head(wide(), heads.classifier(3), jax.random.key(seed))
    source = quantize(source, [("head/out/kernel", base)]) if base else source
    return at.attach(source, [(r"blocks/1/mlp/\w+/kernel|head/out/kernel", make)], jax.random.key(3))


@pytest.mark.parametrize("base", [None, "int8"])
@pytest.mark.parametrize("name", MAKES)
def test_an_adapted_head_trains_by_its_adapter_and_bias_alone(name, base):
    source = under_a_head(MAKES[name], base)
    state, frozen, step = tiny.start(source, groups.adapters(source.model), tiny.Group(lr=1e-2))
    for _ in range(3):
        state, _ = step(state, frozen, tiny.batch())
    tuned = dataclasses.replace(source, params=params_of(state, frozen))
    before, after = flatten(source.params), flatten(tuned.params)
    moved = {path for path in before if tiny.bits(before[path]) != tiny.bits(after[path])}
    parts = flatten(source.params, is_leaf=is_weight)["head/out/kernel"].trainable
    assert {p for p in moved if p.startswith("head/")} == {"head/out/bias", *(f"head/out/kernel@{p}" for p in parts)}
    got, want = (apply(s.model, s.params, tiny.batch())["logits"] for s in (at.merge(tuned, dequantize=True), tuned))
    np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()))


@pytest.mark.parametrize("base", [None, "int8"])
def test_a_checkpoint_holds_the_frozen_base_of_a_fresh_head(base, tmp_path):
    source = under_a_head(MAKES["lora"], base)
    state, frozen, step = tiny.start(source, groups.adapters(source.model))
    state, _ = step(state, frozen, tiny.batch())
    path = checkpoint.save(tmp_path / "one", state, frozen, source.lineage)
    fresh, still, _ = tiny.start(under_a_head(MAKES["lora"], base, seed=6), groups.adapters(source.model), key=9)
    assert not tiny.same_bits(still, frozen)
    got, kept, _ = checkpoint.restore(path, like=(fresh, still), lineage=source.lineage)
    assert tiny.same_bits(got, state) and tiny.same_bits(kept, frozen)


@pytest.mark.parametrize(
    ("name", "base"), [("lora", None), ("dora", None), ("ia3", None), ("lora", "nf4"), ("lora", "int8")]
)
def test_a_mesh_gives_the_gradients_of_one_device(name, base, devices):
    source = adapted(MAKES[name], base)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rules = (*family("bert").tensor_rules, *fsdp(source.params, mesh))
    places = flatten(shardings(source.params, mesh, rules))
    kernel = "blocks/0/mlp/up/kernel"
    if name == "lora":
        assert places[f"{kernel}@a"].spec == P("fsdp") and places[f"{kernel}@b"].spec == P(None, "tensor")
        assert places[f"{kernel}@scale"].spec == P()
    single, meshed = (
        tiny.start(source, groups.adapters(source.model), tiny.PLAIN, donate=False, **how)
        for how in ({}, {"mesh": mesh, "sharding": rules})
    )
    found = []
    for state, frozen, step in (single, meshed):
        after, _ = step(state, frozen, tiny.batch())
        found.append(tiny.gradients(state, after))
    assert tiny.apart(found[1], found[0]) <= 1e-5


def test_parts_that_do_not_divide_stay_whole_and_packed_ones_are_refused(devices):
    mesh = make_mesh(tensor=8)
    source = at.attach(wide(), [(r"head/out/kernel", at.lora(3))], jax.random.key(0))
    places = flatten(shardings(source.params, mesh, [(r"head/out/kernel", P("tensor", None))]))
    assert places["head/out/kernel@a"].spec == P("tensor") and places["head/out/kernel@b"].spec == P()
    packed = quantize(wide(), [(r"blocks/0/mlp/up/kernel", "nf4")])
    with pytest.raises(ShardingError, match=r"blocks/0/mlp/up/kernel@\w+: a dimension of 2 does not divide"):
        shardings(packed.params, mesh, [(r"blocks/0/mlp/up/kernel", P("tensor", None))])


@pytest.mark.parametrize("base", [None, "nf4"])
def test_a_checkpoint_holds_the_trained_parts_only_and_restores(base, tmp_path):
    source = adapted(MAKES["lora"], base)
    state, frozen, step = tiny.start(source, groups.adapters(source.model))
    state, _ = step(state, frozen, tiny.batch())
    path = checkpoint.save(tmp_path / "one", state, frozen, source.lineage)
    written = {name for name, leaf in checkpoint.metadata(path)["leaves"].items() if leaf["written"]}
    frozen_written = {name for name in written if name.startswith("frozen/")}
    assert all(name.endswith("@scale") for name in frozen_written)
    fresh, still, _ = tiny.start(adapted(MAKES["lora"], base), groups.adapters(source.model), key=9)
    got, kept, _ = checkpoint.restore(path, like=(fresh, still), lineage=source.lineage)
    assert tiny.same_bits(got, state) and tiny.same_bits(kept, frozen)


def test_merged_adapters_export_and_load_again(tmp_path):
    source = adapted(MAKES["lora"])
    state, frozen, step = tiny.start(source, groups.adapters(source.model))
    for _ in range(3):
        state, _ = step(state, frozen, tiny.batch())
    merged = at.merge(dataclasses.replace(source, params=params_of(state, frozen)))
    again = load(export(merged, tmp_path / "out"))
    assert tiny.same_bits(again.params, merged.params)
    assert not any(map(is_weight, jax.tree.leaves(again.params, is_leaf=is_weight)))


def test_lora_plus_and_the_rules_that_are_methods():
    source = adapted(MAKES["lora"])
    plus = set(flatten(tiny.labels_of(source, groups.lora_plus(source.model))).items())
    assert ("blocks/0/mlp/up/kernel@b", "adapter_b") in plus and ("blocks/0/mlp/up/kernel@a", "adapter") in plus
    plain = wide()
    for recipe, part in ((groups.biases, "/bias"), (groups.norms, "norm/")):
        trunk = {p for p, label in flatten(tiny.labels_of(plain, recipe(plain.model))).items() if label == "trunk"}
        assert trunk and all(part in path for path in trunk) and "embed/norm/bias" in trunk
