"""Numbers as people read them."""

import math
import re
from collections.abc import Mapping
from typing import Any

MINUS = "\N{MINUS SIGN}"
_SHARE = re.compile(r"(.*[/_])?(accuracy|f1|precision|recall|sensitivity|specificity|exact_match|top\d+)(_.*)?")
_AREA = re.compile(r"(.*[/_])?auc")


def is_share(metric: str) -> bool:
    """Whether a metric is a share, read in percent.

    Example:
      >>> is_share("macro_f1"), is_share("auc"), is_share("loss")
      (True, False, False)
    """
    return _SHARE.fullmatch(metric) is not None


def highest(metric: str) -> float | None:
    """The most that a metric can be; None where there is no bound.

    Example:
      >>> highest("accuracy"), highest("macro_auc"), highest("loss")
      (1.0, 1.0, None)
    """
    return 1.0 if is_share(metric) or _AREA.fullmatch(metric) else None


def named(metric: str) -> str:
    """A metric's name in words.

    Example:
      >>> named("macro_f1"), named("sensitivity_at_90")
      ('macro F1', 'sensitivity at 90 % specificity')
    """
    words = re.sub(r"\b(f1|auc)\b", lambda m: m[0].upper(), metric.replace("_", " "))
    return re.sub(r"sensitivity at (\d+)", r"sensitivity at \1 % specificity", words)


def titled(metric: str) -> str:
    """A metric's name in words, with a capital."""
    name = named(metric)
    return name[:1].upper() + name[1:]


def number(value: float, digits: int = 1, *, sign: bool = False) -> str:
    """Fixed digits, thousands apart, a true minus sign, never a negative zero.

    Example:
      >>> number(-1234.56), number(-0.01), number(0.2, sign=True)
      ('−1,234.6', '0.0', '+0.2')
    """
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else f"{MINUS if value < 0 else ''}∞"
    rounded = round(value, digits) + 0.0
    text = f"{abs(rounded):,.{digits}f}"
    return (MINUS if rounded < 0 else "+" if sign and rounded > 0 else "") + text


def small(value: float) -> str:
    """Four significant digits, for losses and rates.

    Example:
      >>> small(0.25314), small(3e-05), small(12)
      ('0.2531', '3e-5', '12')
    """
    text = f"{value:.4g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", MINUS) if value < 0 and "e" not in text else text


def shown(metric: str, value: float | None) -> str:
    """A metric's value with its unit; None is what the data does not define.

    Example:
      >>> shown("accuracy", 0.915), shown("loss", 0.25314), shown("loss", 2e-5)
      ('91.5 %', '0.253', '2e-5')
    """
    if value is None or math.isnan(value):
        return "undefined"
    return f"{number(100 * value)} %" if is_share(metric) else _plain(value)


def bounded(cell: Mapping[str, Any]) -> bool:
    """Whether the cell's interval says anything: one seed's does not."""
    return all(cell.get(end) is not None and math.isfinite(cell[end]) for end in ("low", "high"))


def ends(cell: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The ends of a cell's interval, where it says anything."""
    return (cell["low"], cell["high"]) if bounded(cell) else (None, None)


def span(metric: str, cell: Mapping[str, Any]) -> str:
    """A cell's interval.

    Example:
      >>> span("accuracy", {"low": 0.201, "high": 0.369}), span("loss", {"low": None, "high": None})
      ('20.1 to 36.9', 'none')
    """
    if not bounded(cell):
        return "none"
    low, high = (number(100 * cell[end]) if is_share(metric) else _plain(cell[end]) for end in ("low", "high"))
    return f"{low} to {high}"


def _plain(value: float) -> str:
    return small(value) if 0 < abs(value) < 1e-3 else number(value, 3 if abs(value) < 10 else 1)


def gained(metric: str, value: float) -> str:
    """A difference of a metric.

    Example:
      >>> gained("accuracy", 0.285), gained("loss", -0.02)
      ('+28.5 points', '−0.020')
    """
    digits = 3 if abs(value) < 10 else 1
    return f"{number(100 * value, sign=True)} points" if is_share(metric) else number(value, digits, sign=True)


def count(value: int) -> str:
    """A count with its thousands apart."""
    return f"{value:,}"


def many(value: int, noun: str) -> str:
    """A count with its noun.

    Example:
      >>> many(1, "seed"), many(1200, "example")
      ('1 seed', '1,200 examples')
    """
    return f"{value:,} {noun}" + ("" if value == 1 else "s")


def size(nbytes: float) -> str:
    """Bytes in decimal units.

    Example:
      >>> size(90_852_864), size(12)
      ('90.9 MB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} TB"


def duration(seconds: float) -> str:
    """A time in its two largest units.

    Example:
      >>> duration(8.26), duration(192), duration(7380)
      ('8.3 s', '3 min 12 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"
