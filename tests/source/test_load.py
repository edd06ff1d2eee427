import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt import heads
from jaxtransfer.models import ConfigFieldError, apply
from jaxtransfer.models.names import MappingError
from jaxtransfer.parallel.specs import ShardingError
from jaxtransfer.source import SafetensorsError, SourceError, load, placing
from jaxtransfer.source.safetensors import TensorFile
from jaxtransfer.source.writer import write, write_folder
from jaxtransfer.tree import TreeError, flatten
from jaxtransfer.types import Head

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
COMPLETE = ["bert-seqcls", "roberta-mlm", "distilbert-qa", "xlm-roberta-tokencls"]


@pytest.fixture
def bert(tmp_path):
    """A copy of a tiny checkpoint to spoil: `bert.tensors` and `bert.config`, written by `bert.save()`."""
    return Checkpoint(tmp_path / "tiny")


class Checkpoint:
    def __init__(self, folder):
        self.folder = Path(shutil.copytree(GOLDENS / "bert-seqcls", folder))
        stored = TensorFile(folder / "model.safetensors")
        self.tensors = {name: stored.read(name).copy() for name in stored.tensors}
        self.config = json.loads((folder / "config.json").read_text())

    def save(self):
        write(self.folder / "model.safetensors", self.tensors, {"format": "pt"})
        (self.folder / "config.json").write_text(json.dumps(self.config))
        return self.folder


@pytest.mark.parametrize("name", COMPLETE)
def test_golden_checkpoints_load_and_compute_what_torch_computed(name):
    source = load(GOLDENS / name)
    with np.load(GOLDENS / name / "inputs.npz") as inputs, np.load(GOLDENS / name / "outputs.npz") as wanted:
        found = apply(source.model, source.params, dict(inputs))
        logits = [key for key in wanted if key.endswith("logits")]
        assert logits
        for key in logits:
            np.testing.assert_allclose(found[key], wanted[key], rtol=0, atol=1e-5 * np.abs(wanted[key]).max())
    assert source.lineage.ref == name and len(source.lineage.digest) == 64
    assert set(source.lineage.files) == {"model.safetensors", "config.json"}
    assert set(source.lineage.fingerprints) == set(flatten(source.params))


@pytest.mark.parametrize(
    "name, kind, labels",
    [
        ("bert-seqcls", "sequence-classification", ("negative", "neutral", "positive")),
        ("xlm-roberta-tokencls", "token-classification", ("negative", "neutral", "positive")),
        ("distilbert-qa", "question-answering", ()),
        ("roberta-mlm", "masked-lm", ()),
    ],
)
def test_head_of_the_checkpoint(name, kind, labels):
    assert load(GOLDENS / name).model.head == Head(kind, labels)


def test_bare_trunk_drops_the_head_for_a_reason():
    source = load(GOLDENS / "bert-seqcls", head=None)
    assert source.model.head is None and "head" not in source.params and "pooler" in source.params
    assert set(source.lineage.dropped) == {"classifier.weight", "classifier.bias"}
    assert all(source.lineage.dropped.values())


def test_new_head_over_the_trunk():
    key = jax.random.key(3)
    head = heads.classifier(["a", "b"], pooling="mean")
    source, trunk = load(GOLDENS / "bert-seqcls", head=head, key=key), load(GOLDENS / "bert-seqcls", head=None)
    assert source.model.head == head and source.params["head"]["out"]["kernel"].shape == (24, 2)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), source.params["blocks"], trunk.params["blocks"])
    assert jax.tree.all(same)
    assert len(source.lineage.operations) == 1


def test_a_new_head_needs_a_key_and_only_a_new_head():
    with pytest.raises(SourceError, match="give load a key"):
        load(GOLDENS / "bert-seqcls", head=heads.classifier(2))
    with pytest.raises(SourceError, match="expected 'checkpoint', None, or a Head with a key"):
        load(GOLDENS / "bert-seqcls", key=jax.random.key(0))
    with pytest.raises(SourceError, match="head='classifier'"):
        load(GOLDENS / "bert-seqcls", head="classifier")


def test_hub_style_extras_are_dropped_for_a_reason(bert):
    """What `bert-base-uncased` holds: old norm names, a position buffer, the pre-training heads."""
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
           for name, array in bert.tensors.items() if not name.startswith("classifier")}  # fmt: skip
    extra = {
        "bert.embeddings.position_ids": np.arange(41, dtype=np.int64)[None],
        "cls.predictions.bias": np.zeros(101, np.float32),
        "cls.predictions.transform.dense.weight": np.zeros((24, 24), np.float32),
        "cls.seq_relationship.weight": np.zeros((2, 24), np.float32),
    }
    bert.tensors = {**old, **extra}
    source = load(bert.save(), head=None)
    assert set(source.lineage.dropped) == set(extra) and all(source.lineage.dropped.values())
    plain = load(GOLDENS / "bert-seqcls", head=None)
    assert source.lineage.fingerprints == plain.lineage.fingerprints


