"""Running statistics in training: as torch moves them, in order, only where their layer trains, on any mesh."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import groups
from jaxtransfer.models import apply, family
from jaxtransfer.models.api import abstract_init
from jaxtransfer.models.layers import BatchNorm
from jaxtransfer.models.names import turn
from jaxtransfer.optim import Group
from jaxtransfer.parallel import fsdp, make_mesh
from jaxtransfer.step import init_state, make_eval, params_of, shard_batch
from jaxtransfer.tree import flatten, unstack
from tests import tiny, torch_reference
from tests.models import vision_zoo, zoo

RAW = {"embedding_size": 6, "hidden_sizes": (8, 12), "depths": (1, 3), "layer_type": "basic"}
# Over ten steps, against torch in train mode: of a loss, and of how far a leaf has moved (1e-3 would be allowed).
LOSS, MOVED = 1e-5, 2e-4
SGD = Group("sgd", lr=0.05, weight_decay=0.0, momentum=0.9)


def source():
    return vision_zoo.tiny("resnet", **RAW)


def batch(rows=8, seed=0):
    images = vision_zoo.images(rows, 21, 18, seed=seed)
    labels = np.random.default_rng(seed).integers(0, 3, rows).astype(np.int32)
    return {"pixel_values": images, "labels": labels, "weight": np.ones(rows, np.float32)}


def is_statistic(path):
    return path.endswith(("/mean", "/var", "/count"))


def statistics(params):
    """The statistics of a tree, laid out or not, by canonical path."""
    flat = flatten(unstack(params))
    return {path: np.asarray(leaf) for path, leaf in flat.items() if is_statistic(path)}


@functools.cache
def full():
    """A step of the whole model: ``(state, frozen, step)``; nothing is donated."""
    return tiny.start(source(), None, SGD, donate=False)


# Against torch


def ours_of(model, torch_model):
    """The tensors of a torch model by our paths, as they are stored and by kind."""
    stored = {name: tensor.detach().numpy().copy() for name, tensor in torch_model.state_dict().items()}
    table = family("resnet").names(model)
    plan = table.load_plan(stored, list(flatten(abstract_init(model))))
    return {path: turn(stored[name], how) for path, (name, how) in plan.used.items()}


def torch_run(theirs, batches):
    """Train-mode SGD in torch over the batches: the losses."""
    import torch

    theirs.train()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=SGD.lr, momentum=SGD.momentum)
    losses = []
    with torch_reference.plain_convolutions():
        for rows in batches:
            logits = theirs(torch_reference.tensor(rows["pixel_values"])).logits
            loss = torch.nn.functional.cross_entropy(logits, torch_reference.tensor(rows["labels"]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return np.array(losses)


@pytest.mark.torch
@pytest.mark.parametrize("layer_type", ["basic", pytest.param("bottleneck", marks=pytest.mark.slow)])
def test_ten_steps_are_torch_s(layer_type):
    theirs, src = vision_zoo.from_torch("resnet", depths=(1, 3), layer_type=layer_type)
    theirs, batches = copy.deepcopy(theirs), [batch(seed=seed) for seed in range(10)]
    start = ours_of(src.model, theirs)
    wanted = torch_run(theirs, batches)
    state, frozen, step = tiny.start(src, None, SGD)
    losses = []
    for rows in batches:
        state, metrics = step(state, frozen, rows)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, wanted, rtol=LOSS)
    after = ours_of(src.model, theirs)
    found = {path: np.asarray(leaf) for path, leaf in flatten(params_of(state, frozen)).items()}
    for path, leaf in after.items():
        if path.endswith("/count"):
            assert found[path] == leaf == start[path] + 10
            continue
        moved = np.linalg.norm(leaf - start[path])
        assert np.linalg.norm(found[path] - leaf) <= MOVED * moved, path


@pytest.mark.torch
def test_microbatches_move_them_in_order():
    """As two forward passes of torch, over every second row and then over the others."""
    theirs, src = vision_zoo.from_torch("resnet", depths=(1, 3), layer_type="basic")
    theirs, rows = copy.deepcopy(theirs).train(), batch()
    state, frozen, step = tiny.start(src, None, SGD, accumulate=2)
    state, _ = step(state, frozen, rows)
    torch_reference.outputs(theirs, {"pixel_values": rows["pixel_values"][0::2]})
    torch_reference.outputs(theirs, {"pixel_values": rows["pixel_values"][1::2]})
    wanted = ours_of(src.model, theirs)
    for path, leaf in statistics(state.stats).items():
        zoo.assert_close(leaf, wanted[path], 1e-5)


# What moves and what does not


def test_all_of_them_move_where_everything_trains():
    state, frozen, step = full()
    assert not jax.tree.leaves(frozen) and not any(map(is_statistic, flatten(state.params)))
    before, (after, _) = statistics(state.stats), step(state, frozen, batch())
    found = statistics(after.stats)
    assert found.keys() == {path for path in flatten(source().params) if is_statistic(path)}
    assert all(found[path].dtype == leaf.dtype for path, leaf in before.items())
    assert all(found[path] == leaf + 1 for path, leaf in before.items() if path.endswith("count"))
    assert all(np.abs(found[path] - leaf).min() > 0 for path, leaf in before.items())
    # They are no part of what is optimised: no momentum, and no decay.
    assert not any(is_statistic(path) for path in flatten(after.opt_state))


def test_a_frozen_trunk_keeps_them_and_normalises_by_them():
    src = source()
    state, frozen, step = tiny.start(src, groups.head_only(src.model), SGD, donate=False)
    assert not jax.tree.leaves(state.stats)
    outputs = make_eval(src.model)(state, frozen, batch())["logits"]
    loss = -jax.nn.log_softmax(outputs)[np.arange(8), batch()["labels"]].mean()
    after = state
    for seed in range(3):
        after, metrics = step(after, frozen, batch(seed=seed))
        assert seed or np.isclose(metrics["loss"], loss, rtol=1e-6)
    found, given = params_of(after, frozen), {path: leaf for path, leaf in src.params.items() if path != "head"}
    assert tiny.same_bits({path: leaf for path, leaf in found.items() if path != "head"}, given)
    assert not tiny.same_bits(found["head"], src.params["head"])


def test_a_frozen_layer_inside_a_stage_that_trains_keeps_them_and_normalises_by_them():
    src = source()
    rules = (("stage1/1/layer0/norm/.*", "frozen"), ("stage0/.*", "frozen"), (".*", "trunk"))
    state, frozen, step = tiny.start(src, rules, SGD, donate=False)
    held = {path for path in statistics(src.params) if path.startswith(("stage0/", "stage1/1/layer0/"))}
    assert len(held) == 3 * 3 + 3
    before, (after, metrics) = statistics(src.params), step(state, frozen, batch())
    found = statistics(params_of(after, frozen))
    assert {path for path, leaf in before.items() if tiny.bits(leaf) == tiny.bits(found[path])} == held

    # The step's loss is that of a model whose held layers are in evaluation mode, the others in training mode.
    def loss(statistic, value):
        path = ("stage1", "1", "layer0", "norm")
        params = jax.tree.map(lambda x: x, src.params)
        node = functools.reduce(lambda tree, name: tree[name], path, params)
        node[statistic] = node[statistic] + value
        labels = tiny.labels_of(src, rules)
        state, frozen = init_state(src.model, params, labels, tiny.transform(labels, SGD), jax.random.key(2))
        return float(step(state, frozen, batch())[1]["loss"])

    assert loss("mean", 0.0) == float(metrics["loss"])
    assert abs(loss("mean", 1.0) - float(metrics["loss"])) > 1e-3
    assert abs(loss("var", 5.0) - float(metrics["loss"])) > 1e-3


def test_a_rejected_step_leaves_them():
    state, frozen, step = full()
    bad = batch()
    bad["pixel_values"][3, 4, 5, 0] = np.inf
    after, metrics = step(state, frozen, bad)
    assert not bool(metrics["finite"])
    assert tiny.same_bits(after, state)


@functools.partial(jax.jit, static_argnames="dtype")
def trained(params, rows, dtype=jnp.float32):
    """One forward pass of all stages in training mode."""
    return apply(source().model, params, rows, train=True, key=jax.random.key(0), dtype=dtype)


def test_scanned_and_unrolled_they_are_the_same():
    src = source()
    scanned, unrolled = trained(vision_zoo.stacked(src), batch()), trained(src.params, batch())
    assert set(scanned["stats"]["stage1"]) == {"0:1", "1:3"}
    found, wanted = statistics(scanned["stats"]), statistics(unrolled["stats"])
    assert found.keys() == wanted.keys() == statistics(src.params).keys()
    for path, leaf in wanted.items():
        zoo.assert_close(found[path], leaf, 1e-6)
    zoo.assert_close(scanned["logits"], unrolled["logits"], 1e-6)


def filled(rows, count):
    """A batch filled up by examples of zeros that weigh nothing, as the loader fills the last one of an epoch."""
    return {name: np.concatenate([x, np.zeros_like(x[:1]).repeat(count, 0)]) for name, x in rows.items()}


def test_what_fills_up_a_batch_does_not_count():
    params, small = vision_zoo.stacked(source()), batch(rows=6)
    wanted, found = trained(params, small), trained(params, filled(small, 2))
    zoo.assert_close(found["logits"][:6], wanted["logits"], 1e-5)
    moved = statistics(wanted["stats"])
    for path, leaf in statistics(found["stats"]).items():
        zoo.assert_close(leaf, moved[path], 1e-6)


def test_what_fills_up_a_batch_changes_no_gradient():
    norm, rng = BatchNorm(5), np.random.default_rng(0)
    x, cotangent = (rng.standard_normal((6, 2, 3, 5)).astype(np.float32) for _ in range(2))

    @jax.jit
    @jax.grad
    def gradient(x, weight):
        return jnp.vdot(norm(x, jax.random.key(0), weight)[0][:6], cotangent)

    padded = filled({"x": x, "weight": np.ones(6, np.float32)}, 2)
    found = gradient(padded["x"], padded["weight"])
    zoo.assert_close(found[:6], gradient(x, np.ones(6, np.float32)))
    assert not found[6:].any()


def test_a_batch_of_filling_alone_moves_nothing():
    after = trained(vision_zoo.stacked(source()), batch() | {"weight": np.zeros(8, np.float32)})
    wanted = statistics(source().params)
    assert all(tiny.bits(leaf) == tiny.bits(wanted[path]) for path, leaf in statistics(after["stats"]).items())


def test_one_value_a_channel_has_no_variance():
    src = source()
    with pytest.raises(ValueError, match=r"more than one value a channel; the input is \(1, 1, 1, 8\)"):
        jax.eval_shape(
            lambda: apply(src.model, src.params, {"pixel_values": jnp.ones((1, 2, 2, 3))}, train={"stage0/0"},
                          key=jax.random.key(0))
        )  # fmt: skip


def test_mixed_precision_keeps_them_in_float32():
    params = vision_zoo.stacked(source())
    wanted, found = (statistics(trained(params, batch(), dtype)["stats"]) for dtype in (jnp.float32, jnp.bfloat16))
    assert {path: leaf.dtype for path, leaf in found.items()} == {path: leaf.dtype for path, leaf in wanted.items()}
    assert max(np.abs(found[path] - leaf).max() for path, leaf in wanted.items()) < 0.05


@pytest.mark.parametrize("axes", [{"data": 8}, pytest.param({"data": 2, "fsdp": 4}, marks=pytest.mark.slow)], ids=str)
def test_on_a_mesh_they_are_those_of_the_whole_batch(devices, axes):
    src, mesh = source(), make_mesh(**axes)
    rules = fsdp(src.params, mesh, min_size=32)
    state, frozen, step = tiny.start(src, None, SGD, mesh=mesh, sharding=rules)
    alone, still, one = full()
    for seed in range(3):
        rows = batch(seed=seed)
        rows["weight"][5] = 0
        state, metrics = step(state, frozen, shard_batch(rows, mesh))
        alone, wanted = one(alone, still, rows)
        assert np.isclose(metrics["loss"], wanted["loss"], rtol=1e-5)
    moved = statistics(alone.stats)
    for path, leaf in statistics(state.stats).items():
        zoo.assert_close(leaf, moved[path], 1e-5)
    assert tiny.apart(flatten(state.params), flatten(alone.params)) < 1e-5
