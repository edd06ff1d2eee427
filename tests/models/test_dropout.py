"""Dropout: its rate, its independence, and that a mask depends on the key and the place alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.models.layers import dropout
from jaxtransfer.parallel import make_mesh

KEY = jax.random.key(3)


def kept(rate, shape=(64, 32, 128), key=KEY):
    return np.asarray(dropout(jnp.ones(shape), rate, key) > 0)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_as_many_are_dropped_as_the_rate_says_and_the_mean_stays(rate, impl):
    x = dropout(jnp.ones((64, 32, 128)), rate, jax.random.key(3, impl=impl))
    error = 5 * np.sqrt(rate * (1 - rate) / x.size)  # five standard deviations
    assert abs(float((x == 0).mean()) - rate) < error
    assert abs(float(x.mean()) - 1) < error / (1 - rate)
    assert len(np.unique(x)) == 2


@pytest.mark.parametrize("shape", [(1,), (7,), (64, 3), (5, 4, 3, 130), (2, 3, 4, 5, 6)])
def test_every_shape_has_masks(shape):
    found = np.stack([kept(0.5, shape, key) for key in jax.random.split(KEY, 64)])
    assert found.shape == (64, *shape)
    count = found[0].size
    assert len(np.unique(found.reshape(64, -1).T, axis=0)) == count  # no two places have the same 64 draws


def test_places_do_not_know_of_one_another():
    """The correlation of a place with the next, and with those that share its block of random bits."""
    x = kept(0.5).astype(float) - 0.5
    for axis, by in [(0, 1), (1, 1), (2, 1), (2, 32), (2, 64), (2, 96)]:
        found = 4 * np.mean(x * np.roll(x, by, axis))
        assert abs(found) < 5 / np.sqrt(x.size), (axis, by)


@pytest.mark.parametrize("rate", [1e-9, 1 - 1e-9])
def test_rates_at_the_ends_give_finite_values(rate):
    x = np.asarray(dropout(jnp.ones((64, 64)), rate, KEY))
    assert np.isfinite(x).all() and (x == 0).mean() == pytest.approx(rate, abs=1e-3)


@pytest.mark.parametrize(
    "spec", [P("data"), P("data", None, "tensor"), P(None, "data", "tensor"), P(None, None, "data")]
)
def test_a_mask_is_the_same_on_every_mesh(spec, devices):
    mesh = make_mesh(data=4, tensor=2)
    x = jax.device_put(jnp.ones((8, 16, 32)), NamedSharding(mesh, spec))
    found = jax.jit(lambda x: dropout(x, 0.3, KEY))(x)
    np.testing.assert_array_equal(found, dropout(jnp.ones((8, 16, 32)), 0.3, KEY))


def test_keys_of_the_old_kind_and_many_at_once_do():
    x = jnp.ones((4, 8))
    np.testing.assert_array_equal(dropout(x, 0.3, jax.random.PRNGKey(3)), dropout(x, 0.3, KEY))
    keys = jax.random.split(KEY, 3)
    many = jax.vmap(lambda key: dropout(x, 0.3, key))(keys)
    for found, key in zip(many, keys, strict=True):
        np.testing.assert_array_equal(found, dropout(x, 0.3, key))


def test_half_precision_stays_and_the_gradient_is_the_mask():
    x = jnp.full((4, 128), 2.0, jnp.bfloat16)
    y, back = jax.vjp(lambda x: dropout(x, 0.25, KEY), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(back(jnp.ones_like(y))[0], y / 2)
