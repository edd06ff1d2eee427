"""The BERT encoder family's shared parts: embeddings, post-norm blocks, pooler and heads.

``bert``, ``roberta`` and ``distilbert`` differ in position ids, in where dropout falls and in their heads; their files
say how, by one :class:`Variant` and a name table each.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxtransfer.models import slots
from jaxtransfer.models.attention import attention
from jaxtransfer.models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear, dropout, split
from jaxtransfer.models.projection import PROJECTION, Projection
from jaxtransfer.models.registry import ConfigFieldError
from jaxtransfer.models.stages import stages_of
from jaxtransfer.tree import weights
from jaxtransfer.types import Carry, Head, Model, Stage

OUTPUTS = {
    "hidden": "last_hidden_state",
    "pooler_output": "pooler_output",
    "logits": "logits",
    "start_logits": "start_logits",
    "end_logits": "end_logits",
}


PLACES = {"adapter": ("attention", "mlp"), "prefix": ("key", "value")}
"""The slots of a block."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What an encoder reads of its configuration, by BERT's names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    classifier_dropout: float | None = None
    seq_classif_dropout: float | None = None
    qa_dropout: float = 0.0
    tie_word_embeddings: bool = True

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            name = "hidden_act (DistilBERT's activation)"
            raise ConfigFieldError(f"config field {name}: {self.hidden_act!r} is not one of {sorted(ACTIVATIONS)}")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ConfigFieldError(
                f"config field hidden_size={self.hidden_size} does not divide by num_attention_heads="
                f"{self.num_attention_heads}"
            )

    @property
    def head_dropout(self) -> float:
        """Dropout before a classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a family differs from BERT.

    Attributes:
      positions_skip_padding: positions count unpadded tokens from ``pad_token_id + 1`` on (RoBERTa).
      token_types: there is an embedding of segments.
      attention_dropout: dropout follows the attention's output projection.
      pooled: sequence classification starts from the pooler's output; otherwise from the first token through a dense.
      dense_activation: of that dense; ``drop_before_dense``: dropout stands before it as well.
      lm_activation: of the masked-LM head; None for ``hidden_act``.
    """

    positions_skip_padding: bool = False
    token_types: bool = True
    attention_dropout: bool = True
    pooled: bool = True
    dense_activation: str = "tanh"
    drop_before_dense: bool = False
    lm_activation: str | None = None


class Embed(nnx.Module):
    """Word, position and segment embeddings, normalised: (B, T) -> (B, T, d)."""

    def __init__(self, c: EncoderConfig, v: Variant, rngs: nnx.Rngs):
        std = c.initializer_range
        self.word = Embedding(c.vocab_size, c.hidden_size, std=std, rngs=rngs)
        self.position = Embedding(c.max_position_embeddings, c.hidden_size, std=std, rngs=rngs)
        self.type = Embedding(c.type_vocab_size, c.hidden_size, std=std, rngs=rngs) if v.token_types else None
        self.norm = LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.c, self.v = c, v

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        ids = carry["input_ids"]
        mask = carry.get("attention_mask", jnp.ones_like(ids)).astype(bool)
        lead = slots.lead(carry)
        x = slots.prompted(self.word(ids), carry) + self.position(self.positions(ids, lead))
        if self.type is not None:
            types = carry.get("token_type_ids", jnp.zeros_like(ids))
            x = x + self.type(jnp.pad(types, ((0, 0), (lead, 0))))
        x = dropout(self.norm(x), self.c.hidden_dropout_prob, key)
        return {**slots.parted(x, ids.shape[1]), "mask": mask}

    def positions(self, ids: jax.Array, lead: int) -> jax.Array:
        """Of a prompt of length ``lead`` and of the tokens behind it."""
        first, count = (self.c.pad_token_id + 1 if self.v.positions_skip_padding else 0), lead + ids.shape[1]
        if count + first > self.c.max_position_embeddings:
            what = f"a prompt of {lead} and " if lead else ""
            raise ValueError(
                f"{what}input of length {ids.shape[1]} does not fit: the model has "
                f"{self.c.max_position_embeddings - first} positions; set max_length"
            )
        if not self.v.positions_skip_padding:
            return jnp.arange(count)[None]
        real = jnp.pad(ids != self.c.pad_token_id, ((0, 0), (lead, 0)), constant_values=True).astype(ids.dtype)
        return jnp.cumsum(real, axis=-1, dtype=ids.dtype) * real + self.c.pad_token_id


