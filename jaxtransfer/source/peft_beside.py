"""What was trained beside adapters, in PEFT's terms: the modules that are kept whole, the task, and what is tied."""

from collections.abc import Mapping
from typing import Any

from jaxtransfer.adapt.adapter_types import Adapter
from jaxtransfer.source.peft_config import TASKS, PeftError, ties_adapters
from jaxtransfer.source.peft_names import DECODER, EMBEDDING, Rows, copies_of, is_kept, module_of, readers
from jaxtransfer.tree import fingerprint
from jaxtransfer.tree.paths import folded
from jaxtransfer.tree.weights import is_weight
from jaxtransfer.types import Source


def check_bases(source: Source, nodes: Mapping[str, Any]) -> None:
    """The folder holds adapters alone: the weights under them must be those that whoever reads it has.

    Raises:
      PeftError: a weight under an adapter, or a packed one, is not the source's as loaded.
    """
    bases = {path: _innermost(node) for path, node in nodes.items() if is_weight(node)}
    if other := [path for path, base in bases.items() if not _as_loaded(source, path, base)]:
        raise PeftError(
            f"export: {', '.join(folded(other))}: the weight under the adapter is a fresh, trained or merged one, and "
            f"PEFT will put the adapter on that of {source.lineage.ref}: export the merged model with format='hf' as a "
            "new base, or leave a fresh head unadapted"
        )


def _innermost(node: Any) -> Any:
    return _innermost(node.base) if isinstance(node, Adapter) else node


def _as_loaded(source: Source, path: str, base: Any) -> bool:
    """Whether a weight is the source's own; an untied decoder is, if it still is the embedding, as in PEFT's model."""
    known = source.lineage.fingerprints
    if path == DECODER and path not in known and not is_weight(base):
        path, base = EMBEDDING, base.T
    return all(known.get(part) == value for part, value in fingerprint({path: base}).items())


def kept_whole(
    source: Source, nodes: Mapping[str, Any], rows: Rows, modules: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The modules that PEFT is to keep whole, and their name -> path of every tensor in these.

    PEFT keeps a module with all that is in it or not at all, a head in one piece, and of a parameter that a head shares
    a copy for each of its names.

    Args:
      source: adapted.
      nodes: the leaves that the model itself has.
      rows: of these.
      modules: path -> their module of what is adapted; none under a prompt.

    Raises:
      PeftError: such a module is adapted in part, holds what is no plain array, or is not read by PEFT.
    """
    known, plain = source.lineage.fingerprints, {path: leaf for path, leaf in nodes.items() if not is_weight(leaf)}
    new = {path for path, value in fingerprint(plain).items() if known.get(path) != value}
    head = set() if _on_head(modules) else {path for path in nodes if path.startswith("head/")}
    # A classifier under a prompt PEFT keeps of its own accord, trained or not.
    also = head if new & head or (not modules and _task(source) != "CAUSAL_LM") else set()
    names = [(rows[path][0], path) for path in nodes]
    names += [(second, path) for path, second in copies_of(source, rows).items()]
    names.sort(key=lambda row: row[1] in new)  # of a module's paths that which was trained is the last
    own = {name.split(".")[0] if path in head else module_of(name): path for name, path in names if path in new | also}
    whole = [module for module in own if not is_kept(module, own.keys() - {module})]
    kept = {name: path for name, path in names if is_kept(name, whole)}
    if not modules and EMBEDDING in new & known.keys():
        raise PeftError(
            f"export: {EMBEDDING} was trained beside the prompt, under which PEFT looks tokens up in the base's own: "
            "freeze it, or keep the checkpoint"
        )
    for name, path in kept.items():
        beside = next(own[module] for module in whole if is_kept(name, [module]))
        if path in modules:
            raise PeftError(
                f"export: {beside} was trained beside the adapter on {path}; PEFT has a module adapted or whole: merge "
                f"that adapter, or freeze {beside}"
            )
        if is_weight(nodes[path]):
            raise PeftError(
                f"export: PEFT keeps {path} with {beside}, and it is a {type(nodes[path]).__name__} here: leave it as "
                f"an array, or freeze {beside}"
            )
    return sorted(whole), kept


def task_of(source: Source, modules: Mapping[str, str], kept: Mapping[str, str]) -> str | None:
    """The task; None where the classifier is the base's own or adapted: PEFT would look for it in the folder."""
    held = any(path.startswith("head/") for path in kept.values())
    task = None if _on_head(modules) else _task(source)
    return task if held or task == "CAUSAL_LM" else None


def tying_of(source: Source, modules: Mapping[str, str], kept: Mapping[str, str]) -> dict[str, Any]:
    """The field that ties a head to the embedding which it reads, where that is adapted or kept whole.

    Raises:
      PeftError: PEFT would adapt the embedding alone.
    """
    field, tied = {"ensure_weight_tying": True}, readers(source)
    for path, stage in tied.items():
        if path in modules and not ties_adapters(field, modules[path]):
            raise PeftError(
                f"export: stage {stage} reads {path}, and PEFT would adapt {modules[path]} alone: untie(source) before "
                "adapters are attached"
            )
    return field if tied.keys() & modules.keys() or kept.get("lm_head.weight") in tied else {}


def _on_head(modules: Mapping[str, str]) -> bool:
    return any(path.startswith("head/") for path in modules)


def _task(source: Source) -> str | None:
    return None if source.model.head is None else TASKS.get(source.model.head.kind)
