"""Rules: one grammar for what trains, what is sharded, what is adapted, what is penalised.

A rule is ``(regex, value)``. Rules are ordered; each is full-matched against a leaf's path, and the first that matches
wins. For a part of a leaf type (``.../kernel@a``) both its own path and its weight's path (``.../kernel``) are tried.
"""

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtransfer.tree.paths import flatten, map_with_path, weight_path

_LITERAL = re.compile(r"(?:[^.^$*+?{}\[\]\\|()]|\\[.^$*+?{}\[\]\\|()])*")


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


class RuleError(ValueError):
    """A rule that selects nothing, is shadowed, is no regular expression, or a leaf that no rule covers."""


class Rule(NamedTuple):
    """``(pattern, value)``; ``optional`` marks the library's own defaults, which may match nothing."""

    pattern: str
    value: Any
    optional: bool = False


Rules = Sequence[Rule | tuple[str, Any]]


def as_rules(rules: Rules) -> tuple[Rule, ...]:
    """Checks and normalises a list of rules; pairs become :class:`Rule`."""
    out = []
    for item in rules:
        if not isinstance(item, (tuple, list)) or len(item) not in (2, 3) or not isinstance(item[0], str):
            raise RuleError(f"a rule is (regex, value), got {item!r}")
        rule = Rule(item[0], item[1], len(item) == 3 and bool(item[2]))
        try:
            if _literal(rule.pattern) is None:
                re.compile(rule.pattern)
        except re.error as error:
            raise RuleError(f"rule {rule.pattern!r} is not a regular expression: {error}") from None
        out.append(rule)
    return tuple(out)


def match(rules: Rules, tree: Any, *, default: Any = REQUIRED) -> Any:
    """The value of the first matching rule for every leaf: a tree of the same structure.

    Args:
      rules: ordered ``(regex, value)`` pairs, full-matched against paths.
      tree: any pytree of nested dictionaries.
      default: the value of leaves that no rule matches; without it every leaf must be covered.

    Raises:
      RuleError: a rule matches no leaf (the nearest paths are shown), is wholly shadowed by earlier rules (they are
        named), or, without ``default``, leaves are uncovered (they are listed).

    Example:
      >>> match([(r"head/.*", "train"), (r".*", "frozen")], {"body": {"w": 0}, "head": {"w": 1}})
      {'body': {'w': 'frozen'}, 'head': {'w': 'train'}}
    """
    values = match_paths(rules, list(flatten(tree)), default=default)
    return map_with_path(lambda path, _: values[path], tree)


def match_paths(rules: Rules, paths: Sequence[str], *, default: Any = REQUIRED) -> dict[str, Any]:
    """:func:`match` on a list of paths: ``{path: value}``."""
    rules = as_rules(rules)
    winners = winning_rules(rules, paths)
    _check_rules(rules, winners, paths)
    uncovered = [path for path, index in winners.items() if index is None]
    if uncovered and default is REQUIRED:
        shown = ", ".join(uncovered[:8]) + (f" and {len(uncovered) - 8} more" if len(uncovered) > 8 else "")
        raise RuleError(
            f"no rule covers {len(uncovered)} of {len(paths)} leaves: {shown}; "
            f"rules: {[rule.pattern for rule in rules]}; add a rule for them, or a last rule '.*'"
        )
    return {path: default if index is None else rules[index].value for path, index in winners.items()}


def winning_rules(rules: Rules, paths: Sequence[str]) -> Mapping[str, int | None]:
    """For every path the index of the rule that wins it, or None: what ``inspect`` and ``explain`` show."""
    compiled: list[tuple[int, re.Pattern[str]]] = []
    literals: dict[str, int] = {}
    for i, rule in enumerate(as_rules(rules)):
        if (name := _literal(rule.pattern)) is None:
            compiled.append((i, re.compile(rule.pattern)))
        else:
            literals.setdefault(name, i)
    winners: dict[str, int | None] = {}
    for path in paths:
        names = {path, weight_path(path)}
        hits = [literals[name] for name in names if name in literals]
        hits += itertools.islice((i for i, regex in compiled if any(map(regex.fullmatch, names))), 1)
        winners[path] = min(hits, default=None)
    return winners


def _literal(pattern: str) -> str | None:
    """The one path that a pattern without operators matches.

    Rules that a program makes leaf by leaf are thousands: these are looked up, and not tried one after the other.
    """
    return re.sub(r"\\(.)", r"\1", pattern) if _LITERAL.fullmatch(pattern) else None


def _check_rules(rules: Sequence[Rule], winners: Mapping[str, int | None], paths: Sequence[str]) -> None:
    won = set(winners.values())
    for index, rule in enumerate(rules):
        if rule.optional or index in won:
            continue
        regex = re.compile(rule.pattern)
        taken = [path for path in paths if regex.fullmatch(path) or regex.fullmatch(weight_path(path))]
        if not taken:
            near = nearest(rule.pattern, paths)
            raise RuleError(f"rule {rule.pattern!r} matches none of {len(paths)} leaves; nearest paths: {near}")
        shadows = sorted({i for path in taken if (i := winners[path]) is not None})
        names = ", ".join(repr(rules[i].pattern) for i in shadows)
        raise RuleError(
            f"rule {rule.pattern!r} never wins: each of its {len(taken)} leaves is taken by the earlier {names}; "
            "move it forward or remove it"
        )


def nearest(pattern: str, paths: Sequence[str], count: int = 3) -> str:
    """The paths that look most like a pattern, for error messages."""
    literal = re.sub(r"\\.|[\^$.*+?()\[\]{}|]", "", pattern)
    scored = sorted(paths, key=lambda path: -difflib.SequenceMatcher(None, literal, path).ratio())
    return ", ".join(scored[:count]) or "(the tree is empty)"
