"""How far two domains' features, or two classifiers' predictions, are apart: what domain adaptation makes small."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtransfer.objectives.rows import mean, ones

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


def coral(
    source: jax.Array,
    target: jax.Array,
    *,
    source_weights: jax.Array | None = None,
    target_weights: jax.Array | None = None,
) -> jax.Array:
    """Distance of the covariances: ``|C_s - C_t|_F^2 / (4 d^2)`` (Sun & Saenko 2016, arXiv:1607.01719).

    Others take the mean of the squared differences, four times as much, and add one of the means.

    Args:
      source: (B, d) features, B at least 2.
      target: (B', d).
      source_weights: (B,), 0 for rows of padding, or None. Where fewer than two rows count the loss is 0.
      target_weights: (B',).

    Raises:
      ValueError: a batch of one row, which has no covariance.

    Example:
      >>> x = jnp.array([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
      >>> float(coral(x, x)), float(coral(x, 2 * x)) > 0
      (0.0, True)
    """
    _check_rows("coral", 2, source, target)
    s, t = ones(source, source_weights), ones(target, target_weights)
    difference = _covariance(source, s) - _covariance(target, t)
    return _if_counted(2, jnp.sum(difference * difference) / (4.0 * source.shape[1] ** 2), s, t)


def _covariance(x: jax.Array, weights: jax.Array) -> jax.Array:
    centred = jnp.where(weights[:, None] > 0, x - mean(x, weights)[None, :], 0.0)
    return (weights[:, None] * centred).T @ centred / jnp.maximum(jnp.sum(weights) - 1.0, 1.0)


def _if_counted(least: int, value: jax.Array, *weights: jax.Array) -> jax.Array:
    """0 where a batch has fewer rows that count."""
    return jnp.where(jnp.stack([jnp.sum(w) >= least for w in weights]).all(), value, 0.0)


def mmd(
    source: jax.Array,
    target: jax.Array,
    scales: Sequence[float] = SCALES,
    *,
    unbiased: bool = False,
    source_weights: jax.Array | None = None,
    target_weights: jax.Array | None = None,
) -> jax.Array:
    r"""Squared maximum mean discrepancy under a mean of Gaussian kernels (Gretton et al. 2012; DAN: Long et al. 2015).

    ``E k(s, s') + E k(t, t') - 2 E k(s, t)`` with ``k(x, y) = mean_a exp(-|x - y|^2 / (2 a m))``, m the mean squared
    distance over both batches, without gradient. At least 0, and 0 on equal batches; the unbiased form leaves out the
    pairs of a row with itself, is 0 in the mean, and may be negative.

    Args:
      source: (B, d).
      target: (B', d).
      scales: a.
      unbiased: the U-statistic; batches of at least 2 rows.
      source_weights: (B,), 0 for rows of padding, or None. Where too few rows count the loss is 0.
      target_weights: (B',).

    Raises:
      ValueError: a batch too small, or a scale that is not positive.

    Example:
      >>> x = jnp.arange(6.0).reshape(3, 2)
      >>> float(mmd(x, x)), bool(mmd(x, x + 9.0) > 0.5)
      (0.0, True)
    """
    _check_rows("mmd", 1 + unbiased, source, target)
    if not scales or min(scales) <= 0:
        raise ValueError(f"mmd: scales must be positive numbers, got {list(scales)}")
    n, both = len(source), jnp.concatenate([source, target])
    s, t = ones(source, source_weights), ones(target, target_weights)
    w = jnp.concatenate([s, t])
    pairs = w[:, None] * w[None, :]
    both = jnp.where(w[:, None] > 0, both, 0.0)
    squares = jnp.sum(both * both, axis=1)
    apart = jnp.maximum(squares[:, None] + squares[None, :] - 2.0 * both @ both.T, 0.0)
    width = jax.lax.stop_gradient(_mean(apart, pairs))
    width = jnp.where(width > 0, width, 1.0)  # all rows equal
    kernel = jnp.mean(jnp.stack([jnp.exp(-apart / (2.0 * scale * width)) for scale in scales]), axis=0)
    others = pairs - jnp.diag(jnp.diag(pairs)) if unbiased else pairs
    within = [_mean(kernel[rows, rows], others[rows, rows]) for rows in (slice(None, n), slice(n, None))]
    return _if_counted(1 + unbiased, within[0] + within[1] - 2.0 * _mean(kernel[:n, n:], pairs[:n, n:]), s, t)


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-30)


def class_confusion(logits: jax.Array, temperature: float = 2.5, *, weights: jax.Array | None = None) -> jax.Array:
    """Minimum class confusion on the target (Jin et al. 2020, arXiv:1912.03699).

    With ``p = softmax(z / T)`` and rows weighted by their certainty, ``w_i = B (1 + e^-H_i) / sum_j (1 + e^-H_j)``
    without gradient, the confusion matrix ``p' diag(w) p`` is normalised by rows; the loss is what is off its diagonal,
    over the number of classes.

    Args:
      logits: (B, C), of the target.
      temperature: T > 0.
      weights: (B,), 0 for rows of padding, or None.

    Example:
      >>> sure = 100.0 * jnp.eye(3)
      >>> round(float(class_confusion(sure)), 6), round(float(class_confusion(jnp.zeros((3, 3)))), 4)
      (0.0, 0.6667)
    """
    if temperature <= 0:
        raise ValueError(f"class_confusion: temperature must be positive, got {temperature}")
    logp = jax.nn.log_softmax(logits / temperature, axis=-1)
    p = jnp.exp(logp)
    counted = ones(logits, weights)
    certain = jax.lax.stop_gradient(counted * (1.0 + jnp.exp(jnp.sum(p * logp, axis=-1))))
    certain = jnp.sum(counted) * certain / jnp.maximum(jnp.sum(certain), 1e-30)
    confusion = (p * certain[:, None]).T @ p
    mass = jnp.sum(confusion, axis=1, keepdims=True)
    confusion = confusion / jnp.where(mass > 1e-12, mass, 1.0)  # a class that no row is predicted as confuses nothing
    return (jnp.sum(confusion) - jnp.trace(confusion)) / logits.shape[1]


def classifier_discrepancy(first: jax.Array, second: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
    """``mean |softmax(z_1) - softmax(z_2)|`` over rows and classes: MCD's distance.

    Saito et al. 2018, arXiv:1712.02560: the classifiers make it large on the target, the features make it small,
    in turn.

    Args:
      first: (B, C) logits of one classifier.
      second: (B, C) logits of the other.
      weights: (B,), 0 for rows of padding, or None.

    Example:
      >>> z = jnp.array([[1.0, 2.0]])
      >>> float(classifier_discrepancy(z, z))
      0.0
    """
    apart = jnp.abs(jax.nn.softmax(first, axis=-1) - jax.nn.softmax(second, axis=-1))
    return mean(jnp.mean(apart, axis=-1), weights)


def _check_rows(what: str, least: int, *batches: jax.Array) -> None:
    if small := [x.shape for x in batches if x.ndim != 2 or len(x) < least]:
        raise ValueError(f"{what}: features must be (B, d) with at least {least} rows a domain, got {small[0]}")
