"""The commands over one finished run: what each gives, and that none does the work of another."""

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtransfer import checkpoint, job
from jaxtransfer import config as configs
from jaxtransfer.config import optimizers, schema, tasks
from jaxtransfer.data.dataset import DataError
from jaxtransfer.job import commands, prepare, studies
from jaxtransfer.models.registry import ConfigFieldError
from jaxtransfer.run import Interrupted
from jaxtransfer.source import ExportError, load
from jaxtransfer.tree import RuleError, flatten
from tests.job.test_question_answering import asked
from tests.job.test_token_classification import sentences
from tests.job.world import Gallery, Library, World, console, during, lines, texts, write_texts

SCHEMA = [
    kind for part in (schema, optimizers, tasks) for kind in vars(part).values() if dataclasses.is_dataclass(kind)
]
SCHEMA = list(dict.fromkeys(SCHEMA))
LONGER = {"run__epochs": 6, "run__patience": 5}


class Reads:
    """Which fields of the configuration the work reads: not those that are only checked, copied or written out."""

    def __init__(self, patch):
        self.fields = set()
        for kind in SCHEMA:
            patch.setattr(kind, "__getattribute__", self._reader(kind))

    def _reader(self, kind):
        names = {field.name for field in dataclasses.fields(kind)}

        def read(record, name):
            if name in names and self._counts(sys._getframe(1)):
                self.fields.add((kind.__name__, name))
            return object.__getattribute__(record, name)

        return read

    @staticmethod
    def _counts(frame):
        while frame.f_code.co_filename == dataclasses.__file__:
            if "replace" in frame.f_code.co_name:
                return False
            frame = frame.f_back
        file, function = frame.f_code.co_filename.replace("\\", "/"), frame.f_code.co_name
        rooms = ("job/", "data/", "config/schema.py", "config/optimizers.py", "config/phases.py")
        inside = any(f"/jaxtransfer/{room}" in file for room in rooms)
        return inside and function not in ("identity", "__post_init__", "_check_pattern", "_rates")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def ran(world):
    """A finished run with a study of one seed: its folder, its summary, what was said, what was read."""
    out, screen = world.root / "finished", console()
    with pytest.MonkeyPatch.context() as patch:
        reads = Reads(patch)
        config = world.config(out, study={"seeds": [0]}, data__subgroups=["place"], **LONGER)
        summary = job.run(config, console=screen)
    return out, summary, screen.file.getvalue(), reads.fields


def result(out):
    return json.loads((out / "result.json").read_text())


def refuse(*_, **__):
    raise AssertionError("this must not be called")


def test_a_run_leaves_all_that_it_says(ran, world):
    out, summary, said, _ = ran
    page = result(out)
    assert set(summary) == {"accuracy", "from scratch", "gain over scratch", "report", "model", "try it"}
    assert summary["try it"] == f'jaxtransfer predict {out} --text "a sentence of your own"'
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")
    found = page["metrics"]["test"]["accuracy"]
    assert found["n"] == 10
    assert found["value"] >= 0.8
    assert summary["accuracy"].startswith(f"{found['value']:.1%} (95 % interval {found['low']:.1%}")
    assert page["study"]["transfer"] == [found["value"]]
    assert "no interval, 1 seed)" in summary["gain over scratch"]
    assert set(page["subgroups"]["place"]) == {"here", "there"}
    assert set(page["curves"]) == {"transfer", "scratch"}
    best = page["run"]["best_step"]
    assert best in checkpoint.steps(out / "checkpoints")
    (at_best,) = (line for line in lines(out) if line["kind"] == "eval" and line["step"] == best)
    assert {name: at_best[name] for name in ("accuracy", "macro_f1", "loss")} == {
        name: metric["value"] for name, metric in page["metrics"]["validation"].items()
    }
    assert [row["group"] for row in page["groups"]] == ["head", "trunk"]
    assert "trunk" in said and "from scratch, seed 0" in said and "s left" in said
    assert configs.load(out / "config.yaml") == world.config(
        out, study={"seeds": [0]}, data__subgroups=["place"], **LONGER
    )


