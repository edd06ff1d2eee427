"""Gemma 2 (2024, arXiv:2408.00118) and the text model of Gemma 3 (2025, arXiv:2503.19786).

Llama's block with norms on both sides of attention and MLP, and attention that alternates between near and far. The
differences between layers are numbers, the window and the base of the rotation, so all blocks are still one stack.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxtransfer.models import decoder, llama, rope
from jaxtransfer.models.decoder import FULL, SLIDING, DecoderConfig
from jaxtransfer.models.llama import Variant, classes
from jaxtransfer.models.registry import MUST, ConfigFieldError

NORMS = {
    "attention/norm": "input_layernorm",
    "attention/post_norm": "post_attention_layernorm",
    "mlp/norm": "pre_feedforward_layernorm",
    "mlp/post_norm": "post_feedforward_layernorm",
}
ALIASES = decoder.held(
    "num_key_value_heads head_dim attention_bias sliding_window layer_types query_pre_attn_scalar "
    "attn_logit_softcapping final_logit_softcapping",
    norm_eps="rms_norm_eps",
    hidden_act="hidden_activation",
)
DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
HARMLESS = ("hidden_act", "cache_implementation", "sliding_window_size")
"""Gemma's files hold ``hidden_act`` and ``sliding_window_size`` besides the names that are read."""
PERIOD = ("sliding_window_pattern", "_sliding_window_pattern")


def _read(
    raw: Mapping[str, Any],
    defaults: Mapping[str, Any],
    ignore: Collection[str],
    harmless: Sequence[str],
    period: int,
    fixed: Mapping[str, Any] = MUST,
) -> DecoderConfig:
    """The record, every ``period``-th layer attending to all slots where the file does not say otherwise.

    What of the fields is ``fixed`` is not read.
    """
    aliases = {name: None if name in fixed else given for name, given in ALIASES.items()}
    must = {**fixed, "use_bidirectional_attention": False}
    harmless = (*HARMLESS, *rope.FIELDS, *harmless)
    given = {**DEFAULTS, **defaults, **raw}
    c = decoder.read(given, aliases, ignore, harmless=harmless, must=must)
    if c.query_pre_attn_scalar is None or c.query_pre_attn_scalar <= 0:
        raise ConfigFieldError(f"config field query_pre_attn_scalar: {c.query_pre_attn_scalar} is not positive")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(c, name) is not None and getattr(c, name) <= 0:
            raise ConfigFieldError(f"config field {name}: {getattr(c, name)} is not positive; null for no cap")
    layers = [SLIDING if (i + 1) % period else FULL for i in range(c.num_hidden_layers)]
    return decoder.with_layers(c, layers)


def read_gemma2(raw: Mapping[str, Any], ignore: Collection[str]) -> DecoderConfig:
    """The record of Gemma 2: soft caps, every other layer near."""
    defaults = {"max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    c = _read(raw, defaults, ignore, (), 2)
    return decoder.with_ropes(c, rope.read(raw, c.max_position_embeddings))


def read_gemma3(raw: Mapping[str, Any], ignore: Collection[str]) -> DecoderConfig:
    """The record of Gemma 3: every sixth layer far, with a rotation of its own.

    transformers 5 writes one rope for each type of layer; older files give ``rope_theta`` and ``rope_scaling`` for far
    layers and ``rope_local_base_freq`` for near ones.
    """
    field, period = next(((name, raw[name]) for name in PERIOD if raw.get(name) is not None), (PERIOD[0], 6))
    if type(period) is not int or period < 1:
        raise ConfigFieldError(f"config field {field}: expected a positive int, found {period!r}")
    harmless = ("rope_local_base_freq", *PERIOD)
    fixed = {**MUST, "attn_logit_softcapping": None}  # transformers has the field and no cap: it does not look there
    c = _read(raw, {"max_position_embeddings": 131072}, ignore, harmless, period, fixed)
    given = raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or (unknown := sorted({*given} - {FULL, SLIDING})):
        what = given if not isinstance(given, Mapping) else unknown[0]
        raise ConfigFieldError(f"config field rope_parameters: expected {FULL!r} and {SLIDING!r}, found {what!r}")
    far = {**(given.get(FULL) or {}), **(raw.get("rope_scaling") or {})}
    limit, field = c.max_position_embeddings, "rope_parameters"
    name = "rope_scaling" if raw.get("rope_scaling") else f"{field}.{FULL}"
    return decoder.with_ropes(
        c,
        rope.parse(far, name, raw.get("rope_theta", 1e6), limit),
        rope.parse(given.get(SLIDING) or {}, f"{field}.{SLIDING}", raw.get("rope_local_base_freq", 1e4), limit),
    )


ARCHITECTURES: Mapping[str, str | None] = {
    "Gemma3TextModel": None,
    "Gemma3ForCausalLM": "causal-lm",
    "Gemma3TextForSequenceClassification": "sequence-classification",
}
TWO = Variant(output_norms=True, offset=1.0, embed_scale=True)
THREE = dataclasses.replace(TWO, head_norms=True)

FAMILIES = {
    "gemma2": llama.family("gemma2", TWO, read_gemma2, classes("Gemma2"), NORMS),
    "gemma3_text": llama.family("gemma3_text", THREE, read_gemma3, ARCHITECTURES, NORMS),
}
