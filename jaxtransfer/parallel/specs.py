"""Sharding by rules: path -> PartitionSpec on canonical paths; a stacked leaf gets an unsharded leading axis."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.parallel.columns import Columns
from jaxtransfer.parallel.mesh import ShardingError as ShardingError
from jaxtransfer.parallel.mesh import check_automatic, parts
from jaxtransfer.tree.paths import flatten, map_with_path
from jaxtransfer.tree.rules import Rule, Rules, match_paths, winning_rules
from jaxtransfer.tree.stacks import layers_of, stacked_length
from jaxtransfer.tree.weights import Weight, is_packed, is_weight


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The NamedSharding of every leaf of a canonical or laid-out tree; leaves without a rule are replicated.

    The parts of a leaf type are split as the type says they follow from the spec of its weight, unless a rule names the
    part itself (``.../kernel@a``). A part that does not divide stays whole, but for packed blocks, which is an error.

    Raises:
      ShardingError: a dimension does not divide by its mesh axes, a spec is longer than its leaf's rank or names an
        axis that the mesh has not, the layers of one stack are given different specs, or an axis is not automatic.
      RuleError: a rule matches nothing.
    """
    check_automatic(mesh)
    specs = match_paths(rules, [layer for path in flatten(tree) for layer in layers_of(path)], default=P())
    winners = winning_rules(rules, list(specs))
    parts = _parts(tree)

    def spec_of(path: str, layer: str, leaf: Any, stacked: bool) -> P:
        index = winners[layer]
        if path not in parts or (index is not None and "@" in rules[index][0]):
            return specs[layer]
        return parts[path](specs[layer], tuple(np.shape(leaf))[stacked:], mesh)

    def choose(path: str, leaf: Any) -> NamedSharding:
        first, *others = layers_of(path)
        stacked = stacked_length(path) is not None
        if odd := [layer for layer in others if specs[layer] != specs[first]]:
            raise ShardingError(
                f"{path}: its layers are one array, but {first} has the spec {specs[first]} and {odd[0]} has "
                f"{specs[odd[0]]}; give them one"
            )
        return _sharding(path, leaf, mesh, spec_of(path, first, leaf, stacked), stacked)

    return map_with_path(choose, tree)


_Derive = Callable[[P, tuple[int, ...], Mesh], P]


def _parts(tree: Any) -> dict[str, _Derive]:
    """For every part of a leaf type: its spec from the weight's spec, its own shape and the mesh."""
    found: dict[str, _Derive] = {}

    def visit(node: Weight, path: str, rank: int) -> None:
        def derive(part: str) -> _Derive:
            def spec(weight: P, shape: tuple[int, ...], mesh: Mesh) -> P:
                own = node.specs([*weight, *[None] * (rank - len(weight))])[part]
                if part in node.whole_blocks:
                    return own
                fits = [size % _count(mesh, axes) == 0 for size, axes in zip(shape, own, strict=False)]
                return P(*(axes if fit else None for axes, fit in zip(own, fits, strict=True)))

            return spec

        for field in dataclasses.fields(node):  # type: ignore[arg-type]
            part = getattr(node, field.name)
            if isinstance(part, Weight):
                visit(part, f"{path}@{field.name}", rank)
            elif not field.metadata.get("static") and field.name != "base":
                found[f"{path}@{field.name}"] = derive(field.name)

    for path, node in flatten(tree, is_leaf=is_weight).items():
        if isinstance(node, Weight) and jax.tree.leaves(node):  # in a partition a node may be empty
            rank = getattr(node, "rank_of_base", None)
            visit(node, path, len(node.shape) - (stacked_length(path) is not None) if rank is None else rank)
    return found


def _count(mesh: Mesh, axes: Any) -> int:
    return parts(mesh, *_names(axes))


def _sharding(path: str, leaf: Any, mesh: Mesh, spec: P, stacked: bool) -> NamedSharding:
    spec = P(None, *spec) if stacked else spec
    shape = tuple(np.shape(leaf))
    if len(spec) > len(shape):
        raise ShardingError(f"{path}: the spec {spec} is longer than the shape {shape}")
    for size, axes in zip(shape, spec, strict=False):
        names = _names(axes)
        if unknown := [name for name in names if name not in mesh.shape]:
            raise ShardingError(f"{path}: the mesh has no axis {unknown[0]!r}, it has {tuple(mesh.shape)}")
        parts = int(np.prod([mesh.shape[name] for name in names]))
        if size % parts:
            unpacked = ", or leave the weight unquantised: its blocks may not cross shards" if "@" in path else ""
            raise ShardingError(
                f"{path}: a dimension of {size} does not divide by {'x'.join(names)} = {parts} (shape {shape}, spec "
                f"{spec}); change the mesh or give this leaf another rule{unpacked}"
            )
    return _named(mesh, spec)


def _named(mesh: Mesh, entries: Iterable[Any]) -> NamedSharding:
    """Without trailing None, as XLA gives shardings back: jit's cache takes P() and P(None) for two."""
    entries = list(entries)
    length = max((i + 1 for i, axes in enumerate(entries) if axes is not None), default=0)
    return NamedSharding(mesh, P(*entries[:length]))


