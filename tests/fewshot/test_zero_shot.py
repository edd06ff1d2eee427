"""Zero-shot classification is transformers' formula for an entailment head, and cosines for embeddings."""

import functools
import json

import jax
import numpy as np
import pytest

from jaxtransfer import fewshot
from jaxtransfer.adapt import swap_head
from jaxtransfer.fewshot import FewShotError
from jaxtransfer.models import apply, family, init
from jaxtransfer.source import export, load
from jaxtransfer.types import Head, Lineage, Source

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"this is . a good bad film team won the vote sport politics".split(),
]
NLI = ("contradiction", "neutral", "entailment")
TEXTS, LABELS = ["the team won", "a good film", "the vote is a good team vote"], ["sport", "politics"]


@functools.cache
def folder_of(labels, factory):
    """A tiny BERT with a head of these labels, saved as a checkpoint with its tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special: dict = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder := factory())
    raw = {
        "model_type": "bert", "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.5,
    }  # fmt: skip
    model = family("bert").build(raw, None)
    source = Source(model, init(model, jax.random.key(0)), Lineage("memory", ""), {"config": raw})
    source = swap_head(source, Head("sequence-classification", labels), jax.random.key(1))
    export(source, folder / "model")
    for file in folder.glob("*token*"):
        file.rename(folder / "model" / file.name)
    return folder / "model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return lambda labels: folder_of(labels, lambda: tmp_path_factory.mktemp("nli"))


def outputs(source, batch):
    return jax.jit(lambda params, batch: apply(source.model, params, batch))(source.params, batch)


def by_hand(source, text, hypothesis):
    """The logits of one pair, by itself."""
    pieces = [text.lower().split(), hypothesis.lower().replace(".", " .").split()]
    first, second = ([WORDS.index(word) for word in piece] for piece in pieces)
    ids = [2, *first, 3, *second, 3]
    batch = {
        "input_ids": np.array([ids], np.int32),
        "attention_mask": np.ones((1, len(ids)), np.int32),
        "token_type_ids": np.array([[0] * (len(first) + 2) + [1] * (len(second) + 1)], np.int32),
    }
    return np.asarray(outputs(source, batch)["logits"][0], np.float64)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


@pytest.mark.parametrize("labels", [NLI, ("ENTAILMENT", "Contradictory", "neutral")])
def test_entailment_is_transformers_formula(saved, labels):
    source = load(saved(labels))
    entail, contradict = (2, 0) if labels is NLI else (0, 1)
    one = fewshot.by_entailment(source, TEXTS, LABELS, batch=4)
    several = fewshot.by_entailment(source, TEXTS, LABELS, multi_label=True)
    for i, text in enumerate(TEXTS):
        z = np.stack([by_hand(source, text, f"this is {label}.") for label in LABELS])
        np.testing.assert_allclose(one[i], softmax(z[:, entail]), atol=1e-5)
        np.testing.assert_allclose(several[i], [softmax(row[[contradict, entail]])[1] for row in z], atol=1e-5)
    assert one.shape == (3, 2) and np.ptp(one, axis=0).max() > 1e-3


@pytest.mark.torch
def test_entailment_is_transformers_pipeline(saved):
    import transformers

    folder = saved(NLI)
    pipe = transformers.pipeline("zero-shot-classification", model=str(folder), tokenizer=str(folder), device="cpu")
    for multi_label in (False, True):
        found = fewshot.by_entailment(load(folder), TEXTS, LABELS, multi_label=multi_label, template="the {} film .")
        for row, said in zip(
            found, pipe(TEXTS, LABELS, multi_label=multi_label, hypothesis_template="the {} film ."), strict=True
        ):
            wanted = dict(zip(said["labels"], said["scores"], strict=True))
            np.testing.assert_allclose(row, [wanted[label] for label in LABELS], atol=1e-5)


def test_similarity_is_the_cosine_of_mean_pooled_embeddings(saved):
    source = load(saved(NLI), head=None)
    found = fewshot.by_similarity(source, TEXTS, ["a good team", "the vote"], batch=2)

    def embedded(text):
        ids = np.array([[2, *[WORDS.index(word) for word in text.split()], 3]], np.int32)
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        z = np.asarray(outputs(source, batch)["last_hidden_state"])[0].mean(axis=0)
        return z / np.linalg.norm(z)

    wanted = [[embedded(text) @ embedded(said) for said in ("a good team", "the vote")] for text in TEXTS]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_minilm_tells_topics_apart_without_an_example(minilm):
    source = load(minilm)
    embedding = fewshot.embed_texts(source, ["The cat sits outside"])[0]
    first = [0.13919, 0.00303, 0.04701, 0.03957, -0.04800]  # of sentence-transformers
    np.testing.assert_allclose(embedding[:5] / np.linalg.norm(embedding), first, atol=2e-5)
    texts = [
        "The team won the football match.",
        "Parliament votes on the budget tonight.",
        "Bring the stock to a boil, then add the rice.",
    ]
    found = fewshot.by_similarity(source, texts, ["sports", "politics", "cooking"])
    assert found.argmax(axis=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: fewshot.entailment(["LABEL_0", "LABEL_1"]), "'LABEL_0', 'LABEL_1': 0 begin with 'entail'"),
        (lambda: fewshot.entailment(["entailment", "neutral"]), "0 begin with 'contradict'"),
        (lambda: fewshot.entailment(["entailed", "entails", "contradiction"]), "2 begin with 'entail'"),
        (lambda: fewshot.entailment([]), "labels are none"),
        (lambda: fewshot.hypotheses(["a", "b"], "This is it."), "must have one place"),
        (lambda: fewshot.hypotheses(["a", "a"]), "two different ones"),
        (lambda: fewshot.hypotheses(["a"]), "two different ones"),
        (lambda: fewshot.hypotheses(["a", " "]), "none blank"),
        (lambda: fewshot.entailed(np.zeros((2, 3)), 0, 1), r"\(2, 3\)"),
    ],
)
def test_refused(call, words):
    with pytest.raises(FewShotError, match=words):
        call()


def test_a_model_or_a_text_that_does_not_fit_is_refused(saved):
    with pytest.raises(FewShotError, match="ends in no head"):
        fewshot.by_entailment(load(saved(NLI), head=None), TEXTS, LABELS)
    with pytest.raises(FewShotError, match="'negative', 'positive': 0 begin with 'entail'"):
        fewshot.by_entailment(load(saved(("negative", "positive"))), TEXTS, LABELS)
    source = load(saved(NLI))
    with pytest.raises(FewShotError, match="text 1 is longer than max_length"):
        fewshot.by_entailment(source, ["good", "good " * 12, "bad"], LABELS, max_length=16)
    with pytest.raises(FewShotError, match="text 2 is longer than max_length"):
        fewshot.by_similarity(source, ["good", "bad", "good " * 30], LABELS, max_length=16)
    with pytest.raises(FewShotError, match="no texts"):
        fewshot.by_entailment(source, [], LABELS)
    assert json.loads((saved(NLI) / "config.json").read_text())["id2label"]["2"] == "entailment"
