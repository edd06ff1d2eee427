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
