"""Stages of NNX modules: the only place where these are split and merged.

Parameters are bound by name, with every shape checked: ``nnx.merge`` alone binds by sorted position.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxtransfer.models import slots as slot
from jaxtransfer.tree.diff import TreeError
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import Carry, Stage


def stages_of(
    names: Sequence[str],
    module: Callable[[nnx.Rngs], nnx.Module],
    call: Callable[..., Carry],
    *,
    writes: tuple[str, ...] = ("hidden",),
    reads: tuple[str, ...] = (),
    constants: Mapping[str, Sequence[Any]] | None = None,
    slots: Mapping[str, Mapping[str, int]] | None = None,
) -> tuple[Stage, ...]:
    """Like stages, one for each name, from an NNX module and how to call it.

    Args:
      names: the stages' names.
      module: ``module(rngs)`` builds the module.
      call: ``call(module, carry, key, *reads) -> written entries``.
      constants: name -> one number for each stage, which ``call`` finds in the carry.
      slots: what subtrees may stand among the parameters, which ``call`` finds in the carry: see `models.slots`.
    """
    places = slots or {}
    graph, abstract = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))))

    def fn(params: Params, carry: Carry, key: jax.Array | None, *read: Any) -> Carry:
        own, held = slot.taken(params, places)
        return call(bind(graph, abstract, own), {**carry, slot.HELD: held}, key, *read)

    @jax.jit
    def fresh(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.split(module(nnx.Rngs(key)))[1])

    own = [{name: numbers[i] for name, numbers in (constants or {}).items()} for i in range(len(names))]
    return tuple(Stage(name, fn, fresh, writes, reads, has, places) for name, has in zip(names, own, strict=True))


def bind(graph: Any, abstract: Any, params: Params) -> Any:
    """The NNX module with ``params`` in place: by name, with every shape checked.

    Raises:
      TreeError: missing, extra or misshapen parameters, all listed.
    """
    flat = {"/".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(abstract)}
    given = _leaves(params)
    wrong = [f"missing {name}" for name in flat if name not in given]
    wrong += [f"extra {name}" for name in given if name not in flat]
    wrong += [
        f"{name}: expected shape {tuple(flat[name][1].get_value().shape)}, found {tuple(np.shape(given[name]))}"
        for name in flat
        if name in given and tuple(flat[name][1].get_value().shape) != tuple(np.shape(given[name]))
    ]
    if wrong:
        raise TreeError("parameters do not fit the stage: " + "; ".join(wrong))
    state = nnx.from_flat_state([(path, variable.replace(given[name])) for name, (path, variable) in flat.items()])
    return nnx.merge(graph, state)


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, Mapping):
        return {k: v for key, child in node.items() for k, v in _leaves(child, f"{prefix}{key}/").items()}
    return {prefix[:-1]: node}
