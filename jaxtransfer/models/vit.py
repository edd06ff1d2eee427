"""ViT (Dosovitskiy et al. 2020, arXiv:2010.11929), DeiT (arXiv:2012.12877) and DINOv2 (arXiv:2304.07193).

DeiT adds a distillation token; DINOv2 scales its layers, may have a SwiGLU, and takes images of every size.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from jaxtransfer.models.bert import export_architecture
from jaxtransfer.models.names import Drop, Entry, NameTable, conv, linear, norm
from jaxtransfer.models.registry import ConfigFieldError, Family, read_fields, with_head
from jaxtransfer.models.stages import stages_of
from jaxtransfer.models.vision import (
    CLASSIFIER,
    DISTILLED,
    TENSOR_RULES,
    Block,
    ClassifierHead,
    Embed,
    Norm,
    Pooler,
    Variant,
    ViTConfig,
)
from jaxtransfer.types import Head, Model, Stage

OUTPUTS = {"hidden": "last_hidden_state"} | {
    name: name for name in ("pooler_output", "logits", "cls_logits", "distillation_logits")
}


VARIANTS = {
    "vit": Variant(),
    "deit": Variant(tokens=2),
    "dinov2": Variant(dino=True, unread=("intermediate_size", "pooler_output_size", "pooler_act")),
}


def head_stages(name: str, c: ViTConfig, v: Variant, head: Head | None) -> Sequence[Stage]:
    """The head's stage.

    Raises:
      ValueError: the family has no such head, it pools in another way, or has no labels.
    """
    if head is None or head.stages:
        return () if head is None else head.stages
    distilled = head.kind == DISTILLED and v.tokens == 2 and head.pooling is None
    if not distilled and (head.kind != CLASSIFIER or head.pooling not in (None, "mean")):
        raise ValueError(
            f"{name} has no head of kind {head.kind!r} with pooling {head.pooling!r}; it has {CLASSIFIER} with "
            f"None or 'mean'{f' and {DISTILLED} with None' if v.tokens == 2 else ''}, or give the head's own stages"
        )
    if not head.labels:
        raise ValueError(f"a {head.kind} head needs labels")
    writes = ("logits", "cls_logits", "distillation_logits") if distilled else ("logits",)
    return stages_of(["head"], partial(ClassifierHead, c, v, head), ClassifierHead.__call__, writes=writes)


def assemble(name: str, c: ViTConfig, head: Head | None, *, pooler: bool) -> Model:
    """The model: ``embed``, ``blocks/0`` ..., ``norm``, ``pooler`` where there is one, ``head`` where there is one."""
    v, depth = VARIANTS[name], c.num_hidden_layers
    if v.dino and c.grid[0] != c.grid[1]:
        raise ConfigFieldError(f"config field image_size={c.image_size}: the positions of {name} must form a square")
    rates = (
        {"drop_path": [c.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]} if c.drop_path_rate else None
    )
    blocks = [f"blocks/{i}" for i in range(depth)]
    slots = {"adapter": {"attention": c.hidden_size, "mlp": c.hidden_size}}
    last = partial(Norm, c.hidden_size, eps=c.layer_norm_eps)
    stages = [
        *stages_of(["embed"], partial(Embed, c, v), Embed.__call__),
        *stages_of(blocks, partial(Block, c, v), Block.__call__, constants=rates, slots=slots),
    ]
    if v.dino:
        stages += stages_of(["norm"], lambda rngs: last(), Norm.pooled, writes=("hidden", "pooler_output"))
    else:
        stages += stages_of(["norm"], lambda rngs: last(), Norm.plain)
    if pooler and head is None and not v.dino:
        stages += stages_of(["pooler"], partial(Pooler, c), Pooler.__call__, writes=("pooler_output",))
    return Model(name, c, (*stages, *head_stages(name, c, v, head)), OUTPUTS, head)


def build(
    name: str, raw: Mapping[str, Any], head: Head | None, *, pooler: bool | None = None, ignore: Collection[str] = ()
) -> Model:
    """A vision transformer from its raw configuration; a bare ViT or DeiT has a pooler unless ``pooler`` is False."""
    v = VARIANTS[name]
    sizes = {field: pair(raw[field]) for field in ("image_size", "patch_size") if field in raw}
    raw = {"layer_norm_eps": 1e-6 if v.dino else 1e-12, **raw, **sizes}
    c = read_fields(raw, ViTConfig, dict.fromkeys(v.unread), ignore, harmless=HARMLESS)
    if not v.dino and c.intermediate_size is None:
        raise ConfigFieldError("config lacks intermediate_size")
    return assemble(name, c, head, pooler=pooler is not False)


def pair(size: Any) -> Any:
    """A size of the configuration, one number or two, as two."""
    return [size, size] if type(size) is int else size


def rehead(model: Model, head: Head | None) -> Model:
    """The same trunk with another head, or bare; a bare trunk keeps the pooler that it has."""
    return assemble(model.family, model.config, head, pooler=any(stage.name == "pooler" for stage in model.stages))


def names(model: Model) -> NameTable:
    """Hugging Face's names."""
    v, block, layer = VARIANTS[model.family], "blocks/{i}", "encoder.layer.{i}"
    inner = ("mlp.weights_in", "mlp.weights_out") if model.config.use_swiglu_ffn else ("mlp.fc1", "mlp.fc2")
    norms, mlp = ("norm1", "norm2"), inner
    if not v.dino:
        norms, mlp = ("layernorm_before", "layernorm_after"), ("intermediate.dense", "output.dense")
    distilled = model.head is not None and model.head.kind == DISTILLED
    rows = (
        *conv("embed/patch", "embeddings.patch_embeddings.projection"),
        Entry("embed/cls", "embeddings.cls_token"),
        Entry("embed/distillation", "embeddings.distillation_token"),
        *((Entry("embed/mask", "embeddings.mask_token"),) if v.dino else ()),
        Entry("embed/position", "embeddings.position_embeddings"),
        *norm(f"{block}/attention/norm", f"{layer}.{norms[0]}"),
        *linear(f"{block}/attention/query", f"{layer}.attention.attention.query"),
        *linear(f"{block}/attention/key", f"{layer}.attention.attention.key"),
        *linear(f"{block}/attention/value", f"{layer}.attention.attention.value"),
        *linear(f"{block}/attention/output", f"{layer}.attention.output.dense"),
        Entry(f"{block}/attention/scale", f"{layer}.layer_scale1.lambda1"),
        *norm(f"{block}/mlp/norm", f"{layer}.{norms[1]}"),
        *linear(f"{block}/mlp/up", f"{layer}.{mlp[0]}"),
        *linear(f"{block}/mlp/down", f"{layer}.{mlp[1]}"),
        Entry(f"{block}/mlp/scale", f"{layer}.layer_scale2.lambda1"),
        *norm("norm", "layernorm"),
        *linear("pooler/dense", "pooler.dense"),
        *linear("head/out", "cls_classifier" if distilled else "classifier"),
        *linear("head/distillation", "distillation_classifier"),
    )
    return NameTable(rows, DROPS, f"{model.family}.")


