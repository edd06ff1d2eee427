"""Weight algebra: ends returned bit for bit, means of what differs, and nothing blended that is not kin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import blend
from jaxtransfer.adapt.blend import BlendError
from jaxtransfer.types import Lineage, Model, Source


def source(seed, digest="d", **more):
    key = jax.random.key(seed)
    params = {"body": {"w": jnp.arange(6.0).reshape(2, 3)}, "head": {"kernel": jax.random.normal(key, (3, 2))}, **more}
    params["body"]["count"] = jnp.asarray(seed)
    return Source(Model("foreign", None, (), {}), params, Lineage("a", digest))


def same(a, b):
    return jax.tree.all(jax.tree.map(jnp.array_equal, a, b))


def test_interpolation_returns_its_ends_and_leaves_what_is_shared():
    a, b = source(0), source(1)
    assert same(blend.interpolate(a, b, 0).params, a.params) and same(blend.interpolate(a, b, 1).params, b.params)
    half = blend.interpolate(a, b, 0.5)
    assert same(half.params["body"]["w"], a.params["body"]["w"]) and half.params["body"]["count"] == 0
    mean = (a.params["head"]["kernel"] + b.params["head"]["kernel"]) / 2
    np.testing.assert_allclose(half.params["head"]["kernel"], mean, atol=1e-6)
    assert half.lineage.operations == ("interpolate(0.5)",)


def test_soups_are_means_by_weight():
    models = [source(i) for i in range(3)]
    kernels = jnp.stack([m.params["head"]["kernel"] for m in models])
    np.testing.assert_allclose(blend.soup(models).params["head"]["kernel"], kernels.mean(0), atol=1e-6)
    got = blend.soup(models, [2, 1, 1]).params["head"]["kernel"]
    np.testing.assert_allclose(got, 0.5 * kernels[0] + 0.25 * (kernels[1] + kernels[2]), atol=1e-6)
    for bad in ([1, 1], [0, 0, 0]):
        with pytest.raises(BlendError, match="of a positive sum"):
            blend.soup(models, bad)
    for empty in (blend.soup, lambda models: blend.greedy_soup(models, len)):
        with pytest.raises(BlendError, match="no models"):
            empty([])


def test_a_greedy_soup_takes_what_does_not_hurt():
    target = source(7).params["head"]["kernel"]

    def at_distance(vector):
        base = source(7)
        return dataclasses.replace(base, params={**base.params, "head": {"kernel": target + vector}})

    one = jnp.zeros((3, 2)).at[0, 0].set(1.0)
    models = [at_distance(-1.1 * one), at_distance(one), at_distance(jnp.full((3, 2), 9.0))]
    found, taken = blend.greedy_soup(models, lambda s: -float(jnp.linalg.norm(s.params["head"]["kernel"] - target)))
    assert taken == (1, 0)
    np.testing.assert_allclose(found.params["head"]["kernel"], target - 0.05 * one, atol=1e-6)


def test_task_vectors_add_and_negate():
    ancestor, a, b = source(0), source(1), source(2)
    va, vb = blend.task_vector(a, ancestor), blend.task_vector(b, ancestor)
    np.testing.assert_allclose(
        blend.add_vectors(ancestor, {"a": (1.0, va)}).params["head"]["kernel"], a.params["head"]["kernel"], atol=1e-6
    )
    both = blend.add_vectors(ancestor, {"a": (1.0, va), "b": (-0.5, vb)}).params["head"]["kernel"]
    k0, ka, kb = (s.params["head"]["kernel"] for s in (ancestor, a, b))
    np.testing.assert_allclose(both, k0 + (ka - k0) - 0.5 * (kb - k0), atol=1e-6)
    with pytest.raises(BlendError, match="'x' is no difference from this model: missing: head/kernel"):
        blend.add_vectors(ancestor, {"x": (1.0, {"body": va["body"]})})


def test_the_average_of_bfloat16_weights_stays_so():
    a = {"w": jnp.ones(3, jnp.bfloat16)}
    out = blend.ema(a, {"w": jnp.zeros(3, jnp.bfloat16)}, 0.5)
    assert out["w"].dtype == jnp.bfloat16 and float(out["w"][0]) == 0.5
    with pytest.raises(BlendError, match=r"in \[0, 1\)"):
        blend.ema(a, a, 1.0)


def test_strangers_are_refused():
    a = source(0)
    with pytest.raises(BlendError, match="no common ancestor"):
        blend.interpolate(a, source(1, digest="other"), 0.5)
    with pytest.raises(BlendError, match="differ in structure: extra: extra"):
        blend.task_vector(a, source(1, extra=jnp.zeros(1)))
    adapted = at.attach(source(1), [("head/kernel", at.lora(1))], jax.random.key(0))
    with pytest.raises(BlendError, match="merge them first"):
        blend.soup([a, adapted])
