"""Runs of language models: the head is kept, what came before is measured, the source may be made by a run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxtransfer import job
from jaxtransfer.config import ConfigError
from jaxtransfer.generation import GenerationError
from jaxtransfer.job import commands, models, prepare
from jaxtransfer.run import Interrupted
from jaxtransfer.source import SourceError, load
from jaxtransfer.tree import flatten
from tests.job.world import Library, console, during, lines
from tests.language import byte_tokenizer


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library(tmp_path_factory.mktemp("library"))


def made(library, **changes):
    return prepare.prepare(library.config(library.root / "none", **changes), lambda text: None)


def result(out):
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def ran(library):
    """A run from weights, with a study and two budgets of one seed."""
    out = library.root / "ran"
    return out, job.run(library.config(out, study={"seeds": [0], "budgets": [2, 8]}), console=console())


def test_the_source_is_measured_before_and_its_own_domain_after(ran, library):
    out, summary = ran
    page = result(out)
    source = made(library)
    state, frozen = source.start(0)
    before = source.task.metrics(commands.predictions(source, state, frozen, "test", lambda: None))
    assert page["before"]["bits_per_byte"]["value"] == pytest.approx(before["bits_per_byte"].value, rel=1e-6)
    after = page["metrics"]["test"]["bits_per_byte"]
    assert after["value"] < page["before"]["bits_per_byte"]["value"]
    assert (after["n"], after["over"]) == (5, "document")
    forgot = page["forgetting"]
    assert (forgot["metric"], forgot["lower_is_better"]) == ("bits_per_byte", True)
    assert forgot["before"]["bits_per_byte"]["value"] != forgot["after"]["bits_per_byte"]["value"]
    assert "retain" not in page["metrics"]
    assert not {"confusion", "wrong", "roc"} & page.keys()
    assert summary["bits per byte"].startswith(
        f"{before['bits_per_byte'].value:.3f} -> {after['value']:.3f} (95 % inter"
    )
    assert "5 test documents" in summary["bits per byte"]
    assert "from scratch" in summary and "->" in summary["on the source's data"]
    assert summary["try it"] == f'jaxtransfer predict {out} --text "a beginning of your own"'
    html = (out / "report.html").read_text()
    assert "Forgetting" in html and "bits per byte" in html


def test_the_budgets_are_documents_and_the_files_one_a_fit(ran):
    out, summary = ran
    curve = result(out)["curve"]
    assert (curve["unit"], [point["budget"] for point in curve["points"]]) == ("documents", [2, 8])
    assert sorted(path.relative_to(out).as_posix() for path in (out / "study").rglob("*.json")) == [
        "study/budget-2/scratch-0.json", "study/budget-2/transfer-0.json",
        "study/budget-8/scratch-0.json", "study/budget-8/transfer-0.json", "study/scratch-0.json",
    ]  # fmt: skip
    assert "documents" in summary["labels needed"]
    assert result(out)["curves"].keys() == {"transfer", "scratch"}


def test_the_head_is_the_source_s_own(library):
    job_ = made(library)
    stored = load(library.source)
    assert job_.adapted(0).model.head == stored.model.head
    flat, kept = flatten(job_.adapted(0).params), flatten(stored.params)
    assert flat.keys() == kept.keys()
    assert all(np.array_equal(flat[path], kept[path]) for path in flat)


def test_a_source_without_that_head_is_refused(library, tmp_path):
    folder = tmp_path / "trunk"
    folder.mkdir()
    for file in library.source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "architectures": ["LlamaModel"]}))
    with pytest.raises(SourceError, match=r"trunk: has no head; causal-lm goes on with the head of its source, which"):
        made(library, source__ref=str(folder))


TIED = {
    "the head alone": ({"train": "head"}, r"adapt.train: head_only: the head is embed/word/embedding, .*untie: true"),
    "the last block": ({"train": "last", "last": 1}, r"adapt.last: last\(1\): the head is embed/word/embedding"),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_over_a_frozen_embedding_asks_to_be_untied(name, library):
    adapt, says = TIED[name]
    with pytest.raises(ConfigError, match=says):
        made(library, adapt=adapt)
    untied = made(library, adapt={**adapt, "untie": True})
    flat = flatten(untied.adapted(0).params)
    assert np.array_equal(flat["head/decoder/kernel"], np.asarray(flat["embed/word/embedding"]).T)
    labels = flatten(untied.labels)
    assert (labels["head/decoder/kernel"], labels["embed/word/embedding"]) == ("head", "frozen")
    scratch = flatten(untied.adapted(0, scratch=True).params)
    assert scratch.keys() == flat.keys()


@pytest.fixture(scope="module")
def pretrained(library):
    """A run whose source is made by another, from a configuration without weights; and the same, stopped in between."""
    part = {"data": {"train": {"path": library.data["source"]}, "batch": 4}, "run": {"steps": 2}}
    changes = {"source__ref": str(library.bare), "pretrain": part, "run__steps": 3}
    out, stopped = library.root / "whole", library.root / "parted"
    job.run(library.config(out, **changes), console=console())
    # In the first of the source's two steps; then, after its second, in the first of the run's own.
    for call, at in ((1, "pretrain/checkpoints/1"), (2, "checkpoints/1")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            during(patch, call)
            job.run(library.config(stopped, **changes), console=console())
        assert (stopped / at).exists(), at
    return out, stopped, changes


def test_a_source_is_made_once_and_its_making_is_told(pretrained, library):
    out, _, changes = pretrained
    page, inner = result(out), result(out / "pretrain")
    assert inner["lineage"]["ref"] == page["lineage"]["ref"] == "bare"
    operations = page["lineage"]["operations"]
    assert operations[:-1] == inner["lineage"]["operations"]
    assert (
        "from scratch" in operations[1] and "fit(steps=2 of 2" in operations[2] and "fit(steps=3 of 3" in operations[3]
    )
    ready = prepare.prepare(library.config(out, **changes), print)
    trunk, start = models.pretrained(ready).trunk, flatten(load(out / "pretrain" / "model").params)
    assert all(np.array_equal(leaf, start[path]) for path, leaf in flatten(trunk.params).items())
    assert not np.array_equal(flatten(ready.trunk.params)["embed/word/embedding"], start["embed/word/embedding"])
    assert job.evaluate(out / "pretrain").keys() >= {"loss", "bits_per_byte"}


def test_a_run_whose_source_is_made_goes_on_wherever_it_stopped(pretrained, library):
    out, stopped, _ = pretrained
    found = models.adapted(stopped)  # of its last step so far, from the source that was made
    assert found.lineage.ref == "bare"
    job.resume(stopped, console=console())
    assert lines(stopped) == lines(out)
    assert result(stopped)["metrics"] == result(out)["metrics"]


def test_explain_makes_no_source(library, monkeypatch):
    monkeypatch.setattr(commands, "_run", None)
    part = {"data": {"train": {"path": library.data["source"]}}, "run": {"steps": 2}}
    config = library.config(library.root / "nothing", source__ref=str(library.bare), pretrain=part)
    (row,) = job.explain(config)["groups"]
    assert row.group == "trunk"
    assert not (library.root / "nothing").exists()


def test_a_mistake_in_the_pretraining_is_found_before_any_work(library):
    part = {"data": {"train": {"path": "absent.jsonl"}}, "run": {"steps": 2}}
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such file"):
        made(library, source__ref=str(library.bare), pretrain=part)


def test_a_run_goes_on_with_a_text(ran):
    out, _ = ran
    text = "".join(job.complete(out, "xyzxyz", max_new_tokens=6))
    assert text and text == "".join(job.complete(out, "xyzxyz", max_new_tokens=6, seed=1))
    hot = {"".join(job.complete(out, "xyz", max_new_tokens=6, temperature=3.0, seed=seed)) for seed in range(3)}
    assert len(hot) > 1
    with pytest.raises(GenerationError):
        job.complete(out, "xyz", temperature=-1.0)
    with pytest.raises(ValueError, match="a causal-lm model goes on with texts, it predicts no labels"):
        list(job.predict(out, ["xyz"]))


def test_a_text_ends_where_the_model_s_files_say_too(ran, tmp_path):
    """The last byte of the first letter that the model says, made an end of texts by generation_config.json."""
    out, _ = ran
    text = "".join(job.complete(out, "xyzxyz", max_new_tokens=6))
    ends = byte_tokenizer()(text[0])["input_ids"][-1:]
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    (copy / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert "".join(job.complete(copy, "xyzxyz", max_new_tokens=6)) == text[0] != text
    assert job.task_of(out) == "causal-lm"


def test_evaluate_gives_the_numbers_of_the_run(ran, library):
    out, _ = ran
    found, page = job.evaluate(out), result(out)["metrics"]["test"]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name]["value"] == pytest.approx(page[name]["value"], rel=1e-5)


def test_less_data_is_the_same_run_with_fewer_documents(library):
    whole = made(library, study={"budgets": [4]})
    less = whole.budgeted(4, seed=1)
    assert less.step is whole.step and less.steps == whole.steps
    assert less.training.ragged["input_ids"] != whole.training.ragged["input_ids"]
    total = [sum(rows.fixed["bytes"].tolist()) for rows in (less.training, whole.training)]
    assert 0 < total[0] < total[1]
    with pytest.raises(ConfigError, match=r"study\.budgets: 13 examples are wanted, .*train.jsonl has 12"):
        made(library, study={"budgets": [13]})
