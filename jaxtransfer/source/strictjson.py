"""JSON from files that nobody vouches for: bounded, without duplicate keys, without NaN."""

import json
from pathlib import Path
from typing import Any

CONFIG_BYTES = 1 << 20
INDEX_BYTES = 32 << 20
MARKER_BYTES = 16 << 20
TOKENS = 500_000


def read_object(path: Path, limit: int, error: type[ValueError]) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
      path: the file.
      limit: the most bytes it may have.
      error: what to raise; the message is one line with the file's name.
    """
    with open(path, "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise error(f"{path.name}: larger than {limit} bytes, no {path.suffix[1:]} file of this kind is")
    return parse_object(raw, path.name, error)


def parse_object(raw: bytes, where: str, error: type[ValueError], *, tokens: int = TOKENS) -> dict[str, Any]:
    """The object in ``raw``; ``where`` names it in messages, ``tokens`` bounds the objects that parsing makes.

    Example:
      >>> parse_object(b'{"a": 1, "a": 2}', "config.json", ValueError)
      Traceback (most recent call last):
      ValueError: config.json: key 'a' stands there twice
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))
            raise error(f"{where}: key {printable(twice)} stands there twice")
        return found

    def constant(text: str) -> Any:
        raise error(f"{where}: {text} is no JSON number")

    if sum(raw.count(mark) for mark in (b",", b":", b"[", b"{")) > tokens:
        raise error(f"{where}: more than {tokens} entries")
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except error:
        raise
    except RecursionError:
        raise error(f"{where}: nested too deeply") from None
    except ValueError as problem:  # bad UTF-8, bad JSON, an integer of thousands of digits
        raise error(f"{where}: is not JSON: {str(problem).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise error(f"{where}: expected a JSON object, found {type(found).__name__}")
    return found


def printable(text: Any, limit: int = 80) -> str:
    """An untrusted string for a message: quoted, control characters escaped, cut at ``limit`` characters."""
    shown = ascii(text)
    return shown if len(shown) <= limit else shown[:limit] + "..."
