"""The report of a run: one self-contained HTML page, with its plots inline, that loads nothing and runs nothing."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtransfer.report.page import RecordError as RecordError
from jaxtransfer.report.page import render as render
from jaxtransfer.report.page import verdict as verdict


class ReportError(OSError):
    """The report cannot be written; what was there before is unchanged."""


def write(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Renders the record and writes it beside ``path`` first, so that ``path`` never holds half a page.

    Args:
      record: see :func:`render`.
      path: the file; its folder exists.

    Raises:
      RecordError: see :func:`render`.
      ReportError: the page cannot be written; a report that was there before stays.
    """
    page, path = render(record), Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ReportError(f"report: cannot write {path}: {error.strerror or error}; nothing was changed") from error
    return path
