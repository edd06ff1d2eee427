"""Scanned stacks: like layers stacked on a leading axis, so that compile time does not grow with depth.

A *list* is a dictionary whose keys are ``"0", "1", ..., "n-1"``. ``stack`` replaces runs of like layers by one entry
whose key tells the run, ``"0:8"``, and whose leaves carry a leading axis of length 8: a laid-out tree describes itself,
and canonical per-layer paths can be read off it at any time. Runs are cut where labels or leaf structure differ.
"""

import re
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.tree.diff import TreeError
from jaxtransfer.tree.paths import Params

Layout = Mapping[str, tuple[tuple[int, int], ...]]
"""For each list, by its path, the runs ``(start, stop)`` in order: ``{"blocks": ((0, 8), (8, 12))}``."""

_RUN = re.compile(r"(\d+):(\d+)")


def is_list(node: Any) -> bool:
    """Whether a node is a list of layers: a dictionary with the keys ``"0"`` to ``"n-1"``."""
    return isinstance(node, Mapping) and bool(node) and set(node) == {str(i) for i in range(len(node))}


def run_of(key: str) -> tuple[int, int] | None:
    """``(start, stop)`` of a stacked entry's key, or None: ``run_of("0:8") == (0, 8)``."""
    found = _RUN.fullmatch(key)
    return (int(found[1]), int(found[2])) if found else None


def layers_of(path: str) -> list[str]:
    """The canonical paths that a laid-out path stands for.

    Example:
      >>> layers_of("blocks/8:10/mlp/kernel")
      ['blocks/8/mlp/kernel', 'blocks/9/mlp/kernel']
      >>> layers_of("head/kernel")
      ['head/kernel']
    """
    parts = path.split("/")
    for i, part in enumerate(parts):
        if run := run_of(part):
            return ["/".join([*parts[:i], str(layer), *parts[i + 1 :]]) for layer in range(*run)]
    return [path]


def stacked_length(path: str) -> int | None:
    """The length of the leading stack axis of the leaf at a laid-out path, or None for a leaf without one."""
    runs = [run for part in path.split("/") if (run := run_of(part))]
    return runs[0][1] - runs[0][0] if runs else None


def layout(params: Params, labels: Any = None, lists: Collection[str] | None = None) -> Layout:
    """Where the lists of a canonical tree may be stacked: maximal runs of layers alike in structure and labels.

    Args:
      params: canonical parameters.
      labels: a tree of the same structure; layers whose labels differ are not stacked together.
      lists: the paths of the lists to stack; every list without it.

    Example:
      >>> layer = lambda: {"w": np.zeros(3)}
      >>> layout({"blocks": {"0": layer(), "1": layer()}}, {"blocks": {"0": {"w": "frozen"}, "1": {"w": "train"}}})
      {'blocks': ((0, 1), (1, 2))}
    """
    table: dict[str, tuple[tuple[int, int], ...]] = {}

    def visit(node: Any, label: Any, path: str) -> None:
        if is_list(node) and (lists is None or path in lists):
            kinds = [_kind(node[str(i)], None if label is None else label[str(i)]) for i in range(len(node))]
            cuts = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
            table[path] = tuple(pairwise(cuts))
        elif isinstance(node, Mapping):
            for key, child in node.items():
                visit(child, None if label is None else label[key], f"{path}/{key}" if path else key)

    visit(params, labels, "")
    return table


def _kind(layer: Any, label: Any) -> Any:
    """What must agree for two layers to be stacked."""
    leaves, treedef = jax.tree.flatten(layer)
    arrays = tuple((tuple(np.shape(leaf)), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves)
    marks = None if label is None else tuple(jax.tree.leaves(label))
    return treedef, arrays, marks


def stack(params: Params, table: Layout) -> Params:
    """Lays a canonical tree out: the layers of each run become one entry with a leading axis. Inverse: `unstack`.

    Works on arrays, on abstract arrays (``jax.ShapeDtypeStruct``) and on trees with ``None`` for absent leaves.

    Raises:
      TreeError: the table names a list that is not there, its runs are not the list's layers in order, or the layers
        of a run differ in structure, shape or dtype.

    Example:
      >>> tree = {"blocks": {"0": {"w": np.zeros(3)}, "1": {"w": np.ones(3)}}}
      >>> stack(tree, layout(tree))["blocks"]["0:2"]["w"].shape
      (2, 3)
    """
    unseen = set(table)

    def visit(node: Any, path: str) -> Any:
        if path in table:
            unseen.remove(path)
            return {f"{start}:{stop}": _stack_run(node, path, start, stop) for start, stop in _runs(node, path, table)}
        if isinstance(node, Mapping):
            return {key: visit(child, f"{path}/{key}" if path else key) for key, child in node.items()}
        return node

    out = visit(params, "")
    if unseen:
        raise TreeError(f"stack: the tree has no {', '.join(sorted(unseen))}; the layout is another tree's")
    return out


def _runs(node: Any, path: str, table: Layout) -> tuple[tuple[int, int], ...]:
    layers = [str(i) for start, stop in table[path] for i in range(start, stop)]
    if not is_list(node) or layers != [str(i) for i in range(len(node))]:
        keys = ", ".join(map(str, node)) if isinstance(node, Mapping) else "no keys"
        raise TreeError(f"stack: the runs of {path} are {table[path]}, but it has {keys}")
    return table[path]


def _stack_run(node: Params, path: str, start: int, stop: int) -> Any:
    layers = [node[str(i)] for i in range(start, stop)]
    for i, layer in enumerate(layers):
        if _kind(layer, None) != _kind(layers[0], None):
            raise TreeError(f"stack: {path}/{start + i} is not like {path}/{start} in structure, shapes or dtypes")
    return jax.tree.map(_stack_leaves, *layers)


def _stack_leaves(*leaves: Any) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    if isinstance(leaves[0], (np.ndarray, np.generic)):
        return np.stack(leaves)
    return jnp.stack(leaves)


def unstack(params: Params) -> Params:
    """The canonical tree of a laid-out one; the inverse of :func:`stack`.

    Example:
      >>> list(unstack({"blocks": {"0:2": {"w": np.zeros((2, 3))}}})["blocks"])
      ['0', '1']
    """
    if not isinstance(params, Mapping):
        return params
    out: Params = {}
    for key, child in params.items():
        if run := run_of(key):
            for i, layer in enumerate(range(*run)):
                out[str(layer)] = jax.tree.map(lambda leaf, i=i: _take_layer(leaf, i), child)
        else:
            out[key] = unstack(child)
    return out


def _take_layer(leaf: Any, index: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[index]
