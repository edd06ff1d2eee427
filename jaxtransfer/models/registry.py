"""The registry of families, found by their files, and the strict reading of their configurations."""

import dataclasses
import difflib
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from jaxtransfer.models.names import LoadPlan, MappingError, NameTable
from jaxtransfer.tree.rules import Rules
from jaxtransfer.types import Head, Model

_PACKAGE = __name__.rpartition(".")[0]


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
      other_names: ``other_names(model) -> {library: NameTable}``: names that other libraries save the same model under;
        read, never written.
      hub: whether transformers has classes for it; without them a model is exported with ``format="orbax"``.
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
    other_names: Callable[[Model], Mapping[str, NameTable]] = lambda model: {}
    hub: bool = True


def load_plan(kind: Family, model: Model, names: Collection[str], paths: Sequence[str]) -> LoadPlan:
    """Which tensor fills which path, by the family's own name table, or by another library's where that one fits.

    Raises:
      MappingError: no table fits; the complaint is that of the table that comes nearest.
    """
    errors = []
    for table in (kind.names(model), *kind.other_names(model).values()):
        try:
            return table.load_plan(names, paths)
        except MappingError as error:
            errors.append(error)
    raise min(errors, key=lambda error: error.count)


_REGISTERED: dict[str, Family] = {}


def family(name: str) -> Family:
    """The family of a ``model_type``: a registered one, or what a file of this package declares in its ``FAMILIES``.

    The file of that name is read first (``xlm_roberta`` for ``xlm-roberta``), the others only where it has no such.

    Raises:
      ConfigFieldError: it is not supported; the message lists those that are.
    """
    for declared in chain([_REGISTERED], _declarations(first=name.replace("-", "_"))):
        if name in declared:
            return declared[name]
    near = difflib.get_close_matches(name, families(), 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigFieldError(f"model_type {name!r} is not supported{hint}; supported: {', '.join(families())}")


def families() -> dict[str, Family]:
    """All families by ``model_type``, sorted; reads every file of this package.

    Example:
      >>> families()["xlm-roberta"] is family("xlm-roberta")
      True
    """
    found = {name: kind for declared in _declarations() for name, kind in declared.items()}
    return dict(sorted({**found, **_REGISTERED}.items()))


def register(new: Family) -> None:
    """Adds a family of your own, made outside of this package: its ``model_type`` then loads, trains and exports.

    Raises:
      ValueError: the name is taken.
    """
    if new.name == "foreign" or new.name in families():
        raise ValueError(f"register: there is a family {new.name!r} already; give yours another name")
    _REGISTERED[new.name] = new


def _declarations(first: str = "") -> Iterator[Mapping[str, Family]]:
    """``FAMILIES`` of this package's modules, imported one by one, the module ``first`` before the others."""
    for name in sorted(_modules(), key=lambda module: module != first):
        yield getattr(importlib.import_module(f"{_PACKAGE}.{name}"), "FAMILIES", {})


@functools.cache
def _modules() -> tuple[str, ...]:
    return tuple(info.name for info in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__))


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
    raw: Mapping[str, Any],
    record: type,
    aliases: Mapping[str, str | None],
    ignore: Collection[str],
    *,
    harmless: Collection[str] = (),
    must: Mapping[str, Any] = MUST,
) -> Any:
    """A family's configuration record from a raw configuration, strictly.

    Args:
      raw: the content of ``config.json``.
      record: a dataclass; its fields are what the family reads.
      aliases: the raw name of each field of ``record`` that has another one; None if this family has no such field.
      ignore: raw fields to accept unread.
      harmless: further raw fields of this family that do not change what it computes.
      must: raw fields that change the function and are supported at one value only.

    Raises:
      ConfigFieldError: a field that is missing, has another type, is unknown, or has a value that is not supported.
    """
    named = ((aliases.get(field.name, field.name), field) for field in dataclasses.fields(record))
    fields = {name: field for name, field in named if name is not None}
    values = {}
    for name, value in raw.items():
        if name in fields:
            values[fields[name].name] = _typed(name, value, fields[name])
        elif name in must:
            if value not in (must[name], None) and name not in ignore:
                raise ConfigFieldError(f"config field {name}={value!r} is not supported, only {must[name]!r} is")
        elif name not in HARMLESS and name not in harmless and name not in ignore:
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
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    plain = kind.removesuffix(" | None")
    if value is None and plain != kind:
        return None
    if inner := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", plain):
        if not isinstance(value, (list, tuple)):
            raise ConfigFieldError(f"config field {name}: expected a list, found {value!r}")
        return tuple(_number(f"{name}[{i}]", item, inner[1]) for i, item in enumerate(value))
    return _number(name, value, plain, kind)


LIMITS = (
    (r"num_hidden_layers|num_layers|n_layers?|depths\[\d+\]", 1_000),
    (r"vocab_size", 2**24),
    (r"(hidden|intermediate|embedding|image|patch)_sizes?(\[\d+\])?|n_(embd|inner|heads?)|num_\w*heads|\w*dim", 2**17),
)
"""Numbers beyond which no model was ever made: a slip or an attack, of which building the model would not return."""

_KINDS: Mapping[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool, "dict": dict}


def _number(name: str, value: Any, kind: str, said: str | None = None) -> Any:
    wanted = _KINDS[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigFieldError(f"config field {name}: expected {said or kind}, found {value!r}")
    if kind == "int" and not 0 <= value < 2**31:
        raise ConfigFieldError(f"config field {name}: {value} is out of range")
    limit = next((most for pattern, most in LIMITS if re.fullmatch(pattern, name)), None)
    if kind == "int" and limit is not None and value > limit:
        raise ConfigFieldError(f"config field {name}: {value} is beyond {limit}, the most that is built")
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
