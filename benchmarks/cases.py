"""The model, batch and freeze cases that the benchmarks share."""

import jax
import numpy as np

from jaxtransfer import Lineage, Source, groups, heads, init, optim, swap_head
from jaxtransfer.models import family
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.parallel import sharding_rules
from jaxtransfer.step import init_state, make_step

HIDDEN, LAYERS, HEADS, INNER, VOCABULARY = 384, 6, 12, 1536, 30522
BATCH, LENGTH = 16, 128


def source(layers=LAYERS, vocabulary=VOCABULARY, **config):
    """BERT-L6-H384 under a two-class head, at random."""
    raw = {
        "model_type": "bert", "vocab_size": vocabulary, "hidden_size": HIDDEN, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "intermediate_size": INNER, **config,
    }  # fmt: skip
    model = family("bert").build(raw, None)
    bare = Source(model, init(model, jax.random.key(0)), Lineage("memory", ""), {"config": raw})
    return swap_head(bare, heads.classifier(2), jax.random.key(1))


def batch(rows=BATCH, length=LENGTH, vocabulary=VOCABULARY):
    """Random tokens, all of them real."""
    rng = np.random.default_rng(0)
    return {
        "input_ids": rng.integers(0, vocabulary, (rows, length)).astype(np.int32),
        "attention_mask": np.ones((rows, length), np.int32),
        "labels": rng.integers(0, 2, rows).astype(np.int32),
        "weight": np.ones(rows, np.float32),
    }


def recipe(case, model):
    """Rules of a case: ``full``, ``head``, or ``last-K``."""
    if case == "full":
        return groups.full(model)
    return groups.head_only(model) if case == "head" else groups.last(model, int(case.split("-")[1]))


def ours(case, src, *, remat=None):
    """The library's state, frozen part and step for a case."""
    return started(src, recipe(case, src.model), remat=remat)


def started(src, rules, *, remat=None, mesh=None):
    """The library's state, frozen part and step where ``rules`` say what trains; the labels and the optimizer."""
    where = {} if mesh is None else {"mesh": mesh, "sharding": sharding_rules(mesh, src.model, src.params)}
    labels = groups.labels_of(src.model, rules, src.params)
    used = sorted(set(jax.tree.leaves(labels)) - {"frozen"})
    tx = optim.optimizer(labels, {name: optim.Group(lr=1e-4) for name in used}, clip=1.0)
    state, frozen = init_state(src.model, src.params, labels, tx, jax.random.key(2), **where)
    return state, frozen, make_step(src.model, cross_entropy(), tx, remat=remat, **where), labels, tx


def plain_parts(case, layers=LAYERS):
    """How `plain_bert.split` cuts for a case: how many blocks are frozen, which parts train."""
    if case == "full":
        return 0, ("embed", "high", "pooler", "head")
    if case == "head":
        return layers, ("head",)
    return layers - int(case.split("-")[1]), ("high", "pooler", "head")
