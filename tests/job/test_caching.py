"""Frozen stages computed once: the same run, bit for bit or nearly, and a reason where it is not done."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxtransfer import job
from jaxtransfer.job import caching
from jaxtransfer.job.prepare import prepare
from tests.job.world import World, console, during, lines

LAST = {"train": "last", "last": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("caching"))


@pytest.fixture(scope="module")
def uncached(world):
    """The run with all stages in every epoch."""
    out = world.root / "uncached"
    job.run(world.config(out, adapt=LAST, run__epochs=3, run__cache="off"), console=console())
    return out


def same_run(a: Path, b: Path) -> None:
    """Losses, evaluations and final metrics agree to 1e-6."""
    left, right = lines(a), lines(b)
    assert [event["kind"] for event in left] == [event["kind"] for event in right] and len(left) > 4
    for one, other in zip(left, right, strict=True):
        for name, value in one.items():
            assert value == pytest.approx(other[name], abs=1e-6), (name, one, other)
    metrics = [json.loads((folder / "result.json").read_text())["metrics"]["test"] for folder in (a, b)]
    for name, cell in metrics[0].items():
        assert cell["value"] == pytest.approx(metrics[1][name]["value"], abs=1e-6)


def test_a_cached_run_is_the_same_run(world, uncached):
    out, screen = world.root / "cached", console()
    job.run(world.config(out, adapt=LAST, run__epochs=3), console=screen)
    told = " ".join(screen.file.getvalue().split())
    assert "the 2 frozen stages up to blocks/0, of 5, are computed once for each example (hidden)" in told
    same_run(out, uncached)


def test_what_exceeds_memory_goes_to_disk_and_a_stopped_run_goes_on(world, uncached, monkeypatch):
    monkeypatch.setattr(caching, "MEMORY", 0)
    out, screen = world.root / "on-disk", console()
    config = world.config(out, adapt=LAST, run__epochs=3)
    with monkeypatch.context() as patch:
        during(patch, 7)
        with pytest.raises(BaseException, match="stopped by SIGTERM"):
            job.run(config, console=console())
    assert list((out / caching.FOLDER).glob("*-hidden-0"))
    job.run(config, console=screen)
    assert "16 of them there already" in " ".join(screen.file.getvalue().split())
    assert not (out / caching.FOLDER).exists()
    same_run(out, uncached)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, "training reaches down to embed/norm/bias"),
        ({"run__cache": "off", "adapt": LAST}, "run.cache is off"),
        ({"run__epochs": 1, "adapt": LAST}, "every example is seen once at the most"),
        ({"adapt": {"train": "adapters", "adapters": [{"method": "prompt", "length": 2}]},
          "task__max_length": 14, "data__buckets": [14]}, "embed/prompt/embedding"),
        ({"adapt": {"train": "adapters", "adapters": [{"method": "lora", "rank": 2}]}}, 
          "training reaches down to blocks/0/attention/key/kernel@a"),
        ({"source__init": "scratch", "adapt": LAST}, "none of the source's own: it may differ by seed"),
    ],
)  # fmt: skip
def test_where_it_is_not_done_the_reason_is_told(world, changes, reason):
    config = world.config(world.root / "none", **changes)
    assert job.explain(config)["features"].startswith("all stages run in every epoch: ")
    assert reason in job.explain(config)["features"]


def test_adapters_above_leave_what_is_below_cached(world):
    adapters = [{"method": "lora", "rank": 2, "targets": "blocks/1/.*/kernel"}]
    config = world.config(world.root / "none", adapt={"train": "adapters", "adapters": adapters})
    assert job.explain(config)["features"] == (
        "the 2 frozen stages up to blocks/0, of 5, are computed once for each example (hidden): 0.1 MiB"
    )


def test_a_run_is_the_same_with_and_without(world):
    on, off = (prepare(world.config(world.root / "x", run__cache=cache), print) for cache in ("auto", "off"))
    assert on.identity() == off.identity()
    run = dataclasses.replace(on.config.run, attention="splash")
    elsewhere = dataclasses.replace(on, config=dataclasses.replace(on.config, run=run))
    assert elsewhere.identity() == on.identity()


def test_too_little_room_is_told(world, monkeypatch):
    monkeypatch.setattr(caching, "MEMORY", 0)
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: usage(1000))
    said: list[str] = []
    ready = prepare(world.config(world.root / "x", adapt=LAST), said.append)
    assert caching.cached(ready, world.root / "y", said.append, lambda: None) is ready
    assert "would take 0.1 MiB" in said[-1] and "free" in said[-1]


def test_the_control_from_scratch_has_no_features(world):
    ready = caching.cached(prepare(world.config(world.root / "x", adapt=LAST), print), world.root, print, lambda: None)
    assert ready.features is not None and ready.control.features is None
    batch = next(ready.loader("validation"))
    assert batch["hidden"].dtype == np.float32 and "hidden" not in next(ready.control.loader("validation"))
