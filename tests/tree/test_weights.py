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