def test_every_field_of_the_configuration_is_read(ran, world, monkeypatch, tmp_path_factory):
    reads = Reads(monkeypatch)
    adapt = {"train": "rules", "rules": [[".*", "head"]]}
    part = {"path": world.data["train"], "split": [0, 16], "seed": 3}
    last, sgd = {"train": "last", "last": 1}, {"name": "sgd", "momentum": 0.5}
    hidden = {"kind": "masked-lm", "max_length": 16, "head": "fresh"}
    before = [{"adapt": {"train": "head"}, "optimizer": sgd, "run": {"steps": 1}}]
    for changes in (
        {"adapt": last, "optimizer": sgd}, {"adapt": adapt, "data__train": part}, {"task": hidden}, {"phases": before},
    ):  # fmt: skip
        prepare.prepare(world.config(world.root / "x", **changes), print)
    rows = {"token-classification": sentences(4, 0), "question-answering": asked(4, 0)}
    for task, found in rows.items():
        data = {"train": {"path": write_texts(world.root / f"{task}.jsonl", found)}, "batch": 2, "buckets": [16]}
        how = {"kind": task, "max_length": 16, **({"stride": 2} if task == "question-answering" else {})}
        prepare.prepare(world.config(world.root / "x", data=data, task=how), print)
    library, gallery = (kind(tmp_path_factory.mktemp("other")) for kind in (Library, Gallery))
    prepare.prepare(library.config(world.root / "x"), print)
    crop = {"crop_scale": [0.5, 1.0], "crop_ratio": [0.5, 2.0]}
    images = {**gallery.raw["task"], "augment": crop}
    made = prepare.prepare(gallery.config(world.root / "x", task=images), print)
    next(made.loader("train", train=True))
    read = reads.fields | ran[3]
    every = {
        (kind.__name__, field.name) for kind in SCHEMA for field in dataclasses.fields(kind) if field.name != "kind"
    }
    assert every - read == set()


def test_a_finished_run_is_returned_and_not_repeated(ran, monkeypatch):
    out, summary, _, _ = ran
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    for room, name in ((commands, "train"), (commands, "predictions"), (studies, "score")):
        monkeypatch.setattr(room, name, refuse)
    screen = console()
    assert job.resume(out, console=screen) == summary
    assert f"{out} holds this run, finished" in screen.file.getvalue()
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_the_folder_of_another_run_is_refused_by_the_keys_that_differ(ran, world):
    out = ran[0]
    config = world.config(out, study={"seeds": [0]}, data__subgroups=["place"], **{**LONGER, "optimizer__lr": 0.5})
    with pytest.raises(checkpoint.RunFolderError) as refused:
        job.run(config, console=console())
    assert str(refused.value).startswith(
        f"{out}: belongs to another run: optimizer.lr is 0.003 there, 0.5 here; choose"
    )
    assert result(out)["run"]["steps"] > 0


def test_other_data_makes_another_run(ran, world, monkeypatch, tmp_path):
    config = configs.load(ran[0] / "config.yaml")
    other = write_texts(tmp_path / "other.jsonl", texts(16, seed=9))
    original = prepare.read
    monkeypatch.setattr(
        prepare, "read", lambda spec, columns: original(other if spec.path == world.data["train"] else spec, columns)
    )
    with pytest.raises(checkpoint.RunFolderError, match=r"another run: data train is '\w+' there, '\w+' here;"):
        job.run(config, console=console())


def test_another_configuration_or_tokenizer_of_the_source_makes_another_run(world, tmp_path):
    shutil.copytree(world.source, tmp_path / "source")
    config = world.config(tmp_path / "none", source={"ref": str(tmp_path / "source")})
    before = prepare.prepare(config, lambda text: None).identity()
    changes = {
        "config.json": ('"initializer_range": 0.1', '"layer_norm_eps": 0.1'),
        "tokenizer.json": ('"dull"', '"dulls"'),
    }
    for name, (old, new) in changes.items():
        path = tmp_path / "source" / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        after = prepare.prepare(config, lambda text: None).identity()
        path.write_text(text, encoding="utf-8")
        assert {key for key, value in after.items() if before[key] != value} == {f"source {name}"}


def test_no_export_takes_the_place_of_what_the_run_needs(ran, world):
    for place in (world.source, ran[0] / "model"):
        with pytest.raises(ExportError, match="is put together from it; name another folder"):
            job.export(ran[0], Path(place))
        assert (Path(place) / "config.json").exists()


