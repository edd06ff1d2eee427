"""Reading a checkpoint back, onto any layout and any mesh, all of it or none."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxtransfer.checkpoint import arrays
from jaxtransfer.checkpoint.leaves import Row, Spec, compare, is_key, named, rows_of, table
from jaxtransfer.checkpoint.manifest import META, CheckpointError, unpacked, verify, verify_together
from jaxtransfer.checkpoint.places import places_of
from jaxtransfer.checkpoint.store import ARRAYS
from jaxtransfer.parallel import put
from jaxtransfer.tree import fingerprint, layers_of
from jaxtransfer.tree.rules import Rules
from jaxtransfer.tree.stacks import stacked_length
from jaxtransfer.types import Lineage, State


def metadata(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: ``leaves`` (by name, as laid out), ``lineage``, ``extra``, ``versions``.

    Raises:
      DamagedError: it is no whole checkpoint, or this part of it is not what was written.
    """
    verify(path, only=META)
    return unpacked((Path(path) / META).read_bytes())


def restore(
    path: str | Path,
    *,
    like: State | tuple[State, Any],
    mesh: Mesh | None = None,
    sharding: Rules = (),
    lineage: Lineage | None = None,
) -> tuple[State, Any, dict[str, Any]]:
    """The state, the frozen leaves and the extra of a checkpoint, bit for bit, in the layout and places of ``like``.

    Any layout restores into any: parameters, statistics and optimizer leaves are carried over by canonical path. Leaves
    go where those of ``like`` are; those of ``like`` that are nowhere (abstract, without sharding) go by the rules onto
    the mesh, or else to the default device.

    Args:
      path: the checkpoint's folder; every byte is checked first.
      like: a state of arrays or abstract arrays, or a pair of it and the frozen leaves. Those of the frozen leaves that
        were not written stay, and must be the source's; the others are replaced.
      mesh: where leaves without a sharding of their own go.
      sharding: ``(regex, PartitionSpec)`` on canonical parameter paths; what no rule matches is replicated. Optimizer
        leaves follow their parameter.
      lineage: of the source at hand; its digest must be the checkpoint's.

    Returns:
      ``(state, frozen, extra)``; ``frozen`` is None where ``like`` has none.

    Raises:
      DamagedError: a file is not what was written.
      TreeError: leaves are missing, extra, misshapen or of another dtype; all are listed, nothing was read.
      CheckpointError: it was made from another source.
    """
    path = Path(path)
    verify_together(path)
    meta = metadata(path)
    _check_source(path, meta["lineage"], lineage)
    pair = like if isinstance(like, tuple) else (like, None)
    leaves, treedef = named(*pair)
    saved = {name: Spec(tuple(x["shape"]), x["dtype"], x["key"]) for name, x in meta["leaves"].items()}
    written = {name for name in saved if meta["leaves"][name]["written"]}
    asked = saved if isinstance(like, tuple) else {name: saved[name] for name in saved if name in written}
    specs = {name: Spec.of(name, leaf) for name, leaf in leaves.items()}
    compare(specs, asked).check(f"{path} does not fit `like`")
    plan = _plan(specs, saved, written)
    _check_kept(path, meta["lineage"], leaves, plan)
    others = {name: _stored(saved[name]) for name in saved if name.startswith("frozen/") and name not in asked}
    others = {name.removeprefix("frozen/"): leaf for name, leaf in others.items()}
    places = places_of(*pair, others, mesh, sharding)
    few = {name for name in written if meta["leaves"][name]["small"]}
    values = _read(path / ARRAYS, leaves, plan, {name: saved[name] for name in written}, few, places)
    restored, kept = jax.tree.unflatten(treedef, [values[name] for name in leaves])
    return restored, kept["frozen"], meta["extra"]


def _check_source(path: Path, saved: Mapping[str, Any], lineage: Lineage | None) -> None:
    if lineage is not None and lineage.digest != saved["digest"]:
        raise CheckpointError(
            f"{path}: was made from {saved['ref']} (digest {saved['digest']}), but the source here is {lineage.ref} "
            f"(digest {lineage.digest}); load the source that it was made from"
        )


Plan = Mapping[str, list[Row | None]]
"""For each leaf asked for, where its rows are: in a written leaf, or None where it stays as it is."""


