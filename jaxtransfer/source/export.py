"""`export`: a Source becomes a folder, whole or not at all: Hugging Face layout, or Orbax."""

import contextlib
import dataclasses
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.adapt.subtrees import held_in
from jaxtransfer.data.processor import FILE as PREPROCESSOR
from jaxtransfer.data.processor import ImageProcessor, processor
from jaxtransfer.models.api import abstract_init
from jaxtransfer.models.names import turn
from jaxtransfer.models.registry import ConfigFieldError, Family, family
from jaxtransfer.source import orbax_folder
from jaxtransfer.source.card import card_text, lineage_record
from jaxtransfer.source.peft import write_adapter
from jaxtransfer.source.resolve import ASSETS, CARD, CONFIG, MARKER
from jaxtransfer.source.writer import fsync, write_folder, write_text
from jaxtransfer.tree import diff, digest, flatten
from jaxtransfer.tree.weights import is_weight
from jaxtransfer.types import Source


class ExportError(ValueError):
    """A model that the format cannot hold, or a folder that is not ours to replace."""


def export(
    source: Source, path: str | os.PathLike[str], *, format: str = "hf", metrics: Mapping[str, Any] | None = None
) -> Path:
    """Writes an adapted model as a folder, beside it first and then renamed: there is never half of one.

    Args:
      source: canonical parameters; adapters are merged first, but for ``"peft"``, which is them alone.
      path: the folder; it may be absent, empty, or an earlier export, which is replaced.
      format: ``"hf"``, which transformers loads with no missing and no unexpected keys, or ``"orbax"``, which holds
        every model of the zoo, heads of no Hugging Face class included; `load` reads both. ``"peft"`` is the adapters
        and what was trained beside them, as PEFT and `load_adapter` read them, bound to the base's digest.
      metrics: name -> value, for the model card.

    Returns:
      The folder.

    Raises:
      ExportError: the folder holds something else, the parameters are not canonical, or the format is unknown.
      ConfigFieldError: no Hugging Face class computes this head.
      DataError: images have another size than the source's `preprocessor_config.json` says, which cannot be read.
      PeftError: there are no adapters, or none that PEFT has a form for.
      OSError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    writers = {"hf": _write_hf, "orbax": _write_orbax, "peft": _write_peft}
    if format not in writers:
        raise ExportError(f"format {format!r} is not one of {', '.join(writers)}")
    path = Path(path).expanduser().resolve()
    _check_target(path)
    if format != "peft":
        _check_params(source)
    kind = family(source.model.family)
    try:
        with _replacing(path) as folder:
            writers[format](source, kind, folder)
            _write_assets(source, folder)
            write_text(folder / CARD, card_text(source, path.name, format, metrics))
            record = _record(source, format, metrics)
            record |= {"files": orbax_folder.hashes(folder)} if format == "orbax" else {}
            record |= {"base": source.lineage.digest} if format == "peft" else {}
            write_text(folder / MARKER, json.dumps(record, indent=2, allow_nan=False))
    except OSError as error:
        raise OSError(error.errno, f"cannot export: {error.strerror or error}", str(path)) from None
    return path


def _write_assets(source: Source, folder: Path) -> None:
    """The files that go along, but for how images are prepared where the source's own does not say it."""
    files = {name: file for name, file in source.assets.get("files", {}).items() if name in ASSETS}
    how: ImageProcessor | None = source.assets.get("processor")
    if how is None and PREPROCESSOR in files and "image_size" in source.assets:
        how = processor(source)
    if how is not None:
        files.pop(PREPROCESSOR, None)
        write_text(folder / PREPROCESSOR, json.dumps(how.fields, indent=2))
    for name, file in files.items():
        shutil.copyfile(file, folder / name)


def _record(source: Source, format: str, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the marker holds: that this is ours, and where it comes from."""
    record = {"format": format, "head": orbax_folder.head_record(source.model.head), "lineage": lineage_record(source)}
    record["metrics"] = {name: _jsonable(value) for name, value in (metrics or {}).items()}
    return {**record, "digest": digest(source.params)} if format == "orbax" else record


def _jsonable(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _check_target(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()) and not (path / MARKER).is_file():
        raise ExportError(
            f"{path}: is not empty and holds no {MARKER}, so it is no earlier export; name another folder"
        )
    if path.exists() and not path.is_dir():
        raise ExportError(f"{path}: is a file; name a folder")


def _check_params(source: Source) -> None:
    nodes = flatten(source.params, is_leaf=is_weight)
    if leaves := [path for path, node in nodes.items() if is_weight(node)]:
        raise ExportError(f"{leaves[0]} is a {type(nodes[leaves[0]]).__name__}, not an array: merge the adapters first")
    if inside := held_in(source):
        way = "write it alone, with format='peft'" if inside[0].endswith("/prompt") else "no format holds it: detach it"
        raise ExportError(f"{inside[0]} is a subtree beside the model's own parameters, and cannot be merged: {way}")
    diff(abstract_init(source.model), source.params, dtypes=False).check("export: the parameters are not the model's")
    far = [path for path, leaf in nodes.items() if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable]
    if far:
        raise ExportError(f"{far[0]} lies partly on other processes' devices: gather the parameters first")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its place at the end, or is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    folder, old = path.with_name(f".{path.name}.{mark}.new"), path.with_name(f".{path.name}.{mark}.old")
    folder.mkdir()
    try:
        yield folder
        fsync(folder)
        if path.exists():
            path.rename(old)
        folder.rename(path)
        fsync(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_hf(source: Source, kind: Family, folder: Path) -> None:
    if not kind.hub:
        raise ConfigFieldError(f"transformers has no {kind.name}: export with format='orbax', which load reads")
    config = kind.export_config(source.model, source.assets["config"])
    table = kind.names(source.model)
    flat = {path: np.asarray(leaf) for path, leaf in flatten(source.params).items()}
    rows = table.export_names(flat, with_prefix=source.model.head is not None)
    tensors = {name: turn(flat[path], how, back=True) for path, (name, how) in rows.items()}
    tensors |= {copy.theirs: turn(flat[copy.ours], copy.transform, back=True) for copy in table.copies}
    kinds = {str(array.dtype) for array in tensors.values() if jnp.issubdtype(array.dtype, jnp.floating)}
    config = {key: value for key, value in config.items() if key != "torch_dtype"}
    config["dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
    write_text(folder / CONFIG, json.dumps(config, indent=2))
    write_folder(folder, tensors, {"format": "pt"})


def _write_peft(source: Source, kind: Family, folder: Path) -> None:
    write_adapter(source, folder)


def _write_orbax(source: Source, kind: Family, folder: Path) -> None:
    head = source.model.head
    if head is not None and head.stages:
        raise ExportError(f"a {head.kind} head with stages of its own is code, which no folder holds")
    trunk = dataclasses.replace(source.model, head=None)  # the head stands in the marker, in our own terms
    write_text(folder / CONFIG, json.dumps(kind.export_config(trunk, source.assets["config"]), indent=2))
    orbax_folder.write(source.params, folder)
