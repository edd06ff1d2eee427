"""A configuration read: what trains, how fast, where, from what; and that mistakes come to light before any work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.config import ConfigError
from jaxtransfer.data.dataset import DataError
from jaxtransfer.job import commands, finished, prepare, sources, tasks
from jaxtransfer.optim import GroupError
from jaxtransfer.parallel.specs import ShardingError
from jaxtransfer.run import Interrupted
from jaxtransfer.source import SourceError
from jaxtransfer.step import shard_batch
from jaxtransfer.tree import RuleError, flatten, unstack
from tests.job.world import WORDS, World, console, during, lines, write_source

PLAIN = {
    "name": "sgd",
    "lr": 0.1,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup": 0.0,
    "momentum": 0.0,
    "clip": None,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def made(world, **changes):
    return prepare.prepare(world.config(world.root / "none", **changes), lambda text: None)


def moved(job):
    """How far a gradient of ones moves each trained parameter, by canonical path."""
    state, _ = job.start(0)
    updates, _ = job.tx.update(jax.tree.map(jnp.ones_like, state.params), state.opt_state, state.params)
    return {path: np.asarray(leaf) for path, leaf in flatten(unstack(updates)).items()}


def trained(job):
    return {path for path, label in flatten(job.labels).items() if label != "frozen"}


def top(path):
    return path.split("/")[0] in ("head", "pooler")


def test_recipes_say_what_trains(world):
    every = trained(made(world))
    assert trained(made(world, adapt={"train": "head"})) == {path for path in every if path.startswith("head/")}
    last = trained(made(world, adapt={"train": "last", "last": 1}))
    assert last == {path for path in every if path.startswith("blocks/1/") or top(path)}
    rules = [["embed/.*", "frozen"], ["head/.*", "head"], [".*", "trunk"]]
    ruled = made(world, adapt={"train": "rules", "rules": rules})
    assert trained(ruled) == {path for path in every if not path.startswith("embed/")}
    assert list(ruled.groups) == ["head", "trunk"]


def test_each_group_moves_at_its_own_rate_and_what_is_frozen_is_not_there(world):
    rules = [["head/.*", "fast"], ["blocks/1/.*", "slow"], [".*", "frozen"]]
    groups = {"fast": {"lr": 0.4}, "slow": {}}
    job = made(world, adapt={"train": "rules", "rules": rules}, optimizer={**PLAIN, "groups": groups})
    found = moved(job)
    assert found.keys() == trained(job)
    for path, delta in found.items():
        np.testing.assert_allclose(delta, -0.4 if path.startswith("head/") else -0.1, rtol=1e-6, err_msg=path)


def test_a_control_from_scratch_trains_what_the_transfer_freezes(world):
    frozen, whole = made(world, adapt={"train": "head"}, optimizer=PLAIN), made(world)
    assert moved(frozen).keys() == trained(frozen)
    assert moved(frozen.control).keys() == trained(frozen.control) == trained(whole)
    assert whole.control is whole


def test_warmup_is_a_fraction_of_the_steps(world):
    job = made(world, optimizer={**PLAIN, "warmup": 0.5, "schedule": "linear"})
    assert (job.steps, job.epoch, job.groups["trunk"].warmup, job.groups["trunk"].steps) == (8, 4, 4, 8)


def test_layer_decay_scales_each_layer_by_its_depth(world):
    depth = {"embed": 3, "blocks/0": 2, "blocks/1": 1, "pooler": 0, "head": 0}
    for path, delta in moved(made(world, optimizer={**PLAIN, "layer_decay": 0.5})).items():
        scale = next(0.5 ** depth[name] for name in depth if path.startswith(f"{name}/"))
        np.testing.assert_allclose(delta, -0.1 * scale, rtol=1e-6, err_msg=path)


def test_from_scratch_is_the_same_architecture_without_the_source(world):
    plain, scratch = made(world), made(world, source__init="scratch")
    source, fresh = plain.adapted(0), scratch.adapted(0)
    kernel = "blocks/0/mlp/up/kernel"
    stored = flatten(plain.trunk.params)[kernel]
    assert np.array_equal(flatten(source.params)[kernel], stored)
    assert not np.array_equal(flatten(fresh.params)[kernel], stored)
    assert "from scratch" in fresh.lineage.operations[-1] and not fresh.lineage.fingerprints
    assert not np.array_equal(flatten(scratch.adapted(1).params)[kernel], flatten(fresh.params)[kernel])
    state, _ = scratch.start(0)
    assert np.array_equal(flatten(state.params)["blocks/0:2/mlp/up/kernel"][0], flatten(fresh.params)[kernel])
    assert np.array_equal(flatten(plain.adapted(0, scratch=True).params)[kernel], flatten(fresh.params)[kernel])


MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_a_mesh_of_eight_devices_steps_as_one_does(world, devices):
    """Losses within 1e-5 relative, dropout and all; parameters are split as the rules say."""
    losses = []
    for mesh in ({}, MESH):
        job = made(world, mesh=mesh, optimizer__warmup=0.0)
        state, frozen = job.start(0)
        flat = flatten(state.params)
        axes = {axis for leaf in flat.values() for axis in getattr(leaf.sharding, "spec", ()) if axis}
        data = job.loader("train", train=True)
        losses.append([])
        for _ in range(4):
            state, metrics = job.step(state, frozen, shard_batch(next(data), job.mesh))
            losses[-1].append(float(metrics["loss"]))
    assert len(set(losses[0])) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert len(flat["blocks/0:2/mlp/up/kernel"].sharding.device_set) == 8
    assert axes & {"tensor", ("tensor",)} and axes & {"fsdp", ("fsdp",)}


@pytest.mark.slow
def test_a_run_on_a_mesh_stopped_and_resumed_is_the_run_on_one_device(world, devices, tmp_path, monkeypatch):
    outs = {name: tmp_path / name for name in ("one", "eight", "stopped")}
    changes = {"run": {"steps": 8, "log_every": 1}}
    commands.run(world.config(outs["one"], **changes), console=console())
    commands.run(world.config(outs["eight"], mesh=MESH, **changes), console=console())
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        during(patch, 5)
        commands.run(world.config(outs["stopped"], mesh=MESH, **changes), console=console())
    commands.resume(outs["stopped"], console=console())
    assert lines(outs["stopped"]) == lines(outs["eight"])
    losses = {
        name: [line["loss"] for line in lines(out) if line["kind"] in ("train", "eval")] for name, out in outs.items()
    }
    assert len(losses["one"]) == 10
    np.testing.assert_allclose(losses["eight"], losses["one"], rtol=1e-5)


def test_an_alternative_is_taken_aloud(world, tmp_path):
    said = []
    absent = str(tmp_path / "absent")
    config = world.config(tmp_path, source={"ref": absent, "alternatives": ["nor/this", str(world.source)]})
    job = prepare.prepare(config, said.append)
    assert job.trunk.lineage.ref == "source"
    assert [line.split(" (")[0] for line in said] == [
        f"source {name}: not taken, {world.source} stands in for it" for name in (absent, "nor/this")
    ]
    with pytest.raises(SourceError, match="absent: there is no such folder"):
        prepare.prepare(world.config(tmp_path, source={"ref": absent, "alternatives": ["nor/this"]}), said.append)


def test_what_preparing_did_to_the_data_is_said(world, tmp_path):
    said = []
    config = world.config(tmp_path, task__max_length=8, data__buckets=[8])
    prepare.prepare(config, said.append)
    assert any("texts cut to 8 tokens" in line for line in said)


def test_tokens_beyond_the_vocabulary_are_refused_in_training_and_prediction(world, tmp_path, monkeypatch):
    other = tmp_path / "other"
    write_source(other, words=[*WORDS[:5], *(f"##x{i}" for i in range(60)), *WORDS[5:]])
    with pytest.raises(DataError, match=r"train: token \d+ is beyond the vocabulary of 64"):
        made(world, source__ref=str(other))
    config = world.config(tmp_path, source__ref=str(world.source))
    task = tasks.make_task(config, prepare.read(world.data["train"]))
    tokens = task.processor(sources.load(other, head=None))
    examples = task.prepare(tokens, prepare.read(world.data["test"]), train=False)
    with pytest.raises(DataError, match=r"the data: token \d+ is beyond the vocabulary of 64"):
        finished._observed(made(world).adapted(0), config, task, examples)


WRONG = {
    "labels without a group": (
        {"adapt": {"train": "rules", "rules": [["head/.*", "head"], [".*", "frozn"]]}},
        GroupError, "label 'frozn' .* has no optimizer group; there are \\['head'\\]",
    ),
    "a group without a label": ({"optimizer__groups": {"tail": {}}}, GroupError, "group 'tail' has no parameters"),
    "a rule that matches nothing": (
        {"adapt": {"train": "rules", "rules": [["blocks/7/.*", "head"], [".*", "frozen"]]}},
        RuleError, "rule 'blocks/7/.*' matches none of .*; nearest paths: blocks/",
    ),
    "nothing that trains": ({"adapt": {"train": "rules", "rules": [[".*", "frozen"]]}}, GroupError, "nothing trains"),
    "more layers than there are": ({"adapt": {"train": "last", "last": 3}}, ConfigError, "the model has 2 layers"),
    "texts longer than positions": (
        {"task__max_length": 32, "data__buckets": [32]}, ConfigError, "task.max_length: input of length 32 .* 16 posi",
    ),
    "microbatches": ({"run__accumulate": 3}, ConfigError, "data.batch: 4 rows do not divide by 3: run.accumulate 3"),
    "rows over devices": ({"mesh": {"data": 8}}, ConfigError, "data.batch: 4 rows do not divide by 8"),
    "too few devices": ({"mesh": {"tensor": 16}}, ConfigError, "needs 16 devices, there are 8"),
    "a metric of another task": (
        {"run__metric": "acuracy"},
        ConfigError, "run.metric: text-classification is not measured by 'acuracy'; did you mean 'accuracy'",
    ),
    "a head that is not tied": ({"adapt": {"untie": True}}, ConfigError, "adapt.untie: the head .* is not tied"),
    "more examples than there are": (
        {"study": {"budgets": [4, 9]}}, ConfigError, "study.budgets: 9 examples of 'negative' are wanted, .* has 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_come_to_light_in_prepare(name, world, devices):
    changes, kind, says = WRONG[name]
    with pytest.raises(kind, match=says):
        made(world, **changes)


def test_a_fresh_head_has_no_measure_from_before(world):
    with pytest.raises(ConfigError, match=r"data.retain: text-classification puts a fresh head on its source"):
        made(world, data__retain={"path": world.data["test"]})


def test_a_dimension_that_does_not_divide_is_refused_in_prepare(world, devices):
    with pytest.raises(ShardingError, match="2 heads of keys and values do not divide by tensor = 3"):
        made(world, mesh={"tensor": 3})


def test_the_loader_depends_on_the_seed_and_evaluation_does_not_shuffle(world):
    job = made(world)
    first = [next(job.loader("train", seed=seed, train=True))["index"].tolist() for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    assert [batch["index"].tolist() for batch in job.loader("test")] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]


def test_keys_of_seeds_differ_and_repeat(world):
    job = made(world)
    keys = [jax.random.key_data(job.start(seed)[0].key).tolist() for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]
