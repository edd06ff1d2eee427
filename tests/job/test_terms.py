"""Objectives of a configuration: every method runs, resumes, is evaluated; what does not fit is refused by name."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtransfer.config import ConfigError
from jaxtransfer.job import commands, finished, prepare
from jaxtransfer.run import Interrupted
from jaxtransfer.source import SourceError
from jaxtransfer.step import bare, params_of
from jaxtransfer.tree import flatten
from tests.job.world import Gallery, Library, World, console, during, lines, write_texts

QUIET = {"optimizer": {"lr": 1e-3, "schedule": "constant", "warmup": 0.0}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A source of the world with its head trained, another domain's texts without labels, and some of its own."""
    made = World(tmp_path_factory.mktemp("terms"))
    rows = map(json.loads, Path(made.data["test"]).read_text(encoding="utf-8").splitlines())
    made.data["target"] = write_texts(made.root / "target.jsonl", [{"text": row["text"]} for row in rows])
    folder = made.root / "source-run"
    commands.run(made.config(folder, run={"steps": 2}), console=console())
    made.trained = str(folder / "model")
    return made


def with_terms(world, *terms, domains=("target",), **objective):
    sets = {"target": world.data["target"], "replay": world.data["train"]}
    data = {**world.raw["data"], **{name: {"path": sets[name]} for name in domains}}
    return {"data": data, "objective": {"terms": list(terms), **objective}, **QUIET}


OF_TARGET = (
    {"method": "coral"}, {"method": "mmd"}, {"method": "dann", "width": 8}, {"method": "cdan", "width": 8},
    {"method": "mcc"}, {"method": "mcd"}, {"method": "entropy"}, {"method": "information_maximisation"},
    {"method": "centroid_labels"}, {"method": "pseudo_labels", "threshold": 0.5},
)  # fmt: skip


def test_a_run_with_every_term_of_the_target_goes_on_bit_for_bit_and_keeps_the_model_alone(
    world, tmp_path, monkeypatch
):
    how = with_terms(world, *OF_TARGET, {"method": "bss"}, {"method": "r3f"})
    commands.run(world.config(tmp_path / "whole", **how), console=console())
    with monkeypatch.context() as patch:
        during(patch, 3)
        with pytest.raises(Interrupted):
            commands.run(world.config(tmp_path / "cut", **how), console=console())
    commands.resume(tmp_path / "cut", console=console())
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    told = next(line for line in lines(tmp_path / "whole") if line["kind"] == "train")
    assert {term["method"] for term in OF_TARGET} <= told.keys() and "dann_accuracy" in told
    source = finished.adapted(tmp_path / "cut")
    assert not any(path.startswith("aux/") for path in flatten(source.params))
    assert finished.evaluate(tmp_path / "cut")["accuracy"]["n"] == 10


def test_what_holds_to_the_source_starts_at_nothing(world, tmp_path):
    terms = [
        {"method": "l2_sp"},
        {"method": "ewc", "examples": 4},
        {"method": "lwf"},
        {"method": "feature_distillation"},
    ]
    how = with_terms(world, *terms, domains=("replay",), mixout=0.1)
    config = world.config(
        tmp_path / "run", source={"ref": world.trained}, task={"max_length": 16, "head": "source"}, **how
    )
    job = prepare.prepare(config, lambda text: None)
    held = job.constants(0)
    assert set(held) == {"anchor", "ewc"}
    assert all((leaf >= 0).all() for leaf in jax.tree.leaves(held["ewc"]))
    assert max(float(leaf.max()) for leaf in jax.tree.leaves(held["ewc"])) > 0
    commands.run(config, console=console())
    rows = [line for line in lines(tmp_path / "run") if line["kind"] == "train"]
    assert 0 < rows[0]["l2_sp"] < rows[-1]["l2_sp"] and rows[-1]["ewc"] > 0 and rows[-1]["lwf"] > 0


@pytest.mark.parametrize("head", ["source", "fresh"])
def test_mixout_swaps_a_head_that_the_source_has_and_no_other(head, world):
    task = {"max_length": 16, "head": head, "labels": ["negative", "positive"]}
    how = with_terms(world, domains=(), mixout=0.9)
    config = world.config(world.root / "none", source={"ref": world.trained}, task=task, **how)
    job = prepare.prepare(config, lambda text: None)
    ones = jax.tree.map(np.ones_like, job.adapted(0).params)
    zeros = {"anchor": jax.tree.map(np.zeros_like, ones)}
    mixed = flatten(job.terms.options["perturb"](ones, zeros, jax.random.key(0)))
    changed = {path for path, leaf in mixed.items() if (np.asarray(leaf) != 1).any()}
    assert ("head/out/kernel" in changed) == (head == "source") and any(not p.startswith("head/") for p in changed)


def test_replay_and_a_memory_read_rows_of_the_domain_before(world, tmp_path):
    commands.run(
        world.config(tmp_path / "a", **with_terms(world, {"method": "replay"}, domains=("replay",))), console=console()
    )
    commands.run(
        world.config(tmp_path / "b", **with_terms(world, domains=("replay",), memory="a_gem")), console=console()
    )
    assert "replay_accuracy" in next(line for line in lines(tmp_path / "a") if line["kind"] == "train")


