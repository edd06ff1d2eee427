"""From a text to its continuation, piece by piece."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from jaxtransfer.data.dataset import half_character
from jaxtransfer.data.documents import prompt_tokens
from jaxtransfer.generation.loop import stream
from jaxtransfer.generation.prompts import GenerationError
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import Model

_BROKEN = "\N{REPLACEMENT CHARACTER}"


def stream_text(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    key: jax.Array | None = None,
    **options: Any,
) -> Iterator[str]:
    """The continuation of a text in pieces, as they are made.

    Args:
      tokenizer: a fast one of transformers'.
      prompt: of at least one token; they are those that `data.documents.prompt_tokens` makes for training too.
      eos_token_id: what ends the text; None is the tokenizer's own end token. `data.text.end_tokens` are all that the
        model's files name.
      options: ``dtype``; all as in `generate`.

    Raises:
      GenerationError: a prompt without tokens or with half a character, besides what `generate` raises; at the call.
    """
    if half := half_character(prompt):
        raise GenerationError(f"prompt: holds {half}")
    ids = next(prompt_tokens([prompt], tokenizer))
    if not ids:
        raise GenerationError(f"prompt: {prompt!r} has no tokens; the tokenizer's start is {tokenizer.bos_token!r}")
    columns = stream(
        model, params, [ids], max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        eos_token_id=tokenizer.eos_token_id if eos_token_id is None else eos_token_id, key=key, **options,
    )  # fmt: skip
    return pieces((int(column[0]) for column in columns), tokenizer)


def pieces(tokens: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Tokens as pieces of text; joined, they are the tokenizer's decoding of all, without its special tokens.

    Tokens of byte-level tokenizers may end inside a character: it is held back until it is whole. What is still not
    whole when the tokens end comes out as the replacement character, as in the decoding of all.
    """

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    last: list[int] = []  # the tokens of the last piece: what decodes to a space behind them may vanish without them
    held: list[int] = []
    for token in tokens:
        held.append(token)
        new = text([*last, *held])[len(text(last)) :]
        if new and not new.endswith(_BROKEN):
            yield new
            last, held = held, []
    if new := text([*last, *held])[len(text(last)) :]:
        yield new