def test_sharded_index_equals_one_file(bert):
    (bert.folder / "model.safetensors").unlink()
    assert len(write_folder(bert.folder, bert.tensors, {"format": "pt"}, shard_bytes=20_000)) > 3
    sharded, single = load(bert.folder), load(GOLDENS / "bert-seqcls")
    assert sharded.lineage.fingerprints == single.lineage.fingerprints
    assert sharded.lineage.digest != single.lineage.digest


def test_digest_tells_weights_apart(bert):
    before = load(bert.folder).lineage
    bert.tensors["classifier.bias"][0] += 1
    after = load(bert.save()).lineage
    assert before.digest != after.digest
    changed = {path for path in before.fingerprints if before.fingerprints[path] != after.fingerprints[path]}
    assert changed == {"head/out/bias"}


def missing(c):
    del c.tensors["bert.pooler.dense.bias"]
    return MappingError, "pooler/dense/bias has no tensor"


def extra(c):
    c.tensors["bert.adapter.weight"] = np.zeros(3, np.float32)
    return MappingError, "bert.adapter.weight has no place"


def misshapen(c):
    c.tensors["classifier.weight"] = np.zeros((4, 24), np.float32)
    return TreeError, r"shape of head/out/kernel: expected \(24, 3\), found \(24, 4\)"


def both_misshapen(c):
    c.tensors["classifier.weight"] = np.zeros((4, 24), np.float32)
    c.tensors["classifier.bias"] = np.zeros(4, np.float32)
    return TreeError, r"head/out/bias.*; .*head/out/kernel"


def nan(c):
    c.tensors["classifier.bias"][1] = np.nan
    c.tensors["bert.pooler.dense.weight"][0, 0] = np.inf
    return SourceError, r"NaN or infinite values in head/out/bias, pooler/dense/kernel"


def double(c):
    c.tensors["classifier.bias"] = c.tensors["classifier.bias"].astype(np.float64)
    return SourceError, "head/out/bias is float64, which jax holds only with jax_enable_x64"


def another_architecture(c):
    c.config["architectures"] = ["BertForNextSentencePrediction"]
    return SourceError, r"architectures=\['BertForNextSentencePrediction'\].*head=None loads the trunk"


def no_architecture(c):
    del c.config["architectures"]
    return SourceError, "architectures=None"


def unknown_family(c):
    c.config["model_type"] = "bart"
    return ConfigFieldError, "model_type 'bart' is not supported"


def no_family(c):
    del c.config["model_type"]
    return SourceError, "names no model_type"


def unknown_field(c):
    c.config["attention_window"] = 512
    return ConfigFieldError, "attention_window"


SPOILED = [missing, extra, misshapen, both_misshapen, nan, double, another_architecture, no_architecture]
SPOILED += [unknown_family, no_family, unknown_field]


@pytest.mark.parametrize("change", SPOILED, ids=lambda change: change.__name__)
def test_what_does_not_fit_is_an_error(bert, change):
    error, message = change(bert)
    with pytest.raises(error, match=message) as caught:
        load(bert.save())
    assert "\n" not in str(caught.value)