class Attention(nnx.Module):
    """Multi-head self-attention, its residual and its normalisation."""

    def __init__(self, c: EncoderConfig, v: Variant, rngs: nnx.Rngs):
        d, std = c.hidden_size, c.initializer_range
        self.query = Linear(d, d, std=std, rngs=rngs)
        self.key = Linear(d, d, std=std, rngs=rngs)
        self.value = Linear(d, d, std=std, rngs=rngs)
        self.output = Linear(d, d, std=std, rngs=rngs)
        self.norm = LayerNorm(d, eps=c.layer_norm_eps)
        self.c, self.v = c, v

    def __call__(self, carry: Carry, key: jax.Array | None) -> jax.Array:
        kq, kk, kv, ka, ko, kd = split(key, 6)
        c, x = self.c, carry["hidden"]
        q, k, v = self.query(x, kq), self.key(x, kk), self.value(x, kv)
        k, v, mask = slots.prefixed(carry, k, v, carry["mask"])
        y = attention(q, k, v, mask, heads=c.num_attention_heads, rate=c.attention_probs_dropout_prob, key=ka)
        y = self.output(y, ko)
        if self.v.attention_dropout:
            y = dropout(y, c.hidden_dropout_prob, kd)
        return self.norm(x + slots.adapted(y, carry, "attention"))


class MLP(nnx.Module):
    """Two-layer perceptron, its residual and its normalisation."""

    def __init__(self, c: EncoderConfig, rngs: nnx.Rngs):
        self.up = Linear(c.hidden_size, c.intermediate_size, std=c.initializer_range, rngs=rngs)
        self.down = Linear(c.intermediate_size, c.hidden_size, std=c.initializer_range, rngs=rngs)
        self.norm = LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.c = c

    def __call__(self, carry: Carry, key: jax.Array | None) -> jax.Array:
        ku, kd, kr = split(key, 3)
        x = carry["hidden"]
        y = self.down(ACTIVATIONS[self.c.hidden_act](self.up(x, ku)), kd)
        return self.norm(x + slots.adapted(dropout(y, self.c.hidden_dropout_prob, kr), carry, "mlp"))


class Block(nnx.Module):
    """One encoder layer, post-norm (Vaswani et al. 2017): (B, T, d) -> (B, T, d)."""

    def __init__(self, c: EncoderConfig, v: Variant, rngs: nnx.Rngs):
        self.attention, self.mlp = Attention(c, v, rngs), MLP(c, rngs)

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        ka, km = split(key, 2)
        return {"hidden": self.mlp({**carry, "hidden": self.attention(carry, ka)}, km)}


class Pooler(nnx.Module):
    """``tanh(W h_0 + b)`` of the first token."""

    def __init__(self, c: EncoderConfig, rngs: nnx.Rngs):
        self.dense = Linear(c.hidden_size, c.hidden_size, std=c.initializer_range, rngs=rngs)

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        return {"pooler_output": jnp.tanh(self.dense(slots.first(carry), key))}


