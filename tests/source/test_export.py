import dataclasses
import errno
import gc
import importlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt import heads, swap_head
from jaxtransfer.models import ConfigFieldError, apply
from jaxtransfer.source import ExportError, SourceError, export, load, orbax_folder
from jaxtransfer.source.safetensors import TensorFile
from jaxtransfer.tree import TreeError, flatten
from jaxtransfer.tree.weights import Weight
from jaxtransfer.types import Head, Source, Stage

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
COMPLETE = ["bert-seqcls", "roberta-mlm", "distilbert-qa", "xlm-roberta-tokencls"]


@pytest.fixture(scope="module")
def bert():
    return load(GOLDENS / "bert-seqcls")


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", COMPLETE)
def test_export_writes_the_names_that_were_loaded(tmp_path, name):
    source = load(GOLDENS / name)
    folder = export(source, tmp_path / "out")
    keys = json.loads((GOLDENS / name / "keys.json").read_text())
    stored = TensorFile(folder / "model.safetensors")
    assert {key: list(info.shape) for key, info in stored.tensors.items()} == {key: shape for key, shape, _ in keys}
    again = load(folder)
    assert same(again.params, source.params) and again.model.head == source.model.head
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "jaxtransfer.json", "model.safetensors"
    ]  # fmt: skip
    assert hidden(tmp_path) == []


@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "distilbert"])
def test_transformers_loads_an_export_with_the_same_logits(tmp_path, name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    golden = next(folder for folder in COMPLETE if folder.startswith(f"{name}-"))
    source = load(GOLDENS / golden, head=heads.classifier(["no", "maybe", "yes"]), key=jax.random.key(1))
    folder = export(source, tmp_path / "out")
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    with np.load(GOLDENS / golden / "inputs.npz") as inputs:
        batch = dict(inputs)
    with torch.no_grad():
        wanted = model.eval()(**{key: torch.from_numpy(value).long() for key, value in batch.items()}).logits.numpy()
    found = apply(source.model, source.params, batch)["logits"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_new_head_round_trip_with_lineage(tmp_path, bert):
    source = swap_head(bert, heads.classifier(["a", "b"]), jax.random.key(0))
    folder = export(source, tmp_path / "out", metrics={"accuracy": np.float32(0.5), "nan": float("nan"), "n": 3})
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b"} and config["dtype"] == "float32"
    record = json.loads((folder / "jaxtransfer.json").read_text())
    assert record["lineage"]["digest"] == bert.lineage.digest
    assert record["lineage"]["operations"] == list(source.lineage.operations)
    assert record["metrics"] == {"accuracy": 0.5, "nan": "nan", "n": 3}
    again = load(folder)
    assert same(again.params, source.params) and again.model.head == source.model.head


def test_tokenizer_files_go_along(tmp_path, bert):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]")
    files = {"vocab.txt": vocabulary, "generation_config.json": vocabulary}
    assets = {**bert.assets, "files": {**files, "../escape.txt": vocabulary}}
    folder = export(dataclasses.replace(bert, assets=assets), tmp_path / "deep" / "out")
    assert (folder / "vocab.txt").read_text() == "[PAD]"
    assert not (folder.parent / "escape.txt").exists()
    assert load(folder).assets["files"] == {name: folder / name for name in files}


def test_what_was_said_of_another_head_is_not_said_of_the_new(tmp_path, bert):
    raw = {**bert.assets["config"], "problem_type": "multi_label_classification"}
    told = dataclasses.replace(bert, assets={**bert.assets, "config": raw})
    fresh = swap_head(told, heads.classifier(["a", "b"]), jax.random.key(0))
    found = [load(export(source, tmp_path / "out")).assets["config"] for source in (told, fresh)]
    assert [config.get("problem_type") for config in found] == ["multi_label_classification", None]


def test_bfloat16_export(tmp_path, bert):
    half = dataclasses.replace(bert, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), bert.params))
    folder = export(half, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert same(load(folder).params, half.params)


def test_sharded_parameters_are_exported_whole(tmp_path, bert, devices):
    mesh = Mesh(np.array(devices), ("fsdp",))
    source = load(GOLDENS / "bert-seqcls", mesh=mesh, sharding=[(r".*attention/.*/kernel", P("fsdp"))])
    assert same(load(export(source, tmp_path / "out")).params, bert.params)


HEADS = [heads.classifier(["a", "b"], pooling="mean"), heads.classifier(2), heads.tokens(3), heads.span(), None]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head.kind}-{head.pooling}" if head else "none")
def test_orbax_round_trip(tmp_path, bert, head):
    source = load(GOLDENS / "bert-seqcls", head=None)
    source = source if head is None else swap_head(source, head, jax.random.key(0))
    folder = export(source, tmp_path / "out", format="orbax")
    again = load(folder)
    assert same(again.params, source.params) and again.model.head == source.model.head
    assert again.lineage.license is None  # of which the card says "unknown"
    trunk = load(folder, head=None)
    assert trunk.model.head is None and "head" not in trunk.params
    assert bool(trunk.lineage.dropped) == (head is not None)


def test_orbax_onto_a_mesh(tmp_path, bert, devices):
    mesh = Mesh(np.array(devices), ("fsdp",))
    folder = export(bert, tmp_path / "out", format="orbax")
    found = load(folder, mesh=mesh, sharding=[(r".*attention/.*/kernel", P("fsdp"))])
    assert same(found.params, bert.params)
    assert found.params["blocks"]["0"]["attention"]["query"]["kernel"].addressable_shards[0].data.shape == (3, 24)


