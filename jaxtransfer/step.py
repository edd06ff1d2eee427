"""The step: ``step(state, frozen, batch) -> (state, metrics)``, differentiating the trainable partition only.

No gradient, optimizer state, clipping norm, accumulator or weight decay exists for a frozen leaf, by construction.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt.groups import FROZEN, STATS
from jaxtransfer.adapt.heads import check_tied
from jaxtransfer.models.api import apply, layout_of
from jaxtransfer.models.layers import Attend
from jaxtransfer.models.projection import PROJECTION
from jaxtransfer.optim import master
from jaxtransfer.parallel import (
    BATCH_AXES,
    SEQUENCE,
    ShardingError,
    check_sequence,
    gather,
    parts,
    put,
    shardings,
    state_shardings,
)
from jaxtransfer.tree.diff import TreeError
from jaxtransfer.tree.partition import combine, partition
from jaxtransfer.tree.paths import Params, flatten, map_with_path
from jaxtransfer.tree.rules import Rule, Rules
from jaxtransfer.tree.stacks import layers_of, stack, unstack
from jaxtransfer.tree.weights import Fixed
from jaxtransfer.types import AUX, TARGET, Model, State, View

Metrics = dict[str, jax.Array]
Objective = Callable[[View], tuple[jax.Array, Metrics]]
Step = Callable[[State, Params, Mapping[str, Any]], tuple[State, Metrics]]
Observe = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
Moving = tuple[Params, Params]
"""Running statistics, and the state of the objective's terms: what a forward pass moves."""
Perturb = Callable[[Params, Mapping[str, Any], jax.Array], Params]
_AUGMENT = 2**31 - 1  # no stage has these indices, whose keys would be the same
_PERTURB, _MEMORY, _DOMAINS = _AUGMENT - 1, _AUGMENT - 2, _AUGMENT - 3
CONSTANTS = "constants"
"""Where in ``frozen`` lies what objectives know beforehand; no part of the model."""


def init_state(
    model: Model,
    params: Params,
    labels: Any,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    mesh: Mesh | None = None,
    sharding: Rules = (),
    terms: Params | None = None,
) -> tuple[State, Params]:
    """Lays the parameters out and splits them by label: what a step changes, and what it does not.

    Trainable leaves are copied (the state is donated) and kept in float32 at least; frozen ones keep their dtype.

    Args:
      model: the model; its layers are what is stacked.
      params: canonical parameters.
      labels: tree of labels over them: a group's name, ``frozen`` or ``stats``.
      tx: the transformation over the trainable partition.
      key: typed PRNG key of the run.
      mesh, sharding: where and how to place everything; see `parallel.shardings`.
      terms: the first state of the objective's terms, `objectives.states_of`.

    Raises:
      ValueError: nothing trains, an integer leaf would, or a tied head would over a frozen embedding.
      ShardingError: the rules do not fit the mesh, or tokens would be split of a model without attention.
      TreeError: labels and parameters differ in structure.
    """
    by_path = flatten(labels)
    if by_path.keys() != flatten(params).keys():
        raise TreeError(f"labels and params differ at {sorted(by_path.keys() ^ flatten(params).keys())[:6]}")
    if all(label in (FROZEN, STATS) for label in by_path.values()):
        raise ValueError("nothing trains: every label is 'frozen' or 'stats'")
    for path, leaf in flatten(params).items():
        if by_path[path] not in (FROZEN, STATS) and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{path} is {leaf.dtype} and cannot train; label it 'frozen' or 'stats'")
    check_tied(model, by_path)
    if mesh is not None:
        check_sequence(mesh, model, params)
    laid = stack(params, layout_of(model, params, labels))
    laid = jax.tree.map(jnp.asarray, laid) if mesh is None else put(laid, shardings(laid, mesh, sharding))

    def kind(path: str) -> str:
        return by_path[layers_of(path)[0]]

    frozen_leaves, live = partition(laid, lambda path: kind(path) == FROZEN)
    stats, trained = partition(live, lambda path: kind(path) == STATS)
    trained, stats = jax.tree.map(lambda x: jnp.array(x, master(x.dtype), copy=True), (trained, stats))
    init = jax.jit(tx.init)
    step = jnp.zeros((), jnp.int32)
    if mesh is not None:
        where = jax.tree.map(lambda x: x.sharding, trained)
        abstract = jax.eval_shape(tx.init, trained)
        init = jax.jit(tx.init, out_shardings=state_shardings(abstract, trained, where, mesh))
        step, key = put((step, key), NamedSharding(mesh, P()))
        terms = put(terms or {}, NamedSharding(mesh, P()))
    return State(step, trained, stats, init(trained), jnp.copy(key), dict(terms or {})), frozen_leaves


