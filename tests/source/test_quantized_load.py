"""Quantised while loading: what `quantize` makes of what `load` reads, to the bit, and never in full precision."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt import attach, groups, heads, quantize
from jaxtransfer.adapt.attaching import lora
from jaxtransfer.adapt.quantized import QuantizeError
from jaxtransfer.models import apply, family
from jaxtransfer.models.api import abstract_init
from jaxtransfer.models.names import turn
from jaxtransfer.parallel import fsdp, make_mesh, shardings
from jaxtransfer.parallel.specs import ShardingError
from jaxtransfer.source import SourceError, export, load, orbax_folder, placing
from jaxtransfer.source.writer import write, write_folder
from jaxtransfer.tree import RuleError, flatten
from tests import tiny

RULES = [(r"blocks/\d+/(attention|mlp)/(query|value|up)/kernel", "nf4"), (r".*/(kernel|embedding)", "int8")]
SPLIT = [
    (r".*/(query|value|up)/kernel", P("fsdp", "tensor")),
    (r".*/(key|down)/kernel", P("tensor", "fsdp")),
    (r"embed/word/embedding", P(("fsdp", "tensor"))),
]
UP = "blocks/0/mlp/up/kernel"


def wide(dtype=jnp.bfloat16):
    """Two of NF4's blocks, and two of its groups, in every kernel."""
    source = tiny.source(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    return dataclasses.replace(source, params=jax.tree.map(lambda x: x.astype(dtype), source.params))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same bfloat16 model in both formats."""
    root = tmp_path_factory.mktemp("formats")
    for form in ("hf", "orbax"):
        export(wide(), root / form, format=form)
    return root


def assert_same(got, want):
    got, want = flatten(got), flatten(want)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        assert (got[path].dtype, tiny.bits(got[path])) == (leaf.dtype, tiny.bits(leaf)), path


@pytest.mark.parametrize("form, dtype", [("hf", None), ("hf", "float32"), ("orbax", None)])
@pytest.mark.parametrize("meshed", [False, True])
def test_it_is_what_quantising_afterwards_gives(form, dtype, meshed, folders, devices):
    """Int8's scale is of all shards of the inputs, NF4's blocks and groups of one shard: both the whole's."""
    how = {"mesh": make_mesh(data=2, fsdp=2, tensor=2), "sharding": SPLIT} if meshed else {}
    got = load(folders / form, dtype=dtype, quantize=RULES, **how)
    want = quantize(load(folders / form, dtype=dtype), RULES)
    assert_same(got.params, want.params)
    assert jax.tree.structure(got.params) == jax.tree.structure(want.params)  # and stands for the same dtype
    assert got.lineage.operations == want.lineage.operations == ("quantize(17 leaves: int8, nf4)",)
    assert got.lineage.digest == want.lineage.digest
    assert set(got.lineage.fingerprints) == set(flatten(got.params))
    assert got.lineage.fingerprints.items() <= want.lineage.fingerprints.items()
    if meshed:
        places = flatten(shardings(want.params, how["mesh"], SPLIT))
        assert {path: leaf.sharding for path, leaf in flatten(got.params).items()} == places
        assert got.params["blocks"]["0"]["mlp"]["up"]["kernel"].codes.addressable_shards[0].data.shape == (32, 128)


def test_a_generic_rule_sees_what_will_be_kept(folders, devices):
    mesh = make_mesh(fsdp=8)
    got = load(
        folders / "hf", quantize=RULES, mesh=mesh, sharding=lambda model, params: fsdp(params, mesh, min_size=64)
    )
    want = quantize(load(folders / "hf"), RULES)
    assert_same(got.params, want.params)
    assert got.params["embed"]["word"]["embedding"].q.sharding.spec == P(None, "fsdp")


def test_the_source_stands_for_its_packed_leaves(folders):
    """A checkpoint of a LoRA over it need not hold them."""
    source = load(folders / "hf", quantize=RULES)
    adapted = attach(source, [(UP, lora(2))], jax.random.key(0))
    packed = {path for path in flatten(adapted.params) if path.startswith(f"{UP}@base@")}
    assert len(packed) == 4 and packed <= set(adapted.lineage.fingerprints)
    labels = tiny.labels_of(adapted, groups.adapters(adapted.model))
    assert {path for path, label in flatten(labels).items() if label != "frozen"} & packed == set()


def test_a_new_head_is_put_on_a_quantised_trunk(folders):
    head = heads.classifier(2)
    source = load(folders / "hf", head=head, key=jax.random.key(0), quantize=RULES)
    assert source.model.head == head and isinstance(source.params["head"]["out"]["kernel"], jax.Array)
    assert source.lineage.operations[0] == "quantize(16 leaves: int8, nf4)"
    assert apply(source.model, source.params, tiny.batch())["logits"].shape == (16, 2)


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_a_bare_trunk_has_no_head_for_rules_to_find(form, folders):
    assert "head" not in load(folders / form, head=None, quantize=RULES).params
    with pytest.raises(RuleError, match=r"rule 'head/out/kernel' matches none"):
        load(folders / form, head=None, quantize=[("head/out/kernel", "int8")])


@pytest.mark.parametrize("form", ["hf", "orbax"])
@pytest.mark.parametrize(
    "rules, error, message",
    [
        ([(UP, "int3")], QuantizeError, "'int3' is not one of int8, nf4"),
        ([("embed/word/embedding", "nf4")], QuantizeError, "embed/word/embedding: NF4 takes matrices"),
        ([("blocks/0/mlp/up/bias", "int8")], QuantizeError, r"int8 takes kernels and embeddings, got shape \(256,\)"),
        ([("blocks/0/mlp/upp/kernel", "int8")], RuleError, "matches none of 41 leaves; nearest paths: " + UP),
        ([(".*/kernel", "int8"), (UP, "nf4")], RuleError, f"rule '{UP}' never wins"),
    ],
)
def test_wrong_rules_are_refused_before_anything_is_read(form, rules, error, message, folders, monkeypatch):
    monkeypatch.setattr(placing, "arrays", None)
    monkeypatch.setattr(orbax_folder, "read", None)
    with pytest.raises(error, match=message):
        load(folders / form, quantize=rules)


@pytest.mark.parametrize(
    "spec, message",
    [
        (P("fsdp"), rf"{UP}@scales: a dimension of 2 does not divide by fsdp = 8"),
        (P(None, "fsdp"), rf"{UP}@spread: a dimension of 4 does not divide by fsdp = 8"),
    ],
)
def test_a_shard_that_cuts_a_block_or_a_group_is_refused(spec, message, folders, devices):
    with pytest.raises(ShardingError, match=message):
        load(folders / "hf", quantize=RULES, mesh=make_mesh(fsdp=8), sharding=[(UP, spec)])


@pytest.mark.parametrize("meshed", [False, True])
def test_values_that_are_not_finite_are_found_as_well(meshed, folders, tmp_path, devices):
    from jaxtransfer.source import TensorFile

    stored = TensorFile(folders / "hf" / "model.safetensors")
    tensors = {name: stored.read(name).copy() for name in stored.tensors}
    tensors["bert.encoder.layer.0.intermediate.dense.weight"][-1, -1] = np.nan
    write(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    (tmp_path / "config.json").write_text((folders / "hf" / "config.json").read_text())
    how = {"mesh": make_mesh(data=2, fsdp=2, tensor=2), "sharding": SPLIT} if meshed else {}
    with pytest.raises(SourceError, match=f"NaN or infinite values in {UP};"):
        load(tmp_path, quantize=RULES, **how)


def test_few_leaves_are_there_in_full_at_a_time(folders, devices, monkeypatch):
    """A device's part of a leaf is copied as it is stored, and only once all leaves but one before it are packed."""
    reads, packed, ahead = [], [], []
    copied, quantized = placing.copied, placing.quantized

    def counting_copy(view, dtype):
        if view.shape in parts:
            reads.append(dtype)
            ahead.append(-(-len(reads) // 8) - len(packed))
        return copied(view, dtype)

    def counting_quantize(path, array, method, **how):
        assert array.dtype == jnp.bfloat16
        done = jax.block_until_ready(quantized(path, array, method, **how))
        packed.append(path)
        return done

    monkeypatch.setattr(placing, "copied", counting_copy)
    monkeypatch.setattr(placing, "quantized", counting_quantize)
    parts = {(64, 64), (64, 128), (128, 64)}
    load(folders / "hf", dtype="float32", mesh=make_mesh(data=2, fsdp=2, tensor=2), sharding=SPLIT,
         quantize=[RULES[0], (r"blocks/.*/(key|down)/kernel", "int8")])  # fmt: skip
    assert len(packed) == 10 and reads == [np.dtype(jnp.bfloat16)] * 80
    assert max(ahead) <= placing.AHEAD + 1


MEMORY = """
import sys, threading, time
import jax
from jaxtransfer.source import load

def anonymous():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

rules = [(".*/(kernel|embedding)", "int8")] if sys.argv[3] == "int8" else [("blocks/.*/kernel", "nf4")]
load(sys.argv[1], quantize=rules)
peak, base, done = 0, anonymous(), threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
source = load(sys.argv[2], quantize=rules)
done.set()
watcher.join()
print(peak - base, sum(leaf.nbytes for leaf in jax.tree.leaves(source.params)))
"""


@pytest.mark.parametrize("method", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_anonymous_memory_is_that_of_the_packed_model_and_a_few_leaves(method, tmp_path):
    """A bfloat16 decoder of 16 layers: what comes beside the packed bytes is a few kernels', not the model's."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 1024, "num_attention_heads": 8}
    raw = {"model_type": "llama", **sizes, "num_key_value_heads": 8, "max_position_embeddings": 64}
    raw |= {"architectures": ["LlamaModel"]}
    folders = [(tmp_path / "warm", 1), (tmp_path / "big", 16)]
    for folder, layers in folders:
        written = _write(folder, raw | {"num_hidden_layers": layers})
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MEMORY, *(str(folder) for folder, _ in folders), method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak, held = map(float, done.stdout.split())
    leaf = 512 * 2048 * 2
    assert written > 130e6 and held < written * (0.35 if method == "nf4" else 0.55)
    # Two or three leaves as stored, one byte an element of codes before they are packed, and a quarter for the rest.
    assert peak <= 1.25 * held + 6 * leaf, f"{peak / 1e6:.0f} MB for {held / 1e6:.0f} MB of {written / 1e6:.0f}"


def _write(folder: Path, raw):
    """A checkpoint of constants; returns its bytes."""
    folder.mkdir()
    kind = family("llama")
    model = kind.build(raw, None)
    shapes = flatten(abstract_init(model))
    rows = kind.names(model).export_names(shapes, with_prefix=False)
    half = np.dtype(jnp.bfloat16)
    tensors = {name: turn(np.full(shapes[path].shape, 0.5, half), how) for path, (name, how) in rows.items()}
    write_folder(folder, tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    return sum(array.nbytes for array in tensors.values())
