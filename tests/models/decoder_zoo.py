"""Decoders for the tests: random torch models of every family, ours with the same parameters, made-up tiny ones."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.models import apply, family, run_span
from jaxtransfer.models.api import abstract_init
from jaxtransfer.tree import flatten, unflatten
from jaxtransfer.types import Head
from tests import torch_reference
from tests.models import zoo

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
VOCABULARY, LENGTH = 101, 13
_AUTO = {
    "model": "AutoModel",
    "clm": "AutoModelForCausalLM",
    "seqcls": "AutoModelForSequenceClassification",
    "tokencls": "AutoModelForTokenClassification",
}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 41,
    "pad_token_id": 0,
}
_SLIDING = {"sliding_window": 5, "head_dim": 6}
_OWN = {
    "llama": {"head_dim": 6},
    "mistral": _SLIDING,
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "hidden_size": 24},
    "qwen3": {"head_dim": 6},
    "gemma2": {**_SLIDING, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        **_SLIDING,
        "query_pre_attn_scalar": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    },
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 20, "n_layer": 3, "n_head": 4, "n_inner": 37, "n_positions": 41}
_GPT2 |= {"pad_token_id": 0, "attn_pdrop": 0.3, "embd_pdrop": 0.2, "resid_pdrop": 0.1}


def fields(name, **overrides):
    """A small configuration with odd sizes, as a raw file would hold it."""
    own = _GPT2 if name == "gpt2" else {**_SIZES, **_OWN[name]}
    return {"model_type": name, **own, **overrides}


def random_model(name, head, seed, **overrides):
    """A torch model in evaluation mode, eager attention, every parameter drawn again."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    given = {"bos_token_id": 1, "eos_token_id": 2, **fields(name, **overrides)}
    if head.endswith("cls"):
        given |= {"id2label": dict(enumerate("abc")), "label2id": {label: i for i, label in enumerate("abc")}}
    config = transformers.AutoConfig.for_model(**given)
    auto = getattr(transformers, _AUTO[head])
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32)
    torch_reference.redraw(model, seed)
    return model.eval()


def from_torch(name, head="clm", **overrides):
    """A random torch model, and ours with the same parameters."""
    theirs = random_model(name, head, 0, **overrides)
    with tempfile.TemporaryDirectory() as folder:
        model, params = zoo.from_folder(torch_reference.save(theirs, folder))
    return theirs, model, params


def batch(rows=3, length=LENGTH, seed=0, padding="right"):
    """Token ids and a mask: every row padded differently, and one real token masked in the middle."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY, (rows, length)).astype(np.int32)
    mask = np.ones_like(ids)
    for row in range(rows):
        pad = slice(0, row) if padding == "left" else slice(length - row, length)
        ids[row, pad], mask[row, pad] = 0, 0
    mask[0, length // 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def boundaries(model):
    """The boundaries at which torch gives hidden states: the last is the norm's, not the last block's."""
    names = [stage.name for stage in model.stages if stage.name.startswith("blocks/")]
    return ["embed", *names[:-1], "norm"]


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def outputs(model, params, batch, dtype=jnp.float32):
    return apply(model, params, batch, capture=boundaries(model), dtype=dtype)


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def gradients(model, params, batch, cotangent, dtype=jnp.float32):
    """Gradients of ``sum(logits * cotangent)``: through all but the embedding stage, and through that alone."""

    def loss(rest, embed):
        carry = run_span(model, embed, batch, None, "embed", dtype=dtype)
        return jnp.vdot(run_span(model, rest, carry, "embed", None, dtype=dtype)["logits"], cotangent)

    return jax.grad(loss, argnums=(0, 1))(params, params)


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def in_steps(model, params, batch, slots, first=LENGTH - 3):
    """The logits of a prompt at once and then of one token after another, through the cache."""
    rows, length = batch["input_ids"].shape
    cache, parts = model.cache(rows, slots, jnp.float32), []
    for start, stop in [(0, first), *((i, i + 1) for i in range(first, length))]:
        part = {name: value[:, start:stop] for name, value in batch.items()}
        found = apply(model, params, part, cache=cache)
        cache = found["cache"]
        parts.append(found["logits"])
    return jnp.concatenate(parts, axis=1), cache


@functools.cache
def tiny(name, head=None, **overrides):
    """A made-up model with sizes of its family's test configuration, and random parameters, none zero."""
    model = family(name).build(fields(name, **overrides), head or Head("causal-lm"))
    rng = np.random.default_rng(0)
    drawn = {path: rng.normal(size=leaf.shape) for path, leaf in flatten(abstract_init(model)).items()}
    scales = {path: 0.2 if path.endswith(("scale", "bias")) else 0.3 for path in drawn}
    shift = 0.0 if name.startswith("gemma") else 1.0
    return model, unflatten(
        {
            path: jnp.asarray(value * scales[path] + (shift if path.endswith("scale") else 0.0), jnp.float32)
            for path, value in drawn.items()
        }
    )
