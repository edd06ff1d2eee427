"""The loop: one compiled prefill, one compiled while loop over a donated cache; a stream runs the same programs."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.generation.prompts import GenerationError, prepare
from jaxtransfer.generation.sampling import Sampling, draw, sampling
from jaxtransfer.models import run_span
from jaxtransfer.tree import flatten, unstack
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import Carry, Model


def generate(
    model: Model,
    params: Params,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Continues prompts; returns the new tokens alone.

    Compiled once for a model, a number of rows, a bucket of prompt lengths (`prompts.bucket`), ``max_new_tokens``,
    ``top_k`` and dtype. What a row draws at a step depends on ``key``, the row's number, the step and the row's own
    tokens: neither on the other rows nor on how many there are.

    Args:
      model: one with a causal-lm head.
      params: canonical, which decodes fastest; of laid-out ones a canonical copy is made first.
      input_ids: (B, T) prompts, padded on the left (`left_pad`).
      attention_mask: (B, T), 0 at padding; None where there is none.
      max_new_tokens: N, at least 1; the longest prompt and N must fit the model's positions: nothing is cut.
      temperature: 0 is greedy; else the logits are divided by it and tokens are drawn.
      top_k: draw among the k likeliest.
      top_p: draw among the smallest set of the likeliest whose probability reaches it.
      eos_token_id: the token, or any of several, that ends a row.
      pad_token_id: what fills a row behind its end; None is the first of ``eos_token_id``.
      key: PRNG key; needed to draw.
      dtype: of activations and of the cache. On a CPU float32 is fastest, for weights too: XLA's products of bfloat16
        are slow there.

    Returns:
      (B, N) int32: what follows each prompt, up to and with the first end token; behind that, pads. Always N wide, also
      where the loop stopped early because every row had ended.

    Raises:
      GenerationError: what of the above does not hold; before anything is compiled.
    """
    work = _work(
        model, params, input_ids, attention_mask, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, eos_token_id=eos_token_id, pad_token_id=pad_token_id, key=key, dtype=dtype,
    )  # fmt: skip
    return work.advance(work.prefill(), max_new_tokens).tokens


def stream(
    model: Model, params: Params, input_ids: Any, attention_mask: Any = None, *, max_new_tokens: int, **options: Any
) -> Iterator[np.ndarray]:
    """The columns of `generate`'s result as they are made, (B,) int32 each, until every row has ended.

    It runs the same compiled programs, so the tokens are the same. Arguments and errors, at the call, are `generate`'s.
    """
    return _columns(_work(model, params, input_ids, attention_mask, max_new_tokens=max_new_tokens, **options))


