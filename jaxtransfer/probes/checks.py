"""What a probe is fitted to: features in single precision at least, and labels that name one of so many classes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class ProbeError(ValueError):
    """Features, labels or settings that no probe can be fitted to; the message names what is wrong."""


def matrix(features: Any, name: str = "features") -> jax.Array:
    """Features (N, d), of float32 at least, so that half precision is not what a probe is solved in.

    Raises:
      ProbeError: another rank, no rows, or, outside of traced code, a row that is not finite.
    """
    array = jnp.asarray(features)
    if array.ndim != 2 or not len(array):
        raise ProbeError(f"{name}: expected (N, d) with N at least 1, got {array.shape}")
    array = array if array.dtype == jnp.float64 else array.astype(jnp.float32)
    if not isinstance(array, Tracer):
        finite = np.isfinite(np.asarray(array)).all(axis=1)
        if not finite.all():
            raise ProbeError(
                f"{name}: row {int(finite.argmin())} of {len(array)} is not finite ({(~finite).sum()} are)"
            )
    return array


def targets(labels: Any, rows: int, classes: int, *, least: int = 1) -> jax.Array:
    """Labels (N,) as int32.

    Args:
      labels: integers from 0 to ``classes - 1``.
      rows: N.
      classes: C, at least 2.
      least: examples that each class must have.

    Raises:
      ProbeError: another shape or dtype, fewer than two classes, or, outside of traced code, a label out of range or a
        class with too few examples.
    """
    array = jnp.asarray(labels)
    if array.shape != (rows,) or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ProbeError(f"labels: expected ({rows},) integers, one a row, got {array.shape} of {array.dtype}")
    if classes < 2:
        raise ProbeError(f"classes: {classes}; there is something to tell apart from two on")
    if not isinstance(array, Tracer):
        values = np.asarray(array)
        if (outside := (values < 0) | (values >= classes)).any():
            raise ProbeError(
                f"labels: row {int(outside.argmax())} is {values[outside][0]}, expected 0 to {classes - 1}"
            )
        counts = np.bincount(values, minlength=classes)
        if counts.min() < least:
            raise ProbeError(
                f"labels: class {int(counts.argmin())} of {classes} has {counts.min()} examples, at least {least} "
                f"{'is' if least == 1 else 'are'} needed"
            )
    return array.astype(jnp.int32)
