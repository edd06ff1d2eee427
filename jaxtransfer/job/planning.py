"""The command plan: a run's real step, compiled for a slice that is not here, and what it would hold, do and send."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxtransfer import plan as planning
from jaxtransfer.config import Config, ConfigError, MeshConfig
from jaxtransfer.job import auto_mesh, blueprints, meshes, searching
from jaxtransfer.job.blueprints import Draft
from jaxtransfer.job.searching import Trial
from jaxtransfer.parallel import spelled
from jaxtransfer.plan import Chip, Compiled, Topology

GIB = 2**30


def plan(
    config: Config, topology: str, *, search: bool = False, to: Path | None = None, say: Any = print
) -> dict[str, Any]:
    """What each device of a slice would hold, compute and send in one step of a run; no weights and no data are read.

    TPUs' slices are compiled for by their own compiler; for GPUs there is arithmetic alone, and the answer says so.

    Args:
      config: the configuration.
      topology: of the slice, ``v5e:4x4``.
      search: try meshes, what is recomputed and microbatches, by arithmetic first, then compile the best few.
      to: where the best configuration is written, a new file; None is the run's folder's name, in this folder.
      say: is told what a user should know.

    Raises:
      TopologyError: no such slice, or no compiler for it; ConfigError: a kernel that it has not, a mesh that is not its
        own, a batch that does not divide over it, and what `blueprints.draft` raises.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing runs, and no accelerator is to be waited for
    where = planning.topology(topology)
    if config.run.attention == "splash" and not where.chip.tpu:
        raise ConfigError(
            f"run.attention: splash is a kernel of TPUs, {where.name} has none; take xla", "run.attention"
        )
    if search:
        to = searching.new_file(config, topology, to)
    elif isinstance(config.mesh, MeshConfig):
        meshes.check_mesh(dataclasses.asdict(config.mesh), where, config.data.batch, config.run.accumulate)
    devices = planning.devices(where) if where.chip.tpu else None
    draft = blueprints.draft(config, say)
    if not search:
        choice = auto_mesh.on_slice(config, draft.source, where, devices)
        return _record(draft, searching.given(config, choice.mesh), where, devices, choice.why)
    trials = searching.ranked(draft, where, devices)
    if devices is None:
        best, tried = trials[0], [searching.row(each) for each in trials[: searching.SHOWN]]
    else:
        best, tried = searching.compile_best(draft, trials, where, devices, say)
    if to is not None:
        searching.write(config, best.trial, to)
    return {**_record(draft, best.trial, where, devices), "written": str(to), "tried": tried}


def _record(draft: Draft, trial: Trial, where: Topology, devices: Any, chosen: str = "") -> dict[str, Any]:
    """What is shown of one way to run a step, and why its mesh was chosen."""
    chip = where.chip
    drawn, model, done = searching.drawn(draft, trial, where)
    page: dict[str, Any] = {
        "topology": f"{where.name}, {where.count} devices of {chip.hbm / GIB:.2f} GiB",
        "mesh": chosen or spelled(trial.mesh),
        "batch": ", ".join(f"{name} {'x'.join(map(str, leaf.shape))}" for name, leaf in drawn.batch.items()),
        "attention": draft.config.run.attention,
        "remat": str(trial.remat or "none"),
        "accumulate": trial.accumulate,
    }
    if devices is None:
        page["by"] = f"arithmetic: no compiler for {chip.name} is at hand, so all but the arguments is an estimate"
        found = searching.estimated(draft, drawn, trial)
        rows = planning.memory(drawn, round(found.temporaries), chip)
        fits, moved, sent = rows[-1].bytes <= chip.hbm, found.traffic, found.sent
    else:
        compiled = planning.compiled(draft.on(meshes.device_mesh(trial.mesh, devices), **trial.run))
        page["by"] = f"libtpu, compiled in {compiled.seconds:.1f} s"
        rows = planning.memory(drawn, compiled.temporaries, chip, code=compiled.code, padding=compiled.padding)
        fits, moved, sent = compiled.fits, compiled.traffic, planning.sent(compiled.collectives)
    page["fits"] = f"yes, {rows[-1].bytes / GIB:.2f} GiB a device" if fits else "no"
    if not fits:
        page["why"] = planning.advice(drawn, rows[-1].bytes, chip, remat=trial.remat, accumulate=trial.accumulate)
        return {**page, "memory": rows}
    page |= _speed(model, done, moved, sent, chip) | {"memory": rows}
    return page if devices is None else page | {"collectives": _collectives(compiled)}


def _speed(model: float, done: float, moved: float, sent: float, chip: Chip) -> dict[str, Any]:
    limits = planning.bounds(done, moved, sent, chip)
    slowest = max(limits, key=lambda bound: bound.ms)
    share = model / (slowest.ms / 1e3 * chip.flops)
    return {
        "model TFLOP": f"{model / 1e12:.4g} a device and step, {done / 1e12:.4g} with what is recomputed",
        "at best": f"{slowest.ms:.4g} ms a step, bound by {slowest.what}: model-FLOPs utilisation {share:.1%}",
        "bounds": limits,
    }


def _collectives(found: Compiled) -> list[dict[str, Any]]:
    return [{"kind": one.kind, "count": one.count, "GB": round(one.bytes / 1e9, 3)} for one in found.collectives]