def _plan(specs: Mapping[str, Spec], saved: Mapping[str, Spec], written: set[str]) -> Plan:
    """A leaf that is written under its own name is one row, all of it; others are put together layer by layer."""
    rows = table(saved, saved)
    plan: dict[str, list[Row | None]] = {}
    for name, spec in specs.items():
        found = [(name, None)] if name in written else [rows[canonical] for canonical in rows_of(name, spec)]
        plan[name] = [row if row[0] in written else None for row in found]
    return plan


def _check_kept(path: Path, lineage: Mapping[str, Any], leaves: Mapping[str, Any], plan: Plan) -> None:
    """The leaves that the checkpoint leaves to the source must be there, and be the source's."""
    kept = {name: leaves[name] for name, rows in plan.items() if None in rows}
    abstract = [name for name, leaf in kept.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    if abstract:
        raise CheckpointError(
            f"{path}: {_some(abstract)}: unchanged since the source, so not in the checkpoint; pass the source's arrays"
        )
    left = {layer for name in kept for layer, row in zip(layers_of(name), plan[name], strict=True) if row is None}
    source = {f"frozen/{path}": value for path, value in lineage["fingerprints"].items()}
    wrong = [layer for layer, value in fingerprint(kept).items() if layer in left and value != source.get(layer)]
    if wrong:
        raise CheckpointError(
            f"{path}: {_some(wrong)}: not in the checkpoint, and not bit-identical to its source {lineage['ref']} "
            f"(digest {lineage['digest']}); load that source, in the same dtype"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read(
    folder: Path,
    leaves: Mapping[str, Any],
    plan: Plan,
    written: Mapping[str, Spec],
    few: Collection[str],
    places: Mapping[str, Sharding | None],
) -> dict[str, Any]:
    """Every leaf's value: read straight to the devices that it goes to, or to the host where it goes to none of them.

    Leaves of another layout are put together on the devices, so that no process reads what none of its devices hold.
    """
    stored = {name: _stored(spec) for name, spec in written.items()}
    landing = _landing(plan, written, places)
    wanted = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=landing[n]) for n, x in stored.items() if x.size}
    empty = {name: np.zeros(x.shape, x.dtype) for name, x in stored.items() if not x.size}
    found = arrays.read(folder, wanted, few) | empty

    def row(name: str, i: int, source: Row | None) -> Any:
        value, index = (leaves[name], i) if source is None else (found[source[0]], source[1])
        if places[name] is None:
            value = np.asarray(value)
        return value if index is None else value[index]

    def value(name: str, leaf: Any, rows: list[Row | None]) -> Any:
        if not any(rows):
            return leaf
        parts = [row(name, i, source) for i, source in enumerate(rows)]
        made = parts[0]
        if stacked_length(name) and rows != [(name, None)]:
            made = np.stack(parts) if places[name] is None else jnp.stack(parts)
        if isinstance(leaf, np.ndarray):
            return made
        made = jax.device_put(made) if (place := places[name]) is None else put(made, place)
        return jax.random.wrap_key_data(made, impl=written[next(r[0] for r in rows if r)].key) if is_key(leaf) else made

    return {name: value(name, leaf, plan[name]) for name, leaf in leaves.items()}


def _landing(
    plan: Plan, written: Mapping[str, Spec], places: Mapping[str, Sharding | None]
) -> dict[str, Sharding | None]:
    """Where each written leaf is read to: where the first leaf that is made of it goes, layers split as they are."""
    found: dict[str, Sharding | None] = dict.fromkeys(written)
    for name, rows in plan.items():
        for stored, index in (row for row in rows if row is not None and found[row[0]] is None):
            place, stacked = places[name], stacked_length(name) is not None and rows != [(name, None)]
            if isinstance(place, NamedSharding) and stacked != (index is not None):
                layer = place.spec[1:] if stacked else (None, *place.spec)
                place = NamedSharding(place.mesh, PartitionSpec(*layer))
            found[stored] = place if isinstance(place, (NamedSharding, SingleDeviceSharding)) else None
    return found


def _stored(spec: Spec) -> Any:
    """What was written for a leaf; for a typed key, its data."""
    if spec.key is None:
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype))
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=spec.key)))
    return jax.ShapeDtypeStruct((*spec.shape, *data.shape), data.dtype)
