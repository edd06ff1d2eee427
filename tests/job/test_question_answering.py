"""Questions from a configuration to a folder that transformers answers with, in miniature."""

import json
import random

import numpy as np
import pytest

from jaxtransfer import config as configs
from jaxtransfer import job
from jaxtransfer.config import ConfigError
from jaxtransfer.job import caching, prepare
from jaxtransfer.models import apply
from jaxtransfer.source import load
from tests.job.world import BAD, GOOD, THINGS, World, console, write_texts

TASK = {"kind": "question-answering", "max_length": 16, "stride": 2, "max_answer": 2}


def asked(count, seed):
    """The answer is the praise and the blame behind it, whatever is asked; ``place`` is a subgroup."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [draw.choice(THINGS) for _ in range(draw.randint(3, 9))]
        at, answer = draw.randrange(len(words)), f"{draw.choice(GOOD)} {draw.choice(BAD)}"
        context = " ".join([*words[:at], answer, *words[at:]])
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        rows.append({"question": draw.choice(THINGS), "context": context, "answers": answers, "place": "here"})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    for seed, (name, count) in enumerate({"train": 48, "validation": 8, "test": 12}.items()):
        world.raw["data"][name] = {"path": write_texts(world.root / f"asked-{name}.jsonl", asked(count, seed))}
    world.raw |= {"task": TASK, "optimizer": {"lr": 1e-2}, "run": {"epochs": 3}}
    return world


@pytest.fixture(scope="module")
def ran(world):
    out = world.root / "run"
    told = job.run(world.config(out, data__subgroups=["place"]), console=console())
    return out, told, json.loads((out / "result.json").read_text())


def test_answers_are_learned_and_reported(ran):
    out, told, record = ran
    test = record["metrics"]["test"]
    assert test["exact_match"]["value"] > 0.8
    assert test["f1"]["value"] >= test["exact_match"]["value"]
    assert test["f1"]["n"] == 12
    assert record["subgroups"]["place"]["here"]["f1"]["value"] == pytest.approx(test["f1"]["value"])
    assert "confusion" not in record
    assert len(record["wrong"]) == round(12 * (1 - test["exact_match"]["value"]))
    assert told["exact match"].startswith(f"{test['exact_match']['value']:.1%}")
    assert told["try it"] == f'jaxtransfer predict {out} --text "a question" --context "a text with its answer"'


def test_the_model_is_asked_again(ran):
    out, _, record = ran
    assert job.evaluate(out)["f1"]["value"] == pytest.approx(record["metrics"]["test"]["f1"]["value"])
    first, second = job.predict(out, ["lamp", "book"], context="the lamp and a film, lovely dull")
    assert (first["text"], first["answer"], first["start"], first["stop"]) == ("lamp", "lovely dull", 21, 32)
    assert second["text"] == "book"
    with pytest.raises(ValueError, match="a question-answering model needs the text that holds the answers, --context"):
        list(job.predict(out, ["lamp"]))


@pytest.mark.torch
def test_transformers_reads_the_model(ran):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = ran[0] / "model"
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    batch = transformers.AutoTokenizer.from_pretrained(folder)("lamp", "the lovely dull film", return_tensors="np")
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(x) for name, x in batch.items()})
    source = load(folder)
    found = apply(source.model, source.params, {name: x.astype(np.int32) for name, x in batch.items()})
    for name in ("start_logits", "end_logits"):
        wanted = expected[name].numpy()
        np.testing.assert_allclose(found[name], wanted, atol=1e-5 * np.abs(wanted).max())


def test_frozen_stages_are_computed_once_and_give_the_same(world):
    changes = {"adapt__train": "last", "adapt__last": 1}
    found = []
    for cache in ("auto", "off"):
        config = world.config(world.root / f"cache-{cache}", **changes, run={"epochs": 2, "cache": cache})
        assert ("are computed once" in caching.told(prepare.prepare(config, lambda _: None))) == (cache == "auto")
        job.run(config, console=console())
        found.append(json.loads((world.root / f"cache-{cache}" / "result.json").read_text())["metrics"]["test"])
    assert found[0]["loss"]["value"] == pytest.approx(found[1]["loss"]["value"], rel=1e-4)
    assert found[0]["f1"]["value"] == found[1]["f1"]["value"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task__stride": 14}, r"line \d+: question has 1 tokens, which leave 12 of max_length 16 to its context"),
        ({"task__stride": -1}, r"task\.stride: must be at least 0, got -1"),
        ({"task__labels": ["a", "b"]}, r"task\.labels: is not read by question-answering"),
        ({"data__train": {"path": "packaged:reviews/train"}}, "no column 'question'; it has"),
        (
            {"objective": {"terms": [{"method": "r3f"}]}},
            "r3f takes each example to be of one class; question-answering",
        ),
    ],
)
def test_bad_input_is_told_before_any_work(world, changes, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        prepare.prepare(world.config(world.root / "none", **changes), lambda _: None)


def test_heads_that_train_together_are_scored_as_the_single_ones(world):
    changes = {"adapt__train": "head", "run": {"epochs": 2}}
    single = world.root / "single"
    job.run(world.config(single, **changes), console=console())
    path = world.root / "together.yaml"
    path.write_text(configs.dump(world.config(world.root / "together", **changes)), encoding="utf-8")
    found = job.sweep(path, [], {"optimizer.lr": ["1e-2", "3e-2"]}, console=console())
    assert found["how"] == "together"
    (row,) = [row for row in found["results"] if row["lr"] == "1e-2"]
    expected = json.loads((single / "result.json").read_text())["metrics"]["test"]["f1"]["value"]
    assert row["test f1"]["value"] == pytest.approx(expected)