def fsdp(tree: Any, mesh: Mesh, *, axis: str = "fsdp", min_size: int = 2**12) -> Rules:
    """The generic rule: each leaf's largest dimension that divides is split over ``axis``; small leaves stay whole.

    An embedding is split by columns, if these divide: so a lookup needs no row that is elsewhere. A packed weight is
    split as one, all its parts along the largest dimension of its own along which they are whole blocks.

    Args:
      tree: canonical parameters, of any model.
      mesh: the mesh.
      axis: its axis.
      min_size: leaves with fewer elements are replicated.
    """
    count = mesh.shape[axis]
    rules: list[Rule] = []
    for path, leaf in flatten(tree, is_leaf=is_packed).items():
        shape = tuple(np.shape(leaf)) if not is_packed(leaf) else leaf.shape
        if count == 1 or math.prod(shape) < min_size:
            continue
        order = sorted(range(len(shape)), key=lambda i: -shape[i])
        if path.endswith("/embedding"):
            order = [len(shape) - 1, *order]
        fits = (specs for i in order if (specs := _along(path, leaf, shape, i, axis, count)))
        rules += [Rule(_escape(part), spec, optional=True) for part, spec in next(fits, {}).items()]
    return tuple(rules)


def _along(path: str, leaf: Any, shape: tuple[int, ...], split: int, axis: str, count: int) -> dict[str, P]:
    """The specs of a leaf, or of a packed weight's parts, split along one dimension; none if that does not divide."""
    axes = [axis if i == split else None for i in range(len(shape))]
    if not is_packed(leaf):
        return {path: P(*axes[: split + 1])} if shape[split] % count == 0 else {}
    specs = leaf.specs(axes)
    sizes = [n for name, spec in specs.items() for n, own in zip(getattr(leaf, name).shape, spec, strict=False) if own]
    return {f"{path}@{name}": spec for name, spec in specs.items()} if all(n % count == 0 for n in sizes) else {}


def _escape(path: str) -> str:
    return "".join("\\" + c if c in r".^$*+?{}[]\|()" else c for c in path)


def place(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The tree on the mesh, sharded by rules; arrays already there are not copied.

    Raises:
      ShardingError, RuleError: as `shardings`.
    """
    return jax.device_put(tree, shardings(tree, mesh, rules))


def gather(tree: Any, mesh: Mesh, rules: Rules, *, axis: str = "fsdp", columns: bool = True) -> Any:
    """Inside ``jit``: leaves outside stacks made ready along ``axis`` for their use.

    A scanned layer's parameters are gathered by XLA, layer by layer. What is left are a model's ends. There embeddings
    and wide kernels become `Columns`; all else is made whole, because XLA, left to itself, may shard activations as the
    weight is and replicate the whole batch to split it by rows again.

    Args:
      tree: laid out, with its leaf types.
      mesh, rules: as `shardings` takes them.
      axis: the axis that leaves are split over between their uses.
      columns: whether the model takes leaf types.
    """

    def use(path: str, leaf: Any, where: NamedSharding) -> Any:
        if stacked_length(path) is not None:
            return leaf
        axes = tuple(name for entry in reversed(where.spec) for name in _names(entry))
        if columns and axis in axes and mesh.shape[axis] > 1 and _by_columns(path, leaf):
            return Columns(leaf, mesh, axes).split()
        spec = [tuple(name for name in _names(axes) if name != axis) or None for axes in where.spec]
        return jax.lax.with_sharding_constraint(leaf, _named(mesh, spec))

    return map_with_path(use, tree, shardings(tree, mesh, rules))


def _by_columns(path: str, leaf: Any) -> bool:
    """Tables, and kernels with at least twice as many outputs as inputs, but for those of adapters."""
    name, *inside = path.rsplit("/", 1)[-1].split("@")
    if leaf.ndim != 2 or any(part != "base" for part in inside):
        return False
    return name == "embedding" or (name == "kernel" and leaf.shape[1] >= 2 * leaf.shape[0])


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def state_shardings(opt_state: Any, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer's state: a leaf shaped like the parameter whose path its own ends in is sharded alike.

    Everything else (counts, factored moments) is replicated.
    """
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in flatten(params).items()}
    known = flatten(param_shardings)

    def choose(key_path: Any, leaf: Any) -> NamedSharding:
        path = param_path(key_path)
        if path in shapes and shapes[path] == tuple(np.shape(leaf)):
            return known[path]
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(choose, opt_state)


def param_path(key_path: Any) -> str:
    """The path of the parameter that an optimizer's leaf belongs to, read off the end of the leaf's key path.

    It is the trailing dictionary keys, and the parts of a leaf type behind them.

    Example:
      >>> tree = ({"mu": {"head": {"kernel": 1}}},)
      >>> [param_path(path[2:]) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
      ['head/kernel']
    """
    parts: list[str] = []
    keys: list[str] = []
    for entry in reversed(tuple(key_path)):
        if isinstance(entry, jax.tree_util.DictKey):
            keys.append(str(entry.key))
        elif isinstance(entry, jax.tree_util.GetAttrKey) and not keys:
            parts.append(f"@{entry.name}")
        else:
            break
    return "/".join(reversed(keys)) + "".join(reversed(parts))
