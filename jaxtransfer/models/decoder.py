"""What decoders share: the configuration record, heads, and how a model is put together.

A family's file adds its embedding stage, its block and its name table.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxtransfer.models.bert import export_architecture
from jaxtransfer.models.causal import empty_cache
from jaxtransfer.models.encoder import mean_pool
from jaxtransfer.models.layers import ACTIVATIONS, Linear, dropout, split
from jaxtransfer.models.names import Drop, Entry, linear
from jaxtransfer.models.projection import PROJECTION, Projection
from jaxtransfer.models.registry import MUST, ConfigFieldError, read_fields, with_head
from jaxtransfer.models.rope import Rope
from jaxtransfer.models.slots import PROMPTED, with_prompt
from jaxtransfer.models.stages import stages_of
from jaxtransfer.tree import weights
from jaxtransfer.tree.rules import Rule
from jaxtransfer.types import Carry, Head, Model, Stage

OUTPUTS = {"hidden": "last_hidden_state", "logits": "logits"}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What decoders read of their configurations, by Llama's names where it has one."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str
    norm_eps: float
    tie_word_embeddings: bool
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    classifier_dropout: float | None = None
    attention_dropout: float = 0.0
    embed_dropout: float = 0.0
    residual_dropout: float = 0.0
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = True
    max_window_layers: int = 0
    layer_types: tuple[str, ...] | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rope: tuple[Rope, ...] = ()

    @property
    def width(self) -> int:
        """The width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def windows(self) -> tuple[int, ...]:
        """How many slots back each layer attends, itself included; empty where no layer is limited."""
        if not self.layer_types or SLIDING not in self.layer_types:
            return ()
        near, far = self.sliding_window or 0, self.max_position_embeddings
        return tuple(near if kind == SLIDING else far for kind in self.layer_types)


_POSITIVE = """
    vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings
    num_key_value_heads head_dim""".split()
_COMMON = """
    vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings hidden_act
    norm_eps tie_word_embeddings initializer_range pad_token_id classifier_dropout attention_dropout"""


def held(own: str, **renamed: str) -> dict[str, str | None]:
    """The aliases of a family for `registry.read_fields`: the common fields, its own, and those under another name."""
    kept = {*_COMMON.split(), *own.split(), *renamed}
    names = [field.name for field in dataclasses.fields(DecoderConfig)]
    return {name: renamed.get(name, name) if name in kept else None for name in names}


def read(
    raw: Mapping[str, Any],
    aliases: Mapping[str, str | None],
    ignore: Collection[str],
    *,
    harmless: Collection[str] = (),
    must: Mapping[str, Any] = MUST,
) -> DecoderConfig:
    """The record of a raw configuration, with what its numbers must satisfy checked.

    Raises:
      ConfigFieldError: as `registry.read_fields`, or numbers that do not fit each other; names the field.
    """
    c = read_fields(raw, DecoderConfig, aliases, ignore, harmless=harmless, must=must)
    names = {field: name or field for field, name in aliases.items()}
    for field in _POSITIVE:
        if (value := getattr(c, field)) is not None and value < 1:
            raise ConfigFieldError(f"config field {names[field]}: expected a positive int, found {value}")
    if c.hidden_act not in ACTIVATIONS:
        raise ConfigFieldError(
            f"config field {names['hidden_act']}: {c.hidden_act!r} is not one of {sorted(ACTIVATIONS)}"
        )
    if c.head_dim is None and c.hidden_size % c.num_attention_heads:
        raise ConfigFieldError(
            f"config field {names['hidden_size']}={c.hidden_size} does not divide by {names['num_attention_heads']}="
            f"{c.num_attention_heads}"
        )
    if c.num_attention_heads % c.kv_heads:
        raise ConfigFieldError(
            f"config field num_attention_heads={c.num_attention_heads} does not divide by num_key_value_heads="
            f"{c.num_key_value_heads}"
        )
    return c


