"""The leaves of a state by name, and how those of one layout are made of those of another.

A leaf's name is its laid-out path behind the part that it belongs to: ``params/blocks/0:8/mlp/kernel``,
``opt_state@inner_states/head@inner_state/0@mu/head/kernel``, ``frozen/embed/embedding``, ``step``. A name with a run of
layers stands for one *row* per layer; rows are what two layouts have in common.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

import jax
import numpy as np

from jaxtransfer.checkpoint.manifest import CheckpointError
from jaxtransfer.tree import Diff
from jaxtransfer.tree.paths import natural, path_of
from jaxtransfer.types import State


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a leaf without its values; ``key`` is the generator's name where it is a typed key."""

    shape: tuple[int, ...]
    dtype: str
    key: str | None = None

    @classmethod
    def of(cls, name: str, leaf: Any) -> Self:
        """The spec of an array or abstract array.

        Raises:
          CheckpointError: it is neither; a Python number would come back with another type.
        """
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise CheckpointError(f"{name}: a {type(leaf).__name__} is no array; make it one with jnp.asarray")
        key = str(jax.random.key_impl(leaf)) if is_key(leaf) and isinstance(leaf, jax.Array) else None
        return cls(tuple(leaf.shape), str(leaf.dtype), key)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


_RUN = re.compile(r"(?<![^/])(\d+):(\d+)(?![^/@])")  # a run of layers, as a key

Row = tuple[str, int | None]
"""A leaf, and the index of the layer in it; None is all of a leaf that is not stacked."""


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed key of a random generator, or abstract and stands for one."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def named(state: State | None, frozen: Any = None) -> tuple[dict[str, Any], Any]:
    """The leaves of a state and its frozen complement by name, in tree order, and their structure.

    Raises:
      CheckpointError: two leaves have the same name, so that one would be lost.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path((state, {"frozen": frozen}))
    names = [path_of(key_path[1:]).removeprefix("@") for key_path, _ in flat]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise CheckpointError(f"two leaves have the same name, {', '.join(twice[:5])}; rename one of their keys")
    return {name: leaf for name, (_, leaf) in zip(names, flat, strict=True)}, treedef


def rows_of(name: str, spec: Spec) -> dict[str, Row]:
    """Canonical name -> row, for each layer that a leaf holds; the run may be named more than once.

    Example:
      >>> rows_of("params/blocks/2:4/w", Spec((2, 3), "float32"))
      {'params/blocks/2/w': ('params/blocks/2:4/w', 0), 'params/blocks/3/w': ('params/blocks/2:4/w', 1)}
    """
    run = _RUN.search(name)
    if run is None or spec.shape[:1] != (int(run[2]) - int(run[1]),):  # or a placeholder for a whole stack
        return {name: (name, None)}
    key, first, last = run[0], int(run[1]), int(run[2])

    def canonical(layer: int) -> str:
        return _RUN.sub(lambda found: str(layer) if found[0] == key else found[0], name)

    return {canonical(layer): (name, layer - first) for layer in range(first, last)}


def table(specs: Mapping[str, Spec], names: Iterable[str]) -> dict[str, Row]:
    """Canonical name -> row, over several leaves."""
    return {canonical: row for name in names for canonical, row in rows_of(name, specs[name]).items()}


def compare(want: Mapping[str, Spec], have: Mapping[str, Spec]) -> Diff:
    """Every disagreement of two sets of leaves; those of other layouts are compared layer by layer."""
    same = want.keys() & have.keys()
    left, right = (_per_layer(specs, same) for specs in (want, have))
    both = [name for name in left if name in right]
    shapes = ((name, left[name].shape, right[name].shape) for name in both)
    dtypes = ((name, left[name].dtype, right[name].dtype) for name in both)
    return Diff(
        missing=tuple(sorted(left.keys() - right.keys(), key=natural)),
        extra=tuple(sorted(right.keys() - left.keys(), key=natural)),
        shapes=tuple(item for item in shapes if item[1] != item[2]),
        dtypes=tuple(item for item in dtypes if item[1] != item[2]),
    )


def _per_layer(specs: Mapping[str, Spec], same: Iterable[str]) -> dict[str, Spec]:
    out = {name: specs[name] for name in same}
    for canonical, (name, index) in table(specs, specs.keys() - set(same)).items():
        spec = specs[name]
        out[canonical] = spec if index is None else dataclasses.replace(spec, shape=spec.shape[1:])
    return out
