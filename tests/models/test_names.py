"""Name tables against the key lists of what `save_pretrained` writes, read both ways."""

import json

import pytest

from jaxtransfer.models import family
from jaxtransfer.models.api import abstract_init
from jaxtransfer.models.names import MappingError, canonical_name
from jaxtransfer.tree import flatten
from jaxtransfer.types import Head
from tests import torch_reference
from tests.models import zoo

FOLDERS = sorted(path.parent.name for path in zoo.GOLDENS.glob("*/keys.json"))
PRETRAINING = {
    "bert.pooler.dense.bias": "a pooler that this head does not use",
    "bert.pooler.dense.weight": "a pooler that this head does not use",
    "cls.seq_relationship.bias": "the next-sentence head of pre-training",
    "cls.seq_relationship.weight": "the next-sentence head of pre-training",
}


def stored(folder):
    """The raw configuration and the names and shapes of the tensors."""
    keys = json.loads((zoo.GOLDENS / folder / "keys.json").read_text())
    return zoo.raw_config(zoo.GOLDENS / folder), {name: tuple(shape) for name, shape, _ in keys}


def opened(folder, **build):
    raw, shapes = stored(folder)
    found = family(raw["model_type"])
    model = found.build(raw, zoo.stored_head(raw), **build)
    return found.names(model), shapes, {path: leaf.shape for path, leaf in flatten(abstract_init(model)).items()}


def test_every_family_and_head_has_a_key_list():
    assert set(FOLDERS) == {f"{name}-{head}" for name, head in torch_reference.combinations()}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_stored_head_takes_every_tensor_and_gives_every_name_back(folder):
    table, shapes, ours = opened(folder)
    plan = table.load_plan(shapes, list(ours))
    assert dict(plan.dropped) == (PRETRAINING if folder == "bert-pretraining" else {})
    for path, (name, how) in plan.used.items():
        assert ours[path] == (shapes[name][::-1] if how == "transpose" else shapes[name]), path
        assert how == ("transpose" if path.endswith("kernel") else "same")
    exported = table.export_names(ours, with_prefix=not folder.endswith("-model"))
    assert exported == dict(plan.used)
    assert {name for name, _ in exported.values()} == set(shapes) - set(plan.dropped)
    assert table.copies == ()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_bare_trunk_drops_the_head_for_a_reason(folder):
    raw, shapes = stored(folder)
    pooler = any(".pooler." in f".{name}" for name in shapes)
    model = family(raw["model_type"]).build(raw, None, pooler=pooler)
    plan = family(raw["model_type"]).names(model).load_plan(shapes, list(flatten(abstract_init(model))))
    head = ("cls.", "lm_head.", "classifier.", "qa_outputs.", "vocab_", "pre_classifier.")
    assert set(plan.dropped) == {name for name in shapes if name.startswith(head)}
    assert all(plan.dropped.values())


