"""From a configuration to the source under its head with adapters on it, and what of that is whose."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxtransfer.adapt import adapters, attach, quantize, subtrees, swap_head, untie
from jaxtransfer.adapt.adapter_types import Adapter
from jaxtransfer.adapt.adapters import AdapterError
from jaxtransfer.adapt.groups import FROZEN, STATS
from jaxtransfer.adapt.quantized import Quantized, QuantizeError
from jaxtransfer.config import Config, ConfigError
from jaxtransfer.config.adapters import (
    BottleneckConfig,
    DoRAConfig,
    IA3Config,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    VeRAConfig,
)
from jaxtransfer.tasks import Task
from jaxtransfer.tree.paths import flatten
from jaxtransfer.tree.rules import RuleError, Rules
from jaxtransfer.tree.weights import is_weight
from jaxtransfer.types import Source

_LAYER = r"(?!head/)(?:\w+/)*\d+/"
_KEYS_VALUES = rf"{_LAYER}attention/(?:key|value)/kernel"
_FUSED = rf"{_LAYER}attention/qkv/kernel"
_LAST = rf"{_LAYER}mlp/down/kernel"


def begun(config: Config, trunk: Source, task: Task, seed: int) -> Source:
    """What a run of this seed starts from: the source under its head, with its adapters.

    Raises:
      ConfigError: an adapter that does not fit the source; names it.
    """
    source, steps = _steps(config, trunk, task, seed)
    return steps[-1][1] if steps else source


def headed(config: Config, trunk: Source, task: Task, key: jax.Array) -> Source:
    """The source under a fresh head, or under its own, untied where the configuration asks for it."""
    source = swap_head(trunk, task.head, key) if task.fresh_head else trunk
    if not config.adapt.untie:
        return source
    try:
        return untie(source)
    except ValueError as error:
        raise ConfigError(f"adapt.{error}", "adapt.untie") from None


def quantized(config: Config, source: Source) -> Source:
    """A source that is in memory already with what the configuration quantises packed."""
    if not config.adapt.quantize:
        return source
    try:
        return quantize(source, config.adapt.quantize)
    except (RuleError, QuantizeError) as error:
        raise quantize_error(error) from None


def quantize_error(error: ValueError) -> ConfigError:
    """A rule of ``adapt.quantize`` that does not fit the source."""
    return ConfigError(f"adapt.quantize: {error}", "adapt.quantize")


@dataclasses.dataclass(frozen=True)
class Put:
    """One entry of ``adapt.adapters`` on a source.

    Attributes:
      where: ``adapt.adapters[0]``.
      entry: its record.
      leaves: what it brought, by path.
    """

    where: str
    entry: Any
    leaves: dict[str, Any]


def puts(config: Config, trunk: Source, task: Task, seed: int) -> list[Put]:
    """What each entry of ``adapt.adapters`` has brought to `begun`'s source."""
    _, steps = _steps(config, trunk, task, seed)
    nodes = flatten(steps[-1][1].params, is_leaf=is_weight) if steps else {}
    out = []
    for i, (entry, _, paths) in enumerate(steps):
        leaves: dict[str, Any] = {}
        for path in paths:
            leaves |= _own(path, nodes[path], getattr(entry, "name", ""))
        out.append(Put(f"adapt.adapters[{i}]", entry, leaves))
    return out


def check_labels(config: Config, source: Source, found: Sequence[Put], labels: Any) -> None:
    """Of every adapter something must train, and of a quantised weight nothing can.

    Raises:
      ConfigError: it is not so.
    """
    by_path = flatten(labels)
    for put in found:
        if all(by_path[path] in (FROZEN, STATS) for path in put.leaves):
            why = "another adapter is on top of it" if config.adapt.train != "rules" else "adapt.rules freeze it"
            path = next(iter(put.leaves))
            raise ConfigError(f"{put.where}: nothing of it trains, {path} and all others are frozen: {why}", put.where)
    for path, node in flatten(source.params, is_leaf=is_weight).items():
        inner, prefix = _bottom(node, path)
        if not isinstance(inner, Quantized):
            continue
        for part, label in by_path.items():
            if part.startswith(f"{prefix}@") and label != FROZEN:
                what = f"{path} is {type(inner).__name__} and cannot train, but is labelled {label!r}"
                raise ConfigError(f"adapt.quantize: {what}; freeze it, or leave it out", "adapt.quantize")


