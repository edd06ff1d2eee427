"""What a report shows of an evaluation besides its metrics: subgroups, mistakes."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtransfer.data.decode import decode, stored
from jaxtransfer.data.images import Images
from jaxtransfer.job.prepare import Job

SHOWN, SIDE = 20, 96


def parts(job: Job, split: str, part: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, Any]]]:
    """What the task's metrics are made up of, then the subgroups: see `subgroups`."""
    own = {} if job.task.breakdown is None else job.task.breakdown(part)
    found = {what: {value: dict(metrics) for value, metrics in values.items()} for what, values in own.items()}
    return {**found, **subgroups(job, split, part)}


def subgroups(job: Job, split: str, part: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, Any]]]:
    """Column -> value -> the run's metrics, of each of the configuration's subgroup columns."""
    names = [name for name in dict.fromkeys(("accuracy", job.metric)) if name in job.task.metric_names]
    rows = _rows(job, split)
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for column in job.config.data.subgroups:
        values = np.array([str(job.data[split].rows[i].values[column]) for i in rows])
        masks = {value: values == value for value in dict.fromkeys(values.tolist())}
        parts = {value: {name: array[mask] for name, array in part.items()} for value, mask in masks.items()}
        found = {value: job.task.metrics(each) for value, each in parts.items()}
        out[column] = {value: {name: metrics[name] for name in names} for value, metrics in found.items()}
    return out


def wrong(job: Job, split: str, part: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The examples of one label that the model got wrong, the most confident first."""
    assert job.task.decode is not None
    labels, rows = job.task.head.labels, _rows(job, split)
    found = [
        (found.probability, i, labels[part["labels"][i]], found.label)
        for i, found in enumerate(job.task.decode(part))
        if found.label != labels[part["labels"][i]]
    ]
    found = sorted(found, key=lambda mistake: -mistake[0])[:SHOWN]
    return [
        {**_input(job, split, i, int(rows[i])), "label": label, "predicted": predicted, "probability": probability}
        for probability, i, label, predicted in found
    ]


def _rows(job: Job, split: str) -> np.ndarray:
    """The row of the data set that each example is of."""
    kept = job.examples[split].kept
    return np.arange(len(job.examples[split])) if kept is None else kept


def _input(job: Job, split: str, example: int, row: int) -> dict[str, str]:
    """The text, or the image as the data URI of a PNG."""
    images = job.examples[split].lazy
    if isinstance(images, Images):
        return {"image": thumbnail(images, example)}
    column = job.task.columns[0]
    return {column: job.data[split][row][column]}


def thumbnail(images: Images, index: int, side: int = SIDE) -> str:
    """One of the images as the data URI of a PNG, neither side longer than ``side`` pixels."""
    how = images.processor
    image, _ = decode(stored(images.values[index]), how.channels, how.grey)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
