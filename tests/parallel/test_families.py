"""Every family on meshes: loss and gradients are those of one device, whatever trains; what cannot be is told."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxtransfer.adapt import adapters, attach, groups
from jaxtransfer.objectives import cross_entropy, language_model
from jaxtransfer.parallel import ShardingError, make_mesh, sharding_rules
from jaxtransfer.step import init_state, make_step, shard_batch
from jaxtransfer.tree import flatten
from jaxtransfer.types import Lineage, Source
from tests import tiny
from tests.models import decoder_zoo, vision_zoo

DECODERS = decoder_zoo.FAMILIES
_WIDE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_positions": 32}
_GPT2 |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
_OWN = {"gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]}}
_OWN |= {name: {"head_dim": 8} for name in ("llama", "mistral", "qwen3", "gemma2")}
_VIT = {
    "image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "sequence": {"sequence": 8},
    "mixed": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "rows and tokens": {"data": 2, "sequence": 4},
}
ADAPTED = r"blocks/\d+/(attention|mlp)/\w+/kernel"


@functools.cache
def source(name):
    """A tiny model of a family, whose sizes divide."""
    if name == "bert":
        return tiny.source()
    if name in ("vit", "resnet"):
        return vision_zoo.tiny.__wrapped__(name, **(_VIT if name == "vit" else _RESNET))
    own = _GPT2 if name == "gpt2" else _WIDE | _OWN.get(name, {})
    model, params = decoder_zoo.tiny(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})
    return Source(model, params, Lineage("memory", ""))


@functools.cache
def batch(name):
    if name == "bert":
        return tiny.batch()
    if name in ("vit", "resnet"):
        images = vision_zoo.images(8, 8, 8) if name == "vit" else vision_zoo.images(8, 32, 32)
        return {"pixel_values": images, "labels": np.arange(8) % 3, "weight": np.ones(8, np.float32)}
    ids = np.random.default_rng(0).integers(1, 96, (8, 17)).astype(np.int32)
    mask = np.ones((8, 16), np.int32)
    mask[::3, -3:] = 0
    labels = np.where(mask == 1, ids[:, 1:], -100).astype(np.int32)
    weight = np.array([1, 1, 2, 1, 0, 1, 1, 1], np.float32)
    return {"input_ids": ids[:, :16], "attention_mask": mask, "labels": labels, "weight": weight}


def first_step(name, recipe, mesh=None):
    """The loss and the gradients of a step."""
    src = source(name)
    if recipe == "lora":
        src = attach(src, [(ADAPTED, adapters.lora(2))], jax.random.key(3))
    rules = {"full": groups.full, "last": lambda model: groups.last(model, 1), "lora": groups.adapters}[recipe]
    tied = any(stage.name == "head" and stage.reads for stage in src.model.stages)
    if recipe != "full" and tied:  # the head trains with its embedding, or neither does
        trained = [r"blocks/1/.*"] if recipe == "last" else [r"[^@]*@[ab]"]
        labels = groups.labels_of(
            src.model, [*((pattern, "trunk") for pattern in trained), (".*", groups.FROZEN)], src.params
        )
    else:
        labels = groups.labels_of(src.model, rules(src.model), src.params)
    tx = tiny.transform(labels, tiny.PLAIN)
    objective = cross_entropy() if name in ("bert", "vit", "resnet") else language_model(chunks=2)
    how = {} if mesh is None else {"mesh": mesh, "sharding": sharding_rules(mesh, src.model, src.params)}
    state, frozen = init_state(src.model, src.params, labels, tx, jax.random.key(2), **how)
    step = make_step(src.model, objective, tx, donate=False, **how)
    after, metrics = step(state, frozen, shard_batch(batch(name), mesh))
    return float(metrics["loss"]), tiny.gradients(state, after)


@functools.cache
def alone(name, recipe):
    return first_step(name, recipe)


def check(name, recipe, axes, capfd, tolerance=1e-5, devices=None):
    loss, gradients = alone(name, recipe)
    found, theirs = first_step(name, recipe, make_mesh(**MESHES[axes], devices=devices))
    assert abs(found / loss - 1) < tolerance
    assert tiny.apart(theirs, gradients) < tolerance
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "recipe", "axes"),
    [
        ("bert", "last", "sequence"),
        ("llama", "full", "mixed"),
        ("gemma3_text", "lora", "rows and tokens"),
        ("gpt2", "lora", "fsdp"),
        ("vit", "full", "tensor"),
    ],
)
def test_a_family_on_a_mesh_is_what_it_is_on_one_device(devices, name, recipe, axes, capfd):
    check(name, recipe, axes, capfd)


def test_adapters_on_devices_in_another_order(devices, capfd):
    order = [devices[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]
    check("llama", "lora", "data", capfd, devices=order)


def test_statistics_of_a_batch_are_those_of_all_its_rows(devices, capfd):
    # A variance of four positions a channel: float32 as in the tests of one device.
    check("resnet", "full", "data", capfd, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("recipe", ["full", "last", "lora"])
@pytest.mark.parametrize("name", ["bert", *DECODERS, "vit"])
def test_no_family_changes_on_any_mesh(devices, name, recipe, axes, capfd):
    if name == "vit" and "sequence" in MESHES[axes]:
        pytest.skip("its positions, patches and one more, do not divide")
    check(name, recipe, axes, capfd)


def test_what_a_mesh_cannot_split_is_named(devices):
    resnet, llama = source("resnet"), source("llama")
    with pytest.raises(ShardingError, match="sequence = 8, but a resnet model has no attention"):
        sharding_rules(make_mesh(sequence=8), resnet.model, resnet.params)
    with pytest.raises(ShardingError, match="tensor = 8, but there are no rules by which a resnet model's layers"):
        sharding_rules(make_mesh(tensor=8), resnet.model, resnet.params)
    with pytest.raises(ShardingError, match=r"blocks/0/attention/\w+/kernel: 2 heads of keys and values do not divide"):
        sharding_rules(make_mesh(data=2, tensor=4), llama.model, llama.params)
    with pytest.raises(ShardingError, match="sequence = 4 does not divide activations of 5 positions"):
        first_step("vit", "full", make_mesh(data=2, sequence=4))
    explicit = jax.make_mesh((8, 1, 1, 1), ("data", "fsdp", "sequence", "tensor"), axis_types=(AxisType.Explicit,) * 4)
    with pytest.raises(ShardingError, match="axis 'data' is Explicit, and rules shard along automatic ones"):
        sharding_rules(explicit, llama.model, llama.params)


def test_a_frozen_layers_gradient_is_never_sent(devices):
    """Under LoRA what crosses between devices in a step is smaller than any of the frozen kernels."""
    src = attach(source("llama"), [(ADAPTED, adapters.lora(2))], jax.random.key(3))
    mesh = make_mesh(data=8)
    rules = [(r"[^@]*@[ab]", "trunk"), (".*", groups.FROZEN)]
    labels = groups.labels_of(src.model, rules, src.params)
    tx = tiny.transform(labels, tiny.PLAIN)
    state, frozen = init_state(src.model, src.params, labels, tx, jax.random.key(2), mesh=mesh)
    step = make_step(src.model, language_model(), tx, mesh=mesh)
    text = step.lower(state, frozen, shard_batch(batch("llama"), mesh)).compile().as_text()
    sent = [line for line in text.splitlines() if " all-reduce(" in line or " all-gather(" in line]
    assert sent  # the adapters' gradients are
    kernels = {tuple(leaf.shape[-2:]) for path, leaf in flatten(frozen).items() if path.endswith("@base")}
    assert (32, 64) in kernels
    assert not [line for line in sent for n, m in kernels if f"{n},{m}]" in line.split(" all-")[0]]
    assert all(leaf.sharding.spec == PartitionSpec() for leaf in flatten(frozen).values())
