"""``adapter_config.json`` of PEFT: what of it is read, what says nothing about the function, and what is refused."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from jaxtransfer.adapt.blend import told_apart
from jaxtransfer.source.orbax_folder import head_of
from jaxtransfer.source.resolve import MARKER, SourceError
from jaxtransfer.source.strictjson import CONFIG_BYTES, MARKER_BYTES, read_object
from jaxtransfer.types import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = {
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "causal-lm": "CAUSAL_LM",
}
_ON, _RATE, _TABLE = (bool, NoneType), (float, int, NoneType), (dict, NoneType)
READ: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "LORA": {
        "r": (int,), "lora_alpha": (int, float), "lora_dropout": _RATE, "use_rslora": _ON, "use_dora": _ON,
        "rank_pattern": _TABLE, "alpha_pattern": _TABLE, "init_lora_weights": (bool, str, NoneType),
        "ensure_weight_tying": _ON,
    },
    "IA3": {"feedforward_modules": (str, list, NoneType)},
    "VERA": {"r": (int,), "vera_dropout": _RATE, "save_projection": (bool,), "projection_prng_key": (int,)},
    "PROMPT_TUNING": {"num_virtual_tokens": (int,), "num_transformer_submodules": (int, NoneType)},
}  # fmt: skip
"""The fields that are read, by method, and what JSON may hold there."""
_HOW_IT_STARTED = "how training started; the tensors are what came of it"
SILENT: Mapping[str, Mapping[str, str]] = {
    "LORA": {
        "eva_config": _HOW_IT_STARTED,
        "qalora_group_size megatron_core": "of use_qalora and megatron_config, which are refused themselves",
    },
    "IA3": {"init_ia3_weights": _HOW_IT_STARTED},
    "VERA": {"d_initial init_weights": _HOW_IT_STARTED},
    "PROMPT_TUNING": {
        "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs": _HOW_IT_STARTED,
        "token_dim num_attention_heads num_layers": "sizes of the base model, which it has itself",
    },
}
"""The fields of a method that say nothing about the function which its tensors do not, and why."""
EVERYWHERE: Mapping[str, str] = {
    "peft_type": "chooses the method",
    "target_modules exclude_modules layers_to_transform layers_pattern": "where adapters are is told by their tensors",
    "modules_to_save": "what was kept whole is told by its tensors",
    "task_type auto_mapping": "which class of theirs is wrapped",
    "base_model_name_or_path revision": "a name; shapes, and the digest in a folder of ours, bind it to its base",
    "fan_in_fan_out": "how their base keeps its kernels; an adapter's tensors are alike under both",
    "inference_mode peft_version": "how PEFT was used",
}
"""The same, of every method; `check_held` sees to it that there are tensors of what the lists of modules name."""
_OFF: tuple[Any, ...] = (None, False, {}, [], "none")
"""What a field that is not supported must be: PEFT's own value for "not used"."""
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""The starts of LoRA that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA move it."""
_LARGEST = float(np.finfo(np.float32).max)
_REASONS = {
    "PREFIX_TUNING": "PEFT's prefixes move the tokens' positions, those of prefix_tuning do not",
}


class PeftError(ValueError):
    """An adapter folder that cannot be read here, or adapters that PEFT has no form for."""


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter folder, every field of which is read, silent, or off.

    Raises:
      PeftError: no such folder, a method or a field that is not supported, by name.
    """
    if not (folder / CONFIG).is_file():
        inside = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")))
        raise PeftError(f"{folder.name}: holds no {CONFIG}{f'; its folders {inside} do: name one' if inside else ''}")
    if not (folder / WEIGHTS).is_file():
        pickled = "; a .bin file is a pickle, which is not read: save it as safetensors"
        raise PeftError(f"{folder.name}: holds no {WEIGHTS}{pickled if any(folder.glob('*.bin')) else ''}")
    raw = read_object(folder / CONFIG, CONFIG_BYTES, PeftError)
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in READ:
        why = f" ({_REASONS[str(kind)]})" if str(kind) in _REASONS else ""
        raise PeftError(f"{folder.name}: peft_type {kind!r} is not supported{why}, only {', '.join(READ)}")
    silent = {field for fields in (*SILENT[kind], *EVERYWHERE) for field in fields.split()}
    for field, value in raw.items():
        _check_type(folder, kind, field, value)
    start = raw.get("init_lora_weights")
    odd = [name for name, value in raw.items() if name not in {*READ[kind], *silent} and value not in _OFF]
    odd += ["init_lora_weights"] if (start.lower() if isinstance(start, str) else start) not in _STARTS else []
    odd += ["num_transformer_submodules"] if raw.get("num_transformer_submodules") not in (None, 1) else []
    if odd:
        raise PeftError(f"{folder.name}: field {odd[0]}={raw[odd[0]]!r} of a {kind} adapter is not supported")
    return raw


def _check_type(folder: Path, kind: str, field: str, value: Any) -> None:
    """Refuses what no field of that name can be."""
    types = READ[kind].get(field, (type(value),))
    if type(value) not in types:
        names = " or ".join("null" if one is NoneType else one.__name__ for one in types)
        raise PeftError(f"{folder.name}: field {field}={value!r} of a {kind} adapter: expected {names}")
    if field.endswith("_dropout") and not 0 <= (value or 0) < 1:
        raise PeftError(f"{folder.name}: field {field}={value!r} of a {kind} adapter: expected a share in [0, 1)")
    if isinstance(value, float | int) and not _is_finite(value):
        raise PeftError(f"{folder.name}: field {field}={value!r} of a {kind} adapter: expected a finite number")
    if field == "r" and field in READ[kind] and value < 1:
        raise PeftError(f"{folder.name}: field {field}={value!r} of a {kind} adapter: expected a rank of 1 or more")