HARMLESS = "encoder_stride apply_layernorm reshape_hidden_states out_features out_indices stage_names".split()
"""Of the decoder of masked-image pre-training, and of transformers' backbones."""

DROPS = (
    Drop(r"embeddings\.mask_token", "the mask token of masked-image pre-training"),
    Drop(r"decoder\.0\.(weight|bias)", "the decoder of masked-image pre-training"),
    Drop(r"pooler\.dense\.(weight|bias)", "a pooler that this head does not use"),
    Drop(r"((cls_|distillation_)?classifier)\.(weight|bias)", "the head of another task"),
)


def export_config(model: Model, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an exported vision transformer; a square size that was one number stays one."""
    c = model.config
    out = with_head(raw, model.head, export_architecture(model.head, FAMILIES[model.family].architectures))
    for name in ("image_size", "patch_size"):
        down, across = getattr(c, name)
        out[name] = down if down == across else [down, across]
    return {**out, "model_type": model.family, "num_channels": c.num_channels}


ARCHITECTURES: Mapping[str, Mapping[str, str | None]] = {
    "vit": {"ViTModel": None, "ViTForImageClassification": CLASSIFIER},
    "deit": {
        "DeiTModel": None,
        "DeiTForImageClassification": CLASSIFIER,
        "DeiTForImageClassificationWithTeacher": DISTILLED,
    },
    "dinov2": {"Dinov2Model": None, "Dinov2ForImageClassification": CLASSIFIER},
}
FAMILIES = {
    name: Family(name, classes, partial(build, name), rehead, names, export_config, TENSOR_RULES)
    for name, classes in ARCHITECTURES.items()
}
