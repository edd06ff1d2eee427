"""What cannot be used, through the command line: one line that names it, its exit code, nothing written or lost."""

import json
import pickle
import re
import shutil
import struct

import numpy as np
import pytest

from jaxtransfer import checkpoint, cli
from jaxtransfer import config as configs
from jaxtransfer.job import prepare
from tests.job.world import World, lines


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def command(world, tmp_path, capsys, *words, **changes):
    """Runs a command on a configuration; gives its exit code and its one line on stderr."""
    path = tmp_path / "run.yaml"
    path.write_text(configs.dump(world.config(tmp_path / "out", **changes)))
    code = cli.main([*(words or ["run"]), str(path)])
    err = capsys.readouterr().err
    assert err.startswith("jaxtransfer: error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err and "unexpected" not in err
    return code, err


def refused(monkeypatch):
    """Building the step is the last thing before work: a mistake must have come to light by then."""

    def build(*_, **__):
        raise AssertionError("the step was built")

    monkeypatch.setattr(prepare, "make_step", build)


class Checkpoint:
    """A copy of the source to spoil."""

    def __init__(self, world, tmp_path):
        self.folder = shutil.copytree(world.source, tmp_path / "spoilt")
        self.weights = self.folder / "model.safetensors"

    def config(self, **fields):
        path = self.folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def tensors(self, change):
        from safetensors.numpy import load_file, save_file

        found = dict(load_file(self.weights))
        change(found)
        save_file(found, self.weights)

    def header(self, change):
        data = self.weights.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        text = change(data[8 : 8 + size].decode().rstrip()).encode()
        self.weights.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


POSITION = "embeddings.position_embeddings.weight"
SPOILT = {
    "unsupported architecture": (lambda c: c.config(model_type="rwkv"), "'?rwkv'?.* bert"),
    "a field that changes the function": (
        lambda c: c.config(position_embedding_type="relative_key"), "position_embedding_type",
    ),
    "an unknown field": (lambda c: c.config(extra_gate=True), "extra_gate"),
    "a missing tensor": (lambda c: c.tensors(lambda t: t.pop(POSITION)), "position"),
    "an extra tensor": (lambda c: c.tensors(lambda t: t.update(gate=np.zeros(2))), "gate"),
    "a misshapen tensor": (
        lambda c: c.tensors(lambda t: t.update({POSITION: np.zeros((16, 63), np.float32)})), r"\(16, 64\).*\(16, 63\)",
    ),
    "a truncated file": (lambda c: c.weights.write_bytes(c.weights.read_bytes()[:-10]), "model.safetensors"),
    "a name twice": (
        lambda c: c.header(lambda h: f'{h[:-1]},"{POSITION}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'),
        "twice|duplicate",
    ),
    "a name like a path": (lambda c: c.header(lambda h: h.replace(POSITION, "../../etc/passwd")), "passwd"),
    "an endless shape": (
        lambda c: c.header(lambda h: h.replace("[16,64]", "[4611686018427387904,64]")), "overflows|4611686018427387904",
    ),
    "a pickle under another name": (
        lambda c: c.weights.write_bytes(pickle.dumps({"weight": [0.0] * 64})), "is a pickle",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_sources(name, world, tmp_path, capsys, monkeypatch):
    refused(monkeypatch)
    spoil, says = SPOILT[name]
    spoilt = Checkpoint(world, tmp_path)
    spoil(spoilt)
    code, err = command(world, tmp_path, capsys, source__ref=str(spoilt.folder))
    assert code == 4
    assert re.search(says, err), err
    assert not (tmp_path / "out" / "checkpoints").exists()


GOOD = '{"text": "a good lamp", "label": "positive"}\n{"text": "a bad lamp", "label": "negative"}\n'
DATA = {
    "a missing column": (b'{"text": "a", "stars": 1}\n', r"data.jsonl, line 1: .*label.*stars"),
    "an unknown label": (GOOD.encode() + b'{"text": "a", "label": "odd"}\n', r"line 3: label 'odd' is unknown; known"),
    "an empty text": (GOOD.encode() + b'{"text": " ", "label": "positive"}\n', r"line 3: text is empty"),
    "broken UTF-8": (GOOD.encode() + b'{"text": "\xff", "label": "positive"}\n', r"utf-8"),
    "broken JSON": (GOOD.encode() + b'{"text": \n', r"line 3"),
    "no rows": (b"", r"has no rows"),
    "one label": (GOOD.encode().splitlines(keepends=True)[0], r"has the one label positive"),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name, world, tmp_path, capsys, monkeypatch):
    refused(monkeypatch)
    content, says = DATA[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    labels = {} if name == "one label" else {"task__labels": ["negative", "positive"]}
    code, err = command(world, tmp_path, capsys, data__train={"path": str(path)}, **labels)
    assert code == 3
    assert re.search(says, err), err


RULES = {
    "a rule that matches nothing": (
        [["heads/.*", "head"], [".*", "frozen"]],
        "rule 'heads/.*' matches none .* head/out",
    ),
    "a label without a group": ([["head/.*", "head"], [".*", "frozn"]], "label 'frozn' .* has no optimizer group"),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("word", ["run", "explain"])
def test_rules(name, word, world, tmp_path, capsys, monkeypatch):
    refused(monkeypatch)
    rules, says = RULES[name]
    code, err = command(world, tmp_path, capsys, word, adapt={"train": "rules", "rules": rules})
    assert code == 4
    assert re.search(says, err), err


def test_the_folder_of_another_run_is_untouched(world, tmp_path, capsys):
    out = tmp_path / "out"
    checkpoint.claim(out, {"optimizer.lr": 0.5})
    before = {path: path.read_bytes() for path in out.iterdir()}
    code, err = command(world, tmp_path, capsys)
    assert code == 4
    assert "belongs to another run" in err and "optimizer.lr is 0.5 there, 0.003 here" in err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_of_other_files_is_untouched(world, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    code, err = command(world, tmp_path, capsys)
    assert (code, [path.name for path in out.iterdir()]) == (4, ["thesis.txt"])
    assert "holds files of no run (thesis.txt)" in err


def test_a_full_disk_stops_the_run_and_loses_nothing(world, tmp_path, capsys, monkeypatch):
    """Full at the second checkpoint, then at the very last file; the run goes on from where it stood each time."""
    from jaxtransfer.checkpoint import store
    from jaxtransfer.job import record

    out, usage, write = tmp_path / "out", shutil.disk_usage, record.write_durably
    full = lambda path: usage(path)._replace(free=0 if (out / "checkpoints" / "4").exists() else 1 << 40)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "disk_usage", full)
        code, err = command(world, tmp_path, capsys)
    assert code == 4
    assert "the disk has 0 bytes free" in err and str(out / "checkpoints" / "8") in err
    assert checkpoint.steps(out / "checkpoints") == [4]

    def fail(path, content):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_durably", fail)
        code, err = command(world, tmp_path, capsys)
    assert (code, "No space left on device" in err) == (1, True)
    assert not (out / "result.json").exists()
    assert record.write_durably is write
    assert cli.main(["resume", str(out)]) == 0
    said = capsys.readouterr().out
    assert "resumed at step 8 of 8" in said
    assert [line["step"] for line in lines(out)] == [3, 4, 6, 8, 8, 8]


def test_divergence_is_told_kept_and_never_the_best(world, tmp_path, capsys):
    changes = {"optimizer": {"lr": 1e30, "clip": None, "warmup": 0.0}, "run": {"steps": 8, "max_rejected": 3}}
    changes["run"]["checkpoint_every"] = 1
    out = tmp_path / "out"
    for _ in range(2):  # a second attempt diverges as the first did, and says so as well
        code, err = command(world, tmp_path, capsys, **changes)
        assert code == 5
        assert (
            f"3 times in a row, up to step 4 (loss nan, gradient norm nan); state and batch are in {out}/diagnostic"
            in err
        )
    assert [(line["kind"], line["step"]) for line in lines(out)] == [("rejected", n) for n in (2, 3, 4)]
    extra = checkpoint.metadata(out / "diagnostic")["extra"]
    assert np.array(extra["batch"]["input_ids"]).shape == (4, 16)
    job = prepare.prepare(world.config(out, **changes), print)
    lineage = job.adapted(0).lineage
    state, _, _ = checkpoint.restore(out / "diagnostic", like=job.start(0), lineage=lineage)
    assert int(state.step) == 1  # the one that was accepted
    last, _, extra = checkpoint.restore(out / "checkpoints" / "3", like=job.start(0), lineage=lineage)
    assert int(last.step) == 1
    assert (extra["progress"]["best"], extra["progress"]["rejected"]) == (None, 2)
