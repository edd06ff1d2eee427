"""`blank`: an architecture with fresh parameters, from its configuration alone."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtransfer.models.api import abstract_init, init
from jaxtransfer.parallel import specs
from jaxtransfer.source.load import Config, Sharding, checkpoint_head, described, read_config
from jaxtransfer.source.placing import refuse_rules
from jaxtransfer.source.resolve import SourceError, resolve
from jaxtransfer.types import Head, Lineage, Source


def blank(
    ref: str | os.PathLike[str],
    *,
    config: Config = None,
    head: Head | str | None = "checkpoint",
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    sharding: Sharding = (),
    dtype: Any = None,
    revision: str | None = None,
    ignore: Collection[str] = (),
) -> Source:
    """The architecture of a source and fresh parameters, as :func:`~jaxtransfer.init` draws them; no weights are read.

    Args:
      ref: as for `load`, of which only the configuration and the files of tokenizer or processor are needed; or the
        .json file of a configuration.
      config: as for `load`.
      head: ``"checkpoint"`` for the head that the configuration names, None for the bare trunk, or a new one.
      key: draws the parameters; ``jax.random.key(0)`` without it.
      mesh, sharding, dtype, revision, ignore: as for `load`.

    Raises:
      SourceError, HubError, ConfigFieldError, ShardingError: as `load`.

    Example:
      >>> import json, pathlib, tempfile
      >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
      >>> file = pathlib.Path(tempfile.mkdtemp(), "tiny.json")
      >>> raw = {"model_type": "bert", "vocab_size": 16, "max_position_embeddings": 8, **sizes}
      >>> _ = file.write_text(json.dumps(raw))
      >>> source = blank(file, head=None)
      >>> source.params["embed"]["word"]["embedding"].shape, source.lineage.operations
      ((16, 8), ('blank(): fresh parameters',))
    """
    if not isinstance(head, Head) and head not in ("checkpoint", None):
        raise SourceError(f"head={head!r}: expected 'checkpoint', None or a Head")
    found = resolve(os.fspath(ref), revision, weights=False, config=config)
    raw, kind = read_config(found, config)
    wanted = checkpoint_head(kind, raw, found.ref) if isinstance(head, str) else head
    model = kind.build(raw, wanted, ignore=ignore)
    expected = abstract_init(model)
    draw = partial(_drawn, partial(init, model), dtype)
    key = jax.random.key(0) if key is None else key
    if mesh is None:
        refuse_rules(sharding)
        params = draw(key)
    else:
        rules = sharding(model, expected) if callable(sharding) else sharding
        where = specs.shardings(expected, mesh, rules)
        params = jax.jit(draw, out_shardings=where)(key)
    # What the parameters follow from, and not their bits, which a device may round in its own way.
    origin = json.dumps([raw, jax.random.key_data(key).tolist()], sort_keys=True)
    digest = hashlib.sha256(origin.encode()).hexdigest()
    lineage = Lineage(found.ref, digest, operations=("blank(): fresh parameters",))
    source = described(Source(model, params, lineage), found, raw)
    # Nobody else has these parameters: a checkpoint must hold all of them.
    return dataclasses.replace(source, lineage=dataclasses.replace(source.lineage, fingerprints={}))


def _drawn(draw: Any, dtype: Any, key: jax.Array) -> Any:
    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, draw(key))
