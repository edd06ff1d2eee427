"""Model cards: reading the front matter of a source's README.md, writing the card of an export."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.types import Source

FRONT_MATTER_BYTES = 1 << 16
PIPELINES = {
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
    "image-classification": "image-classification",
    "distilled-image-classification": "image-classification",
    None: "feature-extraction",
}


class CardWarning(UserWarning):
    """A model card that cannot be read: licence and base model are unknown."""


def read_card(path: Path) -> dict[str, Any]:
    r"""The front matter of a model card; empty where there is none.

    What cannot be read gives a :class:`CardWarning` and no front matter: no model's function hangs on its card.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp(), "README.md")
      >>> _ = path.write_text("---\nlicense: mit\n---\n# A model")
      >>> read_card(path)
      {'license': 'mit'}
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader without aliases, of which 400 bytes can stand for billions of entries."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases are not read")
            return super().compose_node(parent, index)

    with open(path, "rb") as file:
        text = file.read(FRONT_MATTER_BYTES).decode("utf-8", "replace").lstrip("\ufeff")
    found = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    if not found:
        return {}
    try:
        front = yaml.load(found[1], Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = str(error).split("\n")[0] if not isinstance(error, RecursionError) else "nested too deeply"
        warnings.warn(CardWarning(f"{path.name}: front matter not read ({reason}); licence unknown"), stacklevel=2)
        return {}
    return {str(key): value for key, value in front.items()} if isinstance(front, dict) else {}


def text_of(value: Any) -> str | None:
    """A field that cards give as a string or as a list of strings; None for anything else."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) < 1000 else None


def card_text(source: Source, name: str, format: str, metrics: Mapping[str, Any] | None = None) -> str:
    """The README.md of an exported model: licence, base model, lineage, metrics, how to load it."""
    import yaml

    lineage, head = source.lineage, source.model.head
    front = {
        "license": text_of(lineage.license) or "unknown",
        "base_model": text_of(_base(source)),
        "library_name": {"hf": "transformers", "peft": "peft"}.get(format, "jaxtransfer"),
        "pipeline_tag": PIPELINES.get(head.kind if head else None),
        "tags": ["jaxtransfer", source.model.family],
    }
    header = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True)
    rows = [("Source", lineage.ref), ("Source digest (SHA-256)", lineage.digest)]
    rows += [(label, value) for label, value in (("Commit", lineage.commit), ("Licence", lineage.license)) if value]
    rows += [("Files", "; ".join(f"{file} {sha}" for file, sha in lineage.files.items()))] if lineage.files else []
    parts = [f"---\n{header}---\n\n# {_plain(name)}\n", "Adapted with jaxtransfer.\n", _table("Lineage", rows)]
    if lineage.operations:
        steps = "\n".join(f"{i}. {_plain(step)}" for i, step in enumerate(lineage.operations, 1))
        parts.append(f"## What was done\n\n{steps}\n")
    if lineage.dropped:
        parts.append(_table("Tensors of the source that were not used", list(lineage.dropped.items())))
    if metrics:
        parts.append(_table("Metrics", [(key, _number(value)) for key, value in metrics.items()]))
    if not lineage.license:
        parts.append("The source's card names no licence: find out before you pass this model on.\n")
    return "\n".join([*parts, _usage(source, format)])


def lineage_record(source: Source) -> dict[str, Any]:
    """Lineage as plain JSON, without the fingerprints, which belong to the parameters in memory."""
    record = dataclasses.asdict(dataclasses.replace(source.lineage, fingerprints={}))
    return {key: value for key, value in record.items() if key != "fingerprints"}


def _base(source: Source) -> str | None:
    """The hub id of what was adapted: the source itself, or what its own card says it came from."""
    return source.lineage.ref if source.lineage.commit else source.lineage.base_model


def _usage(source: Source, format: str) -> str:
    if format == "orbax":
        return '## Use\n\n```python\nimport jaxtransfer\n\nsource = jaxtransfer.load("FOLDER")  # this folder\n```\n'
    if format == "peft":
        return (
            "## Use\n\n```python\nimport jaxtransfer\n\n"
            'source = jaxtransfer.load("BASE")  # the source above, under the head that was trained\n'
            'source = jaxtransfer.load_adapter(source, "FOLDER")  # this folder; PEFT reads it too\n```\n'
        )
    classes = {
        "sequence-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
        "question-answering": "AutoModelForQuestionAnswering",
        "masked-lm": "AutoModelForMaskedLM",
        "causal-lm": "AutoModelForCausalLM",
        "image-classification": "AutoModelForImageClassification",
        "distilled-image-classification": "DeiTForImageClassificationWithTeacher",  # no AutoModel loads it
    }
    kind = source.model.head.kind if source.model.head else None
    auto = classes.get(kind or "", "AutoModel")
    name, reader = ("processor", "AutoImageProcessor") if _sees(source) else ("tokenizer", "AutoTokenizer")
    return (
        "## Use\n\n```python\n"
        f"from transformers import {reader}, {auto}\n\n"
        'folder = "."  # this folder\n'
        f"{name} = {reader}.from_pretrained(folder)\n"
        f"model = {auto}.from_pretrained(folder)\n```\n"
    )


def _sees(source: Source) -> bool:
    """Whether images are what the model reads."""
    return hasattr(source.model.config, "num_channels")


def _table(title: str, rows: list[tuple[str, Any]]) -> str:
    body = "\n".join(f"| {_plain(str(key))} | {_plain(str(value))} |" for key, value in rows)
    return f"## {title}\n\n| | |\n|---|---|\n{body}\n"


def _number(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_number, value))
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _plain(text: str) -> str:
    """Text that stays text in Markdown and in a terminal."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([|<>`*\[\]\\])", r"\\\1", shown)
