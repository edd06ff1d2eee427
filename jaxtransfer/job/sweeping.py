"""A run for every combination of some values: together as one program where it can be, otherwise in turn."""

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtransfer import checkpoint
from jaxtransfer import config as configs
from jaxtransfer.adapt.groups import FROZEN
from jaxtransfer.config import Config, ConfigError
from jaxtransfer.job import caching, commands, events, record
from jaxtransfer.job.models import page_of
from jaxtransfer.job.optimization import optimizer_groups
from jaxtransfer.job.prepare import Job, prepare, trained
from jaxtransfer.job.together import train_together
from jaxtransfer.job.train import final_split
from jaxtransfer.run import Interrupted, Stop
from jaxtransfer.study import interval
from jaxtransfer.tree.paths import flatten

SWEEP = "sweep.json"
SEED = "run.seed"
MEMORY = 2 << 30
"""Bytes that the states of runs that train together may take."""
_TRACED = re.compile(r"run\.seed|optimizer\.(groups\.\w+\.)?(lr|weight_decay)")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

Axes = Mapping[str, Sequence[str]]


def parse_axes(texts: Sequence[str]) -> dict[str, list[str]]:
    """Keys and their values of ``KEY=V1,V2,...`` and ``KEY=FIRST..LAST``; ``seed`` is ``run.seed``.

    Raises:
      ConfigError: no key, fewer than two values, a value or a key twice, a range that runs backwards.

    Example:
      >>> parse_axes(["optimizer.lr=1e-4,3e-4", "seed=0..2"])
      {'optimizer.lr': ['1e-4', '3e-4'], 'run.seed': ['0', '1', '2']}
    """
    out: dict[str, list[str]] = {}
    for text in texts:
        key, _, given = text.partition("=")
        key = SEED if key == "seed" else key
        found = _RANGE.fullmatch(given)
        values = [str(i) for i in range(int(found[1]), int(found[2]) + 1)] if found else given.split(",")
        if not key or len(set(values)) < 2 or len(set(values)) < len(values) or "" in values:
            raise ConfigError(
                f"--sweep {text}: expected KEY=V1,V2,... or KEY=FIRST..LAST, two different values or more"
            )
        if key in out:
            raise ConfigError(f"--sweep {text}: {key} is swept already")
        out[key] = values
    return out


def sweep(path: Path, overrides: Sequence[tuple[str, str]], axes: Axes, *, console: Any) -> dict[str, Any]:
    """Runs a configuration with every combination of some values.

    Where nothing but seeds, rates and weight decay differ and part of the model is frozen, they train together: one
    program, mapped over their states. Otherwise each is a run of its own, in a folder of its own below ``out``.

    Args:
      path: of the configuration; ``overrides`` come first.
      overrides: (dotted key, YAML text).
      axes: dotted key -> its values as YAML text.
      console: a rich console, for progress.

    Returns:
      ``how``, and why; ``results``, a row each, where there are validation data the best by them first; ``seeds``,
      the mean over seeds with its interval, where they are swept and something else is.

    Raises:
      ConfigError: a key or a value that the configuration does not take.
    """
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    loaded = [configs.load(path, [*overrides, *point.items()]) for point in points]
    out = Path(loaded[0].out)
    with _going_on(), Stop() as stop, events.Screen(console) as screen, checkpoint.RunLock(out):
        reason = _differ(loaded[0], axes)
        job = prepare(loaded[0], screen.say if reason is None else lambda text: None)
        if reason is None:
            _check_read(job, points, loaded)
        checkpoint.claim(out, {**job.identity(), **{f"sweep {key}": list(values) for key, values in axes.items()}})
        if (out / SWEEP).exists():
            screen.say(f"{out} holds this sweep, finished; remove the folder to run it again")
            return json.loads((out / SWEEP).read_text(encoding="utf-8"))
        reason = reason or _unfit(job, len(points), SEED in axes)
        screen.say(f"{len(points)} runs together, as one program" if reason is None else _in_turn(points, reason))
        if reason is None:
            rows = _together(job, loaded, axes, out, stop, screen)
    if reason is not None:
        with _going_on():
            rows = [_alone(config, out / _slug(point), console) for config, point in zip(loaded, points, strict=True)]
    found = {
        "how": "together" if reason is None else f"in turn: {reason}",
        "results": _table(job, points, rows),
        **_over_seeds(job, points, rows),
    }
    record.write_json(out / SWEEP, found)
    return found


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """Says of a signal in here how a sweep goes on: its folder is no run's, and only its runs in turn have states."""
    try:
        yield
    except Interrupted as error:
        error.further = "the same command goes on with the runs that are not finished"
        raise


def _differ(config: Config, axes: Axes) -> str | None:
    """Why runs of these configurations are different programs; None where they are one."""
    if other := [key for key in axes if not _TRACED.fullmatch(key)]:
        return f"{other[0]} is part of the program"
    beside = {"study": config.study, "pretrain": config.pretrain, "phases": config.phases or None}
    if given := [name for name, value in beside.items() if value is not None]:
        return f"{given[0]} takes runs of its own" + ("; --study null leaves it out" if given[0] == "study" else "")
    if not config.objective.plain:
        return "the objective has terms, which hold to what each began from"
    return "source.init: scratch draws another model by seed" if config.source.init == "scratch" else None