def _columns(work: "_Work") -> Iterator[np.ndarray]:
    state = work.prefill()
    for column in range(work.new):
        state = work.advance(state, column + 1) if column else state
        yield np.array(state.tokens[:, column])
        if np.array(state.done).all():
            return


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Between two steps: the cache holds each row's tokens but the last, ``tokens`` (B, N) those drawn, then pads."""

    cache: Carry
    tokens: jax.Array
    position: jax.Array
    done: jax.Array
    step: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _How:
    """What a step needs besides parameters and state; ``ends`` are the end tokens, (E,)."""

    sampling: Sampling | None
    ends: Any
    pad: Any
    key: jax.Array | None

    def draw(self, logits: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        """The next token of each row, (B,), and whether it ends the row."""
        token = draw(logits, self.sampling, self.key, step)
        return token, (token[:, None] == self.ends[None, :]).any(axis=-1)


@functools.partial(jax.jit, static_argnames=("model", "new", "dtype"))
def _prefill(model: Model, params: Params, batch: Carry, how: _How, *, new: int, dtype: Any) -> _State:
    """Reads the prompts into a cache with room for ``new`` tokens more, and draws the first."""
    rows, length = batch["input_ids"].shape
    assert model.cache is not None
    logits, cache = _last_logits(model, params, batch, model.cache(rows, length + new, dtype), dtype)
    token, done = how.draw(logits, 0)
    tokens = jnp.full((rows, new), how.pad, jnp.int32).at[:, 0].set(token)
    return _State(cache, tokens, batch["position_ids"][:, -1] + 1, done, jnp.int32(1))


@functools.partial(jax.jit, static_argnames=("model", "dtype"), donate_argnames="state")
def _advance(model: Model, params: Params, state: _State, stop: Any, how: _How, *, dtype: Any) -> _State:
    """Steps until ``stop`` tokens are there, or every row has ended."""

    def step(s: _State) -> _State:
        ids = jax.lax.dynamic_slice_in_dim(s.tokens, s.step - 1, 1, axis=1)
        batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "position_ids": s.position[:, None]}
        logits, cache = _last_logits(model, params, batch, s.cache, dtype)
        token, ends = how.draw(logits, s.step)
        token = jnp.where(s.done, how.pad, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(s.tokens, token[:, None], s.step, axis=1)
        return _State(cache, tokens, s.position + 1, s.done | ends, s.step + 1)

    return jax.lax.while_loop(lambda s: (s.step < stop) & ~s.done.all(), step, state)


def _last_logits(model: Model, params: Params, batch: Carry, cache: Carry, dtype: Any) -> tuple[jax.Array, Carry]:
    """The logits after the last token, (B, V), and the new cache; those of a prompt's other tokens are not computed."""
    trunk = [stage.name for stage in model.stages if not stage.name.startswith("head")][-1]
    carry = run_span(model, params, {**batch, "cache": cache}, None, trunk, dtype=dtype)
    carry = run_span(model, params, {**carry, "hidden": carry["hidden"][:, -1:]}, trunk, None, dtype=dtype)
    return carry["logits"][:, 0], carry["cache"]


@dataclasses.dataclass(frozen=True)
class _Work:
    """A call that was checked: its arguments as the compiled functions take them."""

    model: Model
    params: Params
    batch: Carry
    how: _How
    new: int
    dtype: Any

    def prefill(self) -> _State:
        """The state with the first token."""
        return _prefill(self.model, self.params, self.batch, self.how, new=self.new, dtype=self.dtype)

    def advance(self, state: _State, stop: int) -> _State:
        """The state, which is donated, with ``stop`` tokens."""
        return _advance(self.model, self.params, state, np.int32(stop), self.how, dtype=self.dtype)


def _work(
    model: Model, params: Params, input_ids: Any, attention_mask: Any, *, max_new_tokens: int, temperature: float = 0.0,
    top_k: int | None = None, top_p: float | None = None, eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None, key: jax.Array | None = None, dtype: Any = jnp.float32,
) -> _Work:  # fmt: skip
    """Checks the arguments of `generate`."""
    if model.cache is None or model.head is None or model.head.kind != "causal-lm":
        head = "no head" if model.head is None else f"a {model.head.kind} head"
        cache = "no cache" if model.cache is None else "a cache"
        raise GenerationError(
            f"model: {model.family} has {head} and {cache}; generation takes a causal-lm head and a cache"
        )
    warped = sampling(temperature, top_k, top_p, key)
    soft = flatten(params).get("embed/prompt/embedding")  # what stands before every prompt takes positions too
    limit = model.config.max_position_embeddings - (0 if soft is None else soft.shape[0])
    batch = prepare(input_ids, attention_mask, max_new_tokens, vocabulary=model.config.vocab_size, limit=limit)
    ends = np.atleast_1d(np.asarray([] if eos_token_id is None else eos_token_id, np.int32))
    pad = np.int32(pad_token_id if pad_token_id is not None else [*ends, 0][0])
    how = _How(warped, ends, pad, None if warped is None else key)
    # Unrolled: a scan copies each layer's weights out of their stack, once a token (a CPU, 110 million parameters, one
    # row: 31 ms a token against 21).
    return _Work(model, unstack(params), batch, how, max_new_tokens, dtype)
