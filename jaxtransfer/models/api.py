"""`init`, `apply`, `run_span`: a model is run stage by stage; runs of like stages that are stacked are scanned."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.models.attention import Attend, attending
from jaxtransfer.models.projection import PROJECTION
from jaxtransfer.tree import weights
from jaxtransfer.tree.diff import TreeError
from jaxtransfer.tree.paths import Params, flatten, weight_path
from jaxtransfer.tree.stacks import Layout, layers_of, layout, run_of
from jaxtransfer.types import Carry, Model, Stage

REMAT: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(  # of layers by name: a policy does not look inside them
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(weights.PRODUCT),
    ),
}
"""Rematerialisation by name: ``full`` keeps stage inputs only, ``dots`` also the outputs of matrix products."""

STATS, CACHE = "stats", "cache"


def init(model: Model, key: jax.Array) -> Params:
    """Fresh parameters, from scratch: the control of every transfer experiment.

    Stage ``i`` draws from ``fold_in(key, i)``, so adding a head never changes the trunk's draw.
    """
    params: Params = {}
    for index, stage in enumerate(model.stages):
        node = stage.init(jax.random.fold_in(key, index))
        if node:
            params = _with(params, stage.name, node)
    return params


def abstract_init(model: Model) -> Params:
    """The shapes and dtypes of `init`'s result, without computing it."""
    return jax.eval_shape(functools.partial(init, model), jax.random.key(0))


def layout_of(model: Model, params: Params, labels: Any = None) -> Layout:
    """Which layers of the model's lists may be stacked: like in function, structure and labels; see `tree.layout`."""
    lists = {stage.name.rpartition("/")[0] for stage in model.stages if stage.name.rpartition("/")[2].isdecimal()}
    table = dict(layout(params, labels, lists))
    fns = {stage.name: stage.fn for stage in model.stages}
    for path, runs in table.items():
        cuts = {end for run in runs for end in run}
        cuts |= {i for i in range(1, max(cuts)) if fns[f"{path}/{i}"] is not fns[f"{path}/{i - 1}"]}
        table[path] = tuple(pairwise(sorted(cuts)))
    return table


def apply(
    model: Model,
    params: Params,
    batch: Mapping[str, Any],
    *,
    train: bool | Collection[str] = False,
    key: jax.Array | None = None,
    cache: Carry | None = None,
    capture: Collection[str] = (),
    remat: str | None = None,
    dtype: Any = jnp.float32,
    constrain: Callable[[jax.Array], jax.Array] | None = None,
    attend: Attend | None = None,
    also: Collection[str] = (),
) -> dict[str, Any]:
    """Runs the whole model, or what follows ``model.start`` of it.

    Args:
      params: canonical (every layer traced) or laid out (stacks scanned).
      batch: by Hugging Face's names: ``input_ids`` (B, T), ``attention_mask`` (B, T), ...
      train: True, or the names of the stages in training mode (dropout, moving statistics).
      key: PRNG key, needed where anything trains; stage ``i`` uses ``fold_in(key, i)`` however the model is cut.
      cache: of decoding, from ``model.cache(rows, length, dtype)``: the batch holds the tokens that follow those in it.
      capture: boundaries whose activations are returned.
      remat: None, ``"full"`` or ``"dots"``: what the backward pass recomputes.
      dtype: of activations; weights are cast where they are used.
      constrain: applied to activations between stages (a sharding constraint).
      attend: what attention is left to: `parallel.splash`; None is XLA.
      also: entries of the carry that are returned as well where there are any: `PROJECTION`.

    Returns:
      The model's outputs by Hugging Face's names; ``"captured"`` where asked for; ``"stats"``, a tree of new running
      statistics, where training moved any; ``"cache"``, the new one, where one is given.

    Raises:
      TreeError: parameters that no stage owns or reads, besides what `run_span` raises.
    """
    if surplus := _surplus(model, params):
        raise TreeError(f"no stage of the model owns or reads {', '.join(surplus[:8])} ({len(surplus)} leaves in all)")
    if cache is not None and (model.cache is None or model.start is not None):
        why = "does not decode" if model.cache is None else "that starts behind its embedding does not decode"
        raise ValueError(f"cache: a {model.family} model {why}")
    given, start = dict(batch) if cache is None else {**batch, CACHE: cache}, None
    if model.start is not None:
        start, given = model.start[0], model.start[1](params, given)
    carry = run_span(
        model, params, given, start, None, train=train, key=key, capture=capture, remat=remat, dtype=dtype,
        constrain=constrain, attend=attend,
    )  # fmt: skip
    outputs = {name: carry[entry] for entry, name in model.outputs.items() if entry in carry}
    for name in ("captured", STATS, *([] if cache is None else [CACHE]), *also):
        if name in carry:
            outputs[name] = carry[name]
    return outputs


