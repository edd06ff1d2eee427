"""What cannot be a leaf: bottleneck adapters, a prompt, prefixes, as subtrees in slots that the model declares.

They are parameters like others: rules address them (``groups.adapters`` trains them), a checkpoint holds them alone.
"""

import dataclasses
import zlib
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp

from jaxtransfer.adapt.adapters import AdapterError
from jaxtransfer.models.api import run_span
from jaxtransfer.models.layers import ACTIVATIONS
from jaxtransfer.tree import weights
from jaxtransfer.tree.paths import Params, flatten, unflatten
from jaxtransfer.tree.rules import Rules, match_paths
from jaxtransfer.tree.weights import is_weight
from jaxtransfer.types import Source

HOULSBY, PFEIFFER = ("attention", "mlp"), ("mlp",)


def bottleneck(
    source: Source,
    rules: Rules,
    key: jax.Array,
    *,
    width: int,
    activation: str = "gelu",
    where: Collection[str] = HOULSBY,
) -> Source:
    """Bottleneck adapters, ``h + up(activation(down(h)))`` before the residual (Houlsby et al. 2019, arXiv:1902.00751).

    ``down`` is drawn from N(0, 1 / d), ``up`` and the biases are zero, so the function is unchanged at the start. The
    function is not linear, so they cannot be merged.

    Args:
      source: its parameters are shared, not copied.
      rules: layer, such as ``blocks/3`` -> True or False; layers without a rule get none.
      key: draws them; each depends on the key and its own path alone.
      width: m, of the features between ``down`` (d, m) and ``up`` (m, d).
      activation: by Hugging Face's name.
      where: behind ``"attention"`` and ``"mlp"``, or behind the MLP alone (Pfeiffer et al. 2021, arXiv:2005.00247).

    Raises:
      AdapterError: an option out of range, a model without such layers, or an adapter where there is one already.
      RuleError: a rule matches no layer.
    """
    if width < 1 or not where or activation not in ACTIVATIONS:
        raise AdapterError(
            f"bottleneck: width must be 1 or more, where not empty, activation one of {sorted(ACTIVATIONS)}; got "
            f"{width}, {[*where]}, {activation!r}"
        )
    layers = _layers(source, "adapter")
    if odd := sorted(set(where) - {place for places in layers.values() for place in places}):
        raise AdapterError(f"bottleneck: a {source.model.family} has no place {odd[0]!r} for an adapter")
    chosen = [name for name, value in match_paths(rules, [*layers], default=False).items() if value]
    new: Params = {}
    for layer in chosen:
        for place in where:
            path, size = f"{layer}/adapter/{place}", layers[layer][place]
            down = jax.random.normal(_key(key, path), (size, width), jnp.float32) * size**-0.5
            new |= {
                f"{path}/{activation}/down/kernel": down,
                f"{path}/{activation}/down/bias": jnp.zeros(width, jnp.float32),
                f"{path}/{activation}/up/kernel": jnp.zeros((width, size), jnp.float32),
                f"{path}/{activation}/up/bias": jnp.zeros(size, jnp.float32),
            }
    return _grown(source, new, f"bottleneck({len(chosen)} layers, {'+'.join(where)}, width={width}, {activation})")


def prompt_tuning(source: Source, key: jax.Array, *, length: int, init: str = "random") -> Source:
    """A prompt of learned embeddings before the first token (Lester et al. 2021, arXiv:2104.08691).

    It takes the first positions, every token attends to it, and padding stands behind it. Outputs are the tokens'
    alone; but where a head reads the first position, as BERT's pooler does, that is the prompt's, as in PEFT. A cache
    holds it from the first call on, on top of the slots that it was made with. It changes the function from the start.

    Args:
      source: its parameters are shared, not copied.
      key: draws the prompt.
      length: P, positions; they count in the model's ``max_position_embeddings``.
      init: ``"random"``, from U(-0.5, 0.5), or ``"vocabulary"``, embeddings of tokens drawn without replacement.

    Raises:
      AdapterError: an option out of range, a model that takes no prompt, or one that has one.
    """
    ((stage, places),) = _layers(source, "prompt").items()
    limit = source.model.config.max_position_embeddings
    _check_length("prompt_tuning", length, limit - 1, f"the model's {limit} positions")
    if init not in ("random", "vocabulary"):
        raise AdapterError(f"prompt_tuning: init must be 'random' or 'vocabulary', got {init!r}")
    path = f"{stage}/prompt/embedding"
    own = _key(key, path)
    if init == "random":
        prompt = jax.random.uniform(own, (length, places["embedding"]), jnp.float32, -0.5, 0.5)
    else:
        prompt = _tokens(source, stage, own, length)
    return _grown(source, {path: prompt}, f"prompt_tuning(length={length}, {init})")


