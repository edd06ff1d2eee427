"""Configurations from files, with overrides from the command line, and back to text."""

import collections.abc
import dataclasses
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtransfer.config.decode import decode, describe, short, tag
from jaxtransfer.config.document import MAX_BYTES, ConfigError, parse, render
from jaxtransfer.config.schema import Config
from jaxtransfer.config.secrets import redact

DATA_VARIABLE = "JAXTRANSFER_DATA"
DATA_DEFAULT = "../shared/data"


def load(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Reads a configuration file, then overrides ``(dotted key, YAML text)`` in order.

    Without a key ``out`` it is ``runs/`` and the file's name. ``${JAXTRANSFER_DATA}`` in the paths of data is what
    that environment variable holds, ``../shared/data`` where it is not set.

    Raises:
      ConfigError: with the file and line, or the override, the dotted key, what was expected and what was found.
    """
    path = Path(path)
    raw, lines = parse(_text(path), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping, got {short(raw)}")
    raw.setdefault("out", f"runs/{path.stem}")
    given = {key for key, _ in overrides}
    for key, text in overrides:
        override(raw, key, text)
    try:
        return from_dict(raw)
    except ConfigError as error:
        raise ConfigError(f"{_where(error.path, path, lines, given)}{error}", error.path) from None


def from_dict(raw: Mapping[str, Any]) -> Config:
    """The configuration of nested dictionaries, as strictly as from a file.

    Raises:
      ConfigError: see :func:`load`.
    """
    _refuse_secrets(raw, "")
    raw = _expand_all(raw, "data")
    if isinstance(pretrain := raw.get("pretrain"), Mapping):
        raw = {**raw, "pretrain": _expand_all(pretrain, "data", "pretrain.")}
    return decode(Config, _expand_all(raw, "source"))


def dump(config: Config) -> str:
    """The YAML text of a configuration, every field written out; :func:`load` reads it back exactly."""
    return render(dataclasses.asdict(config))


def keys(kind: Any = Config, path: str = "") -> Iterator[tuple[str, str, str | None]]:
    """Every dotted key of a configuration, what it holds in words, and its default as YAML; None where it has none.

    Example:
      >>> next(row for row in keys() if row[0] == "optimizer.lr")
      ('optimizer.lr', 'a number', '0.0001')
    """
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        item = _item(hints[field.name])
        records = [arm for arm in _arms(item or hints[field.name]) if dataclasses.is_dataclass(arm)]
        if len(records) == 1:
            words = [arm for arm in _arms(hints[field.name]) if typing.get_origin(arm) is Literal]
            yield from ((f"{path}{field.name}", f"{describe(arm)}, or its keys", None) for arm in words)
            yield from keys(records[0], f"{path}{field.name}.{'' if item is None else 'N.'}")
            continue
        if records:
            yield from _tagged_keys(records, f"{path}{field.name}.{'' if item is None else 'N.'}")
            continue
        required = field.default is field.default_factory is dataclasses.MISSING
        value = field.default_factory() if callable(field.default_factory) else field.default
        yield (
            f"{path}{field.name}",
            describe(hints[field.name]),
            None if required else render([value])[1:-2] if value != {} else "{}",
        )


def _tagged_keys(records: Sequence[Any], path: str) -> Iterator[tuple[str, str, str | None]]:
    """The keys of records that are told apart by a tag: whose they are is said where it is not all of them."""
    rows: dict[tuple[str, str, str | None], list[str]] = {}
    for record in records:
        for row in keys(record, path):
            rows.setdefault(row, []).append(tag(record)[1])
    name, kinds = tag(records[0])[0], [tag(record)[1] for record in records]
    required = dataclasses.fields(records[0])[0].default is dataclasses.MISSING
    yield (f"{path}{name}", describe(Literal[tuple(kinds)]), None if required else kinds[0])
    for (key, words, default), readers in rows.items():
        if key != f"{path}{name}":
            yield (key, words if readers == kinds else f"{words}, of {' and '.join(readers)}", default)


def override(raw: dict[str, Any], key: str, text: str) -> None:
    """Sets a dotted key of nested dictionaries to what ``text`` says, read as a file's value would be.

    Where the field holds text, ``text`` is taken as it is, so that ``--data.train.label 0123`` needs no quotes. Items
    of a list go by number: ``--adapt.adapters.0.rank 16``.

    Example:
      >>> raw = {"optimizer": {"lr": 1e-4}}
      >>> override(raw, "optimizer.groups.head.lr", "1e-3")
      >>> raw
      {'optimizer': {'lr': 0.0001, 'groups': {'head': {'lr': 0.001}}}}
    """
    *parents, last = key.split(".")
    node: Any = raw
    for i, name in enumerate(parents, 1):
        if isinstance(node, dict) and node.get(name) is None:
            node[name] = {}
        node, following = node[_key_in(node, name)], (*parents, last)[i]
        if _key_in(node, following) is None:
            where, lacks = ".".join(parents[:i]), f"item {following}" if isinstance(node, list) else "keys"
            raise ConfigError(f"command line: --{key}: {where} is {short(node)}, which has no {lacks}", where)
    node[_key_in(node, last)] = text if _is_text(key, text) else parse(text, f"command line: --{key}")[0]


def _key_in(node: Any, name: str) -> str | int | None:
    """What a name stands for in a mapping or a list; None where there is no such place."""
    if isinstance(node, list):
        return int(name) if name.isdecimal() and int(name) < len(node) else None
    return name if isinstance(node, dict) else None


def _is_text(key: str, text: str) -> bool:
    """Whether the field takes text, and this is not its null."""
    kinds: tuple[Any, ...] = (Config,)
    for name in key.split("."):
        found = [_inside(kind, name) for kind in kinds if kind is not type(None)]
        kinds = tuple(arm for kind in found for arm in _arms(kind))
    return str in kinds and not (type(None) in kinds and text == "null")


def _inside(kind: Any, name: str) -> Any:
    """The type of what a record holds under a name, or of the values of a mapping or a list."""
    if dataclasses.is_dataclass(kind):
        return typing.get_type_hints(kind).get(name)
    if (item := _item(kind)) is not None:
        return item
    return typing.get_args(kind)[1] if typing.get_origin(kind) is collections.abc.Mapping else None


def _arms(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _item(kind: Any) -> Any:
    """The type of a list's items; None for what is no list of any length."""
    args = typing.get_args(kind)
    return args[0] if typing.get_origin(kind) is tuple and args[1:] == (...,) else None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _where(path: str, file: Path, lines: Mapping[str, int], given: set[str]) -> str:
    """Where a key was written: the override, or the file and the line of the nearest key that stands in it."""
    while path:
        dotted = path.replace("[", ".").replace("]", "")
        if dotted in given or (path not in lines and any(key.startswith(f"{dotted}.") for key in given)):
            return "command line: --"
        if path in lines:
            return f"{file}:{lines[path]}: "
        path = path.rpartition("[")[0] if path.endswith("]") else path.rpartition(".")[0]
    return f"{file}: "


def _expand_all(raw: Mapping[str, Any], section: str, path: str = "") -> Mapping[str, Any]:
    """A mapping with the variables of a section's paths replaced, its own and those of its parts."""
    given = raw.get(section)
    if not isinstance(given, Mapping):
        return raw
    where = f"{path}{section}"
    return {**raw, section: _expand({key: _expand(item, f"{where}.{key}") for key, item in given.items()}, where)}


def _expand(spec: Any, where: str) -> Any:
    """Replaces the one variable that a path may hold; any other ``${...}`` is an error, never the environment's."""
    if not isinstance(spec, Mapping):
        return spec
    spec = dict(spec)
    for key in ("path", "without", "ref", "config"):
        if isinstance(path := spec.get(key), str):
            path = path.replace(f"${{{DATA_VARIABLE}}}", os.environ.get(DATA_VARIABLE) or DATA_DEFAULT)
            if "${" in path:
                raise ConfigError(
                    f"{where}.{key}: only ${{{DATA_VARIABLE}}} is expanded, got {path!r}", f"{where}.{key}"
                )
            spec[key] = path
    return spec


def _refuse_secrets(value: Any, path: str) -> None:
    """A configuration is copied into runs and reports; tokens stay in the environment."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_secrets(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _refuse_secrets(item, f"{path}[{i}]")
    elif isinstance(value, str) and redact(value) != value:
        raise ConfigError(f"{path}: holds a token or password; it belongs in the environment (HF_TOKEN)", path)
