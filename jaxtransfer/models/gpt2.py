"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtransfer.models import causal, decoder, slots
from jaxtransfer.models.attention import attention
from jaxtransfer.models.decoder import DecoderConfig
from jaxtransfer.models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear, dropout, split
from jaxtransfer.models.names import Drop, Entry, NameTable, embedding, norm
from jaxtransfer.models.registry import MUST, Family
from jaxtransfer.types import Carry, Head, Model

ARCHITECTURES: Mapping[str, str | None] = {
    "GPT2Model": None,
    "GPT2LMHeadModel": "causal-lm",
    "GPT2ForSequenceClassification": "sequence-classification",
    "GPT2ForTokenClassification": "token-classification",
}


class Embed(nnx.Module):
    """Word and position embeddings, (B, T) -> (B, T, d), and what the blocks read: the mask, the cache."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        std = c.initializer_range
        self.word = Embedding(c.vocab_size, c.hidden_size, std=std, rngs=rngs)
        self.position = Embedding(c.max_position_embeddings, c.hidden_size, std=std, rngs=rngs)
        self.c = c

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        positions, entries = causal.context(carry, self.c.max_position_embeddings, windows=False)
        x = slots.prompted(self.word(carry["input_ids"]), carry) + self.position(positions)
        x = dropout(causal.checked(x, entries), self.c.embed_dropout, key)
        return {**slots.parted(x, carry["input_ids"].shape[1]), **entries}


class Attention(nnx.Module):
    """Causal self-attention over the normalised input; queries, keys and values come from one linear layer."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        d, std = c.hidden_size, c.initializer_range
        self.norm = LayerNorm(d, eps=c.norm_eps)
        self.qkv = Linear(d, 3 * d, std=std, rngs=rngs)
        self.output = Linear(d, d, std=residual_std(c), rngs=rngs)
        self.c = c

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        kq, ka, ko, kd = split(key, 4)
        q, k, v = jnp.split(self.qkv(self.norm(carry["hidden"]), kq), 3, axis=-1)
        k, v, written = causal.remember(carry, k, v)
        c = self.c
        k, v, mask = slots.prefixed(carry, k, v, carry["mask"])
        y = attention(
            q, k, v, mask, heads=c.num_attention_heads, rate=c.attention_dropout, key=ka, span=causal.span(carry)
        )
        y = dropout(self.output(y, ko), c.residual_dropout, kd)
        return {"hidden": carry["hidden"] + slots.adapted(y, carry, "attention"), **written}


class MLP(nnx.Module):
    """Two-layer perceptron of the normalised input."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        self.norm = LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.up = Linear(c.hidden_size, c.intermediate_size, std=c.initializer_range, rngs=rngs)
        self.down = Linear(c.intermediate_size, c.hidden_size, std=residual_std(c), rngs=rngs)
        self.c = c

    def __call__(self, carry: Carry, key: jax.Array | None) -> jax.Array:
        ku, ko, kd = split(key, 3)
        y = self.down(ACTIVATIONS[self.c.hidden_act](self.up(self.norm(carry["hidden"]), ku)), ko)
        return carry["hidden"] + slots.adapted(dropout(y, self.c.residual_dropout, kd), carry, "mlp")


def residual_std(c: DecoderConfig) -> float:
    """Layers that add to the residual stream start smaller, by the root of how many there are."""
    return c.initializer_range / (2 * c.num_hidden_layers) ** 0.5


class Block(nnx.Module):
    """One decoder layer, pre-norm: (B, T, d) -> (B, T, d)."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        self.attention, self.mlp = Attention(c, rngs), MLP(c, rngs)

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        ka, km = split(key, 2)
        written = self.attention(carry, ka)
        return {**written, "hidden": self.mlp({**carry, **written}, km)}


def fused(ours: str, theirs: str) -> tuple[Entry, ...]:
    """Rows of a linear layer that GPT-2 keeps as we do, (in, out)."""
    return Entry(f"{ours}/kernel", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")


def names(model: Model) -> NameTable:
    """GPT-2's name table."""
    block, layer = "blocks/{i}", "h.{i}"
    rows = (
        *embedding("embed/word", "wte"),
        *embedding("embed/position", "wpe"),
        *norm(f"{block}/attention/norm", f"{layer}.ln_1"),
        *fused(f"{block}/attention/qkv", f"{layer}.attn.c_attn"),
        *fused(f"{block}/attention/output", f"{layer}.attn.c_proj"),
        *norm(f"{block}/mlp/norm", f"{layer}.ln_2"),
        *fused(f"{block}/mlp/up", f"{layer}.mlp.c_fc"),
        *fused(f"{block}/mlp/down", f"{layer}.mlp.c_proj"),
        *norm("norm", "ln_f"),
        *decoder.head_names(model, tokens="classifier"),
    )
    mask = Drop(r"h\.\d+\.attn\.(bias|masked_bias)", "a buffer that the model computes itself")
    choice = Drop(r"multiple_choice_head\.summary\.(weight|bias)", "the head of another task")
    return NameTable(rows, decoder.drops(model, mask, choice), "transformer.")


ALIASES = decoder.held(
    "",
    hidden_size="n_embd",
    num_hidden_layers="n_layer",
    num_attention_heads="n_head",
    intermediate_size="n_inner",
    max_position_embeddings="n_positions",
    hidden_act="activation_function",
    norm_eps="layer_norm_epsilon",
    attention_dropout="attn_pdrop",
    embed_dropout="embd_pdrop",
    residual_dropout="resid_pdrop",
)
DEFAULTS = {"n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
DEFAULTS |= {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "tie_word_embeddings": True}
HARMLESS = """
    n_ctx n_special predict_special_tokens _num_labels summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout""".split()
ONLY = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False}


def _assembled(c: DecoderConfig, head: Head | None) -> Model:
    def last(rngs: nnx.Rngs) -> LayerNorm:
        return LayerNorm(c.hidden_size, eps=c.norm_eps)

    return decoder.assemble("gpt2", c, head, lambda rngs: Embed(c, rngs), lambda rngs: Block(c, rngs), last)


def build(
    raw: Mapping[str, Any], head: Head | None, *, pooler: bool | None = None, ignore: Collection[str] = ()
) -> Model:
    """GPT-2 from its raw configuration."""
    given = {**DEFAULTS, **raw}
    if given.get("n_inner") is None and isinstance(given.get("n_embd"), int):
        given["n_inner"] = 4 * given["n_embd"]
    return _assembled(decoder.read(given, ALIASES, ignore, harmless=HARMLESS, must={**MUST, **ONLY}), head)


def rehead(model: Model, head: Head | None) -> Model:
    """The same trunk under another head, or bare."""
    return _assembled(model.config, head)


FAMILIES = {
    "gpt2": Family(
        "gpt2", ARCHITECTURES, build, rehead, names, partial(decoder.export_config, ARCHITECTURES), decoder.TENSOR_RULES
    )
}
