"""Packing: whatever the lengths, every token of every document stands once in one place that says whose it is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtransfer.data import DataError
from jaxtransfer.data.packing import pack, plan

SIZE = 12
LENGTHS = st.lists(st.integers(1, SIZE), min_size=1, max_size=40)


@given(LENGTHS)
@settings(deadline=None)
def test_every_document_in_one_row_that_holds_it(lengths):
    rows = plan(lengths, SIZE)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    full = [sum(lengths[document] for document in row) for row in rows]
    assert max(full) <= SIZE
    assert all(row == sorted(row) for row in rows)
    # No two rows could be one, which also bounds the number of rows by twice the fewest.
    assert len(rows) == 1 or sum(sorted(full)[:2]) > SIZE


@given(LENGTHS)
@settings(deadline=None)
def test_every_token_once_with_its_neighbours(lengths):
    ids = [np.arange(n, dtype=np.int32) + 100 * (i + 1) for i, n in enumerate(lengths)]
    rows = plan(lengths, SIZE)
    out = pack({"input_ids": ids, "labels": [-x for x in ids]}, rows, SIZE, {"labels": -7})
    assert {array.shape for array in out.values()} == {(len(rows), SIZE)}
    real = out["segment_ids"] > 0
    np.testing.assert_array_equal(out["labels"], np.where(real, -out["input_ids"], -7))
    np.testing.assert_array_equal(out["input_ids"][~real], 0)
    np.testing.assert_array_equal(out["position_ids"][~real], 0)
    for row, documents in enumerate(rows):
        assert set(out["segment_ids"][row].tolist()) - {0} == set(range(1, len(documents) + 1))
        for segment, document in enumerate(documents, 1):
            (where,) = np.nonzero(out["segment_ids"][row] == segment)
            assert (np.diff(where) == 1).all()
            np.testing.assert_array_equal(out["input_ids"][row, where], ids[document])
            np.testing.assert_array_equal(out["position_ids"][row, where], np.arange(lengths[document]))


def test_rows_are_filled():
    """Lengths as of sentences: hardly any padding, where one row for each would be three quarters of it."""
    lengths = np.random.default_rng(0).integers(10, 60, 500).tolist()
    rows = plan(lengths, 128)
    assert sum(lengths) / (128 * len(rows)) > 0.98
    assert rows == plan(lengths, 128)


@pytest.mark.parametrize("length", [0, SIZE + 1])
def test_a_document_that_no_row_holds(length):
    with pytest.raises(DataError, match=f"packing: document 1 has {length} tokens, a row holds 1 to 12"):
        plan([3, length], SIZE)
