"""Scores of a source's own predictions over its own classes: LEEP and NCE."""

import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.scores.checks import distribution


def leep(probabilities: ArrayLike, labels: ArrayLike) -> float:
    r"""Log expected empirical prediction (Nguyen et al. 2020, arXiv:2002.12462).

    ``mean_i log sum_z P(y_i | z) theta_iz``, with ``P(y, z) = mean_i [y_i = y] theta_iz``: the likelihood of the labels
    under a classifier that reads them off the source's predictions. At most 0.

    Args:
      probabilities: theta (N, Z), over the source's classes. A class that is never predicted takes no part.
      labels: y (N,), integers of the target.

    Raises:
      ScoreError: see `checks.distribution`.

    Example:
      >>> round(leep([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [0, 1, 0]), 4)
      -0.4087
    """
    theta, y = distribution(probabilities, labels)
    joint = np.stack([theta[y == c].sum(axis=0) for c in range(y.max() + 1)])
    mass = joint.sum(axis=0)
    conditional = np.divide(joint, mass, out=np.zeros_like(joint), where=mass > 0)  # of y, given z
    return float(np.mean(np.log((theta @ conditional.T)[np.arange(len(y)), y])))


def nce(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Negative conditional entropy of the labels given the class predicted (Tran et al. 2019, arXiv:1908.08142).

    ``-H(Y | Z) = sum_yz P(y, z) log P(y | z)`` with ``z_i = argmax theta_i``. At most 0.

    Args:
      probabilities: theta (N, Z), over the source's classes.
      labels: y (N,), integers of the target.

    Raises:
      ScoreError: see `checks.distribution`.

    Example:
      >>> nce([[0.9, 0.1], [0.2, 0.8]], [0, 1])
      0.0
    """
    theta, y = distribution(probabilities, labels)
    joint = np.zeros((y.max() + 1, theta.shape[1]))
    np.add.at(joint, (y, theta.argmax(axis=1)), 1.0 / len(y))
    marginal = np.broadcast_to(joint.sum(axis=0), joint.shape)
    there = joint > 0
    return float(np.sum(joint[there] * np.log(joint[there] / marginal[there])))