def with_layers(c: DecoderConfig, default: Sequence[str]) -> DecoderConfig:
    """The record with a type for every layer, ``default`` where the file names none.

    Raises:
      ConfigFieldError: ``layer_types`` is not one known type a layer, or slides without a ``sliding_window``.
    """
    types = c.layer_types or tuple(default)
    if len(types) != c.num_hidden_layers:
        raise ConfigFieldError(
            f"config field layer_types has {len(types)} entries, num_hidden_layers is {c.num_hidden_layers}"
        )
    if unknown := sorted({*types} - {SLIDING, FULL}):
        raise ConfigFieldError(f"config field layer_types: {unknown[0]!r} is not one of {SLIDING!r}, {FULL!r}")
    if SLIDING in types and not c.sliding_window:
        raise ConfigFieldError(f"config field sliding_window={c.sliding_window} with {SLIDING} in layer_types")
    return dataclasses.replace(c, layer_types=types)


def with_ropes(c: DecoderConfig, *ropes: Rope) -> DecoderConfig:
    """The record with its ropes, of fully and of narrowly attending layers where they differ.

    Raises:
      ConfigFieldError: the width of a head is odd.
    """
    if c.width % 2:
        raise ConfigFieldError(f"config field head_dim={c.width}: rotary positions turn pairs of features")
    return dataclasses.replace(c, rope=ropes)


