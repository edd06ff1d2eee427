"""`pool` and `select`: several adaptations of one model in one tree, and a batch whose rows run each under its own."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxtransfer.adapt.adapter_types import Adapter
from jaxtransfer.adapt.adapters import AdapterError
from jaxtransfer.tree import fingerprint, weights
from jaxtransfer.tree.paths import Params, flatten, unflatten
from jaxtransfer.tree.weights import Weight, Window, is_weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows(Weight):
    """An adapted weight whose adapters' own parts have a leading axis, and whose base has none.

    Row i of a batch is run under entry i (``jax.vmap`` over the parts alone, so the base's product is one for all
    rows), whatever the adapters are and however many lie on top of one another.

    Attributes:
      node: the adapter, its own parts with a leading axis of length n: of a `pool`, or of a batch's rows.
      names: of a pool's entries.
      selected: whether the leading axis is the batch's.
      turned: whether this is the transposed weight.
    """

    node: Any
    names: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    selected: bool = dataclasses.field(default=False, metadata={"static": True})
    turned: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base."""
        return tuple(self.node.shape[::-1] if self.turned else self.node.shape)

    @property
    def dtype(self) -> Any:
        """That of the base."""
        return self.node.dtype

    def linear(self, x: jax.Array, bias: Any, key: jax.Array | None) -> jax.Array:
        """``y_i = x_i W_i + bias``: (B, ..., in) -> (B, ..., out)."""
        return self._each(lambda w, x, key: weights.linear(x, w, bias, key), x, key)

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Rows ``W_i[ids_i]``: (B, ...) -> (B, ..., width); ids (1, ...) are those of every row, as positions are."""
        return self._each(lambda w, ids, key: weights.take(w, ids, dtype), ids, None, spread=True)

    def conv(self, x: jax.Array, bias: Any, key: jax.Array | None, how: Window) -> jax.Array:
        """``y_i = x_i * W_i + bias``."""
        return self._each(lambda w, x, key: weights.conv(x[None], w, bias, key, how)[0], x, key)

    def transpose(self) -> "Rows":
        """The transposed weights, for tied heads."""
        return dataclasses.replace(self, turned=not self.turned)

    def materialize(self) -> jax.Array:
        """Not defined: there are as many arrays as rows."""
        raise TypeError(f"the adapters {', '.join(self.names)} are pooled, and stand for no one array")

    def _each(
        self, fn: Callable[[Any, Any, Any], jax.Array], x: jax.Array, key: jax.Array | None, *, spread: bool = False
    ) -> jax.Array:
        leaves, structure = jax.tree.flatten(self.node)
        axes = [0 if own else None for own in jax.tree.leaves(_own(self.node))]
        rows = next(leaf.shape[0] for leaf, axis in zip(leaves, axes, strict=True) if axis == 0)
        if not self.selected:
            raise TypeError(f"the adapters {', '.join(self.names)} are pooled: select(params, ids) says which is whose")
        one = spread and x.shape[0] == 1
        if x.shape[0] != rows and not one:
            raise ValueError(f"a batch of {x.shape[0]} rows has adapters selected for {rows}")
        keys = None if key is None else jax.random.split(key, rows)

        def run(leaves: list[Any], x: Any, key: Any) -> jax.Array:
            node = jax.tree.unflatten(structure, leaves)
            return fn(weights.transpose(node) if self.turned else node, x, key)

        over = (axes, None if one else 0, None if key is None else 0)
        return jax.vmap(run, in_axes=over)(leaves, x[0] if one else x, keys)


def pool(trees: Mapping[str, Params]) -> Params:
    """Several adaptations of one model as one tree, in which what they share is once.

    Args:
      trees: name -> canonical parameters, alike, bit for bit, but for the parts of their adapters; those are of the
        same kinds and shapes in all.

    Raises:
      AdapterError: they differ elsewhere, naming the leaf.

    Example:
      >>> from jaxtransfer.adapt import adapters
      >>> w, key = jnp.ones((4, 3)), jax.random.key(0)
      >>> tree = lambda alpha: {"out": {"kernel": adapters.lora(2, alpha=alpha)("out/kernel", w, key, "x")}}
      >>> both = pool({"french": tree(1), "german": tree(2)})
      >>> select(both, ["german", "french", "german"])["out"]["kernel"].node.scale
      Array([1. , 0.5, 1. ], dtype=float32)
    """
    if not trees:
        raise AdapterError("pool: no trees to pool")
    names = tuple(trees)
    flats = [flatten(tree, is_leaf=is_weight) for tree in trees.values()]
    for name, flat in zip(names, flats, strict=True):
        if odd := sorted(flats[0].keys() ^ flat.keys()):
            raise AdapterError(f"pool: {odd[0]} is in one of {names[0]!r} and {name!r} only")
    out = {path: _pooled(path, names, [flat[path] for flat in flats]) for path in flats[0]}
    if not any(isinstance(node, Rows) for node in out.values()):
        raise AdapterError(f"pool: no adapter tells {', '.join(map(repr, names))} apart")
    return unflatten(out)


def select(params: Params, ids: jax.Array | np.ndarray | Sequence[int] | Sequence[str]) -> Params:
    """The adapters of each row of a batch, out of a `pool`: row i is run under adapter ``ids[i]``.

    Args:
      params: canonical, from `pool`.
      ids: (B,) positions in the pool, or names.

    Raises:
      AdapterError: nothing is pooled, or an id that the pool has not (positions under ``jit`` cannot be checked).
    """
    nodes = [node for node in jax.tree.leaves(params, is_leaf=is_weight) if isinstance(node, Rows)]
    if not nodes or nodes[0].selected:
        raise AdapterError("select: nothing is pooled; pool(trees) makes one tree of several")
    positions = _positions(ids, nodes[0].names)

    def pick(node: Any) -> Any:
        if not isinstance(node, Rows):
            return node
        own = jax.tree.map(lambda leaf, own: leaf[positions] if own else leaf, node.node, _own(node.node))
        return dataclasses.replace(node, node=own, selected=True)

    return jax.tree.map(pick, params, is_leaf=is_weight)


def _positions(ids: Any, names: tuple[str, ...]) -> jax.Array:
    if isinstance(ids, Tracer):
        return ids
    given = np.asarray([names.index(i) if i in names else -1 for i in ids] if _are_names(ids) else ids)
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
        raise AdapterError(f"select: ids are (B,) integers or names, got {given.dtype} of shape {given.shape}")
    if odd := [i for i, at in zip(ids, given, strict=True) if not 0 <= at < len(names)]:
        raise AdapterError(f"select: the pool of {', '.join(names)} has no {odd[0]!r}")
    return jnp.asarray(given)


def _are_names(ids: Any) -> bool:
    return not hasattr(ids, "dtype") and all(isinstance(i, str) for i in ids)


def _parts(node: Adapter) -> tuple[str, ...]:
    """The parts that are the adapter's own: neither its base nor what many share."""
    fields = dataclasses.fields(node)  # type: ignore[arg-type]
    return tuple(f.name for f in fields if not f.metadata.get("static") and f.name not in ("base", "shared"))


