"""Optimizers: labels to `optax.multi_transform` on the trainable partition; schedules; clipping; what it will cost."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from jaxtransfer.tree.partition import combine, partition
from jaxtransfer.tree.paths import Params, flatten, map_with_path
from jaxtransfer.tree.rules import Rule, Rules, match_paths
from jaxtransfer.tree.stacks import layers_of, layout, run_of, stack, stacked_length
from jaxtransfer.tree.weights import is_packed

UNTRAINED = ("frozen", "stats")

NO_DECAY: Rules = (Rule(r".*/(bias|scale)", False, optional=True), Rule(r".*", True, optional=True))
"""The default rules of weight decay: none on biases and on the scales of norms."""


class GroupError(ValueError):
    """A label without an optimizer group, a group without a leaf, or a group's option that does not fit."""


@dataclasses.dataclass(frozen=True)
class Group:
    """How one group of parameters is trained.

    Attributes:
      optimizer: one of `OPTIMIZERS`.
      lr: peak learning rate.
      weight_decay: decoupled, in units of the learning rate (for ``sgd`` and ``lars``: L2 in the gradient).
      schedule: ``constant``, ``linear`` or ``cosine`` decay to zero, after a linear warm-up from zero.
      warmup: number of warm-up steps.
      steps: total number of steps; needed unless constant.
      momentum: of ``sgd`` and ``lars``; ``b1``, ``b2``, ``eps``: of the Adam family and ``lion`` (no ``eps``).
    """

    optimizer: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.01
    schedule: str = "constant"
    warmup: int = 0
    steps: int | None = None
    momentum: float = 0.9
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


Mask = Callable[[Any], Any]
_Make = Callable[[Group, Any, Mask], optax.GradientTransformation]

OPTIMIZERS: Mapping[str, tuple[_Make, bool]] = {
    "adamw": (lambda g, lr, m: optax.adamw(lr, g.b1, g.b2, g.eps, weight_decay=g.weight_decay, mask=m), True),
    "sgd": (
        lambda g, lr, m: optax.chain(
            optax.add_decayed_weights(g.weight_decay, m), optax.sgd(lr, momentum=g.momentum or None)
        ),
        True,
    ),
    "lion": (lambda g, lr, m: optax.lion(lr, g.b1, g.b2, weight_decay=g.weight_decay, mask=m), True),
    "adafactor": (
        # optax decays by weight_decay_rate itself, whatever the learning rate: at its usual 0.01, 1 % a step.
        lambda g, lr, m: optax.adafactor(
            lr, weight_decay_rate=lambda step: g.weight_decay * lr(step), weight_decay_mask=m
        ),
        False,
    ),
    "lamb": (lambda g, lr, m: optax.lamb(lr, g.b1, g.b2, g.eps, weight_decay=g.weight_decay, mask=m), False),
    "lars": (
        lambda g, lr, m: optax.lars(lr, weight_decay=g.weight_decay, weight_decay_mask=m, momentum=g.momentum),
        False,
    ),
    "muon": (
        lambda g, lr, m: optax.contrib.muon(
            lr, weight_decay=g.weight_decay, weight_decay_mask=m, adam_b1=g.b1, adam_b2=g.b2
        ),
        False,
    ),
}
"""Name -> (constructor, whether it is elementwise). What is not is mapped over the layers of a stack one by one."""