class LMHead(nnx.Module):
    """Logits of the next token, (B, T, vocabulary), capped where the model says so; if tied, by the embedding."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        width, std = c.hidden_size, c.initializer_range
        self.decoder = None if c.tie_word_embeddings else Linear(width, c.vocab_size, std=std, bias=False, rngs=rngs)
        self.cap = c.final_logit_softcapping

    def __call__(self, carry: Carry, key: jax.Array | None, tied: Any = None) -> Carry:
        kernel = weights.transpose(tied) if self.decoder is None else self.decoder.kernel.get_value()
        projection = Projection(carry["hidden"], kernel, key=key, cap=self.cap)
        return {"logits": projection.logits(), PROJECTION: projection}


class Classifier(nnx.Module):
    """Logits of a sequence, (B, labels), or of each token, (B, T, labels)."""

    def __init__(self, c: DecoderConfig, head: Head, rngs: nnx.Rngs):
        tokens = head.kind == "token-classification"
        self.out = Linear(c.hidden_size, len(head.labels), std=c.initializer_range, bias=tokens, rngs=rngs)
        self.rate = 0.1 if c.classifier_dropout is None else c.classifier_dropout
        self.pad, self.pooling = c.pad_token_id, head.pooling

    def tokens(self, carry: Carry, key: jax.Array | None) -> Carry:
        kd, ko = split(key, 2)
        return {"logits": self.out(dropout(carry["hidden"], self.rate, kd), ko)}

    def sequence(self, carry: Carry, key: jax.Array | None) -> Carry:
        """From the last token that is not padding: none that is masked, nor of the id that the model has for it."""
        ids, hidden = carry["input_ids"], carry["hidden"]
        mask = carry.get("attention_mask", jnp.ones_like(ids)).astype(bool)
        if self.pooling == "mean":
            return {"logits": self.out(mean_pool(hidden, mask), key)}
        real = mask if self.pad is None else mask & (ids != self.pad)
        last = jnp.argmax(jnp.where(real, jnp.arange(ids.shape[1])[None], 0), axis=-1)
        return {"logits": self.out(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], key)}


Build = Callable[[nnx.Rngs], nnx.Module]


def assemble(name: str, c: DecoderConfig, head: Head | None, embed: Build, block: Build, norm: Build) -> Model:
    """The model: ``embed``, ``blocks/0`` ..., ``norm``, ``head`` where there is one."""

    def run(module: Any, carry: Carry, key: jax.Array | None) -> Carry:
        return module(carry, key)

    constants: dict[str, Sequence[int]] = {"layer": range(c.num_hidden_layers)}
    if c.windows:
        constants["window"] = c.windows
    if len(c.rope) > 1:
        constants["base"] = [(FULL, SLIDING).index(kind) for kind in c.layer_types or ()]
    blocks = [f"blocks/{i}" for i in range(c.num_hidden_layers)]
    entries = ("hidden", PROMPTED, "mask", "segments", "distance", "cos", "sin", "cache")
    width, inner = c.hidden_size, c.kv_heads * c.width
    slots = {"adapter": {"attention": width, "mlp": width}, "prefix": {"key": inner, "value": inner}}
    stages = [
        *stages_of(["embed"], embed, run, writes=entries, slots={"prompt": {"embedding": width}}),
        *stages_of(
            blocks, block, with_prompt(run), writes=("hidden", PROMPTED, "cache"), constants=constants, slots=slots
        ),
        *stages_of(["norm"], norm, lambda module, carry, key: {"hidden": module(carry["hidden"])}),
    ]
    if head is not None:
        stages += head.stages or head_stages(name, c, head)

    def cache(rows: int, length: int, dtype: Any = jnp.float32) -> Carry:
        if length > c.max_position_embeddings:
            raise ValueError(f"a cache of {length} slots: the model has {c.max_position_embeddings} positions")
        return empty_cache(c.num_hidden_layers, rows, length, c.kv_heads, c.width, dtype)

    return Model(name, c, tuple(stages), OUTPUTS, head, cache=cache)


def head_stages(name: str, c: DecoderConfig, head: Head) -> Sequence[Stage]:
    """The stage of a built-in head."""
    how = {"sequence-classification": Classifier.sequence, "token-classification": Classifier.tokens}
    if head.kind != "causal-lm" and head.kind not in how:
        kinds = ", ".join(["causal-lm", *how])
        raise ValueError(f"{name} has no head of kind {head.kind!r}; it has {kinds}, or give the head's own stages")
    pooled = head.kind == "sequence-classification"
    if head.pooling not in ((None, "mean") if pooled else (None,)):
        raise ValueError(f"pooling {head.pooling!r}: a {head.kind} head takes {'mean or ' if pooled else ''}None")
    if head.kind == "causal-lm":
        reads = ("embed/word/embedding",) if c.tie_word_embeddings else ()
        writes = ("logits", PROJECTION)
        return stages_of(["head"], lambda rngs: LMHead(c, rngs), LMHead.__call__, writes=writes, reads=reads)
    if not head.labels:
        raise ValueError(f"a {head.kind} head needs labels")
    return stages_of(["head"], lambda rngs: Classifier(c, head, rngs), how[head.kind], writes=("logits",))


def head_names(model: Model, tokens: str = "score") -> tuple[Entry, ...]:
    """The rows of the heads; ``tokens`` is what the family calls its classifier of tokens."""
    if model.head is not None and model.head.kind == "causal-lm":
        return linear("head/decoder", "lm_head", bias=False)
    return linear("head/out", "score" if model.head and model.head.kind == "sequence-classification" else tokens)


def drops(model: Model, *own: Drop) -> tuple[Drop, ...]:
    """What real files hold besides."""
    tied = model.config.tie_word_embeddings
    heads = r"(score|classifier|qa_outputs)\.(weight|bias)"
    return (
        *own,
        Drop(r"lm_head\.weight", "a stored copy of a tied parameter" if tied else "the head of another task"),
        Drop(heads, "the head of another task"),
    )


def export_config(architectures: Mapping[str, str | None], model: Model, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an exported decoder.

    Raises:
      ConfigFieldError: Hugging Face has no class for this head of this family.
    """
    head = model.head
    if head is not None and not head.stages and head.kind not in architectures.values():
        raise ConfigFieldError(
            f"a {head.kind} head on {model.family} has no Hugging Face class; export with format='orbax'"
        )
    out = with_head(raw, model.head, export_architecture(model.head, architectures))
    changed = {field: getattr(model.config, field) for field in ("tie_word_embeddings", "vocab_size")}
    return {**out, "model_type": model.family, **changed}


TENSOR_RULES = (
    Rule(r"blocks/\d+/attention/(qkv|query|key|value)/kernel", P("fsdp", "tensor"), optional=True),
    Rule(r"blocks/\d+/attention/(qkv|query|key|value)/bias", P("tensor"), optional=True),
    Rule(r"blocks/\d+/attention/output/kernel", P("tensor", "fsdp"), optional=True),
    Rule(r"blocks/\d+/mlp/(gate|up)/kernel", P("fsdp", "tensor"), optional=True),
    Rule(r"blocks/\d+/mlp/(gate|up)/bias", P("tensor"), optional=True),
    Rule(r"blocks/\d+/mlp/down/kernel", P("tensor", "fsdp"), optional=True),
    Rule(r"embed/word/embedding", P(None, ("fsdp", "tensor")), optional=True),
    Rule(r"head/decoder/kernel", P("fsdp", "tensor"), optional=True),
)
"""Megatron's split of a block over ``tensor``, the other axis over ``fsdp``."""
