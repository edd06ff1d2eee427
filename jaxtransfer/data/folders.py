"""Folders of images: the class folder that an image lies in is its label."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jaxtransfer.data.dataset import DataError, Row, check_columns
from jaxtransfer.tree.paths import natural

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
"""Of image files; of an animated GIF the first frame is the image."""


def folder(path: str, wanted: Sequence[str]) -> tuple[list[Row], str, list[str]]:
    """The images of a folder of class folders, in natural order; where no label is wanted, of any folder.

    No image is opened. Hidden folders are passed over.

    Returns:
      The rows ``{"image": Path, "label": class}``, the SHA-256 of the files' names and sizes, and a note that counts
      the files that are no images.

    Raises:
      DataError: no images, a class folder without any, an image beside the class folders, or an unreadable folder.
    """
    check_columns(path, wanted, ("image", "label"))
    root, labelled = Path(path), "label" in wanted
    files = _walk(root)
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        raise DataError(f"{path}: holds no images ({', '.join(SUFFIXES)})")
    if labelled:
        _check_classes(path, root, images)
    sha = hashlib.sha256()
    for file in images:
        sha.update(f"{file.as_posix()}|{(root / file).stat().st_size}\n".encode())
    rows = [
        Row(f"{path}, image", i, {"image": root / file} | ({"label": file.parts[0]} if labelled else {}))
        for i, file in enumerate(images)
    ]
    others = len(files) - len(images)
    return rows, sha.hexdigest(), [f"{path}: passed over {others} files that are no images"] if others else []


def _walk(root: Path) -> list[Path]:
    """Every file below, relative to the root, in natural order."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    found = []
    for place, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name).relative_to(root) for name in names]
    return sorted(found, key=lambda file: natural(file.as_posix()))


def _check_classes(path: str, root: Path, images: Sequence[Path]) -> None:
    if beside := [file for file in images if len(file.parts) == 1]:
        raise DataError(f"{root / beside[0]}: lies beside the class folders, so it has no label")
    used = {file.parts[0] for file in images}
    for place in sorted(root.iterdir()):
        if place.is_dir() and not place.name.startswith(".") and place.name not in used:
            raise DataError(f"{place}: a class folder without images ({', '.join(SUFFIXES)})")
