"""Rows in memory and on disk: what is put comes back, what a crash left is told from what is whole."""

import json

import numpy as np
import pytest

from jaxtransfer.features import FeatureError, Store
from jaxtransfer.features import store as stores
from jaxtransfer.features.prefix import Entry

LENGTHS = np.array([3, 1, 4, 2, 2, 5])
ENTRIES = {"hidden": Entry((2,), np.dtype("float32"), True), "pooled": Entry((3,), np.dtype("bfloat16"), False)}
ORDER = [np.array([5, 0, 3, 1, 2, 4])]


def row(example):
    """The entries of an example, told by its number."""
    hidden = np.arange(2 * LENGTHS[example], dtype=np.float32).reshape(-1, 2) + 100 * example
    return {"hidden": hidden, "pooled": np.full(3, example, ENTRIES["pooled"].dtype)}


def put(store, examples):
    rows = [row(example) for example in examples]
    store.put({name: [each[name] for each in rows] for name in ENTRIES})


def same(store, example):
    found, wanted = store.row(example), row(example)
    return all(found[name].dtype == x.dtype and np.array_equal(found[name], x) for name, x in wanted.items())


@pytest.fixture(autouse=True)
def every_piece(monkeypatch):
    monkeypatch.setattr(stores, "_PIECE", 1)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_is_put_comes_back(where, tmp_path):
    folder = tmp_path / "features" if where == "disk" else None
    store = Store(ENTRIES, LENGTHS, ORDER, folder=folder)
    put(store, ORDER[0][:4])
    assert not store.whole
    put(store, ORDER[0][4:])
    assert store.whole and all(same(store, example) for example in range(6))
    assert store.bytes == 17 * 2 * 4 + 6 * 3 * 2
    assert (folder is None) == (not list(tmp_path.iterdir()))


def test_a_pass_goes_on_where_it_was_stopped(tmp_path):
    put(Store(ENTRIES, LENGTHS, ORDER, folder=tmp_path, key="a"), ORDER[0][:3])
    again = Store(ENTRIES, LENGTHS, ORDER, folder=tmp_path, key="a")
    assert again.done == 3
    put(again, ORDER[0][3:])
    assert all(same(Store(ENTRIES, LENGTHS, ORDER, folder=tmp_path, key="a"), example) for example in range(6))
    assert Store(ENTRIES, LENGTHS, ORDER, folder=tmp_path, key="b").done == 0


@pytest.mark.parametrize("damage", ["a byte", "a cut line", "a shorter file"])
def test_what_is_damaged_is_made_again(damage, tmp_path):
    store = Store(ENTRIES, LENGTHS, ORDER, folder=tmp_path)
    for example in ORDER[0]:
        put(store, [example])
    (data,), (journal,) = tmp_path.glob("*-hidden-0"), tmp_path.glob("*.jsonl")
    if damage == "a byte":
        raw = bytearray(data.read_bytes())
        raw[8 * LENGTHS[ORDER[0][:2]].sum() + 1] ^= 1  # in the third row
        data.write_bytes(raw)
    elif damage == "a cut line":
        journal.write_text(journal.read_text()[:-9])
    else:
        data.write_bytes(data.read_bytes()[:-1])
    again = Store(ENTRIES, LENGTHS, ORDER, folder=tmp_path)
    assert again.done == {"a byte": 2, "a cut line": 5, "a shorter file": 0}[damage]
    put(again, ORDER[0][again.done :])
    assert all(same(again, example) for example in range(6))
    assert [json.loads(line)["stop"] for line in journal.read_text().splitlines()][-1] == 6


def test_processes_write_parts_and_read_all(tmp_path):
    parts = [np.array([5, 0, 3]), np.array([1, 2, 4])]
    mine = [Store(ENTRIES, LENGTHS, parts, own=own, folder=tmp_path, key="a") for own in (0, 1, None)]
    for store, part in zip(mine, parts, strict=False):
        put(store, part)
    assert all(store.whole and same(store, example) for store in mine for example in range(6))


def test_several_processes_need_a_folder():
    with pytest.raises(FeatureError, match="a folder that all of them see"):
        Store(ENTRIES, LENGTHS, [ORDER[0][:3], ORDER[0][3:]])


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores.os, "posix_fallocate", full, raising=False)
    with pytest.raises(FeatureError, match="features cannot be written: No space left on device"):
        put(Store(ENTRIES, LENGTHS, ORDER, folder=tmp_path), ORDER[0])
    assert not list(tmp_path.glob("*-0"))