def test_without_a_task_no_labels_are_read(world, tmp_path):
    how = with_terms(world, {"method": "information_maximisation"}, {"method": "centroid_labels"}, task=0)
    how["data"]["train"] = {"path": world.data["target"]}  # which has none
    adapt = {"train": "rules", "rules": [["head/.*", "frozen"], [".*", "trunk"]]}
    config = world.config(
        tmp_path / "run", source={"ref": world.trained}, adapt=adapt,
        task={"max_length": 16, "head": "source", "labels": ["negative", "positive"]}, **how,
    )  # fmt: skip
    job = prepare.prepare(config, lambda text: None)
    assert "labels" not in next(job.stream(0))
    before = job.adapted(0).params["head"]
    commands.run(config, console=console())
    after = finished.adapted(tmp_path / "run").params["head"]
    for path, leaf in flatten(before).items():
        np.testing.assert_array_equal(leaf, flatten(after)[path])


def test_the_control_from_scratch_has_the_task_alone(world):
    job = prepare.prepare(world.config(world.root / "none", **with_terms(world, {"method": "dann"})), lambda text: None)
    state, frozen = job.control.start(0, scratch=True)
    assert "aux" not in state.params and "aux" in job.start(0)[0].params
    assert {path.split("/")[0] for path in flatten(bare(params_of(*job.start(0))))} == set(params_of(state, frozen))
    assert job.control.terms.domains == () and "target" not in next(job.control.stream(0))
    rows = {row.group: row for row in job.rows()}
    assert "aux" in rows


@pytest.mark.parametrize(
    ("terms", "domains", "objective", "told"),
    [
        ([{"method": "mcc"}], (), {}, "data.target: is missing; objective's mcc reads it"),
        ([], ("target",), {}, "data.target: nothing reads it"),
        ([{"method": "replay"}], (), {}, "data.replay: is missing"),
        ([{"method": "coral", "layer": "blocks/7"}], ("target",), {}, "coral: no stage is called 'blocks/7'; the st"),
        ([{"method": "cdan"}, {"method": "cdan"}], ("target",), {}, "cdan is there twice"),
        ([{"method": "dan"}], ("target",), {}, "did you mean 'dann'"),
        ([{"method": "mcc", "layer": "embed"}], ("target",), {}, "layer: is not read by mcc, but by"),
        ([{"method": "lwf"}], (), {}, "its head is drawn anew; task.head: source"),
        ([], (), {"task": 0}, "0 leaves nothing to minimise"),
        ([], (), {"mixout": 1.0}, "mixout"),
        ([{"method": "bss", "k": 9}], (), {}, "objective.terms.0.: bss: spectral_shrinkage: k must be from 1 to"),
        ([{"method": "mcc"}], ("target",), {"task": 0, "measured": False}, "nothing can be measured; give data.test"),
        ([{"method": "mcc"}], ("target",), {"task": 0, "study": {"seeds": [0, 1]}}, "study has no control"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(world, terms, domains, objective, told):
    study, measured = objective.pop("study", None), objective.pop("measured", True)
    how = {**with_terms(world, *terms, domains=domains, **objective), "study": study}
    if not measured:
        how["data"] = {name: how["data"][name] for name in ("train", "target")}
    with pytest.raises(ConfigError, match=told):
        prepare.prepare(world.config(world.root / "none", **how), lambda text: None)


def test_terms_of_one_prediction_a_row_are_refused_where_there_are_more(tmp_path_factory):
    library = Library(tmp_path_factory.mktemp("terms-of-texts"))
    domains = {name: {"path": library.data["retain"]} for name in ("target", "replay")}

    def config(*terms, **names):
        data = {**library.raw["data"], **{name: domains[name] for name in names}}
        return library.config(library.root / "none", data=data, objective={"terms": list(terms)})

    for term, names in (("lwf", {}), ("ewc", {"replay": 1}), ("entropy", {"target": 1})):
        with pytest.raises(ConfigError, match=rf"terms\[0\]: {term} takes each example to be of one class; causal-lm"):
            prepare.prepare(config({"method": term}, **names), lambda text: None)
    job = prepare.prepare(config({"method": "coral"}, target=1), lambda text: None)
    batch = next(job.stream(0))
    assert "labels" in batch and "labels" not in batch["target"]  # which are the texts themselves


def test_terms_of_one_class_are_refused_where_an_image_has_several(tmp_path_factory):
    gallery = Gallery(tmp_path_factory.mktemp("terms-of-images"))
    config = gallery.config(
        gallery.root / "none", source__init="scratch", pretrain=None, task__multi_label=True,
        objective={"terms": [{"method": "r3f"}]},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"r3f takes each example to be of one class; task\.multi_label says"):
        prepare.prepare(config, lambda text: None)


def test_a_source_with_other_labels_is_refused(world):
    how = with_terms(world, {"method": "mcc"})
    task = {"max_length": 16, "head": "source", "labels": ["positive", "negative"]}
    with pytest.raises(SourceError, match="its head tells negative, positive apart, in this order, the task"):
        prepare.prepare(
            world.config(world.root / "none", source={"ref": world.trained}, task=task, **how), lambda text: None
        )


def test_what_starts_from_nothing_beside_the_model_has_ten_times_the_rate(world):
    how = with_terms(world, {"method": "dann"})
    job = prepare.prepare(world.config(world.root / "none", **how), lambda text: None)
    assert job.groups["aux"].lr == pytest.approx(10 * job.groups["trunk"].lr)
    how["optimizer"] = {**how["optimizer"], "groups": {"aux": {"lr": 0.5}}}
    assert prepare.prepare(world.config(world.root / "none", **how), lambda text: None).groups["aux"].lr == 0.5
