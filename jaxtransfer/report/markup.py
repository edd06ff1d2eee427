"""Markup that escapes by construction: whatever is not `Html` already is text, and is escaped."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence

VOID = frozenset({"meta", "link", "br", "hr", "img"})
# What HTML forbids even when escaped: C0 controls (but tab and newline), DEL and C1, lone surrogates, noncharacters.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Markup, as opposed to text; what is added to it is escaped."""

    __slots__ = ()

    def __add__(self, other: object) -> "Html":
        return Html(str.__add__(self, escape(other)))


def escape(value: object) -> Html:
    """Text as markup; `Html` as it is.

    Example:
      >>> escape("<b>")
      '&lt;b&gt;'
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape(FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value))))


def join(parts: Iterable[object]) -> Html:
    """The parts one after the other; None is nothing."""
    return Html("".join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. ``class_`` is written ``class``, ``data_x`` is ``data-x``; an attribute that is None is left out.

    Example:
      >>> tag("p", "1 < 2", tag("br"), class_="note")
      '<p class="note">1 &lt; 2<br></p>'
    """
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    start = f"<{name}" + "".join(f' {key}="{escape(value)}"' for key, value in pairs) + ">"
    return Html(start) if name in VOID else Html(f"{start}{join(children)}</{name}>")


def table(columns: Mapping[str, str | None], rows: Iterable[Sequence[object]], *, foot: Sequence[object] = ()) -> Html:
    """A table that scrolls sideways where the page is too narrow.

    Args:
      columns: heading -> class of the column's cells (``"num"`` for numbers) or None.
      rows: cells in the order of the columns; the first is the row's heading.
      foot: one more row, set apart.
    """

    def row(cells: Sequence[object]) -> Html:
        kinds = list(columns.values())
        head = tag("th", cells[0], scope="row", class_=kinds[0])
        return tag("tr", head, *(tag("td", cell, class_=k) for cell, k in zip(cells[1:], kinds[1:], strict=True)))

    head = tag("tr", *(tag("th", name, scope="col", class_=kind) for name, kind in columns.items()))
    body = tag("tbody", *map(row, rows))
    return tag(
        "div",
        tag("table", tag("thead", head), body, tag("tfoot", row(foot)) if foot else None),
        class_="wide",
    )


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """A list of names and values."""
    return tag("dl", *(join([tag("dt", name), tag("dd", value)]) for name, value in pairs))


def note(*text: object) -> Html:
    """A quiet remark below a heading."""
    return tag("p", *text, class_="note")


def absent(text: str) -> Html:
    """Why there is nothing to see here."""
    return tag("p", text, class_="absent")
