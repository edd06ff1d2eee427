"""From a configuration to what trains, and how fast."""

import dataclasses
from typing import Any

from jaxtransfer.adapt import groups
from jaxtransfer.config import Config, ConfigError, GroupConfig
from jaxtransfer.optim import Group, GroupError, master
from jaxtransfer.phases import apart
from jaxtransfer.step import bare
from jaxtransfer.tree.paths import Params, flatten, map_with_path
from jaxtransfer.tree.rules import Rule, Rules, as_rules
from jaxtransfer.types import AUX, Model

GROUPS = ("head", "trunk", "adapter", "adapter_b", "aux")
LORA_PLUS = 16
"""The rate of LoRA's b over that of a, where the configuration gives it none of its own (arXiv:2402.12354)."""
BESIDE = 10
"""The rate of what trains beside the model over that of all: a discriminator starts from nothing (arXiv:1505.07818)."""
UNTIE = "; adapt.untie: true does the former"


def recipe(config: Config, model: Model) -> Rules:
    """Which rules say what trains."""
    adapt = config.adapt
    if adapt.train == "rules":
        return adapt.rules
    plain = {
        "full": groups.full, "adapters": groups.adapters, "lora_plus": groups.lora_plus, "biases": groups.biases,
        "norms": groups.norms,
    }  # fmt: skip
    if adapt.train in plain:
        return plain[adapt.train](model)
    field = f"adapt.{'last' if adapt.train == 'last' else 'train'}"
    try:
        return groups.last(model, adapt.last or 0) if adapt.train == "last" else groups.head_only(model)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}{UNTIE if 'untie' in str(error) else ''}", field) from None


def labels_of(config: Config, model: Model, params: Params, *, thaw: bool = False) -> Any:
    """What trains, label by label, of the model and of what trains beside it; with ``thaw`` nothing is frozen."""
    rules = [*([Rule(f"{AUX}/.*", AUX)] if AUX in params else []), *recipe(config, model)]
    return groups.labels_of(model, thawed(rules) if thaw else rules, params)


def by_age(config: Config, model: Model, params: Params, labels: Any) -> tuple[Any, dict[str, str]]:
    """The labels of a run behind phases, whose groups hold what began to train together: see `phases.apart`."""
    *_, last = config.phasing()
    before = labels_of(last, model, bare(params))
    return apart(labels, by_age(last, model, params, before)[0] if last.phases else before)


def mastered(config: Config, model: Model, params: Params) -> Params:
    """Parameters, those that train in a phase in the dtype that training leaves them in."""
    if not config.phases:
        return params
    trained = {
        path
        for each in config.phasing()
        for path, label in flatten(labels_of(each, model, bare(params))).items()
        if label != groups.FROZEN
    }
    return map_with_path(lambda path, x: x.astype(master(x.dtype)) if path in trained else x, params)


def thawed(rules: Rules) -> Rules:
    """The same rules with nothing frozen: what was trains as group ``trunk``."""
    return [
        Rule(rule.pattern, "trunk" if rule.value == groups.FROZEN else rule.value, True) for rule in as_rules(rules)
    ]


def unread_rate(config: Config, labels: Any, steps: int) -> str | None:
    """Whose rates of their own leave ``optimizer.lr`` without a reader; None where something reads it."""
    if config.study is not None or config.pretrain is not None or config.phases:  # where more may train than here
        return None
    other = dataclasses.replace(config.optimizer, lr=2 * config.optimizer.lr)
    found = optimizer_groups(config, labels, steps)
    if found != optimizer_groups(dataclasses.replace(config, optimizer=other), labels, steps):
        return None
    return ", ".join(f"optimizer.groups.{name}.lr is {group.lr:g}" for name, group in found.items())


def optimizer_groups(config: Config, labels: Any, steps: int, *, control: bool = False) -> dict[str, Group]:
    """Label -> `Group`: the settings of all, and what a group has of its own.

    The recipes' labels need no entry in the configuration; any other does, or a slip such as ``frozn`` would train. Of
    the entries the control from scratch reads those that it has: no ``adapter``, but a ``trunk`` where a run has none.
    """
    used = set(flatten(labels).values())
    if used <= {groups.FROZEN, groups.STATS}:
        raise GroupError("adapt: nothing trains, every parameter is frozen")
    given = {*config.optimizer.groups}
    if control:
        given &= used
    elif config.study is not None and groups.FROZEN in used:
        given -= {"trunk"} - used
    out = {}
    for label in sorted({*given, *(used & set(GROUPS))}):
        fields = dataclasses.asdict(config.optimizer.group(label)).items()
        own = {name: value for name, value in fields if value is not None}
        if label == "adapter_b" and config.optimizer.groups.get(label, GroupConfig()).lr is None:
            own["lr"] = LORA_PLUS * (config.optimizer.group("adapter").lr or config.optimizer.lr)
        if label == "aux" and config.optimizer.groups.get(label, GroupConfig()).lr is None:
            own["lr"] = BESIDE * config.optimizer.lr
        warmup = int(own.pop("warmup") * steps)
        out[label] = Group(own.pop("name"), warmup=warmup, steps=steps, **own)
    return out
