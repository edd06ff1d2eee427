"""The search of a plan: meshes, what is recomputed and microbatches, by arithmetic first, then by the compiler."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxtransfer import config as configs
from jaxtransfer import plan as planning
from jaxtransfer.config import Config, ConfigError, MeshConfig
from jaxtransfer.job.blueprints import Draft
from jaxtransfer.job.meshes import abstract_mesh, device_mesh, lies
from jaxtransfer.models import family
from jaxtransfer.models.attention import at_once
from jaxtransfer.parallel import ShardingError, spelled
from jaxtransfer.plan import Blueprint, Estimate, Topology

COMPILED, SHOWN = 3, 8
_REMAT: tuple[Any, ...] = (None, "dots", "full")
_ACCUMULATE = (1, 2, 4, 8, 16)
_ROOM = 0.9  # of HBM, for an estimate to be worth a try
_COUNTED = {"attention": "xla"}  # nothing can be counted of a kernel


@dataclasses.dataclass(frozen=True)
class Trial:
    """One way to run a step: its mesh, what is recomputed, its microbatches."""

    mesh: Mapping[str, int]
    remat: Any
    accumulate: int

    @property
    def run(self) -> dict[str, Any]:
        """As fields of ``run``."""
        return {"remat": self.remat, "accumulate": self.accumulate}


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A trial, the bytes that a device would hold, and the least time of its step, by arithmetic."""

    trial: Trial
    bytes: float
    ms: float


def given(config: Config, mesh: MeshConfig) -> Trial:
    """What the configuration says, on a mesh."""
    return Trial(dataclasses.asdict(mesh), config.run.remat, config.run.accumulate)


def drawn(draft: Draft, trial: Trial, where: Topology) -> tuple[Blueprint, float, float]:
    """A step on a mesh of no devices; operations that the model needs of each, and that are done with remat."""
    mesh = abstract_mesh(trial.mesh)
    made = draft.on(mesh, **trial.run, **_COUNTED)
    done = planning.count(planning.trace(made)) / where.count
    plain = draft.on(mesh, remat=None, accumulate=1, **_COUNTED)
    with at_once():
        needed = planning.count(planning.trace(plain))
    return made, needed / where.count, done


def estimated(draft: Draft, made: Blueprint, trial: Trial, jaxpr: Any = None) -> Estimate:
    """What a step takes, by arithmetic."""
    c = draft.source.model.config
    layers, width = getattr(c, "num_hidden_layers", 0), getattr(c, "hidden_size", 0)
    rows = next(iter(made.batch.values())).shape[0]
    length = max((leaf.shape[1] for leaf in made.batch.values() if len(leaf.shape) == 2), default=_patches(c))
    features = rows * length * width * jnp.dtype(draft.config.run.precision).itemsize
    jaxpr = planning.trace(made) if jaxpr is None else jaxpr
    return planning.estimate(jaxpr, made, activations=features, layers=layers, accumulate=trial.accumulate)


def _patches(c: Any) -> int:
    grid = getattr(c, "grid", (1, 1))
    return grid[0] * grid[1]


def ranked(draft: Draft, where: Topology, devices: Any = None) -> list[Ranked]:
    """What there is to try, the fastest by arithmetic first of those that may fit; the smallest first if none may.

    Raises:
      ConfigError: no mesh of the slice divides the batch and the parameters.
    """
    found: list[Ranked] = []
    traces: dict[Any, Any] = {}  # the same program on every mesh
    for mesh in (mesh for mesh in meshes(draft, where) if devices is None or lies(mesh, devices)):
        try:
            made = draft.on(abstract := abstract_mesh(mesh), **_COUNTED)
        except ShardingError:  # of a leaf that does not divide: another mesh is as good
            continue
        for how in itertools.product(_REMAT, _ACCUMULATE):
            trial = Trial(mesh, *how)
            if draft.config.data.batch % (mesh["data"] * mesh["fsdp"] * trial.accumulate):
                continue
            if how not in traces:
                traces[how] = planning.trace(draft.on(abstract, **trial.run, **_COUNTED))
            found.append(_rank(draft, trial, made, traces[how], where))
    if not found:
        raise ConfigError(
            f"data.batch: no mesh of {where.count} devices divides {draft.config.data.batch} rows and the parameters",
            "data.batch",
        )
    fitting = [one for one in found if one.bytes <= _ROOM * where.chip.hbm]
    if not fitting:
        return sorted(found, key=lambda one: one.bytes)
    return sorted(fitting, key=lambda one: (round(one.ms, 3), one.trial.mesh["tensor"], one.trial.accumulate))


