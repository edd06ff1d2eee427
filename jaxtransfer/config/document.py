"""A strict YAML document: what is written is what is meant, whatever wrote it.

Built from the event stream of PyYAML's safe parser, because its constructor reads ``1e-4`` as text, ``no`` as False,
``0123`` as 83, lets the last of two equal keys win, expands aliases without bound and recurses without bound. Here:

- plain scalars are ``null``, ``true``, ``false``, decimal integers and floats (``1e-4`` too), and text otherwise;
  keys are always text;
- duplicate keys, tags, anchors and aliases, more than one document, control characters, and anything over the limits
  below are refused, with the line.
"""

import math
import re
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 20_000

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]{1,3})?")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class ConfigError(ValueError):
    """A configuration that cannot be read: where, what was expected, what was found, and the nearest valid thing.

    Attributes:
      path: the dotted key that is wrong, or ``""``.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


def parse(text: str, name: str = "<yaml>") -> tuple[Any, dict[str, int]]:
    r"""Reads one document into dictionaries, lists and scalars, and the line of every dotted key.

    Raises:
      ConfigError: the text is no YAML, or uses what is refused (see the module's docstring).

    Example:
      >>> parse("lr: 1e-4\nlabels: [no, 0123, 'true']")
      ({'lr': 0.0001, 'labels': ['no', '0123', 'true']}, {'lr': 1, 'labels': 2})
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES >> 20} MiB, which no configuration is")
    builder = _Builder()
    line = 1
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1
            builder.add(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = line if mark is None else mark.line + 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # characters that the reader refuses; it gives several lines
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{name}:{line}: {error}", error.path) from None
    except (ValueError, OverflowError) as error:  # escapes of no character: "\U99999999"
        raise ConfigError(f"{name}:{line}: not valid YAML: {error}") from None
    return builder.root, builder.lines


def scalar(text: str) -> Any:
    """What a plain (unquoted) scalar stands for.

    Example:
      >>> [scalar(text) for text in ("1e-4", "1e6", "12", "no", "0123", "True", "null")]
      [0.0001, 1000000.0, 12, 'no', '0123', 'True', None]
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        if math.isinf(value := float(text)):
            raise ConfigError(f"the number {text} is out of range")
        return value
    return text


class _Builder:
    """Builds the value from events with a stack of its own, so that depth is a number and not a crash."""

    def __init__(self) -> None:
        self.root: Any = None
        self.lines: dict[str, int] = {}
        self.nodes = self.documents = 0
        self.stack: list[tuple[Any, str]] = []  # open collections and their dotted paths
        self.keys: list[str | None] = []  # for each open collection the key that waits for its value

    def add(self, event: Any) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise ConfigError("a second document ('---'); a configuration is one")
        elif isinstance(event, yaml.CollectionEndEvent):
            self.stack.pop()
            self.keys.pop()
        elif isinstance(event, yaml.NodeEvent):
            self._check(event)
            if isinstance(event, yaml.ScalarEvent):
                self._scalar(event)
            else:
                value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
                path = self._put(value, event)
                self.stack.append((value, path))
                self.keys.append(None)

    def _check(self, event: Any) -> None:
        if event.anchor is not None:
            raise ConfigError(f"anchors and aliases ({event.anchor!r}) are refused; write the value out")
        if event.tag is not None:
            raise ConfigError(f"the tag {event.tag!r} is refused; a configuration holds plain values only")
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise ConfigError(f"more than {MAX_NODES} values")
        if len(self.stack) >= MAX_DEPTH:
            raise ConfigError(f"nested more than {MAX_DEPTH} deep")

    def _scalar(self, event: Any) -> None:
        if found := _CONTROL.search(event.value):
            raise ConfigError(f"the text {event.value[:40]!r} holds the control character {found[0]!r}")
        if self.stack and isinstance(self.stack[-1][0], dict) and self.keys[-1] is None:
            node, path = self.stack[-1]
            if event.value in node:
                raise ConfigError(f"{_join(path, event.value)}: the key is given twice", _join(path, event.value))
            self.keys[-1] = event.value
        else:
            self._put(scalar(event.value) if event.implicit[0] else event.value, event)

    def _put(self, value: Any, event: Any) -> str:
        """Places a value where it belongs; its dotted path."""
        if not self.stack:
            self.root = value
            return ""
        node, path = self.stack[-1]
        if isinstance(node, list):
            node.append(value)
            return f"{path}[{len(node) - 1}]"
        key = self.keys[-1]
        if key is None:
            raise ConfigError(f"{path or 'the document'}: a key must be text, got a collection", path)
        node[key], self.keys[-1] = value, None
        path = _join(path, key)
        self.lines[path] = event.start_mark.line + 1
        return path


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


class _Dumper(yaml.SafeDumper):
    """Block style, leaf lists in flow style, and text quoted wherever :func:`scalar` would read something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = text.isascii() and text.isprintable() and _is_text(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _represent_list(dumper: yaml.SafeDumper, items: Any) -> yaml.SequenceNode:
    leaves = not any(isinstance(item, dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=leaves)


def _is_text(text: str) -> bool:
    """Whether a text, written without quotes, is read back as itself."""
    return text not in _WORDS and not _INT.fullmatch(text) and not _FLOAT.fullmatch(text)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(tuple, _represent_list)


def render(value: Any) -> str:
    """The YAML text of dictionaries, lists and scalars; the inverse of :func:`parse`.

    Example:
      >>> print(render({"lr": 1e-4, "labels": ["yes", "1e-4", "good"], "clip": None}), end="")
      lr: 0.0001
      labels: ['yes', "1e-4", good]
      clip: null
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100)