def _steps(config: Config, trunk: Source, task: Task, seed: int) -> tuple[Source, list[tuple[Any, Source, list[str]]]]:
    """The source under its head; and each entry, the source with it and all before it, and the nodes it made."""
    key = jax.random.key(seed)
    bare = source = headed(config, trunk, task, jax.random.fold_in(key, 0))
    key, steps = jax.random.fold_in(key, 2), []
    for i, entry in enumerate(config.adapt.adapters):
        where, before = f"adapt.adapters[{i}]", flatten(source.params, is_leaf=is_weight)
        try:
            source = _put(entry, source, jax.random.fold_in(key, i))
        except (RuleError, AdapterError) as error:
            raise ConfigError(f"{where}: {entry.method}: {error}", where) from None
        after = flatten(source.params, is_leaf=is_weight)
        steps.append((entry, source, [path for path, node in after.items() if node is not before.get(path)]))
    return bare, steps


def _put(entry: Any, source: Source, key: jax.Array) -> Source:
    match entry:
        case LoRAConfig() | DoRAConfig():
            make = adapters.lora if isinstance(entry, LoRAConfig) else adapters.dora
            how = make(entry.rank, alpha=entry.alpha, dropout=entry.dropout, rank_stabilized=entry.rank_stabilized)
            return attach(source, [(_targets(entry, source), how)], key, name=entry.name)
        case VeRAConfig():
            how = adapters.vera(entry.rank, d=entry.d, dropout=entry.dropout)
            return attach(source, [(_targets(entry, source), how)], key, name=entry.name)
        case IA3Config():
            return attach(source, _scaled(entry, source), key, name=entry.name)
        case BottleneckConfig():
            rules = [(".*" if entry.targets is None else entry.targets, True)]
            return subtrees.bottleneck(
                source, rules, key, width=entry.width, activation=entry.activation, where=entry.where
            )
        case PromptConfig():
            return subtrees.prompt_tuning(source, key, length=entry.length, init=entry.init)
        case PrefixConfig():
            return subtrees.prefix_tuning(source, key, length=entry.length)
    raise TypeError(f"{type(entry).__name__} is no adapter")


def _targets(entry: Any, source: Source) -> str:
    """The pattern of the weights that an adapter goes on: what is said, or every linear kernel of the layers."""
    if entry.targets is not None:
        return entry.targets
    if not (paths := _linears(source, f"{_LAYER}.*/kernel")):
        raise AdapterError(f"a {source.model.family} has no linear kernels in layers: name the targets")
    return "|".join(map(re.escape, paths))


def _scaled(entry: IA3Config, source: Source) -> Rules:
    """What (IA)3 scales the outputs of, and the inputs of."""
    if entry.targets_output is not None or entry.targets_input is not None:
        given = ((entry.targets_output, "output"), (entry.targets_input, "input"))
        return [(pattern, adapters.ia3(on)) for pattern, on in given if pattern is not None]
    outputs = _linears(source, _KEYS_VALUES) or _linears(source, _FUSED)
    inputs = _linears(source, _LAST)
    if not outputs or not inputs:
        raise AdapterError(
            f"a {source.model.family} has no linear keys, values and last products of MLPs: name targets_output or "
            "targets_input"
        )
    rules = ((outputs, "output"), (inputs, "input"))
    return [("|".join(map(re.escape, paths)), adapters.ia3(on)) for paths, on in rules]


def _linears(source: Source, pattern: str) -> list[str]:
    """The model's own matrices under a pattern."""
    slots = tuple(f"{slot}/" for slot in subtrees.held_in(source))
    return [
        path
        for path, node in flatten(source.params, is_leaf=is_weight).items()
        if re.fullmatch(pattern, path) and len(node.shape) == 2 and not path.startswith(slots)
    ]


def _own(path: str, node: Any, name: str) -> dict[str, Any]:
    """The leaves of the adapter of a name on a weight, wherever it is among others; a plain leaf is its own."""
    if not isinstance(node, Adapter):
        return {path: node}
    if node.name != name:
        return _own(f"{path}@base", node.base, name)
    return {inner: leaf for inner, leaf in flatten_node(path, node).items() if not inner.startswith(f"{path}@base")}


def flatten_node(path: str, node: Any) -> dict[str, Any]:
    """The leaves of a node that stands at a path."""
    return {f"{path}{inner}": leaf for inner, leaf in flatten({"": node}).items()}


def _bottom(node: Any, path: str) -> tuple[Any, str]:
    """What adapters are around, and where."""
    return _bottom(node.base, f"{path}@base") if isinstance(node, Adapter) else (node, path)
