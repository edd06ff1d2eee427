"""The closed registry of families, and the strict reading of their configuration files."""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxtransfer.models.names import NameTable
from jaxtransfer.tree.rules import Rules
from jaxtransfer.types import Head, Model

_MODULES = {
    "bert": "jaxtransfer.models.bert",
    "distilbert": "jaxtransfer.models.distilbert",
    "roberta": "jaxtransfer.models.roberta",
    "xlm-roberta": "jaxtransfer.models.roberta",
}


class ConfigFieldError(ValueError):
    """A model configuration that is not supported; the message names the field."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of architectures.

    Attributes:
      name: Hugging Face's ``model_type``.
      architectures: Hugging Face class name -> head kind, None for the bare model.
      build: ``build(raw_config, head, *, pooler=None, ignore=()) -> Model``; ``pooler``: whether a bare trunk has one.
      rehead: ``rehead(model, head) -> Model``: the same trunk under another head.
      names: ``names(model) -> NameTable``.
      export_config: ``export_config(model, raw_config) -> raw config`` of the adapted model.
      tensor_rules: path -> PartitionSpec entries for tensor parallelism.
    """

    name: str
    architectures: Mapping[str, str | None]
    build: Callable[..., Model]
    rehead: Callable[[Model, Head | None], Model]
    names: Callable[[Model], NameTable]
    export_config: Callable[[Model, Mapping[str, Any]], dict[str, Any]]
    tensor_rules: Rules


def family(name: str) -> Family:
    """The family of a ``model_type``.

    Raises:
      ConfigFieldError: it is not supported; the message lists those that are.
    """
    if name not in _MODULES:
        near = difflib.get_close_matches(name, _MODULES, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigFieldError(f"model_type {name!r} is not supported{hint}; supported: {', '.join(sorted(_MODULES))}")
    return importlib.import_module(_MODULES[name]).FAMILIES[name]


_READ_ELSEWHERE = "architectures model_type id2label label2id num_labels problem_type"
_ANY_MODEL = """
    _name_or_path _commit_hash transformers_version dtype torch_dtype torchscript return_dict use_cache
    output_attentions output_hidden_states output_past chunk_size_feed_forward gradient_checkpointing prefix
    tie_encoder_decoder xla_device tf_legacy_loss cross_attention_hidden_size finetuning_task task_specific_params
    tokenizer_class bos_token_id eos_token_id sep_token_id decoder_start_token_id _attn_implementation
    attn_implementation _attn_implementation_autoset"""
_GENERATION = """
    do_sample early_stopping max_length min_length num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens eos_token_ids"""
_PUBLISHED = """
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    tie_weights_ name language"""

HARMLESS = frozenset(" ".join([_READ_ELSEWHERE, _ANY_MODEL, _GENERATION, _PUBLISHED]).split())
"""Fields that do not change what an encoder computes: read elsewhere; of any transformers configuration, old ones too;
about generation, which old versions wrote into every file; and leftovers in published files that nothing reads."""

MUST: Mapping[str, Any] = {
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "use_bfloat16": False,
    "sinusoidal_pos_embds": False,
}
"""Fields that change the function and are supported at one value only."""


def read_fields(
    raw: Mapping[str, Any], record: type, aliases: Mapping[str, str | None], ignore: Collection[str]
) -> Any:
    """A family's configuration record from a raw configuration, strictly.

    Args:
      raw: the content of ``config.json``.
      record: a dataclass; its fields are what the family reads.
      aliases: the raw name of each field of ``record`` that has another one; None if this family has no such field.
      ignore: raw fields to accept unread.

    Raises:
      ConfigFieldError: a field that is missing, has another type, is unknown, or has a value that is not supported.
    """
    named = ((aliases.get(field.name, field.name), field) for field in dataclasses.fields(record))
    fields = {name: field for name, field in named if name is not None}
    values = {}
    for name, value in raw.items():
        if name in fields:
            values[fields[name].name] = _typed(name, value, fields[name])
        elif name in MUST:
            if value not in (MUST[name], None) and name not in ignore:
                raise ConfigFieldError(f"config field {name}={value!r} is not supported, only {MUST[name]!r} is")
        elif name not in HARMLESS and name not in ignore:
            near = difflib.get_close_matches(name, fields, 1)
            raise ConfigFieldError(
                f"config field {name}={value!r} is unknown and may change what the model computes"
                + (f" (did you mean {near[0]!r}?)" if near else "")
                + f"; if it does not, load with ignore=({name!r},)"
            )
    required = [raw_name for raw_name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if fields[name].name not in values]:
        raise ConfigFieldError(f"config lacks {', '.join(missing)}")
    return record(**values)


def _typed(name: str, value: Any, field: Any) -> Any:
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool, "float | None": (int, float, type(None))}
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    wanted = kinds[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigFieldError(f"config field {name}: expected {kind}, found {value!r}")
    if kind == "int" and not 0 <= value < 2**31:
        raise ConfigFieldError(f"config field {name}: {value} is out of range")
    return value


def labels_of(raw: Mapping[str, Any], default: int = 2) -> tuple[str, ...]:
    """The classes' names from ``id2label`` or ``num_labels``.

    Raises:
      ConfigFieldError: the ids are not 0 to n-1, or ``num_labels`` is no positive number.
    """
    table = raw.get("id2label")
    if isinstance(table, Mapping) and table:
        if {str(key) for key in table} != {str(i) for i in range(len(table))}:
            raise ConfigFieldError(f"config field id2label: ids must be 0 to {len(table) - 1}, found {list(table)[:8]}")
        return tuple(str(table.get(str(i), table.get(i))) for i in range(len(table)))
    count = raw.get("num_labels", default)
    if type(count) is not int or count < 1:
        raise ConfigFieldError(f"config field num_labels: expected a positive int, found {count!r}")
    return tuple(f"LABEL_{i}" for i in range(count))


def with_head(raw: Mapping[str, Any], head: Head | None, architecture: str) -> dict[str, Any]:
    """A raw configuration for the export of a model with this head."""
    out = {key: value for key, value in raw.items() if key not in ("auto_map", "num_labels", "id2label", "label2id")}
    out["architectures"] = [architecture]
    if head is not None and head.labels:
        out["id2label"] = {str(i): label for i, label in enumerate(head.labels)}
        out["label2id"] = {label: i for i, label in enumerate(head.labels)}
    return out
