"""Parity of decoders with torch: outputs, hidden states and gradients; where torch is absent, against files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.models import family
from jaxtransfer.models.names import turn
from jaxtransfer.models.rope import frequencies, read
from jaxtransfer.source import export, load
from jaxtransfer.tree import flatten, unstack
from tests import torch_reference
from tests.models import decoder_zoo, zoo

GOLDENS = zoo.GOLDENS / "decoders"
STORED = sorted(path.parent.name for path in GOLDENS.glob("*/model.safetensors"))
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 50.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 20, "rope_theta": 30.0}
CASES = [
    ("gpt2", {}),
    ("llama", {}),
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {}),
    ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    ("gemma2", {}),
    ("gemma3_text", {}),
]
MORE = [
    ("gpt2", {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": None}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}, "num_key_value_heads": 4}),
    ("llama", {"rope_parameters": YARN, "hidden_act": "gelu", "head_dim": None, "hidden_size": 24}),
    ("llama", {"num_key_value_heads": 1}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen3", {}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 60}),
    ("gemma2", {"attention_bias": True}),
    ("gemma3_text", {"attention_bias": True, "final_logit_softcapping": 20.0, "tie_word_embeddings": False}),
]


def spell(value):
    return "-".join(value) or "plain" if isinstance(value, dict) else str(value)


def check_outputs(model, params, batch, want):
    got = decoder_zoo.outputs(model, params, batch)
    zoo.assert_close(got["logits"], want["logits"])
    zoo.assert_close(got["last_hidden_state"], want["last_hidden_state"])
    states = [got["captured"][name] for name in decoder_zoo.boundaries(model)]
    for ours, theirs in zip(states, want["hidden_states"], strict=True):
        zoo.assert_close(ours, theirs)


def check_gradients(theirs, model, params, batch, want):
    cotangent = np.random.default_rng(1).standard_normal(want["logits"].shape).astype(np.float32)
    rest, embed = (flatten(unstack(tree)) for tree in decoder_zoo.gradients(model, params, batch, cotangent))
    stored = torch_reference.gradients(theirs, batch, {"logits": cotangent})
    plan = family(model.family).names(model).load_plan(stored, list(rest))
    wanted = {path: turn(stored[name], how) for path, (name, how) in plan.used.items()}
    if model.family != "gpt2":
        # nn.Embedding(padding_idx=...) gives the padding's row no gradient from the lookup; see test_parity.
        path = "embed/word/embedding"
        embed[path] = embed[path].at[model.config.pad_token_id].set(0)
    zoo.assert_gradients_close({path: rest[path] + embed[path] for path in rest}, wanted)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "overrides"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)], ids=spell
)
def test_outputs_and_gradients(name, overrides):
    theirs, model, params = decoder_zoo.from_torch(name, **overrides)
    params, batch = jax.tree.map(jnp.asarray, zoo.stacked(params)), decoder_zoo.batch()
    want = torch_reference.outputs(theirs, batch)
    check_outputs(model, params, batch, want)
    check_gradients(theirs, model, params, batch, want)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
def test_left_padding_with_positions(name):
    theirs, model, params = decoder_zoo.from_torch(name)
    batch = decoder_zoo.batch(padding="left")
    batch["position_ids"] = np.maximum(np.cumsum(batch["attention_mask"], 1, dtype=np.int32) - 1, 0)
    check_outputs(model, zoo.stacked(params), batch, torch_reference.outputs(theirs, batch))


@pytest.mark.torch
def test_without_a_mask_all_earlier_tokens_are_attended():
    theirs, model, params = decoder_zoo.from_torch("mistral")
    batch = {"input_ids": decoder_zoo.batch(1)["input_ids"]}
    check_outputs(model, zoo.stacked(params), batch, torch_reference.outputs(theirs, batch))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "head"),
    [("gpt2", "seqcls"), ("gpt2", "tokencls"), ("llama", "seqcls"), ("qwen3", "tokencls"), ("gemma3_text", "seqcls")],
)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_classifiers(name, head, padding):
    theirs, model, params = decoder_zoo.from_torch(name, head)
    batch = decoder_zoo.batch(padding=padding)
    check_outputs(model, zoo.stacked(params), batch, torch_reference.outputs(theirs, batch))


ROPES = [
    {},
    {"rope_theta": 1e6},
    {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    {"rope_parameters": {**YARN, "rope_theta": 1e4, "truncate": False, "beta_fast": 20, "beta_slow": 2}},
    {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 1.2, "factor": 40.0}},
    {"rope_parameters": {**YARN, "rope_theta": 1e4, "attention_factor": 0.8}},
    {"rope_scaling": {"type": "linear", "factor": 4}},
]


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # transformers' own
@pytest.mark.parametrize("given", ROPES, ids=str)
def test_frequencies(given):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"head_dim": 128, "max_position_embeddings": 131072}
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**sizes, **json.loads(json.dumps(given))))
    turns, gain = frequencies(read(given, 131072), 128)
    np.testing.assert_allclose(turns, theirs.inv_freq.numpy(), rtol=5e-7, atol=0)
    assert gain == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize("name", decoder_zoo.FAMILIES)
def test_round_trip_through_files(name, tmp_path):
    """torch writes, we load and export, transformers loads: no key missing or unexpected, every tensor the same."""
    import torch
    import transformers

    theirs = decoder_zoo.random_model(name, "clm", 0)
    source = load(torch_reference.save(theirs, tmp_path / "theirs"))
    assert source.model.head.kind == "causal-lm" and source.lineage.dropped == {}
    folder = export(source, tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(theirs)
    first, second = theirs.state_dict(), again.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    trunk = load(tmp_path / "theirs", head=None)
    export(trunk, tmp_path / "trunk")
    bare, report = transformers.AutoModel.from_pretrained(tmp_path / "trunk", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(
        torch.equal(value, first[f"{theirs.base_model_prefix}.{key}"]) for key, value in bare.state_dict().items()
    )


BUFFERS = {
    "gpt2": {"transformer.h.0.attn.bias": "a buffer", "transformer.h.2.attn.masked_bias": "a buffer"},
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": "a buffer", "model.rotary_emb.inv_freq": "a buffer"},
    "gemma2": {"lm_head.weight": "a stored copy of a tied parameter", "score.weight": "the head of another task"},
}


@pytest.mark.parametrize("name", BUFFERS)
def test_what_real_files_hold_besides_is_dropped_for_a_reason(name):
    model, params = decoder_zoo.tiny(name)
    table, paths = family(name).names(model), list(flatten(params))
    stored = [theirs for theirs, _ in table.export_names(paths, with_prefix=True).values()]
    plan = table.load_plan([*stored, *BUFFERS[name]], paths)
    assert plan.dropped.keys() == BUFFERS[name].keys()
    assert all(plan.dropped[key].startswith(reason) for key, reason in BUFFERS[name].items())


def test_there_are_golden_files():
    assert STORED == ["gemma3_text", "gpt2", "llama"]


@pytest.mark.parametrize("name", STORED)
def test_goldens(name):
    folder = GOLDENS / name
    model, params = zoo.from_folder(folder)
    want = dict(np.load(folder / "outputs.npz"))
    want["hidden_states"] = [want[f"hidden_states/{i}"] for i in range(len(decoder_zoo.boundaries(model)))]
    check_outputs(model, zoo.stacked(params), dict(np.load(folder / "inputs.npz")), want)
