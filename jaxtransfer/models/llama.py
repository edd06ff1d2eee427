"""Llama (Touvron et al. 2023, arXiv:2302.13971) and its like: Mistral (arXiv:2310.06825), Qwen 2 and Qwen 3.

One block with rotary positions, grouped-query attention and a gated MLP; the families differ by a :class:`Variant`, and
in which fields their configuration files have.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtransfer.models import causal, decoder, rope, slots
from jaxtransfer.models.attention import attention
from jaxtransfer.models.decoder import FULL, SLIDING, DecoderConfig
from jaxtransfer.models.layers import Embedding, Linear, RMSNorm, gated, split
from jaxtransfer.models.names import Drop, Entry, NameTable, embedding, linear
from jaxtransfer.models.registry import MUST, Family
from jaxtransfer.types import Carry, Head, Model


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a family differs from Llama.

    Attributes:
      input_bias: queries, keys and values have biases, the output has none (Qwen 2).
      head_norms: the queries and keys of each head are normalised (Qwen 3, Gemma 3).
      output_norms: what attention and MLP give is normalised before it is added (Gemma).
      offset: what the scales of the norms are stored without (Gemma).
      embed_scale: the embeddings are multiplied by the root of their width (Gemma).
    """

    input_bias: bool = False
    head_norms: bool = False
    output_norms: bool = False
    offset: float = 0.0
    embed_scale: bool = False

    def norm(self, c: DecoderConfig, width: int | None = None) -> RMSNorm:
        """A norm of the family, over the hidden width or another."""
        return RMSNorm(width or c.hidden_size, eps=c.norm_eps, offset=self.offset)


class Embed(nnx.Module):
    """Word embeddings, (B, T) -> (B, T, d), and what the blocks read: rotary tables, the mask, the cache."""

    def __init__(self, c: DecoderConfig, v: Variant, rngs: nnx.Rngs):
        self.word = Embedding(c.vocab_size, c.hidden_size, std=c.initializer_range, rngs=rngs)
        self.c, self.v = c, v

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        c = self.c
        positions, entries = causal.context(carry, c.max_position_embeddings, windows=bool(c.windows))
        x = self.word(carry["input_ids"])
        if self.v.embed_scale:
            # In the precision of the weights: with bfloat16 the models were trained with 55.5 for sqrt(3072) = 55.43.
            x = x * jnp.asarray(c.hidden_size**0.5, self.word.embedding.get_value().dtype).astype(x.dtype)
        x = slots.parted(causal.checked(slots.prompted(x, carry), entries), x.shape[1])
        return {**x, **entries, **rope.tables(c.rope, positions, c.width)}