def whole(state: State, frozen: Params) -> Params:
    """The laid-out parameters of the whole model, and of what trains beside it."""
    return combine(combine(state.params, state.stats), without_constants(frozen)[0])


def params_of(state: State, frozen: Params) -> Params:
    """The canonical parameters of the whole model: for export, analysis, another phase."""
    return unstack(whole(state, frozen))


def training_stages(model: Model, trained: Params, frozen: Params) -> set[str]:
    """The stages in training mode: those with a trainable leaf, and those without parameters behind one of them."""
    live = {layer for path in flatten(trained) for layer in layers_of(path)}
    still = {layer for path in flatten(frozen) for layer in layers_of(path)}
    training: set[str] = set()
    for stage in model.stages:
        own, held = (any(path.startswith(f"{stage.name}/") for path in paths) for paths in (live, still))
        if own or (training and not held):
            training.add(stage.name)
    return training


def make_step(
    model: Model,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    sharding: Rules = (),
    precision: Any = jnp.float32,
    remat: str | None = None,
    attend: Attend | None = None,
    accumulate: int = 1,
    donate: bool = True,
    augment: Callable[[Mapping[str, Any], jax.Array], Mapping[str, Any]] | None = None,
    capture: Sequence[str] = (),
    perturb: Perturb | None = None,
    memory: Objective | None = None,
) -> Step:
    """A jitted training step.

    ``g = grad(loss)`` over ``state.params`` only, ``u = tx(g)``, ``params + u``. A step whose loss or gradient, or that
    of the memory, is not finite leaves the state as it was, bit for bit, and says so in ``metrics["finite"]``.

    A mapping among the batch's entries is a further domain: its rows run through the same parameters, behind the
    batch's, and the objective finds them in ``view.domains``.

    Args:
      model: the model. Stages whose parameters are all frozen run in evaluation mode.
      objective: ``objective(view) -> (mean loss, metrics)``; ``metrics["weight"]`` weights microbatches.
      tx: as given to `init_state`.
      mesh, sharding: as given to `init_state`; gradients and new states are sharded as the parameters are.
      precision: dtype of activations (``jnp.bfloat16`` for mixed precision; masters stay float32).
      remat: None, ``"full"`` or ``"dots"``.
      attend: what attention is left to, `parallel.splash` of the same mesh; None is XLA.
      accumulate: number of microbatches that the batch is cut into; the batch must divide by it.
      donate: whether ``state`` is donated (its buffers are reused).
      augment: ``augment(batch, key) -> batch``, on the device and from the step's key: mixup.
      capture: boundaries whose activations the objective sees, of every domain.
      perturb: ``perturb(trained, constants, key) -> trained``, what the loss is taken at: Mixout.
      memory: an objective on the batch's domain ``replay``, which then is no part of the loss; its gradient is handed
        to ``tx`` as ``reference``, for `objectives.continual.a_gem`.

    Returns:
      ``step(state, frozen, batch) -> (state, metrics)``; metrics are device arrays: the objective's, ``loss``,
      ``grad_norm`` (before clipping), ``finite``.
    """

    def loss_fn(
        trained: Params, moving: Moving, frozen: Params, batch: Any, key: jax.Array, step: jax.Array,
        objective: Objective = objective,
    ) -> Any:  # fmt: skip
        (stats, terms), (frozen, constants) = moving, without_constants(frozen)
        if perturb is not None:
            trained = perturb(trained, constants, jax.random.fold_in(key, _PERTURB))
        training = training_stages(model, trained, frozen)
        batch, domains = _split(batch)
        if augment is not None:
            batch = augment(batch, jax.random.fold_in(key, _AUGMENT))

        def view(stats: Params, batch: Any, key: jax.Array) -> tuple[View, Params]:
            params = combine(combine(trained, stats), frozen)
            outputs = apply(
                model, held(_gathered(model, bare(params), mesh, sharding), frozen), batch, train=training, key=key,
                capture=capture, remat=remat, dtype=precision, constrain=_constraint(mesh), attend=attend,
                also=(PROJECTION,),
            )  # fmt: skip
            seen = View(params, outputs, batch, key, step, trained, {}, constants, terms, model, precision)
            return seen, _merge(stats, outputs.get("stats", {}))

        main, stats = view(stats, batch, key)
        others = {}
        for index, (name, rows) in enumerate(sorted(domains.items())):
            others[name], stats = view(stats, rows, jax.random.fold_in(key, _DOMAINS - index))
        loss, metrics = objective(dataclasses.replace(main, domains=others))
        metrics = dict(metrics)
        return loss.astype(jnp.float32), (metrics, (stats, metrics.pop("terms", terms)))

    statistics = [re.compile(pattern) for pattern in model.stats]

    def held(params: Params, frozen: Params) -> Params:
        """Frozen statistics marked as such: their layers must not move them, even in a stage that trains."""
        if not statistics or model.family == "foreign":
            return params
        fixed = {path for path in flatten(frozen) if any(p.fullmatch(layers_of(path)[0]) for p in statistics)}
        return map_with_path(lambda path, leaf: Fixed(leaf) if path in fixed else leaf, params)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    update = optax.with_extra_args_support(tx).update

    def remembered(state: State, frozen: Params, rows: Any, key: jax.Array) -> Params:
        """The gradient of the loss on the memory."""
        found = grad_fn(
            state.params, (state.stats, state.terms), frozen, rows, jax.random.fold_in(key, _MEMORY), state.step, memory
        )
        return _pin(found[1], mesh, sharding)

    def step(state: State, frozen: Params, batch: Mapping[str, Any]) -> tuple[State, Metrics]:
        key, extra = jax.random.fold_in(state.key, state.step), {}
        if memory is not None:
            if "replay" not in batch:
                raise ValueError(f"memory: the batch has no domain 'replay'; it has {', '.join(batch)}")
            batch = dict(batch)
            extra["reference"] = remembered(state, frozen, batch.pop("replay"), key)
        if accumulate == 1:
            moving = (state.stats, state.terms)
            (loss, (metrics, moving)), grads = grad_fn(state.params, moving, frozen, batch, key, state.step)
        else:
            loss, metrics, moving, grads = _accumulated(grad_fn, accumulate, state, frozen, batch, key)
        stats, terms = moving
        grads = _pin(grads, mesh, sharding)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if extra:
            finite &= jnp.isfinite(optax.tree.norm(extra["reference"]))

        def accepted(old: State) -> State:
            updates, opt_state = update(grads, old.opt_state, old.params, norm=norm, **extra)
            params: Any = optax.apply_updates(old.params, updates)
            return State(old.step + 1, params, stats, opt_state, old.key, terms)

        # A branch, not a select: XLA then updates the donated state in place.
        kept = jax.lax.cond(finite, accepted, lambda old: old, state)
        metrics = {**metrics, "loss": loss, "grad_norm": norm, "finite": finite}
        return _pin_state(kept, mesh, sharding), metrics

    return jax.jit(step, donate_argnums=(0,) if donate else ())


