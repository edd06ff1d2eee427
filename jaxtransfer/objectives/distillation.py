"""Staying near a teacher's outputs: LwF and distillation, of logits and of features; R3F's divergence; Co-Tuning."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.objectives.rows import mean


def logit_loss(
    student: jax.Array, teacher: jax.Array, temperature: float = 2.0, *, weights: jax.Array | None = None
) -> jax.Array:
    """``T^2 mean_i KL(softmax(teacher / T) || softmax(student / T))``, the teacher without gradient.

    Hinton et al. 2015, arXiv:1503.02531; learning without forgetting (Li & Hoiem 2016, arXiv:1606.09282) takes T = 2.
    ``T^2`` keeps the gradient's size; some leave it out. 0 where the two agree.

    Args:
      student: (B, C) logits.
      teacher: (B, C) logits.
      temperature: T > 0.
      weights: (B,) of the rows, or None for 1.

    Example:
      >>> z = jnp.array([[1.0, 2.0]])
      >>> float(logit_loss(z, z))
      0.0
    """
    if temperature <= 0:
        raise ValueError(f"logit_loss: temperature must be positive, got {temperature}")
    told = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature, axis=-1)
    said = jax.nn.log_softmax(student / temperature, axis=-1)
    return temperature**2 * mean(jnp.sum(jnp.exp(told) * (told - said), axis=-1), weights)


def feature_loss(
    student: jax.Array,
    teacher: jax.Array,
    channels: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """``mean_i sum_j w_j (s_ij - t_ij)^2 / 2``, the teacher without gradient; weighted by channel it is DELTA.

    Li et al. 2019, arXiv:1901.09229, with the weights of `channel_weights`. A mean over rows, so that its weight does
    not depend on the batch.

    Args:
      student: (B, ..., d) features.
      teacher: of the same shape.
      channels: w (d,), or None for 1.
      mask: (B, T) of features (B, T, d), 0 where a token is padding; None counts all.
      weights: (B,) of the rows, or None for 1.

    Example:
      >>> float(feature_loss(jnp.ones((2, 3)), jnp.zeros((2, 3))))
      1.5
    """
    apart = student - jax.lax.stop_gradient(teacher)
    squares = apart * apart
    if channels is not None:
        squares = squares * jnp.expand_dims(channels, tuple(range(squares.ndim - 1)))
    if mask is not None:
        squares = squares * mask.astype(squares.dtype)[..., None]
    return mean(jnp.sum(squares.reshape(len(squares), -1), axis=1), weights) / 2.0


def channel_weights(loss: Callable[[jax.Array], jax.Array], features: jax.Array, temperature: float = 1.0) -> jax.Array:
    """``w_c = d softmax_c((L(f without c) - L(f)) / T)``: a channel weighs as much as the loss grows where it is zero.

    The weights of DELTA, before training and for good: ``loss`` is that of a head on the source's frozen features.
    Their mean is 1, so that channels that are all alike give `feature_loss` without weights.

    Args:
      loss: features of `features`' shape -> scalar.
      features: (N, ..., d), at the boundary that is held.
      temperature: T > 0.

    Returns:
      (d,).

    Example:
      >>> first, second = channel_weights(lambda f: jnp.mean((f[:, 0] - 1.0) ** 2), jnp.ones((4, 2)))
      >>> round(float(first), 2), round(float(second), 2)
      (1.46, 0.54)
    """
    if temperature <= 0:
        raise ValueError(f"channel_weights: temperature must be positive, got {temperature}")
    without = jax.lax.map(lambda c: loss(features.at[..., c].set(0.0)), jnp.arange(features.shape[-1]))
    return features.shape[-1] * jax.nn.softmax((without - loss(features)) / temperature)


def symmetric_divergence(first: jax.Array, second: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
    """``mean_i KL(p_i || q_i) + KL(q_i || p_i)`` of two sets of logits (B, C), with gradients to both.

    R3F (Aghajanyan et al. 2021, arXiv:2008.03156) takes it between an input and the same with noise on its embeddings.
    ``weights`` (B,) are of the rows.

    Example:
      >>> z = jnp.array([[1.0, 2.0]])
      >>> float(symmetric_divergence(z, z))
      0.0
    """
    p, q = jax.nn.log_softmax(first, axis=-1), jax.nn.log_softmax(second, axis=-1)
    return mean(jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1), weights)


def class_relation(probabilities: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """``p(source class | target class)``: the mean of the source's predictions over a class's examples (Co-Tuning).

    You et al. 2020, "Co-tuning for transfer learning", by direct averaging. Frozen before training.

    Args:
      probabilities: (N, Z), of the source's own classes on the target's training data.
      labels: (N,) of the target.
      classes: C.

    Returns:
      (C, Z).

    Raises:
      ValueError: a class without examples.

    Example:
      >>> class_relation(np.array([[0.9, 0.1], [0.7, 0.3], [0.0, 1.0]]), np.array([0, 0, 1]), 2).round(2).tolist()
      [[0.8, 0.2], [0.0, 1.0]]
    """
    counts = np.bincount(labels, minlength=classes)
    if counts.min() == 0:
        raise ValueError(f"class_relation: class {int(counts.argmin())} of {classes} has no example")
    return np.stack([probabilities[labels == c].mean(axis=0) for c in range(classes)])


def soft_cross_entropy(logits: jax.Array, targets: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
    """``-mean_i sum_z t_iz log softmax(z_i)_z``, targets without gradient: Co-Tuning's second term.

    Args:
      logits: (B, Z).
      targets: (B, Z) probabilities, such as ``relation[labels]``.
      weights: (B,) of the rows, or None for 1.
    """
    return -mean(jnp.sum(jax.lax.stop_gradient(targets) * jax.nn.log_softmax(logits, axis=-1), axis=-1), weights)