class Attention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions, over the normalised input."""

    def __init__(self, c: DecoderConfig, v: Variant, rngs: nnx.Rngs):
        d, std, q, kv = c.hidden_size, c.initializer_range, c.num_attention_heads * c.width, c.kv_heads * c.width
        bias = c.attention_bias or v.input_bias
        self.norm = v.norm(c)
        self.query = Linear(d, q, std=std, bias=bias, rngs=rngs)
        self.key = Linear(d, kv, std=std, bias=bias, rngs=rngs)
        self.value = Linear(d, kv, std=std, bias=bias, rngs=rngs)
        self.query_norm, self.key_norm = (v.norm(c, c.width) if v.head_norms else None for _ in range(2))
        self.output = Linear(q, d, std=std, bias=c.attention_bias, rngs=rngs)
        self.post_norm = v.norm(c) if v.output_norms else None
        self.c = c

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        kq, kk, kv, ka, ko = split(key, 5)
        c, x = self.c, self.norm(carry["hidden"])
        q = self.turned(self.query(x, kq), self.query_norm, carry)
        k = self.turned(self.key(x, kk), self.key_norm, carry)
        k, v, written = causal.remember(carry, k, self.value(x, kv))
        k, v, mask = slots.prefixed(carry, k, v, causal.attended(carry))
        y = attention(
            q, k, v, mask, heads=c.num_attention_heads, kv_heads=c.kv_heads,
            scale=None if c.query_pre_attn_scalar is None else c.query_pre_attn_scalar**-0.5,
            softcap=c.attn_logit_softcapping, rate=c.attention_dropout, key=ka,
            span=causal.span(carry, c.sliding_window),
        )  # fmt: skip
        y = self.output(y, ko)
        y = y if self.post_norm is None else self.post_norm(y)
        return {"hidden": carry["hidden"] + slots.adapted(y, carry, "attention"), **written}

    def turned(self, x: jax.Array, norm: RMSNorm | None, carry: Carry) -> jax.Array:
        """Queries or keys, (B, T, heads * d), normalised where the family does, turned by their positions."""
        heads = x.reshape(*x.shape[:2], -1, self.c.width)
        heads = heads if norm is None else norm(heads)
        cos, sin = carry["cos"], carry["sin"]
        if "base" in carry:
            cos, sin = (jax.lax.dynamic_slice_in_dim(t, carry["base"], 1, axis=2) for t in (cos, sin))
        return rope.rotate(heads, cos, sin).reshape(x.shape)


class MLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))`` of the normalised input (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, c: DecoderConfig, v: Variant, rngs: nnx.Rngs):
        d, inner, std, bias = c.hidden_size, c.intermediate_size, c.initializer_range, c.mlp_bias
        self.norm = v.norm(c)
        self.gate = Linear(d, inner, std=std, bias=bias, rngs=rngs)
        self.up = Linear(d, inner, std=std, bias=bias, rngs=rngs)
        self.down = Linear(inner, d, std=std, bias=bias, rngs=rngs)
        self.post_norm = v.norm(c) if v.output_norms else None
        self.activation = c.hidden_act

    def __call__(self, carry: Carry, key: jax.Array | None) -> jax.Array:
        kg, ku, kd = split(key, 3)
        x = self.norm(carry["hidden"])
        y = self.down(gated(self.activation, self.gate(x, kg), self.up(x, ku)), kd)
        y = y if self.post_norm is None else self.post_norm(y)
        return carry["hidden"] + slots.adapted(y, carry, "mlp")


class Block(nnx.Module):
    """One decoder layer, pre-norm: (B, T, d) -> (B, T, d)."""

    def __init__(self, c: DecoderConfig, v: Variant, rngs: nnx.Rngs):
        self.attention, self.mlp = Attention(c, v, rngs), MLP(c, v, rngs)

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        ka, km = split(key, 2)
        written = self.attention(carry, ka)
        return {**written, "hidden": self.mlp({**carry, **written}, km)}


def scale(ours: str, theirs: str) -> tuple[Entry, ...]:
    """The row of a norm without a bias."""
    return (Entry(f"{ours}/scale", f"{theirs}.weight"),)


HARMLESS = ("pretraining_tp", "max_sequence_length", "is_llama_config", "transformers.js_config")
"""Leftovers in published files; neither transformers nor we read them."""
MUST_BE = {**MUST, "rope_interleaved": False, "use_mrope": False}

LLAMA_NORMS = {"attention/norm": "input_layernorm", "mlp/norm": "post_attention_layernorm"}


def names(norms: Mapping[str, str], model: Model) -> NameTable:
    """The name table of a family: ``norms`` are its block's, ours -> theirs; rows that a model lacks stay unused."""
    block, layer = "blocks/{i}", "layers.{i}"
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    rows = [
        *embedding("embed/word", "embed_tokens"),
        *(r for a, b in projections.items() for r in linear(f"{block}/attention/{a}", f"{layer}.self_attn.{b}")),
        *scale(f"{block}/attention/query_norm", f"{layer}.self_attn.q_norm"),
        *scale(f"{block}/attention/key_norm", f"{layer}.self_attn.k_norm"),
        *(row for a in ("gate", "up", "down") for row in linear(f"{block}/mlp/{a}", f"{layer}.mlp.{a}_proj")),
        *(row for a, b in norms.items() for row in scale(f"{block}/{a}", f"{layer}.{b}")),
        *scale("norm", "norm"),
        *decoder.head_names(model),
    ]
    buffer = Drop(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "a buffer that the model computes itself")
    return NameTable(tuple(rows), decoder.drops(model, buffer), "model.")