def test_what_is_damaged_of_a_finished_run_is_named(ran, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(ran[0], out)
    weights = out / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x80  # the sign of one number
    weights.write_bytes(data)
    with pytest.raises(checkpoint.DamagedError, match=r"model\.safetensors: is not the file that the run wrote"):
        list(job.predict(out, ["fine"]))
    record = out / "result.json"
    record.write_bytes(record.read_bytes()[:500])
    with pytest.raises(checkpoint.RunFolderError, match=r"result\.json: cannot be read"):
        list(job.predict(out, ["fine"]))


def test_explain_compiles_nothing(world, monkeypatch):
    monkeypatch.setattr(prepare, "make_step", lambda *_, **__: refuse)
    monkeypatch.setattr(prepare, "make_eval", lambda *_, **__: refuse)
    monkeypatch.setattr(prepare, "init_state", refuse)
    head, frozen = job.explain(world.config(world.root / "none", adapt={"train": "head"}))["groups"]
    assert (head.group, head.parameters, head.lr, head.optimizer) == ("head", 64 * 2 + 2, 3e-3, "adamw")
    assert (frozen.group, frozen.lr, frozen.optimizer_bytes) == ("frozen", None, 0)
    assert head.optimizer_bytes >= 2 * head.bytes
    assert not (world.root / "none").exists()


def test_inspect(world):
    plain = job.inspect(str(world.source))
    assert (plain["family"], plain["head"]) == ("bert", None)
    assert plain["parameters"] == sum(int(np.prod(row["shape"])) for row in plain["leaves"])
    assert set(plain["leaves"][0]) == {"path", "shape", "dtype", "bytes"}
    ruled = job.inspect(str(world.source), rules=((r"embed/.*", "frozen"), (r"blocks/1/.*", "top")))
    rules = {row["path"]: row["rule"] for row in ruled["leaves"]}
    assert rules["embed/word/embedding"] == r"embed/.*"
    assert rules["blocks/1/mlp/up/kernel"] == r"blocks/1/.*"
    assert rules["blocks/0/mlp/up/kernel"] is None
    with pytest.raises(RuleError, match=r"rule '\(' is not a regular expression"):
        job.inspect(str(world.source), rules=(("(", "x"),))


def test_evaluate_gives_the_numbers_of_the_run(ran, world):
    found, page = job.evaluate(ran[0]), result(ran[0])["metrics"]["test"]
    assert found.pop("data") == world.data["test"]
    assert found.keys() == {"accuracy", "macro_f1", "loss"}
    for name, metric in found.items():
        for key in ("value", "low", "high", "n"):
            assert metric[key] == pytest.approx(page[name][key], rel=1e-5), (name, key)
    other = job.evaluate(ran[0], data=world.data["validation"])
    assert other["data"] == world.data["validation"]
    assert other["loss"]["value"] == pytest.approx(result(ran[0])["metrics"]["validation"]["loss"]["value"], rel=1e-5)


def test_predict_one_and_many(ran):
    bad, good = "a film and dull dull dull", "the lamp was lovely lovely lovely"  # as the training texts say it
    one = list(job.predict(ran[0], [good]))
    many = list(job.predict(ran[0], [bad, good, *["the good book"] * 5]))
    assert [row["text"] for row in many[:2]] == [bad, good]
    assert [row["label"] for row in many[:2]] == ["negative", "positive"]
    assert many[1]["label"] == one[0]["label"]
    assert many[1]["probability"] == pytest.approx(one[0]["probability"], rel=1e-5)
    with pytest.raises(DataError, match="texts, record 1: text is empty"):
        list(job.predict(ran[0], ["fine", " "]))
    with pytest.raises(DataError, match="texts: no records"):
        list(job.predict(ran[0], []))


def test_exports_of_a_finished_run_hold_the_same_function(ran, tmp_path):
    out = ran[0]
    default = job.export(out)
    assert default == out / "model-hf"
    orbax = job.export(out, tmp_path / "orbax", format="orbax")
    kept = flatten(load(out / "model").params)
    for folder in (default, orbax):
        found = load(folder)
        assert found.model.head.labels == ("negative", "positive")
        assert all(np.array_equal(leaf, kept[path]) for path, leaf in flatten(found.params).items())
    card = (default / "README.md").read_text()
    for said in ("fit(steps=", "license: cc0-1.0", "accuracy"):
        assert said in card, said


@pytest.fixture(scope="module")
def stopped(world):
    """A run that a signal stopped after its fifth step, one past an evaluation."""
    out = world.root / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        during(patch, 5)
        with pytest.raises(Interrupted):
            job.run(world.config(out, run__evaluate_every=2, run__metric="loss"), console=console())
    return out


def test_a_stopped_run_exports_predicts_and_evaluates_its_best_step_so_far(stopped, tmp_path):
    best = min((line["loss"], line["step"]) for line in lines(stopped) if line["kind"] == "eval")[1]
    source = load(job.export(stopped, tmp_path / "model"))
    assert f"fit(steps={best} of 8" in (tmp_path / "model" / "README.md").read_text()
    assert source.model.head.labels == ("negative", "positive")
    loss = {line["step"]: line["loss"] for line in lines(stopped) if line["kind"] == "eval"}[best]
    found = job.evaluate(stopped, data=str(stopped.parent / "validation.jsonl"))
    assert found["loss"]["value"] == pytest.approx(loss, rel=1e-5)
    assert len(list(job.predict(stopped, ["good"]))) == 1
    assert not (stopped / "result.json").exists()


def test_a_run_without_a_checkpoint_and_a_folder_without_a_run_are_said(world, tmp_path):
    with pytest.raises(checkpoint.RunFolderError, match="holds no run"):
        job.resume(tmp_path, console=console())
    (tmp_path / "config.yaml").write_text(configs.dump(world.config(tmp_path)))
    with pytest.raises(checkpoint.RunFolderError, match="no checkpoint yet; resume it"):
        job.export(tmp_path)


def test_mean_pooling_is_exported_as_orbax_and_said(world):
    out, screen = world.root / "mean", console()
    summary = job.run(world.config(out, task__pooling="mean", run__epochs=1), console=screen)
    assert "exported as orbax: a sequence-classification head with pooling='mean'" in screen.file.getvalue()
    assert load(summary["model"]).model.head.pooling == "mean"
    assert [row["text"] for row in job.predict(out, ["good"])] == ["good"]
    with pytest.raises(ConfigFieldError, match="pooling='mean' has no Hugging Face class"):
        job.export(out, format="hf")


def test_the_study_goes_on_where_it_was_stopped(world, monkeypatch):
    whole, out = world.root / "study", world.root / "study-stopped"
    changes = {"study": {"seeds": [0, 1]}, "run__metric": "loss"}
    summary = job.run(world.config(whole, **changes), console=console())
    real, seeds = studies.score, []

    def score(job, seed, *, scratch, stop, **keywords):
        seeds.append((seed, scratch))
        if seeds[-1] == (0, True):
            stop.signum = signal.SIGTERM
        return real(job, seed, scratch=scratch, stop=stop, **keywords)

    monkeypatch.setattr(studies, "score", score)
    with pytest.raises(Interrupted):
        job.run(world.config(out, **changes), console=console())
    assert seeds == [(1, False), (0, True)]
    assert [path.name for path in (out / "study").iterdir()] == ["transfer-1.json"]
    monkeypatch.setattr(studies, "score", real)
    again = job.run(world.config(out, **changes), console=console())
    assert result(out)["study"] == result(whole)["study"]
    assert again["gain over scratch"] == summary["gain over scratch"]
    assert "points" not in summary["gain over scratch"]
    assert lines(out) == lines(whole)
    assert result(whole)["study"]["transfer"][0] == result(whole)["metrics"]["test"]["loss"]["value"]


def test_scratch_and_transfer_of_a_seed_share_data_and_differ_in_parameters(world):
    made = prepare.prepare(world.config(world.root / "x"), print)
    (a, _), (b, _) = made.start(0), made.start(0, scratch=True)
    assert not np.array_equal(flatten(a.params)["embed/word/embedding"], flatten(b.params)["embed/word/embedding"])
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    assert "from scratch" in made.adapted(0, scratch=True).lineage.operations[-1]
