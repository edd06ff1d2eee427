"""Classifiers without training: the nearest class mean, and the nearest examples."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxtransfer.probes.checks import ProbeError, matrix, targets


def prototypes(features: ArrayLike, labels: ArrayLike, classes: int) -> jax.Array:
    """The mean of each class: ``c_k = mean_{y_i = k} z_i`` (Snell et al. 2017, arXiv:1703.05175, equation 1).

    Args:
      features: z (N, d).
      labels: y (N,), integers below ``classes``.
      classes: C.

    Returns:
      (C, d); in traced code, where it cannot be refused, NaN for a class without examples.

    Raises:
      ProbeError: shapes or labels that do not fit, or a class without examples.

    Example:
      >>> prototypes([[0.0, 2.0], [2.0, 4.0], [5.0, 5.0]], [0, 0, 1], classes=2).tolist()
      [[1.0, 3.0], [5.0, 5.0]]
    """
    z = matrix(features)
    member = jax.nn.one_hot(targets(labels, len(z), classes), classes, dtype=z.dtype)
    return (member.T @ z) / jnp.sum(member, axis=0)[:, None]


def classify_by_prototypes(features: ArrayLike, centres: ArrayLike) -> jax.Array:
    """Log-probabilities of classes by their distance: ``log softmax_k(-|z - c_k|^2)``.

    The distance is squared: the softmax is then linear in z, and that of Gaussian classes of variance 1/2 (Snell et al.
    2017, arXiv:1703.05175, equation 2).

    Args:
      features: z (M, d).
      centres: c (C, d).

    Returns:
      (M, C).

    Raises:
      ProbeError: shapes that do not fit.

    Example:
      >>> jnp.exp(classify_by_prototypes([[0.0], [1.0]], [[0.0], [2.0]])).round(3).tolist()
      [[0.982..., 0.018...], [0.5, 0.5]]
    """
    z, c = matrix(features), matrix(centres, "centres")
    if z.shape[1] != c.shape[1]:
        raise ProbeError(f"features {z.shape} and centres {c.shape}: differ in width")
    # |z|^2 is the same for all classes. Without a common offset the two other terms do not cancel.
    origin = jnp.mean(c, axis=0, keepdims=True)
    z, c = z - origin, c - origin
    return jax.nn.log_softmax(2.0 * z @ c.T - jnp.sum(c * c, axis=1)[None, :], axis=1)


def nearest_neighbours(
    features: ArrayLike,
    bank: ArrayLike,
    labels: ArrayLike,
    classes: int,
    *,
    k: int = 20,
    temperature: float = 0.1,
) -> jax.Array:
    """The vote of the k most similar examples: ``p_c ~ sum_{i in kNN} [y_i = c] exp(cos(z, b_i) / T)``.

    Features are normalised first (Wu et al. 2018, arXiv:1805.01978, section 3.4, with k = 200 and T = 0.07).

    Args:
      features: z (M, d).
      bank: b (N, d), of known labels.
      labels: y (N,), integers below ``classes``.
      classes: C.
      k: neighbours, at most N.
      temperature: T > 0.

    Returns:
      (M, C) probabilities.

    Raises:
      ProbeError: shapes, labels, ``k`` or ``temperature`` that do not fit.

    Example:
      >>> nearest_neighbours([[1.0, 0.1]], [[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [0, 1, 1], 2, k=1).tolist()
      [[1.0, 0.0]]
    """
    z, b = matrix(features), matrix(bank, "bank")
    y = targets(labels, len(b), classes, least=0)
    if z.shape[1] != b.shape[1]:
        raise ProbeError(f"features {z.shape} and bank {b.shape}: differ in width")
    if not 1 <= k <= len(b):
        raise ProbeError(f"k: {k} neighbours of {len(b)} examples; take 1 to {len(b)}")
    if temperature <= 0:
        raise ProbeError(f"temperature: must be positive, got {temperature}")
    similarity, near = jax.lax.top_k(_unit(z) @ _unit(b).T, k)
    votes = jax.nn.softmax(similarity / temperature, axis=1)
    return jnp.einsum("mk,mkc->mc", votes, jax.nn.one_hot(y[near], classes, dtype=votes.dtype))


def _unit(x: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True))
    return x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)
