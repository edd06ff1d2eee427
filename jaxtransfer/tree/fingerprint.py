"""Fingerprints: has this leaf changed since it was loaded? And digests: is this the same source?

A fingerprint is 64 bits computed where the array lives, sharded or stacked as it may be, at about memory speed: enough
to tell an accidental difference of one bit, not meant against an attacker. A digest is a SHA-256.
"""

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.tree.paths import flatten
from jaxtransfer.tree.stacks import layers_of, stacked_length


def fingerprint(tree: Any) -> dict[str, str]:
    """64 bits of every leaf by canonical path, as 16 hexadecimal digits; a stacked leaf gives one for each layer.

    With ``u_i`` the i-th element's bits, two lanes of ``sum_i mix(u_i, i) mod 2**32``. For every ``i`` ``mix`` is a
    bijection of 32 bits, so a change in a single element always shows; one in several does but for odds of 2**-64.
    Shape and dtype are not part of it.

    Example:
      >>> a = fingerprint({"w": jnp.arange(3.0)})
      >>> b = fingerprint({"w": jnp.array([0.0, 2.0, 1.0])})
      >>> a == fingerprint({"w": jnp.arange(3.0)}), a == b
      (True, False)
    """
    flat = flatten(tree)
    out: dict[str, str] = {}
    for path, leaf in flat.items():
        # Waited for one by one: many small collectives in flight can deadlock simulated devices.
        rows = _whole(_lanes(_words(leaf), stacked=stacked_length(path) is not None)).reshape(-1, 2)
        out.update({name: f"{row[0]:08x}{row[1]:08x}" for name, row in zip(layers_of(path), rows, strict=True)})
    return out


def _whole(leaf: Any) -> np.ndarray:
    """All of an array, also where parts of it are on other processes' devices: these then ask for it as well."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _words(leaf: Any) -> Any:
    """Eight-byte numpy arrays as pairs of words: jax would round them to four bytes while 64-bit types are off."""
    if not isinstance(leaf, np.ndarray) or leaf.dtype.itemsize != 8:
        return leaf
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint32).reshape(*leaf.shape, 2)


@partial(jax.jit, static_argnames="stacked")
def _lanes(x: jax.Array, *, stacked: bool) -> jax.Array:
    if stacked:
        return jax.vmap(lambda layer: _lanes(layer, stacked=False))(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        here = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index = index * jnp.uint32(bits.shape[axis] % 2**32) + here

    def lane(a: int, b: int) -> jax.Array:
        h = (bits ^ (index * jnp.uint32(a))) * jnp.uint32(b)
        h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
        h = (h ^ (h >> 13)) + index * jnp.uint32(b)
        return h ^ (h >> 16)

    # One reduction of both lanes: two would each write the mixed array to memory (0.6 instead of 15 GB/s on a CPU).
    zero, axes = jnp.uint32(0), tuple(range(bits.ndim))
    both = (lane(0x9E3779B1, 0x7FEB352D), lane(0x85EBCA77, 0xC2B2AE3D))
    return jnp.stack(jax.lax.reduce(both, (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes))


def digest(tree: Any) -> str:
    """SHA-256 over the paths, dtypes, shapes and bytes of a tree: the identity of a source without files.

    Example:
      >>> digest({"w": np.zeros(2)})[:8] == digest({"w": np.zeros(2)})[:8]
      True
    """
    return digest_of(flatten(tree).items())


def digest_of(leaves: Iterable[tuple[str, Any]]) -> str:
    """`digest` of leaves that come one after the other, in the order of `flatten`."""
    sha = hashlib.sha256()
    for path, leaf in leaves:
        array = _whole(leaf)
        sha.update(f"{path}|{array.dtype}|{array.shape}|".encode())
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()
