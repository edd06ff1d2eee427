"""Decoders: one forward pass however it is cut, packed, cached, scanned or sharded; what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import groups, heads, swap_head, untie
from jaxtransfer.models import ConfigFieldError, apply, family, run_span
from jaxtransfer.models.api import abstract_init
from jaxtransfer.models.causal import empty_cache
from jaxtransfer.models.decoder import FULL, SLIDING
from jaxtransfer.parallel import make_mesh, place
from jaxtransfer.source import export, load
from jaxtransfer.tree import flatten, match
from jaxtransfer.types import Head, Lineage, Source
from tests.models import decoder_zoo, zoo

ROPED = [name for name in decoder_zoo.FAMILIES if name != "gpt2"]
STRAINS = ["gpt2", "qwen2", "gemma3_text"]  # learned positions; windows from a layer on; two ropes
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 50.0,
}
run = jax.jit(apply, static_argnames=("model", "train"))


def roped():
    model, params = decoder_zoo.tiny("llama")
    return model, zoo.stacked(params)


def same(got, want):
    zoo.assert_close(got, want, 2e-6)


@pytest.mark.parametrize("name", STRAINS)
def test_scanned_is_unrolled_in_training_too(name):
    model, params = decoder_zoo.tiny(name, attn_pdrop=0.3) if name == "gpt2" else decoder_zoo.tiny(name)
    stacked = zoo.stacked(params)
    assert list(stacked["blocks"]) == ["0:3"]
    batch = decoder_zoo.batch()
    want = run(model, params, batch)["logits"]
    same(run(model, stacked, batch)["logits"], want)
    if name == "gpt2":
        trained = [run(model, p, batch, train=True, key=jax.random.key(3))["logits"] for p in (params, stacked)]
        same(*trained)
        assert np.abs(trained[0] - want).max() > 0.01


@pytest.mark.parametrize(
    ("name", "padding", "scanned"),
    [("gpt2", "left", False), ("qwen2", "right", True), ("gemma3_text", "left", True), ("gemma3_text", "right", False)],
)
def test_cached_is_uncached(name, padding, scanned):
    model, params = decoder_zoo.tiny(name)
    stacked, batch = zoo.stacked(params), decoder_zoo.batch(padding=padding)
    batch["position_ids"] = np.maximum(np.cumsum(batch["attention_mask"], 1, dtype=np.int32) - 1, 0)
    want = run(model, stacked, batch)["logits"]
    got, cache = decoder_zoo.in_steps(model, stacked if scanned else params, batch, 20)
    real = batch["attention_mask"].astype(bool)  # padding with nothing before it attends to whatever slots there are
    same(np.asarray(got)[real], np.asarray(want)[real])
    assert cache["length"] == decoder_zoo.LENGTH
    assert np.array_equal(cache["valid"], np.pad(real, ((0, 0), (0, 7))))


def test_positions_continue_after_those_in_the_cache():
    model, params = roped()
    batch = {"input_ids": decoder_zoo.batch()["input_ids"]}
    got, _ = decoder_zoo.in_steps(model, params, batch, decoder_zoo.LENGTH)
    same(got, run(model, params, batch)["logits"])


def test_a_full_cache_gives_nan_and_never_overwrites_silently():
    model, params = roped()
    batch = {"input_ids": decoder_zoo.batch()["input_ids"]}
    got, _ = decoder_zoo.in_steps(model, params, batch, decoder_zoo.LENGTH - 1)
    assert np.isfinite(got[:, :-1]).all() and np.isnan(got[:, -1]).all()
    with pytest.raises(ValueError, match="input of length 13 does not fit: the cache has 4 slots; set max_length"):
        apply(model, params, batch, cache=model.cache(3, 4, jnp.float32))
    with pytest.raises(ValueError, match="a cache of 42 slots: the model has 41 positions"):
        model.cache(1, 42, jnp.float32)


def test_the_cache_has_its_own_dtype_and_shape():
    model, params = decoder_zoo.tiny("gemma3_text")
    cache = model.cache(3, 16, jnp.bfloat16)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(
        jnp.shape, empty_cache(layers=3, rows=3, length=16, kv_heads=2, width=6, dtype=jnp.bfloat16)
    )
    batch = decoder_zoo.batch()
    found = run(model, params, batch, cache=cache)
    assert found["cache"]["key"].dtype == jnp.bfloat16 and found["logits"].dtype == jnp.float32
    want = run(model, params, batch)["logits"]
    error = np.abs(found["logits"] - want)[batch["attention_mask"].astype(bool)].max() / np.abs(want).max()
    assert 0 < error < 2e-2


@pytest.mark.parametrize("name", STRAINS)
def test_packed_rows_are_separate_rows(name):
    model, params = decoder_zoo.tiny(name)
    params = zoo.stacked(params)
    ids = decoder_zoo.batch(1, 13, padding="left")["input_ids"]
    lengths = (6, 1, 4)
    marks = [(i, j) for i, length in enumerate(lengths, 1) for j in range(length)] + [(0, 0), (0, 1)]
    segments, positions = (np.array([row], np.int32) for row in zip(*marks, strict=True))
    packed = run(model, params, {"input_ids": ids, "segment_ids": segments, "position_ids": positions})["logits"]
    rows = np.zeros((3, 6), np.int32)
    starts = np.cumsum([0, *lengths])
    for row, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        rows[row, :length] = ids[0, start : start + length]
    alone = run(model, params, {"input_ids": rows})["logits"]
    for row, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        same(packed[0, start : start + length], alone[row, :length])


def test_packed_rows_need_positions_and_no_cache():
    model, params = decoder_zoo.tiny("llama")
    ids = decoder_zoo.batch()["input_ids"]
    batch = {"input_ids": ids, "segment_ids": np.ones_like(ids)}
    with pytest.raises(ValueError, match="segment_ids: packed rows need position_ids"):
        apply(model, params, batch)
    with pytest.raises(ValueError, match="and no cache"):
        apply(model, params, batch | {"position_ids": ids}, cache=model.cache(3, 20, jnp.float32))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_input_that_does_not_fit(name):
    model, params = decoder_zoo.tiny(name)
    ids = np.ones((1, 42), np.int32)
    with pytest.raises(ValueError, match="input of length 42 does not fit: the model has 41 positions; set max_length"):
        apply(model, params, {"input_ids": ids})
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 9\), input_ids \(1, 4\): it masks the new tokens"):
        apply(model, params, {"input_ids": ids[:, :4], "attention_mask": ids[:, :9]})


def test_a_window_limits_what_a_token_sees():
    """A change at one place moves the logits of the window behind it, layer by layer, and none before it."""
    model, params = decoder_zoo.tiny("mistral", num_hidden_layers=1)
    batch = {"input_ids": decoder_zoo.batch(1, padding="left")["input_ids"]}
    other = {"input_ids": batch["input_ids"].copy()}
    other["input_ids"][0, 3] += 1
    moved = np.abs(run(model, params, other)["logits"] - run(model, params, batch)["logits"])[0].max(-1) > 0
    assert moved.nonzero()[0].tolist() == [3, 4, 5, 6, 7]


def test_logits_of_the_last_token_alone():
    """Generation runs the trunk, keeps the last hidden state, and runs the head."""
    model, params = decoder_zoo.tiny("gemma3_text")
    params, batch = zoo.stacked(params), decoder_zoo.batch(padding="left")

    @jax.jit
    def last(params):
        carry = run_span(model, params, batch, None, "norm")
        return run_span(model, params, {**carry, "hidden": carry["hidden"][:, -1:]}, "norm", None)["logits"]

    same(last(params), run(model, params, batch)["logits"][:, -1:])


def test_soft_caps_bound_logits():
    model, params = decoder_zoo.tiny("gemma2")
    params = zoo.stacked(params)
    big = {**params, "embed": jax.tree.map(lambda w: w * 20, params["embed"])}
    logits = run(model, big, decoder_zoo.batch())["logits"]
    assert 2.9 < np.abs(logits).max() <= 3.0


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
def test_tensor_rules_leave_the_function_alone(name, devices):
    sizes = {"vocab_size": 104, "num_hidden_layers": 2}
    if name == "gpt2":
        sizes |= {"n_embd": 24, "n_inner": 36, "n_layer": 2}
        del sizes["num_hidden_layers"]
    else:
        sizes |= {"hidden_size": 24, "intermediate_size": 36, "layer_types": (SLIDING, FULL)}
    model, params = decoder_zoo.tiny(name, **sizes)
    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=devices)
    placed = place(params, mesh, family(name).tensor_rules)
    split = {path for path, leaf in flatten(placed).items() if not leaf.sharding.is_fully_replicated}
    assert {"embed/word/embedding", "blocks/1/attention/output/kernel", "blocks/1/mlp/down/kernel"} <= split
    batch = decoder_zoo.batch(4)
    same(run(model, placed, batch)["logits"], run(model, params, batch)["logits"])


# What is tied, and what trains


def source(name, head=None, **overrides):
    model, params = decoder_zoo.tiny(name, head, **overrides)
    return Source(model, params, Lineage("memory", "0" * 64), {"config": decoder_zoo.fields(name, **overrides)})


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_untie(name, tmp_path):
    tied = source(name, tie_word_embeddings=True)
    assert "head" not in tied.params and tied.model.stages[-1].reads == ("embed/word/embedding",)
    loose = untie(tied)
    assert np.array_equal(loose.params["head"]["decoder"]["kernel"], tied.params["embed"]["word"]["embedding"].T)
    assert loose.model.stages[-1].reads == () and loose.lineage.operations == ("untie()",)
    batch = decoder_zoo.batch()
    a, b = (run(src.model, zoo.stacked(src.params), batch)["logits"] for src in (loose, tied))
    same(a, b)
    again = load(export(loose, tmp_path / "loose"))
    assert again.model.config.tie_word_embeddings is False
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (again.params, loose.params)), strict=True))
    labels = match(groups.head_only(loose.model), loose.params)
    assert labels["head"]["decoder"]["kernel"] == "head" and labels["embed"]["word"]["embedding"] == "frozen"
    with pytest.raises(ValueError, match=f"untie: the head of this {name} model is not tied"):
        untie(loose)


def test_recipes_that_freeze_a_tied_head_are_refused():
    tied = source("gpt2")
    message = r"the head is embed/word/embedding, which this recipe freezes: untie\(source\) first"
    with pytest.raises(ValueError, match=rf"head_only: {message}"):
        groups.head_only(tied.model)
    with pytest.raises(ValueError, match=rf"last\(2\): {message}"):
        groups.last(tied.model, 2)
    assert set(flatten(match(groups.full(tied.model), tied.params)).values()) == {"trunk"}
    groups.last(swap_head(tied, heads.classifier(2), jax.random.key(0)).model, 2)
    groups.last(source("llama").model, 2)


def test_heads_are_swapped():
    first = source("gemma2")
    classifier = swap_head(first, heads.classifier(["a", "b"]), jax.random.key(1))
    assert {path: leaf.shape for path, leaf in flatten(classifier.params["head"]).items()} == {"out/kernel": (20, 2)}
    tokens = swap_head(classifier, heads.tokens(3), jax.random.key(1))
    assert set(flatten(tokens.params["head"])) == {"out/kernel", "out/bias"}
    back = swap_head(tokens, heads.causal_lm(), jax.random.key(1))
    assert flatten(back.params).keys() == flatten(first.params).keys()
    with pytest.raises(ValueError, match="gemma2 has no head of kind 'question-answering'; it has causal-lm, sequence"):
        swap_head(first, heads.span(), jax.random.key(1))
    odd = swap_head(source("gemma3_text"), heads.tokens(2), jax.random.key(1)).model
    with pytest.raises(ConfigFieldError, match="a token-classification head on gemma3_text has no Hugging Face class"):
        family("gemma3_text").export_config(odd, {})
    with pytest.raises(ValueError, match="pooling 'mean': a causal-lm head takes None"):
        swap_head(first, Head("causal-lm", pooling="mean"), jax.random.key(1))


def test_a_sequence_is_classified_by_its_last_real_token():
    """By the padding's id, as transformers picks it, or by the mask where the model has no id for padding."""
    ids = np.array([[5, 6, 7, 0], [0, 5, 6, 7]], np.int32)
    mask = (ids != 0).astype(np.int32)
    head = Head("sequence-classification", ("a", "b"))
    for pad, batch in [(0, {"input_ids": ids}), (None, {"input_ids": ids, "attention_mask": mask})]:
        model, params = decoder_zoo.tiny("llama", head, pad_token_id=pad)
        hidden = run(model, params, batch)["last_hidden_state"]
        want = np.asarray(hidden)[[0, 1], [2, 3]] @ params["head"]["out"]["kernel"]
        same(run(model, params, batch)["logits"], want)
    model, params = decoder_zoo.tiny("llama", dataclasses.replace(head, pooling="mean"))
    hidden = np.asarray(run(model, params, batch)["last_hidden_state"])
    want = np.stack([hidden[0, :3].mean(0), hidden[1, 1:].mean(0)]) @ params["head"]["out"]["kernel"]
    same(run(model, params, batch)["logits"], want)


