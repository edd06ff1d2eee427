"""Configurations: what is refused and how it says so, what a value means, and the round trip."""

import dataclasses
import time
import types
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtransfer import config
from jaxtransfer.config import ConfigError, adapters, document, objectives, optimizers, schema
from jaxtransfer.config.secrets import redact
from jaxtransfer.data.augment import Augment
from jaxtransfer.data.sources import DataSpec
from jaxtransfer.optim import OPTIMIZERS, Group

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "launch"]

BASE = """\
source: {ref: some/model}
data:
  train: {path: train.jsonl}
optimizer:
  lr: 1e-4
run: {epochs: 3}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="base.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def message(error, folder):
    """The one line of an error, with the file's name alone."""
    text = str(error.value)
    assert "\n" not in text
    return text.replace(f"{folder}/", "")


SCALARS = {
    "1e-4": 1e-4,
    "1e6": 1e6,
    "-2.5E+3": -2500.0,
    ".5": 0.5,
    "12": 12,
    "-7": -7,
    "0": 0,
    "true": True,
    "false": False,
    "null": None,
    "~": None,
    "": None,
    # Each of these is something else to PyYAML.
    "no": "no",
    "on": "on",
    "yes": "yes",
    "Off": "Off",
    "0123": "0123",
    "0x10": "0x10",
    "1_000": "1_000",
    "1:30": "1:30",
    "2020-01-01": "2020-01-01",
    ".inf": ".inf",
    ".nan": ".nan",
    "'1e-4'": "1e-4",
    '"null"': "null",
    "9" * 400: "9" * 400,
}


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_are_what_is_written(text):
    value = document.parse(f"key: {text}")[0]["key"]
    assert value == SCALARS[text]
    assert type(value) is type(SCALARS[text])


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED = {
    "duplicate key": ("lr: 1\nlr: 2", ":2: lr: the key is given twice"),
    "duplicate nested": ("run: {epochs: 1,\n epochs: 2}", ":2: run.epochs: the key is given twice"),
    "alias bomb": (BOMB, ":1: anchors and aliases ('a') are refused"),
    "alias": ("a: *b", ":1: anchors and aliases ('b') are refused"),
    "merge": ("a: &a {b: 1}\nc: {<<: *a}", ":1: anchors and aliases"),
    "nested lists": ("[" * 20_000 + "]" * 20_000, ":1: nested more than 32 deep"),
    "nested block": ("- " * 20_000 + "a", ":1: nested more than 32 deep"),
    "nested mappings": ("{a: " * 20_000, ":1: nested more than 32 deep"),
    "python object": ("a: !!python/object/apply:os.system [id]", "python/object/apply:os.system' is refused"),
    "python name": ("a: !!python/name:os.system", "is refused; a configuration holds plain values"),
    "own tag": ("a: !include x.yaml", "the tag '!include' is refused"),
    "standard tag": ("a: !!str 5", "is refused"),
    "two documents": ("a: 1\n---\nb: 2", ":2: a second document"),
    "unclosed": ("a: [1, 2", "not valid YAML"),
    "tab": ("a: 1\n\tb: 2", ":2: not valid YAML"),
    "mapping key": ("{[a]: 1}", "a key must be text"),
    "infinite": ("lr: 1e999", "the number 1e999 is out of range"),
    "NUL": ('a: "x\\0y"', "control character '\\x00'"),
    "escape": ('a: "\\e[31m"', "control character '\\x1b'"),
    "raw control": ("a: \x07", "not valid YAML"),
    "surrogate": ('a: "\\ud800"', "control character '\\ud800'"),
    "no character": ('a: "\\U99999999"', ":1: not valid YAML"),
    "long version": (f"%YAML {'9' * 5000}.1\n---\na: 1", "not valid YAML"),
    "too many values": ("- a\n" * 100_000, "more than 20000 values"),
    "too large": ("#" * (1 << 20) + "#", "larger than 1 MiB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_document_is_refused_at_once(case):
    text, expected = REFUSED[case]
    start = time.process_time()
    with pytest.raises(ConfigError) as error:
        document.parse(text, "x.yaml")
    assert expected in str(error.value)
    assert str(error.value).startswith("x.yaml:")
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 2


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab:-[]{},&*!|>'\"%@`#? \n\t\\0x1e.~<="), max_size=60) | st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        document.parse(text)
    except ConfigError:
        pass


scalars = st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cc", "Cs"])) | st.sampled_from(
    [*SCALARS, "a\nb", " a ", "a: b", "- a", "#a", "a #b", "=", "<<", "\t", "\u2028", "x" * 300 + " y " * 80]
)
values = st.recursive(
    scalars | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(values)
def test_what_is_rendered_is_read_back(value):
    back, _ = document.parse(document.render(value))
    assert back == value
    assert repr(back) == repr(value)  # 1 is not 1.0 is not True, and -0.0 is not 0.0


WRONG = {
    "unknown key": ("optimizer.lrr: 1", "optimizer.lrr: unknown key; did you mean 'lr'?; known: name, lr, "),
    "unknown section": ("optimiser.lr: 1", "optimiser: unknown key; did you mean 'optimizer'?"),
    "far-off key": ("mesh.qqq: 1", "mesh.qqq: unknown key; known: data, fsdp, tensor"),
    "unknown data key": ("data.train.colums: {}", "data.train.colums: unknown key; did you mean 'columns'?"),
    "text for number": ("optimizer.lr: fast", "optimizer.lr: expected a number, got 'fast'"),
    "octal": ("data.batch: 0123", "data.batch: expected an integer, got '0123'"),
    "float for integer": ("data.batch: 16.0", "data.batch: expected an integer, got 16.0"),
    "true for integer": ("data.batch: true", "data.batch: expected an integer, got True"),
    "true for number": ("optimizer.lr: true", "optimizer.lr: expected a number, got True"),
    "yes for boolean": ("data.train.unique: yes", "data.train.unique: expected true or false, got 'yes'"),
    "null": ("optimizer.lr: null", "optimizer.lr: expected a number, got None"),
    "list for section": ("run: [1]", "run: expected a mapping, got [1]"),
    "text for list": ("data.buckets: 128", "data.buckets: expected a list, each an integer, got 128"),
    "item": ("data.buckets: [64, x]", "data.buckets[1]: expected an integer, got 'x'"),
    "pair": ("adapt.rules: [[a]]", "adapt.rules[0]: expected [text, text], got ['a']"),
    "literal": (
        "adapt.train: heads",
        "adapt.train: expected one of full, head, last, rules, adapters, lora_plus, biases, norms, got 'heads'; did",
    ),
    "literal's type": ("run.remat: true", "run.remat: expected one of full, dots, got True"),
    "optimizer": ("optimizer.name: adam", "optimizer.name: expected one of adamw, sgd"),
    "kind": (
        "task.kind: {a: 1}",
        "task.kind: expected one of text-classification, token-classification, question-answering, causal-lm, masked",
    ),
    "missing": ("source: {}", "source.ref: missing; expected text"),
    "missing path": ("data.train: {}", "data.train.path: missing; expected text"),
    "empty ref": ("source.ref: ''", "source.ref: must be a folder"),
    "lr": ("optimizer.lr: 0", "optimizer.lr: must be positive, got 0.0"),
    "warmup": ("optimizer.warmup: 1", "optimizer.warmup: must be in [0, 1), got 1.0"),
    "weight decay": ("optimizer.weight_decay: -1", "optimizer.weight_decay: must be at least 0, got -1.0"),
    "clip": ("optimizer.clip: 0", "optimizer.clip: must be positive or null, got 0.0"),
    "layer decay": ("optimizer.layer_decay: 1.5", "optimizer.layer_decay: must be in (0, 1] or null, got 1.5"),
    "unread moment": ("optimizer.momentum: 0.9", "optimizer.momentum: is not read by adamw"),
    "group": ("optimizer.groups: {head: {lr: -1}}", "optimizer.groups.head.lr: must be positive, got -1.0"),
    "group's moment": (
        "optimizer.groups: {head: {name: sgd, b1: 0.5}}",
        "optimizer.groups.head.b1: is not read by sgd",
    ),
    "batch": ("data.batch: 0", "data.batch: must be at least 1, got 0"),
    "buckets": ("data.buckets: [128, 64]", "data.buckets: must be increasing lengths, got [128, 64]"),
    "no buckets": ("data.buckets: []", "data.buckets: must be increasing lengths, got []"),
    "last bucket": ("data.buckets: [32, 64]", "data.buckets: must end with task.max_length, 128; got 64"),
    "other task": (
        "task: {kind: gpt}",
        "task.kind: expected one of text-classification, token-classification, question-answering",
    ),
    "other task's option": (
        "task.packing: true",
        "task.packing: is not read by text-classification, but by causal-lm",
    ),
    "option of two others": (
        "task: {kind: causal-lm, labels: [a, b]}",
        "task.labels: is not read by causal-lm, but by text-classification, token-classification and image-",
    ),
    "nobody's option": ("task: {kind: causal-lm, pack: 1}", "task.pack: unknown key; did you mean 'packing'?"),
    "no task": ("task: 1", "task: expected a mapping, got 1"),
    "task's range": ("task: {kind: causal-lm, max_length: 0}", "task.max_length: must be at least 1, got 0"),
    "record in a task": (
        "task: {kind: image-classification, augment: {pad: -1}}",
        "task.augment.pad: must be at least 0",
    ),
    "pair or number": (
        "task: {kind: image-classification, size: [1]}",
        "task.size: expected an integer or [an integer, an integer] or null, got [1]",
    ),
    "smoothing": ("task.label_smoothing: 1", "task.label_smoothing: must be in [0, 1), got 1.0"),
    "labels": ("task.labels: [a, a]", "task.labels: must be two or more different names"),
    "split": ("data.train.split: [5, 2]", "data.train.split: must be [start, stop]"),
    "encoding": ("data.train.encoding: utf8000", "data.train.encoding: 'utf8000' is unknown"),
    "both lengths": ("run: {epochs: 1, steps: 5}", "run.epochs: give either epochs or steps"),
    "no length": ("run: {seed: 1}", "run.epochs: give either epochs or steps"),
    "no epochs": ("run.epochs: 0", "run.epochs: must be at least 1, got 0"),
    "seed": ("run.seed: -1", "run.seed: must be in [0, 2**32), got -1"),
    "patience": ("run.patience: 2", "run.patience: needs data.validation"),
    "last unread": ("adapt.last: 2", "adapt.last: is only read with train: last, got train: full"),
    "last missing": ("adapt.train: last", "adapt.last: is needed with train: last"),
    "rules unread": ("adapt.rules: [[a, b]]", "adapt.rules: is only read with train: rules"),
    "no method": ("adapt.adapters: [{rank: 4}]", "adapt.adapters[0].method: missing; expected one of lora, dora, ia3"),
    "no such method": ("adapt.adapters: [{method: lor}]", "adapt.adapters[0].method: expected one of lora, dora"),
    "other method's option": (
        "adapt.adapters: [{method: lora}, {method: ia3, rank: 4}]",
        "adapt.adapters[1].rank: is not read by ia3, but by lora, dora and vera",
    ),
    "no method's option": (
        "adapt.adapters: [{method: dora, rnak: 4}]",
        "adapt.adapters[0].rnak: unknown key; did you mean 'rank'?",
    ),
    "rank": ("adapt.adapters: [{method: lora, rank: 0}]", "adapt.adapters[0].rank: must be at least 1, got 0"),
    "alpha": ("adapt.adapters: [{method: dora, alpha: 0}]", "adapt.adapters[0].alpha: must be positive or null, got 0"),
    "dropout": ("adapt.adapters: [{method: vera, dropout: 1}]", "adapt.adapters[0].dropout: must be in [0, 1), got 1"),
    "places": (
        "adapt.adapters: [{method: bottleneck, where: []}]",
        "adapt.adapters[0].where: must be one or more different places, got []",
    ),
    "place": (
        "adapt.adapters: [{method: bottleneck, where: [head]}]",
        "adapt.adapters[0].where[0]: expected one of attention, mlp, got 'head'",
    ),
    "length": ("adapt.adapters: [{method: prompt, length: 0}]", "adapt.adapters[0].length: must be at least 1, got 0"),
    "untrained adapters": (
        "adapt.adapters: [{method: lora}]",
        "adapt.adapters: are trained by train: adapters, lora_plus or rules, got train: full",
    ),
    "no adapters": ("adapt.train: adapters", "adapt.adapters: is needed with train: adapters"),
    "quantisation": ("adapt.quantize: [[a, nf5]]", "adapt.quantize[0][1]: expected one of nf4, int8, got 'nf5'"),
    "mesh": ("mesh.fsdp: 0", "mesh.fsdp: must be at least 1, got 0"),
    "seeds": ("study.seeds: [1, 1]", "study.seeds: must be one or more different integers"),
    "budgets": ("study.budgets: [5, 5]", "study.budgets: must be increasing numbers of examples, got [5, 5]"),
    "no budgets": ("study.budgets: []", "study.budgets: must be increasing numbers of examples, got []"),
    "variable": ("data.train.path: '${HOME}/x'", "data.train.path: only ${JAXTRANSFER_DATA} is expanded"),
    "token": ("source.ref: hf_abcdefghijklmnopqrst", "source.ref: holds a token or password"),
    "login": ("data.train.path: https://me:pass@host/x", "data.train.path: holds a token or password"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_from_overrides(case, write, tmp_path):
    text, expected = WRONG[case]
    key, _, value = text.partition(": ")
    with pytest.raises(ConfigError) as error:
        config.load(write(BASE), [(key, value.strip("'"))])
    # Where another key than the overridden one is at fault, its line in the file is told.
    where = ("command line: --", "base.yaml:3: ", "base.yaml:6: ", "base.yaml: ")
    assert message(error, tmp_path).startswith(tuple(f"{place}{expected}" for place in where))


# In a file a number is no text; an override of a text is taken as it is.
IN_FILES = {**WRONG, "number for text": ("source.revision: 7", "source.revision: expected text, got 7")}


@pytest.mark.parametrize("case", IN_FILES)
def test_wrong_values_from_a_file(case, write, tmp_path):
    text, expected = IN_FILES[case]
    key, _, value = text.partition(": ")
    raw = node = document.parse(BASE)[0]
    *parents, last = key.split(".")
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = document.parse(value)[0]
    with pytest.raises(ConfigError) as error:
        config.load(write(document.render(raw)))
    assert message(error, tmp_path).startswith("base.yaml")
    assert message(error, tmp_path).partition(": ")[2].startswith(expected)


def test_errors_name_the_line(write, tmp_path):
    path = write("source: {ref: a}\ndata:\n  train: {path: x}\nrun:\n  epochs: 3\n  sed: 1\n")
    with pytest.raises(ConfigError) as error:
        config.load(path)
    assert message(error, tmp_path).startswith("base.yaml:6: run.sed: unknown key; did you mean 'seed'?")
    assert error.value.path == "run.sed"


FILES = {
    "not text": (b"\xff\xfe", "not UTF-8: byte 0xff at 0"),
    "empty": (b"", "expected a mapping, got None"),
    "list": (b"- a", "expected a mapping, got ['a']"),
    "too large": (b"#" * (2 << 20), "larger than 1 MiB"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_configuration(case, write):
    data, expected = FILES[case]
    with pytest.raises(ConfigError, match=expected.replace("[", r"\[")):
        config.load(write(data))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        config.load(tmp_path)


def test_overrides_reach_every_depth(write):
    found = config.load(
        write(BASE),
        [
            ("optimizer.lr", "1e-3"),
            ("optimizer.groups.head.lr", "1e-2"),
            ("data.train.path", "a: b"),  # text is taken as it is
            ("source.revision", "0123"),
            ("data.test.path", "test.jsonl"),
            ("study.seeds", "[3, 4]"),
            ("run.epochs", "null"),
            ("run.steps", "7"),
            ("task.labels", "[no, yes]"),
            ("out", "1e-4"),
        ],
    )
    assert found.optimizer.lr == 1e-3
    assert found.optimizer.group("head").lr == 1e-2
    assert found.data.train.path == "a: b"
    assert found.source.revision == "0123"
    assert found.data.test == DataSpec("test.jsonl")
    assert found.study == schema.StudyConfig(seeds=(3, 4))
    assert (found.run.epochs, found.run.steps) == (None, 7)
    assert found.task.labels == ("no", "yes")
    assert found.out == "1e-4"
    assert config.load(write(BASE), [("source.revision", "x"), ("source.revision", "null")]).source.revision is None


def test_overrides_reach_into_lists(write, tmp_path):
    path = write(BASE + "adapt: {train: adapters, adapters: [{method: lora}, {method: prompt}]}\n")
    given = [("adapt.adapters.0.rank", "2"), ("adapt.adapters.0.targets", "1e-4"), ("adapt.adapters.1.length", "3")]
    first, second = config.load(path, given).adapt.adapters
    assert (first.rank, first.targets, second.length) == (2, "1e-4", 3)
    for key, says in (
        ("adapt.adapters.2.rank", r"--adapt.adapters.2.rank: adapt.adapters is \[.*, which has no item 2"),
        ("adapt.adapters.rank", "which has no item rank"),
    ):
        with pytest.raises(ConfigError, match=says):
            config.load(path, [(key, "1")])
    with pytest.raises(ConfigError) as error:
        config.load(path, [("adapt.adapters.1.rank", "2")])
    assert message(error, tmp_path).startswith("command line: --adapt.adapters[1].rank: is not read by prompt, but by")


def test_an_override_of_a_value_as_if_it_had_keys(write):
    with pytest.raises(ConfigError, match=r"--optimizer.lr.x: optimizer.lr is 0.0001, which has no keys"):
        config.load(write(BASE), [("optimizer.lr.x", "1")])


def test_out_is_by_default_named_after_the_file(write):
    assert config.load(write(BASE, "mine.yaml")).out == "runs/mine"


def test_only_one_variable_is_expanded(write, monkeypatch):
    text = BASE.replace("train.jsonl", '"${JAXTRANSFER_DATA}/x", without: "${JAXTRANSFER_DATA}/y"')
    monkeypatch.setenv("JAXTRANSFER_DATA", "/data")
    assert config.load(write(text)).data.train.path == "/data/x"
    assert config.load(write(text)).data.train.without == "/data/y"
    monkeypatch.delenv("JAXTRANSFER_DATA")
    assert config.load(write(text)).data.train.path == "../shared/data/x"


def test_a_group_inherits_only_what_its_optimizer_reads():
    found = config.OptimizerConfig(b1=0.8, groups={"head": config.GroupConfig(name="sgd", momentum=0.5)})
    assert found.group("body").b1 == 0.8
    assert (found.group("head").b1, found.group("head").momentum) == (None, 0.5)
    assert found.group("head").weight_decay == found.weight_decay


IMAGES = {"kind": "image-classification"}
PART = {"data": {"train": {"path": "p.jsonl"}}, "run": {"epochs": 1}}
CROSSED = {
    "lengths of images": (
        {"task": IMAGES, "data": {"train": {"path": "x"}, "buckets": [8]}},
        "data.buckets: are lengths of texts, image-classification has none",
    ),
    "a control of itself": (
        {"source": {"ref": "a", "init": "scratch"}, "study": {}}, "study: needs a source with weights, source.init",
    ),
    "nothing to forget": (
        {"source": {"ref": "a", "init": "scratch"}, "data": {"train": {"path": "x"}, "retain": {"path": "y"}}},
        "data.retain: needs a source with weights",
    ),
    "LoRA+ without LoRA": (
        {"adapt": {"train": "lora_plus", "adapters": [{"method": "ia3"}]}},
        "adapt.train: lora_plus gives the b of lora and dora a rate of its own, got ia3",
    ),
    "adapters on nothing": (
        {"source": {"ref": "a", "init": "scratch"}, "adapt": {"train": "adapters", "adapters": [{"method": "lora"}]}},
        "adapt.adapters: needs a source with weights, source.init",
    ),
    "nothing packed": (
        {"source": {"ref": "a", "init": "scratch"}, "adapt": {"quantize": [[".*", "int8"]]}},
        "adapt.quantize: needs a source with weights",
    ),
    "scratch twice": ({"source": {"ref": "a", "init": "scratch"}, "pretrain": PART}, "pretrain: needs a source with"),
    "retain before": (
        {"pretrain": {**PART, "data": {"train": {"path": "x"}, "retain": {"path": "y"}}}},
        "pretrain.data.retain: what is trained from scratch has no domain before it",
    ),
    "pretraining's buckets": (
        {"pretrain": {**PART, "data": {"train": {"path": "x"}, "buckets": [8]}}},
        "pretrain.data.buckets: must end with task.max_length, 128; got 8",
    ),
    "pretraining's variable": (
        {"pretrain": {**PART, "data": {"train": {"path": "${HOME}"}}}}, "pretrain.data.train.path: only ${JAXTRANSFER",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CROSSED)
def test_what_does_not_go_together(case):
    changes, expected = CROSSED[case]
    with pytest.raises(ConfigError) as error:
        config.from_dict({**document.parse(BASE)[0], "out": "x", **changes})
    assert str(error.value).startswith(expected)


def test_the_run_that_makes_the_source():
    labelled = {"kind": "text-classification", "labels": ["x", "y"], "max_length": 64}
    raw = {**document.parse(BASE)[0], "out": "runs/x", "task": labelled, "mesh": {"data": 2}}
    whole = config.from_dict({**raw, "pretrain": {**PART, "optimizer": {"lr": 0.5}}})
    part = whole.pretraining()
    assert (part.source.ref, part.source.init, part.out) == ("some/model", "scratch", "runs/x/pretrain")
    assert part.task == dataclasses.replace(whole.task, labels=None)
    assert (part.data.train.path, part.optimizer.lr, part.mesh, part.study) == ("p.jsonl", 0.5, whole.mesh, None)
    assert part.pretraining() is config.from_dict(raw).pretraining() is None
    own = config.from_dict({**raw, "pretrain": {**PART, "task": {"kind": "causal-lm"}}}).pretraining()
    assert own.task == config.CausalLMConfig(kind="causal-lm")


def test_a_prompt_stands_before_no_packed_row(write):
    adapt = ("adapt", "{train: adapters, adapters: [{method: prompt}]}")
    with pytest.raises(
        ConfigError, match=r"task\.packing: one prompt cannot stand before .*; set task\.packing: false"
    ):
        config.load(write(BASE), [("task", "{kind: causal-lm}"), adapt])
    config.load(write(BASE), [("task", "{kind: causal-lm, packing: false}"), adapt])


def test_buckets_are_those_of_the_task(write):
    found = [
        config.load(write(BASE), [("task", f"{{kind: {kind}{more}}}")]).buckets
        for kind, more in [
            ("text-classification", ", max_length: 100"),
            ("causal-lm", ""),
            ("image-classification", ""),
        ]
    ]
    assert found == [(32, 64, 100), (32, 64, 128, 256, 512), ()]


def test_optimizers_agree_with_what_is_on_offer():
    assert set(typing.get_args(optimizers.OptimizerName)) == set(OPTIMIZERS) == set(optimizers.READS)
    fields = {field.name for field in dataclasses.fields(Group)}
    assert {field.name for field in dataclasses.fields(config.GroupConfig)} - {"name"} <= fields


none = st.none()


def strategy(kind):
    """Values of a field's type that its record accepts."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.fixed_dictionaries(
            {f.name: strategy(hints[f.name]) for f in dataclasses.fields(kind) if f.default is f.default_factory},
            optional={
                f.name: SPECIAL.get((kind, f.name), strategy(hints[f.name]))
                for f in dataclasses.fields(kind)
                if f.default is not f.default_factory
            },
        )
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.lists(strategy(args[0]), max_size=3) if args[-1] is Ellipsis else st.tuples(*map(strategy, args))
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*[none if arg is type(None) else strategy(arg) for arg in args])
    if origin is not None:
        return st.dictionaries(texts, strategy(args[1]), max_size=2)
    return {
        str: texts.filter(lambda text: text and "${" not in text and redact(text) == text),
        int: st.integers(1, 2**31),
        float: st.floats(0.001, 0.999),
        bool: st.booleans(),
    }[kind]


OF_NO_DOMAIN = (
    objectives.L2SPConfig | objectives.BSSConfig | objectives.R3FConfig | objectives.FeatureDistillationConfig
)
TERMS = st.lists(st.deferred(lambda: strategy(OF_NO_DOMAIN)), max_size=2, unique_by=lambda raw: raw["method"])

SPECIAL = {
    **{
        (kind, "max_length"): st.just(128)
        for kind in (config.TextClassificationConfig, config.CausalLMConfig, config.MaskedLMConfig)
    },
    **{
        (kind, "labels"): none | st.lists(texts, min_size=2, max_size=3, unique=True)
        for kind in (config.TextClassificationConfig, config.ImageClassificationConfig)
    },
    **{
        (kind, "head"): st.just("fresh") for kind in (config.TextClassificationConfig, config.ImageClassificationConfig)
    },
    **{(schema.DataConfig, name): none for name in ("target", "replay")},
    (config.ObjectiveConfig, "task"): st.floats(0.001, 9.0),
    (config.ObjectiveConfig, "memory"): none,
    (config.ObjectiveConfig, "terms"): TERMS,
    (config.ImageClassificationConfig, "channels"): none | st.sampled_from([1, 3]),
    (Augment, "crop_scale"): st.just((0.25, 0.5)),
    (Augment, "crop_ratio"): none,
    (config.Config, "pretrain"): none,
    (config.Config, "phases"): st.just([]),
    (schema.SourceConfig, "init"): st.just("pretrained"),
    (schema.StudyConfig, "budgets"): none | st.just((5, 10)),
    (schema.DataConfig, "buckets"): none | st.sampled_from([(128,), (8, 128)]),
    (schema.AdaptConfig, "train"): st.just("full"),
    (schema.AdaptConfig, "last"): none,
    (schema.AdaptConfig, "rules"): st.just([]),
    (schema.AdaptConfig, "adapters"): st.just([]),
    (adapters.BottleneckConfig, "where"): st.just(["mlp"]),
    (schema.StudyConfig, "seeds"): st.lists(st.integers(0, 9), min_size=1, unique=True),
    (schema.RunConfig, "steps"): none,
    (schema.RunConfig, "epochs"): st.integers(1, 9),
    (schema.RunConfig, "patience"): none,
    (DataSpec, "encoding"): st.sampled_from(["utf-8", "latin-1"]),
    (DataSpec, "delimiter"): none | st.sampled_from(["\t", ";", " "]),
    (DataSpec, "pattern"): none,
    (DataSpec, "split"): none | st.just((0, 5)),
    (DataSpec, "only"): st.lists(texts, max_size=2, unique=True),
    **{
        (k, name): none
        for k in (config.OptimizerConfig, config.GroupConfig)
        for name in ("momentum", "b1", "b2", "eps")
    },
}


ADAPTED = st.fixed_dictionaries(
    {
        "train": st.sampled_from(["adapters", "rules"]),
        "adapters": st.lists(strategy(adapters.AdapterConfig), min_size=1, max_size=3),
        "quantize": strategy(tuple[tuple[str, adapters.Quantization], ...]),
    }
).map(lambda raw: {**raw, **({"rules": [[".*", "trunk"]]} if raw["train"] == "rules" else {})})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=strategy(config.Config), epochs=st.integers(1, 9), adapted=none | ADAPTED)
def test_dump_and_load_round_trip(raw, epochs, adapted, tmp_path_factory):
    raw["run"] = {**raw["run"], "epochs": epochs}
    if adapted is not None:
        raw["adapt"] = adapted
    kind = raw.get("task", {}).get("kind")
    if kind == "image-classification":
        raw["data"].pop("buckets", None)
    if kind in ("causal-lm", "question-answering"):  # whose own default is not the buckets' 128
        raw["task"]["max_length"] = 128
        methods = {entry["method"] for entry in raw.get("adapt", {}).get("adapters", ())}
        raw["task"] |= {"packing": False} if kind == "causal-lm" and "prompt" in methods else {}
    found = config.from_dict(raw)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(config.dump(found), encoding="utf-8")
    assert config.load(path) == found
    assert config.dump(config.load(path)) == config.dump(found)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_are_read(path):
    found = config.load(path)
    assert found.out == f"runs/{path.stem}"
    command = "plan" if path.parent.name == "pods" else "run"
    assert f"jaxtransfer {command} {path.relative_to(ROOT)}" in path.read_text(encoding="utf-8")
    # The variant on frozen features that the recipes' heads describe.
    if found.task.kind == "text-classification" and not found.adapt.adapters:
        frozen = config.load(path, [("adapt.train", "head"), ("task.pooling", "mean"), ("optimizer.lr", "3e-3")])
        assert (frozen.adapt.train, frozen.task.pooling) == ("head", "mean")


SECRETS = {
    "hf_abcdefghijklmnop": "***",
    "see https://me:pass@host/x": "see https://***@host/x",
    "Authorization: Bearer abcdefgh.ijkl": "Authorization: Bearer ***",
    "https://h/x?a=1&X-Amz-Signature=abc&b=2": "https://h/x?a=1&X-Amz-Signature=***&b=2",
    "half_precision and a/b@c": "half_precision and a/b@c",
}


@pytest.mark.parametrize("text", SECRETS)
def test_redact(text):
    assert redact(text) == SECRETS[text]
