"""Losses of unlabelled predictions: entropy (TENT), information maximisation (SHOT), pseudo-labels."""

import jax
import jax.numpy as jnp

from jaxtransfer.objectives.rows import mean, ones


def entropy(logits: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
    """``mean_i H(softmax(z_i))`` in nats: what TENT minimises (Wang et al. 2021, arXiv:2006.10726).

    There only the scales and shifts of normalisations train, under the batch's own statistics.

    Args:
      logits: (B, C).
      weights: (B,) of the rows, or None for 1.

    Example:
      >>> round(float(entropy(jnp.zeros((2, 4)))), 4)
      1.3863
    """
    return mean(_entropies(jax.nn.log_softmax(logits, axis=-1)), weights)


def _entropies(logp: jax.Array) -> jax.Array:
    # Where a probability underflows, p log p is 0 and not 0 times minus infinity.
    return -jnp.sum(jnp.where(jnp.isfinite(logp), jnp.exp(logp) * logp, 0.0), axis=-1)


def information_maximisation(logits: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
    """``mean_i H(p_i) - H(mean_i p_i)``: sure of each row, and of no class for all (SHOT: Liang et al. 2020).

    arXiv:2002.08546, equations 4 and 5. At least ``-log C``, and at most 0.

    Args:
      logits: (B, C), of the target; the classifier behind the features is frozen.
      weights: (B,), 0 for rows of padding, or None.

    Example:
      >>> sure, unsure = 100.0 * jnp.eye(4), jnp.zeros((2, 4))
      >>> float(information_maximisation(unsure)), round(float(information_maximisation(sure)), 4)
      (0.0, -1.3863)
    """
    logp = jax.nn.log_softmax(logits, axis=-1)
    counted = ones(logits, weights)
    total = jnp.sum(counted)
    shares = jnp.where(total > 0, counted, 1.0) / jnp.where(total > 0, total, float(len(logits)))
    middle = jax.nn.logsumexp(logp, axis=0, b=shares[:, None])
    return jnp.where(total > 0, mean(_entropies(logp), counted) - _entropies(middle), 0.0)


def centroid_labels(features: jax.Array, logits: jax.Array, rounds: int = 2) -> jax.Array:
    """Pseudo-labels by the nearest class centroid in angle (Liang et al. 2020, arXiv:2002.08546, section 3.3).

    Centroids are means of the features weighted by the predictions at first, then by the labels of the round before.
    A class to which nothing is near keeps its centroid. Over the whole target, not over a batch.

    Args:
      features: (N, d).
      logits: (N, C).
      rounds: at least 1; SHOT takes 2.

    Returns:
      (N,) int32.

    Example:
      >>> x = jnp.array([[1.0, 0.1], [1.0, -0.1], [0.1, 1.0]])
      >>> centroid_labels(x, jnp.array([[2.0, 0.0], [-0.1, 0.0], [0.0, 2.0]])).tolist()
      [0, 0, 1]
    """
    if rounds < 1:
        raise ValueError(f"centroid_labels: rounds must be 1 or more, got {rounds}")
    points = unit(features)
    weights = jax.nn.softmax(logits, axis=-1)
    centroids = jnp.zeros((logits.shape[1], points.shape[1]), points.dtype)
    labels = jnp.argmax(logits, axis=-1)
    for _ in range(rounds):
        mass = jnp.sum(weights, axis=0)[:, None]
        centroids = jnp.where(mass > 0, weights.T @ points / jnp.where(mass > 0, mass, 1.0), centroids)
        labels = jnp.argmax(points @ normalised(centroids).T, axis=-1)
        weights = jax.nn.one_hot(labels, logits.shape[1], dtype=points.dtype)
    return labels.astype(jnp.int32)


def unit(features: jax.Array) -> jax.Array:
    """What SHOT compares in angle: rows (N, d) with a 1 behind them, (N, d + 1), of length 1."""
    return normalised(jnp.concatenate([features, jnp.ones((len(features), 1), features.dtype)], axis=1))


def normalised(x: jax.Array) -> jax.Array:
    """Rows of length 1; a row of zeros stays."""
    norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1.0)


def confident_labels(logits: jax.Array, threshold: float = 0.95) -> tuple[jax.Array, jax.Array]:
    """The predicted classes (B,), and which are at least as probable as ``threshold`` (Lee 2013), without gradient.

    Example:
      >>> labels, kept = confident_labels(jnp.array([[5.0, 0.0], [0.0, 0.1]]))
      >>> labels.tolist(), kept.tolist()
      ([0, 1], [True, False])
    """
    p = jax.lax.stop_gradient(jax.nn.softmax(logits, axis=-1))
    return jnp.argmax(p, axis=-1), jnp.max(p, axis=-1) >= threshold


def pseudo_label_loss(logits: jax.Array, labels: jax.Array, kept: jax.Array) -> jax.Array:
    """Mean cross-entropy over the rows that are kept; 0 where none is.

    Args:
      logits: (B, C).
      labels: (B,) classes.
      kept: (B,) bool.
    """
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), labels[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(kept, losses, 0.0)) / jnp.maximum(jnp.sum(kept.astype(jnp.float32)), 1.0)
