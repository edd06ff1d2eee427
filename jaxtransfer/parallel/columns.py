"""Embeddings and heads of large vocabularies: matrices that are used as they lie, split by columns, and never whole."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.parallel.mesh import BATCH_AXES, SEQUENCE, parts
from jaxtransfer.tree import weights
from jaxtransfer.tree.weights import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns(Weight):
    """A matrix W (n, m) whose columns are split over ``axes``; the rows of a batch go to where the columns are.

    ``y[:, c] = x W[:, c]``: every device of the axes multiplies all their rows by columns of its own, so W is not
    gathered and its gradient is formed where it belongs, with no copy of either in whole. What is sent instead are
    ``x`` and its gradient, or the columns ``W[ids, c]`` that were looked up: tokens times width, where W has vocabulary
    times width (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

    Attributes:
      value: W, an array.
      mesh: of the devices.
      axes: over which columns are split; those among them that split rows as well, the rows are gathered over.
    """

    value: Any
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of W."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """That of W."""
        return self.value.dtype

    def materialize(self) -> jax.Array:
        """W in whole on every device."""
        return self._put(self.value, P())

    def transpose(self) -> "Columns":
        """W^T, which is split by columns of its own: each device sends the others their part of its rows."""
        return dataclasses.replace(self, value=self.value.T).split()

    def split(self) -> "Columns":
        """W laid out by columns, if it was not."""
        return dataclasses.replace(self, value=self._put(self.value, P(None, self.axes)))

    def linear(self, x: jax.Array, bias: Any, key: jax.Array | None) -> jax.Array:
        """``x W + bias``, split as the columns are."""
        if not self._divides(x) or self._rows_of(x) > self.shape[-1]:  # where there are many, W is less than they are
            return weights.linear(x, self.materialize(), bias, key)
        x = self._gathered(x)
        y = weights.linear(x, self.split().value, bias, key)
        return self._put(y, P(*self._rows(y.ndim, self._others)[:-1], self.axes))

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Rows of W, split by the rows of ``ids``."""
        if not self._divides(ids[..., None]):
            return weights.take(self.materialize(), ids, dtype)
        ids = self._put(ids, P(*self._rows(ids.ndim + 1, self._others)[:-1]))
        found = weights.take(self.split().value, ids, dtype)
        within = tuple(axis for axis in self.axes if axis in BATCH_AXES)
        for axes in (self.axes, within):  # first over what splits no rows: the rest is then an exchange of columns
            found = self._put(found, P(*self._rows(found.ndim, self._others)[:-1], axes or None))
        return self._put(found, self._rows(found.ndim, BATCH_AXES))

    @property
    def _others(self) -> tuple[str, ...]:
        """What splits the rows of a batch while its columns are split."""
        return tuple(axis for axis in BATCH_AXES if axis not in self.axes)

    def _rows(self, rank: int, axes: tuple[str, ...]) -> P:
        """Rows over ``axes``, tokens over the sequence axis, features whole."""
        tokens = (SEQUENCE,) if rank > 2 else ()
        return P(axes or None, *tokens, *[None] * (rank - 1 - len(tokens)))

    def _divides(self, x: jax.Array) -> bool:
        """Whether ``x`` (..., n) has rows, and tokens, that are split."""
        rows, tokens = parts(self.mesh, *BATCH_AXES), parts(self.mesh, SEQUENCE)
        return x.ndim > 1 and x.shape[0] % rows == 0 and (x.ndim == 2 or x.shape[1] % tokens == 0)

    def _rows_of(self, x: jax.Array) -> int:
        """How many rows of ``x`` (..., n) one device sees that has gathered them."""
        return x.size // x.shape[-1] // parts(self.mesh, *self._others, SEQUENCE)

    def _gathered(self, x: jax.Array) -> jax.Array:
        """All rows of ``x``. Its gradient is told where it goes, or XLA would sum all of it everywhere."""

        @jax.custom_vjp
        def move(x: jax.Array) -> jax.Array:
            return self._put(x, self._rows(x.ndim, self._others))

        move.defvjp(lambda x: (move(x), None), lambda _, by: (self._put(by, self._rows(by.ndim, BATCH_AXES)),))
        return move(x)

    def _put(self, x: jax.Array, spec: P) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
