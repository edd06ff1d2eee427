"""Weight algebra: ends returned bit for bit, means of what differs, and nothing blended that is not kin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import blend
from jaxtransfer.adapt.blend import BlendError
from jaxtransfer.tree.weights import materialize
from jaxtransfer.types import Head, Lineage, Model, Source
from tests.adapt.strategies import KEY, moved


def source(seed, digest="d", **more):
    key = jax.random.key(seed)
    params = {
        "body": {"kernel": jnp.arange(6.0).reshape(2, 3)},
        "head": {"kernel": jax.random.normal(key, (3, 2))},
        **more,
    }
    params["body"]["count"] = jnp.asarray(seed)
    return Source(Model("foreign", None, (), {}), params, Lineage("a", digest))


def same(a, b):
    return jax.tree.all(jax.tree.map(jnp.array_equal, a, b))


def test_interpolation_returns_its_ends_and_leaves_what_is_shared():
    a, b = source(0), source(1)
    assert same(blend.interpolate(a, b, 0).params, a.params) and same(blend.interpolate(a, b, 1).params, b.params)
    half = blend.interpolate(a, b, 0.5)
    assert same(half.params["body"]["kernel"], a.params["body"]["kernel"]) and half.params["body"]["count"] == 0
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
        blend.add_vectors(ancestor, {"x": (1.0, dataclasses.replace(va, delta={"body": va.delta["body"]}))})
    with pytest.raises(BlendError, match="'y' is a difference from another model, 7f3a; this is a"):
        blend.add_vectors(ancestor, {"y": (1.0, dataclasses.replace(va, ancestor="7f3a"))})


def test_the_average_of_bfloat16_weights_stays_so():
    a = {"w": jnp.ones(3, jnp.bfloat16)}
    out = blend.ema(a, {"w": jnp.zeros(3, jnp.bfloat16)}, 0.5)
    assert out["w"].dtype == jnp.bfloat16 and float(out["w"][0]) == 0.5
    with pytest.raises(BlendError, match=r"in \[0, 1\)"):
        blend.ema(a, a, 1.0)
    with pytest.raises(BlendError, match=r"of these parameters: shape of w: expected \(3,\), found \(2,\)"):
        blend.ema(a, {"w": jnp.zeros(2, jnp.bfloat16)}, 0.5)


def test_strangers_are_refused():
    a = source(0)
    with pytest.raises(BlendError, match="no common ancestor"):
        blend.interpolate(a, source(1, digest="other"), 0.5)
    with pytest.raises(BlendError, match="differ in structure: extra: extra"):
        blend.task_vector(a, source(1, extra=jnp.zeros(1)))
    with pytest.raises(BlendError, match="no common ancestor"):  # nothing says where either comes from
        blend.soup([source(0, digest=""), source(1, digest="")])


def test_numbers_that_are_not_finite_are_refused_by_name():
    a, b = source(0), source(1)
    vector = blend.task_vector(b, a)
    for wrong, message in (
        (lambda: blend.interpolate(a, b, np.nan), "interpolate: alpha must be a finite number, got nan"),
        (lambda: blend.soup([a, b], [1, np.inf]), r"soup: weights\[1\] must be a finite number, got inf"),
        (lambda: blend.add_vectors(a, {"x": (np.nan, vector)}), "the coefficient of 'x' must be a finite number"),
        (lambda: blend.greedy_soup([a, b], lambda _: np.nan), "no model has a finite score, they are nan, nan"),
    ):
        with pytest.raises(BlendError, match=message):
            wrong()


def test_a_greedy_soup_leaves_out_what_has_no_finite_score():
    scores = iter([np.nan, 0.5, np.inf, 0.7, np.nan])
    found, taken = blend.greedy_soup([source(i) for i in range(4)], lambda _: next(scores))
    assert taken == (3,) and next(scores, None) is None
    assert same(found.params, source(3).params)


def test_models_with_labels_in_another_order_are_strangers():
    def under(*labels, kind="sequence-classification"):
        found = source(0)
        return dataclasses.replace(found, model=dataclasses.replace(found.model, head=Head(kind, labels)))

    with pytest.raises(BlendError, match=r"soup: .* of labels \['no', 'yes'\], the other .* of labels \['yes', 'no'\]"):
        blend.soup([under("no", "yes"), under("yes", "no")])
    with pytest.raises(BlendError, match=r"one in a sequence-classification head .* the other in a token-class"):
        blend.task_vector(under("no", "yes"), under("no", "yes", kind="token-classification"))
    blend.soup([under("no", "yes"), under("LABEL_0", "LABEL_1"), source(0)])


def adapted(seed, make=None, base=None, name="default"):
    """A fine-tuning by adapters of one base: the body's kernel is adapted, the head whole."""
    rules = [("body/kernel", at.lora(2) if make is None else make)]
    start = at.attach(source(0) if base is None else base, rules, KEY, name=name)
    params = {"body": moved(start.params["body"], seed), "head": source(seed).params["head"]}
    return dataclasses.replace(start, params={**start.params, **params})


def kernel(source):
    return materialize(source.params["body"]["kernel"])


def test_models_under_lora_are_blended_as_the_weights_that_they_stand_for():
    tuned = [adapted(i) for i in (1, 2, 3)]
    merged = [at.merge(model) for model in tuned]
    got = blend.soup(tuned, [2, 1, 1])
    assert (
        got.params["body"]["kernel"].a.shape == (2, 6)
        and got.params["body"]["kernel"].base is tuned[0].params["body"]["kernel"].base
    )
    np.testing.assert_allclose(kernel(got), blend.soup(merged, [2, 1, 1]).params["body"]["kernel"], atol=1e-6)
    # WiSE-FT from the base itself, which has no adapter, and beyond the fine-tuning; adapters on top of one another.
    twice = dataclasses.replace(
        tuned[0], params={**tuned[0].params, "body": adapted(4, base=tuned[0], name="second").params["body"]}
    )
    for model in (tuned[0], twice):
        for alpha in (0.25, 1.5):
            got = blend.interpolate(source(0), model, alpha)
            want = blend.interpolate(source(0), at.merge(model), alpha)
            np.testing.assert_allclose(kernel(got), kernel(want), atol=1e-5)
            np.testing.assert_allclose(got.params["head"]["kernel"], want.params["head"]["kernel"], atol=1e-6)
    same = blend.soup([tuned[0], tuned[0]])
    assert same.params["body"]["kernel"] is tuned[0].params["body"]["kernel"]
    with pytest.raises(
        BlendError, match=r"soup: body/kernel: under LoRA lie different bases \(DoRA, an array\): merge the"
    ):
        blend.soup([tuned[0], adapted(1, at.dora(1))])
    with pytest.raises(BlendError, match="task_vector: body/kernel of a is LoRA: merge them first"):
        blend.task_vector(tuned[0], source(0))
