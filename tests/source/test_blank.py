"""Sources without weights, weights without a configuration, and what is refused of both."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtransfer.models import ConfigFieldError, init
from jaxtransfer.parallel import make_mesh
from jaxtransfer.source import SafetensorsError, SourceError, blank, load
from jaxtransfer.tree import flatten
from jaxtransfer.types import Head

GOLDEN = Path(__file__).resolve().parents[1] / "goldens" / "bert-seqcls"


@pytest.fixture
def bare(tmp_path):
    """A folder that holds a configuration and nothing else."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copyfile(GOLDEN / "config.json", folder / "config.json")
    return folder


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_an_architecture_without_weights(bare):
    source, stored = blank(bare), load(GOLDEN)
    assert source.model.head == stored.model.head
    assert jax.tree.map(jnp.shape, source.params) == jax.tree.map(jnp.shape, stored.params)
    assert same(source.params, init(source.model, jax.random.key(0)))
    assert source.lineage.operations == ("blank(): fresh parameters",)
    assert set(source.lineage.files) == {"config.json"} and not source.lineage.fingerprints
    other = blank(bare, key=jax.random.key(1))
    assert other.lineage.digest != source.lineage.digest
    assert not same(other.params, source.params)


def test_weights_that_are_there_are_not_read(tmp_path):
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "spoilt"))
    (folder / "model.safetensors").write_bytes(b"")
    assert same(blank(folder).params, blank(GOLDEN).params)
    with pytest.raises(SafetensorsError):
        load(folder)


def test_blank_takes_a_head_a_dtype_and_a_mesh(bare, devices):
    head = Head("token-classification", ("a", "b", "c"))
    source = blank(bare, head=head, dtype="bfloat16")
    assert source.params["head"]["out"]["kernel"].shape[-1] == 3
    assert {str(leaf.dtype) for leaf in flatten(source.params).values()} == {"bfloat16"}
    mesh = make_mesh(fsdp=2, devices=devices[:2])
    split = blank(bare, head=None, mesh=mesh, sharding=((r"blocks/0/mlp/up/kernel", P("fsdp")),))
    assert split.params["blocks"]["0"]["mlp"]["up"]["kernel"].sharding.spec == P("fsdp")
    assert same(split.params, blank(bare, head=None).params)


def test_weights_take_the_configuration_that_they_lack(tmp_path):
    raw, wanted = json.loads((GOLDEN / "config.json").read_text()), load(GOLDEN)
    folder = tmp_path / "weights"
    folder.mkdir()
    shutil.copyfile(GOLDEN / "model.safetensors", folder / "model.safetensors")
    file = tmp_path / "other.safetensors"
    shutil.copyfile(GOLDEN / "model.safetensors", file)
    for ref in (folder, file):
        for config in (raw, GOLDEN / "config.json"):
            found = load(ref, config=config)
            assert same(found.params, wanted.params)
            assert (found.model.head, found.assets["config"]) == (wanted.model.head, raw)
    assert (found.lineage.ref, set(found.lineage.files)) == ("other.safetensors", {"other.safetensors", "config.json"})
    assert load(file, config=raw, head=None).model.head is None


def written(tmp_path, text):
    path = tmp_path / "given.json"
    path.write_text(text)
    return path


REFUSED = {
    "no configuration": (None, SourceError, r"weights: the folder has weights but no config.json; give one as config"),
    "no file": ("absent.json", SourceError, r"config: absent.json: there is no such file"),
    "malformed": ("{", SourceError, r"given.json: is not JSON"),
    "no object": ("[]", SourceError, r"given.json: expected a JSON object"),
    "no model_type": ("{}", SourceError, r"given.json names no model_type"),
    "no family": ('{"model_type": "rwkv"}', ConfigFieldError, "'rwkv' is not supported"),
    "an unknown field": ('{"model_type": "bert", "gate": 1}', ConfigFieldError, "gate"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [load, blank])
def test_configurations_that_are_refused(name, function, tmp_path):
    text, kind, says = REFUSED[name]
    folder = tmp_path / "weights"
    folder.mkdir()
    shutil.copyfile(GOLDEN / "model.safetensors", folder / "model.safetensors")
    config = written(tmp_path, text) if text and text[0] in "{[" else text
    if function is blank:
        says = says.replace("weights but ", "")
    with pytest.raises(kind, match=says):
        function(folder, config=config, head=None)


def test_references_that_do_not_fit(tmp_path, bare):
    with pytest.raises(SourceError, match=r"has a config.json of its own; config is for weights that come without"):
        load(GOLDEN, config={"model_type": "bert"})
    with pytest.raises(SourceError, match=r"neither model.safetensors nor"):
        load(bare)
    with pytest.raises(SourceError, match=r"is a file; give the folder that holds it and config.json, or its config"):
        load(GOLDEN / "model.safetensors")
    with pytest.raises(SourceError, match="config names no model_type"):
        load(GOLDEN / "model.safetensors", config={})
    with pytest.raises(SourceError, match=r"is a file; give a folder, or a config.json"):
        blank(GOLDEN / "model.safetensors")
    with pytest.raises(SafetensorsError, match=r"model\.bin: only safetensors are read"):
        load(written(tmp_path, "x").rename(tmp_path / "model.bin"), config={"model_type": "bert"})
    with pytest.raises(SourceError, match="1 sharding rules but no mesh"):
        blank(bare, sharding=((".*", P()),))
    with pytest.raises(SourceError, match="head='trunk'"):
        blank(bare, head="trunk")


HUGE = {"num_hidden_layers": 10**9, "hidden_size": 10**9, "vocab_size": 2**30, "intermediate_size": 2**20}


@pytest.mark.parametrize("field", HUGE)
def test_a_model_that_nobody_can_build_is_refused_before_it_is_built(field, bare):
    raw = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**raw, field: HUGE[field]}))
    with pytest.raises(ConfigFieldError, match=f"config field {field}: {HUGE[field]} is beyond"):
        blank(bare)
