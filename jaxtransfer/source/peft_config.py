"""``adapter_config.json`` of PEFT: what of it is read, what says nothing about the function, and what is refused."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from jaxtransfer.source.resolve import MARKER
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
"""The same, of every method."""
_OFF: tuple[Any, ...] = (None, False, {}, [], "none")
"""What a field that is not supported must be: PEFT's own value for "not used"."""
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""The starts of LoRA that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA move it."""
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


def check_base(source: Source, folder: Path) -> None:
    """An adapter of ours says which base it is for: PEFT's own record knows it by name only.

    Raises:
      PeftError: another one.
    """
    if (folder / MARKER).is_file():
        digest = read_object(folder / MARKER, MARKER_BYTES, PeftError).get("base")
        if digest not in (None, source.lineage.digest):
            raise PeftError(
                f"{folder.name}: is an adapter for the base with digest {str(digest)[:12]}, this is "
                f"{source.lineage.ref} with {source.lineage.digest[:12]}"
            )


def of_pattern(pattern: Mapping[str, Any] | None, module: str, default: float) -> float:
    """The value of ``rank_pattern`` or ``alpha_pattern`` for a module: the first key that fits the end of its name.

    Raises:
      PeftError: a key is no regular expression, or a value no number.
    """
    found = next((value for key, value in (pattern or {}).items() if _fits(rf"(.*\.)?({key})", module)), default)
    if type(found) not in (int, float):
        raise PeftError(f"{module}: rank_pattern or alpha_pattern says {found!r}: expected a number")
    return found


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
