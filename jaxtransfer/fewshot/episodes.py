"""Prototypical networks: classification tasks drawn from many classes, and the loss of telling their queries apart."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.data.examples import Batch, Examples
from jaxtransfer.features.extract import pooled
from jaxtransfer.fewshot.drawing import FewShotError, Members, Stream, members, rows
from jaxtransfer.objectives.losses import Objective, weighted_mean
from jaxtransfer.probes import classify_by_prototypes
from jaxtransfer.types import View


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """One task: ``classes`` (ways,) by label, and the examples ``support`` (ways, shots) and ``queries`` (ways, Q)."""

    classes: np.ndarray
    support: np.ndarray
    queries: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Episodes:
    """Tasks without end: ``episodes[i]`` is a function of the seed and i alone. From `episodes`."""

    members: Members
    ways: int
    shots: int
    queries: int
    seed: int

    def __getitem__(self, index: int) -> Episode:
        """The classes by chance, and of each so many of its examples, all of them different."""
        rng = np.random.Generator(np.random.PCG64([self.seed, index]))
        chosen = rng.choice(len(self.members.names), self.ways, replace=False)
        starts, counts, each = self.members.starts, self.members.counts, self.shots + self.queries
        drawn = [starts[c] + rng.choice(counts[c], each, replace=False) for c in chosen]
        found = self.members.order[np.stack(drawn)]
        return Episode(self.members.names[chosen], found[:, : self.shots], found[:, self.shots :])


def episodes(labels: ArrayLike, ways: int, shots: int, queries: int, seed: int = 0) -> Episodes:
    """Tasks of ``ways`` classes with ``shots`` examples and ``queries`` questions of each (Vinyals et al. 2016).

    Args:
      labels: (N,) integers, of the examples to draw from.
      ways: classes of an episode, at least 2.
      shots: known examples of each.
      queries: examples of each to be told.
      seed: of all draws.

    Raises:
      FewShotError: fewer than two ways, more than there are classes, no shots or queries, or a class, named, with fewer
        than ``shots + queries`` examples.

    Example:
      >>> found = episodes([5, 5, 5, 8, 8, 8, 9, 9, 9], ways=2, shots=1, queries=2)[0]
      >>> found.support.shape, found.queries.shape, len({*found.support.flat, *found.queries.flat})
      ((2, 1), (2, 2), 6)
    """
    if ways < 2 or shots < 1 or queries < 1:
        raise FewShotError(
            f"episodes: ways {ways}, shots {shots}, queries {queries}; an episode has two classes at least, and an "
            "example and a query of each"
        )
    found = members(labels, shots + queries, f"episodes of {shots} shots and {queries} queries")
    if ways > len(found.names):
        raise FewShotError(f"episodes: {ways} ways, but there are {len(found.names)} classes")
    return Episodes(found, ways, shots, queries, seed)


def episode_batches(examples: Examples, drawn: Episodes, buckets: Sequence[int] = ()) -> Stream:
    """One episode a batch, support and queries in one forward pass.

    Args:
      examples: what the episodes were drawn from.
      drawn: from `episodes`.
      buckets: static lengths of ragged fields.

    Returns:
      Batches of ``ways (shots + queries)`` rows with ``labels`` from 0 to ``ways - 1``, and ``support``, 1 for the
      known examples and 0 for the queries.

    Raises:
      FewShotError: another number of examples than the episodes were drawn from.
    """
    if len(examples) != len(drawn.members.order):
        raise FewShotError(f"episodes were drawn from {len(drawn.members.order)} examples, there are {len(examples)}")
    sizes = [drawn.ways * drawn.shots, drawn.ways * drawn.queries]
    labels = np.concatenate([np.repeat(np.arange(drawn.ways, dtype=np.int32), n) for n in (drawn.shots, drawn.queries)])
    support = np.repeat(np.array([1.0, 0.0], np.float32), sizes)

    def batch(position: int) -> Batch:
        episode = drawn[position]
        index = np.concatenate([episode.support.ravel(), episode.queries.ravel()])
        return {**rows(examples, index, buckets), "labels": labels, "support": support}

    settings = (drawn.members.digest(), *(drawn.ways, drawn.shots, drawn.queries, drawn.seed), *buckets)
    return Stream(batch, (examples.digest(), *settings))


def prototypical(ways: int, *, output: str = "last_hidden_state") -> Objective:
    """Mean cross-entropy of the queries by their distance from the support's means (Snell et al. 2017).

    ``-log softmax_k(-|z - c_k|^2)_y`` with ``c_k`` the mean embedding of class k's support (arXiv:1703.05175, algorithm
    1). The embedding is ``outputs[output]``: (B, d), or the mean over its unmasked positions.

    The view's batch has ``labels`` (B,) from 0 to ``ways - 1``, ``support`` (B,) of 1 and 0, and ``weight`` (B,): what
    `episode_batches` makes. A class without support has no mean, and the loss is then no number.

    Args:
      ways: classes of an episode.
      output: the model's output that is the embedding.

    Returns:
      An objective with the metrics ``weight`` (the queries), ``loss`` and ``accuracy``.

    Raises:
      FewShotError: fewer than two ways.

    Example:
      >>> z = jnp.array([[0.0], [2.0], [0.5], [1.8]])
      >>> batch = {"labels": jnp.array([0, 1, 0, 1]), "support": jnp.array([1.0, 1, 0, 0]), "weight": jnp.ones(4)}
      >>> _, metrics = prototypical(2)(View({}, {"last_hidden_state": z}, batch, None, jnp.array(0)))
      >>> float(metrics["accuracy"]), float(metrics["weight"])
      (1.0, 2.0)
    """
    if ways < 2:
        raise FewShotError(f"prototypical: ways must be 2 at least, got {ways}")

    def objective(view: View) -> tuple[jax.Array, dict[str, jax.Array]]:
        z = pooled(output, view.outputs[output], view.batch.get("attention_mask"), "mean")
        labels, weight = view.batch["labels"], view.batch["weight"].astype(jnp.float32)
        support = view.batch["support"].astype(jnp.float32)
        member = jax.nn.one_hot(labels, ways, dtype=jnp.float32) * (support * weight)[:, None]
        logp = classify_by_prototypes(z, (member.T @ z) / jnp.sum(member, axis=0)[:, None])
        losses = -jnp.take_along_axis(logp, labels[:, None], axis=1)[:, 0]
        hits = (jnp.argmax(logp, axis=1) == labels).astype(jnp.float32)
        return weighted_mean(losses, hits, jnp.ones_like(losses), weight * (1.0 - support))

    return objective
