"""The training step."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxtransfer.models.api import apply
from jaxtransfer.models.attention import Attend
from jaxtransfer.models.projection import PROJECTION
from jaxtransfer.objectives.losses import Objective
from jaxtransfer.step.placing import constraint, gathered, pin, pin_state
from jaxtransfer.step.state import bare, without_constants
from jaxtransfer.tree.diff import TreeError
from jaxtransfer.tree.partition import combine
from jaxtransfer.tree.paths import Params, flatten, map_with_path
from jaxtransfer.tree.rules import Rules
from jaxtransfer.tree.stacks import layers_of
from jaxtransfer.tree.weights import Fixed
from jaxtransfer.types import TARGET, Model, State, View

Metrics = dict[str, jax.Array]
Step = Callable[[State, Params, Mapping[str, Any]], tuple[State, Metrics]]
Moving = tuple[Params, Params]
"""Running statistics, and the state of the objective's terms: what a forward pass moves."""
Perturb = Callable[[Params, Mapping[str, Any], jax.Array], Params]
_AUGMENT = 2**31 - 1  # no stage has these indices, whose keys would be the same
_PERTURB, _MEMORY, _DOMAINS = _AUGMENT - 1, _AUGMENT - 2, _AUGMENT - 3


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
    loss_fn = _loss_of(
        model, objective, mesh=mesh, sharding=sharding, augment=augment, perturb=perturb, capture=capture, remat=remat,
        dtype=precision, attend=attend,
    )  # fmt: skip
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    update = optax.with_extra_args_support(tx).update

    def remembered(state: State, frozen: Params, rows: Any, key: jax.Array) -> Params:
        """The gradient of the loss on the memory."""
        found = grad_fn(
            state.params, (state.stats, state.terms), frozen, rows, jax.random.fold_in(key, _MEMORY), state.step, memory
        )
        return pin(found[1], mesh, sharding)

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
        grads = pin(grads, mesh, sharding)
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
        return pin_state(kept, mesh, sharding), metrics

    return jax.jit(step, donate_argnums=(0,) if donate else ())


def _loss_of(
    model: Model, objective: Objective, *, mesh: Mesh | None, sharding: Rules, augment: Any, perturb: Perturb | None,
    **how: Any,
) -> Callable[..., Any]:  # fmt: skip
    """``loss(trained, moving, frozen, batch, key, step) -> (loss, (metrics, moving))``; ``how`` as in `apply`."""

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
                model, _held(model, gathered(model, bare(params), mesh, sharding), frozen), batch, train=training,
                key=key, constrain=constraint(mesh), also=(PROJECTION,), **how,
            )  # fmt: skip
            seen = View(params, outputs, batch, key, step, trained, {}, constants, terms, model, how["dtype"])
            return seen, _merge(stats, outputs.get("stats", {}))

        main, stats = view(stats, batch, key)
        others = {}
        for index, (name, rows) in enumerate(sorted(domains.items())):
            others[name], stats = view(stats, rows, jax.random.fold_in(key, _DOMAINS - index))
        loss, metrics = objective(dataclasses.replace(main, domains=others))
        metrics = dict(metrics)
        return loss.astype(jnp.float32), (metrics, (stats, metrics.pop("terms", terms)))

    return loss_fn


def _held(model: Model, params: Params, frozen: Params) -> Params:
    """Frozen statistics marked as such: their layers must not move them, even in a stage that trains."""
    if not model.stats or model.family == "foreign":
        return params
    statistics = [re.compile(pattern) for pattern in model.stats]
    fixed = {path for path in flatten(frozen) if any(p.fullmatch(layers_of(path)[0]) for p in statistics)}
    return map_with_path(lambda path, leaf: Fixed(leaf) if path in fixed else leaf, params)


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


def _merge(stats: Params, new: Params) -> Params:
    """The running statistics with those that training moved."""
    moved = flatten(new)
    if lost := sorted(moved.keys() - flatten(stats).keys()):
        raise TreeError(f"training moves the running statistics {', '.join(lost[:6])}, which are not labelled 'stats'")
    return map_with_path(lambda path, old: moved[path].astype(old.dtype) if path in moved else old, stats)


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
