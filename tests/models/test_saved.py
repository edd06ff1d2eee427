"""What the backward pass keeps: of cheap functions what goes in, of a softmax what comes out, of dropout a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtransfer.models import apply, layers
from jaxtransfer.models.attention import attention
from tests.models import zoo

LEAN = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def saved(f, *args):
    """Shape and dtype of the arrays that the backward pass of a function holds, each once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(jax.vjp(f, *args)[1])}
    return sorted((leaf.shape, leaf.dtype.name) for leaf in leaves.values() if leaf.ndim > 1)


def alike(f, g, *args):
    """Both functions have one value, gradient and Hessian-vector product."""
    for of in (lambda f: f, lambda f: jax.grad(total(f)), lambda f: forward_over_reverse(total(f))):
        np.testing.assert_allclose(of(f)(*args), of(g)(*args), rtol=1e-5, atol=1e-6)


def total(f):
    return lambda *args: jnp.sum(jnp.sin(f(*args)))


def forward_over_reverse(f):
    return lambda x, *args: jax.jvp(lambda x: jax.grad(f)(x, *args), (x,), (jnp.cos(x),))[1]


@pytest.mark.parametrize("name", LEAN)
def test_an_activation_keeps_its_input(name):
    x = drawn(3, 7)
    assert saved(layers.ACTIVATIONS[name], x) == [((3, 7), "float32")]
    assert len(saved(LEAN[name], x)) > 1, "jax keeps more: what the library does about it is not needed any more"
    alike(layers.ACTIVATIONS[name], LEAN[name], x)


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
def test_a_gate_keeps_its_two_inputs(name):
    gate, x = drawn(3, 7), drawn(3, 7, 1)[..., 0]
    assert saved(lambda gate, x: layers.gated(name, gate, x), gate, x) == [((3, 7), "float32")] * 2
    alike(lambda gate, x: layers.gated(name, gate, x), lambda gate, x: LEAN[name](gate) * x, gate, x)


def test_a_softmax_keeps_its_output():
    x = drawn(3, 7)
    assert saved(layers.softmax, x) == [((3, 7), "float32")]
    assert len(saved(jax.nn.softmax, x)) > 1, "jax's own is as good now"
    alike(layers.softmax, jax.nn.softmax, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_keeps_its_probabilities_once_and_a_mask(dtype):
    q, k, v = (drawn(2, 16, 12).astype(dtype) for _ in range(3))
    mask = jnp.ones((2, 16), bool)
    found = saved(lambda q, k, v: attention(q, k, v, mask, heads=3, rate=0.1, key=jax.random.key(0)), q, k, v)
    scores = [dtype for shape, dtype in found if shape == (2, 3, 16, 16)]
    # The probabilities and what dropout left of them; the padding and its zeros, which are the same in every layer.
    assert scores == ["bool", "bool", "float32", "float32"]
    assert [shape for shape, _ in found if shape[-1] == 4] == [(2, 3, 16, 4)] * 3


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_keeps_its_input_in_its_own_dtype(kind, dtype):
    norm = layers.LayerNorm(7, eps=1e-6) if kind == "layer" else layers.RMSNorm(7, eps=1e-6)
    graph, params = nnx.split(norm)
    assert saved(lambda params, x: nnx.merge(graph, params)(x), params, drawn(3, 7).astype(dtype)) == [((3, 7), dtype)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rematerialisation_keeps_a_layers_input_and_if_asked_its_products(dtype):
    model, params = zoo.tiny(num_hidden_layers=1, intermediate_size=24)

    def kept(remat):
        """Of one layer, how many arrays of an inner and of an outer width."""

        def hidden(layer):
            whole, key = {**params, "blocks": {"0": layer}}, jax.random.key(1)
            return apply(model, whole, zoo.inputs(), train=True, key=key, remat=remat, dtype=jnp.dtype(dtype))["logits"]

        found = [shape for shape, kind in saved(hidden, params["blocks"]["0"]) if kind == dtype and shape[:2] == (3, 7)]
        return found.count((3, 7, 24)), found.count((3, 7, zoo.TINY["hidden_size"]))

    (everything, _), (products, outer), (nothing, inputs) = map(kept, (None, "dots", "full"))
    assert (everything, products, nothing) == (2, 1, 0)
    assert outer >= inputs + 4, "query, key, value and attention's output"
