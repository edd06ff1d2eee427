"""Paths: the address of every leaf, as a string such as ``blocks/3/attention/query/kernel``.

Dictionary keys are joined by ``/``. A part of a leaf type (a dataclass that stands where an array would, such as an
adapter) is addressed behind an ``@``: ``blocks/3/attention/query/kernel@a``.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

Params = dict[str, Any]


def _segment(entry: Any) -> tuple[str, str]:
    if isinstance(entry, jax.tree_util.DictKey):
        return "/", str(entry.key)
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return "@", entry.name
    if isinstance(entry, jax.tree_util.SequenceKey):
        return "/", str(entry.idx)
    return "/", str(getattr(entry, "key", entry))


def path_of(key_path: Iterable[Any]) -> str:
    """The string form of a ``jax.tree_util`` key path."""
    return "".join(sep + name for sep, name in map(_segment, key_path)).lstrip("/")


def weight_path(path: str) -> str:
    """The path of the weight that a part belongs to: ``a/kernel@base@q`` -> ``a/kernel``."""
    return path.split("@", 1)[0]


def flatten(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by path, in natural order (``blocks/2`` before ``blocks/10``).

    Raises:
      ValueError: two leaves have one path (a key that contains ``/``, or the keys ``1`` and ``"1"`` side by side).

    Example:
      >>> flatten({"b": {"10": 1, "2": 2}, "a": 0})
      {'a': 0, 'b/2': 2, 'b/10': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    found = {path_of(key_path): leaf for key_path, leaf in leaves}
    if len(found) != len(leaves):
        paths = [path_of(key_path) for key_path, _ in leaves]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two leaves have the path {twice!r}; keys must be strings without '/'")
    return {path: found[path] for path in sorted(found, key=natural)}


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Nested dictionaries from leaves by path; the inverse of :func:`flatten` for trees of plain arrays.

    Raises:
      ValueError: where one path is both a leaf and a parent of another.

    Example:
      >>> unflatten({"a/b": 1, "a/c": 2})
      {'a': {'b': 1, 'c': 2}}
    """
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: one of its parents is a leaf itself")
        if isinstance(node.get(last), dict):
            raise ValueError(f"{path}: is a leaf and the parent of other leaves")
        node[last] = leaf
    return tree


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """``jax.tree.map`` whose function gets the leaf's path first.

    Example:
      >>> map_with_path(lambda path, x: f"{path}={x}", {"a": {"b": 1}})
      {'a': {'b': 'a/b=1'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda key_path, *leaves: fn(path_of(key_path), *leaves), tree, *rest, is_leaf=is_leaf
    )


_LAYER = re.compile(r"(?<![^/])\d+(?![^/])")


def around_layer(path: str) -> tuple[str, int | None, str]:
    """What stands before the number of a path's layer, that number, and what stands behind it; None where it has none.

    Example:
      >>> around_layer("blocks/3/mlp/up/kernel")
      ('blocks/', 3, '/mlp/up/kernel')
    """
    found = _LAYER.search(path)
    return (path, None, "") if found is None else (path[: found.start()], int(found[0]), path[found.end() :])


def folded(paths: Iterable[str]) -> list[str]:
    """The same paths in fewer words: those that are alike but for the number of their layer are one.

    Example:
      >>> folded(["embed/kernel", "blocks/0/kernel", "blocks/0/bias", "blocks/1/kernel", "blocks/3/kernel"])
      ['embed/kernel', 'blocks/0-1,3/kernel', 'blocks/0/bias']
    """
    alike: dict[tuple[str, str], list[int]] = {}
    for before, layer, behind in map(around_layer, paths):
        alike.setdefault((before, behind), []).extend([] if layer is None else [layer])
    return [f"{before}{ranges(layers)}{behind}" for (before, behind), layers in alike.items()]


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in order, those that follow one another as a range.

    Example:
      >>> ranges([0, 1, 2, 5, 7, 8])
      '0-2,5,7-8'
    """
    out: list[list[int]] = []
    for number in sorted(numbers):
        if out and number == out[-1][1] + 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in out)


def natural(path: str) -> tuple[tuple[bool, int, str], ...]:
    """A sort key that orders numbers by value: ``blocks/2`` before ``blocks/10``."""
    parts = re.split(r"(\d+)", path)
    return tuple((part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts if part)