def _check_read(job: Job, points: Sequence[Mapping[str, str]], loaded: Sequence[Config]) -> None:
    """Raises ConfigError where two values of a key make the same run: nothing that trains reads it."""
    made = [(optimizer_groups(config, job.labels, job.steps), config.run.seed) for config in loaded]
    for index, one in enumerate(made):
        if (first := made.index(one)) < index:
            key = next(key for key, value in points[index].items() if points[first][key] != value)
            rates = ", ".join(f"{name} at {group.lr:g}, decay {group.weight_decay:g}" for name, group in one[0].items())
            raise ConfigError(
                f"--sweep {key}: {points[first][key]} and {points[index][key]} make the same run: it trains {rates}; a "
                "group's own rate is optimizer.groups.GROUP.lr",
                key,
            )


def _unfit(job: Job, count: int, seeds: bool) -> str | None:
    """Why runs of one program should not train together; None where they should."""
    labels = flatten(job.labels)
    if FROZEN not in labels.values():
        return "all of the model trains, so there is nothing to share"
    if job.mesh is not None or jax.process_count() > 1:
        return "they are on a mesh"
    known = flatten(job.trunk.params)
    source = flatten(job.adapted(job.config.run.seed).params)
    if seeds and (own := [p for p, leaf in source.items() if labels[p] == FROZEN and known.get(p) is not leaf]):
        return f"{own[0]} is frozen, but differs by seed"
    size = count * sum(leaf.nbytes for leaf in jax.tree.leaves(job.start(job.config.run.seed)[0]))
    return f"their states would take {size / 2**30:.1f} GiB" if size > MEMORY else None


def _in_turn(points: Sequence[Any], reason: str) -> str:
    return f"{len(points)} runs in turn: {reason}"


def _together(
    job: Job, loaded: Sequence[Config], axes: Axes, out: Path, stop: Stop, screen: events.Screen
) -> list[dict[str, Any]]:
    """The rows of runs that train as one program, in the order of their configurations."""
    jobs = [_traced(job, config) for config in loaded]
    first = caching.cached(jobs[0], out / caching.FOLDER, screen.say, stop.check, traced=True)
    shared = {"step": first.step, "evaluate": first.evaluate, "features": first.features}
    jobs = [dataclasses.replace(one, **shared) for one in jobs]
    rows = train_together(jobs, stop, screen)
    caching.discard(out / caching.FOLDER)
    return rows


def _traced(job: Job, config: Config) -> Job:
    """The job of another configuration of the same program; its rates are part of its state."""
    params = job.adapted(config.run.seed).params
    where = {"mesh": job.mesh, "sharding": job.sharding, "terms": job.terms, "traced": True}
    return dataclasses.replace(job, config=config, **trained(config, job.task, job.model, params, job.steps, **where))


def _alone(config: Config, out: Path, console: Any) -> dict[str, Any]:
    """The row of a run of its own."""
    commands.run(dataclasses.replace(config, out=str(out)), console=console)
    page = page_of(out)
    return {"metrics": page["metrics"], "step": page["run"]["best_step"] or page["run"]["steps"]}


def _slug(point: Mapping[str, str]) -> str:
    """A folder's name of a combination: ``lr=1e-4,seed=0``."""
    return ",".join(
        f"{key.rpartition('.')[2]}={re.sub(r'[^-+.a-zA-Z0-9]', '_', value)}" for key, value in point.items()
    )


def _table(job: Job, points: Sequence[Mapping[str, str]], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a run: its values, the metric on the validation data and on what is reported."""
    named = []
    for point, row in zip(points, rows, strict=True):
        cells = {f"{split} {job.metric}": row["metrics"][split][job.metric] for split in _splits(job, row)}
        named.append({**_short(point), **cells, "step": row["step"]})
    if "validation" in job.examples:
        by, sign = f"validation {job.metric}", 1 if job.metric in job.task.minimize else -1
        named.sort(key=lambda row: (row[by]["value"] is None, sign * (row[by]["value"] or 0.0)))
    return named


def _splits(job: Job, row: Mapping[str, Any]) -> list[str]:
    return [split for split in dict.fromkeys(("validation", final_split(job))) if split in row["metrics"]]


def _short(point: Mapping[str, str]) -> dict[str, str]:
    """Keys by their last part, where that is enough."""
    ends = [key.rpartition(".")[2] for key in point]
    return {end if ends.count(end) == 1 else key: value for (key, value), end in zip(point.items(), ends, strict=True)}


def _over_seeds(job: Job, points: Sequence[Mapping[str, str]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, with Student's interval, of what else is swept."""
    groups: dict[tuple[tuple[str, str], ...], list[Mapping[str, Any]]] = {}
    for point, row in zip(points, rows, strict=True):
        rest = tuple((key, value) for key, value in point.items() if key != SEED)
        groups.setdefault(rest, []).append(row)
    if len(groups) == len(points):
        return {}
    table = []
    for rest, members in groups.items():
        cells = {}
        for split in _splits(job, members[0]):
            values = [row["metrics"][split][job.metric]["value"] for row in members]
            whole = all(value is not None for value in values)
            cells[f"{split} {job.metric}"] = dataclasses.asdict(interval(values)) if whole else None
        table.append({**_short(dict(rest)), **cells})
    return {"seeds": table}
