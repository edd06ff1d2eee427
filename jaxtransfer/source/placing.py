"""From views of mapped files to arrays on devices: each process copies only the parts that its own devices hold.

A leaf that is quantised goes to the devices in the parts, and in the dtype, in which they will hold it; one program
packs it there, and only then is a further one read. So at most `AHEAD` and the one at hand are there in full.
"""

import contextlib
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxtransfer.adapt.quantized import Quantized, quantized
from jaxtransfer.parallel import specs
from jaxtransfer.source.resolve import SourceError
from jaxtransfer.tree import flatten, unflatten
from jaxtransfer.tree.rules import Rules
from jaxtransfer.tree.weights import is_weight

CHUNK = 1 << 20
AHEAD = 1
"""How many leaves are read while one is quantised."""


def shardings(expected: Mapping[str, Any], mesh: Mesh | None, rules: Rules) -> dict[str, Any]:
    """The sharding of every leaf by path, that of a leaf type as the type with one for each part; None without a mesh.

    Raises:
      SourceError: rules without a mesh.
      ShardingError: a spec that does not divide its leaf; the leaf is named.
    """
    if mesh is not None:
        return flatten(specs.shardings(unflatten(expected), mesh, rules), is_leaf=is_weight)
    refuse_rules(rules)
    return dict.fromkeys(expected)


def refuse_rules(rules: Any) -> None:
    """Raises :class:`SourceError` for rules without a mesh; a function that gives rules is asked only with one."""
    if rules and not callable(rules):
        raise SourceError(f"{len(rules)} sharding rules but no mesh to shard over")


def arrays(
    views: Mapping[str, np.ndarray],
    types: Mapping[str, np.dtype],
    where: Mapping[str, Any],
    methods: Mapping[str, str],
    pool: ThreadPoolExecutor,
    ref: str,
) -> dict[str, Any]:
    """Arrays on their devices from views of mapped files, of which only the addressable shards are read.

    Args:
      views: path -> tensor.
      types: path -> the dtype that the leaf is to have; see `target`.
      where: of `shardings`.
      methods: path -> how the leaf is quantised, where it is.
      pool: reads.
      ref: for messages.

    Raises:
      SourceError: values that are not finite in the dtype that they are to have; the leaves are named.
    """
    broken: set[str] = set()

    def read(path: str) -> jax.Array:
        view, own = views[path], types[path]
        if path in methods and view.dtype.itemsize < own.itemsize:
            own = view.dtype  # it is packed from what is stored; widening it would change nothing

        def part(index: Any) -> np.ndarray:
            piece = copied(view[(*index, ...)], own)
            if not _finite(piece):
                broken.add(path)
            return piece

        if (sharding := of_whole(where[path])) is None:
            return jax.device_put(part(()))
        return jax.make_array_from_callback(view.shape, sharding, part)

    plain = [path for path in views if path not in methods]
    made: dict[str, Any] = dict(zip(plain, pool.map(read, plain), strict=True))
    for path, array in _ahead(pool, read, methods):
        packed = quantized(path, array, methods[path], stands_for=str(types[path]), where=where[path])
        made[path] = jax.block_until_ready(packed)
        del array
    if broken:
        named = ", ".join(sorted(broken)[:6]) + (f" and {len(broken) - 6} more" if len(broken) > 6 else "")
        cast = "".join(sorted({f" as {types[path]}" for path in broken if types[path] != views[path].dtype}))
        raise SourceError(f"{ref}: NaN or infinite values{cast} in {named}; the checkpoint cannot be used")
    return made


def of_whole(where: Any) -> NamedSharding | None:
    """The sharding of a leaf in full: its packed part has its axes."""
    return getattr(where, where.whole_blocks[0]) if isinstance(where, Quantized) else where


def _ahead(pool: ThreadPoolExecutor, read: Callable[[str], Any], paths: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """``(path, read(path))`` in order, the next `AHEAD` being read meanwhile and no more."""
    waiting: deque[tuple[str, Future[Any]]] = deque()
    for path in paths:
        waiting.append((path, pool.submit(read, path)))
        if len(waiting) > AHEAD:
            name, future = waiting.popleft()
            yield name, future.result()
            del future
    while waiting:
        name, future = waiting.popleft()
        yield name, future.result()
        del future


def target(path: str, stored: np.dtype, dtype: Any) -> np.dtype:
    """The dtype that a leaf is to have: floats ``dtype``, where one is asked for.

    Raises:
      SourceError: ``dtype`` is no float, or jax does not hold what is stored.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise SourceError(f"dtype={dtype!r}: floating-point parameters cannot be loaded as that")
    wanted = np.dtype(dtype) if dtype is not None and jnp.issubdtype(stored, jnp.floating) else stored
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise SourceError(f"{path} is {wanted}, which jax holds only with jax_enable_x64; give dtype='float32'")
    return wanted


def copied(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy in C order, in pages of its own: a CPU device takes them over as they are, so it is the only copy.

    Pages from the kernel, and not numpy's memory: they are aligned, and all of them go back when the array goes.
    """
    pages = mmap.mmap(-1, max(1, view.size * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a kernel without huge pages; with them a third faster
        pages.madvise(mmap.MADV_HUGEPAGE)
    out = np.frombuffer(pages, dtype, view.size).reshape(view.shape)
    with np.errstate(over="ignore"):  # what overflows in a cast is infinite, and reported as such
        np.copyto(out, view, casting="unsafe")
    return out


def _finite(array: np.ndarray) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    flat = array.reshape(-1)
    return all(bool(np.isfinite(flat[i : i + CHUNK]).all()) for i in range(0, flat.size, CHUNK))
