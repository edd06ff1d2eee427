"""What scores are computed of: features or probabilities in float64, and the classes that there are examples of."""

import numpy as np
from numpy.typing import ArrayLike


class ScoreError(ValueError):
    """Features, probabilities or labels that no score can be computed of; the message names the array."""


def checked(values: ArrayLike, labels: ArrayLike, name: str = "features") -> tuple[np.ndarray, np.ndarray]:
    """``values`` (N, D) as float64, and the labels as positions (N,) among the C classes that occur.

    Raises:
      ScoreError: shapes that do not go together, values that are not finite, labels that are no integers, or examples
        of fewer than two classes.
    """
    array, given = np.asarray(values, np.float64), np.asarray(labels)
    if array.ndim != 2 or given.ndim != 1 or len(array) != len(given):
        raise ScoreError(f"{name} must be (N, D) and labels (N,), got {array.shape} and {given.shape}")
    if not np.issubdtype(given.dtype, np.integer):
        raise ScoreError(f"labels must be integers, one a row, got {given.dtype}")
    if bad := np.flatnonzero(~np.isfinite(array).all(axis=1)).tolist():
        raise ScoreError(f"{name}: row {bad[0]} of {len(array)} is not finite ({len(bad)} such rows)")
    classes, positions = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise ScoreError(f"labels: {len(array)} rows of {len(classes)} class; a score needs two classes at least")
    return array, positions


def distribution(values: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """As `checked`, of rows that are probabilities.

    Raises:
      ScoreError: a negative value, or a row whose sum is more than 1e-3 from 1, besides.
    """
    array, positions = checked(values, labels, "probabilities")
    wrong = (array < 0).any(axis=1) | (np.abs(array.sum(axis=1) - 1) > 1e-3)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ScoreError(f"probabilities: row {row} is no distribution (its sum is {array[row].sum():g}); logits?")
    return array, positions
