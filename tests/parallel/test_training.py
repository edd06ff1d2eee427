"""One program on one device and on meshes: the same numbers, each array where its rule says."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt import groups
from jaxtransfer.models import family
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.optim import Group
from jaxtransfer.parallel import fsdp, make_mesh, shardings
from jaxtransfer.step import init_state, make_eval, make_step, params_of, shard_batch
from jaxtransfer.tree import flatten
from tests import tiny

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "data-fsdp": {"data": 2, "fsdp": 4},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor": {"data": 4, "tensor": 2},
}
RECIPES = {"full": groups.full, "last": lambda model: groups.last(model, 2)}
# At these rates the loss falls by a fifth in 20 steps whatever trains.
OPTIMIZERS = {"sgd": Group("sgd", lr=0.03, weight_decay=0.0), "adamw": Group("adamw", lr=1e-3)}


def placed(src, mesh):
    """Rules for a mesh that shard all that can be."""
    tensor = family("bert").tensor_rules if mesh.shape["tensor"] > 1 else ()
    return (*tensor, *fsdp(src.params, mesh, min_size=32))


def train(optimizer, recipe, mesh=None, *, steps=20, **options):
    """The losses of some steps on one batch; the first gradient of all that trains, where `sgd` keeps it."""
    src = tiny.source()
    rules = () if mesh is None else placed(src, mesh)
    state, frozen, step = tiny.start(
        src, RECIPES[recipe](src.model), OPTIMIZERS[optimizer], mesh=mesh, sharding=rules, clip=5.0, **options
    )
    batch, losses, first = shard_batch(tiny.batch(), mesh), [], {}
    for i in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        if i == 0 and optimizer == "sgd":  # its momentum starts as the gradient
            first = {path: np.asarray(leaf) for path, leaf in flatten(state.opt_state).items()}
    return np.array(losses), first, state, frozen


@functools.cache
def reference(optimizer, recipe):
    return train(optimizer, recipe)[:2]


def check(optimizer, recipe, axes):
    wanted, gradient = reference(optimizer, recipe)
    losses, first, state, _ = train(optimizer, recipe, make_mesh(**MESHES[axes]))
    assert wanted[-1] < 0.8 * wanted[0]
    assert np.abs(losses / wanted - 1).max() < 1e-5
    if gradient:
        assert tiny.apart(first, gradient) < 1e-5
    return state


@pytest.mark.parametrize(
    ("optimizer", "recipe", "axes"),
    [("sgd", "full", "data"), ("adamw", "full", "fsdp"), ("sgd", "full", "all"), ("adamw", "last", "all")],
)
def test_a_mesh_changes_no_number(devices, optimizer, recipe, axes, capfd):
    check(optimizer, recipe, axes)
    # XLA says so where it must replicate a batch to split it another way.
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("recipe", ["full", "last"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_mesh_changes_a_number(devices, optimizer, recipe, axes, capfd):
    check(optimizer, recipe, axes)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_gradients_and_states_are_sharded_as_parameters(devices):
    src, mesh = tiny.source(), make_mesh(**MESHES["all"])
    rules, seen = placed(src, mesh), {}
    labels = tiny.labels_of(src, groups.last(src.model, 2))
    inner = tiny.transform(labels, Group("adamw", lr=1e-3), clip=1.0)

    def update(grads, state, params=None, **extra):
        for path, leaf in flatten(grads).items():
            jax.debug.inspect_array_sharding(leaf, callback=lambda where, path=path: seen.update({path: where}))
        return inner.update(grads, state, params, **extra)

    tx = optax.GradientTransformationExtraArgs(inner.init, update)
    state, frozen = init_state(src.model, src.params, labels, tx, jax.random.key(2), mesh=mesh, sharding=rules)
    wanted = flatten(shardings(state.params, mesh, [(*rule[:2], True) for rule in rules]))
    before = {path: leaf.sharding for path, leaf in flatten(state).items()}
    still = {path: leaf.sharding for path, leaf in flatten(frozen).items()}
    step = make_step(src.model, cross_entropy(), tx, mesh=mesh, sharding=rules)
    state, _ = step(state, frozen, shard_batch(tiny.batch(), mesh))

    assert {path: leaf.sharding for path, leaf in flatten(state.params).items()} == wanted
    assert wanted["blocks/2:4/mlp/up/kernel"].spec == P(None, "fsdp", "tensor")
    assert seen.keys() == wanted.keys()
    assert all(seen[path].is_equivalent_to(wanted[path], leaf.ndim) for path, leaf in flatten(state.params).items())
    # As they came, so that the next step is the same program and reuses the buffers.
    assert {path: leaf.sharding for path, leaf in flatten(state).items()} == before
    assert {path: leaf.sharding for path, leaf in flatten(frozen).items()} == still
    assert any("fsdp" in str(where.spec) for where in still.values())
    assert tiny.same_bits(frozen, init_state(src.model, src.params, labels, tx, jax.random.key(2))[1])


def test_accumulation_and_evaluation_on_a_mesh(devices):
    mesh = make_mesh(**MESHES["data"])
    wanted = reference("sgd", "full")[1]
    _, first, state, frozen = train("sgd", "full", mesh, steps=1, accumulate=2)
    assert tiny.apart(first, wanted) < 1e-5
    src, batch = tiny.source(), tiny.batch()
    evaluate = make_eval(src.model, mesh=mesh, sharding=placed(src, mesh))
    logits = evaluate(state, frozen, shard_batch(batch, mesh))["logits"]
    assert logits.sharding.is_fully_replicated and logits.shape == (16, 3)
    alone = jax.tree.map(np.asarray, params_of(state, frozen))
    labels = tiny.labels_of(src, groups.full(src.model))
    state, frozen = init_state(src.model, alone, labels, tiny.transform(labels), jax.random.key(0))
    assert np.allclose(logits, make_eval(src.model)(state, frozen, batch)["logits"], atol=1e-5)


def test_shard_batch(devices):
    mesh, batch = make_mesh(data=2, fsdp=4), tiny.batch()
    found = shard_batch(batch, mesh)
    assert all(leaf.sharding == NamedSharding(mesh, P(("data", "fsdp"))) for leaf in found.values())
    assert all(np.array_equal(found[name], batch[name]) for name in batch)
    assert shard_batch(batch, None) is batch