def _accumulated(grad_fn: Any, count: int, state: State, frozen: Params, batch: Any, key: jax.Array) -> Any:
    """Mean loss, metrics and gradient over microbatches, weighted by ``metrics["weight"]``; statistics in order."""

    def rows(x: jax.Array) -> jax.Array:
        if x.shape[0] % count:
            raise ValueError(f"a batch of {x.shape[0]} rows does not divide into {count} microbatches")
        # Every count-th row, so that a batch split over devices stays split in each microbatch.
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    def part(moving: Moving, micro: Any, index: Any) -> Any:
        live = jax.random.fold_in(key, index)
        (loss, (metrics, moving)), grads = grad_fn(state.params, moving, frozen, micro, live, state.step)
        weight = metrics.pop("weight", jnp.ones(()))
        # A mean over nothing is 0/0, and counts for nothing; a weight that is no number must spoil the whole.
        weighted = jax.tree.map(
            lambda x: jnp.where(weight == 0, jnp.zeros_like(x), x * weight.astype(x.dtype)), (loss, metrics, grads)
        )
        return (*weighted, weight), moving

    def body(carry: Any, xs: Any) -> Any:
        total, moving = carry
        new, moving = part(moving, *xs)
        return (jax.tree.map(jnp.add, total, new), moving), None

    first = (state.stats, state.terms)
    xs = (jax.tree.map(rows, dict(batch)), jnp.arange(count))
    shapes, _ = jax.eval_shape(part, first, *jax.tree.map(lambda x: x[0], xs))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    ((loss, metrics, grads, weight), moving), _ = jax.lax.scan(body, (zero, first), xs)
    whole = jnp.where(weight == 0, jnp.ones_like(weight), weight)
    loss, metrics, grads = jax.tree.map(lambda x: x / whole.astype(x.dtype), (loss, metrics, grads))
    return loss, {**metrics, "weight": weight}, moving, grads


