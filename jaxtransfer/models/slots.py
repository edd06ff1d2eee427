"""Slots: what a stage may hold beside its own parameters, as a subtree: bottlenecks, a prompt, a prefix.

A stage declares its slots. What stands in one reaches the module in the carry, under `HELD`, and the graph follows the
tree's structure: without the subtree the program is the model's own.

* ``blocks/3/adapter/mlp/gelu/{down,up}/{kernel,bias}``: a bottleneck behind the MLP, the activation part of the path.
* ``embed/prompt/embedding``: (P, d), what stands before the first token.
* ``blocks/3/prefix/{key,value}``: (P, n), what every position attends to besides.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.models.layers import ACTIVATIONS
from jaxtransfer.tree import weights
from jaxtransfer.tree.diff import TreeError
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import Carry

HELD, PROMPTED = "slots", "prompted"
"""Entries of the carry: what stands in a stage's slots, and the activations of the prompt, (B, P, d)."""


def taken(params: Params, slots: Mapping[str, Mapping[str, int]]) -> tuple[Params, Params]:
    """A stage's own parameters, and what stands in its slots.

    Raises:
      TreeError: something stands in a slot where it has no place.
    """
    held = {name: params[name] for name in slots if name in params}
    for name, node in held.items():
        if odd := sorted(set(node) - set(slots[name])):
            raise TreeError(f"{name}/{odd[0]} has no place in the stage, whose slot {name} takes {[*slots[name]]}")
    return {name: node for name, node in params.items() if name not in held}, held


def _held(carry: Carry, slot: str) -> Any:
    return carry.get(HELD, {}).get(slot)


def adapted(y: jax.Array, carry: Carry, place: str) -> jax.Array:
    """``y + up(activation(down(y)))`` where a bottleneck stands at ``place``, else ``y`` (arXiv:1902.00751)."""
    node = (_held(carry, "adapter") or {}).get(place)
    if node is None:
        return y
    if len(node) != 1 or next(iter(node)) not in ACTIVATIONS:
        raise TreeError(f"adapter/{place}: expected one of the activations {[*ACTIVATIONS]}, found {[*node]}")
    ((activation, part),) = node.items()
    low = ACTIVATIONS[activation](weights.linear(y, part["down"]["kernel"], part["down"]["bias"]))
    return y + weights.linear(low, part["up"]["kernel"], part["up"]["bias"])


def prompt_length(carry: Carry) -> int:
    """P: by how many positions a prompt moves the tokens; 0 without one."""
    prompt = _held(carry, "prompt")
    return 0 if prompt is None else prompt["embedding"].shape[0]


def lead(carry: Carry) -> int:
    """How many positions this call puts before its tokens: P, or 0 where the cache holds the prompt already.

    Raises:
      ValueError: the cache holds a prompt, and the parameters have none.
    """
    length, cached = prompt_length(carry), "prompt" in (carry.get("cache") or {})
    if cached and not length:
        raise ValueError("cache: it holds a prompt, but the parameters have none; start from an empty cache")
    return 0 if cached else length


def prompted(x: jax.Array, carry: Carry) -> jax.Array:
    """The prompt before embedded tokens, where it is to stand: (B, T, d) -> (B, P + T, d)."""
    if not lead(carry):
        return x
    prompt = weights.materialize(_held(carry, "prompt")["embedding"]).astype(x.dtype)
    return jnp.concatenate([jnp.broadcast_to(prompt[None], (len(x), *prompt.shape)), x], axis=1)


def parted(x: jax.Array, count: int) -> Carry:
    """Activations (B, P + T, d) as entries of the carry: those of the T tokens, and of what stands before them."""
    length = x.shape[1] - count
    return {"hidden": x[:, length:], PROMPTED: x[:, :length]} if length else {"hidden": x}


def with_prompt(call: Callable[..., Carry]) -> Callable[..., Carry]:
    """A block's call that runs over prompt and tokens together; outside of blocks ``hidden`` is the tokens' alone."""

    def run(module: Any, carry: Carry, key: jax.Array | None) -> Carry:
        if PROMPTED not in carry:
            return call(module, carry, key)
        prompt, mask = carry[PROMPTED], carry["mask"]
        if mask.ndim == 2:
            mask = _opened(mask, prompt.shape[1])
        whole = jnp.concatenate([prompt, carry["hidden"]], axis=1)
        written = call(module, {**carry, "hidden": whole, "mask": mask}, key)
        return {**written, **parted(written["hidden"], carry["hidden"].shape[1])}

    return run


def first(carry: Carry) -> jax.Array:
    """The first position of all, (B, d): the first token, or the prompt's first, as in PEFT."""
    return carry.get(PROMPTED, carry["hidden"])[:, 0]


def prefixed(carry: Carry, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values (B, S, n) behind the layer's prefix, and the mask, (B, S) or (B, T, S), that opens it to all."""
    prefix = _held(carry, "prefix")
    if prefix is None:
        return k, v, mask

    def behind(name: str, x: jax.Array) -> jax.Array:
        own = weights.materialize(prefix[name]).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(own[None], (len(x), *own.shape)), x], axis=1)

    return behind("key", k), behind("value", v), _opened(mask, prefix["key"].shape[0])


def _opened(mask: jax.Array, count: int) -> jax.Array:
    """A mask over ``count`` further places before its own, all of them open."""
    return jnp.concatenate([jnp.ones((*mask.shape[:-1], count), bool), mask.astype(bool)], axis=-1)