def _rank(draft: Draft, trial: Trial, made: Blueprint, jaxpr: Any, where: Topology) -> Ranked:
    found = estimated(draft, made, trial, jaxpr)
    held = sum(made.bytes().values()) + found.temporaries
    limits = planning.bounds(found.flops, found.traffic, found.sent, where.chip)
    return Ranked(trial, held, max(limit.ms for limit in limits))


def meshes(draft: Draft, where: Topology) -> Iterator[dict[str, int]]:
    """The meshes of a slice's devices; ``tensor`` only for families that say how their layers are split, to eight."""
    most = 8 if family(draft.source.model.family).tensor_rules else 1
    for tensor in (2**i for i in range(most.bit_length())):
        for data in (n for n in range(1, where.count + 1) if where.count % n == 0):
            if where.count % (tensor * data) == 0:
                yield {"data": data, "fsdp": where.count // (tensor * data), "tensor": tensor, "sequence": 1}


def compile_best(
    draft: Draft, trials: Sequence[Ranked], where: Topology, devices: Any, say: Any
) -> tuple[Ranked, list[dict[str, Any]]]:
    """Compiles the first few, and more where none of them fits; the one of the least bound, and all that was tried."""
    rows, fitting = [], []
    for one in trials[:SHOWN]:
        if len(fitting) == COMPILED:
            break
        made = draft.on(device_mesh(one.trial.mesh, devices), **one.trial.run)
        found = planning.compiled(made)
        flops = planning.count(planning.trace(made)) / where.count
        limits = planning.bounds(flops, found.traffic, planning.sent(found.collectives), where.chip)
        held = sum(made.bytes().values()) + found.temporaries
        real = Ranked(one.trial, held, max(limit.ms for limit in limits))
        fitting += [real] if found.fits else []
        rows.append({**row(one), "compiled": "fits" if found.fits else "does not fit", "real_bytes": held,
                     "real_ms": round(real.ms, 1) if found.fits else None})  # fmt: skip
        say(f"compiled {_words(one.trial)}: {rows[-1]['compiled']}, {found.seconds:.0f} s")
    return min(fitting, key=lambda one: one.ms) if fitting else trials[0], rows


def row(one: Ranked) -> dict[str, Any]:
    """A trial as a line of a table."""
    trial = one.trial
    return {**trial.mesh, **trial.run, "bytes": round(one.bytes), "ms": round(one.ms, 1)}


def _words(trial: Trial) -> str:
    return f"{spelled(trial.mesh)}, remat {trial.remat}, accumulate {trial.accumulate}"


def new_file(config: Config, topology: str, to: Path | None) -> Path:
    """Where the best configuration goes: a file that is not there yet.

    Raises:
      ConfigError: it is, or its folder is not.
    """
    to = Path(f"{Path(config.out).name}-{topology.replace(':', '-')}.yaml") if to is None else to
    if to.exists():
        raise ConfigError(f"--to: {to} is there already; name a new file", "")
    if not to.parent.is_dir():
        raise ConfigError(f"--to: there is no folder {to.parent}; make it, or name another", "")
    return to


def write(config: Config, trial: Trial, to: Path) -> None:
    """The configuration with a trial's mesh, remat and microbatches, as a new file."""
    run = dataclasses.replace(config.run, **trial.run)
    text = configs.dump(dataclasses.replace(config, mesh=MeshConfig(**trial.mesh), run=run))
    with to.open("x", encoding="utf-8") as file:
        file.write(text)
