"""Meshes of a configuration, and the one that `auto` takes, with devices and without."""

import dataclasses
import types

import jax
import pytest

from jaxtransfer import config as configs
from jaxtransfer import job
from jaxtransfer.config import ConfigError, MeshConfig
from jaxtransfer.job import auto_mesh
from jaxtransfer.job.auto_mesh import GIB, choose
from jaxtransfer.job.meshes import divisible, make_mesh_of
from jaxtransfer.job.prepare import prepare
from tests.job.world import World


def of(split, copied=0.0):
    """Bytes of a device that holds its part of ``split`` GiB, and all of ``copied``."""
    return lambda mesh: (split / mesh.fsdp + copied) * GIB


@pytest.mark.parametrize(
    ("count", "rows", "held", "mesh", "told"),
    [
        (8, 16, of(8), {"data": 8}, "took data 8: of 16.00 GiB a device holds 8.00"),
        (8, 16, of(9), {"data": 4, "fsdp": 2}, "holds 4.50 of parameters, optimizer and gradients, where whole copies"),
        (8, 16, of(60), {"fsdp": 8}, "took fsdp 8: of 16.00 GiB a device holds 7.50"),
        (8, 16, of(0, copied=12), {"fsdp": 8}, "little is left for activations: quantise or train less"),
        (8, 12, of(9), {"data": 3, "fsdp": 2}, "2 of 8 devices are left out, as data.batch does not divide"),
        (1, 16, of(8), {}, "took of one device"),
    ],
)
def test_the_shortest_split_that_leaves_half_of_the_memory(count, rows, held, mesh, told):
    found = choose(divisible(count, rows, 1, whole=False), held, 16 * GIB, count)
    assert found.mesh == MeshConfig(**mesh)
    assert told in found.why


def test_what_divides_a_batch():
    assert divisible(8, 24, 3, whole=True) == [
        MeshConfig(data=8), MeshConfig(data=4, fsdp=2), MeshConfig(data=2, fsdp=4), MeshConfig(fsdp=8)
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"12 rows in 1 microbatches do not divide over 8 devices.*a multiple of 8"):
        divisible(8, 12, 1, whole=True)
    assert divisible(8, 7, 2, whole=False) == [MeshConfig()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def with_memory(monkeypatch, gib):
    monkeypatch.setattr(auto_mesh, "_memory", lambda devices: gib * GIB)


def test_a_run_and_its_explanation_say_what_was_chosen(world, devices, monkeypatch):
    config = world.config(world.root / "auto", mesh="auto", data__batch=8)
    assert config.mesh == "auto" and configs.from_dict(dataclasses.asdict(config)) == config
    assert job.explain(config)["mesh"].startswith("mesh: auto took data 8: of ")
    with_memory(monkeypatch, 0.001)
    said = []
    prepared = prepare(config, said.append)
    assert (prepared.mesh.shape["data"], prepared.mesh.shape["fsdp"]) == (4, 2)
    assert said[0] == prepared.chosen and said[0].startswith("mesh: auto took data 4 x fsdp 2: of 0.00 GiB")
    named = prepare(world.config(world.root / "auto", mesh={"data": 8}, data__batch=8), said.append)
    assert named.identity() == prepared.identity() and named.chosen == ""


def test_the_control_of_a_study_must_fit_as_well(world, devices, monkeypatch):
    """It trains all, where the run trains the head."""
    alone = world.config(world.root / "one", mesh="auto", data__batch=8, adapt={"train": "head"})
    both = world.config(world.root / "two", mesh="auto", data__batch=8, adapt={"train": "head"}, study={"seeds": [0]})
    with_memory(monkeypatch, 0.001)
    assert [prepare(config, str).mesh.shape["fsdp"] for config in (alone, both)] == [1, 2]


def test_phases_anchors_and_a_memory_must_fit_as_well(world, devices, monkeypatch):
    """Where all that trains fits four times, a fifth copy is too many, and a phase counts as the run does."""

    def split(**changes):
        return prepare(world.config(world.root / "none", mesh="auto", data__batch=8, **changes), str).mesh.shape["fsdp"]

    whole = prepare(world.config(world.root / "none"), str)
    with_memory(monkeypatch, 2 * 4.5 * sum(row.bytes for row in whole.rows()) / GIB)
    assert split() == 1
    assert split(objective={"terms": [{"method": "l2_sp", "alpha": 0.1}]}) == 2
    before = {**world.raw["data"], "batch": 8, "replay": {"path": world.data["test"]}}
    assert split(objective={"memory": "a_gem"}, data=before) == 2
    with_memory(monkeypatch, 2 * 3.5 * sum(row.bytes for row in whole.rows()) / GIB)
    assert split(adapt={"train": "head"}) == 1
    assert split(adapt={"train": "head"}, phases=[{"adapt": {"train": "full"}, "run": {"steps": 1}}]) == 2


def test_sources_of_any_size_share_copies(world, devices):
    config = world.config(world.root / "many", mesh="auto", data__batch=4)
    assert make_mesh_of(config).shape["data"] == 4
    assert make_mesh_of(world.config(world.root / "many")) is None


def test_memory_is_the_devices_own_or_a_share_of_the_hosts(devices):
    chip = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 7})
    assert auto_mesh._memory([chip]) == 7
    assert 0 < auto_mesh._memory(devices) * jax.local_device_count() < 2**50


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        ("automatic", "mesh: expected a mapping or auto, got 'automatic'"),
        ({"fsdp": 0}, "mesh.fsdp: must be at least 1, got 0"),
        ({"fspd": 2}, "mesh.fspd: unknown key; did you mean 'fsdp'"),
    ],
)
def test_what_is_no_mesh(world, mesh, told):
    with pytest.raises(ConfigError, match=told):
        world.config(world.root / "none", mesh=mesh)
