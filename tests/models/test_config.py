"""Configuration files are read strictly: what changes the function and is not supported is refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxtransfer.models import ConfigFieldError, distilbert, family
from jaxtransfer.models.encoder import EncoderConfig
from jaxtransfer.models.registry import HARMLESS, MUST, labels_of
from jaxtransfer.types import Head
from tests.models import zoo

# The fields of published config.json files, as they are on the hub (widths and all; building traces shapes only).
BERT_BASE = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
ROBERTA_BASE = {
    "architectures": ["RobertaForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "roberta",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}
XLM_ROBERTA_BASE = ROBERTA_BASE | {
    "architectures": ["XLMRobertaForMaskedLM"],
    "model_type": "xlm-roberta",
    "output_past": True,
    "position_embedding_type": "absolute",
    "transformers_version": "4.17.0.dev0",
    "use_cache": True,
    "vocab_size": 250002,
}
DISTILBERT_SST2 = {
    "activation": "gelu",
    "architectures": ["DistilBertForSequenceClassification"],
    "attention_dropout": 0.1,
    "dim": 768,
    "dropout": 0.1,
    "finetuning_task": "sst-2",
    "hidden_dim": 3072,
    "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
    "initializer_range": 0.02,
    "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
    "max_position_embeddings": 512,
    "model_type": "distilbert",
    "n_heads": 12,
    "n_layers": 6,
    "output_past": True,
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
    "vocab_size": 30522,
}
PUBLISHED = {
    "bert-base-uncased": BERT_BASE,
    "bert-base-multilingual-cased": BERT_BASE
    | {
        "classifier_dropout": None,
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
    },
    "all-MiniLM-L6-v2": BERT_BASE
    | {
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
        "architectures": ["BertModel"],
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "transformers_version": "4.8.2",
    },
    "textattack/bert-base-uncased-SST-2": {name: value for name, value in BERT_BASE.items() if name != "use_cache"}
    | {
        "architectures": ["BertForSequenceClassification"],
        "bos_token_id": 0,
        "do_sample": False,
        "eos_token_ids": 0,
        "finetuning_task": "glue:sst-2",
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_decoder": False,
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "length_penalty": 1.0,
        "max_length": 20,
        "num_beams": 1,
        "num_labels": 2,
        "num_return_sequences": 1,
        "output_attentions": False,
        "output_hidden_states": False,
        "output_past": True,
        "pruned_heads": {},
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "torchscript": False,
        "use_bfloat16": False,
    },
    "roberta-base": ROBERTA_BASE,
    "deepset/roberta-base-squad2": ROBERTA_BASE
    | {
        "architectures": ["RobertaForQuestionAnswering"],
        "gradient_checkpointing": False,
        "language": "english",
        "name": "Roberta",
    },
    "xlm-roberta-base": XLM_ROBERTA_BASE,
    "distilbert-base-uncased-finetuned-sst-2-english": DISTILBERT_SST2,
}
TINY = zoo.TINY
TINY_DISTILBERT = {"vocab_size": 31, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_accepted(name):
    raw = PUBLISHED[name]
    model = family(raw["model_type"]).build(raw, zoo.stored_head(raw))
    assert model.config.vocab_size == raw["vocab_size"]
    blocks = raw.get("num_hidden_layers", raw.get("n_layers"))
    assert [stage.name for stage in model.stages if stage.name.startswith("blocks/")][-1] == f"blocks/{blocks - 1}"


def test_the_real_minilm_configuration_is_accepted(minilm_folder):
    raw = zoo.raw_config(minilm_folder)
    assert family(raw["model_type"]).build(raw, None).config.hidden_size == 384


@pytest.mark.parametrize("name", ["Bert", "Roberta", "XLMRoberta", "DistilBert"])
def test_what_transformers_writes_is_accepted_and_defaults_agree(name):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{name}Config")()
    raw = theirs.to_dict()
    config = family(raw["model_type"]).build(raw, None).config
    smallest = {key: raw[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers") if key in raw}
    smallest |= {key: raw[key] for key in ("num_attention_heads", "intermediate_size") if key in raw}
    smallest |= {key: raw[key] for key in ("dim", "n_layers", "n_heads", "hidden_dim") if key in raw}
    # RoBERTa's class says type_vocab_size=2 as BERT's does, so whatever a file leaves out has one meaning.
    assert family(raw["model_type"]).build(smallest, None).config == config


def test_fields_are_harmless_read_or_fixed_and_never_two_of_these():
    read = {field.name for field in dataclasses.fields(EncoderConfig)} | set(filter(None, distilbert.FIELDS.values()))
    assert not HARMLESS & set(MUST) and not HARMLESS & read and not read & set(MUST)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("position_embedding_type", "relative_key"),
        ("position_embedding_type", "alibi"),
        ("pruned_heads", {"0": [1]}),
        ("use_bfloat16", True),
        ("sinusoidal_pos_embds", True),
    ],
)
def test_a_value_that_changes_the_function_is_refused(field, value):
    assert field in MUST
    for name, tiny in (("bert", TINY), ("roberta", TINY), ("distilbert", TINY_DISTILBERT)):
        build = family(name).build
        with pytest.raises(ConfigFieldError, match=f"config field {field}=.* is not supported, only"):
            build(tiny | {field: value}, None)
        assert build(tiny | {field: value}, None, ignore=(field,)).config == build(tiny, None).config
        assert build(tiny | {field: MUST[field]}, None).config == build(tiny, None).config


def test_every_fixed_field_is_tested_above():
    marks = test_a_value_that_changes_the_function_is_refused.pytestmark
    assert {case[0] for case in marks[0].args[1]} == set(MUST)


@pytest.mark.parametrize(
    ("name", "field", "hint"),
    [
        ("bert", "layer_norm_epsilon", r" \(did you mean 'layer_norm_eps'\?\)"),
        ("bert", "num_experts", ""),
        ("bert", "auto_map", ""),
        ("bert", "qa_dropout", ""),
        ("bert", "seq_classif_dropout", ""),
        ("distilbert", "layer_norm_eps", ""),
        ("distilbert", "classifier_dropout", r" \(did you mean 'seq_classif_dropout'\?\)"),
        ("distilbert", "hidden_size", ""),
    ],
)
def test_an_unknown_field_is_refused_unless_ignored(name, field, hint):
    tiny = TINY_DISTILBERT if name == "distilbert" else TINY
    plain = family(name).build(tiny, None).config
    with pytest.raises(ConfigFieldError) as error:
        family(name).build(tiny | {field: 7}, None)
    text = str(error.value)
    assert text.startswith(f"config field {field}=7 is unknown and may change what the model computes")
    assert hint.replace("\\", "") in text and text.endswith(f"load with ignore=({field!r},)")
    assert family(name).build(tiny | {field: 7}, None, ignore=(field,)).config == plain


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_missing_field_is_named(field):
    raw = {name: value for name, value in TINY.items() if name != field}
    with pytest.raises(ConfigFieldError, match=f"config lacks {field}$"):
        family("bert").build(raw, None)


def test_missing_fields_have_the_names_of_the_file():
    with pytest.raises(ConfigFieldError, match="config lacks vocab_size, dim, n_layers, n_heads, hidden_dim"):
        family("distilbert").build({}, None)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("hidden_size", "8", "expected int, found '8'"),
        ("hidden_size", 8.0, r"expected int, found 8\.0"),
        ("hidden_size", True, "expected int, found True"),
        ("num_hidden_layers", -1, "-1 is out of range"),
        ("vocab_size", 2**62, "is out of range"),
        ("pad_token_id", None, "expected int, found None"),
        ("layer_norm_eps", "1e-5", "expected float, found '1e-5'"),
        ("classifier_dropout", "none", r"expected float \| None, found 'none'"),
        ("hidden_act", None, "expected str, found None"),
        ("tie_word_embeddings", 1, "expected bool, found 1"),
    ],
)
def test_a_value_of_another_type_is_refused(field, value, complaint):
    with pytest.raises(ConfigFieldError, match=f"config field {field}: .*{complaint}"):
        family("bert").build(TINY | {field: value}, None)


def test_an_integer_may_stand_for_a_float():
    assert family("bert").build(TINY | {"hidden_dropout_prob": 0}, None).config.hidden_dropout_prob == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_attention_heads": 3}, "hidden_size=8 does not divide by num_attention_heads=3"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"hidden_act": "quick_gelu"}, "hidden_act .*'quick_gelu' is not one of .*gelu_new"),
    ],
)
def test_values_that_do_not_fit_together(change, complaint):
    with pytest.raises(ConfigFieldError, match=complaint):
        family("bert").build(TINY | change, None)


@pytest.mark.parametrize(
    ("name", "hint"), [("berta", "did you mean 'bert'"), ("xlm_roberta", "did you mean 'xlm-roberta'"), ("blip", "")]
)
def test_an_unsupported_architecture_is_refused_with_those_that_are(name, hint):
    with pytest.raises(ConfigFieldError, match=f"'{name}' is not supported.*{hint}.*supported: bert, .*roberta"):
        family(name)


def test_labels_by_id():
    assert labels_of({"id2label": {"1": "b", "0": "a"}}) == ("a", "b") == labels_of({"id2label": {0: "a", 1: "b"}})
    assert labels_of({"num_labels": 3}) == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert labels_of({}) == ("LABEL_0", "LABEL_1") == labels_of({"id2label": {}})


@pytest.mark.parametrize("table", [{"0": "a", "2": "b"}, {"1": "a"}, {"0": "a", "x": "b"}, {"00": "a"}])
def test_odd_label_ids_are_refused(table):
    with pytest.raises(ConfigFieldError, match="id2label: ids must be 0 to"):
        labels_of({"id2label": table})


@pytest.mark.parametrize("count", [0, -1, "2", 2.0, True])
def test_an_odd_number_of_labels_is_refused(count):
    with pytest.raises(ConfigFieldError, match="num_labels: expected a positive int"):
        labels_of({"num_labels": count})


@pytest.mark.parametrize(
    ("head", "complaint"),
    [
        (Head("ranking"), "bert has no head of kind 'ranking'; it has sequence-classification, "),
        (Head("sequence-classification"), "a sequence-classification head needs labels"),
        (Head("token-classification"), "a token-classification head needs labels"),
        (Head("sequence-classification", ("a",), pooling="max"), "pooling 'max'.*takes mean or None"),
        (Head("token-classification", ("a",), pooling="mean"), "pooling 'mean'.*takes None"),
        (Head("masked-lm", pooling="mean"), "pooling 'mean'"),
    ],
)
def test_a_head_that_the_family_does_not_have_is_refused(head, complaint):
    with pytest.raises(ValueError, match=complaint):
        family("bert").build(TINY, head)


@pytest.mark.parametrize(
    ("name", "raw", "kind", "rate"),
    [
        ("bert", TINY, "sequence-classification", 0.3),
        ("bert", TINY | {"classifier_dropout": 0.7}, "sequence-classification", 0.7),
        ("bert", TINY | {"classifier_dropout": 0.0}, "token-classification", 0.0),
        ("bert", TINY, "question-answering", 0.0),
        ("distilbert", TINY_DISTILBERT | {"dropout": 0.4}, "sequence-classification", 0.2),
        ("distilbert", TINY_DISTILBERT | {"dropout": 0.4}, "token-classification", 0.4),
        ("distilbert", TINY_DISTILBERT | {"dropout": 0.4}, "question-answering", 0.1),
    ],
)
def test_the_dropout_before_a_head(name, raw, kind, rate):
    """Read off the outputs in training: a bias of zero and a hidden state of ones leave the dropout's mask."""
    model = family(name).build(raw, Head(kind, ("a",)))
    head = model.stages[-1]
    params = {part: {"kernel": jnp.eye(*leaf["kernel"].shape), "bias": jnp.zeros_like(leaf["bias"])}
              for part, leaf in head.init(jax.random.key(0)).items()}  # fmt: skip
    ones = jnp.ones((4000, 1, 8))
    carry = {"hidden": ones, "pooler_output": ones[:, 0], "mask": jnp.ones((4000, 1), bool)}
    found = next(iter(head.fn(params, carry, jax.random.key(1)).values()))
    assert abs(float((found == 0).mean()) - rate) < 0.04


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "distilbert"])
def test_an_exported_configuration_reads_back_as_the_same_model(name):
    tiny = TINY_DISTILBERT if name == "distilbert" else TINY
    raw = tiny | {"model_type": name, "num_labels": 9, "id2label": {"0": "x"}, "tie_word_embeddings": False}
    head = Head("sequence-classification", ("no", "yes"))
    model = family(name).build(raw, head)
    out = family(name).export_config(model, raw)
    assert zoo.stored_head(out) == head and "num_labels" not in out
    assert out["label2id"] == {"no": 0, "yes": 1}
    assert family(name).build(out, head).config == model.config
    trunk = family(name).export_config(family(name).build(raw, None), raw)
    assert zoo.stored_head(trunk) is None and "id2label" not in trunk


def test_a_head_without_a_class_of_hugging_faces_is_not_exported():
    model = family("bert").build(TINY, Head("sequence-classification", ("a", "b"), pooling="mean"))
    with pytest.raises(ConfigFieldError, match=r"pooling='mean' has no Hugging Face class; export with format='orbax'"):
        family("bert").export_config(model, TINY)
