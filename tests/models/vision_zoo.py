"""Models of images for the tests: made up and tiny, or from torch."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.models import family
from jaxtransfer.models.api import abstract_init, apply, layout_of
from jaxtransfer.tree import combine, map_with_path, partition, stack
from jaxtransfer.types import Head, Lineage, Source
from tests import torch_reference
from tests.models import zoo

CLASSIFIER = Head("image-classification", ("cat", "dog", "frog"))


def images(rows, height, width, channels=3, seed=0, dtype=np.float32):
    """Normalised images, (rows, height, width, channels)."""
    return np.random.default_rng(seed).standard_normal((rows, height, width, channels)).astype(dtype)


@functools.cache
def tiny(name, head=CLASSIFIER, **raw):
    """A made-up model as a source; its parameters are drawn by numpy, which compiles nothing."""
    config = {"model_type": name, **raw}
    model = family(name).build(config, head)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path.endswith("/count"):
            return jnp.asarray(rng.integers(100, 1000), leaf.dtype)
        value = rng.standard_normal(leaf.shape).astype(leaf.dtype)
        if path.endswith("kernel"):
            return jnp.asarray(value * np.sqrt(2 / np.prod(leaf.shape[:-1])).astype(leaf.dtype))
        return jnp.asarray(np.exp(0.2 * value) if path.endswith(("/scale", "/var")) else 0.2 * value)

    params = map_with_path(draw, abstract_init(model))
    return Source(model, params, Lineage("memory", ""), {"config": config})


@functools.cache
def from_torch(name, head="imgcls", dtype="float32", **overrides):
    """A random torch model, and ours with the same parameters as a source."""
    import torch

    theirs = torch_reference.random_model(name, head, 0, dtype=getattr(torch, dtype), **overrides)
    with tempfile.TemporaryDirectory() as folder:
        torch_reference.save(theirs, folder)
        model, params = zoo.from_folder(folder)
        return theirs, Source(model, params, Lineage("memory", ""), {"config": zoo.raw_config(folder)})


def stacked(source):
    """The parameters laid out for scanning."""
    return stack(source.params, layout_of(source.model, source.params))


@functools.partial(jax.jit, static_argnames=("model", "capture", "dtype"))
def outputs(model, params, batch, capture=(), dtype=jnp.float32):
    return apply(model, params, batch, capture=capture, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def gradients(model, params, batch, cotangents, dtype=jnp.float32):
    """Gradients of the sum of ``output * cotangent`` by every floating-point leaf."""
    floats, rest = partition(params, jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating), params))

    def loss(floats):
        found = apply(model, combine(floats, rest), batch, dtype=dtype)
        return sum(jnp.vdot(found[name], value) for name, value in cotangents.items())

    return jax.grad(loss)(floats)
