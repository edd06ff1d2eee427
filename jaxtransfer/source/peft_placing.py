"""What the tensors of PEFT's folders are in a model: plain leaves, parts of adapters, or what is known already."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.models.names import turn
from jaxtransfer.source.peft_config import PeftError, ties_adapters
from jaxtransfer.source.peft_forms import PARTS, VERA
from jaxtransfer.source.peft_names import Rows, copies_of, module_of, prefix_of, readers
from jaxtransfer.tree.paths import flatten
from jaxtransfer.tree.weights import is_weight
from jaxtransfer.types import Source

THEIR_PROMPT = "prompt_embeddings"
Tensors = Mapping[str, np.ndarray]


def placed(
    source: Source, rows: Rows, tensors: Tensors, kind: str, folder: Path
) -> tuple[dict[str, str], dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """What their tensors are.

    Returns:
      Path -> key of a plain leaf, path -> part -> tensor of an adapter, and what stands in the folder under the second
      name of a parameter that a head shares, for `check_tied`.

    Raises:
      PeftError: some are none of these.
    """
    by_module = {module_of(theirs): path for path, (theirs, _) in rows.items() if theirs.endswith(".weight")}
    by_name = {theirs: path for path, (theirs, _) in rows.items()}
    copies = copies_of(source, rows).values()
    plain: dict[str, str] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    again, rest = {}, {}
    for key, value in tensors.items():
        name = key.removeprefix(prefix_of(kind))
        found = re.fullmatch(rf"(.+)\.({PARTS})", name)
        if name in by_name and found is None:
            plain[by_name[name]] = key
        elif name in copies:
            again[name] = value
        elif found and found[1] in by_module:
            parts.setdefault(by_module[found[1]], {})[found[2].removesuffix(".weight")] = value
        elif key not in {"PROMPT_TUNING": (THEIR_PROMPT,), "VERA": VERA}.get(kind, ()):
            rest[name] = value
    if unknown := [name for name, value in rest.items() if not _repeats(source, rows, by_name, parts, name, value)]:
        tied = next((module_of(name) for name in copies if unknown[0].startswith(f"{module_of(name)}.")), None)
        raise PeftError(
            f"{folder.name}: {len(unknown)} tensors have no place in this {source.model.family}: {unknown[:4]}: "
            + (f"{tied} has no weight of its own here, untie(source) first" if tied else "merge the adapter in PEFT")
        )
    return plain, parts, again


def check_tied(
    source: Source,
    rows: Rows,
    plain: Tensors,
    again: Tensors,
    adapted: Mapping[str, str],
    raw: Mapping[str, Any],
    folder: Path,
) -> None:
    """Refuses a folder by which PEFT has two parameters, or two functions, where the model here has one.

    Args:
      source: the base; what the folder lacks is as it is there.
      rows: of the model.
      plain: path -> their tensor.
      again: second name -> their tensor.
      adapted: path -> their module.
      raw: the folder's configuration.
      folder: by which name it is refused.

    Raises:
      PeftError: the two differ, or one is adapted alone.
    """
    for path, stage in readers(source).items():
        if path in adapted and not ties_adapters(raw, adapted[path]):
            raise PeftError(
                f"{folder.name}: adapts {adapted[path]} alone, and here stage {stage} reads {path} as well: "
                "untie(source) first"
            )
    flat = flatten(source.params, is_leaf=is_weight)
    for path, second in copies_of(source, rows).items():
        if path not in plain and second not in again:
            continue
        own = None if is_weight(flat[path]) else turn(np.asarray(flat[path]), rows[path][1], back=True)
        first, other = plain.get(path, own), again.get(second, own)
        if path in adapted or first is None or other is None or not np.array_equal(first, other):
            held = " and another ".join([rows[path][0]] * (path in plain) + [second] * (second in again))
            raise PeftError(
                f"{folder.name}: holds a {held}, and here {rows[path][0]} and {second} are one, {path}: untie(source) "
                "first, or train them as one in PEFT, with ensure_weight_tying"
            )


def _repeats(
    source: Source, rows: Rows, by_name: Mapping[str, str], parts: Mapping[str, Any], name: str, value: Any
) -> bool:
    """Whether a tensor only says again what is known: the base's own, or the adapter of a head that is tied."""
    path = by_name.get(name.replace(".base_layer.", "."))
    tied = [path for path in readers(source) if path in parts]
    if path is None and not tied:
        return False
    if ".base_layer." in name:
        path = tied[0] if path is None else path
        node = flatten(source.params, is_leaf=is_weight).get(path)
        return not is_weight(node) and np.array_equal(turn(np.asarray(node), rows[path][1], back=True), value)
    given = parts[tied[0]] if tied else {}
    want = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
    known = given.get(want.get(".".join(name.split(".")[-2:]), ""))
    return known is not None and np.array_equal(known.T, value)
