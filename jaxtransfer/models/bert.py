"""BERT (Devlin et al. 2019, arXiv:1810.04805)."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from jaxtransfer.models import encoder
from jaxtransfer.models.encoder import EncoderConfig, Variant
from jaxtransfer.models.names import Drop, Entry, NameTable, embedding, linear, norm
from jaxtransfer.models.registry import ConfigFieldError, Family, read_fields, with_head
from jaxtransfer.types import Head, Model

VARIANT = Variant()

FIELDS = {"qa_dropout": None, "seq_classif_dropout": None}
"""Fields of the record under another name in the file, or under none: not read there, so refused."""

ARCHITECTURES: Mapping[str, str | None] = {
    "BertModel": None,
    "BertForSequenceClassification": "sequence-classification",
    "BertForTokenClassification": "token-classification",
    "BertForQuestionAnswering": "question-answering",
    "BertForMaskedLM": "masked-lm",
    "BertForPreTraining": "masked-lm",
}


def trunk_names() -> tuple[Entry, ...]:
    """The rows that BERT and RoBERTa share."""
    block = "blocks/{i}"
    layer = "encoder.layer.{i}"
    return (
        *embedding("embed/word", "embeddings.word_embeddings"),
        *embedding("embed/position", "embeddings.position_embeddings"),
        *embedding("embed/type", "embeddings.token_type_embeddings"),
        *norm("embed/norm", "embeddings.LayerNorm"),
        *linear(f"{block}/attention/query", f"{layer}.attention.self.query"),
        *linear(f"{block}/attention/key", f"{layer}.attention.self.key"),
        *linear(f"{block}/attention/value", f"{layer}.attention.self.value"),
        *linear(f"{block}/attention/output", f"{layer}.attention.output.dense"),
        *norm(f"{block}/attention/norm", f"{layer}.attention.output.LayerNorm"),
        *linear(f"{block}/mlp/up", f"{layer}.intermediate.dense"),
        *linear(f"{block}/mlp/down", f"{layer}.output.dense"),
        *norm(f"{block}/mlp/norm", f"{layer}.output.LayerNorm"),
        *linear("pooler/dense", "pooler.dense"),
    )


def head_names(head: Head | None, *, tied: bool) -> tuple[Entry, ...]:
    """The rows of BERT's heads."""
    if head is None:
        return ()
    if head.kind == "masked-lm":
        bias = "cls.predictions.bias" if tied else "cls.predictions.decoder.bias"
        return (
            *linear("head/dense", "cls.predictions.transform.dense"),
            *norm("head/norm", "cls.predictions.transform.LayerNorm"),
            Entry("head/bias", bias),
            *linear("head/decoder", "cls.predictions.decoder", bias=False),
        )
    return linear("head/out", "qa_outputs" if head.kind == "question-answering" else "classifier")


DROPS = (
    Drop(r"embeddings\.(position_ids|token_type_ids)", "a buffer that the model computes itself"),
    Drop(r"cls\.predictions\.decoder\.(weight|bias)", "a stored copy of a tied parameter"),
    Drop(r"cls\.seq_relationship\.(weight|bias)", "the next-sentence head of pre-training"),
    Drop(r"pooler\.dense\.(weight|bias)", "a pooler that this head does not use"),
    Drop(r"cls\.predictions\.(bias|transform\.(dense|LayerNorm)\.(weight|bias))", "the masked-language head"),
    Drop(r"(classifier|qa_outputs)\.(weight|bias)", "the head of another task"),
)


def names(model: Model) -> NameTable:
    """BERT's name table."""
    tied = model.config.tie_word_embeddings
    untied_lm = not tied and model.head is not None and model.head.kind == "masked-lm"
    copies = (Entry("head/bias", "cls.predictions.bias"),) if untied_lm else ()
    return NameTable((*trunk_names(), *head_names(model.head, tied=tied)), DROPS, "bert.", copies)


def build(
    raw: Mapping[str, Any], head: Head | None, *, pooler: bool | None = None, ignore: Collection[str] = ()
) -> Model:
    """BERT from its raw configuration; a bare trunk has a pooler unless ``pooler`` is False."""
    config = read_fields(raw, EncoderConfig, FIELDS, ignore)
    return encoder.build("bert", config, VARIANT, head, pooler=pooler is not False)


rehead = partial(encoder.rehead, "bert", VARIANT)


def export_architecture(head: Head | None, architectures: Mapping[str, str | None]) -> str:
    """The Hugging Face class that a model with this head is exported for.

    Raises:
      ConfigFieldError: no class computes the same function.
    """
    if head is None:
        return next(name for name, kind in architectures.items() if kind is None)
    if head.pooling is not None or head.stages:
        what = f"pooling={head.pooling!r}" if head.pooling else "stages of its own"
        raise ConfigFieldError(
            f"a {head.kind} head with {what} has no Hugging Face class; export with format='orbax', or train the "
            "family's own head (pooling=None)"
        )
    if head.kind not in architectures.values():
        classes = ", ".join(architectures)
        raise ConfigFieldError(f"a {head.kind} head has no class among {classes}; export with format='orbax'")
    return next(name for name, kind in architectures.items() if kind == head.kind)


def export_config(model: Model, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an exported BERT."""
    out = with_head(raw, model.head, export_architecture(model.head, ARCHITECTURES))
    changed = {field: getattr(model.config, field) for field in ("tie_word_embeddings", "vocab_size")}
    return {**out, "model_type": "bert", **changed}


FAMILIES = {"bert": Family("bert", ARCHITECTURES, build, rehead, names, export_config, encoder.TENSOR_RULES)}
