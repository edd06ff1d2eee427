"""Tables: what ``job`` returns as aligned text that moves no cursor, forges no line and tells no secret."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtransfer.config.secrets import redact

# What would move a terminal's cursor, forge a line, or reorder the text around it.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def show(value: Any, console: Any, title: str = "") -> None:
    """Prints records as aligned lines, lists of records as tables, and the parts of a record below one another."""
    value = plain(value)
    if title:
        console.print(escape(title), style="bold")
    if isinstance(value, list) and _is_part(value):
        console.print(_table(value, console))
        return
    if not isinstance(value, Mapping):
        value = {"result": value}
    simple = {escape(key): cell(key, item) for key, item in value.items() if not _is_part(item)}
    width = max(map(len, simple), default=0)
    for name, text in simple.items():
        console.print(f"{name:<{width}}  {text}", soft_wrap=True)
    for key, item in value.items():
        if _is_part(item):
            console.print()
            show(item, console, _words(key))


def _table(rows: Sequence[Any], console: Any) -> Any:
    """Columns in the order in which the rows name them; numbers to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in columns:
        numeric = all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        table.add_column(escape(_words(column)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*[Text(cell(column, row.get(column))) for column in columns])
    return table


def cell(name: str, value: Any) -> str:
    """A value as a table shows it: bytes in binary units, shapes with crosses, a metric with its interval.

    Example:
      >>> cell("parameters", 22713216), cell("bytes", 90852864), cell("lr", 1e-4), cell("shape", [384, 2])
      ('22,713,216', '86.6 MiB', '0.0001', '384 x 2')
      >>> cell("gain", {"value": 0.3, "low": 0.2, "high": 0.4, "n": 3, "verdict": "positive"})
      '0.3 [0.2, 0.4] positive'
    """
    if value is None or value in ([], {}):
        return "scalar" if name == "shape" and value == [] else "-"
    if _is_interval(value):
        low, high = (cell(name, value[end]) for end in ("low", "high"))
        return f"{cell(name, value['value'])} [{low}, {high}] {escape(str(value.get('verdict', '')))}".rstrip()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("bytes"):
        unit = min(max(value.bit_length() - 1, 0) // 10, 4)
        return f"{value / 1024**unit:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}" if unit else f"{value} B"
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, list):
        return (" x " if name == "shape" else ", ").join(escape(redact(str(item))) for item in value)
    return escape(redact(str(value)))


def escape(text: str) -> str:
    r"""Text that a terminal shows as it is: control and direction characters are written as escapes.

    Example:
      >>> print(escape("a\x1b[31mb\nc"))
      a\x1b[31mb\nc
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def lines_and_tabs(text: str) -> str:
    r"""As :func:`escape`, for text of several lines.

    Example:
      >>> lines_and_tabs("a\n\tb\x1b[2J")
      'a\n\tb\\x1b[2J'
    """
    return "".join(part if part in ("\n", "\t") else escape(part) for part in re.split(r"([\n\t])", text))


def plain(value: Any) -> Any:
    """Dictionaries, lists and scalars of records (without what their repr hides), tuples, and arrays' scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.repr}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if (item := getattr(value, "item", None)) is not None:  # a scalar of numpy or jax; some are floats as well
        return item()
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def _is_part(item: Any) -> bool:
    """Whether a value is printed below the record that it stands in."""
    rows = item if isinstance(item, list) else [item]
    return bool(item) and all(isinstance(row, Mapping) and not _is_interval(row) for row in rows)


def _is_interval(item: Any) -> bool:
    return isinstance(item, Mapping) and {"value", "low", "high"} <= item.keys()


def _words(name: str) -> str:
    return name.replace("_", " ")