def test_what_a_row_is_filled_with_and_how_far_does_not_matter():
    """The model's id for padding is 9; a tokenizer without one of its own fills rows with 0."""
    model, params = decoder_zoo.tiny("llama", Head("sequence-classification", ("a", "b")), pad_token_id=9)
    text = np.array([[5, 6, 7]], np.int32)
    want = run(model, params, {"input_ids": text})["logits"]
    for more, fill in [(1, 0), (5, 0), (5, 9)]:
        ids = np.pad(text, ((0, 0), (0, more)), constant_values=fill)
        mask = np.pad(np.ones_like(text), ((0, 0), (0, more)))
        same(run(model, params, {"input_ids": ids, "attention_mask": mask})["logits"], want)


def test_layers_that_add_to_the_residual_stream_start_smaller():
    model = family("gpt2").build(decoder_zoo.fields("gpt2", n_embd=120, n_layer=8), None)
    block = next(stage for stage in model.stages if stage.name == "blocks/3").init(jax.random.key(0))
    assert np.std(block["attention"]["qkv"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    for kernel in (block["attention"]["output"]["kernel"], block["mlp"]["down"]["kernel"]):
        assert np.std(kernel) == pytest.approx(0.02 / 4, rel=0.05)


# Configurations

PUBLISHED = {
    "openai-community/gpt2": (
        124_439_808,
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
            "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
            "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
            "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
            "summary_use_proj": True, "task_specific_params": {"text-generation": {"max_length": 50}},
            "vocab_size": 50257,
        },
    ),
    "meta-llama/Llama-3.2-1B": (
        1_235_814_400,
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
            "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
        },
    ),
    "mistralai/Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
        },
    ),
    "Qwen/Qwen2.5-0.5B": (
        494_032_768,
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
            "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
            "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
            "use_sliding_window": False, "vocab_size": 151936,
        },
    ),
    "Qwen/Qwen3-0.6B": (
        596_049_920,
        {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
            "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
            "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
    ),
    "google/gemma-2-2b": (
        2_614_341_888,
        {
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
            "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
            "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
            "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
            "torch_dtype": "float32", "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
        },
    ),
    "google/gemma-3-1b-pt": (
        999_885_952,
        {
            "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
            "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
            "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_and_have_the_published_number_of_parameters(name):
    count, raw = PUBLISHED[name]
    found = family(raw["model_type"])
    model = found.build(raw, Head(found.architectures[raw["architectures"][0]]))
    assert sum(np.prod(leaf.shape) for leaf in flatten(abstract_init(model)).values()) == count
    assert found.export_config(model, raw)["architectures"] == raw["architectures"]


def built(name, **overrides):
    return family(name).build(decoder_zoo.fields(name, **overrides), Head("causal-lm"))


def test_old_spellings_of_ropes_are_read():
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    new = built("llama", rope_parameters=LLAMA3).config
    for old in ({"rope_scaling": scaling}, {"rope_parameters": scaling}):
        assert built("llama", rope_theta=50.0, **old).config == new
    linear = {"type": "linear", "factor": 2.0}
    assert built("llama", rope_scaling=linear).config.rope[0].numbers == (("factor", 2.0),)
    two = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}
    old = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert built("gemma3_text", rope_parameters=None, **old).config == built("gemma3_text", rope_parameters=two).config
    plain = built("gemma3_text", rope_parameters=None).config
    assert [rope.theta for rope in plain.rope] == [1e6, 1e4]


def test_which_layers_are_limited():
    def windows(name, **overrides):
        return built(name, **overrides).config.windows

    assert windows("gpt2") == windows("llama") == windows("mistral", sliding_window=None) == ()
    assert windows("mistral") == (5, 5, 5)
    assert windows("qwen2") == (41, 4, 4) and windows("qwen2", use_sliding_window=False) == ()
    assert windows("qwen2", layer_types=[SLIDING, FULL, FULL]) == (4, 41, 41)
    assert windows("gemma2") == (5, 41, 5)
    period = {"layer_types": None, "num_hidden_layers": 4}
    assert windows("gemma3_text", **period, sliding_window_pattern=2) == (5, 41, 5, 41)
    assert windows("gemma3_text", **period) == (5, 5, 5, 5)


REFUSED = [
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling\.type='dynamic' is not supported"),
    ("qwen3", {"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters\.rope_type='longrope' is not suppor"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters lacks factor, which the rope type 'lin"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters\.partial_rotary_factor is unk"),
    ("llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, r"high_freq_factor must be above"),
    ("llama", {"rope_parameters": {**LLAMA3, "factor": 0}}, r"rope_parameters\.factor: expected a positive number"),
    ("llama", {"rope_parameters": [1]}, r"rope_parameters: expected a dictionary, found \[1\]"),
    ("llama", {"rope_theta": "big"}, r"rope_theta: expected a positive number, found 'big'"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, r"rope_parameters: expected 'full_attention' and"),
    ("gemma3_text", {"rope_parameters": {FULL: {"rope_type": "dynamic"}}}, r"full_attention\.rope_type='dynamic'"),
    ("gemma3_text", {"sliding_window_pattern": 0}, r"sliding_window_pattern: expected a positive int, found 0"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, r"attn_logit_softcapping: 0.0 is not positive; null for no cap"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0 is not supported, only None is"),
    ("gemma2", {"query_pre_attn_scalar": 0}, r"query_pre_attn_scalar: 0 is not positive"),
    ("gemma2", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True is not supported"),
    ("gemma2", {"hidden_activation": "gegelu"}, r"hidden_activation: 'gegelu' is not one of \['gelu', "),
    ("gpt2", {"activation_function": "quick"}, r"activation_function: 'quick' is not one of"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=True is not supported"),
    ("gpt2", {"reorder_and_upcast_attn": True}, r"reorder_and_upcast_attn=True is not supported, only False is"),
    ("gpt2", {"n_embd": 21}, r"n_embd=21 does not divide by n_head=4"),
    ("gpt2", {"sliding_window": 4}, r"sliding_window=4 is unknown and may change"),
    ("llama", {"sliding_window": 4}, r"sliding_window=4 is unknown and may change"),
    ("mistral", {"attention_bias": True}, r"attention_bias=True is unknown and may change"),
    ("qwen2", {"use_mrope": True}, r"use_mrope=True is not supported, only False is"),
    ("qwen2", {"layer_types": [FULL]}, r"layer_types has 1 entries, num_hidden_layers is 3"),
    ("qwen2", {"layer_types": ["full", FULL, FULL]}, r"layer_types: 'full' is not one of"),
    ("qwen2", {"layer_types": [SLIDING] * 3, "use_sliding_window": False}, r"sliding_window=None with sliding_attent"),
    ("llama", {"num_key_value_heads": 3}, r"num_attention_heads=4 does not divide by num_key_value_heads=3"),
    ("llama", {"head_dim": None, "hidden_size": 21}, r"hidden_size=21 does not divide by num_attention_heads=4"),
    ("llama", {"head_dim": 5}, r"head_dim=5: rotary positions turn pairs"),
    ("llama", {"num_hidden_layers": 10**9}, r"num_hidden_layers: 1000000000 is beyond 1000, the most"),
    ("llama", {"num_hidden_layers": 0}, r"num_hidden_layers: expected a positive int, found 0"),
    ("llama", {"head_dim": 0}, r"head_dim: expected a positive int, found 0"),
    ("llama", {"num_key_value_heads": 0}, r"num_key_value_heads: expected a positive int, found 0"),
    ("llama", {"vocab_size": 0}, r"vocab_size: expected a positive int, found 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "overrides", "message"), REFUSED, ids=[f"{n}-{next(iter(o))}" for n, o, _ in REFUSED])
def test_configurations_that_are_refused(name, overrides, message):
    with pytest.raises(ConfigFieldError, match=f"^config field .*{message}"):
        built(name, **overrides)