def check_base(source: Source, folder: Path) -> None:
    """An adapter of ours says which base and head it is for: PEFT's own record knows the base by name only.

    Raises:
      PeftError: another base, or a head of another kind or with other labels.
    """
    if not (folder / MARKER).is_file():
        return
    record = read_object(folder / MARKER, MARKER_BYTES, PeftError)
    if (digest := record.get("base")) not in (None, source.lineage.digest):
        raise PeftError(
            f"{folder.name}: is an adapter for the base with digest {str(digest)[:12]}, this is "
            f"{source.lineage.ref} with {source.lineage.digest[:12]}"
        )
    try:
        head = head_of(record.get("head"), folder.name)
    except SourceError as error:
        raise PeftError(str(error)) from None
    if apart := told_apart(head, source.model.head):
        raise PeftError(
            f"{folder.name}: is an adapter trained under {apart[0]}, this model ends in {apart[1]}: swap_head to the "
            "former first"
        )


def check_held(
    folder: Path, raw: Mapping[str, Any], names: Collection[str], adapted: Collection[str], kept: Collection[str]
) -> None:
    """A folder holds tensors of all that its configuration names, or part of it was lost.

    Only what the model has can be missed: for a classifier PEFT itself writes ``["classifier", "score"]``, one of which
    no model has.

    Args:
      folder: of the adapter.
      raw: its configuration.
      names: of all tensors of the model.
      adapted: the modules that the folder has parts of adapters for.
      kept: the names of the tensors that it holds whole.

    Raises:
      PeftError: what the configuration names, and the folder lacks.
    """
    saves, targets = (_listed(raw.get(field)) for field in ("modules_to_save", "target_modules"))
    lost = [entry for entry in saves if _inside(entry, names) and not _inside(entry, kept)]
    if lost or (saves and not any(_inside(entry, kept) for entry in saves)):
        raise PeftError(
            f"{folder.name}: modules_to_save={saves}, but {WEIGHTS} holds no tensor of {(lost or saves)[0]}: save the "
            "adapter again, or take the name off the list"
        )
    if raw["peft_type"] == "PROMPT_TUNING":
        return
    if not adapted:
        raise PeftError(
            f"{folder.name}: target_modules={raw.get('target_modules')!r}, but {WEIGHTS} holds no part of a "
            f"{raw['peft_type']} adapter at all: save it again"
        )
    if any(raw.get(field) not in (None, []) for field in ("exclude_modules", "layers_to_transform", "layers_pattern")):
        return  # which may take all that a name stands for
    whole = [name for name in kept if any(_inside(entry, [name]) for entry in saves)]
    modules, kept_whole = ({name.rpartition(".")[0] for name in some} for some in (names, whole))
    for entry in targets:
        if _ends(entry, modules) and not _ends(entry, {*adapted, *kept_whole}):  # PEFT keeps whole what both lists name
            shown = ", ".join(sorted(adapted)[:3]) + (", ..." if len(adapted) > 3 else "")
            raise PeftError(
                f"{folder.name}: target_modules names {entry}, but {WEIGHTS} holds no part of an adapter of it, only "
                f"of {shown}: save the adapter again, or take the name off the list"
            )


def _listed(value: Any) -> list[str]:
    """The names in a list; an expression, or a word for many, names none."""
    return [str(entry) for entry in value] if isinstance(value, list) else []


def _inside(module: str, names: Collection[str]) -> bool:
    """Whether one of the tensors is a module's, or lies further in."""
    return any(f".{module}." in f".{name}" for name in names)


def _ends(entry: str, modules: Collection[str]) -> bool:
    """Whether PEFT takes the entry for the name of one of the modules."""
    return any(f".{module}".endswith(f".{entry}") for module in modules)


def ties_adapters(raw: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT ties a head's adapter to that of an embedding: it looks for two names of modules, and no others."""
    named, targets = ("embed_tokens", "lm_head"), raw.get("target_modules")
    found = not isinstance(targets, str) or any(_fits(targets, name) for name in named)
    return bool(raw.get("ensure_weight_tying")) and module.rpartition(".")[2] == named[0] and found


def of_pattern(pattern: Mapping[str, Any] | None, module: str, default: float) -> float:
    """The value of ``rank_pattern`` or ``alpha_pattern`` for a module: the first key that fits the end of its name.

    Raises:
      PeftError: a key is no regular expression, or a value no finite number.
    """
    found = next((value for key, value in (pattern or {}).items() if _fits(rf"(.*\.)?({key})", module)), default)
    if type(found) not in (int, float) or not _is_finite(found):
        raise PeftError(f"{module}: rank_pattern or alpha_pattern says {found!r}: expected a finite number")
    return found


def _is_finite(value: float) -> bool:
    """Whether float32 holds a number as such: JSON may have any number of digits."""
    return abs(value) <= _LARGEST


def is_feedforward(modules: str | list[str] | None, module: str) -> bool:
    """Whether (IA)3 acts on a module's inputs: a string is an expression of its whole name, others are ends of it."""
    if isinstance(modules, str):
        return _fits(modules, module)
    return any(module.endswith(str(name)) for name in modules or ())


def _fits(expression: str, module: str) -> bool:
    try:
        return re.fullmatch(expression, module) is not None
    except re.error as error:
        raise PeftError(f"{expression!r} is no regular expression: {error}") from None
