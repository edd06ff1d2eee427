"""The loader: every example once, few shapes, shards that agree, and exact resume at every position."""

import json

import numpy as np
import pytest

from jaxtransfer.data import DataError, Examples, batches
from jaxtransfer.data.loader import collate

BUCKETS = (4, 8, 16, 32)


def make(n=37, seed=0, longest=16):
    lengths = np.random.default_rng(seed).integers(1, longest + 1, n)
    rows = [np.full(length, 100 + i, np.int32) for i, length in enumerate(lengths)]
    return Examples(
        ragged={"input_ids": rows, "token_type_ids": [row * 0 + 1 for row in rows]},
        fixed={"labels": np.arange(n, dtype=np.int32) % 3},
        pad={"input_ids": 7},
    )


def loader(examples=None, **options):
    options = {"batch": 4, "shuffle": True, "buckets": BUCKETS, "seed": 5, "epochs": 2} | options
    return batches(examples or make(), **options)


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_example_once_an_epoch(shuffle):
    data = loader(shuffle=shuffle, epochs=3)
    assert data.steps_per_epoch == 10
    for epoch in range(3):
        seen = np.concatenate([next(data)["index"] for _ in range(10)])
        assert sorted(seen[seen >= 0]) == list(range(37))
        assert (seen < 0).sum() == 3
        assert data.epoch == epoch + 1
    with pytest.raises(StopIteration):
        next(data)


def test_rows_hold_their_example():
    examples = make()
    for batch in loader(examples):
        for row, i in enumerate(batch["index"]):
            ids, mask = batch["input_ids"][row], batch["attention_mask"][row]
            if i < 0:
                assert (ids == 7).all()
                assert mask.tolist() == [1] + [0] * (len(mask) - 1)
                assert (batch["labels"][row], batch["weight"][row]) == (0, 0)
            else:
                length = len(examples.ragged["input_ids"][i])
                assert (ids[:length] == 100 + i).all()
                assert (ids[length:] == 7).all()
                assert batch["token_type_ids"][row].sum() == mask.sum() == length
                assert (batch["labels"][row], batch["weight"][row]) == (i % 3, 1)
        assert {name: str(array.dtype) for name, array in batch.items()} == {
            "input_ids": "int32",
            "token_type_ids": "int32",
            "attention_mask": "int32",
            "labels": "int32",
            "weight": "float32",
            "index": "int32",
        }


def test_few_shapes():
    """As many as buckets in use; an epoch has one incomplete batch at the most."""
    data = loader(make(200), batch=8)
    shapes, incomplete = set(), 0
    for _ in range(data.steps_per_epoch):
        batch = next(data)
        shapes.add(batch["input_ids"].shape)
        incomplete += (batch["weight"] == 0).any()
    assert shapes == {(8, 4), (8, 8), (8, 16)}
    assert data.shapes == (4, 8, 16)
    assert data.steps_per_epoch == 25
    assert incomplete == 0
    assert loader(make(30, longest=4)).shapes == (4,)


def test_lengths_hold_their_rows_and_little_more():
    """Only what is left over of a bucket rides in a longer batch."""
    data = loader(make(200), batch=8)
    padded = 0
    for _ in range(data.steps_per_epoch):
        batch = next(data)
        lengths = batch["attention_mask"].sum(1)
        padded += (np.array([next(b for b in BUCKETS if b >= n) for n in lengths]) < batch["input_ids"].shape[1]).sum()
    assert padded <= 2 * 7


def test_shuffling():
    plain, other, again, moved = loader(shuffle=False), loader(), loader(), loader(seed=6)
    first = [batch["index"].tolist() for batch in other]
    assert first == [batch["index"].tolist() for batch in again]
    assert first != [batch["index"].tolist() for batch in moved]
    assert first[:10] != first[10:]
    fixed = [batch["index"].tolist() for batch in plain]
    assert fixed[:10] == fixed[10:]
    lengths, mixed = (
        [batch["input_ids"].shape[1] for batch in loader(make(200), shuffle=shuffle, epochs=1)]
        for shuffle in (False, True)
    )
    assert lengths == sorted(lengths) == sorted(mixed) != mixed


