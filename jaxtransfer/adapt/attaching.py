"""`attach`, `merge`, `unmerge`: adapters put on the leaves that rules choose, and taken off again."""

import dataclasses
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt.adapter_types import NAME, Adapter
from jaxtransfer.adapt.adapters import AdapterError as AdapterError
from jaxtransfer.adapt.adapters import Make as Make
from jaxtransfer.adapt.adapters import dora as dora
from jaxtransfer.adapt.adapters import ia3 as ia3
from jaxtransfer.adapt.adapters import lora as lora
from jaxtransfer.adapt.adapters import vera as vera
from jaxtransfer.adapt.pooling import pool as pool
from jaxtransfer.adapt.pooling import select as select
from jaxtransfer.adapt.quantized import Quantized
from jaxtransfer.adapt.vera import VeRA, draw
from jaxtransfer.models.encoder import bias_path
from jaxtransfer.tree import fingerprint, weights
from jaxtransfer.tree.paths import Params, flatten, unflatten, weight_path
from jaxtransfer.tree.rules import Rules, as_rules, match_paths, winning_rules
from jaxtransfer.tree.weights import SHARED, Weight, is_weight
from jaxtransfer.types import Lineage, Source


def attach(source: Source, rules: Rules, key: jax.Array, *, name: str = NAME) -> Source:
    """Puts adapters on the leaves that rules choose. The function is unchanged; the inverse is `merge`.

    Args:
      source: its parameters are shared, not copied; they may hold adapters or quantised weights already.
      rules: path of a weight -> `lora`, `dora`, `ia3`, `vera`, or None; leaves without a rule stay as they are.
      key: draws the adapters; each leaf's depends on the key and its own path alone.
      name: of these adapters, to tell them from others on the same weights.

    Raises:
      RuleError: a rule matches nothing, or never wins.
      AdapterError: no leaf is chosen, one cannot take its adapter, or has one of that name.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtransfer.types import Lineage, Model
      >>> source = Source(Model("foreign", None, (), {}), {"out": {"kernel": jnp.ones((4, 3))}}, Lineage("memory", ""))
      >>> attach(source, [("out/kernel", lora(2))], jax.random.key(0)).params["out"]["kernel"].a.shape
      (4, 2)
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise AdapterError(f"attach: an adapter's name is letters, digits, '_' and '-', got {name!r}")
    flat = flatten(source.params, is_leaf=is_weight)
    makes: Mapping[str, Make | None] = match_paths(rules, list(flat), default=None)
    chosen = {path: make for path, make in makes.items() if make is not None}
    if not chosen:
        raise AdapterError("attach: the rules choose no leaf; give one a maker, such as ('.*/query/kernel', lora(8))")
    flat |= _made(flat, source.params.get(SHARED, {}), rules, chosen, key, name)
    note = f"attach({name!r}: {len(chosen)} leaves, {', '.join(sorted({type(flat[p]).__name__ for p in chosen}))})"
    drawn = _drawn(flat, [node for path in chosen if isinstance(node := flat[path], VeRA)], key)
    note += f", key {jax.random.key_data(key).tolist()}" if drawn else ""
    flat |= drawn
    # Drawn again from the key they are the same: a checkpoint need not hold them.
    known = {**source.lineage.fingerprints, **deeper(source.lineage, chosen), **fingerprint(drawn)}
    lineage = dataclasses.replace(source.lineage, fingerprints=known)
    return _changed(dataclasses.replace(source, lineage=lineage), unflatten(flat), note)


def _made(
    flat: Mapping[str, Any], shared: Params, rules: Rules, chosen: Mapping[str, Make], key: jax.Array, name: str
) -> dict[str, Adapter]:
    """An adapter around each chosen weight.

    Raises:
      AdapterError: some cannot have theirs: the first of them, how many there are, and the rule that chose it.
    """
    made, failed = {}, {}
    for path, make in chosen.items():
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        try:
            if name in names_of(flat[path]):
                raise AdapterError(
                    f"{path}: has an adapter called {name!r} already; merge it, or attach under another name"
                )
            adapter: Any = make(path, weights.with_shared(flat[path], shared), own, name)  # DoRA measures its base
            made[path] = dataclasses.replace(adapter, base=flat[path])
        except AdapterError as error:
            failed[path] = error
    if failed:
        first, error = next(iter(failed.items()))
        rule = as_rules(rules)[winning_rules(rules, [first])[first] or 0].pattern
        more = f", as {len(failed) - 1} more" if len(failed) > 1 else ""
        raise AdapterError(f"{error} (chosen by rule {_short(rule)!r}{more})")
    return made


def deeper(lineage: Lineage, chosen: Collection[str]) -> dict[str, str]:
    """The fingerprints of adapted weights where they lie now: one step deeper, and the source's as they were."""
    return {
        f"{weight}@base{path.removeprefix(weight)}": value
        for path, value in lineage.fingerprints.items()
        if (weight := weight_path(path)) in chosen
    }


