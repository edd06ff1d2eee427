"""What a user's module is reduced to, whichever library it is written in: leaves by path and a pure call over them."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, linen, nnx

from jaxtransfer.tree.stacks import run_of


class ForeignError(ValueError):
    """A user's own model that cannot join as it is; the message says where and what to do."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One stage's module.

    Attributes:
      leaves: its parameters and running statistics by path.
      call: ``call(values by path, inputs, key) -> (y, new running statistics by path)``; a key means training.
      same: two parts with equal ``same()`` and like leaves compute the same function.
      stats: the paths of running statistics.
    """

    leaves: Mapping[str, Any]
    call: Callable[[Mapping[str, Any], Sequence[Any], jax.Array | None], tuple[Any, Mapping[str, Any]]]
    same: Callable[[], Any]
    stats: tuple[str, ...] = ()


def nnx_part(where: str, module: nnx.Module) -> Part:
    """``Param`` and ``BatchStat`` variables are leaves, random streams are reseeded, other variables are constants."""
    if not isinstance(module, nnx.Module):
        raise ForeignError(f"stage {where}: expected an nnx.Module, found {type(module).__name__}")
    graph, state = nnx.split(module)
    items = nnx.to_flat_state(state)
    values = named(where, ((path, variable.get_value()) for path, variable in items))
    # Without values: the call must not keep the user's arrays alive.
    table = {name: (path, v.replace(None)) for name, (path, v) in zip(values, items, strict=True)}
    leaves = {name: values[name] for name, (_, v) in table.items() if isinstance(v, (nnx.Param, nnx.BatchStat))}
    check_arrays(where, leaves)
    keys = {name: values[name].shape for name, (_, v) in table.items() if isinstance(v, nnx.RngKey)}
    counts = {name: jnp.zeros_like(values[name]) for name, (_, v) in table.items() if isinstance(v, nnx.RngCount)}
    constants = {name: x for name, x in values.items() if name not in {*leaves, *keys, *counts}}
    stats = tuple(name for name in leaves if isinstance(table[name][1], nnx.BatchStat))
    fixed = tuple(name for name in (*leaves, *constants) if name not in stats)

    def call(values: Mapping[str, Any], inputs: Sequence[Any], key: jax.Array | None) -> Any:
        root = jax.random.key(0) if key is None else key
        streams = {name: _stream(root, i, shape) for i, (name, shape) in enumerate(keys.items())}
        given = {**values, **constants, **counts, **streams}
        # Bound under the variables' own paths: nnx.merge alone goes by sorted position.
        bound = nnx.from_flat_state([(path, v.replace(given[name])) for name, (path, v) in table.items()])
        live = nnx.merge(graph, bound)
        live.eval() if key is None else live.train()
        y = live(*inputs)
        after = named(where, ((path, v.get_value()) for path, v in nnx.to_flat_state(nnx.state(live))))
        for name in fixed:
            if after[name] is not given[name]:
                kind = type(table[name][1]).__name__
                raise ForeignError(f"stage {where}: its call changes {name}, a {kind}; only a BatchStat can move")
        return y, {name: after[name] for name in stats}

    return Part(leaves, call, lambda: (graph, _by_value(constants)), stats)


def _stream(key: jax.Array, index: int, shape: tuple[int, ...]) -> jax.Array:
    key = jax.random.fold_in(key, index)
    return jax.random.split(key, shape) if shape else key


def linen_part(
    where: str, module: linen.Module, variables: Any, train: str | None, evaluate: str | None, rngs: Sequence[str]
) -> Part:
    """``params`` and ``batch_stats`` are leaves, other collections are constants; the flags are set where taken."""
    if not isinstance(module, linen.Module) or not isinstance(variables, Mapping) or "params" not in variables:
        raise ForeignError(f"stage {where}: expected a linen.Module and its variables, {{'params': ...}}")
    constants = linen.meta.unbox(core.unfreeze(dict(variables)))
    tracked = {name: constants.pop(name) for name in ("params", "batch_stats") if name in constants}
    leaves, rebuild = _flat(where, tracked, skip=1)
    stats = tuple(_flat(where, tracked.get("batch_stats", {}))[0])
    taken, apply = parameters_of(type(module).__call__), cast(Any, module.apply)

    def call(values: Mapping[str, Any], inputs: Sequence[Any], key: jax.Array | None) -> Any:
        flags = {flag: on for flag, on in ((train, key is not None), (evaluate, key is None)) if flag in taken}
        bound = {**constants, **rebuild(values)}
        if key is None:
            return apply(bound, *inputs, **flags), {}
        streams = {name: jax.random.fold_in(key, i) for i, name in enumerate(rngs)}
        y, new = apply(bound, *inputs, **flags, rngs=streams, mutable=["batch_stats"])
        return y, _flat(where, new.get("batch_stats", {}))[0]

    return Part(leaves, call, lambda: (module, _by_value(constants)), stats)


def equinox_part(eqx: Any, where: str, module: Any, vmap: bool) -> Part:
    """Floating-point arrays are leaves, everything else is constant; ``vmap``: the module acts on one example."""

    def is_state(x: Any) -> bool:
        return isinstance(x, eqx.nn.StateIndex)

    for path, leaf in jax.tree_util.tree_leaves_with_path(module, is_leaf=is_state):
        if is_state(leaf):
            at = jax.tree_util.keystr(path)
            raise ForeignError(f"stage {where}: {at} keeps eqx.nn.State, as BatchNorm does; use GroupNorm or LayerNorm")
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    leaves, rebuild = _flat(where, arrays)
    keyed = "key" in parameters_of(module)

    def call(values: Mapping[str, Any], inputs: Sequence[Any], key: jax.Array | None) -> Any:
        live = eqx.nn.inference_mode(eqx.combine(rebuild(values), static), value=key is None)

        def one(key: jax.Array | None, *xs: Any) -> Any:
            return live(*xs, key=key) if keyed else live(*xs)

        if not vmap:
            return one(key, *inputs), {}
        keys = None if key is None else jax.random.split(key, len(inputs[0]))
        return jax.vmap(one)(keys, *inputs), {}

    return Part(leaves, call, lambda: _by_value(static))


def function_part(where: str, fn: Callable[..., Any], params: Any) -> Part:
    """The leaves of a pytree; ``fn(params, x)``, with ``key=`` where it takes one."""
    leaves, rebuild = _flat(where, params)
    keyed = "key" in parameters_of(fn)

    def call(values: Mapping[str, Any], inputs: Sequence[Any], key: jax.Array | None) -> Any:
        return fn(rebuild(values), *inputs, **({"key": key} if keyed else {})), {}

    return Part(leaves, call, lambda: (fn, jax.tree.structure(params)))


def parameters_of(fn: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's parameters."""
    return tuple(inspect.signature(fn).parameters)