def run_span(
    model: Model,
    params: Params,
    carry: Mapping[str, Any],
    start: str | None,
    stop: str | None,
    *,
    train: bool | Collection[str] = False,
    key: jax.Array | None = None,
    capture: Collection[str] = (),
    remat: str | None = None,
    dtype: Any = jnp.float32,
    constrain: Callable[[jax.Array], jax.Array] | None = None,
    attend: Attend | None = None,
) -> Carry:
    """Runs the stages after boundary ``start`` up to and including ``stop``; arguments as in `apply`.

    A boundary is the name of a stage, for the point where its activations leave it; None stands for the model's ends.
    ``run_span(m, p, run_span(m, p, batch, None, b), b, None)`` is ``run_span(m, p, batch, None, None)`` for every b.

    Raises:
      ValueError: an unknown boundary, training stage or remat, a capture outside the span, ``stop`` before ``start``,
        or training without a key.
      TreeError: parameters missing, misshapen, or stacked across stages that are not alike.
    """
    first = 0 if start is None else index_of(model, start) + 1
    last = len(model.stages) if stop is None else index_of(model, stop) + 1
    if first > last:
        raise ValueError(f"the span is backwards: {stop} comes before {start}")
    ends = {index_of(model, boundary) for boundary in capture}
    if outside := [model.stages[end].name for end in sorted(ends) if not first <= end < last]:
        raise ValueError(f"capture: {', '.join(outside)} is outside the span after {start} up to {stop}")
    training = set(range(len(model.stages))) if train is True else {index_of(model, name) for name in train or ()}
    if training and key is None:
        raise ValueError("train=True needs a key")
    if remat is not None and remat not in REMAT:
        raise ValueError(f"remat: {remat!r} is not one of {[None, *REMAT]}")
    how = _How(remat, dtype, constrain, params.get(weights.SHARED, {}))
    out: Carry = {name: jnp.asarray(value) if isinstance(value, np.ndarray) else value for name, value in carry.items()}
    if start is None:  # images come in float32, and the first convolution should run in the dtype of all others
        out = {name: value if name == CACHE else jax.tree.map(how.in_dtype, value) for name, value in out.items()}
    for run in _runs(model, params, first, last, training, ends):
        stage = model.stages[run.low]
        reads = tuple(_get(params, path) for path in stage.reads)
        try:
            with attending(attend), weights.whole(constrain is None):
                written, stats = how.run(stage, run, out, reads, key if run.low in training else None)
        except TreeError as error:
            raise TreeError(f"{run.path}: {error}") from None
        out.update(written)
        if stats:
            out[STATS] = _with(out.get(STATS, {}), run.path, stats)
        if run.high - 1 in ends:
            out["captured"] = {**out.get("captured", {}), model.stages[run.high - 1].name: out[stage.writes[0]]}
    return out


def index_of(model: Model, boundary: str) -> int:
    """The index of the stage that a boundary is named after."""
    names = [stage.name for stage in model.stages]
    if boundary not in names:
        raise ValueError(f"no stage is called {boundary!r}; the stages are {', '.join(names)}")
    return names.index(boundary)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Stages ``low`` to ``high - 1`` run at once; ``params`` carries a leading axis if they are stacked."""

    low: int
    high: int
    path: str
    params: Any
    stacked: bool
    constants: tuple[Mapping[str, Any], ...] = ()


def _runs(
    model: Model, params: Params, first: int, last: int, training: Collection[int], ends: Collection[int]
) -> Iterator[_Run]:
    """Cuts a span into single stages and runs of stacked ones; a stack is cut at captures and at training's edge."""
    low = first
    while low < last:
        parent, _, key = model.stages[low].name.rpartition("/")
        siblings = _get(params, parent) if parent else params
        if key in siblings or not key.isdecimal():
            yield _Run(low, low + 1, model.stages[low].name, siblings.get(key, {}), False)
            low += 1
            continue
        name, (begin, end) = _stack_holding(siblings, int(key), model.stages[low].name)
        high = min(last, low + end - int(key))
        cuts = [i for i in range(low + 1, high) if i - 1 in ends or (i in training) != (low in training)]
        high = cuts[0] if cuts else high
        if any(model.stages[i].fn is not model.stages[low].fn for i in range(low, high)):
            raise TreeError(f"the layers of {parent}/{name} are stacked, but their stages are not alike")
        offset, length = int(key) - begin, high - low
        part = siblings[name]
        if short := [path for path, leaf in flatten(part).items() if np.shape(leaf)[:1] != (end - begin,)]:
            raise TreeError(f"{parent}/{name}/{short[0]} is not stacked from {end - begin} layers")
        if length != end - begin:
            part = jax.tree.map(lambda leaf, o=offset, n=length: leaf[o : o + n], part)
        constants = tuple(dict(stage.constants) for stage in model.stages[low:high])
        yield _Run(low, high, f"{parent}/{int(key)}:{int(key) + length}", part, True, constants)
        low = high


