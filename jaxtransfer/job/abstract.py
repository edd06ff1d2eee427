"""A configuration's source as shapes: its architecture is read, its weights are not."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.adapt import quantized
from jaxtransfer.config import Config
from jaxtransfer.job import adapting
from jaxtransfer.job.sources import check_head
from jaxtransfer.models.api import abstract_init
from jaxtransfer.source.load import checkpoint_head, described, read_config
from jaxtransfer.source.resolve import HubError, SourceError, resolve
from jaxtransfer.tasks import Task
from jaxtransfer.tree.paths import flatten, unflatten
from jaxtransfer.types import Head, Lineage, Source


def architecture(config: Config, task: Task, say: Any) -> Source:
    """The source as `load` would give it, quantised where the configuration asks for it, with abstract parameters.

    Their dtype is the configuration's, else the one that the model's own says it is stored in.
    """
    source, failures = config.source, []
    for ref in (source.ref, *source.alternatives):
        own = ref == source.ref
        given = source.config if own else None
        try:
            found = resolve(ref, source.revision if own else None, weights=False, config=given)
        except (SourceError, HubError, OSError) as error:
            failures.append(error)
            continue
        for missed in (source.ref, *source.alternatives)[: len(failures)]:
            say(f"source {missed}: is not there, the architecture of {ref} stands in for it")
        raw, kind = read_config(found, given)
        head: Head | None = None if task.fresh_head else task.head
        if not task.fresh_head and source.init == "pretrained" and config.pretrain is None:
            head = checkpoint_head(kind, raw, found.ref)
        model = kind.build(raw, head, ignore=source.ignore)
        dtype = jnp.dtype(source.dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32")
        params = _packed(config, jax.tree.map(functools.partial(_cast, dtype), abstract_init(model)))
        made = described(Source(model, {}, Lineage(found.ref, "", operations=("abstract",))), found, raw)
        trunk = dataclasses.replace(made, params=params)
        check_head(trunk, task)
        return trunk
    raise failures[0]


def _cast(dtype: Any, leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)


def _packed(config: Config, params: Any) -> Any:
    flat = flatten(params)
    try:
        methods = quantized.methods_of(config.adapt.quantize, flat) if config.adapt.quantize else {}
    except ValueError as error:
        raise adapting.quantize_error(error) from None
    return unflatten({**flat, **{path: quantized.abstract(path, flat[path], how) for path, how in methods.items()}})


def adapted(config: Config, trunk: Source, task: Task) -> Source:
    """The source under its head, with its adapters: what `adapting.begun` makes of it, as shapes."""
    made: list[Source] = []

    def begin(params: Any) -> Any:
        made.append(adapting.begun(config, dataclasses.replace(trunk, params=params), task, config.run.seed))
        return made[0].params

    params = jax.eval_shape(begin, trunk.params)
    return dataclasses.replace(made[0], params=params)
