"""Partition and combine: the trainable part and the frozen part of one tree, as two trees of one structure."""

from collections.abc import Callable
from typing import Any

import jax

from jaxtransfer.tree.diff import TreeError
from jaxtransfer.tree.paths import flatten, map_with_path


def _is_none(x: Any) -> bool:
    return x is None


def partition(tree: Any, mask: Any | Callable[[str], bool]) -> tuple[Any, Any]:
    """Splits a tree in two: leaves where ``mask`` is true, and the rest; ``None`` stands for what is elsewhere.

    Args:
      tree: any pytree.
      mask: a tree of booleans of the same structure, or a function of the path.

    Raises:
      TreeError: the mask's structure is not the tree's.

    Example:
      >>> partition({"a": 1, "b": 2}, lambda path: path == "a")
      ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    if callable(mask):
        select = mask
        mask = map_with_path(lambda path, _: bool(select(path)), tree)
    _same_structure("partition: the mask and the tree", mask, tree)
    selected = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)
    return selected, rest


def combine(first: Any, second: Any) -> Any:
    """The inverse of :func:`partition`: each leaf from the side that has it.

    Raises:
      TreeError: a leaf is on both sides, or the structures differ.

    Example:
      >>> combine({"a": 1, "b": None}, {"a": None, "b": 2})
      {'a': 1, 'b': 2}
    """

    def pick(path: str, a: Any, b: Any) -> Any:
        if a is not None and b is not None:
            raise TreeError(f"combine: {path} is on both sides")
        return b if a is None else a

    _same_structure("combine: the two sides", first, second, is_leaf=_is_none)
    return map_with_path(pick, first, second, is_leaf=_is_none)


def _same_structure(what: str, a: Any, b: Any, is_leaf: Callable[[Any], bool] | None = None) -> None:
    if jax.tree.structure(a, is_leaf) == jax.tree.structure(b, is_leaf):
        return
    left, right = (flatten(side, is_leaf=is_leaf) for side in (a, b))
    only = [f"{path} (first)" for path in left if path not in right]
    only += [f"{path} (second)" for path in right if path not in left]
    where = f"; on one side only: {', '.join(only[:6])}" if only else " in the types of their nodes"
    raise TreeError(f"{what} differ in structure{where}")
