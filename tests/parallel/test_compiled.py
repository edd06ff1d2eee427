"""What compiled steps send and hold: frozen weights once a layer and pass, and no gradient of theirs."""

import collections
import math
import re

import jax
import numpy as np

from jaxtransfer.adapt import adapters, attach, groups
from jaxtransfer.objectives import language_model
from jaxtransfer.parallel import fsdp, make_mesh
from jaxtransfer.plan.hlo import COLLECTIVES, parse
from jaxtransfer.step import init_state, make_step, shard_batch
from jaxtransfer.tree import flatten
from jaxtransfer.types import Lineage, Source
from tests import tiny
from tests.models import decoder_zoo

LAYERS = 3
SIZES = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": LAYERS, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
KERNELS = r"blocks/\d+/(attention|mlp)/\w+/kernel"


def compiled(rules, *, lora=False, rows=8, length=12, accumulate=1, **sizes):
    """A step's program on an fsdp axis of eight, its state and what is frozen."""
    model, params = decoder_zoo.tiny("llama", **{**SIZES, **sizes})
    source = Source(model, params, Lineage("memory", ""))
    if lora:
        source = attach(source, [(KERNELS, adapters.lora(3))], jax.random.key(3))
    mesh = make_mesh(fsdp=8)
    sharding = fsdp(source.params, mesh, min_size=32)
    labels = groups.labels_of(model, rules, source.params)
    tx = tiny.transform(labels)
    state, frozen = init_state(model, source.params, labels, tx, jax.random.key(2), mesh=mesh, sharding=sharding)
    ids = np.ones((rows, length), np.int32)
    batch = shard_batch({"input_ids": ids, "labels": ids, "weight": np.ones(rows, np.float32)}, mesh)
    step = make_step(
        model, language_model(chunks=1), tx, mesh=mesh, sharding=sharding, accumulate=accumulate, remat="full"
    )
    return step.lower(state, frozen, batch).compile(), state, frozen


def sent(program, *kinds):
    """How often arrays of each shape, without axes of one, are the result of collectives of some kinds."""
    text, counts = parse(program.as_text()), collections.Counter()
    for computation, times in text.runs():
        for instruction in computation.instructions:
            if instruction.op.removesuffix("-start") in kinds:
                for dims in re.findall(r"\w+\[([\d,]*)\]", instruction.shape):
                    counts[shape_of(map(int, filter(None, dims.split(","))))] += times
    return counts


def shape_of(shape):
    return tuple(sorted(n for n in shape if n != 1))


def test_frozen_weights_are_gathered_once_a_layer_and_pass_and_have_no_gradient(devices):
    program, _, frozen = compiled([(r"[^@]*@[ab]", "trunk"), (".*", groups.FROZEN)], lora=True)
    layers, ends = collections.Counter(), set()
    for path, leaf in flatten(frozen).items():
        if path.endswith("@base"):
            assert "fsdp" in str(leaf.sharding.spec), path
            layers[shape_of(leaf.shape[1:])] += leaf.shape[0]
        elif not path.startswith("blocks/") and leaf.ndim == 2:
            ends.add(shape_of(leaf.shape))
    assert layers[(32, 96)] == 3 * LAYERS and ends == {(32, 160)}
    gathered = sent(program, "all-gather")
    assert {shape: gathered[shape] for shape in layers} == {shape: 2 * count for shape, count in layers.items()}
    assert not any(gathered[shape] for shape in ends)  # the embedding and the head are used as they lie
    back = sent(program, *(set(COLLECTIVES) - {"all-gather"}))
    whole = {*layers, *ends}
    shards = {shape_of((n // 8, m)) for n, m in whole} | {shape_of((n, m // 8)) for n, m in whole}
    assert not [shape for shape in whole | shards if back[shape]]
    assert back[(3, 32)] or back[(3, 96)]  # the adapters' gradients are sent


def test_accumulation_costs_one_buffer_of_what_trains(devices):
    """Of four microbatches of eight rows, beside a step of eight rows: their activations are the same."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16, "num_hidden_layers": 4}
    made = [compiled([(".*", "trunk")], rows=8 * count, accumulate=count, **sizes) for count in (1, 4)]
    trained = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(made[0][1].params))
    once, four = (program.memory_analysis().temp_size_in_bytes for program, _, _ in made)
    assert 0.5 * trained < four - once < 1.1 * trained
