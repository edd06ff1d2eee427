"""Two-sided diffs: what is missing, what is extra, what has another shape or dtype. Strictness is built on them."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxtransfer.tree.paths import flatten, folded


class TreeError(ValueError):
    """Two trees do not agree; the message lists every disagreement."""


@dataclasses.dataclass(frozen=True)
class Diff:
    """The disagreements between an expected and a found tree, by path."""

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    dtypes: tuple[tuple[str, str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.shapes or self.dtypes)

    def __str__(self) -> str:
        """All of it, what is alike in several layers once: ``missing: blocks/0-11/mlp/up/bias``."""
        lines = [f"missing: {path}" for path in folded(self.missing)]
        lines += [f"extra: {path}" for path in folded(self.extra)]
        lines += _unlike("shape", self.shapes) + _unlike("dtype", self.dtypes)
        return "; ".join(lines) or "no difference"

    def check(self, what: str) -> None:
        """Raises :class:`TreeError` naming ``what`` if there is any disagreement."""
        if self:
            raise TreeError(f"{what}: {self}")


def _unlike(what: str, found: Iterable[tuple[str, Any, Any]]) -> list[str]:
    pairs: dict[tuple[Any, Any], list[str]] = {}
    for path, want, have in found:
        pairs.setdefault((want, have), []).append(path)
    told = ((path, want, have) for (want, have), paths in pairs.items() for path in folded(paths))
    return [f"{what} of {path}: expected {want}, found {have}" for path, want, have in told]


def diff(expected: Any, found: Any, *, dtypes: bool = True) -> Diff:
    """Compares paths, shapes and, by default, dtypes of two trees of arrays or abstract arrays.

    Example:
      >>> import numpy as np
      >>> print(diff({"a": np.zeros(2), "b": np.zeros(1)}, {"a": np.zeros(3)}))
      missing: b; shape of a: expected (2,), found (3,)
    """
    want, have = flatten(expected), flatten(found)
    both = [path for path in want if path in have]
    shape = {path: (tuple(np.shape(want[path])), tuple(np.shape(have[path]))) for path in both}
    kind = {path: (_dtype(want[path]), _dtype(have[path])) for path in both}
    return Diff(
        missing=tuple(path for path in want if path not in have),
        extra=tuple(path for path in have if path not in want),
        shapes=tuple((path, a, b) for path, (a, b) in shape.items() if a != b),
        dtypes=tuple((path, a, b) for path, (a, b) in kind.items() if dtypes and a != b),
    )


def _dtype(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return str(np.asarray(leaf).dtype if dtype is None else dtype)