def test_damaged_orbax_is_noticed(tmp_path, bert, monkeypatch):
    """One byte changed in every file of the arrays: an error of ours, or the same parameters; and nothing on stderr."""
    heard = []
    monkeypatch.setattr("sys.unraisablehook", heard.append)
    folder = export(bert, tmp_path / "out", format="orbax")
    caught = 0
    for path in sorted(path for path in (folder / "params").rglob("*") if path.is_file() and path.stat().st_size):
        whole = path.read_bytes()
        spoiled = bytearray(whole)
        spoiled[len(whole) // 2] ^= 0x55
        path.write_bytes(spoiled)
        try:
            assert same(load(folder).params, bert.params), path
        except (SourceError, TreeError) as error:
            caught += 1
            assert "\n" not in str(error)
        path.write_bytes(whole)
    gc.collect()
    assert caught > 0 and not heard
    assert same(load(folder).params, bert.params)


def test_orbax_takes_no_dtype_and_no_foreign_record(tmp_path, bert):
    folder = export(bert, tmp_path / "out", format="orbax")
    with pytest.raises(SourceError, match="dtype is for safetensors"):
        load(folder, dtype="bfloat16")
    record = json.loads((folder / "jaxtransfer.json").read_text())
    for head, message in (({"kind": "x"}, "must have exactly"), ({**record["head"], "labels": "ab"}, "wrong labels")):
        (folder / "jaxtransfer.json").write_text(json.dumps({**record, "head": head}))
        with pytest.raises(SourceError, match=message):
            load(folder)


def test_a_head_without_a_hugging_face_class_is_refused_by_name(tmp_path, bert):
    source = swap_head(bert, heads.classifier(2, pooling="mean"), jax.random.key(0))
    with pytest.raises(ConfigFieldError, match="pooling='mean'"):
        export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_head_of_code_is_refused(tmp_path, bert):
    stage = Stage("head", lambda *_: {}, lambda key: {"w": jnp.zeros(2)}, ("logits",))
    source = swap_head(bert, Head("mine", stages=(stage,)), jax.random.key(0))
    for kind in ("hf", "orbax"):
        with pytest.raises(ValueError, match="stages of its own"):
            export(source, tmp_path / "out", format=kind)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_canonical_is_refused(tmp_path, bert):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Wrapped(Weight):
        base: jax.Array

    def with_bias(leaf):
        return dataclasses.replace(
            bert, params={**bert.params, "head": {"out": {**bert.params["head"]["out"], **leaf}}}
        )

    with pytest.raises(ExportError, match="head/out/bias is a Wrapped, not an array: merge"):
        export(with_bias({"bias": Wrapped(jnp.zeros(3))}), tmp_path / "out")
    with pytest.raises(TreeError, match=r"shape of head/out/bias: expected \(3,\), found \(4,\)"):
        export(with_bias({"bias": jnp.zeros(4)}), tmp_path / "out")
    with pytest.raises(TreeError, match="extra: head/out/more"):
        export(with_bias({"more": jnp.zeros(4)}), tmp_path / "out")
    with pytest.raises(ExportError, match="format 'gguf' is not one of hf, orbax, peft"):
        export(bert, tmp_path / "out", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_only_empty_folders_and_earlier_exports_are_replaced(tmp_path, bert):
    target = tmp_path / "out"
    target.mkdir()
    export(bert, target)
    (target / "stale.txt").write_text("of the earlier export")
    export(bert, target, format="orbax")
    assert not (target / "stale.txt").exists() and not (target / "model.safetensors").exists()
    (target / "jaxtransfer.json").unlink()
    with pytest.raises(ExportError, match="is not empty"):
        export(bert, target)
    assert (target / "params").is_dir()
    with pytest.raises(ExportError, match="is a file"):
        export(bert, target / "README.md")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("when", ["model.safetensors", "jaxtransfer.json", "params"])
def test_a_full_disk_leaves_the_earlier_export_and_nothing_else(tmp_path, bert, monkeypatch, when):
    target = export(bert, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    exporting = importlib.import_module("jaxtransfer.source.export")  # its name in the package is the function's
    where = {
        "model.safetensors": (os, "fsync"),
        "jaxtransfer.json": (exporting, "_record"),
        "params": (orbax_folder, "write"),
    }
    monkeypatch.setattr(*where[when], full)
    with pytest.raises(OSError, match=r"cannot export: No space left on device: '.*out'") as caught:
        export(bert, target, format="orbax" if when == "params" else "hf")
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert hidden(tmp_path) == []


def test_orbax_on_a_full_disk(tmp_path, bert, monkeypatch):
    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']")

    monkeypatch.setattr("orbax.checkpoint.v1.save", full)
    with pytest.raises(OSError, match="cannot export: No space left on device") as caught:
        export(bert, tmp_path / "out", format="orbax")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place(tmp_path, bert):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot export: .*: '.*file/out'"):
        export(bert, tmp_path / "file" / "out")


def test_foreign_models_are_refused_by_name(tmp_path, bert):
    foreign = Source(dataclasses.replace(bert.model, family="foreign"), bert.params, bert.lineage)
    with pytest.raises(ConfigFieldError, match="'foreign' is not supported"):
        export(foreign, tmp_path / "out")
