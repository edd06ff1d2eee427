"""PEFT's adapter folders, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

The names of tensors follow from the family's own name table: adapters sit on Hugging Face's modules, and a linear here
is one of theirs. The adapter is bound to a base by shapes on their side, and by the base's digest on ours: what it
stands on must be that base, weight for weight.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtransfer.adapt.adapter_types import NAME, Adapter
from jaxtransfer.adapt.attaching import deeper, names_of
from jaxtransfer.adapt.subtrees import held_in
from jaxtransfer.adapt.vera import VeRA
from jaxtransfer.models.names import turn
from jaxtransfer.source.peft_beside import check_bases, kept_whole, task_of, tying_of
from jaxtransfer.source.peft_config import CONFIG, TASKS, WEIGHTS, PeftError, check_base, check_held, read_config
from jaxtransfer.source.peft_forms import VERA, adapter_of, fields_of, matrices_of, tensors_of
from jaxtransfer.source.peft_names import check_split, module_of, prefix_of, rows_of
from jaxtransfer.source.peft_placing import THEIR_PROMPT, check_tied, placed
from jaxtransfer.source.safetensors import TensorFile
from jaxtransfer.source.writer import write, write_text
from jaxtransfer.tree.paths import flatten, unflatten
from jaxtransfer.tree.weights import SHARED, is_weight
from jaxtransfer.types import Source

PROMPT = "embed/prompt/embedding"


def write_adapter(source: Source, folder: Path, *, base: str | None = None) -> None:
    """Writes the adapters of a source, and the head that was trained beside them, as PEFT reads them.

    Args:
      source: with LoRA, DoRA, (IA)3 or VeRA on its kernels, of one kind and name, or with a prompt.
      folder: an empty folder.
      base: what stands for the base model in the file; None is the source's reference.

    Raises:
      PeftError: no adapters, several kinds or names, adapters on top of one another or on other weights than those
        loaded, a bottleneck or a prefix, which PEFT has no like of, a prompt under a head that it has no task for, a
        module that is in part adapted and in part trained, or a bare trunk's odd leaf.
    """
    inside, flat = held_in(source), flatten(source.params, is_leaf=is_weight)
    nodes = _own(source, flat)
    adapted: dict[str, Adapter] = {path: node for path, node in nodes.items() if isinstance(node, Adapter)}
    _check_alike(adapted, inside)
    check_bases(source, nodes)
    rows = rows_of(source, nodes)
    modules = {path: module_of(rows[path][0]) for path in adapted}
    whole, kept = kept_whole(source, nodes, rows, modules)
    check_split(source, {path: rows[path][0] for path in (*adapted, *kept.values())})
    fields = _prompt_fields(source, flat[PROMPT]) if inside else fields_of(adapted, modules)
    fields |= {"task_type": task_of(source, modules, kept), "modules_to_save": whole or None}
    tying = tying_of(source, modules, kept)
    fields |= tying if fields["peft_type"] == "LORA" else {}  # the others have no such field, and two parameters
    if any(rows[path][1] == "same" and path.endswith("/kernel") for path in adapted):
        fields["fan_in_fan_out"] = True  # their modules keep (in, out) as ours do
    tensors = {THEIR_PROMPT: np.asarray(flat[PROMPT])} if inside else _tensors(flat, adapted, modules)
    for name, path in kept.items():
        tensors[prefix_of(fields["peft_type"]) + name] = turn(np.asarray(nodes[path]), rows[path][1], back=True)
    write(folder / WEIGHTS, {name: np.ascontiguousarray(array) for name, array in tensors.items()}, {"format": "pt"})
    record = {"base_model_name_or_path": source.lineage.ref if base is None else base, "inference_mode": True, **fields}
    write_text(folder / CONFIG, json.dumps(record, indent=2))


def load_adapter(source: Source, folder: str | Path, *, name: str = NAME) -> Source:
    """Puts what a PEFT folder holds on a source: LoRA, rsLoRA, DoRA, (IA)3, VeRA, a prompt, and trained heads.

    Args:
      source: the base, under the head that the adapter was trained with.
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      name: of the adapter here; a prompt has none.

    Raises:
      PeftError: a field or method that is not supported, by name; tensors without a place, of other shapes, not
        finite floats, or missing though the configuration names their module; an adapter of ours for another base or
        head.
    """
    folder = Path(folder)
    raw = read_config(folder)
    kind = raw["peft_type"]
    check_base(source, folder)
    file = TensorFile(folder / WEIGHTS)
    tensors = {key: file.read(key) for key in file.tensors}
    if odd := [key for key, value in tensors.items() if not jnp.issubdtype(value.dtype, jnp.floating)]:
        raise PeftError(f"{folder.name}: {odd[0]} is {tensors[odd[0]].dtype}, expected floats")
    if odd := [key for key, value in tensors.items() if not np.isfinite(value).all()]:
        raise PeftError(f"{folder.name}: {odd[0]} holds numbers that are not finite: save that of an earlier step")
    flat = flatten(source.params, is_leaf=is_weight)
    rows = rows_of(source, _own(source, flat), tensors)
    plain, parts, again = placed(source, rows, tensors, kind, folder)
    names = {path: theirs for path, (theirs, _) in rows.items()}
    modules = {path: module_of(names[path]) for path in parts}
    check_held(folder, raw, names.values(), modules.values(), [*(names[path] for path in plain), *again])
    check_tied(source, rows, {path: tensors[key] for path, key in plain.items()}, again, modules, raw, folder)
    flat |= {path: _replaced(path, flat[path], turn(tensors[key], rows[path][1])) for path, key in plain.items()}
    for path, given in parts.items():
        if name in names_of(flat[path]):
            raise PeftError(f"{path}: has an adapter called {name!r} already; load it under another name")
        flat[path] = adapter_of(path, flat[path], given, raw, modules[path], name)
    shared = matrices_of({path: flat[path] for path in parts}, tensors, raw)
    if taken := sorted(shared.keys() & flat.keys()):
        raise PeftError(f"{taken[0]}: there is a VeRA called {name!r} already; load it under another name")
    flat |= shared
    if kind == "PROMPT_TUNING":
        flat[PROMPT] = _prompt(source, tensors, raw, folder)
    note = f"load_adapter({folder.name}: {kind}, {len(parts)} leaves)"
    lineage = dataclasses.replace(
        source.lineage,
        operations=(*source.lineage.operations, note),
        fingerprints={**source.lineage.fingerprints, **deeper(source.lineage, parts)},
    )
    return dataclasses.replace(source, params=unflatten(flat), lineage=lineage)


def _own(source: Source, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that the model itself has."""
    beside = (f"{SHARED}/", *(f"{slot}/" for slot in held_in(source)))
    return {path: leaf for path, leaf in flat.items() if not path.startswith(beside)}