@pytest.mark.parametrize("epochs", [2, None])
def test_resume_at_every_position(epochs):
    """Across the end of an epoch, from JSON, into a fresh loader and into a used one."""
    steps = 20
    data = loader(epochs=epochs)
    states, wanted = [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(data.state())))
        wanted.append(next(data))
    used = loader(epochs=epochs)
    for position, state in enumerate(states):
        fresh = loader(epochs=epochs)
        fresh.restore(state)
        used.restore(state)
        assert fresh.position == position
        assert fresh.epoch == position // 10
        for want in wanted[position : position + 3]:
            assert same(next(fresh), want)
        assert same(next(used), wanted[position])
        assert used.state() == {**state, "position": position + 1}


def test_resume_at_the_end_gives_nothing():
    data = loader()
    assert len(list(data)) == 20
    end = data.state()
    fresh = loader()
    fresh.restore(end)
    assert list(fresh) == []


def test_a_finished_loader_continues_where_it_is_put():
    data = loader()
    batches = list(data)
    data.restore({**data.state(), "position": 13})
    assert all(same(a, b) for a, b in zip(data, batches[13:], strict=True))


def test_a_finished_loader_iterates_anew():
    data = loader(shuffle=False, epochs=1)
    first, second = list(data), list(data)
    assert len(first) == 10
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_state_of_another_schedule_is_refused():
    state = loader().state()
    changed = make()
    changed.fixed["labels"][3] += 1
    for other in (loader(seed=6), loader(batch=2), loader(shuffle=False), loader(buckets=(16,)), loader(changed)):
        with pytest.raises(DataError, match=r"examples, batch, buckets, shuffle or seed have changed"):
            other.restore(state)
    with pytest.raises(DataError, match=r"position 21 is not in 0\.\.20"):
        loader().restore({**state, "position": 21})


@pytest.mark.parametrize("count", [2, 4])
def test_shards_are_the_rows_of_the_whole(count):
    whole = list(loader())
    shards = [list(loader(process_index=i, process_count=count)) for i in range(count)]
    for step, batch in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert same({k: np.concatenate([part[k] for part in parts]) for k in batch}, batch)


def test_state_moves_between_process_counts():
    whole = loader()
    for _ in range(13):
        next(whole)
    half = loader(process_index=1, process_count=2)
    half.restore(whole.state())
    assert np.array_equal(next(half)["index"], next(whole)["index"][2:])


@pytest.mark.parametrize(("batch", "index", "count"), [(4, 0, 3), (4, 2, 2), (0, 0, 1)])
def test_a_batch_that_cannot_be_shared(batch, index, count):
    with pytest.raises(DataError, match=f"process {index} of {count} cannot have its rows of a batch of {batch}"):
        loader(batch=batch, process_index=index, process_count=count)


def test_fixed_fields_alone():
    """Images need no buckets, and have no mask."""
    data = batches(
        Examples(fixed={"pixel_values": np.ones((5, 2, 2, 3), np.float32)}), batch=4, shuffle=False, epochs=1
    )
    first, second = data
    assert first.keys() == {"pixel_values", "weight", "index"}
    assert second["weight"].tolist() == [1, 0, 0, 0]
    assert second["pixel_values"].sum() == 12


def test_collate_pads_trailing_dimensions():
    examples = Examples(ragged={"input_features": [np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)]})
    out = collate(examples, np.array([1, 0, -1]), 4)
    assert out["input_features"].shape == (3, 4, 3)
    assert out["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("fields", [{}, {"labels": np.zeros(0)}, {"labels": np.zeros(2), "ids": np.zeros(3)}])
def test_fields_must_agree(fields):
    with pytest.raises(DataError, match="same number of rows"):
        Examples(fixed=fields)
