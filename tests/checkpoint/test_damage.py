"""A change of any byte is found before it is used; what is not whole is never chosen."""

import os
import random
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxtransfer import checkpoint
from jaxtransfer.checkpoint import Checkpointer, CheckpointError, DamagedError, arrays
from jaxtransfer.types import Lineage, State
from tests.checkpoint.states import assert_same, files

LINEAGE = Lineage("memory", "d")


def tiny(step: int = 0) -> State:
    params = {"w": jnp.full((2, 3), step, jnp.float32), "b": jnp.full(3, step, jnp.bfloat16)}
    return State(jnp.int32(step), params, {}, (), jax.random.key(step), {})


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("original") / "5", tiny(), {}, LINEAGE, extra={"position": 3})


@pytest.fixture
def copy(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "5"))


def flips(folder: Path, path: Path, where) -> list[str]:
    """The changes that `verify` lets through, or blames on another file."""
    content, missed = path.read_bytes(), []
    for position, bit in where:
        changed = bytearray(content)
        changed[position] ^= 1 << bit
        path.write_bytes(changed)
        try:
            checkpoint.verify(folder)
        except DamagedError as error:
            if str(path) in str(error):
                continue
        missed.append(f"{path} byte {position} bit {bit}")
    path.write_bytes(content)
    return missed


def test_flipped_bits_are_found(copy):
    draw = random.Random(0)
    every = [(path, i, draw.randrange(8)) for path in files(copy) for i in range(path.stat().st_size)]
    sample = draw.sample(every, 300)
    for path in files(copy):
        assert flips(copy, path, [(i, bit) for other, i, bit in sample if other == path]) == []
    checkpoint.verify(copy)  # restored, it is whole again


def test_every_byte_of_the_manifest_counts(copy):
    manifest = copy / "manifest.json"
    assert flips(copy, manifest, [(i, i % 8) for i in range(0, manifest.stat().st_size, 3)]) == []


@pytest.mark.slow
def test_every_bit_of_every_file_counts(copy):
    for path in files(copy):
        assert flips(copy, path, [(i, bit) for i in range(path.stat().st_size) for bit in range(8)]) == []


def _truncate(folder: Path, path: Path) -> bool:
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    return bool(content)


def _append(folder: Path, path: Path) -> bool:
    path.write_bytes(path.read_bytes() + b"\0")
    return True


def _delete(folder: Path, path: Path) -> bool:
    path.unlink()
    return True


def _link(folder: Path, path: Path) -> bool:
    elsewhere = folder.parent / "elsewhere"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)
    return True


def _swap(folder: Path, path: Path) -> bool:
    other = next(p for p in files(folder) if p.read_bytes() != path.read_bytes())
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return True


def _become_a_folder(folder: Path, path: Path) -> bool:
    path.unlink()
    path.mkdir()
    return True


@pytest.mark.parametrize(
    "harm", [_truncate, _append, _delete, _link, _swap, _become_a_folder], ids=lambda f: f.__name__
)
def test_each_file_harmed_is_found_before_it_is_read(original, tmp_path, harm, monkeypatch):
    monkeypatch.setattr(arrays, "read", lambda *_: pytest.fail("an array was read"))
    for i, path in enumerate(files(original)):
        folder = Path(shutil.copytree(original, tmp_path / str(i) / "5"))
        if harm(folder, folder / path.relative_to(original)):
            with pytest.raises(DamagedError) as caught:
                checkpoint.restore(folder, like=tiny(), lineage=LINEAGE)
            assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
            assert harm is _swap or checkpoint.steps(folder.parent) == []


def test_swapped_files_of_two_steps_are_found(tmp_path):
    one, two = (checkpoint.save(tmp_path / str(i), tiny(i), {}, LINEAGE, extra={"at": i}) for i in (1, 2))
    (one / "meta.json.gz").rename(tmp_path / "held")
    (two / "meta.json.gz").rename(one / "meta.json.gz")
    (tmp_path / "held").rename(two / "meta.json.gz")
    for path in (one, two):
        with pytest.raises(DamagedError, match=r"meta\.json"):
            checkpoint.verify(path)


