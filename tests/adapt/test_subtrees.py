"""Bottlenecks, prompts and prefixes: equations, masks, caches, training, and what refuses them."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import checkpoint, export, generate
from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import groups, subtrees
from jaxtransfer.models import apply, family, layout_of, slots
from jaxtransfer.parallel import fsdp, make_mesh
from jaxtransfer.source.export import ExportError
from jaxtransfer.step import params_of
from jaxtransfer.tree import TreeError, fingerprint, flatten, layers_of, stack, unflatten
from jaxtransfer.tree.rules import RuleError
from jaxtransfer.types import Lineage, Source
from tests import tiny
from tests.models import decoder_zoo, vision_zoo, zoo

KEY = jax.random.key(0)
VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
VIT |= {"image_size": 8, "patch_size": 4}
EVERY = [(r"blocks/\d+", True)]
MAKES = {
    "bottleneck": lambda source: subtrees.bottleneck(source, EVERY, KEY, width=3),
    "pfeiffer": lambda source: subtrees.bottleneck(source, EVERY, KEY, width=2, activation="relu", where=("mlp",)),
    "prompt": lambda source: subtrees.prompt_tuning(source, KEY, length=3),
    "prefix": lambda source: subtrees.prefix_tuning(source, KEY, length=2),
    "all": lambda source: MAKES["prefix"](MAKES["prompt"](MAKES["bottleneck"](source))),
}


def of(model, params):
    return Source(model, params, Lineage("memory", "", fingerprints=fingerprint(params)))


def decoder(name="llama", **overrides):
    return of(*decoder_zoo.tiny(name, **overrides))


@jax.jit
def moved(params):
    """What stands in slots, as if trained."""
    return jax.tree.map(lambda x: x + 0.3 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)), params)


def trained(source):
    inside = tuple(f"{slot}/" for slot in subtrees.held_in(source))
    flat = flatten(source.params)
    new = moved({path: leaf for path, leaf in flat.items() if path.startswith(inside)})
    return dataclasses.replace(source, params=unflatten({**flat, **new}))


def run(source, batch, **options):
    return jax.jit(lambda params, batch: apply(source.model, params, batch, **options))(source.params, batch)


def test_a_bottleneck_is_the_paper_s_equation_and_starts_as_the_identity():
    rng = np.random.default_rng(0)
    down, up = ({"kernel": rng.normal(size=s), "bias": rng.normal(size=s[1])} for s in ((4, 2), (2, 4)))
    part = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"down": down, "up": up})
    carry = {slots.HELD: {"adapter": {"mlp": {"relu": part}}}}
    h = rng.normal(size=(3, 5, 4)).astype(np.float32)
    want = h + np.maximum(h @ down["kernel"] + down["bias"], 0) @ up["kernel"] + up["bias"]
    zoo.assert_close(slots.adapted(jnp.asarray(h), carry, "mlp"), want)
    assert slots.adapted(h, carry, "attention") is h
    with pytest.raises(TreeError, match="adapter/mlp: expected one of the activations"):
        slots.adapted(jnp.asarray(h), {slots.HELD: {"adapter": {"mlp": {"softsign": part}}}}, "mlp")


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma2", "vit"])
def test_bottlenecks_leave_the_function_as_it_was_until_they_train(name):
    if name == "vit":
        source, batch, out = vision_zoo.tiny("vit", **VIT), {"pixel_values": vision_zoo.images(2, 8, 8)}, "logits"
    else:
        source = of(*zoo.tiny()) if name == "bert" else decoder(name)
        batch, out = (zoo.inputs() if name == "bert" else decoder_zoo.batch()), "logits"
    start = subtrees.bottleneck(source, EVERY, KEY, width=3)
    plain = run(source, batch)[out]
    zoo.assert_close(run(start, batch)[out], plain, 1e-6)
    assert np.abs(run(trained(start), batch)[out] - plain).max() > 1e-2
    assert flatten(subtrees.detach(start).params).keys() == flatten(source.params).keys()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_scanned_is_unrolled(name):
    source = trained(MAKES["all"](of(*zoo.tiny()) if name == "bert" else decoder()))
    batch = zoo.inputs() if name == "bert" else decoder_zoo.batch()
    laid = stack(source.params, layout_of(source.model, source.params))
    assert any(":" in path for path in flatten(laid))
    want = run(source, batch)["logits"]
    zoo.assert_close(run(dataclasses.replace(source, params=laid), batch)["logits"], want)


def test_a_stack_is_cut_where_only_some_layers_have_one():
    source = subtrees.bottleneck(of(*zoo.tiny()), [(r"blocks/[23]", True)], KEY, width=2)
    assert layout_of(source.model, source.params)["blocks"] == ((0, 2), (2, 4))


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
@pytest.mark.parametrize("kind", ["prompt", "all"])
def test_a_cache_decodes_what_the_whole_gives_and_holds_the_prompt_once(name, kind):
    source = trained(MAKES[kind](decoder(name)))
    batch = {key: jnp.asarray(value) for key, value in decoder_zoo.batch(padding="left").items()}
    whole = run(source, batch)["logits"]
    assert whole.shape[1] == batch["input_ids"].shape[1]
    steps, cache = decoder_zoo.in_steps(source.model, source.params, batch, decoder_zoo.LENGTH)
    zoo.assert_close(steps, whole)
    assert cache["length"] == decoder_zoo.LENGTH + 3


def test_padding_changes_nothing_and_the_future_is_not_seen():
    source = trained(MAKES["all"](decoder()))
    ids = np.asarray(decoder_zoo.batch(rows=2)["input_ids"])[:, :6].clip(1)
    alone = run(source, {"input_ids": ids})["logits"]
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    padded = {name: np.pad(x, ((0, 0), (0, 3))) for name, x in inputs.items()}
    zoo.assert_close(run(source, padded)["logits"][:, :6], alone)
    left = {name: np.pad(x, ((0, 0), (2, 0))) for name, x in inputs.items()}
    left["position_ids"] = np.maximum(left["attention_mask"].cumsum(1) - 1, 0).astype(np.int32)
    zoo.assert_close(run(source, left)["logits"][:, 2:], alone)
    changed = ids.copy()
    changed[:, 4:] = 7
    zoo.assert_close(run(source, {"input_ids": changed})["logits"][:, :4], alone[:, :4])


def test_the_prompt_of_an_encoder_stands_before_padding_too():
    source = trained(MAKES["prompt"](of(*zoo.tiny(None))))
    batch = {name: jnp.asarray(value) for name, value in zoo.inputs().items()}
    found = run(source, batch)
    assert found["last_hidden_state"].shape[:2] == batch["input_ids"].shape
    more = {name: jnp.pad(value, ((0, 0), (0, 2))) for name, value in batch.items()}
    zoo.assert_close(run(source, more)["last_hidden_state"][:, :7], found["last_hidden_state"])


def test_generation_continues_behind_a_prompt():
    source = trained(MAKES["prompt"](decoder()))
    ids = np.array([[5, 6, 7]], np.int32)
    got = np.asarray(generate(source.model, source.params, ids, max_new_tokens=4))[0]
    for token in got:
        logits = apply(source.model, source.params, {"input_ids": ids})["logits"]
        assert token == int(jnp.argmax(logits[0, -1]))
        ids = np.concatenate([ids, [[token]]], axis=1).astype(np.int32)
    with pytest.raises(ValueError, match="exceed the model's 38 positions"):
        generate(source.model, source.params, ids, max_new_tokens=35)


def test_a_prefix_is_open_to_a_row_that_attends_to_nothing_else():
    _, _, mask = slots.prefixed(
        {slots.HELD: {"prefix": {"key": jnp.zeros((2, 4)), "value": jnp.zeros((2, 4))}}},
        jnp.zeros((1, 3, 4)), jnp.zeros((1, 3, 4)), jnp.zeros((1, 3, 3), bool),
    )  # fmt: skip
    assert mask[..., :2].all() and not mask[..., 2:].any()


@pytest.mark.parametrize("name", ["bottleneck", "prompt", "prefix"])
def test_training_moves_the_subtree_and_the_head_and_a_checkpoint_holds_them_alone(name, tmp_path):
    source = MAKES[name](of(tiny.source().model, tiny.source().params))
    state, frozen, step = tiny.start(source, groups.adapters(source.model), tiny.Group(lr=1e-2))
    inside = tuple(f"{slot}/" for slot in subtrees.held_in(source))
    moving = [layer for path in flatten(state.params) for layer in layers_of(path)]
    assert moving and all(path.startswith(("head/", *inside)) for path in moving)
    before, losses = jax.tree.map(jnp.copy, params_of(state, frozen)), []
    for _ in range(8):
        state, metrics = step(state, frozen, tiny.batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    after = params_of(state, frozen)
    same = {p for p, leaf in flatten(after).items() if tiny.bits(leaf) == tiny.bits(flatten(before)[p])}
    base = {path for path in flatten(tiny.source().params) if not path.startswith("head/")}
    assert base <= same and not any(path.startswith(inside) for path in same)
    path = checkpoint.save(tmp_path / "one", state, frozen, source.lineage)
    leaves = checkpoint.metadata(path)["leaves"]
    assert not [name for name, leaf in leaves.items() if name.startswith("frozen/") and leaf["written"]]
    fresh, still, _ = tiny.start(source, groups.adapters(source.model), tiny.Group(lr=1e-2), key=9)
    got, kept, _ = checkpoint.restore(path, like=(fresh, still), lineage=source.lineage)
    assert tiny.same_bits(got, state) and tiny.same_bits(kept, frozen)


def test_a_mesh_gives_the_gradients_of_one_device(devices):
    source = trained(MAKES["all"](tiny.source()))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rules = (*family("bert").tensor_rules, *fsdp(source.params, mesh, min_size=2))
    found = []
    for how in ({}, {"mesh": mesh, "sharding": rules}):
        state, frozen, step = tiny.start(source, groups.adapters(source.model), tiny.PLAIN, donate=False, **how)
        after, _ = step(state, frozen, tiny.batch())
        found.append(tiny.gradients(state, after))
    assert tiny.apart(found[1], found[0]) <= 1e-5


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(length=st.integers(1, 5), tokens=st.integers(1, 6), rows=st.integers(1, 3), width=st.integers(1, 9))
def test_any_sizes_give_outputs_of_the_batch_s_own_length(length, tokens, rows, width):
    source = subtrees.prompt_tuning(decoder(num_hidden_layers=1), KEY, length=length)
    source = subtrees.prefix_tuning(subtrees.bottleneck(source, EVERY, KEY, width=width), KEY, length=length)
    ids = jnp.ones((rows, tokens), jnp.int32)
    ends = ["embed", "norm"]
    found = jax.eval_shape(lambda p: apply(source.model, p, {"input_ids": ids}, capture=ends), source.params)
    assert found["logits"].shape[:2] == (rows, tokens)
    assert {x.shape[:2] for x in found["captured"].values()} == {(rows, tokens)}
    assert len(subtrees.held_in(source)) == 3
    assert flatten(subtrees.detach(source).params).keys() == flatten(decoder(num_hidden_layers=1).params).keys()


def test_a_prompt_of_the_vocabulary_is_what_the_blocks_read_of_tokens():
    llama = decoder("gemma2")
    source = subtrees.prompt_tuning(llama, KEY, length=5, init="vocabulary")
    rows = source.params["embed"]["prompt"]["embedding"]
    table = llama.params["embed"]["word"]["embedding"] * llama.model.config.hidden_size**0.5
    assert all(jnp.abs(table - row[None]).sum(1).min() < 1e-4 for row in rows)
    with pytest.raises(at.AdapterError, match="length must be from 1 to 40"):
        subtrees.prompt_tuning(llama, KEY, length=41, init="vocabulary")


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    bert, llama, vit = of(*zoo.tiny()), decoder(), vision_zoo.tiny("vit", **VIT)
    refused = at.AdapterError
    for call, error, message in (
        (lambda: subtrees.prompt_tuning(bert, KEY, length=0), refused, "length must be from 1 to 15 .*16 positions"),
        (lambda: subtrees.prompt_tuning(bert, KEY, length=2, init="text"), refused, "init must be 'random' or"),
        (lambda: subtrees.prefix_tuning(bert, KEY, length=0), refused, "prefix_tuning: length must be from 1"),
        (lambda: subtrees.bottleneck(bert, EVERY, KEY, width=0), refused, "width must be 1 or more"),
        (lambda: subtrees.bottleneck(bert, EVERY, KEY, width=1, activation="x"), refused, "activation one of"),
        (lambda: subtrees.bottleneck(bert, EVERY, KEY, width=1, where=("gate",)), refused, "no place 'gate'"),
        (lambda: subtrees.bottleneck(bert, [("layer/1", True)], KEY, width=1), RuleError, "matches none"),
        (lambda: subtrees.prompt_tuning(vit, KEY, length=2), refused, "a vit model has no slot .*'prompt', only for"),
        (lambda: subtrees.detach(bert), refused, "nothing stands in the model's slots"),
        (lambda: MAKES["prompt"](MAKES["prompt"](bert)), refused, "embed/prompt: something stands there already"),
        (lambda: MAKES["pfeiffer"](MAKES["bottleneck"](bert)), refused, "blocks/0/adapter: something stands there"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    long = subtrees.prompt_tuning(bert, KEY, length=12)
    with pytest.raises(ValueError, match="a prompt of 12 and input of length 7 does not fit: the model has 16 pos"):
        apply(bert.model, long.params, zoo.inputs())
    prompted = MAKES["prompt"](llama)
    ids = jnp.ones((1, 4), jnp.int32)
    packed = {"input_ids": ids, "segment_ids": ids, "position_ids": ids}
    with pytest.raises(ValueError, match="segment_ids: one prompt cannot stand before every segment"):
        apply(llama.model, prompted.params, packed)
    held = apply(llama.model, prompted.params, {"input_ids": ids}, cache=llama.model.cache(1, 8, jnp.float32))["cache"]
    with pytest.raises(ValueError, match="cache: it holds a prompt, but the parameters have none"):
        apply(llama.model, llama.params, {"input_ids": ids}, cache=held)
    with pytest.raises(TreeError, match="embed: prompt/words has no place in the stage"):
        apply(bert.model, {**bert.params, "embed": {**bert.params["embed"], "prompt": {"words": ids}}}, zoo.inputs())
    with pytest.raises(TreeError, match="parameters do not fit the stage: extra adapter/mlp"):
        apply(bert.model, {**bert.params, "head": {**bert.params["head"], "adapter": {"mlp": ids}}}, zoo.inputs())
    for name, message in (("prompt", "embed/prompt .*format='peft'"), ("prefix", "blocks/0/prefix .*detach it")):
        with pytest.raises(ExportError, match=message):
            export(MAKES[name](tiny.source()), tmp_path / name)
