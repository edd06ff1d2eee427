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
    """A checkpoint tensor without a place, or a parameter without a tensor; the message lists all of them."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row: our path, their name, and how the array turns. ``{i}`` stands for a layer's number on both sides."""

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
    """

    entries: tuple[Entry, ...]
    drops: tuple[Drop, ...] = ()
    prefix: str = ""
    copies: tuple[Entry, ...] = ()

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
        unfilled = [path for path in paths if path not in used]
        if unmapped or unfilled:
            raise MappingError(_complaint(unmapped, unfilled, list(by_name), paths))
        return LoadPlan(used, dropped)

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
    """``used``: our path -> (checkpoint name, transform); ``dropped``: checkpoint name -> reason."""

    used: Mapping[str, tuple[str, str]]
    dropped: Mapping[str, str]


def canonical_name(name: str, prefix: str) -> str:
    """A checkpoint name without the trunk's prefix and with old aliases replaced."""
    name = name.removeprefix(prefix)
    for pattern, replacement in ALIASES:
        name = re.sub(f"^{pattern}$", replacement, name)
    return name


def turn(array: np.ndarray, transform: str) -> np.ndarray:
    """Applies a transform; each is its own inverse, so loading and exporting share it."""
    return array.T if transform == "transpose" else array


def linear(ours: str, theirs: str, *, bias: bool = True) -> tuple[Entry, ...]:
    """Rows of a linear layer: torch keeps (out, in), we keep (in, out)."""
    rows = (Entry(f"{ours}/kernel", f"{theirs}.weight", "transpose"),)
    return (*rows, Entry(f"{ours}/bias", f"{theirs}.bias")) if bias else rows


def norm(ours: str, theirs: str) -> tuple[Entry, ...]:
    """Rows of a layer normalisation."""
    return Entry(f"{ours}/scale", f"{theirs}.weight"), Entry(f"{ours}/bias", f"{theirs}.bias")


def embedding(ours: str, theirs: str) -> tuple[Entry, ...]:
    """The row of an embedding."""
    return (Entry(f"{ours}/embedding", f"{theirs}.weight"),)


def _fit(template: str, name: str) -> Any:
    regex = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.fullmatch(regex, name)


def _fill(template: str, found: re.Match[str]) -> str:
    return template.replace("{i}", found.groupdict().get("i") or "")


def _complaint(unmapped: list[str], unfilled: list[str], names: list[str], paths: Sequence[str]) -> str:
    lines = [f"tensor {name} has no place; nearest: {nearest(name.replace('.', '/'), paths, 2)}" for name in unmapped]
    lines += [f"parameter {path} has no tensor; nearest: {nearest(path, names, 2)}" for path in unfilled]
    shown = "; ".join(lines[:12]) + (f"; and {len(lines) - 12} more" if len(lines) > 12 else "")
    return f"checkpoint and model disagree ({len(unmapped)} tensors unmapped, {len(unfilled)} unfilled): {shown}"