CONFIGS = {
    "twice": ('{"model_type": "bert", "model_type": "bert"}', "'model_type' stands there twice"),
    "list": ("[]", "expected a JSON object"),
    "broken": ("{", "is not JSON"),
    "large": ('{"a": "' + "x" * (1 << 20) + '"}', "larger than"),
    "deep": ('{"a":' + "[" * 100_000, "nested too deeply"),
    "many": ("{" + ",".join(f'"{i}":[[]]' for i in range(100_000)) + "}", "larger than|more than"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_malformed_config(bert, case):
    text, message = CONFIGS[case]
    (bert.folder / "config.json").write_text(text)
    with pytest.raises(SourceError, match=rf"config\.json: .*({message})"):
        load(bert.folder)


def test_config_never_runs_code(bert, monkeypatch):
    (bert.folder / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(bert.folder)
    monkeypatch.syspath_prepend(str(bert.folder))
    bert.config["auto_map"] = {"AutoModel": "evil.Model", "AutoConfig": "evil--evil.Config"}
    load(bert.save(), ignore=("auto_map",))
    assert "evil" not in sys.modules


def test_ignored_field(bert):
    bert.config["attention_window"] = 512
    source = load(bert.save(), ignore=("attention_window",))
    assert source.assets["config"]["attention_window"] == 512


def test_assets_and_card(bert):
    for name in ("vocab.txt", "tokenizer.json", "other.txt"):
        (bert.folder / name).write_text("x")
    (bert.folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama\nbase_model: a/b\n---\n")
    source = load(bert.folder)
    assert source.assets["files"] == {name: bert.folder / name for name in ("tokenizer.json", "vocab.txt")}
    assert source.lineage.license == "llama" and source.lineage.base_model == "a/b"
    assert source.assets["card"]["license"] == "other" and source.assets["config"] == bert.config


def test_dtypes(bert):
    bert.tensors["bert.pooler.dense.weight"] = bert.tensors["bert.pooler.dense.weight"].astype(ml_dtypes.bfloat16)
    folder = bert.save()
    stored = flatten(load(folder).params)
    assert stored["pooler/dense/kernel"].dtype == jnp.bfloat16 and stored["pooler/dense/bias"].dtype == jnp.float32
    cast = flatten(load(folder, dtype="float16").params)
    assert {leaf.dtype for leaf in cast.values()} == {np.dtype(np.float16)}
    np.testing.assert_array_equal(cast["head/out/bias"], bert.tensors["classifier.bias"].astype(np.float16))
    with pytest.raises(SourceError, match="dtype='int8': floating-point parameters cannot"):
        load(folder, dtype="int8")
    bert.tensors["classifier.bias"][0] = 1e30
    with pytest.raises(SourceError, match="NaN or infinite values as float16 in head/out/bias"):
        load(bert.save(), dtype=jnp.float16)


def mesh_of(devices):
    return Mesh(np.array(devices).reshape(4, 2), ("fsdp", "tensor"))


RULES = [
    (r"blocks/\d+/attention/(query|key|value)/kernel", P("fsdp", "tensor")),
    (r"blocks/\d+/.*/norm/.*|embed/norm/.*", P(("fsdp", "tensor"))),
    (r"pooler/dense/kernel", P(None, "tensor")),
]


def test_sharded_equals_whole(devices):
    mesh = mesh_of(devices)
    whole = load(GOLDENS / "bert-seqcls")
    parts = load(GOLDENS / "bert-seqcls", mesh=mesh, sharding=RULES)
    assert parts.lineage == whole.lineage
    have, want = flatten(parts.params), flatten(whole.params)
    assert all(np.array_equal(have[path], want[path]) for path in want)
    assert have["blocks/0/attention/query/kernel"].sharding == NamedSharding(mesh, P("fsdp", "tensor"))
    assert have["blocks/0/attention/query/kernel"].addressable_shards[0].data.shape == (6, 12)
    assert have["head/out/kernel"].sharding.is_fully_replicated


def test_only_the_shards_are_copied(devices, monkeypatch):
    """Bytes copied from the file: each device's part of a sharded leaf, a replicated leaf once."""
    copies, real = [], placing.copied

    def counting(view, dtype):
        copies.append(view.nbytes)
        return real(view, dtype)

    monkeypatch.setattr(placing, "copied", counting)
    source = load(GOLDENS / "bert-seqcls", mesh=mesh_of(devices), sharding=RULES)
    wanted = []
    for leaf in jax.tree.leaves(source.params):
        parts = [shard.data.nbytes for shard in leaf.addressable_shards]
        wanted += parts[:1] if leaf.sharding.is_fully_replicated else parts
    assert sorted(copies) == sorted(wanted)
    assert min(copies) == 3 * 4  # a norm of 24 over 8 devices


def test_slices_touch_only_their_pages(tmp_path):
    """The kernel's own count: pages of the mapping that are in memory after an eighth of the rows was read."""
    size = 32 << 20
    path = write(tmp_path / "model.safetensors", {"w": np.zeros((1024, size // 4096), np.float32)}, {})
    view = TensorFile(path).read("w")
    before = resident(path)
    view[128:256].copy()
    assert size / 8 <= resident(path) - before <= size / 6


def resident(path):
    """Bytes of a file's mappings that are mapped in (smaps)."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize(
    "rules, error, message",
    [
        ([(r"head/out/kernel", P(None, "tensor"))], ShardingError, "head/out/kernel.* 3 does not divide by tensor = 2"),
        ([(r"head/out/bias", P(None, "fsdp"))], ShardingError, "head/out/bias: the spec .* is longer"),
        ([(r"head/out/kernel", P("model"))], ShardingError, "head/out/kernel: the mesh has no axis 'model'"),
        ([(r"heads/.*", P("fsdp"))], ValueError, "matches none of"),
    ],
)
def test_bad_sharding_names_the_leaf(devices, rules, error, message):
    with pytest.raises(error, match=message):
        load(GOLDENS / "bert-seqcls", mesh=mesh_of(devices), sharding=rules)


def test_rules_without_a_mesh():
    with pytest.raises(SourceError, match="3 sharding rules but no mesh"):
        load(GOLDENS / "bert-seqcls", sharding=RULES)


def test_hash_that_the_hub_recorded_is_checked(tmp_path):
    """A folder as the hub's cache has it: links to blobs named by their SHA-256."""
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    shutil.copytree(GOLDENS / "bert-seqcls", folder)
    blobs.mkdir()
    digest = load(folder).lineage.files["model.safetensors"]

    def store(name):
        (folder / "model.safetensors").rename(blobs / name)
        (folder / "model.safetensors").symlink_to(Path("..", "..", "blobs", name))

    store(digest)
    assert load(folder).lineage.files["model.safetensors"] == digest
    content = bytearray((blobs / digest).read_bytes())
    content[-1] ^= 1
    (blobs / digest).write_bytes(content)
    with pytest.raises(SourceError, match=f"model.safetensors has SHA-256 .*, the hub recorded {digest}"):
        load(folder)


def test_a_pickle_named_safetensors(bert):
    (bert.folder / "model.safetensors").write_bytes(b"\x80\x04\x95\x20\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix")
    with pytest.raises(SafetensorsError, match="is a pickle"):
        load(bert.folder)


MEMORY = """
import gc, sys, threading, time, jax, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from jaxtransfer.source import load

def anon():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

mesh = Mesh(np.array(jax.devices()), ("fsdp",)) if len(jax.devices()) > 1 else None
rules = [(r".*/kernel|embed/word/embedding", P("fsdp"))] if mesh else ()
load(sys.argv[1])  # what compiling takes is not the checkpoint's
jax.block_until_ready(jax.device_put(0.0)); gc.collect(); base = anon(); peak = [base]; done = threading.Event()
def sample():
    while not done.wait(0.001): peak[0] = max(peak[0], anon())
thread = threading.Thread(target=sample); thread.start()
source = load(sys.argv[2], mesh=mesh, sharding=rules)
peak[0] = max(peak[0], anon()); done.set(); thread.join()
held = sum(s.data.nbytes for x in jax.tree.leaves(source.params) for s in x.addressable_shards)
print((peak[0] - base) / held, held)
"""


@pytest.mark.parametrize("count", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_anonymous_memory_is_bounded_by_the_bytes(tmp_path, count):
    """Peak anonymous memory above the baseline: at most 1.25 x the bytes (the small checkpoint warms up)."""
    config = json.loads((GOLDENS / "bert-seqcls" / "config.json").read_text())
    config |= {"architectures": ["BertModel"], "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 16000}
    config |= {"intermediate_size": 3072, "num_hidden_layers": 6}
    from jaxtransfer.models.api import abstract_init
    from jaxtransfer.models.names import turn
    from jaxtransfer.models.registry import family

    model = family("bert").build(config, None, pooler=True)
    shapes = flatten(abstract_init(model))
    rows = family("bert").names(model).export_names(shapes, with_prefix=False)
    arrays = {name: turn(np.full(shapes[path].shape, 0.5, np.float32), how) for path, (name, how) in rows.items()}
    write_folder(tmp_path, arrays, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = f"--xla_force_host_platform_device_count={count}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MEMORY, str(GOLDENS / "bert-seqcls"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    ratio, held = map(float, done.stdout.split())
    assert held > 200e6 and ratio <= 1.25, f"{ratio:.2f} x {held / 1e6:.0f} MB"


def test_minilm_gives_the_known_embedding(minilm, minilm_folder):
    transformers = pytest.importorskip("transformers")
    source = load(minilm)
    assert source.model.head is None and source.lineage.license == "apache-2.0"
    assert list(source.lineage.dropped) == ["embeddings.position_ids"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm_folder))
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    ids = np.array([tokenizer("The cat sits outside")["input_ids"]], np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    outputs = jax.jit(lambda params, batch: apply(source.model, params, batch))(source.params, batch)
    mean = np.asarray(outputs["last_hidden_state"])[0].mean(0)
    wanted = [0.13919, 0.00303, 0.04701, 0.03957, -0.04800]
    np.testing.assert_allclose(mean[:5] / np.linalg.norm(mean), wanted, rtol=0, atol=1e-5)
