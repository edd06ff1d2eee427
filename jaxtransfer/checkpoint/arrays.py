"""Arrays on disk: the only module that knows Orbax.

Arrays go in as a flat dictionary whose keys are quoted names, so that no name is ever read as a path. Small ones go
as one: Orbax takes a millisecond or two and 500 bytes of description for each. Its own checks are not relied on: what
it is asked to read has been compared with what was written, shape by shape, before.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np

from jaxtransfer.parallel import put

_SMALL = 1 << 16  # bytes
_TOGETHER = "%"  # the key of the small ones' bytes; no quoted name is a lone per cent


def small(arrays: Mapping[str, Any]) -> set[str]:
    """The names of the arrays that are best written as one: of few bytes, and the same on every device."""
    whole = (name for name, x in arrays.items() if not isinstance(x, jax.Array) or x.is_fully_replicated)
    return {name for name in whole if arrays[name].nbytes <= _SMALL}


def write_async(folder: Path, arrays: Mapping[str, Any], together: Collection[str] = ()) -> Callable[[], None]:
    """Copies arrays to the host, begins to write them, and returns the function that waits for the end.

    Once this returns, the arrays may be donated. Uncompressed: compression saved 8 % and took half the speed.

    Args:
      folder: made here.
      arrays: by name; no typed keys, and none without elements (Orbax refuses them, and hangs behind the refusal).
      together: those of them that are written as one; they must be `small`.
    """
    from orbax.checkpoint import v1 as ocp

    few = {name: arrays[name] for name in sorted(together)}
    large = {name: array for name, array in arrays.items() if name not in few}
    options = ocp.Context()
    options.array.saving.use_compression = False
    options.array.saving.enable_write_sharding_file = False  # where arrays go is for the reader to say
    options.array.saving.array_metadata_store = None  # of layouts, which we leave to Orbax
    quiet = ExitStack()
    quiet.enter_context(_quiet())
    try:
        with options:
            named = {quote(name, safe=""): array for name, array in _held(large).items()} | _joined(few)
            response = ocp.save_async(str(folder.absolute()), named)  # Orbax takes no relative paths
    except BaseException:
        quiet.close()
        raise

    def wait() -> None:
        with quiet:
            response.result()

    return wait


def _joined(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The bytes of all, end to end; nothing where there is none."""
    found = jax.device_get(dict(arrays)).values()
    return {_TOGETHER: np.frombuffer(b"".join(array.tobytes() for array in found), np.uint8)} if found else {}


def _held(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, copied where Orbax would only look at their memory: on CPU, host memory is device memory.

    A view that Orbax held would keep the array from being donated.
    """
    out = {name: array.copy() if isinstance(array, np.ndarray) else array for name, array in arrays.items()}
    views = {
        name: array
        for name, array in arrays.items()
        if isinstance(array, jax.Array) and next(iter(array.sharding.device_set)).platform == "cpu"
    }
    where = {name: array.sharding for name, array in views.items()}
    return out | jax.block_until_ready(jax.device_put(views, where, may_alias=False))


def read(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], together: Collection[str] = ()) -> dict[str, Any]:
    """Reads arrays by name: onto their sharding where they have one, into host memory where they have none.

    Args:
      folder: as `write_async` made it.
      wanted: every array of the folder, with the shape and dtype that it was written with.
      together: those of them that were written as one.
    """
    from orbax.checkpoint import v1 as ocp

    keys = {name: quote(name, safe="") for name in wanted if name not in together}
    abstract: dict[str, Any] = {k: wanted[n] if wanted[n].sharding else _on_host(wanted[n]) for n, k in keys.items()}
    few = {name: wanted[name] for name in sorted(together)}
    if few:
        abstract[_TOGETHER] = np.zeros(sum(_nbytes(like) for like in few.values()), np.uint8)
    with _quiet():
        found = ocp.load(str(folder.absolute()), abstract)
    return {name: found[key] for name, key in keys.items()} | _parted(found.get(_TOGETHER), few)


def _parted(joined: Any, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """What `_joined` put end to end, each an array of its own again."""
    out, start = {}, 0
    for name, like in wanted.items():
        stop = start + _nbytes(like)
        array = joined[start:stop].copy().view(like.dtype).reshape(like.shape)
        out[name], start = array if like.sharding is None else put(array, like.sharding), stop
    return out


def _nbytes(like: jax.ShapeDtypeStruct) -> int:
    return like.size * like.dtype.itemsize


def _on_host(like: jax.ShapeDtypeStruct) -> np.ndarray:
    """What tells Orbax to give a numpy array: one of the right shape, that takes no memory."""
    return np.broadcast_to(np.zeros((), like.dtype), like.shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from logging: on a full disk it writes 200 lines of what it also raises, which is all that counts."""

    def not_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts

    logger = logging.getLogger("absl")
    logger.addFilter(not_orbax)
    try:
        yield
    finally:
        logger.removeFilter(not_orbax)