def _tokens(source: Source, stage: str, key: jax.Array, length: int) -> jax.Array:
    """What the model makes of random tokens, before positions."""
    node = source.params[stage]
    table = node["word"]["embedding"]
    if length > table.shape[0]:
        raise AdapterError(f"prompt_tuning: length {length} is above the vocabulary of {table.shape[0]}")
    ids = jax.random.choice(key, table.shape[0], (length,), replace=False)
    if "position" in node:
        return weights.take(table, ids, jnp.float32)
    # Without positions of its own the stage's output is that, scaled where the family scales.
    return run_span(source.model, source.params, {"input_ids": ids[None]}, None, stage)["hidden"][0]


def prefix_tuning(source: Source, key: jax.Array, *, length: int) -> Source:
    """Learned keys and values in every layer, attended to by all positions (Li & Liang 2021, arXiv:2101.00190).

    They stand at no position, so tokens keep theirs, and they are in no cache. Drawn from N(0, 0.02^2), directly and
    not by the paper's reparametrisation. It changes the function from the start.

    Args:
      source: its parameters are shared, not copied.
      key: draws them; each depends on the key and its own path alone.
      length: P, keys and values a layer.

    Raises:
      AdapterError: an option out of range, a model that takes no prefix, or one that has one.
    """
    layers = _layers(source, "prefix")
    _check_length("prefix_tuning", length, 2**16, "65536, the most that is built")
    paths = {f"{layer}/prefix/{place}": size for layer, places in layers.items() for place, size in places.items()}
    new = {path: 0.02 * jax.random.normal(_key(key, path), (length, size), jnp.float32) for path, size in paths.items()}
    return _grown(source, new, f"prefix_tuning(length={length}, {len(layers)} layers)")


def detach(source: Source) -> Source:
    """The source without what stands in its slots.

    Raises:
      AdapterError: nothing does.
    """
    inside = held_in(source)
    if not inside:
        raise AdapterError("detach: nothing stands in the model's slots")
    flat = flatten(source.params, is_leaf=is_weight)
    kept = {path: leaf for path, leaf in flat.items() if not path.startswith(tuple(f"{slot}/" for slot in inside))}
    return _changed(source, unflatten(kept), f"detach({len(inside)} subtrees)")


def held_in(source: Source) -> list[str]:
    """The slots that hold something: ``["embed/prompt"]``."""
    paths = [*flatten(source.params, is_leaf=is_weight)]
    slots = [f"{stage.name}/{slot}" for stage in source.model.stages for slot in stage.slots]
    return [slot for slot in slots if any(path.startswith(f"{slot}/") for path in paths)]


def _layers(source: Source, slot: str) -> Mapping[str, Mapping[str, int]]:
    """The stages with a slot, and its places."""
    found = {stage.name: stage.slots[slot] for stage in source.model.stages if slot in stage.slots}
    if not found:
        has = sorted({name for stage in source.model.stages for name in stage.slots})
        raise AdapterError(
            f"a {source.model.family} model has no slot for a subtree called {slot!r}, "
            f"{'only for ' + ', '.join(has) if has else 'or for any other'}"
        )
    return found


def _check_length(what: str, length: int, most: int, why: str) -> None:
    if not 1 <= length <= most:
        raise AdapterError(f"{what}: length must be from 1 to {most} ({why}), got {length}")


def _key(key: jax.Array, path: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _grown(source: Source, new: Params, note: str) -> Source:
    if taken := [slot for slot in held_in(source) if any(path.startswith(f"{slot}/") for path in new)]:
        raise AdapterError(f"{taken[0]}: something stands there already; detach(source) first")
    return _changed(source, unflatten({**flatten(source.params, is_leaf=is_weight), **new}), note)


def _changed(source: Source, params: Params, note: str) -> Source:
    lineage = dataclasses.replace(source.lineage, operations=(*source.lineage.operations, note))
    return dataclasses.replace(source, params=params, lineage=lineage)
