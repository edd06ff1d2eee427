"""Families are found by their files, and may come from outside of the package; the page that says how is true."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest

from jaxtransfer.models import ConfigFieldError, families, family, register, registry
from jaxtransfer.types import Head
from tests import test_docs, torch_reference
from tests.models import zoo
from tests.models.test_parity import check_outputs

SECONDS = 0.5
NAMES = """
    bert cifar-resnet deit dinov2 distilbert gemma2 gemma3_text gpt2 llama mistral qwen2 qwen3 resnet roberta vit
    xlm-roberta""".split()
ELECTRA = {
    "model_type": "electra", "vocab_size": 101, "hidden_size": 24, "embedding_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 3, "intermediate_size": 37, "max_position_embeddings": 41,
    "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2},
}  # fmt: skip
PROBE = """
import json, sys, time
import jaxtransfer
from jaxtransfer.models import families, family
before, start = set(sys.modules), time.process_time()
family("bert")
first = sorted(set(sys.modules) - before)
families()
print(json.dumps({"seconds": time.process_time() - start, "first": first, "before": sorted(before)}))
"""


@pytest.fixture
def page(monkeypatch):
    """The page's family, registered for this test alone."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    path = test_docs.ROOT / "docs" / "adding-a-family.md"
    kind = test_docs.run_blocks(test_docs.python_blocks(path.read_text()), path.name)["FAMILIES"]["electra"]
    register(kind)
    return kind


def test_every_declared_family_is_found_once_under_its_name(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    declared = [name for found in registry._declarations() for name in found]
    assert sorted(declared) == list(families()) and set(declared) >= set(NAMES)
    assert all(family(name) is kind and kind.name == name for name, kind in families().items())


def test_an_unknown_family_is_refused_with_all_that_are_known(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    with pytest.raises(ConfigFieldError, match=r"^model_type 'xlm-robrta' is not supported") as error:
        family("xlm-robrta")
    assert "(did you mean 'xlm-roberta'?)" in str(error.value)
    assert str(error.value).endswith("supported: " + ", ".join(families()))
    for odd in ("api", "foreign", "", "../bert", "jaxtransfer.models.bert"):
        with pytest.raises(ConfigFieldError, match=re.escape(f"model_type {odd!r} is not supported")):
            family(odd)


def test_nothing_is_read_before_it_is_asked_for_and_all_is_read_quickly():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    found = json.loads(subprocess.check_output([sys.executable, "-c", PROBE], env=environment, text=True))
    files = {f"jaxtransfer.models.{name}" for name in ("bert", "llama", "vit", "resnet")}
    assert files.isdisjoint(found["before"])
    assert files & set(found["first"]) == {"jaxtransfer.models.bert"}
    assert found["seconds"] <= SECONDS


def test_a_family_from_outside_is_like_any_other(page):
    assert family("electra") is page is families()["electra"]
    model = page.build(ELECTRA, None)
    assert page.rehead(model, zoo.CLASSIFIER).stages[-1].name == "head"
    with pytest.raises(ConfigFieldError, match="embedding_size=16 is not supported, only 24 is"):
        page.build(ELECTRA | {"embedding_size": 16}, None)
    written = page.export_config(page.rehead(model, zoo.CLASSIFIER), ELECTRA)
    assert zoo.stored_head(written) == zoo.CLASSIFIER and page.build(written, zoo.CLASSIFIER).config == model.config


def test_a_head_without_a_class_is_not_exported(page):
    model = page.build(ELECTRA, Head("token-classification", ("a", "b")))
    with pytest.raises(ConfigFieldError, match=r"a token-classification head has no class among ElectraModel, .*orbax"):
        page.export_config(model, ELECTRA)


def test_a_name_that_is_taken_is_refused(page):
    for name in ("electra", "bert", "foreign"):
        with pytest.raises(ValueError, match=f"there is a family '{name}' already"):
            register(dataclasses.replace(family("bert"), name=name))
    assert family("bert").build.__module__ == "jaxtransfer.models.bert"


@pytest.mark.torch
@pytest.mark.parametrize(
    "architecture",
    [
        "ElectraForMaskedLM",
        *(pytest.param(f"Electra{a}", marks=pytest.mark.slow) for a in ("Model", "ForSequenceClassification")),
    ],
)
def test_the_pages_family_computes_what_torch_does(page, architecture):
    theirs = torch_reference.from_config(ELECTRA | {"architectures": [architecture]}, 0)
    with tempfile.TemporaryDirectory() as folder:
        model, params = zoo.from_folder(torch_reference.save(theirs, folder))
    batch = torch_reference.batch_for(ELECTRA, 0)
    found, want = zoo.outputs(model, zoo.stacked(params), batch), torch_reference.outputs(theirs, batch)
    check_outputs(found, want, model, 1e-5)
