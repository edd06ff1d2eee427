"""Recipes for what trains: rules from path to label, for `tree.match`.

A label is the name of an optimizer group (``trunk`` and ``head`` here), ``frozen``, or ``stats``: running statistics.
Where a recipe trains an adapted weight, its base and its adapters train together; no recipe trains what is constant:
LoRA's scale, VeRA's random matrices, what a merge kept.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxtransfer.tree.paths import Params, flatten, map_with_path
from jaxtransfer.tree.rules import Rule, Rules, match
from jaxtransfer.tree.weights import SHARED
from jaxtransfer.types import Model

FROZEN, STATS = "frozen", "stats"

_TRAINABLE = r"[^@]*@(a|b|d|magnitude|gain)"
"""The parts of an outermost adapter that train."""
_CONSTANT = rf"(.*/)?(kernel|embedding)@(.*@)?(scale|bias|kept(@.*)?)|{SHARED}/vera/.*"
"""The parts of leaf types that no recipe trains; ``bias`` is what a merge kept of the one beside the weight."""


def full(model: Model) -> Rules:
    """Everything trains: the head as group ``head``, the rest as ``trunk``."""
    return (*_fixed(model), Rule(r"head/.*", "head", optional=True), Rule(r".*", "trunk", optional=True))


def head_only(model: Model) -> Rules:
    """The head trains, everything before it is frozen: a linear probe of the trunk's features.

    Raises:
      ValueError: the head has no parameters of its own, but reads the frozen embedding.
    """
    _check_untied(model, "head_only")
    return (*_fixed(model), Rule(r"head/.*", "head"), Rule(r".*", FROZEN, optional=True))


def last(model: Model, blocks: int) -> Rules:
    """The last ``blocks`` layers and all that follows them train.

    Raises:
      ValueError: the model has fewer layers, or the head has no parameters of its own, but reads the frozen embedding.
    """
    _check_untied(model, f"last({blocks})")
    names = [stage.name for stage in model.stages]
    layers = _layers(names)
    if not layers or not 0 <= blocks <= len(layers):
        raise ValueError(f"last({blocks}): the model has {len(layers)} layers")
    first = names.index(layers[-blocks]) if blocks else names.index(layers[-1]) + 1
    rules = [Rule(f"{re.escape(name)}/.*", "trunk", optional=True) for name in names[first:]]
    return (*_fixed(model), Rule(r"head/.*", "head", optional=True), *rules, Rule(r".*", FROZEN, optional=True))


def adapters(model: Model) -> Rules:
    """The adapters' own parts train as group ``adapter``, a head as ``head``; every base is frozen.

    Of adapters on top of one another the outermost trains. Bottlenecks, prompts and prefixes train too.
    """
    return (
        *_stats(model),
        # First: the rules below would win these parts by their weight's path.
        Rule(rf"(?!{_TRAINABLE}$).*@.*", FROZEN, optional=True),
        Rule(rf"{_TRAINABLE}|(.*/)?(adapter|prompt|prefix)/.*", "adapter"),
        Rule(r"head/.*", "head", optional=True),
        Rule(r".*", FROZEN, optional=True),
    )


def lora_plus(model: Model) -> Rules:
    """As `adapters`, with ``b`` as a group ``adapter_b`` of its own, to be given a larger rate.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) takes 16 times the rate of ``a`` or so.
    """
    return (*_stats(model), Rule(r"[^@]*@b", "adapter_b"), *adapters(model)[len(model.stats) :])


def biases(model: Model) -> Rules:
    """Biases train, and the head (BitFit: Ben Zaken et al. 2022, arXiv:2106.10199)."""
    return (*_fixed(model), *_with_head(Rule(r".*/bias", "trunk")))


def norms(model: Model) -> Rules:
    """The scales and biases of normalisations train, and the head."""
    return (*_fixed(model), *_with_head(Rule(r"(.*/)?\w*norm\w*/(scale|bias)", "trunk")))


def _with_head(rule: Rule) -> Rules:
    return Rule(r"head/.*", "head", optional=True), rule, Rule(r".*", FROZEN, optional=True)


def _check_untied(model: Model, recipe: str) -> None:
    """Nothing of a head that is its embedding alone would train; other tied heads are `heads.check_tied`'s affair."""
    for stage in model.stages:
        if stage.name == "head" and stage.reads and not jax.eval_shape(stage.init, jax.random.key(0)):
            raise ValueError(
                f"{recipe}: the head is {stage.reads[0]}, which this recipe freezes: untie(source) first, or train both"
            )


def _stats(model: Model) -> tuple[Rule, ...]:
    # Optional: the statistics may have been those of a head that was swapped.
    return tuple(Rule(pattern, STATS, optional=True) for pattern in model.stats)


def _fixed(model: Model) -> tuple[Rule, ...]:
    """What no recipe trains."""
    return (*_stats(model), Rule(_CONSTANT, FROZEN, optional=True))


def _layers(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.rpartition("/")[2].isdigit() and name.split("/")[0] != "head"]


def labels_of(model: Model, rules: Rules, params: Params) -> Any:
    """The tree of labels; the model's running statistics come before the user's rules.

    The statistics of a layer whose own parameters are all frozen are frozen with it: they do not move, and it
    normalises by them even where the rest of its stage trains. (Inside a user's own model that is the user's affair.)

    Raises:
      RuleError: as `tree.match`.
    """
    given = [rule for rule in rules if rule[0] not in model.stats]
    labels = match((*_stats(model), *given), params)
    if not model.stats or model.family == "foreign":
        return labels
    beside: dict[str, set[str]] = {}
    for path, label in flatten(labels).items():
        beside.setdefault(path.rpartition("/")[0], set()).add(label)
    held = {layer for layer, found in beside.items() if found == {FROZEN, STATS}}
    return map_with_path(lambda path, label: FROZEN if path.rpartition("/")[0] in held else label, labels)


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
    top = max(depth.values())  # of what all layers share
    return next((level for name, level in depth.items() if path.startswith(f"{name}/")), top)
