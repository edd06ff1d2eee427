"""SetFit: an embedding is tuned on pairs of a few labelled texts, alike or not, before a head is fitted to it.

Tunstall et al. 2022, arXiv:2209.11055. Pairs are drawn by their position: nothing is ever held of all n^2 of them.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.data.examples import Batch, Examples
from jaxtransfer.features.extract import pooled
from jaxtransfer.fewshot.drawing import FewShotError, Members, Stream, members, rows
from jaxtransfer.objectives.losses import Objective, weighted_mean
from jaxtransfer.types import View


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs without end: ``pairs[i]`` is a function of the seed and i alone. From `pairs`."""

    members: Members
    count: int
    seed: int

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(left, right, same)``, each (count,): two examples, and 1.0 where they are of one class, else 0.0.

        Every second pair is alike. An example is on the left once, with one that is alike and one that is not, before
        any is again.
        """
        order, starts, counts, half = self.members.order, self.members.starts, self.members.counts, self.count // 2
        rng = np.random.Generator(np.random.PCG64([self.seed, 1, index]))
        place = self._places(index * half, half)  # in `order`
        own = np.searchsorted(starts, place, side="right") - 1
        start, count = starts[own], counts[own]
        alike = start + rng.integers(0, count - 1)
        alike += alike >= place  # all of the class but the example itself
        other = rng.integers(0, len(order) - count)
        other += np.where(other >= start, count, 0)  # all but the class
        left, right = np.repeat(order[place], 2), np.stack([order[alike], order[other]], axis=1).ravel()
        return left, right, np.tile(np.array([1.0, 0.0], np.float32), half)

    def steps(self, rounds: float = 1) -> int:
        """Batches in which every example is on the left ``2 rounds`` times: once alike, once not, in a round."""
        return math.ceil(2 * rounds * len(self.members.order) / self.count)

    def _places(self, start: int, count: int) -> np.ndarray:
        """``count`` places from ``start`` on, of one permutation of all examples after another."""
        size = len(self.members.order)
        first, last = start // size, (start + count - 1) // size
        drawn = [
            np.random.Generator(np.random.PCG64([self.seed, 0, r])).permutation(size) for r in range(first, last + 1)
        ]
        return np.concatenate(drawn)[start - first * size :][:count]


def pairs(labels: ArrayLike, count: int, seed: int = 0) -> Pairs:
    """Pairs of examples, as many of one class as of two.

    Args:
      labels: (N,) integers.
      count: pairs of a batch, an even number.
      seed: of all draws.

    Raises:
      FewShotError: an odd count, a single class, or a class, named, with one example, which is like no other.

    Example:
      >>> left, right, same = pairs([0, 0, 1, 1], count=4)[0]
      >>> same.tolist(), bool((left != right).all())
      ([1.0, 0.0, 1.0, 0.0], True)
    """
    if count < 2 or count % 2:
        raise FewShotError(f"pairs: count must be an even number, half alike and half not; got {count}")
    return Pairs(members(labels, 2, "pairs"), count, seed)


def pair_batches(examples: Examples, drawn: Pairs, buckets: Sequence[int] = ()) -> Stream:
    """Batches of pairs: both sides in one forward pass.

    Args:
      examples: what the pairs were drawn from.
      drawn: from `pairs`.
      buckets: static lengths of ragged fields.

    Returns:
      Batches of ``2 count`` rows, the left sides before the right ones, with ``same`` (2 count,), 1.0 or 0.0.

    Raises:
      FewShotError: another number of examples than the pairs were drawn from.
    """
    if len(examples) != len(drawn.members.order):
        raise FewShotError(f"pairs were drawn from {len(drawn.members.order)} examples, there are {len(examples)}")

    def batch(position: int) -> Batch:
        left, right, same = drawn[position]
        return {**rows(examples, np.concatenate([left, right]), buckets), "same": np.tile(same, 2)}

    return Stream(batch, (examples.digest(), drawn.members.digest(), drawn.count, drawn.seed, *buckets))


def pair_similarity(*, output: str = "last_hidden_state") -> Objective:
    """Mean squared error of the cosine of two embeddings: ``(cos(z_left, z_right) - same)^2``.

    The embedding is ``outputs[output]``: (B, d), or the mean over its unmasked positions. The view's batch has ``same``
    and ``weight`` (B,), and its rows are B/2 left sides before B/2 right ones: what `pair_batches` makes.

    Args:
      output: the model's output that is the embedding.

    Returns:
      An objective with the metrics ``weight`` (the pairs), ``loss``, and ``accuracy``, the share of pairs on the right
      side of a cosine of 1/2.

    Example:
      >>> z = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
      >>> batch = {"same": jnp.array([1.0, 0.0, 1.0, 0.0]), "weight": jnp.ones(4)}
      >>> loss, metrics = pair_similarity()(View({}, {"last_hidden_state": z}, batch, None, jnp.array(0)))
      >>> float(loss), float(metrics["accuracy"])
      (0.5, 0.5)
    """

    def objective(view: View) -> tuple[jax.Array, dict[str, jax.Array]]:
        z = pooled(output, view.outputs[output], view.batch.get("attention_mask"), "mean")
        if len(z) % 2:
            raise FewShotError(
                f"pair_similarity: a batch of {len(z)} rows is not of pairs, left sides before right ones"
            )
        squares = jnp.sum(z * z, axis=1, keepdims=True)
        unit = z * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))  # whose gradient is finite at 0 too
        left, right = jnp.split(unit, 2)
        same, weight = (view.batch[name][: len(left)].astype(jnp.float32) for name in ("same", "weight"))
        cosine = jnp.sum(left * right, axis=1)
        hits = ((cosine > 0.5) == (same > 0.5)).astype(jnp.float32)
        return weighted_mean(jnp.square(cosine - same), hits, jnp.ones_like(cosine), weight)

    return objective
