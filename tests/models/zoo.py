"""Models of the BERT family for the tests: read from folders, from torch, or made up and tiny."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.models import family, init
from jaxtransfer.models.api import abstract_init, apply, run_span
from jaxtransfer.models.names import turn
from jaxtransfer.models.registry import labels_of
from jaxtransfer.tree import flatten, layout, stack, unflatten
from jaxtransfer.types import Head
from tests import torch_reference

GOLDENS = Path(__file__).parent.parent / "goldens"
TINY = {
    "vocab_size": 31,
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.3,
    "attention_probs_dropout_prob": 0.2,
    "initializer_range": 0.3,
}
CLASSIFIER = Head("sequence-classification", ("no", "maybe", "yes"))


@functools.cache
def tiny(head=CLASSIFIER, **overrides):
    """A made-up BERT with four blocks, and its fresh parameters."""
    model = family("bert").build(TINY | overrides, head)
    return model, init(model, jax.random.key(0))


def inputs(rows=3, length=7, seed=0):
    """Token ids and a mask with a hole and padding at the end."""
    ids = np.random.default_rng(seed).integers(1, TINY["vocab_size"], (rows, length)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[:, -1] = mask[0, 2] = 0
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}


def raw_config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def stored_head(raw):
    """The head that a configuration file says is stored."""
    kind = family(raw["model_type"]).architectures[raw["architectures"][0]]
    if kind is None:
        return None
    return Head(kind, labels_of(raw) if kind.endswith("classification") else ())


def stacked(params):
    return stack(params, layout(params))


def place(model, tensors):
    """Our tree of the tensors of a checkpoint, which must fill every parameter."""
    paths = list(flatten(abstract_init(model)))
    plan = family(model.family).names(model).load_plan(tensors, paths)
    return unflatten({path: np.array(turn(tensors[name], how), order="C") for path, (name, how) in plan.used.items()})


def from_folder(folder):
    from safetensors.numpy import load_file

    raw = raw_config(folder)
    model = family(raw["model_type"]).build(raw, stored_head(raw))
    return model, place(model, load_file(Path(folder) / "model.safetensors"))


@functools.cache
def from_torch(name, head, dtype="float32", **overrides):
    """A random torch model, ours with the same parameters, and a batch."""
    import tempfile

    import torch

    theirs = torch_reference.random_model(name, head, 0, dtype=getattr(torch, dtype), **overrides)
    with tempfile.TemporaryDirectory() as folder:
        model, params = from_folder(torch_reference.save(theirs, folder))
    return theirs, model, params, torch_reference.batch(name, 101, (3, 11), 0)


def boundaries(model):
    """The boundaries at which torch gives hidden states."""
    return [stage.name for stage in model.stages if stage.name == "embed" or stage.name.startswith("blocks/")]


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def outputs(model, params, batch, dtype=jnp.float32):
    return apply(model, params, batch, capture=boundaries(model), dtype=dtype)


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def gradients(model, params, batch, cotangents, dtype=jnp.float32):
    """Gradients of the sum of ``output * cotangent``: through all but the embedding stage, and through that alone."""

    def loss(rest, embed):
        carry = run_span(model, embed, batch, None, "embed", dtype=dtype)
        carry = run_span(model, rest, carry, "embed", None, dtype=dtype)
        found = {name: carry[entry] for entry, name in model.outputs.items() if entry in carry}
        return sum(jnp.vdot(found[name], value) for name, value in cotangents.items())

    return jax.grad(loss, argnums=(0, 1))(params, params)


def assert_close(got, want, tolerance=1e-5):
    """``max|got - want|`` against the largest magnitude that is wanted."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def assert_gradients_close(got, want, *, largest=1e-5, relative=1e-4):
    """Leaf by leaf against the largest gradient of all; in relative norm too where a leaf's gradient is not noise."""
    assert set(got) == set(want)
    got, want = ({path: np.asarray(leaf, np.float64) for path, leaf in tree.items()} for tree in (got, want))
    top = max(np.abs(leaf).max() for leaf in want.values())
    total = np.sqrt(sum(np.sum(leaf**2) for leaf in want.values()))
    for path, leaf in want.items():
        assert np.abs(got[path] - leaf).max() <= largest * top, path
        norm = np.linalg.norm(leaf)
        if norm > 1e-6 * total:
            assert np.linalg.norm(got[path] - leaf) <= relative * norm, path
