import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxtransfer.tree import TreeError, diff
from tests.tree.trees import trees


def test_every_disagreement_is_listed():
    expected = {"a": np.zeros(2, "float32"), "b": np.zeros(1), "c": np.zeros(3, "int8"), "d": np.zeros(())}
    found = {"a": np.zeros(3, "float32"), "c": np.zeros(3, "float16"), "d": np.zeros(()), "e": {"f": np.zeros(1)}}
    report = diff(expected, found)
    assert report.missing == ("b",)
    assert report.extra == ("e/f",)
    assert report.shapes == (("a", (2,), (3,)),)
    assert report.dtypes == (("c", "int8", "float16"),)
    text = "missing: b; extra: e/f; shape of a: expected (2,), found (3,); dtype of c: expected int8, found float16"
    assert str(report) == text
    with pytest.raises(TreeError) as error:
        report.check("restore")
    assert str(error.value) == f"restore: {text}"


def test_what_is_alike_in_several_layers_is_said_once():
    expected = {"blocks": {str(i): {"w": np.zeros((2, 3), "float32"), "b": np.zeros(3)} for i in range(12)}}
    found = {"blocks": {str(i): {"w": np.zeros((2, 4 if i < 7 else 5), "float32")} for i in range(12) if i != 2}}
    assert str(diff(expected, found)) == (
        "missing: blocks/0-11/b; missing: blocks/2/w; shape of blocks/0-1,3-6/w: expected (2, 3), found (2, 4); "
        "shape of blocks/7-11/w: expected (2, 3), found (2, 5)"
    )
    assert len(diff(expected, found).missing) == 13


def test_dtypes_may_be_left_out():
    a, b = {"a": jnp.zeros(2)}, {"a": jnp.zeros(2, jnp.bfloat16)}
    assert diff(a, b).dtypes == (("a", "float32", "bfloat16"),)
    assert not diff(a, b, dtypes=False)


@given(trees())
def test_no_difference_with_itself_or_its_shapes(tree):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    for report in (diff(tree, tree), diff(abstract, tree), diff(tree, abstract)):
        assert not report and str(report) == "no difference"
        report.check("nothing")
