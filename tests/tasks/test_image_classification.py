"""The task from images to predictions, and a training step with mixup and class weights on a model of one layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer.data import DataError, batches, from_records
from jaxtransfer.data.images import Augment, ImageProcessor
from jaxtransfer.data.loader import Examples
from jaxtransfer.models import from_function
from jaxtransfer.step import init_state, make_eval, make_step
from jaxtransfer.tasks import LabelSet, image_classification

LABELS = ("cat", "dog", "owl")


def pictures(n=6, side=4, seed=0):
    """Images of one grey value each: 80 times the class."""
    rng = np.random.default_rng(seed)
    return [np.full((side, side, 1), 80 * (k % 3) + rng.integers(0, 20), np.uint8) for k in range(n)]


def dataset(labels=("cat", 1, "owl", "cat", "dog", 2)):
    rows = zip(pictures(len(labels)), labels, strict=True)
    return from_records([{"image": image, "label": label} for image, label in rows], "zoo")


@pytest.fixture(scope="module")
def processor():
    return ImageProcessor(channels=1, resize=(4, 4), mean=(0.5,), std=(0.5,))


def test_prepare_to_batches(processor):
    examples = image_classification(LABELS).prepare(processor, dataset(), train=False)
    assert examples.fixed["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    (batch,) = batches(examples, batch=8, shuffle=False, epochs=1)
    assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((8, 4, 4, 1), np.float32)
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    means = batch["pixel_values"][:6].mean((1, 2, 3))
    assert means[0] < means[1] < means[2]


def test_only_training_is_augmented(processor):
    task = image_classification(LABELS, augment=Augment(brightness=1.0))
    train, plain = (task.prepare(processor, dataset(), train=train) for train in (True, False))
    one, two = (next(iter(batches(e, batch=6, shuffle=False, epochs=1)))["pixel_values"] for e in (train, plain))
    bare = image_classification(LABELS).prepare(processor, dataset(), train=True)
    assert np.array_equal(two, next(iter(batches(bare, batch=6, shuffle=False, epochs=1)))["pixel_values"])
    assert not np.array_equal(one, two)


def test_bad_images_stop_or_are_skipped_with_their_labels(processor):
    rows = [{"image": image, "label": k % 3} for k, image in enumerate(pictures(4))]
    rows[1]["image"] = b"no image"
    with pytest.raises(DataError, match="record 1"):
        image_classification(LABELS).prepare(processor, from_records(rows), train=True)
    examples = image_classification(LABELS, on_bad="skip").prepare(processor, from_records(rows), train=True)
    assert examples.fixed["labels"].tolist() == [0, 2, 0]


def test_prepare_for_prediction(processor):
    data = from_records([{"image": image} for image in pictures(2)])
    examples = image_classification(LABELS).prepare(processor, data, train=False)
    assert not examples.fixed and len(examples) == 2


def test_several_labels(processor):
    task = image_classification(LABELS, multi_label=True)
    examples = task.prepare(processor, dataset(("cat|owl", "", "dog", ["owl"], "cat", "dog")), train=True)
    assert examples.fixed["labels"].tolist()[:3] == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    logits = np.array([[2.0, -1.0, 0.5], [-1.0, -1.0, -1.0]])
    both = task.decode({"logits": logits})
    assert isinstance(both[0], LabelSet) and (both[0].labels, both[1].labels) == (("cat", "owl"), ())
    assert both[0].probabilities["dog"] == pytest.approx(1 / (1 + np.e))
    found = task.metrics({"logits": logits, "labels": np.array([[1, 0, 1], [0, 0, 0]])})
    assert found["exact_match"].value == found[task.metric].value == 1.0


def test_metrics_and_predictions_of_one_label():
    task = image_classification(["normal", "ill"])
    logits, labels = np.array([[0.0, 1.0], [0.5, 0.0], [2.0, 0.0]]), np.array([1, 1, 0])
    found = task.metrics({"logits": logits, "labels": labels})
    assert list(found)[:3] == ["accuracy", "macro_f1", "loss"] and task.metric in found
    assert (found["auc"].value, found["sensitivity_at_90"].value) == (1.0, 1.0)
    assert [p.label for p in task.decode({"logits": logits})] == ["ill", "normal", "normal"]
    assert image_classification(LABELS).metrics({"logits": np.eye(3), "labels": np.arange(3)})["macro_auc"].value == 1.0


@pytest.mark.parametrize(("labels", "several"), [(LABELS, False), (LABELS[:2], False), (LABELS, True)])
def test_the_metrics_are_those_that_it_names(labels, several):
    task = image_classification(labels, multi_label=several)
    n = len(labels)
    found = task.metrics({"logits": np.eye(n), "labels": np.eye(n) if several else np.arange(n)})
    assert tuple(found) == task.metric_names and {task.metric, *task.minimize} <= set(found)


def test_head():
    task = image_classification(LABELS, pooling="mean")
    assert (task.head.kind, task.head.labels, task.head.pooling) == ("image-classification", LABELS, "mean")
    assert (task.columns, task.augment) == (("image", "label"), None)


BAD = {
    "labels: must be two or more different names": {"labels": ["cat"]},
    "mixup: must be at least 0": {"mixup": -0.1},
    "class_weights: expected one for each of 3 labels, got 2": {"class_weights": (1.0, 2.0)},
    "counts: expected one for each of 3 labels, got 2": {"class_weights": "balanced", "counts": (1, 2)},
    "'balanced' needs counts= of the training data": {"class_weights": "balanced"},
    "'balanced' needs counts= and examples=": {"class_weights": "balanced", "multi_label": True, "counts": (1, 2, 3)},
    "must be 'balanced', numbers or None, got 'balance'": {"class_weights": "balance"},
    "no weight balances it": {"class_weights": "balanced", "counts": (1, 0, 3)},
    "label_smoothing: must be in": {"label_smoothing": 1.0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options(message):
    with pytest.raises(ValueError, match=message):
        image_classification(**{"labels": LABELS, **BAD[message]})


def learn(task, examples, steps):
    """Trains one linear layer and gives what an evaluation observes."""

    def forward(params, x):
        return x.reshape(len(x), -1) @ params["kernel"] + params["bias"]

    start = {"kernel": jnp.zeros((16, 3)), "bias": jnp.zeros((1, 3))}
    source = from_function(forward, start, input="pixel_values", output="logits")
    model, params, tx = source.model, source.params, optax.sgd(0.5)
    labels = jax.tree.map(lambda _: "head", params)
    state, frozen = init_state(model, params, labels, tx, jax.random.key(0))
    step, losses = make_step(model, task.objective, tx, augment=task.augment), []
    batch = next(iter(batches(examples, batch=8, shuffle=False, epochs=1)))
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    found = make_eval(model, task.observe)(state, frozen, batch)
    return losses, {name: np.asarray(value)[:6] for name, value in found.items()}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("several", [False, True])
def test_a_model_learns_under_mixup_and_class_weights(several):
    rows = np.stack(pictures()).astype(np.float32) / 127.5 - 1
    ids = np.arange(6) % 3
    labels = np.eye(3, dtype=np.float32)[ids] if several else ids.astype(np.int32)
    task = image_classification(
        LABELS, multi_label=several, mixup=0.2, class_weights="balanced", counts=(2, 2, 2), examples=6
    )
    losses, observed = learn(task, Examples(fixed={"pixel_values": rows, "labels": labels}), 60)
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.8 * losses[0]
    np.testing.assert_array_equal(observed["labels"], labels)  # evaluation sees them unmixed
    assert task.metrics(observed)["macro_auc"].value > 0.8
