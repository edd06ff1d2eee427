"""Plain values into frozen dataclasses: no key unread, no value of another type, nothing imported by name."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtransfer.config.document import ConfigError

_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def decode(kind: Any, value: Any, path: str = "") -> Any:
    """Reads a plain value as ``kind``: a dataclass, scalar, ``X | None``, ``Literal``, tuple or ``Mapping[str, X]``.

    A dataclass checks its own ranges in ``__post_init__``; a ``ValueError`` from there is reported under its path.

    Raises:
      ConfigError: an unknown or missing key, a value of another type, or one out of range; with ``path``.

    Example:
      >>> decode(tuple[int, ...] | None, [0, 1, 2], "study.seeds")
      (0, 1, 2)
      >>> decode(float, "fast", "optimizer.lr")
      Traceback (most recent call last):
      jaxtransfer.config.document.ConfigError: optimizer.lr: expected a number, got 'fast'
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, path)
    if origin is typing.Literal:
        if (
            not isinstance(value, (str, int, float))
            or value not in args
            or type(value) not in {type(arg) for arg in args}
        ):
            near = nearest(value, [str(arg) for arg in args])
            raise ConfigError(f"{path}: expected {describe(kind)}, got {short(value)}{near}", path)
        return value
    if origin is tuple:
        return _tuple(kind, args, value, path)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _expect(isinstance(value, Mapping), kind, value, path)
        return {key: decode(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _record(kind, value, path)
    if kind is float and type(value) is int:
        return float(value)
    _expect(type(value) is kind, kind, value, path)
    return value


def _union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    """``X | None``, unions of scalars, tuples and a record, and records that are told apart by their first field."""
    if value is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    if len(rest) == 1:
        return decode(rest[0], value, path)
    if all(map(dataclasses.is_dataclass, rest)):
        return _tagged(rest, value, path)
    records = [kind for kind in rest if dataclasses.is_dataclass(kind)]
    if len(records) == 1 and isinstance(value, Mapping):  # whose own message says more
        return decode(records[0], value, path)
    for kind in rest:
        try:
            return decode(kind, value, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path}: expected {' or '.join(describe(kind) for kind in kinds)}, got {short(value)}", path)


def tag(record: Any) -> tuple[str, str]:
    """The first field of a record that is told apart by it, ``kind`` or ``method``, and its value."""
    field = dataclasses.fields(record)[0].name
    return field, typing.get_args(typing.get_type_hints(record)[field])[0]


def _tagged(records: Sequence[Any], value: Any, path: str) -> Any:
    """The record whose tag is given; where none is, the first one if it has that by default."""
    if isinstance(value, tuple(records)):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a mapping, got {short(value)}", path)
    known = {tag(record)[1]: record for record in records}
    field, where = dataclasses.fields(records[0])[0], f"{path}.{tag(records[0])[0]}"
    named = value.get(field.name, field.default)
    if named is dataclasses.MISSING:
        raise ConfigError(f"{where}: missing; expected {describe(typing.Literal[tuple(known)])}", path)
    kind = decode(typing.Literal[tuple(known)], named, where)
    names = {each: [field.name for field in dataclasses.fields(record)] for each, record in known.items()}
    for key in value:
        if key not in names[kind] and (others := [other for other in known if key in names[other]]):
            where, all_ = f"{path}.{key}", " and ".join(filter(None, [", ".join(others[:-1]), others[-1]]))
            raise ConfigError(f"{where}: is not read by {kind}, but by {all_}", where)
    return _record(known[kind], value, path)


def _tuple(kind: Any, args: tuple[Any, ...], value: Any, path: str) -> Any:
    _expect(isinstance(value, (list, tuple)), kind, value, path)
    if args[-1] is Ellipsis:
        return tuple(decode(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    _expect(len(value) == len(args), kind, value, path)
    return tuple(decode(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))


def _record(kind: type, value: Any, path: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path or 'the document'}: expected a mapping, got {short(value)}", path)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key in value:
        if key not in fields:
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(f"{where}: unknown key{nearest(key, fields)}; known: {', '.join(fields)}", where)
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            where = f"{path}.{name}" if path else name
            raise ConfigError(f"{where}: missing; expected {describe(hints[name])}", path)
    parts = {key: decode(hints[key], item, f"{path}.{key}" if path else key) for key, item in value.items()}
    try:
        return kind(**parts)
    except ConfigError as error:  # names the field first; what is missing is the way to it
        where = ".".join(part for part in (path, error.path) if part)
        raise ConfigError(f"{path}.{error}" if path else str(error), where) from None
    except ValueError as error:  # another room's record, which names its field first as well
        field = str(error).partition(": ")[0]
        where = f"{path}.{field}" if field in fields else path
        raise ConfigError(f"{path}{': ' if where == path else '.'}{error}", where) from None


def _expect(fits: bool, kind: Any, value: Any, path: str) -> None:
    if not fits:
        raise ConfigError(f"{path}: expected {describe(kind)}, got {short(value)}", path)


def describe(kind: Any) -> str:
    """A type in words, for messages: ``"a list, each text or null"``."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(arg) for arg in args))
    if origin is typing.Literal:
        return f"{'one of ' if len(args) > 1 else ''}{', '.join(map(str, args))}"
    if origin is tuple and args[-1] is Ellipsis:
        return f"a list, each {describe(args[0])}"
    if origin is tuple:
        return f"[{', '.join(describe(arg) for arg in args)}]"
    return _NAMES.get(kind, "a mapping")


def short(value: Any) -> str:
    """A value for a message, in at most 60 characters."""
    text = (
        repr(value) if not isinstance(value, Mapping) else f"a mapping with {', '.join(map(str, value)) or 'no keys'}"
    )
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: Any, known: Sequence[str] | Mapping[str, Any]) -> str:
    """``"; did you mean 'lr'?"`` for the most similar known word, or nothing."""
    found = difflib.get_close_matches(str(word).lower(), list(known), 1, 0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
