"""Sources and layers in order, what cannot be read by name, and scores that are those of `scores`."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxtransfer import cli, job, scores
from jaxtransfer import config as configs
from jaxtransfer.adapt import heads, swap_head
from jaxtransfer.config import ConfigError
from jaxtransfer.data.sources import read
from jaxtransfer.features import extract
from jaxtransfer.job import ranking
from jaxtransfer.job.tasks import make_task
from jaxtransfer.source import SourceError, export, load
from tests.job.world import Library, World, write_source

FEATURES = ["logme", "h_score", "transrate", "knn", "gbc", "parc"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("ranking"))


@pytest.fixture(scope="module")
def classifier(world):
    """A source that ends in a head of its own, with the tokenizer beside it."""
    folder = write_source(world.root / "classifier")
    source = swap_head(load(str(folder)), heads.classifier(3), jax.random.key(5))
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    return export(source, world.root / "classifier-3"), folder


@pytest.fixture(scope="module")
def found(world):
    config = world.config(world.root / "none")
    said: list[str] = []
    result = job.rank(config, [str(world.source), "no/where"], to=world.root / "rank.json", say=said.append)
    return result, said


def test_scores_are_those_of_the_training_features(world, found):
    config = world.config(world.root / "none")
    (row,) = found[0]["ranking"]
    source = load(str(world.source), head="checkpoint")
    data = read(config.data.train, ("text", "label"))
    task = make_task(config, data)
    examples = task.prepare(task.processor(source), data, train=False)
    loader = ranking.batches(examples, batch=4, buckets=(16,), shuffle=False, epochs=1)
    x = extract(source, loader, ["blocks/1"])["blocks/1"]
    assert row["logme"] == pytest.approx(scores.logme(x, examples.fixed["labels"]), rel=1e-4)
    assert row["gbc"] == pytest.approx(scores.gbc(x, examples.fixed["labels"]), rel=1e-3)
    assert list(row) == ["source", "probe", *FEATURES]
    assert row["probe"]["n"] == 6 and 0 <= row["probe"]["low"] <= row["probe"]["value"] <= row["probe"]["high"] <= 1
    assert found[0]["examples"] == 16 and found[0]["held_out"] == 6


def test_what_cannot_be_read_is_named_with_the_reason(world, found):
    (unread,) = found[0]["unread"]
    assert unread["source"] == "no/where" and "no/where" in unread["reason"]
    assert json.loads((world.root / "rank.json").read_text()) == found[0]
    with pytest.raises((SourceError, OSError), match="no/where"):
        job.rank(world.config(world.root / "none"), ["no/where"])


def test_layers_are_ranked_by_the_probe(world):
    rows = job.rank(world.config(world.root / "none"), [str(world.source)], layers=True)["ranking"]
    assert {row["layer"] for row in rows} == {"embed", "blocks/0", "blocks/1"}
    values = [row["probe"]["value"] for row in rows]
    assert values == sorted(values, reverse=True)


def test_a_source_with_classes_of_its_own_has_leep_and_nce(world, classifier):
    path, folder = classifier
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((folder / name).read_bytes())
    rows = job.rank(world.config(world.root / "none"), [str(path), str(world.source)])["ranking"]
    by_source = {row["source"]: row for row in rows}
    assert list(rows[0]) == ["source", "probe", *FEATURES, "leep", "nce"]
    assert by_source[str(path)]["leep"] <= 0 and by_source[str(path)]["nce"] <= 0
    assert by_source[str(world.source)]["leep"] is None


def test_without_validation_data_a_fifth_is_held_out_and_test_data_are_not_read(world):
    config = world.config(world.root / "none")
    data = dataclasses.replace(config.data, validation=None, test=dataclasses.replace(config.data.train, path="gone"))
    result = job.rank(dataclasses.replace(config, data=data), [str(world.source)])
    assert (result["examples"], result["held_out"]) == (13, 3)


def test_a_score_that_does_not_apply_is_told(world, monkeypatch):
    def refuse(x, y):
        raise scores.ScoreError("gbc: class number 1 has one row, which has no variance")

    monkeypatch.setattr(ranking, "OF_FEATURES", {"knn": scores.knn, "gbc": refuse})
    said: list[str] = []
    (row,) = job.rank(world.config(world.root / "none"), [str(world.source)], say=said.append)["ranking"]
    assert "gbc" not in row and row["knn"] is not None
    assert said == [f"{world.source}: no gbc: gbc: class number 1 has one row, which has no variance"]


def test_a_score_that_is_no_number_is_told_and_loses_nothing(world, monkeypatch, tmp_path):
    monkeypatch.setattr(ranking, "OF_FEATURES", {"knn": scores.knn, "gbc": lambda x, y: float("nan")})
    said: list[str] = []
    found = job.rank(
        world.config(world.root / "none"), [str(world.source)], to=tmp_path / "found.json", say=said.append
    )
    assert "gbc" not in found["ranking"][0] and (tmp_path / "found.json").exists()
    assert said == [f"{world.source}: no gbc: it is nan of these features"]
    for to in (tmp_path, tmp_path / "no" / "found.json"):
        with pytest.raises(ConfigError, match=r"--to: .* can be no file"):
            job.rank(world.config(world.root / "none"), [str(world.source)], to=to)


def test_what_has_no_single_label_is_refused(tmp_path):
    library = Library(tmp_path)
    with pytest.raises(ConfigError, match=r"task.kind: causal-lm has no single label"):
        job.rank(library.config(tmp_path / "none"), [str(library.source)])


def test_the_probe_tells_classes_apart_and_leaves_out_what_it_never_saw():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2 * 2  # the class 1 of 3 has no examples
    x = rng.normal(size=(60, 5)).astype(np.float32) + y[:, None].astype(np.float32)
    assert (ranking.probe(x[:40], y[:40], x[40:], 3) == y[40:]).mean() > 0.9
    with pytest.raises(ValueError, match="examples of 1 of 3 classes"):
        ranking.probe(x[:1], y[:1], x, 3)


def test_the_command_prints_a_table(world, capsys):
    path = world.root / "rank.yaml"
    path.write_text(configs.dump(world.config(world.root / "none")), encoding="utf-8")
    assert cli.main(["rank", str(path), "--sources", str(world.source), "--layers", "--data.batch", "8"]) == 0
    out = capsys.readouterr().out
    assert "ranking" in out and "blocks/1" in out and "h score" in out and "held_out  6" in out
    assert cli.main(["rank", str(path)]) == 2 and "--sources" in capsys.readouterr().err
