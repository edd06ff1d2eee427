"""Continued pre-training, then a task on what came of it: two runs in a row."""

import json

import numpy as np
import pytest

from jaxtransfer import job
from jaxtransfer.config import ConfigError
from jaxtransfer.job import prepare
from jaxtransfer.source import SourceError, load
from jaxtransfer.tree import flatten
from tests.job.world import World, console

TASK = {"kind": "masked-lm", "max_length": 16, "head": "fresh"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def ran(world):
    """A run that goes on with pre-training; another that learns a task from its model."""
    first, second = world.root / "dapt", world.root / "task"
    told = job.run(world.config(first, task=TASK, run={"epochs": 6}, optimizer__lr=1e-2), console=console())
    job.run(world.config(second, source__ref=str(first / "model"), run={"steps": 1}), console=console())
    return first, second, told


def page(out):
    return json.loads((out / "result.json").read_text())


def test_hidden_tokens_are_learned_and_the_model_is_one_of_hugging_face(ran, world):
    first, _, told = ran
    assert json.loads((first / "model" / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    assert load(first / "model").model.head.kind == "masked-lm"
    record = page(first)
    assert record["metrics"]["test"].keys() == {"loss", "perplexity", "accuracy"}
    assert (record["metrics"]["test"]["loss"]["n"], record["metrics"]["test"]["loss"]["over"]) == (10, "document")
    rows = [row["loss"] for row in record["curves"]["transfer"] if row["kind"] == "eval"]
    assert rows[-1] < rows[0] - 0.5
    assert record["before"] is None, "a fresh head has no measure from before"
    assert told["try it"] == f"jaxtransfer run CONFIG --source.ref {first / 'model'}"
    assert job.evaluate(first)["loss"]["value"] == pytest.approx(record["metrics"]["test"]["loss"]["value"], rel=1e-5)


def test_the_task_starts_from_the_trunk_that_was_adapted(ran, world):
    first, second, _ = ran
    config = world.config(world.root / "none", source__ref=str(first / "model"))
    start = flatten(prepare.prepare(config, lambda text: None).adapted(0).params)
    adapted, original = flatten(load(first / "model").params), flatten(load(world.source).params)
    trunk = [path for path in start if path.startswith(("embed/", "blocks/"))]
    assert {path.split("/")[0] for path in start} == {"embed", "blocks", "pooler", "head"}
    for path in trunk:
        np.testing.assert_array_equal(start[path], adapted[path], err_msg=path)
    assert not np.array_equal(start["blocks/0/mlp/up/kernel"], original["blocks/0/mlp/up/kernel"])
    operations = page(second)["lineage"]["operations"]
    assert any("swap_head(sequence-classification" in operation for operation in operations)
    assert "accuracy" in page(second)["metrics"]["test"]


def test_the_head_that_was_drawn_is_the_source_s_own_afterwards(ran, world):
    first, _, _ = ran
    kept = world.config(world.root / "none", source__ref=str(first / "model"), task={**TASK, "head": "source"})
    start, left = (flatten(source.params) for source in (
        prepare.prepare(kept, lambda text: None).adapted(0), load(first / "model"),
    ))  # fmt: skip
    assert start.keys() == left.keys()
    for path, leaf in left.items():
        np.testing.assert_array_equal(start[path], leaf, err_msg=path)


def test_a_source_without_that_head_asks_for_a_fresh_one(world):
    with pytest.raises(SourceError, match=r"has no head; masked-lm goes on .*; or take a fresh one, task.head: fresh"):
        prepare.prepare(world.config(world.root / "none", task={**TASK, "head": "source"}), print)


def test_replay_is_refused(world):
    replay = {"objective": {"terms": [{"method": "replay"}]}, "data__replay": {"path": world.data["test"]}}
    with pytest.raises(ConfigError, match=r"data.replay: masked-lm hides tokens of the training data alone"):
        prepare.prepare(world.config(world.root / "none", task=TASK, **replay), print)


def test_it_predicts_no_labels(ran):
    with pytest.raises(ValueError, match=r"a masked-lm model predicts no labels; it is a source"):
        next(job.predict(ran[0], ["a good lamp"]))
