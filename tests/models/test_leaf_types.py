"""A leaf type of a user's own: a low-rank update of the query and value kernels, unrolled and scanned."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.models import apply
from jaxtransfer.tree import combine, flatten, layout, match, partition, stack, unflatten, unstack
from jaxtransfer.tree.weights import Weight, linear
from jaxtransfer.types import Head
from tests.models import zoo

ATTACHED = r"blocks/[123]/attention/(query|value)/kernel"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
    """``base + scale a b``, never formed (Hu et al. 2021)."""

    base: Any
    a: Any
    b: Any
    scale: Any

    @property
    def shape(self):
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def materialize(self):
        return self.base + self.scale * (self.a @ self.b)

    def linear(self, x, bias, key):
        return linear(x, self.base, bias) + linear(linear(x, self.a), self.b) * self.scale


def attached(params, b):
    """The tree with the leaf type where the rule says; ``b(shape)`` fills ``b``."""
    marks = flatten(match([(ATTACHED, True)], params, default=False))

    def wrap(path, kernel):
        if not marks[path]:
            return kernel
        a = jax.random.normal(jax.random.key(len(path)), (kernel.shape[0], 2))
        return LowRank(kernel, a, b((2, kernel.shape[1])), jnp.asarray(0.5))

    return unflatten({path: wrap(path, leaf) for path, leaf in flatten(params).items()})


@pytest.fixture(params=["unrolled", "stacked"])
def lay(request):
    return (lambda tree: tree) if request.param == "unrolled" else lambda tree: stack(tree, layout(tree))


def test_the_function_is_unchanged_while_b_is_zero(lay):
    model, params = zoo.tiny()
    tree = attached(params, jnp.zeros)
    assert sum(isinstance(x, LowRank) for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, LowRank))) == 6
    got, want = apply(model, lay(tree), zoo.inputs()), apply(model, lay(params), zoo.inputs())
    assert jnp.array_equal(got["logits"], want["logits"])


def test_it_computes_what_its_materialized_weight_computes(lay):
    model, params = zoo.tiny()
    tree = attached(params, jnp.ones)
    merged = jax.tree.map(
        lambda x: x.materialize() if isinstance(x, LowRank) else x, tree, is_leaf=lambda x: isinstance(x, LowRank)
    )
    got, want = (apply(model, lay(p), zoo.inputs())["logits"] for p in (tree, merged))
    zoo.assert_close(got, want)
    assert not jnp.allclose(got, apply(model, params, zoo.inputs())["logits"], atol=1e-3)


def test_a_stack_is_cut_where_the_leaf_type_begins():
    _, params = zoo.tiny()
    tree = attached(params, jnp.ones)
    assert layout(tree) == {"blocks": ((0, 1), (1, 4))}
    laid = stack(tree, layout(tree))
    kernel = laid["blocks"]["1:4"]["attention"]["query"]["kernel"]
    assert (kernel.shape, kernel.a.shape, kernel.scale.shape) == ((3, 8, 8), (3, 8, 2), (3,))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, unstack(laid), tree))


def test_gradients_flow_to_a_and_b_only():
    model, params = zoo.tiny()
    tree = attached(params, jnp.ones)

    @jax.jit
    def gradient(tree):
        trainable, frozen = partition(tree, match([(r".*/kernel@[ab]", True)], tree, default=False))
        loss = lambda t: jnp.sum(apply(model, combine(t, frozen), zoo.inputs())["logits"] ** 2)  # noqa: E731
        return jax.grad(loss)(trainable)

    unrolled, scanned = flatten(gradient(tree)), flatten(unstack(gradient(stack(tree, layout(tree)))))
    assert set(unrolled) == {
        f"blocks/{i}/attention/{name}/kernel@{part}" for i in (1, 2, 3) for name in ("query", "value") for part in "ab"
    }
    assert all(np.abs(leaf).max() > 0 for leaf in unrolled.values())
    zoo.assert_gradients_close(scanned, unrolled)


def test_an_embedding_and_a_tied_decoder_take_a_leaf_type():
    model, params = zoo.tiny(Head("masked-lm"))
    word = params["embed"]["word"]["embedding"]
    low = LowRank(word, jnp.ones((31, 1)), jnp.ones((1, 8)), jnp.asarray(0.1))
    wrapped = {**params, "embed": {**params["embed"], "word": {"embedding": low}}}
    plain = {**params, "embed": {**params["embed"], "word": {"embedding": low.materialize()}}}
    got, want = (apply(model, p, zoo.inputs())["logits"] for p in (wrapped, plain))
    zoo.assert_close(got, want)


def test_a_leaf_type_of_another_shape_is_refused_by_name():
    model, params = zoo.tiny()
    low = LowRank(jnp.ones((8, 9)), jnp.ones((8, 1)), jnp.ones((1, 9)), jnp.asarray(1.0))
    head = {"out": {**params["head"]["out"], "kernel": low}}
    with pytest.raises(ValueError, match=r"head: .*out/kernel: expected shape \(8, 3\), found \(8, 9\)"):
        apply(model, {**params, "head": head}, zoo.inputs())
