import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtransfer.tree import TreeError, combine, flatten, partition
from tests.tree.test_paths import Pair
from tests.tree.trees import equal, trees


@given(trees(), st.randoms(use_true_random=False))
def test_combine_inverts_partition(tree, random):
    mask = jax.tree.map(lambda _: random.random() < 0.5, tree)
    selected, rest = partition(tree, mask)
    assert equal(combine(selected, rest), tree) and equal(combine(rest, selected), tree)
    chosen = {path for path, keep in flatten(mask).items() if keep}
    assert set(flatten(selected)) == chosen
    assert set(flatten(rest)) == set(flatten(tree)) - chosen


def test_a_mask_may_be_a_function_of_the_path():
    tree = {"q": {"kernel": Pair(1, 2)}, "bias": 3}
    selected, rest = partition(tree, lambda path: path.endswith("@scale"))
    assert flatten(selected) == {"q/kernel@scale": 2}
    assert flatten(rest) == {"bias": 3, "q/kernel@base": 1}
    assert combine(selected, rest) == tree


def test_a_false_value_is_a_leaf():
    assert combine({"a": 0, "b": None}, {"a": None, "b": np.zeros(())}) == {"a": 0, "b": 0}


def test_absent_on_both_sides_stays_absent():
    assert combine({"a": None, "b": 1}, {"a": None, "b": None}) == {"a": None, "b": 1}


def test_a_leaf_on_both_sides_is_refused_by_name():
    with pytest.raises(TreeError, match="combine: b/c is on both sides"):
        combine({"a": 1, "b": {"c": 1}}, {"a": None, "b": {"c": 2}})


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        ({"a": 1, "b": None}, {"a": None}, r"b \(first\)"),
        ({"a": 1}, {"a": None, "b": 1}, r"b \(second\)"),
        ({"a": {"b": 1}}, {"a": None}, r"a/b \(first\), a \(second\)"),
        ({"a": None}, {"a": {"b": 1}}, r"a \(first\), a/b \(second\)"),
        ({"a": [1]}, {"a": {"0": None}}, "in the types of their nodes"),
    ],
)
def test_another_structure_is_refused(first, second, where):
    with pytest.raises(TreeError, match=f"the two sides differ in structure.*{where}") as error:
        combine(first, second)
    assert "\n" not in str(error.value)


def test_a_mask_of_another_structure_is_refused():
    with pytest.raises(TreeError, match=r"the mask and the tree differ in structure.*b \(second\)"):
        partition({"a": 1, "b": 2}, {"a": True})
