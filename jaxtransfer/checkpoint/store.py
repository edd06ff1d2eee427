"""Writing a checkpoint: which leaves, what is said about them, and in what order."""

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxtransfer.checkpoint import arrays
from jaxtransfer.checkpoint.leaves import Spec, is_key, named
from jaxtransfer.checkpoint.manifest import META, CheckpointError, Draft, packed
from jaxtransfer.parallel import distributed
from jaxtransfer.tree import fingerprint, layers_of
from jaxtransfer.types import Lineage, State

ARRAYS = "arrays"
_ROOM = 1.2  # free disk asked for, as a multiple of the arrays' bytes


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What one checkpoint will hold: the arrays by name, which of them are written as one, and the JSON beside them."""

    arrays: dict[str, Any]
    small: set[str]
    meta: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """The bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def save(
    path: str | Path,
    state: State,
    frozen: Any,
    lineage: Lineage,
    *,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one checkpoint, a folder, and returns its path: at once whole, or not there.

    With several processes all must call it, at the same point; each writes what its own devices hold.

    Written are all of the state and those frozen leaves that are not bit-identical to the source; the rest is the
    source's, by its digest. Arrays are kept as laid out; a stack is written if any of its layers differs.

    Args:
      path: the folder to make; it must not exist, or be empty.
      state: laid out as it is.
      frozen: the laid-out complement of ``state.params``, None where a leaf trains.
      lineage: of the source that the frozen leaves came from.
      extra: JSON-able with string keys, handed back by ``restore``: the loader's position, metrics, digests.

    Raises:
      CheckpointError: the folder holds something, the disk has not 1.2 times the room, or writing failed.
    """
    path = Path(path)
    begin(path, snapshot(state, frozen, lineage, extra))()
    return path


def snapshot(state: State, frozen: Any, lineage: Lineage, extra: Mapping[str, Any] | None) -> Snapshot:
    """Chooses the leaves to write, and describes all of them.

    Raises:
      CheckpointError: a leaf is no array, or not one over all of several processes, or the extra is not JSON-able.
    """
    leaves, _ = named(state, frozen)
    specs = {name: Spec.of(name, leaf) for name, leaf in leaves.items()}
    _check_global(leaves)
    kept = unchanged(frozen, lineage)
    written = {name: leaf for name, leaf in leaves.items() if name not in kept and specs[name].size}
    written = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in written.items()}
    small = arrays.small(written)
    how = {name: {"written": name not in kept, "small": name in small} for name in specs}
    meta = {
        "leaves": {name: {**dataclasses.asdict(spec), **how[name]} for name, spec in specs.items()},
        "lineage": {field.name: getattr(lineage, field.name) for field in dataclasses.fields(lineage)},
        "extra": dict(extra or {}),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "numpy", "orbax-checkpoint")},
    }
    try:
        meta = json.loads(json.dumps(meta, default=_plain))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"extra cannot be written as JSON: {error}") from None
    return Snapshot(written, small, meta)


def _check_global(leaves: Mapping[str, Any]) -> None:
    """Of an array of one process's own nobody knows whether the others' is the same."""
    if jax.process_count() == 1:
        return
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            raise CheckpointError(
                f"{name}: lies on this process alone, one of {jax.process_count()}; place it on a mesh over all of them"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} {value!r} is not JSON-able")


def unchanged(frozen: Any, lineage: Lineage) -> set[str]:
    """The names of the frozen leaves of which every layer is bit-identical to the source."""
    found, source = fingerprint({"frozen": frozen}), lineage.fingerprints
    same = {path for path, value in found.items() if source.get(path.removeprefix("frozen/")) == value}
    return {name for name in named(None, frozen)[0] if same.issuperset(layers_of(name))}


def check_room(path: Path, snap: Snapshot) -> None:
    """Looks before anything is written.

    Raises:
      CheckpointError: the folder holds something already, or the disk is too full.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path}: exists already and is not empty; choose another folder, or remove it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    need, free = int(snap.nbytes * _ROOM), shutil.disk_usage(parent).free
    if free < need:
        raise CheckpointError(
            f"{path}: the disk has {free:,} bytes free, a checkpoint takes {need:,} (1.2 times its arrays); make room"
        )


def begin(path: Path, snap: Snapshot) -> Callable[[], None]:
    """Takes the arrays off the devices, and returns the function that finishes the checkpoint, for any thread.

    Once this returns, the arrays may be donated. Whatever goes wrong, here or there, on this process or another, leaves
    nothing behind and is raised on all.

    Raises:
      CheckpointError: the folder holds something, the disk is too full, or not all processes see it.
    """
    draft = Draft(path, lambda: check_room(path, snap))
    with _abandoning(draft), distributed.together(f"begin {path}", error=CheckpointError):
        wait = arrays.write_async(draft.folder / ARRAYS, snap.arrays, snap.small)

    def finish() -> None:
        with _abandoning(draft):
            with distributed.together(f"write {path}", error=CheckpointError):
                wait()
                if distributed.is_first():
                    (draft.folder / META).write_bytes(packed(snap.meta))
            draft.publish()

    return finish


@contextmanager
def _abandoning(draft: Draft) -> Iterator[None]:
    """Removes what was written if the block fails, and says so in one line whatever the failure was."""
    try:
        yield
    except BaseException as error:
        draft.abandon()
        if not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).replace(f"{draft.folder}/", "").split()) or type(error).__name__
        if len(reason) > 400:  # what the system said stands last, behind every file it happened to
            reason = f"{reason[:150]} ... {reason[-250:]}"
        raise CheckpointError(f"{draft.path}: was not saved ({reason}); earlier checkpoints are untouched") from error
