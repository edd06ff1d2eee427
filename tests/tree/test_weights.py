import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.tree import weights
from tests.tree.test_paths import Pair
from tests.tree.trees import draw


class Scaled(Pair):
    """``scale * base``: only what has no default."""

    def materialize(self):
        return self.base * self.scale


jax.tree_util.register_dataclass(Scaled, ["base", "scale"], [])


def test_linear_is_the_matrix_product_in_the_dtype_of_x():
    x, w, b = draw((2, 5, 3), "float32", 0), draw((3, 4), "float32", 1), draw((4,), "float32", 2)
    np.testing.assert_allclose(weights.linear(jnp.asarray(x), jnp.asarray(w), jnp.asarray(b)), x @ w + b, rtol=1e-6)
    y = weights.linear(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w), jnp.asarray(b))
    assert y.dtype == jnp.bfloat16 and y.shape == (2, 5, 4)
    assert weights.linear(jnp.ones(3), jnp.ones((3, 4))).shape == (4,)


def test_a_leaf_type_needs_only_materialize():
    w = Scaled(jnp.asarray(draw((3, 4), "float32", 1)), jnp.asarray(2.0))
    plain, x, b = w.materialize(), jnp.ones((2, 3)), jnp.ones(4)
    assert weights.is_weight(w) and not weights.is_weight(plain)
    assert jnp.array_equal(weights.linear(x, w, b), weights.linear(x, plain, b))
    assert jnp.array_equal(weights.transpose(w), weights.transpose(plain))
    ids = jnp.array([[0, 2]])
    assert jnp.array_equal(weights.take(w, ids), weights.take(plain, ids))
    assert jnp.array_equal(weights.materialize(w), weights.materialize(plain))


def test_take_gives_rows_in_the_dtype_asked_for():
    rows = weights.take(jnp.arange(6, dtype=jnp.int8).reshape(3, 2), jnp.array([[2], [0]]), jnp.bfloat16)
    assert rows.dtype == jnp.bfloat16 and rows.tolist() == [[[4, 5]], [[0, 1]]]


@pytest.mark.parametrize("member", ["shape", "dtype", "materialize"])
def test_what_a_leaf_type_does_not_define_says_so(member):
    with pytest.raises(TypeError, match=f"Pair (does not define {member}|cannot be materialized)"):
        found = getattr(Pair(1, 2), member)
        found()


def graded(x, w, bias):
    """``x w + bias``, and the gradients of a function of it."""
    y, back = jax.vjp(weights.linear, x, w, bias)
    return y, *back(jnp.cos(y))


def factors(dtype):
    x, w, bias = (jnp.asarray(draw(shape, "float32", 0)) for shape in ((2, 5, 3), (3, 4), (4,)))
    return x.astype(dtype), w, bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_and_tokens_as_one_axis_change_nothing(dtype):
    apart = graded(*factors(dtype))
    with weights.whole(True):
        one = graded(*factors(dtype))
    for a, b in zip(apart, one, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        close = {"rtol": 1e-6, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 0.1}
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), **close)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only XLA for CPUs transposes what is summed over two axes")
def test_only_what_is_on_one_device_takes_rows_and_tokens_as_one_axis():
    x, w, _ = factors("float32")
    summed, kept = [], []
    for whole in (False, True):
        with weights.whole(whole):
            summed.append(str(jax.make_jaxpr(jax.grad(lambda w: jnp.sum(weights.linear(x, w))))(w)))
            kept.append(
                sorted(leaf.shape for leaf in jax.tree.leaves(jax.vjp(weights.linear, x, w)[1]) if leaf.ndim > 1)
            )
    assert ["(([0, 1], [0, 1])" in traced for traced in summed] == [True, False]
    assert kept == [[(2, 5, 3), (3, 4)]] * 2, "what is kept has the shape of what was given"


def test_one_axis_of_no_rows():
    _, w, bias = factors("float32")
    with weights.whole(True):
        assert weights.linear(jnp.zeros((0, 5, 3)), w, bias).shape == (0, 5, 4)
