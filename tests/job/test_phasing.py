"""Phases of a configuration: in order, each in its folder, resumable anywhere; what does not fit is refused by name."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxtransfer import config as configs
from jaxtransfer.config import ConfigError
from jaxtransfer.job import commands, finished, prepare
from jaxtransfer.job.models import phases_of
from jaxtransfer.job.phasing import gone_through
from jaxtransfer.run import Interrupted
from jaxtransfer.tree import flatten
from tests.job.world import World, console, during, lines

HEAD_FIRST = [
    {"adapt": {"train": "head"}, "run": {"epochs": 1}},
    {
        "adapt": {"train": "last", "last": 1},
        "run": {"steps": 3},
        "optimizer": {"lr": 1e-3, "groups": {"head": {"lr": 1e-2}}},
    },
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("phases"))


@pytest.fixture(scope="module")
def whole(world):
    """A run behind two phases: head, last block, all."""
    shown = console()
    summary = commands.run(world.config(world.root / "whole", phases=HEAD_FIRST), console=shown)
    return world.root / "whole", shown.file.getvalue(), summary


def adam(state):
    return [
        node
        for node in jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
        if isinstance(node, optax.ScaleByAdamState)
    ]


def test_each_phase_has_a_folder_and_the_next_goes_on_from_its_best_state(world, whole):
    out, told, _ = whole
    for number, (steps, groups) in enumerate([(4, {"head", "frozen"}), (3, {"head", "trunk", "frozen"})], 1):
        entry = json.loads((out / f"phase-{number}" / "phase.json").read_text())
        assert entry["steps"] == steps and {row["group"] for row in entry["groups"]} == groups
        assert set(entry["metrics"]) == {"validation", "test"}
        assert [line["steps"] for line in lines(out / f"phase-{number}") if line["kind"] == "end"] == [steps]
        assert f"phase {number} of 2" in told
    assert [line["steps"] for line in lines(out) if line["kind"] == "end"] == [8]
    page = json.loads((out / "result.json").read_text())
    assert [text.split(",")[0] for text in page["run"]["phases"]] == ["phase 1: 4 steps", "phase 2: 3 steps"]
    assert [note.partition("(")[0] for note in page["lineage"]["operations"]][-3:] == ["fit"] * 3
    assert "phase 2: 3 steps" in (out / "report.html").read_text()


def test_parameters_and_moments_go_on(world, whole):
    out, _, _ = whole
    job = prepare.prepare(world.config(out, phases=HEAD_FIRST), lambda text: None)
    entries = phases_of(job)
    assert len(entries) == 2
    job = gone_through(job, None, None, None)  # finished phases: nothing is left to train
    state, _ = job.start(0)
    assert int(state.step) == 0 and {*job.groups} == {"head", "trunk", "trunk_2"}
    counts = sorted(int(node.count) for node in adam(state))
    best = entries[1]["best_step"]
    assert counts == [0, best, entries[0]["best_step"] + best]  # all else, the last block, the head
    first, _ = job.start_of_all(0)
    before, after = flatten(first.params), flatten(state.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert any(path.startswith("head/") for path in moved) and not any(path.startswith("embed/") for path in moved)
    assert any(path.startswith("blocks/1") for path in moved) and not any(path.startswith("blocks/0") for path in moved)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6, 11])
def test_stopped_in_any_phase_and_resumed_is_undisturbed(step, world, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        during(patch, step)
        with pytest.raises(Interrupted):
            commands.run(world.config(tmp_path / "cut", phases=HEAD_FIRST), console=console())
    commands.resume(tmp_path / "cut", console=console())
    for part in (".", "phase-1", "phase-2"):
        assert lines(tmp_path / "cut" / part) == lines(whole[0] / part)
    found, wanted = (flatten(finished.adapted(out).params) for out in (tmp_path / "cut", whole[0]))
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(leaf, found[path])


def test_explain_shows_the_groups_of_each_phase(world):
    found = commands.explain(world.config(world.root / "none", phases=HEAD_FIRST))
    names = {key: [row.group for row in found[key]] for key in ("phase 1", "phase 2", "groups")}
    assert names == {
        "phase 1": ["head", "frozen"],
        "phase 2": ["head", "trunk", "frozen"],
        "groups": ["head", "trunk", "trunk_2"],
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"phases": [{"adapt": {"train": "last"}, "run": {"epochs": 1}}]}, r"phases\[0\]\.adapt\.last: is needed with"),
        ({"phases": [{"run": {}}]}, r"phases\[0\]\.run\.epochs: give either epochs or steps"),
        ({"phases": HEAD_FIRST, "study": {"seeds": [0]}}, "study: its control has no phases"),
        (
            {"phases": [{"run": {"epochs": 1}, "objective": {"terms": [{"method": "mcc"}]}}]},
            r"data\.target: is missing; objective's mcc reads it \(phases\[0\]\)",
        ),
        (
            {"phases": [{"run": {"epochs": 1}, "objective": {"task": 0, "terms": [{"method": "bss"}]}}]},
            r"phases\[0\]\.objective\.task: 0 leaves the labels of data\.train unread",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(world, changes, told):
    with pytest.raises(ConfigError, match=told):
        world.config(world.root / "none", **changes)


def test_phases_are_written_and_read_back(world, tmp_path):
    made = world.config(tmp_path / "run", phases=HEAD_FIRST)
    (tmp_path / "config.yaml").write_text(configs.dump(made), encoding="utf-8")
    assert configs.load(tmp_path / "config.yaml") == made
    assert [each.out for each in made.phasing()] == [f"{made.out}/phase-1", f"{made.out}/phase-2"]


def test_a_phase_alone_may_read_a_further_domain(world):
    target = {"path": world.data["test"]}
    phases = [{"run": {"steps": 1}, "objective": {"terms": [{"method": "mcc"}]}}]
    config = world.config(Path("x"), data={**world.raw["data"], "target": target}, phases=phases)
    assert config.phasing()[0].data.target is not None and config.objective.plain


def test_adapters_wait_while_the_head_is_trained(world, tmp_path):
    """The head's phase holds the adapters as they were attached, where they change nothing; the source never moves."""
    adapt = {"train": "adapters", "adapters": [{"method": "lora", "rank": 2}]}
    phases = [{"adapt": {"train": "head"}, "run": {"epochs": 1}}]
    commands.run(world.config(tmp_path / "out", adapt=adapt, phases=phases), console=console())
    page = json.loads((tmp_path / "out" / "phase-1" / "phase.json").read_text())
    assert [row["group"] for row in page["groups"]] == ["head", "frozen"]
    job = prepare.prepare(world.config(tmp_path / "out", adapt=adapt, phases=phases), lambda text: None)
    start, _ = gone_through(job, None, None, None).start(0)
    assert all(not np.any(leaf) for path, leaf in flatten(start.params).items() if path.endswith("@b"))
    base, found = flatten(job.trunk.params), flatten(finished.adapted(tmp_path / "out").params)
    for path, leaf in found.items():
        if path.endswith("@b"):
            assert np.any(leaf)
        elif path.endswith("@base") or path in base:
            np.testing.assert_array_equal(leaf, base[path.removesuffix("@base")])


def test_phases_on_a_mesh_are_those_of_one_device(world, whole, tmp_path):
    commands.run(world.config(tmp_path / "out", phases=HEAD_FIRST, mesh={"data": 2, "fsdp": 2}), console=console())
    for part in ("phase-1", "phase-2", "."):
        runs = (whole[0] / part, tmp_path / "out" / part)
        one, four = ([line["loss"] for line in lines(run) if line["kind"] == "train"] for run in runs)
        assert len(one) == len(four) > 0
        np.testing.assert_allclose(four, one, rtol=1e-5)
