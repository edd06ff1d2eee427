"""``adapter_config.json`` of PEFT: what of it is read, what says nothing about the function, and what is refused."""

import re
from collections.abc import Mapping
from pathlib import Path
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
READ = {
    "LORA": "r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern init_lora_weights "
    "ensure_weight_tying",
    "IA3": "feedforward_modules",
    "VERA": "r vera_dropout save_projection projection_prng_key",
    "PROMPT_TUNING": "num_virtual_tokens num_transformer_submodules",
}
"""The fields that are read, by method."""
SILENT = {
    "LORA": "eva_config megatron_core qalora_group_size",  # how it started; sizes of what is refused by its own field
    "IA3": "init_ia3_weights",
    "VERA": "d_initial init_weights",
    "PROMPT_TUNING": """token_dim num_attention_heads num_layers prompt_tuning_init prompt_tuning_init_text
        tokenizer_name_or_path tokenizer_kwargs""",
}
"""The fields of a method that say nothing about the function that its tensors do not."""
EVERYWHERE = """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules
    exclude_modules modules_to_save layers_to_transform layers_pattern fan_in_fan_out"""
"""The same, of every method: where adapters are is told by their tensors."""
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
    if kind not in READ:
        why = f" ({_REASONS[kind]})" if kind in _REASONS else ""
        raise PeftError(f"{folder.name}: peft_type {kind!r} is not supported{why}, only {', '.join(READ)}")
    known = {*READ[kind].split(), *SILENT[kind].split(), *EVERYWHERE.split()}
    start = raw.get("init_lora_weights")
    odd = [field for field, value in raw.items() if field not in known and value not in _OFF]
    odd += ["init_lora_weights"] if (start.lower() if isinstance(start, str) else start) not in _STARTS else []
    odd += ["num_transformer_submodules"] if raw.get("num_transformer_submodules") not in (None, 1) else []
    if odd:
        raise PeftError(f"{folder.name}: field {odd[0]}={raw[odd[0]]!r} of a {kind} adapter is not supported")
    return raw


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


def of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of ``rank_pattern`` or ``alpha_pattern`` for a module: the first key that fits the end of its name."""
    try:
        found = (value for key, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module))
        return next(found, default)
    except re.error as error:
        raise PeftError(f"a key of rank_pattern or alpha_pattern is no regular expression: {error}") from None


def is_feedforward(modules: str | list[str] | None, module: str) -> bool:
    """Whether (IA)3 acts on a module's inputs: a string is an expression of its whole name, others are ends of it."""
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module.endswith(name) for name in modules or ())
