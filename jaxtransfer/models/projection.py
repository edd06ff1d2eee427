"""The last product of a language model, before it is taken: the logits of a large vocabulary need never be whole."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.tree import weights

PROJECTION = "projection"
"""The entry of the carry that the heads of language models write beside ``logits``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """Logits as their factors: ``z = hidden kernel + bias``, or ``cap tanh(z / cap)`` where there is a cap.

    A program that reads these and not the logits does not compute the logits: what is not read is cut out of it.

    Attributes:
      hidden: (B, T, d).
      kernel: a weight (d, V), whatever it is made of.
      bias: (V,) or None.
      key: of the dropout of a kernel's adapters, or None.
      cap: the logits' bound (Gemma 2).
    """

    hidden: Any
    kernel: Any
    bias: Any = None
    key: Any = None
    cap: float | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.kernel.shape[-1]

    def logits(self) -> jax.Array:
        """(B, T, V), in the dtype of ``hidden``."""
        logits = weights.linear(self.hidden, self.kernel, self.bias, self.key)
        return logits if self.cap is None else self.cap * jnp.tanh(logits / self.cap)