class SequenceHead(nnx.Module):
    """Logits of a whole sequence: (B, labels)."""

    def __init__(self, c: EncoderConfig, v: Variant, head: Head, rngs: nnx.Rngs):
        d, std = c.hidden_size, c.initializer_range
        self.dense = None if v.pooled or head.pooling == "mean" else Linear(d, d, std=std, rngs=rngs)
        self.out = Linear(d, len(head.labels), std=std, rngs=rngs)
        self.v, self.head = v, head
        self.rate = c.head_dropout if c.seq_classif_dropout is None else c.seq_classif_dropout

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        before, dense, after, out = split(key, 4)
        if self.head.pooling == "mean":
            x = mean_pool(carry["hidden"], carry["mask"])
        elif self.v.pooled:
            x = carry["pooler_output"]
        else:
            x = slots.first(carry)
        if self.dense is not None:
            x = dropout(x, self.rate, before) if self.v.drop_before_dense else x
            x = ACTIVATIONS[self.v.dense_activation](self.dense(x, dense))
        return {"logits": self.out(dropout(x, self.rate, after), out)}


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean over unmasked positions: (B, T, d), (B, T) -> (B, d)."""
    m = mask[..., None].astype(hidden.dtype)
    return (hidden * m).sum(1) / jnp.maximum(m.sum(1), jnp.ones((), hidden.dtype))


class TokenHead(nnx.Module):
    """Logits of each token, (B, T, labels); for question answering split into start and end, (B, T) each."""

    def __init__(self, c: EncoderConfig, outputs: int, rate: float, rngs: nnx.Rngs):
        self.out = Linear(c.hidden_size, outputs, std=c.initializer_range, rngs=rngs)
        self.rate = rate

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        kd, ko = split(key, 2)
        return {"logits": self.out(dropout(carry["hidden"], self.rate, kd), ko)}

    def span(self, carry: Carry, key: jax.Array | None) -> Carry:
        logits = self(carry, key)["logits"]
        return {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}


class LMHead(nnx.Module):
    """``dense, activation, norm, decoder + bias`` on each token: (B, T, vocabulary); if tied, reads the embedding."""

    def __init__(self, c: EncoderConfig, v: Variant, rngs: nnx.Rngs):
        d, std = c.hidden_size, c.initializer_range
        self.dense = Linear(d, d, std=std, rngs=rngs)
        self.norm = LayerNorm(d, eps=c.layer_norm_eps)
        self.decoder = None if c.tie_word_embeddings else Linear(d, c.vocab_size, std=std, bias=False, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(c.vocab_size))
        self.activation = v.lm_activation or c.hidden_act

    def __call__(self, carry: Carry, key: jax.Array | None, tied: Any = None) -> Carry:
        kd, ko = split(key, 2)
        x = self.norm(ACTIVATIONS[self.activation](self.dense(carry["hidden"], kd)))
        kernel = weights.transpose(tied) if self.decoder is None else self.decoder.kernel.get_value()
        projection = Projection(x, kernel, self.bias.get_value(), ko)
        return {"logits": projection.logits(), PROJECTION: projection}


def bias_path(model: Model, kernel: str) -> str:
    """Where the bias of a kernel lies: beside it, but for the decoder of `LMHead`, which has it tied or not."""
    head = model.head if isinstance(model.config, EncoderConfig) else None
    if kernel == "head/decoder/kernel" and head is not None and head.kind == "masked-lm" and not head.stages:
        return "head/bias"
    return kernel.rpartition("/")[0] + "/bias"


def build(name: str, c: EncoderConfig, v: Variant, head: Head | None, *, pooler: bool) -> Model:
    """The model: ``embed``, ``blocks/0`` ..., ``pooler`` where there is one, ``head`` where there is one."""
    if head is not None and head.kind == "sequence-classification":
        pooler = v.pooled and head.pooling is None
    elif head is not None:
        pooler = False
    width, call, moving = c.hidden_size, slots.with_prompt(Block.__call__), ("hidden", slots.PROMPTED)
    before, inside = {"prompt": {"embedding": width}}, {name: dict.fromkeys(has, width) for name, has in PLACES.items()}
    stages = [
        *stages_of(["embed"], lambda rngs: Embed(c, v, rngs), Embed.__call__, writes=(*moving, "mask"), slots=before),
        *stages_of(block_names(c), lambda rngs: Block(c, v, rngs), call, writes=moving, slots=inside),
    ]
    if pooler:
        stages += stages_of(["pooler"], lambda rngs: Pooler(c, rngs), Pooler.__call__, writes=("pooler_output",))
    if head is not None:
        stages += head.stages or head_stages(name, c, v, head)
    return Model(name, c, tuple(stages), OUTPUTS, head)


def rehead(name: str, v: Variant, model: Model, head: Head | None) -> Model:
    """The same trunk with another head, or bare; a bare trunk keeps the pooler that it has."""
    has_pooler = any(stage.name == "pooler" for stage in model.stages)
    return build(name, model.config, v, head, pooler=has_pooler)


def block_names(c: EncoderConfig) -> list[str]:
    """``blocks/0``, ``blocks/1``, ..."""
    return [f"blocks/{i}" for i in range(c.num_hidden_layers)]


def head_stages(name: str, c: EncoderConfig, v: Variant, head: Head) -> Sequence[Stage]:
    """The stage of a built-in head."""
    names, out = ["head"], ("logits",)
    pooled = head.kind == "sequence-classification"
    if head.pooling not in ((None, "mean") if pooled else (None,)):
        raise ValueError(f"pooling {head.pooling!r}: a {head.kind} head takes {'mean or ' if pooled else ''}None")
    if head.kind.endswith("-classification") and not head.labels:
        raise ValueError(f"a {head.kind} head needs labels")
    if head.kind == "sequence-classification":
        return stages_of(names, lambda rngs: SequenceHead(c, v, head, rngs), SequenceHead.__call__, writes=out)
    if head.kind == "token-classification":
        size = len(head.labels)
        return stages_of(names, lambda rngs: TokenHead(c, size, c.head_dropout, rngs), TokenHead.__call__, writes=out)
    if head.kind == "question-answering":
        spans = ("start_logits", "end_logits")
        return stages_of(names, lambda rngs: TokenHead(c, 2, c.qa_dropout, rngs), TokenHead.span, writes=spans)
    if head.kind == "masked-lm":
        reads = ("embed/word/embedding",) if c.tie_word_embeddings else ()
        written = (*out, PROJECTION)
        return stages_of(names, lambda rngs: LMHead(c, v, rngs), LMHead.__call__, writes=written, reads=reads)
    kinds = "sequence-classification, token-classification, question-answering, masked-lm"
    raise ValueError(f"{name} has no head of kind {head.kind!r}; it has {kinds}, or give the head's own stages")


TENSOR_RULES = (
    (r"blocks/\d+/attention/(query|key|value)/kernel", P("fsdp", "tensor")),
    (r"blocks/\d+/attention/(query|key|value)/bias", P("tensor")),
    (r"blocks/\d+/attention/output/kernel", P("tensor", "fsdp")),
    (r"blocks/\d+/mlp/up/kernel", P("fsdp", "tensor")),
    (r"blocks/\d+/mlp/up/bias", P("tensor")),
    (r"blocks/\d+/mlp/down/kernel", P("tensor", "fsdp")),
    (r"embed/word/embedding", P(None, ("fsdp", "tensor"))),
)
"""Megatron's split of a block over ``tensor``, the other axis over ``fsdp``."""
