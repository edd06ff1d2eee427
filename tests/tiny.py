"""A tiny BERT classifier to fine-tune, its batches, and what the tests of optim, step, adapt and parallel share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.adapt import groups, heads, swap_head
from jaxtransfer.models import family, init
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.optim import Group, optimizer
from jaxtransfer.step import init_state, make_step
from jaxtransfer.tree import flatten
from jaxtransfer.types import Lineage, Source

RAW = {
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}


@functools.cache
def trunk(**overrides):
    """A bare BERT with a pooler."""
    raw = RAW | overrides
    model = family("bert").build(raw, None)
    return Source(model, init(model, jax.random.key(0)), Lineage("memory", ""), {"config": raw})


@functools.cache
def source(**overrides):
    """The trunk under a head of three classes."""
    return swap_head(trunk(**overrides), heads.classifier(3), jax.random.key(1))


def batch(rows=16, length=8, seed=0):
    """Random tokens, the class of a row told by its first; some rows end in padding, one is all padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, RAW["vocab_size"], (rows, length)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1::3, -2:] = 0
    weight = np.ones(rows, np.float32)
    weight[5] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3, "weight": weight}


def labels_of(src, recipe):
    return groups.labels_of(src.model, recipe, src.params)


def transform(labels, group=None, **options):
    """One group's options for every label that trains."""
    used = sorted(set(flatten(labels).values()) - {"frozen", "stats"})
    return optimizer(labels, dict.fromkeys(used, group or Group(lr=1e-3)), **options)


def start(src, recipe=None, group=None, *, objective=None, mesh=None, sharding=(), key=2, clip=None, **options):
    """``(state, frozen, step)`` of a fine-tuning."""
    labels = labels_of(src, groups.full(src.model) if recipe is None else recipe)
    tx = transform(labels, group, clip=clip)
    state, frozen = init_state(src.model, src.params, labels, tx, jax.random.key(key), mesh=mesh, sharding=sharding)
    step = make_step(src.model, objective or cross_entropy(), tx, mesh=mesh, sharding=sharding, **options)
    return state, frozen, step


PLAIN = Group("sgd", lr=1.0, weight_decay=0.0, momentum=0.0)
"""Subtracts the gradient: parameters before less parameters after are the gradient."""


def gradients(before, after):
    """The gradients of a step of `PLAIN`, by path."""
    new = flatten(after.params)
    return {path: np.asarray(old) - np.asarray(new[path]) for path, old in flatten(before.params).items()}


def copied(state):
    """A state to be donated in place of this one."""
    return jax.tree.map(jnp.copy, state)


def same_bits(a, b):
    """Whether two trees have the same leaves, bit for bit."""
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(bits(a[path]) == bits(b[path]) for path in a)


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def apart(found, wanted):
    """The largest difference of two dictionaries of arrays over the largest magnitude of the wanted one."""
    assert found.keys() == wanted.keys()
    scale = max(np.abs(np.asarray(leaf)).max() for leaf in wanted.values())
    return max(np.abs(np.asarray(found[path]) - np.asarray(wanted[path])).max() for path in wanted) / scale
