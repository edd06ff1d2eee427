"""Weights: the small protocol through which layers use a weight, whatever it is made of.

A weight is an array, or a leaf type: a registered dataclass derived from :class:`Weight` that stands where the array
would (an adapter around a base, a quantised matrix). Layers call the functions here and never touch a weight otherwise.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"
"""What a policy of rematerialisation calls the products that `linear` makes."""
SHARED = "shared"
"""The root of arrays that many weights use and none owns: they are kept once, and neither stacked nor scanned."""
_WHOLE = ContextVar("whole", default=False)


class Weight:
    """The base of leaf types; a subclass is a frozen dataclass registered with ``jax.tree_util.register_dataclass``.

    ``whole_blocks`` names the parts that must be split just as the weight is, because blocks may not cross shards.
    """

    whole_blocks: ClassVar[tuple[str, ...]] = ()

    @property
    def shares(self) -> str | None:
        """Where under `SHARED` the arrays lie that all weights of its kind use; a run puts them in its ``shared``."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that this weight stands for."""
        raise TypeError(f"{type(self).__name__} does not define shape")

    @property
    def dtype(self) -> Any:
        """The dtype of the matrix that this weight stands for."""
        raise TypeError(f"{type(self).__name__} does not define dtype")

    def materialize(self) -> jax.Array:
        """The array that this weight stands for."""
        raise TypeError(f"{type(self).__name__} cannot be materialized")

    def linear(self, x: jax.Array, bias: Any, key: jax.Array | None) -> jax.Array:
        """``x @ w + bias``; the default materializes the weight."""
        return linear(x, self.materialize(), bias, key)

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Rows of an embedding; the default materializes the weight."""
        return take(self.materialize(), ids, dtype)

    def transpose(self) -> Any:
        """The transposed weight, for tied heads; the default materializes the weight."""
        return self.materialize().T

    def specs(self, axes: Sequence[Any]) -> Mapping[str, Any]:
        """Part -> PartitionSpec where the weight would be split by ``axes``; a ``base`` is split as it would."""
        raise TypeError(f"{type(self).__name__} does not say how its parts are sharded")

    def conv(self, x: jax.Array, bias: Any, key: jax.Array | None, how: "Window") -> jax.Array:
        """``x * w + bias``, a convolution; the default materializes the weight."""
        return conv(x, self.materialize(), bias, key, how)


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution's kernel moves over (height, width).

    Attributes:
      stride: of the kernel, by axis.
      padding: zeros before and after, by axis.
      groups: of channels that do not mix.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    groups: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed(Weight):
    """A running statistic that must not move, whatever mode its stage is in: the layer normalises by it."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the statistic."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """That of the statistic."""
        return self.value.dtype

    def materialize(self) -> jax.Array:
        """The statistic."""
        return self.value


def is_weight(x: Any) -> bool:
    """Whether a node is a leaf type."""
    return isinstance(x, Weight)


def is_packed(x: Any) -> bool:
    """Whether a node is a quantised weight: its parts are not the numbers that it stands for."""
    return isinstance(x, Weight) and bool(x.whole_blocks)


def shares(x: Any) -> bool:
    """Whether a node is a leaf type that uses arrays kept under `SHARED`."""
    return isinstance(x, Weight) and x.shares is not None


def shared_in(tree: Any) -> set[str]:
    """Where under `SHARED` the arrays lie that the leaf types of a tree use."""
    nodes = [node for node in jax.tree.leaves(tree, is_leaf=shares) if shares(node)]
    return {node.shares for node in nodes}.union(*(shared_in(node.base) for node in nodes))


def with_shared(tree: Any, shared: Mapping[str, Any]) -> Any:
    """The tree with what is shared put into the leaf types that use it: what a run does before it calls a stage."""

    def put(node: Any) -> Any:
        if not shares(node):
            return node
        found: Any = shared
        for name in node.shares.split("/"):
            found = found.get(name, {})
        return dataclasses.replace(node, base=with_shared(node.base, shared), shared=found)

    return jax.tree.map(put, tree, is_leaf=shares)


@contextmanager
def whole(rows_and_tokens: bool) -> Iterator[None]:
    """Whether all rows and tokens of what is traced in here are on one device: products may take them as one axis."""
    token = _WHOLE.set(rows_and_tokens)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def linear(x: jax.Array, w: Any, bias: Any = None, key: jax.Array | None = None) -> jax.Array:
    """``y = x w + b`` in the dtype of ``x``: (..., in) x (in, out) -> (..., out).

    ``key`` is a dropout key for leaf types that need one; None in evaluation.

    Example:
      >>> linear(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(4)).shape
      (2, 4)
    """
    if is_weight(w):
        return w.linear(x, bias, key)
    # XLA for CPUs transposes what is summed over two axes, which of the gradients of a, b and w takes most of the time:
    # a step under LoRA took 1.35 times as long. Where a mesh splits rows and tokens they cannot be one axis.
    merge = x.ndim > 2 and _WHOLE.get() and jax.default_backend() == "cpu"

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1]) if merge else x
        y = jax.lax.dot_general(rows, w, (((rows.ndim - 1,), (0,)), ((), ())))
        return y.reshape(*x.shape[:-1], w.shape[-1]) if merge else y

    y = checkpoint_name(_uncast(product, x, w, always=merge), PRODUCT)
    return y if bias is None else y + jnp.reshape(bias.astype(x.dtype), (1,) * (y.ndim - 1) + (-1,))


def conv(x: jax.Array, w: Any, bias: Any = None, key: jax.Array | None = None, how: Window | None = None) -> jax.Array:
    """A convolution in the dtype of ``x``: (B, H, W, in) * (kh, kw, in / groups, out) -> (B, H', W', out).

    Example:
      >>> conv(jnp.ones((1, 4, 4, 3)), jnp.ones((2, 2, 3, 5)), how=Window(stride=(2, 2))).shape
      (1, 2, 2, 5)
    """
    how = Window() if how is None else how
    if is_weight(w):
        return w.conv(x, bias, key, how)
    padding: Sequence[tuple[int, int]] = how.padding

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, how.stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=how.groups
        )

    y = _uncast(product, x, w)
    return y if bias is None else y + jnp.reshape(bias.astype(x.dtype), (1,) * (y.ndim - 1) + (-1,))


def _uncast(
    product: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, w: Any, always: bool = False
) -> jax.Array:
    """``product(x, w)`` in the dtype of ``x``; what is saved for the backward pass is ``x`` and ``w`` as they are.

    A scan would save the casts of all layers, half of the base again where activations are bfloat16 and weights
    float32, and what a product reshapes beside what it is given.
    """
    if w.dtype == x.dtype and not always:
        return product(x, w)
    return jax.checkpoint(lambda x, w: product(x, w.astype(x.dtype)), prevent_cse=False)(x, w)


def take(w: Any, ids: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Rows of an embedding matrix: (vocabulary, width), (...) -> (..., width), in ``dtype``."""
    if is_weight(w):
        return w.take(ids, dtype)
    return jnp.take(w, ids, axis=0, mode="clip").astype(dtype)


def transpose(w: Any) -> Any:
    """The transposed weight."""
    return w.transpose() if is_weight(w) else w.T


def materialize(w: Any) -> jax.Array:
    """The plain array that a weight stands for."""
    return w.materialize() if is_weight(w) else w
