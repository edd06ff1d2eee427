"""`quantize`: the leaves that rules choose as quantised weights, one by one, and what they will be before they are."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.adapt.adapter_types import Adapter
from jaxtransfer.adapt.quantized_types import BLOCK
from jaxtransfer.adapt.quantized_types import NF4 as NF4
from jaxtransfer.adapt.quantized_types import NF4_LEVELS as NF4_LEVELS
from jaxtransfer.adapt.quantized_types import Int8 as Int8
from jaxtransfer.adapt.quantized_types import Quantized as Quantized
from jaxtransfer.adapt.quantized_types import int8 as int8
from jaxtransfer.adapt.quantized_types import nf4 as nf4
from jaxtransfer.tree import fingerprint
from jaxtransfer.tree.paths import Params, flatten, unflatten
from jaxtransfer.tree.rules import Rules, match_paths
from jaxtransfer.tree.weights import is_weight
from jaxtransfer.types import Source


class QuantizeError(ValueError):
    """A leaf that cannot be quantised as asked."""


METHODS: Mapping[str, Callable[..., Quantized]] = {"int8": int8, "nf4": nf4}
"""Quantisations by name."""


def quantize(source: Source, rules: Rules) -> Source:
    """Quantises the leaves that rules choose, one after the other; `load` does so while it reads.

    Args:
      source: of plain parameters.
      rules: path -> ``"int8"``, ``"nf4"`` or None.

    Raises:
      RuleError: a rule matches nothing or never wins.
      QuantizeError: a leaf cannot take its method, is quantised already, or the method is unknown.
    """
    flat = flatten(source.params, is_leaf=is_weight)
    known = dict(source.lineage.fingerprints)
    chosen = methods_of(rules, flat)
    for path, method in chosen.items():
        original = fingerprint({path: flat[path]})[path] == known.get(path)
        flat[path] = quantized(path, flat[path], method)
        if original:  # what the source's own leaf is packed to, the source stands for
            known |= fingerprint({path: flat[path]})
    operations = (*source.lineage.operations, note(chosen))
    lineage = dataclasses.replace(source.lineage, operations=operations, fingerprints=known)
    return dataclasses.replace(source, params=unflatten(flat), lineage=lineage)


def note(methods: Mapping[str, str]) -> str:
    """The line of a lineage's operations that tells of quantised leaves."""
    return f"quantize({len(methods)} leaves: {', '.join(sorted(set(methods.values())))})"


def packed(params: Params) -> dict[str, Quantized]:
    """The packed weights of a tree, by path, whatever adapters are around them."""
    found = {}
    for path, node in flatten(params, is_leaf=is_weight).items():
        while isinstance(node, Adapter):
            node = node.base
        if isinstance(node, Quantized):
            found[path] = node
    return found


def methods_of(rules: Rules, leaves: Mapping[str, Any]) -> dict[str, str]:
    """The method of every leaf, by path, that rules choose one for; each is checked before any leaf is quantised.

    Args:
      rules: path -> ``"int8"``, ``"nf4"`` or None.
      leaves: path -> array, abstract array or leaf type.

    Raises:
      RuleError, QuantizeError: as `quantize`.
    """
    found = {path: how for path, how in match_paths(rules, list(leaves), default=None).items() if how is not None}
    for path, method in found.items():
        check(path, leaves[path], method)
    return found


def quantized(path: str, weight: Any, method: str, *, stands_for: str | None = None, where: Any = None) -> Quantized:
    """One weight, quantised where it lies, in one program that holds no copy of it in float32.

    Args:
      path: for messages.
      weight: a float array, sharded or not.
      method: ``"int8"`` or ``"nf4"``.
      stands_for: the name of the dtype that the packed weight is to have; None is the weight's own.
      where: the leaf type with shardings for parts; None leaves that to the compiler.

    Raises:
      QuantizeError: as `quantize`.
    """
    check(path, weight, method)
    return _program(method, stands_for, where)(weight)


def abstract(path: str, leaf: jax.ShapeDtypeStruct, method: str) -> Quantized:
    """What `quantized` makes of a leaf, as shapes and dtypes.

    Example:
      >>> abstract("kernel", jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16), "nf4").codes.shape
      (2048, 1024)
    """
    check(path, leaf, method)
    return jax.eval_shape(METHODS[method], leaf)


@functools.cache
def _program(method: str, stands_for: str | None, where: Any) -> Callable[[jax.Array], Quantized]:
    return jax.jit(functools.partial(METHODS[method], stands_for=stands_for), out_shardings=where)


def check(path: str, weight: Any, method: str) -> None:
    """Raises :class:`QuantizeError` for a weight that a method does not take; a shape and a dtype are enough."""
    if not isinstance(method, str) or method not in METHODS:
        raise QuantizeError(f"quantize: {method!r} is not one of {', '.join(METHODS)}")
    if is_weight(weight):
        raise QuantizeError(f"{path}: is a {type(weight).__name__} already; quantise before adapters are attached")
    shape, table = tuple(weight.shape), path.endswith("/embedding")
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise QuantizeError(f"{path}: is {weight.dtype}, which is no float to quantise")
    if method == "int8" and len(shape) < 2:
        raise QuantizeError(f"{path}: int8 takes kernels and embeddings, got shape {shape}")
    if method == "nf4" and (len(shape) != 2 or shape[0] % BLOCK or table):
        raise QuantizeError(
            f"{path}: NF4 takes matrices (in, out) with a multiple of {BLOCK} inputs, got {shape}"
            f"{' of an embedding' if table else ''}; use int8, or leave it out of the rule"
        )