def _tensors(
    flat: Mapping[str, Any], adapted: Mapping[str, Adapter], modules: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Their tensors of all adapters."""
    tensors = {
        f"{prefix_of('LORA')}{modules[path]}.{part}": array
        for path, node in adapted.items()
        for part, array in tensors_of(path, node).items()
    }
    if isinstance(first := next(iter(adapted.values())), VeRA):
        where = f"{SHARED}/{first.shares}"
        tensors |= {theirs: np.asarray(flat[f"{where}/{part}"]).T for theirs, part in zip(VERA, "ab", strict=True)}
    return tensors


def _check_alike(adapted: Mapping[str, Adapter], inside: list[str]) -> None:
    kinds = {type(node).__name__ for node in adapted.values()} | {slot.rpartition("/")[2] for slot in inside}
    if not kinds:
        raise PeftError("export: there are no adapters; attach some, or export the model with format='hf'")
    if len(kinds) > 1 or len({node.name for node in adapted.values()}) > 1:
        raise PeftError(f"export: PEFT's folder holds one adapter of one kind; these are {sorted(kinds)}: merge some")
    if inside and kinds != {"prompt"}:
        raise PeftError(f"export: PEFT has no form of what stands at {inside[0]}; only a checkpoint holds it")
    if nested := [path for path, node in adapted.items() if isinstance(node.base, Adapter)]:
        raise PeftError(f"export: {nested[0]} has adapters on top of one another: merge the inner one first")


def _prompt_fields(source: Source, prompt: Any) -> dict[str, Any]:
    """The fields of their configuration that say what the prompt is."""
    head, c = source.model.head, source.model.config
    if head is None or head.kind not in TASKS:
        kind = "no head" if head is None else f"a {head.kind} head"
        raise PeftError(f"export: PEFT has a prompt under the tasks {sorted(TASKS)}, this model has {kind}")
    return {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": int(prompt.shape[0]),
        "token_dim": int(prompt.shape[1]),
        "num_transformer_submodules": 1,
        "num_attention_heads": c.num_attention_heads,
        "num_layers": c.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
    }


def _prompt(source: Source, tensors: Mapping[str, np.ndarray], raw: Mapping[str, Any], folder: Path) -> Any:
    """Their prompt for our slot."""
    slots = {stage.name: stage.slots for stage in source.model.stages}
    if "prompt" not in slots.get("embed", {}) or "embed/prompt" in held_in(source):
        what = "has a prompt already" if "embed/prompt" in held_in(source) else "takes no prompt"
        raise PeftError(f"{folder.name}: is a prompt, and this {source.model.family} {what}")
    found = tensors.get(THEIR_PROMPT, np.zeros(0))
    want = (raw.get("num_virtual_tokens"), slots["embed"]["prompt"]["embedding"])
    if found.shape != want:
        raise PeftError(f"{folder.name}: {THEIR_PROMPT} is {found.shape}, expected {want} for this model")
    return jnp.asarray(found, jnp.float32)


def _replaced(path: str, old: Any, value: np.ndarray) -> Any:
    if is_weight(old):
        raise PeftError(f"{path}: the folder holds it whole, but it is a {type(old).__name__} here: load it before")
    if tuple(old.shape) != value.shape:
        raise PeftError(
            f"{path}: the folder's tensor is {value.shape}, the model's is {tuple(old.shape)}; another head?"
        )
    return jnp.asarray(value, old.dtype)
