"""Name tables: one table per family, read both ways: checkpoint names to ours on load, ours to theirs on export."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtransfer.tree.rules import nearest

ALIASES = ((r"(.*)\.gamma", r"\1.weight"), (r"(.*)\.beta", r"\1.bias"))
"""Names that old checkpoints use for the same tensors."""


class MappingError(ValueError):
    """A checkpoint tensor without a place, or a parameter without a tensor; the message lists all ``count`` of them."""

    def __init__(self, message: str, count: int = 1):
        super().__init__(message)
        self.count = count


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row: our path, their name, and how the array turns. ``{i}``, ``{j}`` stand for numbers on both sides."""

    ours: str
    theirs: str
    transform: str = "same"


@dataclasses.dataclass(frozen=True)
class Drop:
    """Checkpoint tensors that are not used, and why."""

    regex: str
    reason: str


@dataclasses.dataclass(frozen=True)
class NameTable:
    """Rows and drops of one model.

    Attributes:
      entries: the rows.
      drops: what real files hold besides.
      prefix: ("bert.") stands before trunk names in files with a head, or is absent.
      copies: rows written once more on export, where the format stores a parameter under a second name.
      optional: patterns of our paths; a file may lack all that a pattern matches, which then start at zero.
    """

    entries: tuple[Entry, ...]
    drops: tuple[Drop, ...] = ()
    prefix: str = ""
    copies: tuple[Entry, ...] = ()
    optional: tuple[str, ...] = ()

    def load_plan(self, names: Iterable[str], paths: Sequence[str]) -> "LoadPlan":
        """Which tensor fills which path. Every name is used or dropped for a reason; every path is filled.

        Args:
          names: the tensors' names in the checkpoint.
          paths: the canonical paths to fill.

        Raises:
          MappingError: unmapped names or unfilled paths, all listed, with the nearest on the other side.
        """
        by_name = {name: canonical_name(name, self.prefix) for name in names}
        used: dict[str, tuple[str, str]] = {}
        dropped: dict[str, str] = {}
        unmapped: list[str] = []
        wanted = set(paths)
        for name, plain in by_name.items():
            path, transform = self._ours(plain)
            if path in used:
                unmapped.append(f"{name} (a second tensor for {path}, after {used[path][0]})")
            elif path in wanted:
                used[path] = (name, transform)
            elif reason := next((drop.reason for drop in self.drops if re.fullmatch(drop.regex, plain)), None):
                dropped[name] = reason
            else:
                unmapped.append(name)
        lacking = [p for p in self.optional if not any(re.fullmatch(p, path) for path in used)]
        zeros = tuple(path for path in paths if any(re.fullmatch(p, path) for p in lacking))
        unfilled = [path for path in paths if path not in used and path not in zeros]
        if unmapped or unfilled:
            count = len(unmapped) + len(unfilled)
            raise MappingError(_complaint(unmapped, unfilled, list(by_name), paths), count)
        return LoadPlan(used, dropped, zeros)

    def export_names(self, paths: Iterable[str], *, with_prefix: bool) -> dict[str, tuple[str, str]]:
        """``{our path: (their name, transform)}`` for export; the inverse of :meth:`load_plan`.

        Raises:
          MappingError: a path has no row.
        """
        out, missing = {}, []
        for path in paths:
            for entry in self.entries:
                if found := _fit(entry.ours, path):
                    name = _fill(entry.theirs, found)
                    trunk = not path.startswith("head/")
                    out[path] = ((self.prefix if with_prefix and trunk else "") + name, entry.transform)
                    break
            else:
                missing.append(path)
        if missing:
            raise MappingError(f"no name in the export format for {len(missing)} parameters: {', '.join(missing[:8])}")
        return out

    def _ours(self, name: str) -> tuple[str | None, str]:
        for entry in self.entries:
            if found := _fit(entry.theirs, name):
                return _fill(entry.ours, found), entry.transform
        return None, "same"


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """``used``: our path -> (checkpoint name, transform); ``dropped``: checkpoint name -> reason; ``zeros``: paths."""

    used: Mapping[str, tuple[str, str]]
    dropped: Mapping[str, str]
    zeros: tuple[str, ...] = ()


def canonical_name(name: str, prefix: str) -> str:
    """A checkpoint name without the trunk's prefix and with old aliases replaced."""
    name = name.removeprefix(prefix)
    for pattern, replacement in ALIASES:
        name = re.sub(f"^{pattern}$", replacement, name)
    return name


def turn(array: np.ndarray, transform: str, *, back: bool = False) -> np.ndarray:
    """An array of a checkpoint as ours; ``back``: ours as theirs.

    ``transpose``: a matrix (out, in), ours (in, out). ``conv``: a kernel (out, in, height, width), ours (height, width,
    in, out). ``count``: an int64 scalar, ours int32.
    """
    if transform == "transpose":
        return array.T
    if transform == "conv":
        return array.transpose((3, 2, 0, 1) if back else (2, 3, 1, 0))
    if transform == "count":
        return array.astype(np.int64 if back else np.int32)
    return array


def linear(ours: str, theirs: str, *, bias: bool = True) -> tuple[Entry, ...]:
    """Rows of a linear layer: torch keeps (out, in), we keep (in, out)."""
    rows = (Entry(f"{ours}/kernel", f"{theirs}.weight", "transpose"),)
    return (*rows, Entry(f"{ours}/bias", f"{theirs}.bias")) if bias else rows


def conv(ours: str, theirs: str, *, bias: bool = True) -> tuple[Entry, ...]:
    """Rows of a convolution: torch keeps (out, in, height, width), we keep (height, width, in, out)."""
    rows = (Entry(f"{ours}/kernel", f"{theirs}.weight", "conv"),)
    return (*rows, Entry(f"{ours}/bias", f"{theirs}.bias")) if bias else rows


def norm(ours: str, theirs: str) -> tuple[Entry, ...]:
    """Rows of a layer normalisation."""
    return Entry(f"{ours}/scale", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")


def embedding(ours: str, theirs: str) -> tuple[Entry, ...]:
    """The row of an embedding."""
    return (Entry(f"{ours}/embedding", f"{theirs}.weight"),)


def _fit(template: str, name: str) -> Any:
    return re.fullmatch(re.sub(r"\\\{([ij])\\\}", r"(?P<\1>\\d+)", re.escape(template)), name)


def _fill(template: str, found: re.Match[str]) -> str:
    for letter, number in found.groupdict().items():
        template = template.replace(f"{{{letter}}}", number)
    return template


def _complaint(unmapped: list[str], unfilled: list[str], names: list[str], paths: Sequence[str]) -> str:
    lines = [f"tensor {name} has no place; nearest: {nearest(name.replace('.', '/'), paths, 2)}" for name in unmapped]
    lines += [f"parameter {path} has no tensor; nearest: {nearest(path, names, 2)}" for path in unfilled]
    shown = "; ".join(lines[:12]) + (f"; and {len(lines) - 12} more" if len(lines) > 12 else "")
    return f"checkpoint and model disagree ({len(unmapped)} tensors unmapped, {len(unfilled)} unfilled): {shown}"
