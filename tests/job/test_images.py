"""Runs of image classifiers, whose source is made by a run: budgets of labels, mistakes as pictures, predictions."""

import base64
import dataclasses
import io
import json

import numpy as np
import pytest

from jaxtransfer import job
from jaxtransfer.config import ConfigError
from jaxtransfer.data.dataset import DataError
from jaxtransfer.data.processor import processor
from jaxtransfer.job import models, prepare, shown, tasks, train
from jaxtransfer.run import Progress
from jaxtransfer.source import load
from jaxtransfer.tree import flatten
from tests.job.world import Gallery, console

BUDGETS = {"study": {"seeds": [0, 1], "budgets": [1, 4]}}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    return Gallery(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def ran(gallery):
    out, screen = gallery.root / "ran", console()
    config = gallery.config(out, **BUDGETS, task__on_bad="skip")
    return out, job.run(config, console=screen), screen.file.getvalue()


def made(gallery, **changes):
    return prepare.prepare(gallery.config(gallery.root / "none", **changes), lambda text: None)


def result(out):
    return json.loads((out / "result.json").read_text())


def test_a_trunk_made_on_other_classes_is_measured_at_every_budget(ran):
    out, summary, said = ran
    page = result(out)
    assert result(out / "pretrain")["labels"] == ["0", "1"]
    assert page["labels"] == ["2", "3"]
    curve = page["curve"]
    assert (curve["metric"], curve["unit"]) == ("accuracy", "labels per class")
    assert [(point["budget"], len(point["transfer"]), len(point["scratch"])) for point in curve["points"]] == [
        (1, 2, 2), (4, 2, 2),
    ]  # fmt: skip
    assert len(list((out / "study" / "budget-1").iterdir())) == 4
    assert {"accuracy", "AUC", "sensitivity at 90% specificity", "labels needed", "from scratch"} <= summary.keys()
    assert summary["try it"] == f"jaxtransfer predict {out} --image your.png"
    assert page["roc"]["fpr"][0] == 0 and page["roc"]["tpr"][-1] == 1
    assert "exported as orbax: transformers has no cifar-resnet" in said
    assert "Labels needed" in (out / "report.html").read_text()


def test_running_statistics_travel_through_checkpoint_and_export(ran):
    """The trunk of the run is that of its source with statistics that moved in both runs."""
    out, _, _ = ran
    before, after = (flatten(load(folder / "model").params) for folder in (out / "pretrain", out))
    assert before["embed/norm/count"] == 8
    assert after["embed/norm/count"] == 8 + 12
    assert before["head/out/kernel"].shape == after["head/out/kernel"].shape


def test_a_budget_takes_so_many_of_each_class_by_the_seed(gallery):
    whole = made(gallery, **BUDGETS)
    labels = {seed: whole.budgeted(4, seed).training.fixed["labels"].tolist() for seed in (0, 1)}
    assert all(sorted(found) == [0] * 4 + [1] * 4 for found in labels.values())
    pixels = [np.stack(whole.budgeted(4, seed).training.lazy.values) for seed in (0, 0, 1)]
    assert np.array_equal(pixels[0], pixels[1]) and not np.array_equal(pixels[0], pixels[2])
    fewer = np.stack(whole.budgeted(1, 0).training.lazy.values)
    assert all(any(np.array_equal(image, other) for other in pixels[0]) for image in fewer)


def test_a_batch_that_the_data_do_not_fill_has_no_black_squares(gallery):
    batch = next(made(gallery, **BUDGETS).budgeted(1, 0).loader("train", train=True))
    assert batch["weight"].tolist() == [1, 1] + [0] * 6
    assert batch["index"].tolist()[2:] == [-1] * 6
    for row in range(2, 8):
        assert np.array_equal(batch["pixel_values"][row], batch["pixel_values"][row % 2])


def test_mistakes_are_shown_as_pictures(gallery):
    from PIL import Image

    ready = made(gallery)
    count = len(ready.examples["test"])
    labels = ready.examples["test"].fixed["labels"]
    wrong = shown.wrong(
        ready, "test", {"logits": np.eye(2)[1 - labels] * np.arange(1, count + 1)[:, None], "labels": labels}
    )
    assert len(wrong) == min(count, 20)
    assert wrong[0]["probability"] >= wrong[-1]["probability"]
    assert {wrong[0]["label"], wrong[0]["predicted"]} == {"2", "3"}
    head, _, data = wrong[0]["image"].partition(",")
    assert head == "data:image/png;base64"
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(image, ready.examples["test"].lazy.values[-1])


def test_predictions_name_their_files(ran, gallery, tmp_path):
    from PIL import Image

    out, _, _ = ran
    with np.load(gallery.data["test"]) as data:
        chosen = {int(label): image for image, label in zip(data["image"], data["label"], strict=True)}
    for label, image in chosen.items():
        Image.fromarray(image).save(tmp_path / f"{label}.png")
    names = [str(tmp_path / "2.png"), str(tmp_path / "3.png")]
    found = list(job.predict(out, names))
    assert [row["image"] for row in found] == names
    assert {row["label"] for row in found} <= {"2", "3"}
    assert all(0.5 <= row["probability"] <= 1 for row in found)
    with pytest.raises(DataError, match=r"absent\.png cannot be read"):
        list(job.predict(out, [*names, str(tmp_path / "absent.png")]))


def test_evaluate_gives_the_numbers_of_the_run(ran):
    out, _, _ = ran
    found, page = job.evaluate(out), result(out)["metrics"]["test"]
    for name in ("accuracy", "loss", "auc"):
        assert found[name]["value"] == pytest.approx(page[name]["value"], rel=1e-5)


def test_an_export_prepares_images_as_the_run_did(gallery, tmp_path):
    options = {"labels": ["2", "3"], "size": [8, 6], "mean": [0.25], "std": [0.2], "channels": 1, "multi_label": True}
    task = {**gallery.raw["task"], **options}
    ready, said = made(gallery, pretrain=None, task=task, source__init="scratch"), []
    source = train.finished(ready, 0, *ready.start(0), Progress())
    stored = load(models.write(source, tmp_path, ready.config, Progress(), {}, said.append))
    assert processor(stored) == dataclasses.replace(ready.processor, grey=False, notes=())
    assert said[0] == "the model's folder does not say that colour is turned into grey: give transformers grey images"
    assert stored.assets["config"]["problem_type"] == "multi_label_classification"


WRONG = {
    "a metric of two classes": (
        {"data__train": {"only": ["1", "2", "3"]}, "data__test": {"only": ["1", "2", "3"]}, "run__metric": "auc"},
        "run.metric: image-classification is not measured by 'auc'; did you mean 'macro_auc'",
    ),
    "channels of another model": ({"task__channels": 3}, "channels: 3, but the model takes 1"),
    "means of two channels": ({"task__mean": [0.5, 0.4]}, "mean: .*2.* 1 channel"),
    "weights of other classes": ({"task__class_weights": [1.0, 2.0, 3.0]}, "task.class_weights: expected one for each"),
    "too many labels": ({"study": {"budgets": [11]}}, "study.budgets: 11 examples of '2' are wanted, .* has 10"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_come_to_light_in_prepare(name, gallery):
    changes, says = WRONG[name]
    for split in ("data__train", "data__test"):
        if split in changes:
            changes = {**changes, split: {"path": gallery.data[split.removeprefix("data__")], **changes[split]}}
    with pytest.raises((ConfigError, DataError), match=says):
        made(gallery, **changes)


def test_every_option_reaches_the_task(gallery):
    options = {
        "labels": ["2", "3"], "size": [8, 6], "std": [0.25], "augment": {"flip": True}, "on_bad": "skip",
        "label_smoothing": 0.1, "class_weights": "balanced", "mixup": 0.2,
    }  # fmt: skip
    ready = made(gallery, pretrain=None, task={**gallery.raw["task"], **options}, source__init="scratch")
    assert ready.training.lazy.augment.flip and ready.examples["test"].lazy.augment is None
    assert next(ready.loader("train", train=True))["pixel_values"].shape == (8, 8, 6, 1)
    assert ready.task.augment is not None
    assert ready.processor.std == (0.25,)


def test_the_metrics_of_a_task_have_the_names_that_it_says(gallery):
    observed = {"logits": np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 1.0]]), "labels": np.array([1, 0, 1])}
    several = {"logits": observed["logits"], "labels": np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])}
    rows = {name: np.array([3.0, 4.0]) for name in ("nll", "tokens", "bytes", "document")}
    text, image = {"kind": "text-classification"}, {"kind": "image-classification"}
    for raw, seen in ((text, observed), (image, observed), ({**image, "multi_label": True}, several)):
        config = gallery.config(gallery.root / "none", task={**raw, "labels": ["a", "b"]})
        task = tasks.make_task(config, None)
        assert task.metrics(seen).keys() == set(task.metric_names)
        assert task.metric in task.metric_names and task.minimize & set(task.metric_names)
        assert tasks.columns_of(config) == task.columns
    three = tasks.make_task(gallery.config(gallery.root / "none", task={**image, "labels": ["a", "b", "c"]}), None)
    seen = {"logits": np.eye(3), "labels": np.arange(3)}
    assert three.metrics(seen).keys() == set(three.metric_names)
    config = gallery.config(gallery.root / "none", task={"kind": "causal-lm"})
    task = tasks.make_task(config, None)
    assert task.metrics(rows).keys() == set(task.metric_names)
    assert tasks.columns_of(config) == task.columns
