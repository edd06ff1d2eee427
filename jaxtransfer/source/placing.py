"""From views of mapped files to arrays on devices: each process copies only the parts that its own devices hold."""

import contextlib
import mmap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxtransfer.parallel import specs
from jaxtransfer.source.resolve import SourceError
from jaxtransfer.tree import flatten, unflatten
from jaxtransfer.tree.rules import Rules

CHUNK = 1 << 20


def shardings(expected: Mapping[str, Any], mesh: Mesh | None, rules: Rules) -> dict[str, NamedSharding | None]:
    """The sharding of every leaf by path; None without a mesh.

    Raises:
      SourceError: rules without a mesh.
      ShardingError: a spec that does not divide its leaf; the leaf is named.
    """
    if mesh is not None:
        return flatten(specs.shardings(unflatten(expected), mesh, rules))
    refuse_rules(rules)
    return dict.fromkeys(expected)


def refuse_rules(rules: Any) -> None:
    """Raises :class:`SourceError` for rules without a mesh; a function that gives rules is asked only with one."""
    if rules and not callable(rules):
        raise SourceError(f"{len(rules)} sharding rules but no mesh to shard over")


def arrays(
    views: Mapping[str, np.ndarray],
    where: Mapping[str, NamedSharding | None],
    dtype: Any,
    pool: ThreadPoolExecutor,
    ref: str,
) -> dict[str, jax.Array]:
    """Arrays on their devices from views of mapped files, of which only the addressable shards are read.

    Raises:
      SourceError: a dtype that jax does not hold, or values that are not finite; the leaves are named.
    """
    types = {path: _target(path, view.dtype, dtype) for path, view in views.items()}
    broken: set[str] = set()

    def make(path: str) -> jax.Array:
        view = views[path]

        def part(index: Any) -> np.ndarray:
            piece = copied(view[(*index, ...)], types[path])
            if not _finite(piece):
                broken.add(path)
            return piece

        if (sharding := where[path]) is None:
            return jax.device_put(part(()))
        return jax.make_array_from_callback(view.shape, sharding, part)

    made = dict(zip(views, pool.map(make, views), strict=True))
    if broken:
        named = ", ".join(sorted(broken)[:6]) + (f" and {len(broken) - 6} more" if len(broken) > 6 else "")
        cast = f" as {np.dtype(dtype)}" if dtype is not None else ""
        raise SourceError(f"{ref}: NaN or infinite values{cast} in {named}; the checkpoint cannot be used")
    return made


def _target(path: str, stored: np.dtype, dtype: Any) -> np.dtype:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise SourceError(f"dtype={dtype!r}: floating-point parameters cannot be loaded as that")
    target = np.dtype(dtype) if dtype is not None and jnp.issubdtype(stored, jnp.floating) else stored
    if jax.dtypes.canonicalize_dtype(target) != target:
        raise SourceError(f"{path} is {target}, which jax holds only with jax_enable_x64; give dtype='float32'")
    return target


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
