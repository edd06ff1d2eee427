import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtransfer.tree import flatten, map_with_path, unflatten
from jaxtransfer.tree.paths import natural, path_of, weight_path
from jaxtransfer.tree.weights import Weight
from tests.tree.trees import NAMES, equal, trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair(Weight):
    """A leaf type with two parts."""

    base: object
    scale: object


def test_flatten_is_in_natural_order_whatever_the_order_of_the_keys():
    tree = {"blocks": {"10": {"w": 1}, "2": {"w": 2}, "0": {"w": 3}}, "a": 0, "head": {"b": 5}}
    assert list(flatten(tree)) == ["a", "blocks/0/w", "blocks/2/w", "blocks/10/w", "head/b"]


def test_parts_of_leaf_types_are_addressed_behind_an_at_sign():
    tree = {"head": {"kernel": Pair(Pair(1, 2), 3)}}
    assert flatten(tree) == {"head/kernel@base@base": 1, "head/kernel@base@scale": 2, "head/kernel@scale": 3}
    assert {weight_path(path) for path in flatten(tree)} == {"head/kernel"}
    assert flatten(Pair(1, 2)) == {"@base": 1, "@scale": 2}


def test_sequences_count_as_keys():
    assert flatten({"a": [1, (2, 3)]}) == {"a/0": 1, "a/1/0": 2, "a/1/1": 3}
    assert path_of(()) == ""


def test_absent_leaves_have_no_path_unless_asked_for():
    tree = {"a": None, "b": 1}
    assert flatten(tree) == {"b": 1}
    assert flatten(tree, is_leaf=lambda x: x is None) == {"a": None, "b": 1}


@given(trees())
def test_unflatten_inverts_flatten(tree):
    flat = flatten(tree)
    assert equal(unflatten(flat), tree)
    assert len(flat) == len(jax.tree.leaves(tree))


@given(st.dictionaries(NAMES, st.integers(), max_size=6))
def test_natural_order_is_total_and_counts_numbers_by_value(tree):
    paths = list(flatten(tree))
    assert paths == sorted(paths, key=natural) and set(paths) == set(tree)


def test_a_digit_that_is_no_decimal_is_a_letter():
    assert sorted(["²", "10", "2"], key=natural) == ["²", "2", "10"]


@pytest.mark.parametrize("tree", [{"a/b": 1, "a": {"b": 2}}, {"a": {"b/c": 1, "b": {"c": 2}}, "z": 0}])
def test_two_leaves_of_one_path_are_refused(tree):
    with pytest.raises(ValueError, match=r"two leaves have the path 'a/b(/c)?'"):
        flatten(tree)


@pytest.mark.parametrize(
    ("flat", "complaint"),
    [
        ({"a": 1, "a/b": 2}, "a/b: one of its parents is a leaf itself"),
        ({"a/b": 2, "a": 1}, "a: is a leaf and the parent of other leaves"),
    ],
)
def test_unflatten_refuses_a_path_that_is_leaf_and_parent(flat, complaint):
    with pytest.raises(ValueError, match=complaint):
        unflatten(flat)


def test_map_with_path_takes_several_trees_and_keeps_leaf_types():
    a, b = {"k": Pair(np.ones(2), np.zeros(1))}, {"k": Pair(jnp.ones(2), jnp.ones(1))}
    out = map_with_path(lambda path, x, y: (path, float(x.sum() + y.sum())), a, b)
    assert out == {"k": Pair(("k@base", 4.0), ("k@scale", 1.0))}
