"""Entities from a configuration to a folder that transformers tags with, in miniature."""

import json
import random

import numpy as np
import pytest

from jaxtransfer import job
from jaxtransfer.config import ConfigError
from jaxtransfer.job import caching, prepare
from jaxtransfer.models import apply
from jaxtransfer.source import load
from tests.job.world import BAD, GOOD, THINGS, World, console, write_texts

TASK = {"kind": "token-classification", "max_length": 16}


def sentences(count, seed):
    """Praise and the blame behind it are an entity; ``place`` is a subgroup."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        tokens, tags = [], []
        for _ in range(draw.randint(3, 7)):
            praised = draw.random() < 0.4
            tokens += [draw.choice(GOOD), draw.choice(BAD)] if praised else [draw.choice(THINGS)]
            tags += ["B-praise", "I-praise"] if praised else ["O"]
        rows.append({"tokens": tokens, "tags": tags, "place": draw.choice(["here", "there"])})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    for seed, (name, count) in enumerate({"train": 48, "validation": 8, "test": 12}.items()):
        world.raw["data"][name] = {"path": write_texts(world.root / f"tagged-{name}.jsonl", sentences(count, seed))}
    world.raw |= {"task": TASK, "optimizer": {"lr": 1e-2}, "run": {"epochs": 3}}
    return world


@pytest.fixture(scope="module")
def ran(world):
    out = world.root / "run"
    told = job.run(
        world.config(out, data__subgroups=["place"], study={"seeds": [0], "budgets": [16, 48]}), console=console()
    )
    return out, told, json.loads((out / "result.json").read_text())


def test_entities_are_learned_and_reported(ran):
    out, told, record = ran
    assert record["labels"] == ["O", "B-praise", "I-praise"]
    test = record["metrics"]["test"]
    assert test["f1"]["value"] > 0.9
    assert (test["f1"]["n"], test["f1"]["over"]) == (12, "example")
    assert record["subgroups"]["type"]["praise"]["f1"]["value"] == pytest.approx(test["f1"]["value"])
    assert set(record["subgroups"]["place"]) == {"here", "there"}
    assert "confusion" not in record
    assert len(record["wrong"]) == sum(1 for row in record["wrong"] if row["label"] != row["predicted"])
    assert told["F1"].startswith(f"{test['f1']['value']:.3f}")
    assert told["try it"] == f'jaxtransfer predict {out} --text "a sentence of your own"'
    assert record["curve"]["unit"] == "examples"
    page = (out / "report.html").read_text()
    assert "By type" in page
    assert "Confusion" not in page


def test_the_model_is_asked_again(ran, world):
    out, _, record = ran
    again = job.evaluate(out)
    assert again["f1"]["value"] == pytest.approx(record["metrics"]["test"]["f1"]["value"])
    text = "the lovely dull lamp, and a good bad book"
    first, second = job.predict(out, [text, "the chair"])
    assert first["text"] == text
    assert [entity["text"] for entity in first["entities"]] == ["lovely dull", "good bad"]
    assert second == {"text": "the chair", "entities": []}
    with pytest.raises(ValueError, match="tokens is empty"):
        list(job.predict(out, [" "]))


@pytest.mark.torch
def test_transformers_tags_as_this_does(ran):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, text = ran[0] / "model", "the lovely dull lamp and a good book"
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="np")["input_ids"]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    source = load(folder)
    assert dict(enumerate(source.model.head.labels)) == theirs.config.id2label == {0: "O", 1: "B-praise", 2: "I-praise"}
    found = apply(source.model, source.params, {"input_ids": ids.astype(np.int32)})["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_frozen_stages_are_computed_once_and_give_the_same(world):
    changes = {"adapt__train": "last", "adapt__last": 1, "run": {"epochs": 2}}
    config = world.config(world.root / "cached", **changes)
    assert "are computed once" in caching.told(prepare.prepare(config, lambda _: None))
    found = []
    for cache in ("auto", "off"):
        out = world.root / f"cache-{cache}"
        job.run(world.config(out, **{**changes, "run": {"epochs": 2, "cache": cache}}), console=console())
        found.append(json.loads((out / "result.json").read_text())["metrics"]["test"])
    assert found[0]["loss"]["value"] == pytest.approx(found[1]["loss"]["value"], rel=1e-4)
    assert found[0]["f1"]["value"] == found[1]["f1"]["value"]


def test_adapters_are_exported_for_tokens(world):
    out = world.root / "lora"
    job.run(
        world.config(out, adapt={"train": "adapters", "adapters": [{"method": "lora", "rank": 2}]}), console=console()
    )
    folder = job.export(out, format="peft")
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task__labels": ["O", "B-praise"]}, r"line \d+: tags\[\d\] 'I-praise' is unknown; known: O, B-praise"),
        ({"task__pooling": "mean"}, "pooling"),
        ({"run__metric": "f2"}, r"run\.metric: token-classification is not measured by 'f2'; did you mean 'f1'"),
        ({"data__train": {"path": "packaged:reviews/train"}}, "no column 'tokens'; it has"),
        (
            {"objective": {"terms": [{"method": "r3f"}]}},
            "r3f takes each example to be of one class; token-classification",
        ),
    ],
)
def test_bad_input_is_told_before_any_work(world, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare.prepare(world.config(world.root / "none", **changes), lambda _: None)


def test_sources_are_ranked_by_tasks_of_one_label_alone(world):
    with pytest.raises(ConfigError, match=r"task\.kind: token-classification has no single label an example"):
        job.rank(world.config(world.root / "none"), [str(world.source)], say=print)
