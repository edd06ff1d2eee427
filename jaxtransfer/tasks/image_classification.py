"""Image classification: one label for each image, or several."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jaxtransfer.data import images
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.loader import Examples
from jaxtransfer.objectives.losses import Objective, balanced, binary_cross_entropy, cross_entropy
from jaxtransfer.objectives.mixup import mixup as mixing
from jaxtransfer.tasks.metrics import classification, diagnosis
from jaxtransfer.tasks.metrics import multi_label as several
from jaxtransfer.tasks.predictions import above_half, different, likeliest
from jaxtransfer.tasks.task import Observed, Task, logits_and_labels
from jaxtransfer.types import Head


def image_classification(
    labels: Sequence[str],
    *,
    multi_label: bool = False,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    augment: images.Augment | None = None,
    on_bad: Literal["stop", "skip"] = "stop",
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | Literal["balanced"] | None = None,
    counts: Sequence[int] | None = None,
    examples: int | None = None,
    mixup: float = 0.0,
    pooling: str | None = None,
    fresh_head: bool = True,
) -> Task:
    """The task of telling images apart by label; reads the columns ``image`` and ``label``.

    One label an image is trained by `cross_entropy` and measured by `metrics.classification` and `metrics.diagnosis`;
    several by `binary_cross_entropy` and `metrics.multi_label`, where the default metric is ``macro_auc``.

    Args:
      labels: the classes in the order of the logits. Of two, the second is the positive one of AUC and sensitivity.
      multi_label: an image may have any number of the labels.
      size, channels, mean, std: how images are prepared; None is as the source was trained, see `images.processor`.
      augment: what training does to an image on the host, drawn anew every time.
      on_bad: whether an image that cannot be read stops the preparation or is left out and counted.
      label_smoothing: of the training loss, in [0, 1).
      class_weights: how much each class weighs in the training loss; with ``multi_label``, the presence of each label
        against its absence. ``"balanced"`` makes all classes, or presence and absence, weigh the same.
      counts: for ``"balanced"``: how many training examples have each label.
      examples: for ``"balanced"`` with ``multi_label``: how many training examples there are in all.
      mixup: alpha of `objectives.mixup`; 0 is none.
      pooling: None for the family's own.
      fresh_head: whether the source gets a new head, or goes on with its own.

    Raises:
      ValueError: fewer than two labels, one twice, an option out of range, or weights or counts that do not fit.

    Example:
      >>> task = image_classification(["normal", "pneumonia"], class_weights="balanced", counts=[388, 3494])
      >>> task.metric, task.head.kind
      ('accuracy', 'image-classification')
    """
    labels = different(labels)
    if mixup < 0:
        raise ValueError(f"mixup: must be at least 0, got {mixup}")
    for name, given in {"class_weights": class_weights, "counts": counts}.items():
        if not isinstance(given, str | None) and len(given) != len(labels):
            raise ValueError(f"{name}: expected one for each of {len(labels)} labels, got {len(given)}")
    weights = _weights(class_weights, counts, examples, multi_label=multi_label)

    def prepare(processor: Any, dataset: Dataset, *, train: bool) -> Examples:
        read = dataset.multi_hot if multi_label else dataset.class_ids
        fixed = {"labels": read("label", labels)} if "label" in dataset.columns else {}
        return images.examples(dataset, processor, augment=augment if train else None, on_bad=on_bad, labels=fixed)

    def metrics(observed: Observed) -> dict[str, Any]:
        found = observed["logits"], observed["labels"]
        return several(*found) if multi_label else {**classification(*found), **diagnosis(*found)}

    decode = above_half if multi_label else likeliest
    return Task(
        name="image-classification",
        columns=("image", "label"),
        head=Head("image-classification", labels, pooling),
        processor=partial(images.processor, size=size, channels=channels, mean=mean, std=std),
        prepare=prepare,
        objective=_objective(label_smoothing, weights, multi_label=multi_label),
        augment=mixing(mixup, len(labels)) if mixup else None,
        observe=logits_and_labels,
        metrics=metrics,
        metric_names=_metric_names(len(labels), multi_label=multi_label),
        metric="macro_auc" if multi_label else "accuracy",
        decode=lambda observed: decode(observed["logits"], labels),
        fresh_head=fresh_head,
        single_label=not multi_label,
        typed=Path,
    )


def _metric_names(classes: int, *, multi_label: bool) -> tuple[str, ...]:
    if multi_label:
        return ("macro_auc", "mean_average_precision", "macro_f1", "micro_f1", "exact_match", "loss")
    ranked = ("auc", "average_precision", "sensitivity_at_90") if classes == 2 else ("macro_auc",)
    return ("accuracy", "macro_f1", "loss", "balanced_accuracy", *ranked)


def _objective(label_smoothing: float, weights: Sequence[float] | None, *, multi_label: bool) -> Objective:
    if multi_label:
        return binary_cross_entropy(label_smoothing, pos_weight=weights)
    return cross_entropy(label_smoothing, class_weights=weights)


def _weights(
    given: Sequence[float] | str | None, counts: Sequence[int] | None, examples: int | None, *, multi_label: bool
) -> Sequence[float] | None:
    if not isinstance(given, str):
        return given
    if given != "balanced":
        raise ValueError(f"class_weights: must be 'balanced', numbers or None, got {given!r}")
    if counts is None or (multi_label and examples is None):
        need = "counts= and examples=" if multi_label else "counts="
        raise ValueError(f"class_weights: 'balanced' needs {need} of the training data")
    return balanced(counts, examples if multi_label else None)
