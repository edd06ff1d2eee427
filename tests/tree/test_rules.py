import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtransfer.tree import REQUIRED, Rule, RuleError, flatten, match
from jaxtransfer.tree.rules import match_paths, nearest, winning_rules
from tests.tree.test_paths import Pair
from tests.tree.trees import trees

TREE = {
    "embed": {"word": 0},
    "blocks": {"0": {"kernel": 1, "bias": 2}, "1": {"kernel": 3, "bias": 4}},
    "head": {"kernel": 5, "bias": 6},
}


def test_the_first_match_wins():
    found = flatten(match([(r"head/.*", "b"), (r".*/kernel", "a"), (r".*", "c")], TREE))
    assert found == {
        "embed/word": "c",
        "blocks/0/kernel": "a",
        "blocks/0/bias": "c",
        "blocks/1/kernel": "a",
        "blocks/1/bias": "c",
        "head/kernel": "b",
        "head/bias": "b",
    }


def test_patterns_match_whole_paths_only():
    with pytest.raises(RuleError, match="'head' matches none of 7 leaves"):
        match([("head", 1)], TREE, default=0)


def test_uncovered_leaves_are_listed_with_the_rules():
    with pytest.raises(RuleError, match=r"no rule covers 3 of 7 leaves: embed/word, head/bias, head/kernel; rules: \["):
        match([(r"blocks/.*", 1)], TREE)


def test_a_long_list_of_uncovered_leaves_is_cut():
    with pytest.raises(RuleError, match="a7 and 2 more; rules"):
        match_paths([("b", 1)], ["b", *(f"a{i}" for i in range(10))])


def test_a_default_covers_the_rest_even_when_it_is_none():
    assert match([(r"head/kernel", 1)], {"head": {"kernel": 0, "bias": 0}}, default=None) == {
        "head": {"kernel": 1, "bias": None}
    }
    assert repr(REQUIRED) == "REQUIRED"


def test_a_rule_that_matches_nothing_shows_the_nearest_paths():
    with pytest.raises(RuleError, match=r"'haed/kernel' matches none of 7 leaves; nearest paths: head/kernel"):
        match([("haed/kernel", 1)], TREE, default=0)
    with pytest.raises(RuleError, match="the tree is empty"):
        match([(".*", 1)], {})


def test_a_shadowed_rule_names_those_that_shadow_it():
    rules = [(r"blocks/0/.*", 1), (r"blocks/1/.*", 2), (r"blocks/\d+/bias", 3)]
    with pytest.raises(RuleError) as error:
        match(rules, TREE, default=0)
    text = str(error.value)
    assert r"'blocks/\\d+/bias' never wins: each of its 2 leaves" in text
    assert "the earlier 'blocks/0/.*', 'blocks/1/.*'" in text


def test_optional_rules_may_match_nothing_or_be_shadowed():
    rules = [Rule("no/such", 1, optional=True), ("head/.*", 2), Rule("head/bias", 3, optional=True)]
    assert flatten(match(rules, TREE, default=0))["head/bias"] == 2


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (("blocks/(", 1), r"rule 'blocks/\(' is not a regular expression: "),
        (("a",), "a rule is"),
        ("ab", "a rule is"),
        ((1, 2), "a rule is"),
    ],
)
def test_what_is_no_rule_is_refused(rule, complaint):
    with pytest.raises(RuleError, match=complaint):
        match([rule], TREE, default=0)


def test_a_part_is_matched_by_its_own_path_and_by_its_weights():
    tree = {"q": {"kernel": Pair(0, 1), "bias": 2}}
    found = flatten(match([(r"q/kernel@scale", "adapter"), (r"q/kernel", "frozen"), (r".*", "rest")], tree))
    assert found == {"q/kernel@base": "frozen", "q/kernel@scale": "adapter", "q/bias": "rest"}
    with pytest.raises(RuleError, match=r"'q/kernel@scale' never wins.*the earlier 'q/kernel'"):
        match([(r"q/kernel", 1), (r"q/kernel@scale", 2)], tree, default=0)


def test_winning_rules_give_indices():
    assert winning_rules([("a", 0), (".", 0)], ["b", "a", "cc"]) == {"b": 1, "a": 0, "cc": None}


def test_nearest_ignores_the_syntax_of_regular_expressions():
    assert nearest(r"blocks/\d+/kernel$", ["embed/word", "blocks/3/kernel"], 1) == "blocks/3/kernel"


@given(trees(), st.data())
def test_match_keeps_the_structure_and_gives_every_leaf_one_value(tree, data):
    chosen = data.draw(st.sampled_from(list(flatten(tree))))
    found = match([(re.escape(chosen), 1)], tree, default=0)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert {path for path, value in flatten(found).items() if value} == {chosen}
