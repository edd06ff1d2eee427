"""Episodes and pairs: functions of the seed and the position, of what they promise, refused by name."""

import tracemalloc

import numpy as np
import pytest

from jaxtransfer import fewshot
from jaxtransfer.data.loader import Examples
from jaxtransfer.fewshot import FewShotError

LABELS = np.random.default_rng(0).permutation(np.repeat([3, 4, 7, 9], [12, 5, 9, 6]))


# --- episodes --------------------------------------------------------------------------------------------------------


def test_an_episode_has_so_many_different_examples_of_so_many_classes():
    drawn = fewshot.episodes(LABELS, ways=3, shots=2, queries=3, seed=1)
    classes = set()
    for i in range(40):
        episode = drawn[i]
        assert episode.support.shape == (3, 2) and episode.queries.shape == (3, 3)
        assert len({*episode.support.flat, *episode.queries.flat}) == 15 and len(set(episode.classes)) == 3
        for rows in (episode.support, episode.queries):
            np.testing.assert_array_equal(LABELS[rows], np.broadcast_to(episode.classes[:, None], rows.shape))
        classes.add(tuple(sorted(episode.classes)))
    assert len(classes) == 4  # all threes of four


def test_an_episode_is_a_function_of_seed_and_index():
    first, again, other = (fewshot.episodes(LABELS, 2, 1, 2, seed=seed) for seed in (5, 5, 6))
    for i in (7, 0, 3):  # in any order
        np.testing.assert_array_equal(first[i].queries, again[i].queries)
    assert any((first[i].support != other[i].support).any() for i in range(5))
    assert any((first[i].support != first[i + 1].support).any() for i in range(5))