def schedule(group: Group) -> optax.Schedule:
    """The learning rate by step: linear warm-up from 0, then constant, linear or cosine decay to 0.

    Raises:
      GroupError: an unknown schedule, or decay without ``steps``.

    Example:
      >>> rate = schedule(Group(lr=1.0, schedule="linear", warmup=2, steps=4))
      >>> [float(rate(i)) for i in range(5)]
      [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if group.schedule not in ("constant", "linear", "cosine"):
        raise GroupError(f"schedule {group.schedule!r} is not one of constant, linear, cosine")
    rest: optax.Schedule = optax.constant_schedule(group.lr)
    if group.schedule != "constant":
        if group.steps is None or group.steps <= group.warmup:
            raise GroupError(f"a {group.schedule} schedule needs steps > warmup, got {group.steps} and {group.warmup}")
        length = group.steps - group.warmup
        rest = (
            optax.linear_schedule(group.lr, 0.0, length)
            if group.schedule == "linear"
            else optax.cosine_decay_schedule(group.lr, length)
        )
    if not group.warmup:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, group.lr, group.warmup), rest], [group.warmup])


def optimizer(
    labels: Any,
    groups: Mapping[str, Group],
    *,
    clip: float | None = None,
    no_decay: Rules = NO_DECAY,
    scales: Mapping[str, float] | None = None,
    traced: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """One transformation for the trainable partition: every label's leaves by its group's optimizer.

    The partition may be canonical or laid out; the updates are the same, stacked or per layer, for every optimizer.

    Args:
      labels: tree of labels over canonical parameters; ``frozen`` and ``stats`` are not optimized.
      groups: label -> `Group`.
      clip: the gradients' global norm over all trainable leaves is clipped to it, before anything else.
      no_decay: path -> whether weight decay applies.
      scales: canonical path -> factor on the learning rate (`groups.layerwise_decay`).
      traced: each group's rate and weight decay are part of the state, as which `sweep` lets them differ: the update of
        one serves the states of others that differ in these alone.

    Raises:
      GroupError: a label without a group, a group without leaves, an unknown optimizer, a bad schedule, or a leaf
        without a scale.
      RuleError: ``no_decay`` leaves a trainable leaf uncovered, or has a rule that matches none.
    """
    by_path = {path: label for path, label in flatten(labels).items() if label not in UNTRAINED}
    check_groups(by_path, groups)
    decays = match_paths(no_decay, list(by_path))
    if scales is not None and (lost := [path for path in by_path if path not in scales]):
        raise GroupError(f"scales have no factor for {', '.join(lost[:6])} ({len(lost)} of {len(by_path)} leaves)")

    def mask(tree: Any) -> Any:
        return map_with_path(lambda path, _: decays[layers_of(path)[0]], tree)

    def label(tree: Any) -> Any:
        return map_with_path(lambda path, _: by_path[layers_of(path)[0]], tree)

    chain: list[optax.GradientTransformation] = [] if clip is None else [_clip(clip)]
    make = _injected if traced else _transform
    chain.append(optax.multi_transform({name: make(group, mask) for name, group in groups.items()}, label))
    if scales is not None:
        chain.append(_scale_by_path(scales))
    return _lenient(optax.chain(*chain))


def _lenient(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """optax's own code counts on dtype and rank promotion; the rest of the program may forbid both."""

    def relaxed(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                return fn(*args, **kwargs)

        return call

    return optax.GradientTransformationExtraArgs(relaxed(tx.init), relaxed(optax.with_extra_args_support(tx).update))


def _clip(limit: float) -> optax.GradientTransformationExtraArgs:
    """``g * min(1, limit / |g|)``; a step that knows ``|g|`` already hands it over as ``norm``."""

    def update(updates: Any, state: Any, params: Any = None, *, norm: jax.Array | None = None, **_: Any) -> Any:
        norm = optax.tree.norm(updates) if norm is None else norm
        factor = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def check_groups(labels: Mapping[str, str], groups: Mapping[str, Group]) -> None:
    """Every label needs a group, every group a leaf, every optimizer a name that exists."""
    used = set(labels.values()) - set(UNTRAINED)
    if missing := sorted(used - set(groups)):
        example = next(path for path, label in labels.items() if label == missing[0])
        raise GroupError(
            f"label {missing[0]!r} (of {example} and others) has no optimizer group; there are {sorted(groups)}"
        )
    if idle := sorted(set(groups) - used):
        raise GroupError(f"optimizer group {idle[0]!r} has no parameters; the labels in use are {sorted(used)}")
    for name, group in groups.items():
        if group.optimizer not in OPTIMIZERS:
            raise GroupError(f"group {name!r}: optimizer {group.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")


def _transform(group: Group, mask: Mask) -> optax.GradientTransformation:
    make, elementwise = OPTIMIZERS[group.optimizer]
    tx = make(group, schedule(group), mask)
    return tx if elementwise else layer_by_layer(tx)


def _injected(group: Group, mask: Mask) -> optax.GradientTransformation:
    """As `_transform`, by a rate and a weight decay that are found in the state, where ``init`` puts the group's."""

    def make(lr: Any, weight_decay: Any) -> optax.GradientTransformation:
        return _transform(dataclasses.replace(group, lr=lr, weight_decay=weight_decay), mask)

    return optax.inject_hyperparams(make)(float(group.lr), float(group.weight_decay))


def layer_by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Maps an optimizer that is not elementwise over the layers of each stack, as if they were not stacked.

    Its state is ``{run: state}``, with ``""`` for leaves outside stacks.
    """

    def part(tree: Any, run: str) -> Any:
        return map_with_path(lambda path, leaf: leaf if _run(path) == run else None, tree)

    def over(run: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(fn) if run else fn

    def runs(tree: Any) -> list[str]:
        return list(dict.fromkeys(_run(path) for path in flatten(tree)))

    def init(params: Any) -> Any:
        return {run: over(run, tx.init)(part(params, run)) for run in runs(params)}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        merged, states = None, {}
        for run in runs(updates):
            new, states[run] = over(run, tx.update)(part(updates, run), state[run], part(params, run))
            merged = new if merged is None else combine(merged, new)
        return (updates if merged is None else merged), states

    return optax.GradientTransformation(init, update)


def _run(path: str) -> str:
    parts = path.split("/")
    ends = [i for i, part in enumerate(parts) if run_of(part)]
    return "/".join(parts[: ends[0] + 1]) if ends else ""


def _scale_by_path(scales: Mapping[str, float]) -> optax.GradientTransformation:
    def scale(path: str, update: jax.Array) -> jax.Array:
        factors = np.asarray([scales[layer] for layer in layers_of(path)], update.dtype)
        stacked = stacked_length(path) is not None
        return update * (factors.reshape(-1, *[1] * (update.ndim - 1)) if stacked else factors[0])

    return optax.stateless(lambda updates, params: map_with_path(scale, updates))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of `explain`: a group, what is in it, how it is trained, what it costs in bytes."""

    group: str
    leaves: int
    parameters: int
    bytes: int
    dtype: str
    lr: float | None
    optimizer: str | None
    optimizer_bytes: int


def explain(params: Params, labels: Any, groups: Mapping[str, Group]) -> list[Row]:
    """What trains and what it costs, before anything is compiled: a row a label, trained ones first.

    The parameters of a quantised weight are those of the matrix that it stands for, its bytes those that it takes.

    Args:
      params: canonical parameters, concrete or abstract.
      labels: the tree of labels.
      groups: label -> `Group`.

    Raises:
      GroupError: as `optimizer`.
    """
    flat, by_path = flatten(params), flatten(labels)
    check_groups(by_path, groups)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, master(leaf.dtype)), params)
    laid = stack(abstract, layout(params, labels))
    stood_for = _stood_for(params)
    rows = []
    for name in [*groups, *(label for label in UNTRAINED if label in set(by_path.values()))]:
        leaves = {path: leaf for path, leaf in flat.items() if by_path[path] == name}
        group = groups.get(name)
        state: Any = ()
        if group is not None:
            own, _ = partition(laid, lambda path, name=name: by_path[layers_of(path)[0]] == name)
            tx = _lenient(_transform(group, lambda tree: jax.tree.map(lambda _: True, tree)))
            state = jax.eval_shape(tx.init, own)
        rows.append(
            Row(
                group=name,
                leaves=len(leaves),
                parameters=sum(stood_for[path] for path in leaves),
                bytes=sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves.values()),
                dtype="/".join(sorted({str(leaf.dtype) for leaf in leaves.values()})),
                lr=None if group is None else group.lr,
                optimizer=None if group is None else group.optimizer,
                optimizer_bytes=sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)),
            )
        )
    return rows


def _stood_for(params: Params) -> dict[str, int]:
    """Path of an array -> how many numbers of the model it is; a quantised weight's are counted at one of its parts."""
    found = {path: int(np.prod(leaf.shape)) for path, leaf in flatten(params).items()}
    for path, node in flatten(params, is_leaf=is_packed).items():
        if is_packed(node):
            parts = [f"{path}@{field.name}" for field in dataclasses.fields(node) if f"{path}@{field.name}" in found]
            found |= {**dict.fromkeys(parts, 0), parts[0]: int(np.prod(node.shape))}
    return found


def master(dtype: Any) -> Any:
    """The dtype in which a trainable leaf is kept: float32 at least."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.float32 if narrow else dtype
