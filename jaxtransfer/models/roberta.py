"""RoBERTa (Liu et al. 2019, arXiv:1907.11692) and XLM-RoBERTa (Conneau et al. 2020, arXiv:1911.02116)."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from jaxtransfer.models import encoder
from jaxtransfer.models.bert import FIELDS, export_architecture, trunk_names
from jaxtransfer.models.encoder import EncoderConfig, Variant
from jaxtransfer.models.names import Drop, Entry, NameTable, linear, norm
from jaxtransfer.models.registry import Family, read_fields, with_head
from jaxtransfer.types import Head, Model

VARIANT = Variant(
    positions_skip_padding=True, pooled=False, dense_activation="tanh", drop_before_dense=True, lm_activation="gelu"
)

HEADS: Mapping[str, str | None] = {
    "Model": None,
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "masked-lm",
}

DROPS = (
    Drop(r"embeddings\.(position_ids|token_type_ids)", "a buffer that the model computes itself"),
    Drop(r"lm_head\.decoder\.(weight|bias)", "a stored copy of a tied parameter"),
    Drop(r"pooler\.dense\.(weight|bias)", "a pooler that this head does not use"),
    Drop(r"lm_head\.(bias|(dense|layer_norm)\.(weight|bias))", "the masked-language head"),
    Drop(r"(classifier(\.dense|\.out_proj)?|qa_outputs)\.(weight|bias)", "the head of another task"),
)


def head_names(head: Head | None, *, tied: bool) -> tuple[Entry, ...]:
    """The rows of RoBERTa's heads."""
    if head is None:
        return ()
    if head.kind == "masked-lm":
        return (
            *linear("head/dense", "lm_head.dense"),
            *norm("head/norm", "lm_head.layer_norm"),
            Entry("head/bias", "lm_head.bias" if tied else "lm_head.decoder.bias"),
            *linear("head/decoder", "lm_head.decoder", bias=False),
        )
    if head.kind == "sequence-classification":
        return *linear("head/dense", "classifier.dense"), *linear("head/out", "classifier.out_proj")
    return linear("head/out", "qa_outputs" if head.kind == "question-answering" else "classifier")


def names(model: Model) -> NameTable:
    """RoBERTa's name table."""
    tied = model.config.tie_word_embeddings
    untied_lm = not tied and model.head is not None and model.head.kind == "masked-lm"
    copies = (Entry("head/bias", "lm_head.bias"),) if untied_lm else ()
    return NameTable((*trunk_names(), *head_names(model.head, tied=tied)), DROPS, "roberta.", copies)


def _family(name: str, prefix: str) -> Family:
    architectures = {prefix + suffix: kind for suffix, kind in HEADS.items()}

    def build(
        raw: Mapping[str, Any], head: Head | None, *, pooler: bool | None = None, ignore: Collection[str] = ()
    ) -> Model:
        config = read_fields({"pad_token_id": 1, **raw}, EncoderConfig, FIELDS, ignore)
        return encoder.build(name, config, VARIANT, head, pooler=pooler is not False)

    def export_config(model: Model, raw: Mapping[str, Any]) -> dict[str, Any]:
        out = with_head(raw, model.head, export_architecture(model.head, architectures))
        changed = {field: getattr(model.config, field) for field in ("tie_word_embeddings", "vocab_size")}
        return {**out, "model_type": name, **changed}

    rehead = partial(encoder.rehead, name, VARIANT)
    return Family(name, architectures, build, rehead, names, export_config, encoder.TENSOR_RULES)


FAMILIES = {"roberta": _family("roberta", "Roberta"), "xlm-roberta": _family("xlm-roberta", "XLMRoberta")}
