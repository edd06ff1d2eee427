"""Recipes for what trains: rules from path to label, for `tree.match`.

A label is the name of an optimizer group (``trunk`` and ``head`` here), ``frozen``, or ``stats``: running statistics.
"""

import re
from collections.abc import Sequence
from typing import Any

from jaxtransfer.tree.paths import Params, flatten
from jaxtransfer.tree.rules import Rule, Rules, match
from jaxtransfer.types import Model

FROZEN, STATS = "frozen", "stats"


def full(model: Model) -> Rules:
    """Everything trains: the head as group ``head``, the rest as ``trunk``."""
    return (*_stats(model), Rule(r"head/.*", "head", optional=True), Rule(r".*", "trunk", optional=True))


def head_only(model: Model) -> Rules:
    """The head trains, everything before it is frozen: a linear probe of the trunk's features."""
    return (*_stats(model), Rule(r"head/.*", "head"), Rule(r".*", FROZEN, optional=True))


def last(model: Model, blocks: int) -> Rules:
    """The last ``blocks`` layers and all that follows them train.

    Raises:
      ValueError: the model has fewer layers.
    """
    names = [stage.name for stage in model.stages]
    layers = _layers(names)
    if not layers or not 0 <= blocks <= len(layers):
        raise ValueError(f"last({blocks}): the model has {len(layers)} layers")
    first = names.index(layers[-blocks]) if blocks else names.index(layers[-1]) + 1
    rules = [Rule(f"{re.escape(name)}/.*", "trunk", optional=True) for name in names[first:]]
    return (*_stats(model), Rule(r"head/.*", "head", optional=True), *rules, Rule(r".*", FROZEN, optional=True))


def _stats(model: Model) -> tuple[Rule, ...]:
    # Optional: the statistics may have been those of a head that was swapped.
    return tuple(Rule(pattern, STATS, optional=True) for pattern in model.stats)


def _layers(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.rpartition("/")[2].isdigit() and name.split("/")[0] != "head"]


def labels_of(model: Model, rules: Rules, params: Params) -> Any:
    """The tree of labels; the model's running statistics come before the user's rules.

    Raises:
      RuleError: as `tree.match`.
    """
    given = [rule for rule in rules if rule[0] not in model.stats]
    return match((*_stats(model), *given), params)


def layerwise_decay(model: Model, params: Params, decay: float) -> dict[str, float]:
    """Learning-rate scales by depth: ``decay ** (L + 1 - l)`` for layer ``l`` of ``L``, 1 for all that follows them.

    What precedes the layers (the embeddings) is layer 0, so its scale is ``decay ** (L + 1)`` (BEiT, Bao et al. 2022,
    arXiv:2106.08254).

    Returns:
      Canonical path -> scale.

    Raises:
      ValueError: decay is not in (0, 1], or the model has no layers.
    """
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"layer-wise decay must be in (0, 1], got {decay}")
    depth = stage_depths([stage.name for stage in model.stages])
    top = max(depth.values())
    return {path: decay ** (top - _depth(path, depth)) for path in flatten(params)}


def stage_depths(names: Sequence[str]) -> dict[str, int]:
    """The depth of each stage: 0 before the layers, 1 to L for them, L + 1 behind them.

    Example:
      >>> stage_depths(["embed", "blocks/0", "blocks/1", "pooler", "head"])
      {'embed': 0, 'blocks/0': 1, 'blocks/1': 2, 'pooler': 3, 'head': 3}
    """
    layers = _layers(names)
    if not layers:
        raise ValueError(f"layer-wise decay needs layers; the stages are {', '.join(names)}")
    depth, seen = {}, 0
    for name in names:
        if name in layers:
            seen += 1
        depth[name] = len(layers) + 1 if seen == len(layers) and name not in layers else seen
    return depth


def _depth(path: str, depth: dict[str, int]) -> int:
    return next(level for name, level in depth.items() if path.startswith(f"{name}/"))
