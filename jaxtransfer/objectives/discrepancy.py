"""How far two domains' features, or two classifiers' predictions, are apart: what domain adaptation makes small."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


def coral(source: jax.Array, target: jax.Array) -> jax.Array:
    """Distance of the covariances: ``|C_s - C_t|_F^2 / (4 d^2)`` (Sun & Saenko 2016, arXiv:1607.01719).

    Others take the mean of the squared differences, four times as much, and add one of the means.

    Args:
      source: (B, d) features, B at least 2.
      target: (B', d).

    Raises:
      ValueError: a batch of one row, which has no covariance.

    Example:
      >>> x = jnp.array([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
      >>> float(coral(x, x)), float(coral(x, 2 * x)) > 0
      (0.0, True)
    """
    _check_rows("coral", 2, source, target)
    difference = _covariance(source) - _covariance(target)
    return jnp.sum(difference * difference) / (4.0 * source.shape[1] ** 2)


def _covariance(x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=0, keepdims=True)
    return centred.T @ centred / (len(x) - 1)


def mmd(
    source: jax.Array,
    target: jax.Array,
    scales: Sequence[float] = SCALES,
    *,
    unbiased: bool = False,
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
    squares = jnp.sum(both * both, axis=1)
    apart = jnp.maximum(squares[:, None] + squares[None, :] - 2.0 * both @ both.T, 0.0)
    width = jax.lax.stop_gradient(jnp.mean(apart))
    width = jnp.where(width > 0, width, 1.0)  # all rows equal
    kernel = jnp.mean(jnp.stack([jnp.exp(-apart / (2.0 * scale * width)) for scale in scales]), axis=0)
    within = [_mean(kernel[rows, rows], unbiased) for rows in (slice(None, n), slice(n, None))]
    return within[0] + within[1] - 2.0 * jnp.mean(kernel[:n, n:])


def _mean(kernel: jax.Array, off_diagonal: bool) -> jax.Array:
    if not off_diagonal:
        return jnp.mean(kernel)
    return (jnp.sum(kernel) - jnp.trace(kernel)) / (len(kernel) * (len(kernel) - 1))


def class_confusion(logits: jax.Array, temperature: float = 2.5) -> jax.Array:
    """Minimum class confusion on the target (Jin et al. 2020, arXiv:1912.03699).

    With ``p = softmax(z / T)`` and rows weighted by their certainty, ``w_i = B (1 + e^-H_i) / sum_j (1 + e^-H_j)``
    without gradient, the confusion matrix ``p' diag(w) p`` is normalised by rows; the loss is what is off its diagonal,
    over the number of classes.

    Args:
      logits: (B, C), of the target.
      temperature: T > 0.

    Example:
      >>> sure = 100.0 * jnp.eye(3)
      >>> round(float(class_confusion(sure)), 6), round(float(class_confusion(jnp.zeros((3, 3)))), 4)
      (0.0, 0.6667)
    """
    if temperature <= 0:
        raise ValueError(f"class_confusion: temperature must be positive, got {temperature}")
    logp = jax.nn.log_softmax(logits / temperature, axis=-1)
    p = jnp.exp(logp)
    certain = jax.lax.stop_gradient(1.0 + jnp.exp(jnp.sum(p * logp, axis=-1)))
    weights = len(logits) * certain / jnp.sum(certain)
    confusion = (p * weights[:, None]).T @ p
    mass = jnp.sum(confusion, axis=1, keepdims=True)
    confusion = confusion / jnp.where(mass > 1e-12, mass, 1.0)  # a class that no row is predicted as confuses nothing
    return (jnp.sum(confusion) - jnp.trace(confusion)) / logits.shape[1]


def classifier_discrepancy(first: jax.Array, second: jax.Array) -> jax.Array:
    """``mean |softmax(z_1) - softmax(z_2)|`` over rows and classes: MCD's distance.

    Saito et al. 2018, arXiv:1712.02560: the classifiers make it large on the target, the features make it small,
    in turn.

    Args:
      first: (B, C) logits of one classifier.
      second: (B, C) logits of the other.

    Example:
      >>> z = jnp.array([[1.0, 2.0]])
      >>> float(classifier_discrepancy(z, z))
      0.0
    """
    return jnp.mean(jnp.abs(jax.nn.softmax(first, axis=-1) - jax.nn.softmax(second, axis=-1)))


def _check_rows(what: str, least: int, *batches: jax.Array) -> None:
    if small := [x.shape for x in batches if x.ndim != 2 or len(x) < least]:
        raise ValueError(f"{what}: features must be (B, d) with at least {least} rows a domain, got {small[0]}")