def test_discovery_takes_only_what_is_whole(original, tmp_path):
    for name in ("0", "7", "10", "9", "100"):
        checkpoint.save(tmp_path / name, tiny(), {}, LINEAGE)
    for name in (
        "007",
        "-1",
        "+8",
        "1e3",
        "8.0",
        " 8",
        "8 ",
        "٣",
        "best",
        "12.damaged",
        ".13.tmp-0123456789ab",
        "0x10",
    ):
        checkpoint.save(tmp_path / name, tiny(), {}, LINEAGE)  # whole, but by no plain number
    (tmp_path / "99").mkdir()  # empty
    (tmp_path / "200").write_text("a file")
    (tmp_path / "201").symlink_to(tmp_path / "7")
    (tmp_path / "202").symlink_to(tmp_path / "nowhere")
    shutil.copytree(tmp_path / "7", tmp_path / "203")  # a copy under another number
    foreign = tmp_path / "204"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"format": "other"}')
    shutil.copytree(tmp_path / "7", tmp_path / "205", ignore=shutil.ignore_patterns("manifest.json"))
    shutil.copytree(tmp_path / "7", tmp_path / "206", ignore=shutil.ignore_patterns("arrays"))
    os.mkfifo(tmp_path / "207")
    assert checkpoint.steps(tmp_path) == [0, 7, 9, 10, 100]
    assert checkpoint.latest(tmp_path) == 100
    assert checkpoint.latest(tmp_path / "99") is None and checkpoint.steps(tmp_path / "no") == []


def test_a_newer_format_is_neither_damage_nor_read(original, copy, monkeypatch):
    import zlib

    body = (copy / "manifest.json").read_bytes().split(b"\n")[0].replace(b'"version": 2', b'"version": 3')
    (copy / "manifest.json").write_bytes(body + b"\n%08x\n" % zlib.crc32(body))
    with pytest.raises(
        CheckpointError,
        match="version 3, but 2 is read here; use the jaxtransfer that wrote it",
    ) as caught:
        checkpoint.restore(copy, like=tiny())
    assert not isinstance(caught.value, DamagedError)


def _flip_array(folder: Path) -> None:
    path = max(files(folder / "arrays"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARMS = {
    "flipped": _flip_array,
    "half-deleted": lambda folder: (folder / "manifest.json").unlink(),
    "arrays lost": lambda folder: shutil.rmtree(folder / "arrays"),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_damaged_latest_step_is_set_aside_with_one_warning(tmp_path, harm):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / str(step), tiny(step), {}, LINEAGE, extra={"at": step})
    (tmp_path / "99").mkdir()
    harm(tmp_path / "3")
    with Checkpointer(tmp_path, lineage=LINEAGE) as saver:
        with pytest.warns(UserWarning, match=r"3\.damaged.*went back to step 2") as caught:
            state, _, extra = saver.restore_latest(tiny())
        assert len(caught) == 1 and extra == {"at": 2}
        assert_same(state, tiny(2))
        assert not (tmp_path / "3").exists() and (tmp_path / "3.damaged").is_dir() and (tmp_path / "99").is_dir()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            saver.restore_latest(tiny())
            saver.save(3, tiny(3), {})
            saver.wait()
        assert checkpoint.latest(tmp_path) == 3
        harm(tmp_path / "3")
        with pytest.warns(UserWarning, match=r"3\.damaged\.1"):
            saver.restore_latest(tiny())


def test_all_damaged_is_one_warning_and_none(tmp_path):
    for step in (1, 2):
        _flip_array(checkpoint.save(tmp_path / str(step), tiny(step), {}, LINEAGE))
    with Checkpointer(tmp_path, lineage=LINEAGE) as saver:
        with pytest.warns(UserWarning, match="no earlier step is left") as caught:
            assert saver.restore_latest(tiny()) is None
        assert len(caught) == 1
        assert saver.restore_latest(tiny()) is None


def test_what_does_not_fit_is_not_set_aside(tmp_path):
    path = checkpoint.save(tmp_path / "1", tiny(1), {}, LINEAGE)
    with (
        Checkpointer(tmp_path, lineage=Lineage("other", "e")) as saver,
        pytest.raises(CheckpointError, match="digest e"),
    ):
        saver.restore_latest(tiny())
    checkpoint.verify(path)
