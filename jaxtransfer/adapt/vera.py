"""VeRA: trained gains around two random matrices, kept once under ``shared/vera/NAME`` for all adapted layers."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt.adapter_types import NAME, Adapter, row
from jaxtransfer.models.layers import dropout, split
from jaxtransfer.tree import weights
from jaxtransfer.tree.paths import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeRA(Adapter):
    """``W + A diag(d) B diag(b)``, A and B random and the same for all layers (Kopiczko et al. 2024, arXiv:2310.11454).

    ``y = x W + bias + ((dropout(x) A) d B) b``, with the first rows of A and the first columns of B that fit W.

    Attributes:
      base: W: a matrix (in, out).
      d: (r,), equal entries at the start; b: (out,), zero at the start.
      rate: dropout of the input of A.
      name: of the adapter, and of its matrices ``shared/vera/NAME/a`` (at least in, r) and ``.../b`` (r, at least out).
      shared: ``{"a": A, "b": B}`` while a model runs; None at rest, so that A and B are in the tree once.
    """

    trainable: ClassVar[tuple[str, ...]] = ("d", "b")

    base: Any
    d: Any
    b: Any
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})
    name: str = dataclasses.field(default=NAME, metadata={"static": True})
    rank_of_base: int = dataclasses.field(default=2, metadata={"static": True})
    shared: Any = None

    @property
    def shares(self) -> str:
        """Where A and B lie."""
        return f"vera/{self.name}"

    def matrices(self) -> tuple[jax.Array, jax.Array]:
        """A (in, r) and B (r, out), cut to W.

        Raises:
          TypeError: they are not in the tree, too small, or not put in place, as a run or `merge` does.
        """
        if not self.shared:
            raise TypeError(f"VeRA {self.name!r} needs its matrices, {weights.SHARED}/{self.shares}/a and b")
        a, b, inputs, outputs = self.shared["a"], self.shared["b"], self.base.shape[-2], self.b.shape[-1]
        if a.shape[0] < inputs or b.shape[1] < outputs or not a.shape[1] == b.shape[0] == self.d.shape[-1]:
            raise TypeError(
                f"VeRA {self.name!r} of rank {self.d.shape[-1]} on {inputs} x {outputs} does not fit its matrices, "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )
        return a[:inputs], b[:, :outputs]

    def linear(self, x: jax.Array, bias: Any, key: jax.Array | None) -> jax.Array:
        """``x W + bias + ((dropout(x) A) d B) b``."""
        inner, own = split(key, 2)
        y = weights.linear(x, self.base, bias, inner)
        a, b = self.matrices()
        low = weights.linear(dropout(x, self.rate, own), a)
        low = weights.linear(low * row(self.d, low), b)
        return y + low * row(self.b, low)

    def materialize(self) -> jax.Array:
        """``W + A diag(d) B diag(b)`` in the dtype of W; rounded once."""
        base, (a, b) = weights.materialize(self.base), self.matrices()
        d, gain = (x.astype(jnp.float32)[None] for x in (self.d, self.b))
        delta = (a.astype(jnp.float32) * d) @ b.astype(jnp.float32) * gain
        return (base.astype(jnp.float32) + delta).astype(base.dtype)

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Not defined."""
        raise TypeError("VeRA is not defined on embeddings")

    transpose = take  # type: ignore[assignment]

    def specs(self, axes: Sequence[Any]) -> Mapping[str, P]:
        """``b`` is split as W's outputs are, ``d`` is whole."""
        return {"d": P(), "b": P(axes[-1])}


def draw(nodes: Sequence[VeRA], key: jax.Array) -> Params:
    """The matrices of adapters of one name, ``{path: array}``: ``U(-sqrt(6 / n), sqrt(6 / n))``, n the inputs of each.

    Args:
      nodes: at least one, of one name.
      key: with the name it decides the draw.

    Raises:
      ValueError: the adapters differ in rank.
    """
    first, ranks = nodes[0], sorted({node.d.shape[0] for node in nodes})
    if len(ranks) > 1:
        raise ValueError(f"vera: adapters that share their matrices are of one rank, these of {ranks}")
    inputs, outputs = (max(node.base.shape[axis] for node in nodes) for axis in (-2, -1))
    own = jax.random.split(jax.random.fold_in(key, zlib.crc32(first.shares.encode())))
    sizes = {"a": (inputs, ranks[0]), "b": (ranks[0], outputs)}
    return {
        f"{weights.SHARED}/{first.shares}/{part}": jax.random.uniform(one, size, jnp.float32, -1.0, 1.0)
        * (6 / size[0]) ** 0.5
        for one, (part, size) in zip(own, sizes.items(), strict=True)
    }
