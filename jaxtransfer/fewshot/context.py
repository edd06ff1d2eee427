"""Examples in the prompt of a causal model: as many as a budget of tokens holds, of every label as many."""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtransfer.fewshot.drawing import FewShotError


@dataclasses.dataclass(frozen=True)
class Template:
    r"""How a prompt is written: the instruction, the examples, the query.

    Attributes:
      example: of one, with ``{text}`` and ``{label}``.
      query: with ``{text}``; where it ends the model goes on.
      instruction: what comes first.
    """

    example: str = "{text}\n{label}\n\n"
    query: str = "{text}\n"
    instruction: str = ""

    def __post_init__(self) -> None:
        for name, places in (("example", ("{text}", "{label}")), ("query", ("{text}",))):
            if missing := [place for place in places if place not in getattr(self, name)]:
                raise FewShotError(f"template: {name} {getattr(self, name)!r} has no place {missing[0]}")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, the examples in it by their positions in the order in which they stand, and its length in tokens."""

    text: str
    used: tuple[int, ...]
    tokens: int


def prompt(
    query: str,
    examples: Sequence[tuple[str, str]],
    tokenizer: Any,
    *,
    budget: int,
    template: Template | None = None,
    useful: Sequence[float] | None = None,
) -> Prompt:
    r"""The examples that help most, as many as fit, before the query.

    Labels take turns, each giving its most useful example that is left; from the end of this order examples are dropped
    until the whole prompt, special tokens and all, is within the budget. (In-context learning: Brown et al. 2020,
    arXiv:2005.14165. Choosing by similarity: Liu et al. 2022, arXiv:2101.06804.)

    Args:
      query: the text to be labelled.
      examples: texts and their labels.
      tokenizer: of the model that will read the prompt.
      budget: tokens that the prompt may have: the model's positions, less what it is to write.
      template: how it is written.
      useful: of each example, such as its similarity to the query: the more useful stand nearer to the query. None is
        the given order, in which the first are kept, and stand.

    Raises:
      FewShotError: the query alone, with the instruction, is over the budget; or another number of ``useful``.

    Example:
      >>> by_words = lambda text: {"input_ids": text.split()}
      >>> some = [("good film", "yes"), ("fine film", "yes"), ("bad film", "no")]
      >>> prompt("a film", some, by_words, budget=8, useful=[0.1, 0.3, 0.2])
      Prompt(text='bad film\nno\n\nfine film\nyes\n\na film\n', used=(2, 1), tokens=8)
    """
    how = Template() if template is None else template
    if useful is not None and len(useful) != len(examples):
        raise FewShotError(f"prompt: {len(useful)} numbers say how useful {len(examples)} examples are")
    turns = _in_turn([label for _, label in examples], useful)

    def written(count: int) -> Prompt:
        kept = sorted(turns[:count], key=lambda i: (0.0 if useful is None else useful[i], i))
        shown = [how.example.format(text=examples[i][0], label=examples[i][1]) for i in kept]
        text = "".join([how.instruction, *shown, how.query.format(text=query)])
        return Prompt(text, tuple(kept), len(tokenizer(text)["input_ids"]))

    if (alone := written(0)).tokens > budget:
        raise FewShotError(
            f"prompt: without an example the query is {alone.tokens} tokens long, and the budget is {budget}; cut the "
            "query, or the instruction"
        )
    # An example is a token at least, and more examples are never fewer tokens.
    most = min(len(turns), budget)
    fitting = bisect.bisect_right(range(1, most + 1), budget, key=lambda count: written(count).tokens)
    return written(fitting)


def _in_turn(labels: Sequence[str], useful: Sequence[float] | None) -> list[int]:
    """The examples from the most useful to the least, label by label in turn."""
    best = sorted(range(len(labels)), key=lambda i: (0.0 if useful is None else -useful[i], i))
    given: dict[str, int] = {}
    turn = {}
    for i in best:
        turn[i] = given[labels[i]] = given.get(labels[i], -1) + 1
    return sorted(best, key=lambda i: turn[i])  # stable: within a turn by use
