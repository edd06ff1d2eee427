"""Attention by jax's kernel for TPUs, interpreted: the numbers of our own, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtransfer.adapt.subtrees import prefix_tuning, prompt_tuning
from jaxtransfer.config import ConfigError, from_dict
from jaxtransfer.job import meshes
from jaxtransfer.models import apply, attention
from jaxtransfer.models.attention import Span
from jaxtransfer.objectives import language_model
from jaxtransfer.optim import Group
from jaxtransfer.parallel import ShardingError, fsdp, make_mesh, splash
from jaxtransfer.step import shard_batch
from jaxtransfer.types import Lineage, Source
from tests import language, tiny
from tests.models import decoder_zoo

HEADS, WIDTH, ROWS = 4, 8, 4
MESHES = {
    "one device": None,
    "rows-heads": {"data": 2, "fsdp": 2, "tensor": 2},
    "tokens": {"data": 2, "sequence": 2, "tensor": 2},
}


def drawn(tokens, kv_heads):
    """Queries, keys, values, and segments: one, one padded behind, one padded before, two and padding."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(ROWS, tokens, n * WIDTH)), jnp.float32) for n in (HEADS, kv_heads, kv_heads)
    )
    segments = np.ones((ROWS, tokens), np.int32)
    segments[1, -tokens // 4 :] = segments[2, : tokens // 4] = segments[3, -tokens // 8 :] = 0
    segments[3, : tokens // 2] = 2
    return q, k, v, jnp.asarray(segments)


def masked(span):
    """What a span says, (B, T, T)."""
    places = jnp.arange(span.segments.shape[1])
    distance, same = places[:, None] - places[None], span.segments[:, :, None] == span.segments[:, None]
    within = same & (distance >= 0)[None] if span.causal else same
    return within if span.window is None else within & (distance < span.window)[None]


def graded(attend, q, k, v, segments, window, *, causal=True, near=0, **how):
    """The output where something is, and the gradients of one of its functions."""

    def loss(q, k, v, window):
        span = Span(segments, causal, window, near)
        with attention.attending(attend):
            y = attention.attention(q, k, v, masked(span), heads=HEADS, span=span, **how)
        y = jnp.where((segments != 0)[:, :, None], y, 0.0)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v, window)
    return y, *gradients


def check(mesh, tokens, kv_heads, window=None, **how):
    given, kernel = drawn(tokens, kv_heads), splash(mesh, interpret=True)
    window = None if window is None else jnp.int32(window)
    wanted = graded(None, *given, window, kv_heads=kv_heads, **how)
    found = graded(kernel, *given, window, kv_heads=kv_heads, **how)
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * float(jnp.abs(a).max()))


@settings(max_examples=4, deadline=None)
@given(
    tokens=st.sampled_from([40, 128, 200]),
    kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
)
def test_the_kernel_gives_what_attention_gives(tokens, kv_heads, causal, softcap):
    check(None, tokens, kv_heads, causal=causal, softcap=softcap)


@pytest.mark.parametrize(("axes", "window"), [("one device", 1000), ("rows-heads", 1000), ("tokens", 40)])
def test_a_layer_reaches_as_far_as_its_window(devices, axes, window):
    check(MESHES[axes] and make_mesh(**MESHES[axes]), 200, 2, window=window, near=40)


@pytest.mark.parametrize(
    ("axes", "causal"),
    [("tokens", False), *(pytest.param(axes, True, marks=pytest.mark.slow) for axes in ("rows-heads", "tokens"))],
)
def test_a_mesh_changes_no_number(devices, axes, causal):
    check(make_mesh(**MESHES[axes]), 200, 2, causal=causal)


def real(batch):
    return np.asarray(batch["attention_mask"], bool)[:, :, None]


@pytest.mark.parametrize(
    ("family", "padding"), [("gpt2", "right"), ("llama", "left"), ("gemma2", "right"), ("gemma3_text", "left")]
)
def test_decoders_give_the_same_logits(family, padding):
    model, params = decoder_zoo.tiny(family)
    batch = decoder_zoo.batch(padding=padding)
    wanted = apply(model, params, batch)["logits"]
    found = apply(model, params, batch, attend=splash(interpret=True))["logits"]
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(np.where(real(batch), found, 0), np.where(real(batch), wanted, 0), atol=1e-5 * scale)


