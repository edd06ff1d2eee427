"""Corpora that are on every machine: the Python sources of the standard library and of installed packages.

They are read where they are; nothing of them is copied into what this package writes, and none of their code runs.
"""

import importlib.util
import re
import sysconfig
from pathlib import Path

from jaxtransfer.data.dataset import DataError, Row

_TEST = re.compile(r"tests?|test_\w*|\w+_tests?|conftest")
_ALIEN = {"site-packages", "dist-packages", "__pycache__"}
_GENERATED = "_sysconfigdata"  # how this very interpreter was built: differs from machine to machine


def python_sources(path: str) -> tuple[list[Row], list[str]]:
    """The modules of a package, one text each, in the order of their paths; those of tests are left out.

    Args:
      path: ``python:PACKAGE``, an installed top-level package or module, or ``python:stdlib``.

    Returns:
      Rows of ``text``, and notes that count the files without text and those that are not UTF-8.

    Raises:
      DataError: no such package, or one without Python sources on the disk.

    Example:
      >>> rows, _ = python_sources("python:json")
      >>> [row.place for row in rows][:2]
      ['python:json/__init__.py, file', 'python:json/decoder.py, file']
    """
    roots, texts, empty, broken = _roots(path), [], 0, []
    for root in roots:
        for file in [root] if root.is_file() else sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root)):
            inside = file.relative_to(root) if file != root else Path(file.name)
            if _left_out(inside) or not file.is_file():
                continue
            try:
                text = file.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError:
                broken.append(inside.as_posix())
                continue
            except OSError as error:
                raise DataError(f"{path}/{inside.as_posix()}: cannot be read: {error.strerror}") from None
            if text.strip():
                texts.append(Row(f"{path}/{inside.as_posix()}, file", len(texts), {"text": text}))
            else:
                empty += 1
    if not texts:
        raise DataError(f"{path}: the package has no Python sources on the disk")
    notes = [f"{path}: left out {empty} empty files"] if empty else []
    if broken:
        notes.append(f"{path}: left out {len(broken)} files that are not utf-8: {', '.join(broken[:4])}")
    return texts, notes


def _roots(path: str) -> list[Path]:
    """The folders of a package, or the file of a module."""
    name = path.removeprefix("python:")
    if name == "stdlib":
        return [Path(sysconfig.get_path("stdlib"))]
    if not name.isidentifier():
        raise DataError(f"{path}: expected python:PACKAGE, an installed top-level package, or python:stdlib")
    try:
        spec = importlib.util.find_spec(name)  # of a top-level package this runs none of its code
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise DataError(f"{path}: the package {name} is not installed")
    if spec.submodule_search_locations:
        return [Path(folder) for folder in spec.submodule_search_locations if Path(folder).is_dir()]
    return [Path(spec.origin)] if spec.origin is not None and spec.origin.endswith(".py") else []


def _left_out(inside: Path) -> bool:
    """Whether a file is one of tests, another package's, or a table of this machine's."""
    parts = inside.with_suffix("").parts
    alien = not _ALIEN.isdisjoint(parts) or parts[-1].startswith(_GENERATED)
    return alien or any(_TEST.fullmatch(part) for part in parts)