def _flat(where: str, tree: Any, *, skip: int = 0) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """The leaves of a pytree by name, less the first ``skip`` parts of their paths, and how to rebuild it from them."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = named(where, (([_text(part) for part in path[skip:]], leaf) for path, leaf in found))
    check_arrays(where, leaves)
    names = tuple(leaves)
    return leaves, lambda values: jax.tree.unflatten(treedef, [values[name] for name in names])


def _text(part: Any) -> str:
    return str(next(getattr(part, field) for field in ("key", "name", "idx") if hasattr(part, field)))


def named(where: str, items: Iterable[tuple[Iterable[Any], Any]]) -> dict[str, Any]:
    """Values by path, in order. An index joins the name before it: ``layers[0].weight`` is ``layers_0/weight``.

    With numbers as keys, a list inside a stage would look like a list of stages, and the scanned layout would stack it.

    Raises:
      ForeignError: a name that a path cannot hold, or two values of one name.

    Example:
      >>> named("body", [(("layers", 0, "weight"), 1.0), (("layers", 1, "weight"), 2.0)])
      {'layers_0/weight': 1.0, 'layers_1/weight': 2.0}
    """
    out: dict[str, Any] = {}
    for parts, value in items:
        names: list[str] = []
        whole = "/".join(map(str, parts))
        for text in whole.split("/"):
            if not text or "@" in text or run_of(text):
                raise ForeignError(f"stage {where}: a parameter at {whole!r} needs another name than {text!r}")
            if text.isdigit():
                names[-1:] = [f"{names[-1] if names else ''}_{text}"]
            else:
                names.append(text)
        path = "/".join(names)
        if path in out:
            raise ForeignError(f"stage {where}: two parameters would be called {path}; rename one of them")
        out[path] = value
    return out


def check_arrays(where: str, leaves: Mapping[str, Any]) -> None:
    """Raises `ForeignError` for a leaf that is no array."""
    for path, leaf in leaves.items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ForeignError(f"stage {where}: {path} is a {type(leaf).__name__}, expected an array")


def _by_value(tree: Any) -> Any:
    """Constants in a form that compares by value."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.dtype, x.shape, np.asarray(x).tobytes()) if hasattr(x, "dtype") else x for x in leaves]