def _drawn(flat: Mapping[str, Any], nodes: list[VeRA], key: jax.Array) -> Params:
    """The matrices that new VeRA adapters share."""
    if not nodes:
        return {}
    if f"{SHARED}/{nodes[0].shares}/a" in flat:
        raise AdapterError(f"vera: there is one called {nodes[0].name!r} already; attach under another name")
    try:
        return draw(nodes, key)
    except ValueError as error:
        raise AdapterError(str(error)) from None


def names_of(weight: Any) -> tuple[str, ...]:
    """The names of the adapters on a weight, the outermost first."""
    return (weight.name, *names_of(weight.base)) if isinstance(weight, Adapter) else ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Merged(Weight):
    """A merged weight that remembers what it was made of: `unmerge` gives that back, bit for bit."""

    value: Any
    kept: Any
    bias: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        """That of the weight."""
        return self.value.dtype

    def materialize(self) -> jax.Array:
        """The merged weight."""
        return self.value

    def specs(self, axes: Sequence[Any]) -> Mapping[str, P]:
        """The merged weight is split as the weight is; what is kept as its own types say."""
        return {"value": P(*axes), "kept": P(*axes), "bias": P(axes[-1])}


def merge(source: Source, *, keep: bool = False, dequantize: bool = False) -> Source:
    """Folds adapters into their bases: one array a weight, as `export` wants it.

    Args:
      source: with adapters on it.
      keep: keeps the parts beside what they make, for `unmerge`: subtracting again would not be exact. Without it what
        an earlier merge kept is dropped as well.
      dequantize: consent to the loss of a quantised base's small size (and to its rounding staying in).

    Raises:
      AdapterError: there is nothing to merge, or a base is quantised and ``dequantize`` is not set.
    """
    flat = flatten(source.params, is_leaf=is_weight)
    folds = (Adapter, Quantized) if keep else (Adapter, Quantized, Merged)
    adapted = [path for path, node in flat.items() if isinstance(node, folds)]
    if not adapted:
        raise AdapterError("merge: there are no adapters")
    for path in adapted:
        node, base = flat[path], _bottom(flat[path])
        if isinstance(base, Quantized) and not dequantize:
            raise AdapterError(
                f"merge: the base of {path} is {type(base).__name__}; merging makes it {base.dtype} again: say "
                "dequantize=True, or export the adapters alone"
            )
        beside = bias_path(source.model, path)
        bias = flat.get(beside)
        whole = weights.with_shared(node, source.params.get(SHARED, {}))
        value, new = weights.materialize(whole), node.merged_bias(bias) if isinstance(node, Adapter) else bias
        flat[path] = Merged(value, node, bias if new is not bias else None) if keep else value
        if new is not bias:
            flat[beside] = new
    if not keep:  # nothing is left that uses them
        flat = {path: leaf for path, leaf in flat.items() if not path.startswith(f"{SHARED}/")}
    return _changed(source, unflatten(flat), f"merge({len(adapted)} leaves)")


def unmerge(source: Source) -> Source:
    """What `merge` with ``keep=True`` was given, bit for bit.

    Raises:
      AdapterError: nothing was kept.
    """
    flat = flatten(source.params, is_leaf=is_weight)
    kept = [path for path, node in flat.items() if isinstance(node, Merged)]
    if not kept:
        raise AdapterError("unmerge: nothing was kept; merge(keep=True) keeps")
    for path in kept:
        if flat[path].bias is not None:
            flat[bias_path(source.model, path)] = flat[path].bias
        flat[path] = flat[path].kept
    return _changed(source, unflatten(flat), f"unmerge({len(kept)} leaves)")


def _bottom(node: Any) -> Any:
    return _bottom(node.base) if isinstance(node, Adapter) else node


def _changed(source: Source, params: Params, note: str) -> Source:
    lineage = dataclasses.replace(source.lineage, operations=(*source.lineage.operations, note))
    return dataclasses.replace(source, params=params, lineage=lineage)


def _short(rule: str) -> str:
    """A pattern for a message: all kernels of a model, by name, are a kilobyte."""
    return rule if len(rule) <= 120 else f"{rule[:100]} ... {rule[-17:]}"
