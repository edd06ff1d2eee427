"""What PEFT calls a model's tensors: as transformers has them in memory, which for some families is not as in files."""

from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate

from jaxtransfer.models.registry import family
from jaxtransfer.source.peft_config import PeftError
from jaxtransfer.types import Source

Rows = Mapping[str, tuple[str, str]]
"""Our path -> their name, and how the array turns."""
DECODER, EMBEDDING = "head/decoder/kernel", "embed/word/embedding"
"""A language model's own decoder: where the head is tied there is none, but their name of it."""
_ATTENTION = (
    *((f"attention.attention.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value")),
    ("attention.output.dense", "attention.o_proj"),
)
_VIT = (("encoder.layer.", "layers."), *_ATTENTION, ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"))
IN_MEMORY: Mapping[str, tuple[tuple[str, str], ...]] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": (*_ATTENTION, ("mlp.weights_out", "mlp.down_proj")),
}
"""Family -> what stands in the names of files, and what transformers 5 has in its place; one after the other."""
_SPLIT = {"dinov2": (".mlp.weights_in.", "gate_proj and up_proj")}
"""Family -> a kernel of files that is two modules in memory."""


def rows_of(source: Source, paths: Iterable[str], tensors: Collection[str] = ()) -> Rows:
    """The rows of a model's parameters.

    Args:
      source: of the model.
      paths: ours.
      tensors: the names in a folder, which may be those of files; PEFT writes those in memory.
    """
    table = family(source.model.family).names(source.model)
    rows = table.export_names(paths, with_prefix=source.model.head is not None)
    renamed = IN_MEMORY.get(source.model.family, ())
    if any(old in name for name in tensors for old, _ in renamed):
        return rows
    for old, new in renamed:
        rows = {path: (theirs.replace(old, new), how) for path, (theirs, how) in rows.items()}
    return rows


def check_split(source: Source, names: Mapping[str, str]) -> None:
    """Refuses what no single module in memory is; ``names``: path -> their name.

    Raises:
      PeftError: by our path.
    """
    part, modules = _SPLIT.get(source.model.family, ("/", ""))
    if found := [path for path, theirs in names.items() if part in theirs]:
        raise PeftError(
            f"export: {found[0]} is one array here, and {modules} in PEFT: leave it as it was loaded, or export the "
            "merged model with format='hf'"
        )


def readers(source: Source) -> dict[str, str]:
    """Path -> the stage that reads it though it is another's: a tied head, of the embedding."""
    return {path: stage.name for stage in source.model.stages for path in stage.reads}


def copies_of(source: Source, rows: Rows) -> dict[str, str]:
    """Path -> their second name of what a language model's head shares, where PEFT may come to have two."""
    table = family(source.model.family).names(source.model)
    copies = {copy.ours: copy.theirs for copy in table.copies}
    decoder = next((entry.theirs for entry in table.entries if entry.ours == DECODER), None)
    if decoder is None or not (tied := readers(source)):
        return copies
    bias = f"{module_of(decoder)}.bias"
    beside = {"head/bias": bias} if rows.get("head/bias", (bias,))[0] != bias else {}
    return {**copies, **dict.fromkeys(tied, decoder), **beside}


def module_of(tensor: str) -> str:
    """The module that a tensor is a parameter of."""
    return tensor.rpartition(".")[0]


def is_kept(tensor: str, whole: Collection[str]) -> bool:
    """Whether PEFT keeps a tensor whole for these ``modules_to_save``: it asks how the names of modules end."""
    return any(module.endswith(tuple(whole)) for module in accumulate(tensor.split(".")[:-1], "{}.{}".format))


def prefix_of(kind: str) -> str:
    """What stands before their names: around a prompt's model there is one wrapper less."""
    return "base_model." if kind == "PROMPT_TUNING" else "base_model.model."
