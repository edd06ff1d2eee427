"""Features from which no discriminator tells the domain: gradient reversal, DANN and CDAN."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.objectives.rows import mean, ones

_WIDEST = 4096


@jax.custom_vjp
def reverse_gradient(x: jax.Array, scale: jax.Array | float) -> jax.Array:
    """The identity, whose gradient is multiplied by ``-scale`` (Ganin et al. 2016, arXiv:1505.07818).

    Behind it, what a discriminator minimises the features maximise, in one step. ``scale`` may be traced.

    Example:
      >>> float(jax.grad(lambda x: reverse_gradient(x, 0.5) ** 2)(3.0))
      -3.0
    """
    return x


reverse_gradient.defvjp(
    lambda x, scale: (x, scale),
    lambda scale, g: (-jnp.asarray(scale, g.dtype) * g, jnp.zeros_like(jnp.asarray(scale))),
)


def ramp(progress: jax.Array | float, steepness: float = 10.0) -> jax.Array:
    """From 0 to 1 over the training: ``2 / (1 + exp(-10 p)) - 1``, p in [0, 1] (Ganin et al. 2016, section 5.2.2).

    Example:
      >>> [round(float(ramp(p)), 3) for p in (0.0, 0.1, 1.0)]
      [0.0, 0.462, 1.0]
    """
    return 2.0 / (1.0 + jnp.exp(-steepness * jnp.asarray(progress, jnp.float32))) - 1.0


def init_discriminator(key: jax.Array, inputs: int, width: int = 256) -> dict[str, Any]:
    """Parameters of `discriminate`: two hidden layers, He-normal kernels and zero biases."""
    sizes = (inputs, width, width, 1)
    return {
        str(i): {
            "kernel": jax.random.normal(jax.random.fold_in(key, i), (n, m), jnp.float32) * (2.0 / n) ** 0.5,
            "bias": jnp.zeros(m, jnp.float32),
        }
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    }


def discriminate(params: Mapping[str, Any], features: jax.Array) -> jax.Array:
    """Logits (B,) of a row's being of the source domain, of features (B, inputs)."""
    x = features
    for i in range(len(params)):
        x = x @ params[str(i)]["kernel"] + params[str(i)]["bias"][None, :]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x[:, 0]


def domain_loss(
    source: jax.Array,
    target: jax.Array,
    source_weights: jax.Array | None = None,
    target_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Binary cross-entropy of a discriminator, the mean of both domains' means, and its accuracy likewise.

    ``(E_s[-log sigmoid(z)] + E_t[-log sigmoid(-z)]) / 2``: log 2 and 1/2 where it tells nothing. Ganin et al. write
    the sum, twice as much.

    Args:
      source: (B,) logits.
      target: (B',) logits.
      source_weights: (B,) of the rows, or None.
      target_weights: (B',).

    Example:
      >>> loss, accuracy = domain_loss(jnp.zeros(2), jnp.zeros(3))
      >>> round(float(loss), 4)
      0.6931
    """
    s, t = (lambda x: mean(x, source_weights)), (lambda x: mean(x, target_weights))
    loss = s(-jax.nn.log_sigmoid(source)) + t(-jax.nn.log_sigmoid(-target))
    hits = s((source > 0).astype(jnp.float32)) + t((target < 0).astype(jnp.float32))
    return loss / 2.0, hits / 2.0


def conditioned(features: jax.Array, logits: jax.Array) -> jax.Array:
    """What CDAN's discriminator sees: the products ``f_i softmax(z)_c``, the predictions without gradient.

    Long et al. 2018, arXiv:1705.10667, the multilinear map.

    Args:
      features: (B, d).
      logits: (B, C), with ``d C`` at most 4,096; of more, take fewer features first.

    Returns:
      (B, d C).

    Raises:
      ValueError: the product is wider.

    Example:
      >>> conditioned(jnp.ones((2, 3)), jnp.zeros((2, 2))).shape
      (2, 6)
    """
    if (width := features.shape[1] * logits.shape[1]) > _WIDEST:
        raise ValueError(
            f"conditioned: {features.shape[1]} features x {logits.shape[1]} classes are {width}, more than {_WIDEST}; "
            "give `random`, the width of a random map of them (random_map)"
        )
    p = jax.lax.stop_gradient(jax.nn.softmax(logits, axis=-1))
    return (features[:, :, None] * p[:, None, :]).reshape(len(features), width)


def random_map(key: jax.Array, features: jax.Array, logits: jax.Array, width: int = 1024) -> jax.Array:
    """`conditioned` in fewer dimensions: ``(R f) * (R' softmax(z)) / sqrt(width)`` by two fixed normal matrices.

    Its inner products are those of the multilinear map in the mean. ``key`` must be the same at every step.

    Returns:
      (B, width).
    """
    p = jax.lax.stop_gradient(jax.nn.softmax(logits, axis=-1))
    of_features, of_classes = (
        x @ jax.random.normal(k, (x.shape[1], width), x.dtype)
        for k, x in zip(jax.random.split(key), (features, p), strict=True)
    )
    return of_features * of_classes / width**0.5


def entropy_weights(logits: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
    """Weights of rows that are predicted surely, ``1 + exp(-H)``, with mean 1 and without gradient (CDAN+E).

    Args:
      logits: (B, C).
      weights: (B,), 0 for rows of padding, or None.

    Returns:
      (B,), 0 for rows of padding.
    """
    logp = jax.nn.log_softmax(logits, axis=-1)
    counted = ones(logits, weights)
    certain = jax.lax.stop_gradient(1.0 + jnp.exp(jnp.sum(jnp.exp(logp) * logp, axis=-1)))
    middle = mean(certain, weights)
    return counted * certain / jnp.where(middle > 0, middle, 1.0)
