"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108)."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from jaxtransfer.models import encoder
from jaxtransfer.models.bert import export_architecture
from jaxtransfer.models.encoder import EncoderConfig, Variant
from jaxtransfer.models.names import Drop, Entry, NameTable, embedding, linear, norm
from jaxtransfer.models.registry import Family, read_fields, with_head
from jaxtransfer.types import Head, Model

VARIANT = Variant(token_types=False, attention_dropout=False, pooled=False, dense_activation="relu")

ARCHITECTURES: Mapping[str, str | None] = {
    "DistilBertModel": None,
    "DistilBertForSequenceClassification": "sequence-classification",
    "DistilBertForTokenClassification": "token-classification",
    "DistilBertForQuestionAnswering": "question-answering",
    "DistilBertForMaskedLM": "masked-lm",
}

FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": None,
    "layer_norm_eps": None,
    "type_vocab_size": None,
}

DROPS = (
    Drop(r"embeddings\.position_ids", "a buffer that the model computes itself"),
    Drop(r"vocab_projector\.weight", "a stored copy of a tied parameter"),
    Drop(r"vocab_(projector\.bias|(transform|layer_norm)\.(weight|bias))", "the masked-language head"),
    Drop(r"(pre_classifier|classifier|qa_outputs)\.(weight|bias)", "the head of another task"),
)


def names(model: Model) -> NameTable:
    """DistilBERT's name table."""
    block, layer = "blocks/{i}", "transformer.layer.{i}"
    trunk = (
        *embedding("embed/word", "embeddings.word_embeddings"),
        *embedding("embed/position", "embeddings.position_embeddings"),
        *norm("embed/norm", "embeddings.LayerNorm"),
        *linear(f"{block}/attention/query", f"{layer}.attention.q_lin"),
        *linear(f"{block}/attention/key", f"{layer}.attention.k_lin"),
        *linear(f"{block}/attention/value", f"{layer}.attention.v_lin"),
        *linear(f"{block}/attention/output", f"{layer}.attention.out_lin"),
        *norm(f"{block}/attention/norm", f"{layer}.sa_layer_norm"),
        *linear(f"{block}/mlp/up", f"{layer}.ffn.lin1"),
        *linear(f"{block}/mlp/down", f"{layer}.ffn.lin2"),
        *norm(f"{block}/mlp/norm", f"{layer}.output_layer_norm"),
    )
    return NameTable((*trunk, *_head_names(model.head)), DROPS, "distilbert.")


def _head_names(head: Head | None) -> tuple[Entry, ...]:
    if head is None:
        return ()
    if head.kind == "masked-lm":
        return (
            *linear("head/dense", "vocab_transform"),
            *norm("head/norm", "vocab_layer_norm"),
            Entry("head/bias", "vocab_projector.bias"),
            *linear("head/decoder", "vocab_projector", bias=False),
        )
    if head.kind == "sequence-classification":
        return *linear("head/dense", "pre_classifier"), *linear("head/out", "classifier")
    return linear("head/out", "qa_outputs" if head.kind == "question-answering" else "classifier")


def build(
    raw: Mapping[str, Any], head: Head | None, *, pooler: bool | None = None, ignore: Collection[str] = ()
) -> Model:
    """DistilBERT from its raw configuration; it never has a pooler."""
    config = read_fields({"seq_classif_dropout": 0.2, "qa_dropout": 0.1, **raw}, EncoderConfig, FIELDS, ignore)
    return encoder.build("distilbert", config, VARIANT, head, pooler=False)


rehead = partial(encoder.rehead, "distilbert", VARIANT)


def export_config(model: Model, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an exported DistilBERT."""
    out = with_head(raw, model.head, export_architecture(model.head, ARCHITECTURES))
    changed = {field: getattr(model.config, field) for field in ("tie_word_embeddings", "vocab_size")}
    return {**out, "model_type": "distilbert", **changed}


FAMILIES = {
    "distilbert": Family("distilbert", ARCHITECTURES, build, rehead, names, export_config, encoder.TENSOR_RULES),
}
