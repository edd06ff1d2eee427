"""`load`: a reference becomes a Source, every tensor used or dropped for a reason, straight to the devices."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtransfer.adapt.quantized import abstract, methods_of, note
from jaxtransfer.models.api import abstract_init
from jaxtransfer.models.names import turn
from jaxtransfer.models.registry import Family, family, labels_of, load_plan
from jaxtransfer.parallel import distributed
from jaxtransfer.source import orbax_folder, placing
from jaxtransfer.source.card import read_card, text_of
from jaxtransfer.source.orbax_folder import sha256
from jaxtransfer.source.resolve import ASSETS, CARD, CONFIG, MARKER, Resolved, SourceError, resolve
from jaxtransfer.source.safetensors import open_weights
from jaxtransfer.source.strictjson import CONFIG_BYTES, MARKER_BYTES, printable, read_object
from jaxtransfer.tree import diff, fingerprint, flatten, unflatten
from jaxtransfer.tree.rules import Rules
from jaxtransfer.types import Head, Lineage, Model, Source

Sharding = Rules | Callable[[Model, Any], Rules]
Config = Mapping[str, Any] | str | os.PathLike[str] | None
LABELLED = tuple(f"{kind}-classification" for kind in ("sequence", "token", "image", "distilled-image"))


def load(
    ref: str | os.PathLike[str],
    *,
    config: Config = None,
    head: Head | str | None = "checkpoint",
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    sharding: Sharding = (),
    dtype: Any = None,
    quantize: Rules = (),
    revision: str | None = None,
    ignore: Collection[str] = (),
) -> Source:
    """Loads a pre-trained checkpoint: safetensors in Hugging Face layout, or a folder that `export` wrote.

    Args:
      ref: a local folder, a hub id, or ``python:PACKAGE/FOLDER`` (a folder inside an installed package); with
        ``config``, a .safetensors file too.
      config: the raw configuration, or the path of its .json file, for weights that come without one: those of timm,
        torchvision or anyone else, under any of the names that the family knows.
      head: ``"checkpoint"`` for the head that the checkpoint was trained with, None for the bare trunk, or a new
        :class:`Head`, whose parameters are drawn from ``key`` over the checkpoint's trunk.
      key: PRNG key of a new head; only for one.
      mesh: the devices to load onto; None is jax's default device.
      sharding: rules, path -> ``PartitionSpec``, or a function of the model and its abstract parameters that gives
        them; what no rule matches is replicated. Each process reads only the parts of the tensors that its own devices
        hold.
      dtype: of floating-point parameters; None keeps what is stored.
      quantize: rules, path -> ``"int8"``, ``"nf4"`` or None: what `adapt.quantize` would make of the parameters, leaf
        by leaf while they are read, so that the model is at no time and nowhere in full precision.
      revision: branch, tag or commit of a hub id; the commit that it stands for is recorded in the lineage.
      ignore: fields of ``config.json`` to accept unread, where loading refuses an unknown one.

    Raises:
      SourceError: the reference, its configuration's architecture or its values cannot be used.
      SafetensorsError: damaged or malformed weights, or pickles.
      HubError: the hub did not give the model.
      ConfigFieldError: an unsupported configuration; names the field.
      MappingError, TreeError: missing, extra or misshapen tensors, all listed.
      ShardingError: a rule's spec does not divide its leaf, or cuts a quantised leaf's blocks.
      RuleError, QuantizeError: ``quantize``; as `adapt.quantize`.
    """
    if isinstance(head, Head):
        where = {"mesh": mesh, "sharding": sharding, "dtype": dtype, "quantize": quantize}
        return _with_new_head(head, key, ref, {"config": config, **where, "revision": revision, "ignore": ignore})
    if head not in ("checkpoint", None) or key is not None:
        raise SourceError(f"head={head!r}: expected 'checkpoint', None, or a Head with a key to draw it from")
    found = resolve(os.fspath(ref), revision, config=config)
    raw, kind = read_config(found, config)
    if MARKER in found.files:
        record = read_object(found.files[MARKER], MARKER_BYTES, SourceError)
        if record.get("format") == "orbax":
            return _from_orbax(found, raw, kind, record, head, mesh, sharding, dtype, quantize, ignore)
    tensors = open_weights(found.files)
    wanted = None if head is None else checkpoint_head(kind, raw, found.ref)
    pooler = any(re.search(r"(^|\.)pooler\.", name) for name in tensors)
    model = kind.build(raw, wanted, pooler=pooler, ignore=ignore)
    expected = flatten(abstract_init(model))
    plan = load_plan(kind, model, list(tensors), list(expected))
    views = {path: turn(tensors[name].read(name), how) for path, (name, how) in plan.used.items()}
    views |= {path: np.zeros(expected[path].shape, expected[path].dtype) for path in plan.zeros}
    diff(expected, views, dtypes=False).check(f"{found.ref}: the tensors do not fit {CONFIG}")
    types = {path: placing.target(path, view.dtype, dtype) for path, view in views.items()}
    leaves = {path: jax.ShapeDtypeStruct(leaf.shape, types[path]) for path, leaf in expected.items()}
    methods, kept = _quantized(quantize, leaves)
    where = placing.shardings(kept, mesh, _rules(sharding, model, kept))
    weights = sorted({file.path for file in tensors.values()})
    apart = mesh is not None and mesh.is_multi_process  # each process then hashes its share of the files
    mine = weights[jax.process_index() :: jax.process_count()] if apart else weights
    with contextlib.ExitStack() as stack:
        if apart:
            stack.enter_context(distributed.together(f"load {found.ref}", error=SourceError))
        pool = stack.enter_context(ThreadPoolExecutor(min(8, os.cpu_count() or 1)))
        hashes = {path.name: pool.submit(sha256, path) for path in mine}
        flat = placing.arrays(views, types, where, methods, pool, found.ref)
        files = {name: future.result() for name, future in hashes.items()}
    if apart:
        told = distributed.gathered(f"hashes of {found.ref}", json.dumps(files))
        files = {name: value for part in told for name, value in json.loads(part).items()}
    _check_hashes(found, files)
    listing = "\n".join(f"{name} {files[name]}" for name in sorted(files))
    params = unflatten({path: flat[path] for path in expected})
    digest, operations = hashlib.sha256(listing.encode()).hexdigest(), _operations(methods)
    lineage = Lineage(found.ref, digest, files, dropped=dict(plan.dropped), operations=operations)
    return described(Source(model, params, lineage), found, raw)


def read_config(found: Resolved, config: Config = None) -> tuple[dict[str, Any], Family]:
    """The raw configuration of a source and the family that it names.

    Raises:
      SourceError: it is no JSON object, or names no ``model_type``; ConfigFieldError: the family is not supported.
    """
    given = dict(config) if isinstance(config, Mapping) else None
    raw = read_object(found.files[CONFIG], CONFIG_BYTES, SourceError) if given is None else given
    if not isinstance(raw.get("model_type"), str):
        name = "config" if given is not None else found.files[CONFIG].name
        raise SourceError(f"{found.ref}: {name} names no model_type, so the family of the model is unknown")
    return raw, family(raw["model_type"])


def _with_new_head(head: Head, key: jax.Array | None, ref: str | os.PathLike[str], how: dict[str, Any]) -> Source:
    from jaxtransfer.adapt import swap_head

    if key is None:
        raise SourceError(f"a new head ({head.kind}) is drawn at random: give load a key, such as jax.random.key(0)")
    return swap_head(load(ref, head=None, **how), head, key)


def checkpoint_head(kind: Family, raw: Mapping[str, Any], ref: str) -> Head | None:
    """The head that a checkpoint was saved with, from ``architectures`` and ``id2label`` of its configuration.

    Raises:
      SourceError: the architecture is missing or not one of the family's.
    """
    named = raw.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    if not isinstance(name, str) or name not in kind.architectures:
        raise SourceError(
            f"{ref}: {CONFIG} has architectures={printable(named)}, for {kind.name} it must be one of "
            f"{', '.join(kind.architectures)}; head=None loads the trunk alone"
        )
    head = kind.architectures[name]
    return None if head is None else Head(head, labels_of(raw) if head in LABELLED else ())


def _from_orbax(
    found: Resolved,
    raw: dict[str, Any],
    kind: Family,
    record: Mapping[str, Any],
    head: str | None,
    mesh: Mesh | None,
    sharding: Sharding,
    dtype: Any,
    quantize: Rules,
    ignore: Collection[str],
) -> Source:
    if dtype is not None:
        raise SourceError(f"{found.ref}: dtype is for safetensors; an Orbax export is read as it was written")
    orbax_folder.verify(found.folder, record, found.ref)
    stored = orbax_folder.head_of(record.get("head"), found.ref)
    there, dropped = orbax_folder.stored_paths(found.folder, found.ref), {}
    model = kind.build(raw, stored, pooler=any(path.startswith("pooler/") for path in there), ignore=ignore)
    expected = flatten(abstract_init(model))
    diff(expected, there, dtypes=False).check(f"{found.ref}: the stored parameters do not fit the configuration")
    leaves = {path: jax.ShapeDtypeStruct(there[path].shape, np.dtype(there[path].dtype)) for path in expected}
    if head is None and stored is not None:
        dropped = {path: "the head of another task" for path in there if path.startswith("head/")}
    methods, kept = _quantized(quantize, {path: leaf for path, leaf in leaves.items() if path not in dropped})
    kept = {**leaves, **kept}
    where = placing.shardings(kept, mesh, _rules(sharding, model, kept))
    flat = orbax_folder.read(found.folder, leaves, where, methods, record, found.ref)
    params = unflatten({path: leaf for path, leaf in flat.items() if path not in dropped})
    if dropped:
        model = kind.build(raw, None, pooler="pooler" in params, ignore=ignore)
    lineage = Lineage(found.ref, record["digest"], dropped=dropped, operations=_operations(methods))
    return described(Source(model, params, lineage), found, raw)


def _quantized(rules: Rules, leaves: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """How leaves are quantised, by path, and all of them as they will be kept, abstract."""
    methods = methods_of(rules, leaves)
    return methods, {**leaves, **{path: abstract(path, leaves[path], method) for path, method in methods.items()}}


def _operations(methods: Mapping[str, str]) -> tuple[str, ...]:
    return (note(methods),) if methods else ()


def _rules(sharding: Sharding, model: Model, expected: Mapping[str, Any]) -> Rules:
    return sharding(model, unflatten(expected)) if callable(sharding) else sharding


def _check_hashes(found: Resolved, files: Mapping[str, str]) -> None:
    for name, have in files.items():
        if have != found.hashes.get(name, have):
            raise SourceError(
                f"{found.ref}: {name} has SHA-256 {have}, the hub recorded {found.hashes[name]}; fetch it again"
            )


def described(source: Source, found: Resolved, raw: dict[str, Any]) -> Source:
    """A source with what its card and its folder say besides, and the fingerprints of its parameters."""
    card = read_card(found.files[CARD]) if CARD in found.files else {}
    named = text_of(card.get("license_name") if card.get("license") == "other" else card.get("license"))
    text = json.dumps(raw, sort_keys=True)
    config = sha256(found.files[CONFIG]) if CONFIG in found.files else hashlib.sha256(text.encode()).hexdigest()
    assets = {name: found.files[name] for name in ASSETS if name in found.files}
    lineage = dataclasses.replace(
        source.lineage,
        files={**source.lineage.files, CONFIG: config, **{name: sha256(path) for name, path in assets.items()}},
        commit=found.commit,
        license=None if named == "unknown" else named,
        base_model=text_of(card.get("base_model")),
        fingerprints=fingerprint(source.params),
    )
    return dataclasses.replace(source, lineage=lineage, assets={"config": raw, "files": assets, "card": card})
