"""Ranges that records check of themselves."""

from typing import Any

from jaxtransfer.config.document import ConfigError


def check(fits: bool, field: str, want: str, got: Any) -> None:
    """Raises :class:`ConfigError` naming the field, what it must be, and what it is."""
    if not fits:
        raise ConfigError(f"{field}: must be {want}, got {got!r}", field)


def at_least(record: Any, low: float, *fields: str) -> None:
    """Checks that fields are None or at least ``low``."""
    for field in fields:
        if (value := getattr(record, field)) is not None:
            check(value >= low, field, f"at least {low}", value)


def increasing(values: Any, field: str, want: str) -> None:
    """Checks that values are positive, one or more, and each larger than the one before."""
    grows = all(a < b for a, b in zip((0, *values), values, strict=False))
    check(bool(values) and grows, field, want, list(values))
