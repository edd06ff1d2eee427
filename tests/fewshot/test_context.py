"""Prompts hold the most useful examples that a budget has room for, of every label as many."""

import itertools

import numpy as np
import pytest

from jaxtransfer import fewshot
from jaxtransfer.fewshot import FewShotError, Prompt, Template
from tests.language import byte_tokenizer

EXAMPLES = [(f"text {i}", label) for i, label in enumerate("aaaabbbc")]


def count(text):
    return {"input_ids": text.split()}


def counts(found):
    return np.bincount(["abc".index(EXAMPLES[i][1]) for i in found.used], minlength=3).tolist()


def test_without_a_limit_all_examples_stand_in_the_given_order():
    found = fewshot.prompt("what", EXAMPLES, count, budget=100)
    assert found.used == tuple(range(8)) and found.tokens == 8 * 3 + 1
    assert found.text == "".join(f"{text}\n{label}\n\n" for text, label in EXAMPLES) + "what\n"


def test_labels_take_turns_and_the_first_are_kept():
    used = [fewshot.prompt("what", EXAMPLES, count, budget=1 + 3 * k).used for k in range(9)]
    assert used[3] == (0, 4, 7) and used[5] == (0, 1, 4, 5, 7) and used[1] == (0,)
    assert [counts(fewshot.prompt("what", EXAMPLES, count, budget=1 + 3 * k)) for k in (3, 5, 7, 8)] == [
        [1, 1, 1], [2, 2, 1], [3, 3, 1], [4, 3, 1],
    ]  # fmt: skip
    assert all(set(a) < set(b) for a, b in itertools.pairwise(used))


def test_the_most_useful_are_kept_and_stand_next_to_the_query():
    useful = [0.1, 0.9, 0.2, 0.3, 0.5, 0.8, 0.4, 0.0]
    found = fewshot.prompt("what", EXAMPLES, count, budget=1 + 3 * 5, useful=useful)
    assert found.used == (7, 3, 4, 5, 1)
    assert found.text.endswith("text 1\na\n\nwhat\n")


def test_the_budget_holds_for_the_whole_prompt_with_its_special_tokens():
    tokenizer = byte_tokenizer(bos=True)
    template = Template(example="Q: {text}\nA: {label}\n", query="Q: {text}\nA:", instruction="Say a or b.\n")
    sizes = []
    for budget in range(30, 140, 7):
        found = fewshot.prompt("what?", EXAMPLES, tokenizer, budget=budget, template=template)
        assert found.tokens == len(tokenizer(found.text)["input_ids"]) <= budget
        assert found.text.startswith("Say a or b.\n") and found.text.endswith("Q: what?\nA:")
        more = len("Q: text 0\nA: a\n")
        assert len(found.used) == 8 or found.tokens + more > budget
        sizes.append(len(found.used))
    assert sizes[0] == 0 and sizes == sorted(sizes) and sizes[-1] > 5


def test_braces_in_texts_are_texts():
    found = fewshot.prompt("{text}", [("{label}", "{}")], count, budget=9)
    assert found == Prompt("{label}\n{}\n\n{text}\n", (0,), 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: fewshot.prompt("one two three", EXAMPLES, count, budget=2),
            "query is 3 tokens long, and the budget is 2",
        ),
        (lambda: fewshot.prompt("what", EXAMPLES, count, budget=9, useful=[1.0]), "1 numbers .* 8 examples"),
        (lambda: Template(example="{text}"), "has no place {label}"),
        (lambda: Template(query="what"), "has no place {text}"),
    ],
)
def test_refused(call, words):
    with pytest.raises(FewShotError, match=words):
        call()
