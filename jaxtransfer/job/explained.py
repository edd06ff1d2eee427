"""What a run would train, in tables: the groups, which adapter sits where, what is packed."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxtransfer.adapt.groups import FROZEN
from jaxtransfer.adapt.quantized import packed
from jaxtransfer.job import caching
from jaxtransfer.job.adapting import Put, puts
from jaxtransfer.job.prepare import Job
from jaxtransfer.tree.paths import around_layer, flatten, folded, natural


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One group of parameters: its leaves, how many numbers they stand for, what they and their optimizer take."""

    group: str
    leaves: int
    parameters: int
    share: str
    bytes: int
    dtype: str
    lr: float | None
    optimizer: str | None
    optimizer_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceRow:
    """Leaves of one kind in one place of several layers: ``blocks/0-5/mlp/up/kernel``."""

    what: str
    where: str
    leaves: int
    parameters: int
    bytes: int


def tables(job: Job) -> dict[str, Any]:
    """``groups``, and where there are any, ``adapters`` and ``quantized``; ``features``: what is computed once."""
    seed = job.config.run.seed
    source = job.adapted(seed)
    labels = flatten(job.labels)
    found = {
        "groups": _groups(job),
        "adapters": [row for put in puts(job.config, job.trunk, job.task, seed) for row in _places(put, labels)],
        "quantized": _grouped((type(node).__name__, path, [node]) for path, node in packed(source.params).items()),
    }
    chosen = {"mesh": job.chosen} if job.chosen else {}
    return {**chosen, "features": caching.told(job), **{name: rows for name, rows in found.items() if rows}}


def _groups(job: Job) -> list[GroupRow]:
    rows = [dataclasses.asdict(row) for row in job.rows()]
    total = sum(row["parameters"] for row in rows)
    return [GroupRow(**row, share=f"{100 * row['parameters'] / total:.3g}%") for row in rows]


def _places(put: Put, labels: Mapping[str, str]) -> list[PlaceRow]:
    """Where an entry's adapter is, a row for each place of the layers, and what of it trains."""
    named = getattr(put.entry, "name", "default")
    what = f"{put.entry.method}{'' if named == 'default' else f' {named!r}'}"
    by_weight: dict[str, list[Any]] = {}
    for path, leaf in put.leaves.items():
        if labels[path] == FROZEN:
            continue
        by_weight.setdefault(path.partition("@")[0], []).append(leaf)
    return _grouped((what, path, leaves) for path, leaves in by_weight.items())


def _grouped(items: Iterable[tuple[str, str, list[Any]]]) -> list[PlaceRow]:
    """Rows of what is alike but for its layer."""
    found: dict[tuple[str, str, str], tuple[list[str], list[Any]]] = {}
    for what, path, nodes in items:
        before, _, behind = around_layer(path)
        paths, every = found.setdefault((what, before, behind), ([], []))
        paths.append(path)
        every += nodes
    rows = []
    for (what, *_), (paths, every) in sorted(found.items(), key=lambda item: (item[0][0], natural(item[1][0][0]))):
        leaves = [leaf for node in every for leaf in _parts(node)]
        rows.append(
            PlaceRow(
                what=what,
                where=folded(paths)[0],
                leaves=len(leaves),
                parameters=sum(map(_size, every)),
                bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
            )
        )
    return rows


def _size(node: Any) -> int:
    """How many numbers a leaf or a weight stands for."""
    return int(np.prod(node.shape))


def _parts(node: Any) -> list[Any]:
    return list(flatten({"": node}).values())