def _split(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of a batch, and its further domains, of which the target has no labels."""
    domains = {name: rows for name, rows in batch.items() if isinstance(rows, Mapping)}
    if "labels" in domains.get(TARGET, {}):
        raise ValueError(f"the batch's domain {TARGET!r} has labels, which no objective may see; leave them out")
    return {name: rows for name, rows in batch.items() if name not in domains}, domains


def bare(params: Params) -> Params:
    """The parameters of the model alone, without those that train beside it."""
    return {name: node for name, node in params.items() if name != AUX}


def with_constants(frozen: Params, **constants: Any) -> Params:
    """``frozen`` with what objectives know beforehand, which they find in ``view.constants``.

    Of a tree that is to stay while the state moves on, such as ``anchor=state.params``, the leaves are copied: a step
    is given the state to keep. What lies there is no part of the model, and is not saved.
    """
    held = jax.tree.map(jnp.copy, constants)
    return {**frozen, CONSTANTS: {**frozen.get(CONSTANTS, {}), **held}}


def without_constants(frozen: Params) -> tuple[Params, Mapping[str, Any]]:
    """The inverse of `with_constants`: the frozen leaves, and the constants."""
    return {name: node for name, node in frozen.items() if name != CONSTANTS}, frozen.get(CONSTANTS, {})


def _merge(stats: Params, new: Params) -> Params:
    """The running statistics with those that training moved."""
    moved = flatten(new)
    if lost := sorted(moved.keys() - flatten(stats).keys()):
        raise TreeError(f"training moves the running statistics {', '.join(lost[:6])}, which are not labelled 'stats'")
    return map_with_path(lambda path, old: moved[path].astype(old.dtype) if path in moved else old, stats)


def _constraint(mesh: Mesh | None) -> Callable[[jax.Array], jax.Array] | None:
    """Activations are split by rows over the batch axes, and by tokens, (B, T, ...), over the sequence axis."""
    if mesh is None:
        return None
    cut = parts(mesh, SEQUENCE)

    def constrain(x: jax.Array) -> jax.Array:
        if cut == 1 or x.ndim < 3:
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES)))
        if x.shape[1] % cut:
            raise ShardingError(
                f"mesh: sequence = {cut} does not divide activations of {x.shape[1]} positions, {x.shape}; take "
                "lengths that it divides, or a mesh without this axis"
            )
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES, SEQUENCE)))

    return constrain


def _gathered(model: Model, params: Params, mesh: Mesh | None, rules: Rules) -> Params:
    """What lies outside stacks ready for its use; a user's own model takes arrays alone."""
    return params if mesh is None else gather(params, mesh, rules, columns=model.family != "foreign")


def _pin(tree: Params, mesh: Mesh | None, rules: Rules) -> Params:
    """A tree over part of the parameters, sharded as they are."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, _where(tree, mesh, rules))


def _pin_state(state: State, mesh: Mesh | None, rules: Rules) -> State:
    """A state sharded as `init_state` made it, or the next step would be compiled anew and could not reuse buffers."""
    return state if mesh is None else jax.lax.with_sharding_constraint(state, places(state, mesh, rules))


def places(state: State, mesh: Mesh, rules: Rules) -> Any:
    """The sharding of every leaf of a state, concrete or abstract, as `init_state` makes it and a step keeps it."""
    params, stats = (_where(tree, mesh, rules) for tree in (state.params, state.stats))
    everywhere = NamedSharding(mesh, P())
    moments = state_shardings(state.opt_state, state.params, params, mesh)
    terms = jax.tree.map(lambda _: everywhere, state.terms)
    return State(everywhere, params, stats, moments, everywhere, terms)  # type: ignore[arg-type]


def _where(tree: Params, mesh: Mesh, rules: Rules) -> Any:
    return shardings(tree, mesh, tuple(Rule(rule[0], rule[1], optional=True) for rule in rules))


def make_eval(
    model: Model,
    outputs: Sequence[str] | Observe = ("logits",),
    *,
    mesh: Mesh | None = None,
    sharding: Rules = (),
    precision: Any = jnp.float32,
    attend: Attend | None = None,
) -> Callable[[State, Params, Mapping[str, Any]], dict[str, jax.Array]]:
    """A jitted evaluation: ``evaluate(state, frozen, batch)`` gives what is asked for, in evaluation mode.

    Args:
      model: the model.
      outputs: names of outputs of `apply`, or a function ``(outputs, batch) -> {name: (B, ...)}`` of them.
      mesh, sharding: as given to `init_state`; the outputs are then replicated.
      precision: dtype of activations.
      attend: as given to `make_step`.
    """

    def evaluate(state: State, frozen: Params, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        params = _gathered(model, bare(whole(state, frozen)), mesh, sharding)
        also = (PROJECTION,) if callable(outputs) else ()
        found = apply(model, params, batch, dtype=precision, constrain=_constraint(mesh), attend=attend, also=also)
        picked = dict(outputs(found, batch)) if callable(outputs) else _picked(found, outputs)
        return picked if mesh is None else jax.lax.with_sharding_constraint(picked, NamedSharding(mesh, P()))

    return jax.jit(evaluate)


def _picked(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"the model has no output {missing[0]!r}; it has {', '.join(found)}")
    return {name: found[name] for name in names}


def shard_batch(batch: Mapping[str, Any], mesh: Mesh | None) -> Mapping[str, Any]:
    """A process's rows of the batch as global arrays, split over the mesh's batch axes; unchanged without a mesh."""
    if mesh is None:
        return batch
    where = NamedSharding(mesh, P(BATCH_AXES))
    return jax.tree.map(lambda value: jax.make_array_from_process_local_data(where, value), dict(batch))