def _own(node: Any) -> Any:
    """Whether each array of a node is an adapter's own, or the base's: a tree of its structure."""
    marks = jax.tree.map(lambda _: False, node)
    if not isinstance(node, Adapter):
        return marks
    return dataclasses.replace(marks, base=_own(node.base), **dict.fromkeys(_parts(node), True))


def _pooled(path: str, names: tuple[str, ...], nodes: Sequence[Any]) -> Any:
    if alike(nodes):
        return nodes[0]
    if not all(isinstance(node, Adapter) for node in nodes):
        raise AdapterError(f"{path}: differs between {names[0]!r} and another, and is no adapter in both")
    return Rows(_joined(path, names, nodes), names)


def _joined(path: str, names: tuple[str, ...], nodes: Sequence[Any]) -> Any:
    """One node of several, the adapters' own parts stacked."""
    first = nodes[0]
    if not isinstance(first, Adapter):
        if not alike(nodes):
            raise AdapterError(f"{path}: its base differs between {names[0]!r} and another; pool what shares one base")
        return first
    for name, node in zip(names, nodes, strict=True):
        if (want := _form(first)) != (have := _form(node)):
            raise AdapterError(f"{path}: {names[0]!r} has {want}, and {name!r} has {have}; a pool is of one form")
    base = _joined(path, names, [node.base for node in nodes])
    own = {part: jnp.stack([getattr(node, part) for node in nodes]) for part in _parts(first)}
    return dataclasses.replace(first, base=base, **own)  # type: ignore[type-var]


def _form(node: Any) -> str:
    """What must agree of adapters that are pooled, as a text: ``LoRA(a (4, 2), b (2, 3), scale (), rate=0.0)``."""
    if not isinstance(node, Adapter):
        return "no adapter"
    own = [f"{part} {tuple(getattr(node, part).shape)}" for part in _parts(node)]
    own += [f"{name}={getattr(node, name)}" for name in ("rate", "on") if hasattr(node, name)]
    own += [f"name={node.name!r}"] if node.shares else []  # where the arrays lie that it uses
    return f"{type(node).__name__}({', '.join(own)})"


def alike(nodes: Sequence[Any]) -> bool:
    """Whether nodes are one, bit for bit: arrays or leaf types."""
    first = nodes[0]
    if all(node is first for node in nodes):
        return True
    if len({jax.tree.structure(node) for node in nodes}) > 1:
        return False
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(node)] for node in nodes]
    return all(kind == kinds[0] for kind in kinds) and all(
        fingerprint({"": node}) == fingerprint({"": first}) for node in nodes[1:]
    )