def test_the_batch_of_an_episode_is_its_support_and_then_its_queries():
    examples = Examples(fixed={"inputs": np.arange(len(LABELS), dtype=np.float32)})
    drawn = fewshot.episodes(LABELS, ways=2, shots=2, queries=1, seed=0)
    batch = fewshot.episode_batches(examples, drawn).batch(4)
    episode = drawn[4]
    np.testing.assert_array_equal(batch["inputs"], [*episode.support.ravel(), *episode.queries.ravel()])
    np.testing.assert_array_equal(batch["labels"], [0, 0, 1, 1, 0, 1])
    np.testing.assert_array_equal(batch["support"], [1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(batch["weight"], 1.0)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_are_what_they_say_and_never_of_an_example_with_itself():
    drawn = fewshot.pairs(LABELS, count=10, seed=2)
    partners = {True: set(), False: set()}
    for i in range(600):
        left, right, same = drawn[i]
        assert (left != right).all()
        np.testing.assert_array_equal(LABELS[left] == LABELS[right], same > 0.5)
        assert same.sum() == 5
        for a, b, alike in zip(left, right, same > 0.5, strict=True):
            partners[bool(alike)].add((a, b))
    together = LABELS[:, None] == LABELS[None, :]
    assert len(partners[True]) == together.sum() - len(LABELS)  # all that there are
    assert len(partners[False]) > 0.85 * (~together).sum()


@pytest.mark.parametrize("count", [2, 10, 200])  # less than the examples, and several rounds of them in a batch
def test_every_example_is_on_the_left_equally_often(count):
    drawn = fewshot.pairs(LABELS, count=count, seed=0)
    steps = drawn.steps(rounds=7)
    seen = np.zeros((2, len(LABELS)), int)
    for i in range(steps):
        left, _, same = drawn[i]
        np.add.at(seen, (same.astype(int), left), 1)
    assert (seen[0] == seen[1]).all()
    assert seen.min() >= 7 and np.ptp(seen[0]) <= 1 and seen[0].sum() == steps * count // 2


def test_pairs_are_a_function_of_seed_and_index():
    first, again, other = (fewshot.pairs(LABELS, 6, seed) for seed in (5, 5, 6))
    for i in (70, 0, 31):
        for a, b in zip(first[i], again[i], strict=True):
            np.testing.assert_array_equal(a, b)
    assert any((first[i][1] != other[i][1]).any() for i in range(5))


def test_the_memory_of_pairs_does_not_grow_with_their_number():
    labels = np.arange(200_000) % 5  # 2e10 pairs
    drawn = fewshot.pairs(labels, count=16, seed=0)
    drawn[0]
    tracemalloc.start()
    for i in range(3):
        drawn[100 + i]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * labels.nbytes  # a permutation or two


def test_pairs_of_a_class_with_two_examples():
    drawn = fewshot.pairs([0, 1, 1, 0], count=4)
    for i in range(20):
        left, right, same = drawn[i]
        assert set(map(tuple, np.sort(np.stack([left, right], 1)[same > 0], axis=1))) <= {(0, 3), (1, 2)}


def test_the_batch_of_pairs_is_all_left_sides_and_then_all_right_ones():
    examples = Examples(ragged={"input_ids": [np.full(2 + i % 5, i, np.int32) for i in range(len(LABELS))]})
    drawn = fewshot.pairs(LABELS, count=4, seed=0)
    batch = fewshot.pair_batches(examples, drawn, buckets=(4, 8)).batch(3)
    left, right, same = drawn[3]
    np.testing.assert_array_equal(batch["input_ids"][:, 0], [*left, *right])
    np.testing.assert_array_equal(batch["same"], [*same, *same])
    longest = 2 + (np.concatenate([left, right]) % 5).max()
    assert batch["input_ids"].shape == (8, 4 if longest <= 4 else 8)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_where_its_state_was_taken_and_refuses_that_of_another():
    examples = Examples(fixed={"inputs": np.arange(len(LABELS), dtype=np.float32)})

    def stream(seed=0, count=4):
        return fewshot.pair_batches(examples, fewshot.pairs(LABELS, count, seed))

    first, again = stream(), stream()
    batches = [next(first) for _ in range(5)]
    next(again), next(again)
    resumed = stream()
    resumed.restore(again.state())
    for batch in batches[2:]:
        np.testing.assert_array_equal(next(resumed)["inputs"], batch["inputs"])
    for other in (stream(seed=1), stream(count=6)):
        with pytest.raises(FewShotError, match="counts in stream"):
            other.restore(again.state())
    episodes = fewshot.episode_batches(examples, fewshot.episodes(LABELS, 2, 1, 1))
    with pytest.raises(FewShotError, match="counts in stream"):
        episodes.restore(again.state())


# --- what is refused -------------------------------------------------------------------------------------------------

THREE = Examples(fixed={"x": np.zeros(3)})


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: fewshot.episodes([4, 4, 4], 2, 1, 1), "3 examples of 1 class"),
        (lambda: fewshot.episodes([4, 4, 5, 6, 6], 2, 1, 1), r"needs 2 examples; class 5 has 1 \(1 such"),
        (lambda: fewshot.episodes(LABELS, 5, 1, 1), "5 ways, but there are 4 classes"),
        (lambda: fewshot.episodes(LABELS, 1, 1, 1), "ways 1"),
        (lambda: fewshot.episodes(LABELS, 2, 0, 1), "shots 0"),
        (lambda: fewshot.episodes([[0, 1]], 2, 1, 1), r"must be \(N,\) integers"),
        (lambda: fewshot.pairs([0, 0, 1], 2), "every class needs 2 examples; class 1 has 1"),
        (lambda: fewshot.pairs(LABELS, 3), "count must be an even number"),
        (lambda: fewshot.pairs(["a", "b"], 2), "must be .* integers, got <U1"),
        (
            lambda: fewshot.pair_batches(THREE, fewshot.pairs([0, 0, 1, 1], 2)),
            "drawn from 4 examples, there are 3",
        ),
        (
            lambda: fewshot.episode_batches(
                Examples(fixed={"x": np.zeros(3)}), fewshot.episodes([0, 0, 1, 1], 2, 1, 1)
            ),
            "drawn from 4 examples, there are 3",
        ),
    ],
)
def test_refused(call, words):
    with pytest.raises(FewShotError, match=words):
        call()