def _stack_holding(siblings: Mapping[str, Any], layer: int, stage: str) -> tuple[str, tuple[int, int]]:
    for name in siblings:
        if (run := run_of(name)) and run[0] <= layer < run[1]:
            return name, run
    raise TreeError(f"no parameters for stage {stage}; beside it there are {', '.join(siblings)}")


@dataclasses.dataclass(frozen=True)
class _How:
    """How stages are run: rematerialisation, dtype of activations, sharding constraint, what leaf types share."""

    remat: str | None
    dtype: Any
    constrain: Callable[[jax.Array], jax.Array] | None
    shared: Params

    def run(self, stage: Stage, run: _Run, carry: Carry, reads: tuple[Any, ...], key: jax.Array | None) -> Any:
        """The entries written by a run, and its new statistics."""
        fixed = {name: value for name, value in carry.items() if name not in (*stage.writes, STATS, "captured")}
        moving = {name: self.cast(name, carry[name]) for name in stage.writes if name in carry}

        def body(moving: Carry, xs: tuple[Any, Any, Any]) -> tuple[Carry, Any]:
            layer, index, own = xs
            layer = weights.with_shared(layer, self.shared)
            live = None if key is None else jax.random.fold_in(key, index)
            written = dict(stage.fn(layer, {**fixed, **moving, **own}, live, *reads))
            stats = written.pop(STATS, None)
            return {**moving, **{name: self.cast(name, value) for name, value in written.items()}}, stats

        if self.remat is not None:
            alone = run.high - run.low == 1 or _unrolled(run.params)  # no loop keeps XLA from undoing it
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=alone)
        if not run.stacked:
            return body(moving, (run.params, run.low, stage.constants))
        if run.high - run.low == 1:
            xs = (jax.tree.map(lambda x: x[0], run.params), run.low, stage.constants)
            after = jax.eval_shape(body, moving, xs)[0]
            if jax.tree.map(jnp.shape, after) != jax.tree.map(jnp.shape, moving):  # which a scan cannot carry
                written, stats = body(moving, xs)
                return written, jax.tree.map(lambda x: x[None], stats)
        own = jax.tree.map(lambda *numbers: jnp.stack([jnp.asarray(x) for x in numbers]), *run.constants)
        return jax.lax.scan(
            body, moving, (run.params, jnp.arange(run.low, run.high), own), unroll=_unrolled(run.params)
        )

    def cast(self, name: str, x: Any) -> Any:
        """Activations in their dtype and place; a cache has its own, and so have a projection's factors.

        Logits have no stage behind them: they stay split over a vocabulary that is.
        """
        if name in (CACHE, PROJECTION):
            return x
        return jax.tree.map(self.in_dtype if name == "logits" else self._cast, x)

    def in_dtype(self, x: Any) -> Any:
        return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def _cast(self, x: Any) -> Any:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return self.constrain(self.in_dtype(x)) if floating and self.constrain is not None else self.in_dtype(x)


def _unrolled(stacked: Params) -> bool:
    """Whether the layers of a stack are written out after all: convolutions, on a CPU.

    There XLA takes up to thirty times as long for the gradient of a convolution inside a loop as for one outside.
    """
    return jax.default_backend() == "cpu" and any(jnp.ndim(leaf) == 5 for leaf in jax.tree.leaves(stacked))


def _surplus(model: Model, params: Params) -> list[str]:
    """The canonical paths of leaves that no stage owns or reads, and no leaf type shares."""
    used = {path for stage in model.stages for path in (stage.name, *stage.reads)}
    used |= {f"{weights.SHARED}/{name}" for name in weights.shared_in(params)}
    paths = [path for laid_out in flatten(params) for path in layers_of(laid_out)]
    return [p for p in paths if used.isdisjoint(accumulate(weight_path(p).split("/"), "{}/{}".format))]


def _get(params: Params, path: str) -> Any:
    node: Any = params
    for name in path.split("/"):
        if not isinstance(node, Mapping) or name not in node:
            raise TreeError(f"no parameters at {path}; the tree has {', '.join(map(str, params))}")
        node = node[name]
    return node


def _with(tree: Params, path: str, node: Any) -> Params:
    """A tree with the subtree at ``path`` set."""
    name, _, rest = path.partition("/")
    return {**tree, name: _with(tree.get(name, {}), rest, node) if rest else node}