@pytest.mark.parametrize("kind", ["sequence-classification", "token-classification", "question-answering", "masked-lm"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_new_head_leaves_the_trunk_alone(folder, kind):
    raw, shapes = stored(folder)
    labels = ("a", "b", "c", "d", "e") if kind.endswith("classification") else ()
    model = family(raw["model_type"]).build(raw, Head(kind, labels))
    trunk = [path for path in flatten(abstract_init(model)) if path.startswith(("embed/", "blocks/"))]
    plan = family(raw["model_type"]).names(model).load_plan(shapes, trunk)
    assert set(plan.used) == set(trunk) and len(plan.used) + len(plan.dropped) == len(shapes)
    assert not any("embeddings" in name or ".layer." in name for name in plan.dropped)


@pytest.mark.parametrize(
    ("folder", "bias", "unread"),
    [
        ("bert-mlm", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("roberta-mlm", "lm_head.decoder.bias", "lm_head.bias"),
        ("distilbert-mlm", "vocab_projector.bias", None),
    ],
)
def test_an_untied_decoder_is_read_and_written_with_its_bias(folder, bias, unread):
    raw, shapes = stored(folder)
    raw["tie_word_embeddings"] = False
    model = family(raw["model_type"]).build(raw, zoo.stored_head(raw))
    table, ours = family(raw["model_type"]).names(model), list(flatten(abstract_init(model)))
    weight = bias.replace("bias", "weight")
    file = {*shapes, weight, bias}
    plan = table.load_plan(file, ours)
    assert plan.used["head/decoder/kernel"] == (weight, "transpose") and plan.used["head/bias"] == (bias, "same")
    assert set(plan.dropped) == ({unread} if unread else set())
    written = {name for name, _ in table.export_names(ours, with_prefix=True).values()}
    assert written | {copy.theirs for copy in table.copies} == file


@pytest.mark.parametrize(
    ("folder", "extra", "reason"),
    [
        ("bert-model", "embeddings.position_ids", "a buffer that the model computes itself"),
        ("bert-seqcls", "bert.embeddings.token_type_ids", "a buffer that the model computes itself"),
        ("distilbert-qa", "distilbert.embeddings.position_ids", "a buffer that the model computes itself"),
        ("bert-mlm", "cls.predictions.decoder.weight", "a stored copy of a tied parameter"),
        ("bert-mlm", "cls.predictions.decoder.bias", "a stored copy of a tied parameter"),
        ("xlm-roberta-mlm", "lm_head.decoder.weight", "a stored copy of a tied parameter"),
        ("roberta-mlm", "lm_head.decoder.bias", "a stored copy of a tied parameter"),
        ("distilbert-mlm", "vocab_projector.weight", "a stored copy of a tied parameter"),
        ("roberta-mlm", "roberta.pooler.dense.weight", "a pooler that this head does not use"),
        ("bert-seqcls", "cls.predictions.transform.dense.weight", "the masked-language head"),
    ],
)
def test_what_real_files_hold_besides_is_dropped_for_a_reason(folder, extra, reason):
    table, shapes, ours = opened(folder)
    assert table.load_plan({*shapes, extra}, list(ours)).dropped == {extra: reason}


def test_old_names_of_layer_norms():
    table, shapes, ours = opened("bert-seqcls")
    old = [n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for n in shapes]
    assert old != list(shapes)
    plan = table.load_plan(old, list(ours))
    assert plan.used["blocks/2/mlp/norm/scale"] == ("bert.encoder.layer.2.output.LayerNorm.gamma", "same")
    assert canonical_name("bert.embeddings.LayerNorm.beta", "bert.") == "embeddings.LayerNorm.bias"


def test_a_trunk_is_read_with_and_without_its_prefix():
    table, shapes, ours = opened("bert-model")
    plain, prefixed = (table.load_plan(names, list(ours)) for names in (shapes, [f"bert.{name}" for name in shapes]))
    assert {path: (f"bert.{name}", how) for path, (name, how) in plain.used.items()} == dict(prefixed.used)


@pytest.mark.parametrize(
    ("folder", "extra"),
    [
        ("bert-model", "embeddings.word_embedings.weight"),
        ("bert-model", "encoder.layer.3.output.dense.weight"),
        ("bert-model", "encoder.layer.01.output.dense.weight"),
        ("bert-model", "pooler.projection.weight"),
        ("bert-mlm", "cls.predictions.gate.weight"),
        ("bert-seqcls", "classifier.dense.weight"),
        ("roberta-mlm", "lm_head.gate.weight"),
        ("roberta-seqcls", "classifier.gate.weight"),
        ("distilbert-mlm", "vocab_projector.gate"),
        ("distilbert-model", "embeddings.token_type_embeddings.weight"),
    ],
)
def test_a_made_up_tensor_is_refused_by_name(folder, extra):
    table, shapes, ours = opened(folder)
    with pytest.raises(MappingError, match=rf"1 tensors unmapped, 0 unfilled\): tensor {extra} has no place; nearest:"):
        table.load_plan({*shapes, extra}, list(ours))


@pytest.mark.parametrize(
    ("folder", "twin", "path"),
    [
        ("bert-model", "bert.pooler.dense.bias", "pooler/dense/bias"),
        ("bert-model", "embeddings.LayerNorm.gamma", "embed/norm/scale"),
        ("bert-seqcls", "bert.classifier.weight", "head/out/kernel"),
        ("bert-seqcls", "embeddings.word_embeddings.weight", "embed/word/embedding"),
    ],
)
def test_two_tensors_for_one_parameter_are_refused(folder, twin, path):
    table, shapes, ours = opened(folder)
    with pytest.raises(MappingError, match=f"tensor {twin} .a second tensor for {path}, after"):
        table.load_plan([*shapes, twin], list(ours))


def test_a_missing_tensor_is_refused_by_our_name_and_the_nearest_of_theirs():
    table, shapes, ours = opened("distilbert-seqcls")
    gone = {"distilbert.transformer.layer.1.ffn.lin2.weight", "classifier.bias"}
    with pytest.raises(MappingError, match=r"0 tensors unmapped, 2 unfilled") as error:
        table.load_plan(set(shapes) - gone, list(ours))
    assert "parameter blocks/1/mlp/down/kernel has no tensor" in str(error.value)
    assert "parameter head/out/bias has no tensor; nearest: " in str(error.value)


def test_a_parameter_without_a_row_cannot_be_exported():
    table, _, _ = opened("bert-model")
    with pytest.raises(MappingError, match="no name in the export format for 1 parameters: head/own/kernel"):
        table.export_names(["head/own/kernel"], with_prefix=False)


def test_a_long_complaint_is_cut():
    table, shapes, _ = opened("bert-model")
    with pytest.raises(MappingError, match=f"and {len(shapes) - 12} more"):
        table.load_plan([f"x.{name}" for name in shapes], [])