def build(name: str, v: Variant, c: DecoderConfig, head: Head | None) -> Model:
    """The model of a record."""
    embed, block = (lambda rngs: Embed(c, v, rngs)), (lambda rngs: Block(c, v, rngs))
    return decoder.assemble(name, c, head, embed, block, lambda rngs: v.norm(c))


def family(
    name: str,
    v: Variant,
    read: Callable[[Mapping[str, Any], Collection[str]], DecoderConfig],
    architectures: Mapping[str, str | None],
    norms: Mapping[str, str] = LLAMA_NORMS,
) -> Family:
    """A family of this file's block: ``read(raw, ignore)`` gives its record."""

    def from_raw(
        raw: Mapping[str, Any], head: Head | None, *, pooler: bool | None = None, ignore: Collection[str] = ()
    ) -> Model:
        return build(name, v, read(raw, ignore), head)

    def rehead(model: Model, head: Head | None) -> Model:
        return build(name, v, model.config, head)

    export = partial(decoder.export_config, architectures)
    return Family(name, architectures, from_raw, rehead, partial(names, norms), export, decoder.TENSOR_RULES)


def classes(prefix: str) -> dict[str, str | None]:
    """Hugging Face's classes of a family -> the kind of head."""
    kinds = {"Model": None, "ForCausalLM": "causal-lm"}
    kinds |= {"ForSequenceClassification": "sequence-classification", "ForTokenClassification": "token-classification"}
    return {prefix + suffix: kind for suffix, kind in kinds.items()}


def reader(
    defaults: Mapping[str, Any], own: str, layers: Callable[[DecoderConfig], Sequence[str]]
) -> Callable[[Mapping[str, Any], Collection[str]], DecoderConfig]:
    """How a family reads its record: its defaults, its own fields, each layer's type where the file is silent."""
    aliases = decoder.held(f"num_key_value_heads {own}", norm_eps="rms_norm_eps")
    common = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}

    def read(raw: Mapping[str, Any], ignore: Collection[str]) -> DecoderConfig:
        given, harmless = {**common, **defaults, **raw}, (*rope.FIELDS, *HARMLESS)
        c = decoder.read(given, aliases, ignore, harmless=harmless, must=MUST_BE)
        c = decoder.with_layers(c if c.use_sliding_window else dataclasses.replace(c, sliding_window=None), layers(c))
        return decoder.with_ropes(c, rope.read(raw, c.max_position_embeddings))

    return read


def qwen_layers(c: DecoderConfig) -> list[str]:
    """Layers from ``max_window_layers`` on are limited, if any are."""
    near = c.use_sliding_window and c.sliding_window is not None
    return [SLIDING if near and i >= c.max_window_layers else FULL for i in range(c.num_hidden_layers)]


def mistral_layers(c: DecoderConfig) -> list[str]:
    """All layers are limited, or none."""
    return [FULL if c.sliding_window is None else SLIDING] * c.num_hidden_layers


def llama_layers(c: DecoderConfig) -> list[str]:
    """No layer is limited."""
    return [FULL] * c.num_hidden_layers


_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "use_sliding_window": False}
_QWEN |= {"sliding_window": 4096, "max_window_layers": 28}
_QWEN_FIELDS = "head_dim use_sliding_window sliding_window max_window_layers layer_types"

FAMILIES = {
    "llama": family(
        "llama", Variant(),
        reader({"max_position_embeddings": 2048}, "head_dim attention_bias mlp_bias", llama_layers), classes("Llama"),
    ),
    "mistral": family(
        "mistral", Variant(),
        reader(
            {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
            "head_dim sliding_window", mistral_layers,
        ),
        classes("Mistral"),
    ),
    "qwen2": family("qwen2", Variant(input_bias=True), reader(_QWEN, _QWEN_FIELDS, qwen_layers), classes("Qwen2")),
    "qwen3": family(
        "qwen3", Variant(head_norms=True),
        reader({**_QWEN, "head_dim": 128}, f"{_QWEN_FIELDS} attention_bias", qwen_layers), classes("Qwen3"),
    ),
}  # fmt: skip
