"""A run for every combination: together or in turn, and either way what the single runs give."""

import json
import signal

import pytest

from jaxtransfer import cli, job
from jaxtransfer import config as configs
from jaxtransfer.config import ConfigError
from jaxtransfer.job import caching, sweeping
from jaxtransfer.run import Interrupted
from tests.job.world import World, console, during

HEAD = {"train": "head"}
AXES = {"optimizer.lr": ["3e-3", "3e-2"], "run.seed": ["0", "1"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("sweeping"))


def written(world, out, **changes):
    """The configuration as a file."""
    path = world.root / f"{out}.yaml"
    path.write_text(configs.dump(world.config(world.root / out, **changes)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def single(world):
    """The metrics of one combination by itself."""
    changes = {"adapt": HEAD, "run__epochs": 3, "run__seed": 1, "optimizer__lr": 3e-2}
    job.run(world.config(world.root / "single", **changes), console=console())
    return json.loads((world.root / "single" / "result.json").read_text())


def check(rows, single, world):
    """The row of the combination that ran by itself says the same."""
    (row,) = [row for row in rows if (row["lr"], row["seed"]) == ("3e-2", "1")]
    for split in ("validation", "test"):
        assert row[f"{split} accuracy"]["value"] == pytest.approx(single["metrics"][split]["accuracy"]["value"])
    assert row["step"] == single["run"]["best_step"]


def test_rates_and_seeds_train_together(world, single):
    screen = console()
    path = written(world, "together", adapt=HEAD, run__epochs=3)
    found = job.sweep(path, [], AXES, console=screen)
    told = " ".join(screen.file.getvalue().split())
    assert "4 runs together, as one program" in told and "are computed once for each example (pooler_output)" in told
    assert found["how"] == "together" and len(found["results"]) == 4
    check(found["results"], single, world)
    values = [row["validation accuracy"]["value"] for row in found["results"]]
    assert values == sorted(values, reverse=True)
    assert [row["lr"] for row in found["seeds"]] == ["3e-3", "3e-2"]
    assert all({"value", "low", "high"} <= row["test accuracy"].keys() for row in found["seeds"])
    assert json.loads((world.root / "together" / "sweep.json").read_text()) == found
    assert job.sweep(path, [], AXES, console=screen) == found and "finished" in screen.file.getvalue()


def test_without_a_cache_and_with_lengths_that_differ_they_still_agree(world, single):
    changes = {"adapt": HEAD, "run__epochs": 3, "run__cache": "off", "data__buckets": [12, 16]}
    found = job.sweep(written(world, "bundles", **changes), [], AXES, console=console())
    assert found["how"] == "together" and len(found["results"]) == 4
    assert {row["step"] for row in found["results"]} <= {4, 8, 12}


def test_what_changes_the_program_runs_in_turn(world):
    screen = console()
    axes = {"task.label_smoothing": ["0.0", "0.1"]}
    found = job.sweep(written(world, "in-turn", adapt=HEAD, run__epochs=1), [], axes, console=screen)
    assert found["how"] == "in turn: task.label_smoothing is part of the program"
    assert "2 runs in turn: task.label_smoothing" in screen.file.getvalue()
    folders = sorted(path.name for path in (world.root / "in-turn").iterdir() if path.is_dir())
    assert folders == ["label_smoothing=0.0", "label_smoothing=0.1"]
    assert {row["label_smoothing"] for row in found["results"]} == {"0.0", "0.1"} and "seeds" not in found


@pytest.mark.parametrize(
    "axes, changes, reason",
    [
        (AXES, {"study": {"seeds": [0]}}, "study takes runs of its own"),
        (AXES, {"source__init": "scratch"}, "draws another model by seed"),
        (AXES, {"objective": {"terms": [{"method": "l2_sp"}]}}, "the objective has terms"),
        ({"adapt.last": ["1", "2"]}, {}, "adapt.last is part of the program"),
    ],
)
def test_why_runs_are_different_programs(world, axes, changes, reason):
    assert reason in sweeping._differ(world.config(world.root / "x", **changes), axes)


def test_why_one_program_is_not_used(world, monkeypatch):
    whole = job.commands.prepare(world.config(world.root / "x"), lambda text: None)
    assert "nothing to share" in sweeping._unfit(whole, 4, True)
    head = job.commands.prepare(world.config(world.root / "x", adapt=HEAD), lambda text: None)
    assert sweeping._unfit(head, 4, True) is None
    monkeypatch.setattr(sweeping, "MEMORY", 100)
    assert "their states would take" in sweeping._unfit(head, 4, True)


def test_values_that_nothing_reads_are_refused(world):
    changes = {"adapt": HEAD, "optimizer__groups": {"head": {"lr": 1e-2}}}
    path = written(world, "unread", **changes)
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 3e-3 and 3e-2 make the same run: it trains head at 0\.01"):
        job.sweep(path, [], AXES, console=console())
    with pytest.raises(ConfigError, match=r"optimizer\.groups\.head\.lr: 1e-2 and 0\.01 make the same run"):
        job.sweep(path, [], {"optimizer.groups.head.lr": ["1e-2", "0.01"]}, console=console())


def test_a_rate_that_nothing_reads_is_told(world):
    told = []
    changes = {"optimizer__groups": {"head": {"lr": 1e-2}}}
    job.commands.prepare(world.config(world.root / "x", adapt=HEAD, **changes), told.append)
    assert "nothing that trains reads optimizer.lr: optimizer.groups.head.lr is 0.01" in told
    for adapt, more in [({"train": "full"}, changes), (HEAD, {}), (HEAD, {**changes, "study": {"seeds": [0]}})]:
        told.clear()
        job.commands.prepare(world.config(world.root / "x", adapt=adapt, **more), told.append)
        assert not [line for line in told if "optimizer.lr" in line], (adapt, more)


@pytest.mark.parametrize("text", ["lr", "lr=", "lr=1e-3", "lr=1e-3,1e-3", "=1,2", "seed=4..3", "lr=1,,2"])
def test_axes_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="--sweep"):
        sweeping.parse_axes([text])


def test_a_key_is_swept_once():
    with pytest.raises(ConfigError, match=r"run\.seed is swept already"):
        sweeping.parse_axes(["seed=0..1", "run.seed=2,3"])


def test_the_command_line_reads_axes(world, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(job, "sweep", lambda *args, console: seen.append(args) or {"how": "together"})
    path = written(world, "cli", adapt=HEAD)
    arguments = ["run", str(path), "--sweep", "seed=0..1", "--data.batch", "8", "--sweep=optimizer.lr=1,2"]
    assert cli.main(arguments) == 0
    assert seen == [(path, [("data.batch", "8")], {"run.seed": ["0", "1"], "optimizer.lr": ["1", "2"]})]
    assert cli.main(["run", str(path), "--sweep", "optimizer.lrr=1,2"]) == 0 and len(seen) == 2
    monkeypatch.undo()
    assert cli.main(["run", str(path), "--sweep", "optimizer.lrr=1,2"]) == 2
    assert "optimizer.lrr" in capsys.readouterr().err


def test_a_run_that_diverges_has_no_value(world):
    axes = {"optimizer.lr": ["3e-3", "1e38"]}
    changes = {"adapt": HEAD, "run__epochs": 3, "run__max_rejected": 2, "optimizer__name": "sgd"}
    found = job.sweep(written(world, "diverged", **changes), [], axes, console=console())
    rows = {row["lr"]: row for row in found["results"]}
    assert rows["3e-3"]["validation accuracy"]["value"] is not None
    assert rows["1e38"]["validation accuracy"]["value"] is None and rows["1e38"]["step"] is None
    assert found["results"][-1]["lr"] == "1e38" and caching.FOLDER not in map(str, (world.root / "diverged").iterdir())


def test_a_stopped_sweep_says_how_it_goes_on(world):
    axes, further = {"run.epochs": ["1", "2"]}, "the same command goes on with the runs that are not finished"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as caught:
        during(patch, 2)
        job.sweep(written(world, "stopped", adapt=HEAD), [], axes, console=console())
    assert caught.value.further == further

    def stopped(*_):
        raise Interrupted(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr(sweeping, "train_together", stopped)
        job.sweep(written(world, "stopped-together", adapt=HEAD), [], AXES, console=console())
    assert caught.value.further == further
