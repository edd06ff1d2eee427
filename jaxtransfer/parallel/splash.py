"""Fused attention on TPUs: jax's splash kernel, which holds no scores and skips the blocks that a mask closes.

Equal to `models.attention` but for what padding attends to, whose outputs nothing reads: there all keys, here itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.models.attention import Attend, Span
from jaxtransfer.parallel.mesh import BATCH_AXES, SEQUENCE, ShardingError, parts

_BLOCKS = (512, 256, 128)
"""Queries, and keys, that a block holds: the largest that divides their number."""


def splash(mesh: Mesh | None = None, *, interpret: bool = False) -> Attend:
    """Attention by blocks on the chip, forward and backward (Dao et al. 2022, arXiv:2205.14135).

    Rows are split over the mesh's batch axes, heads over ``tensor``, queries over ``sequence``.

    Args:
      mesh: of the step; None is one device.
      interpret: whether the kernel is run by XLA's operations, on any device, slowly: for tests.
    """

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, span: Span, *, heads: int, kv_heads: int, scale: float,
        softcap: float | None, rate: float,
    ) -> jax.Array:  # fmt: skip
        if rate:
            raise ValueError(
                f"attention: splash drops no probabilities, and this model drops {rate} of them in training; set "
                "run.attention: xla, or its dropout to 0"
            )
        if k.shape[1] != q.shape[1]:
            raise ValueError(
                f"attention: splash takes keys and queries of the same tokens, not {k.shape[1]} keys for {q.shape[1]} "
                "queries (a prefix?); set run.attention: xla"
            )
        if span.prompted and span.window is not None:
            raise ValueError(
                f"attention: splash counts a window of {span.near} in slots, and behind a prompt there may be padding; "
                "set run.attention: xla"
            )
        count = q.shape[1]
        cut, tensor = (1 if mesh is None else parts(mesh, axis) for axis in (SEQUENCE, "tensor"))
        if heads % tensor or kv_heads % tensor:
            raise ShardingError(f"mesh: tensor = {tensor} does not divide {heads} heads over {kv_heads} of keys")

        def split(x: jax.Array, heads: int) -> jax.Array:  # (B, T, heads * d) -> (B, heads, T', d)
            x = jnp.moveaxis(x.reshape(*x.shape[:2], heads, -1), 2, 1)
            return jnp.pad(x, ((0, 0), (0, 0), (0, -count % (_BLOCKS[-1] * cut)), (0, 0)))

        q, k, v = split(q * scale, heads), split(k, kv_heads), split(v, kv_heads)
        padded = q.shape[2]
        ids = jnp.pad(span.segments.astype(jnp.int32), ((0, 0), (0, padded - count)))
        kernels = _kernels(span, padded, cut, heads // tensor, attn_logits_soft_cap=softcap, interpret=interpret)
        limit = jnp.asarray(0 if span.window is None else span.window, jnp.int32)

        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # takes long to import

        def local(kernels: Any, limit: jax.Array, q: Any, k: Any, v: Any, own: Any, ids: Any) -> jax.Array:
            def by(kernel: Any) -> Any:
                return lambda: jax.vmap(kernel)(q, k, v, SegmentIds(own, ids))

            if len(kernels) == 1:
                return by(kernels[0])()
            return jax.lax.cond(limit > span.near, by(kernels[0]), by(kernels[1]))

        if mesh is not None:
            rows, tokens = P(BATCH_AXES, "tensor"), P(BATCH_AXES, "tensor", SEQUENCE)
            cuts = NamedSharding(mesh, P(None, SEQUENCE if span.causal else None))
            where = [kernel.manual_sharding_spec(cuts) for kernel in kernels]
            specs = (where, P(), tokens, rows, rows, P(BATCH_AXES, SEQUENCE), P(BATCH_AXES))
            local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)
        y = jnp.moveaxis(local(kernels, limit, q, k, v, ids, ids)[:, :, :count], 1, 2)
        return y.reshape(*y.shape[:2], -1)

    return attend


def _kernels(span: Span, count: int, cut: int, heads: int, **how: Any) -> list[Any]:
    """The kernel for all tokens, and behind it the one for those within the window, where there is a window.

    Args:
      span: what tokens attend to, but for the segments.
      count: the number of tokens, a multiple of the blocks; on a device are ``count / cut`` of them as queries.
      heads: of a device.
      how: further arguments of the library.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    shape, shards = (count, count), cut
    if not span.causal:  # the same for the queries of every device
        masks, shards = [library.FullMask((count // cut, count))], 1
    elif span.window is None or span.near >= count:
        masks = [library.CausalMask(shape)]
    else:
        masks = [library.CausalMask(shape), library.LocalMask(shape, (span.near - 1, 0), 0)]
    block = next(n for n in _BLOCKS if count // cut % n == 0)
    sizes = library.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    return [
        library.make_splash_mha(
            library.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=shards, **how
        )
        for mask in masks
    ]