def test_encoders_attend_in_both_directions():
    source = tiny.source()
    batch = {name: value for name, value in tiny.batch().items() if name in ("input_ids", "attention_mask")}
    wanted = apply(source.model, source.params, batch)["logits"]
    found = apply(source.model, source.params, batch, attend=splash(interpret=True))["logits"]
    rows = batch["attention_mask"].any(1)
    np.testing.assert_allclose(found[rows], wanted[rows], atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("source", [tiny.source, language.decoder], ids=["encoder", "decoder"])
def test_a_prompt_stands_before_the_tokens(source):
    prompted = prompt_tuning(source(), jax.random.key(0), length=3)
    batch = {"input_ids": tiny.batch()["input_ids"], "attention_mask": tiny.batch()["attention_mask"]}
    wanted, found = (
        apply(prompted.model, prompted.params, batch, attend=how)["logits"] for how in (None, splash(interpret=True))
    )
    kept = (..., None) if wanted.ndim == 3 else (slice(None), -3, None)  # a row ends in two of padding at the most
    real = batch["attention_mask"].astype(bool)[kept]
    np.testing.assert_allclose(
        np.where(real, found, 0), np.where(real, wanted, 0), atol=1e-5 * float(np.abs(wanted).max())
    )


def test_a_prompt_before_limited_layers_is_refused():
    model, params = decoder_zoo.tiny("mistral")
    prompted = prompt_tuning(Source(model, params, Lineage("memory", "")), jax.random.key(0), length=3)
    with pytest.raises(
        ValueError, match=r"splash counts a window of \d+ in slots, and behind a prompt there may be pad"
    ):
        apply(prompted.model, prompted.params, {"input_ids": np.ones((1, 8), np.int32)}, attend=splash(interpret=True))


def packed(rows=8, tokens=32):
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 200, (rows, tokens)).astype(np.int32)
    segments = np.where(np.arange(tokens) < 20, 1, 2)[None].repeat(rows, 0)
    segments[0, -5:] = 0
    places = np.where(segments == 2, np.arange(tokens) - 20, np.arange(tokens)).astype(np.int32)
    labels = np.where((segments == 0) | (places == 0), -100, ids).astype(np.int32)
    return {
        "input_ids": ids, "attention_mask": (segments != 0).astype(np.int32), "labels": labels,
        "segment_ids": segments.astype(np.int32), "position_ids": places, "weight": np.ones(rows, np.float32),
    }  # fmt: skip


@pytest.mark.parametrize(
    "axes",
    [{"data": 2, "fsdp": 2, "sequence": 2}, pytest.param(None, marks=pytest.mark.slow)],
    ids=["mesh", "one device"],
)
def test_training_on_packed_rows_gives_the_same_losses(devices, axes):
    """Through scanned layers, recomputation and the step's own shardings."""
    source, losses = language.decoder(), []
    for on, attend in ((None, None), (axes, splash)):
        mesh = on and make_mesh(**on)
        how = {"mesh": mesh, "sharding": fsdp(source.params, mesh, min_size=32) if mesh else ()}
        how |= {} if attend is None else {"attend": attend(mesh, interpret=True)}
        state, frozen, step = tiny.start(
            source, group=Group("sgd", lr=0.1), objective=language_model(), remat="full", **how
        )
        batch, found = shard_batch(packed(), mesh), []
        for _ in range(4):
            state, metrics = step(state, frozen, batch)
            found.append(float(metrics["loss"]))
        losses.append(found)
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_decoding_over_a_cache_is_left_to_xla():
    model, params = decoder_zoo.tiny("llama")
    batch = decoder_zoo.batch()

    def never(*given, **how):
        raise AssertionError("attention over a cache was left to the kernel")

    cache = model.cache(3, 16, jnp.float32)
    assert apply(model, params, batch, cache=cache, attend=never)["logits"].shape[:2] == batch["input_ids"].shape


# What it does not do


def test_dropped_probabilities_are_refused():
    model, params = decoder_zoo.tiny("gpt2")
    with pytest.raises(ValueError, match=r"splash drops no probabilities, and this model drops 0\.3 of them"):
        apply(model, params, decoder_zoo.batch(), train=True, key=jax.random.key(0), attend=splash(interpret=True))


def test_a_prefix_is_refused():
    source = prefix_tuning(language.decoder(), jax.random.key(0), length=3)
    ids = {"input_ids": np.ones((2, 8), np.int32)}
    with pytest.raises(ValueError, match=r"not 11 keys for 8 queries \(a prefix\?\); set run.attention: xla"):
        apply(source.model, source.params, ids, attend=splash(interpret=True))


def test_heads_that_do_not_divide_are_refused(devices):
    mesh = make_mesh(tensor=8)
    with pytest.raises(ShardingError, match="tensor = 8 does not divide 4 heads over 2 of keys"):
        check(mesh, 40, 2)


def settings_of(attention):
    return from_dict(
        {
            "source": {"ref": "nowhere"},
            "data": {"train": {"path": "nowhere.jsonl"}},
            "task": {"kind": "text-classification"},
            "run": {"epochs": 1, "attention": attention},
            "out": "nowhere",
        }
    )


def test_a_run_on_other_devices_is_refused():
    source = tiny.source()
    assert meshes.attention_of(settings_of("xla"), source.model, source.params, None) is None
    with pytest.raises(ConfigError, match="splash is a kernel of TPUs, and these devices are cpus; take xla"):
        meshes.attention_of(settings_of("splash"), source.model, source.params, None)


def test_a_model_without_attention_is_refused(monkeypatch):
    class Device:
        platform = "tpu"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    source = tiny.source()
    assert callable(meshes.attention_of(settings_of("splash"), source.model, source.params, None))
    bare = {"stem": source.params["embed"]}
    with pytest.raises(ConfigError, match="nothing to do for a bert model, which has no attention of this library"):
        meshes.attention_of(settings_of("splash"), source.model, bare, None)
