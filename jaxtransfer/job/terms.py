"""From a configuration to the terms of its objective: what they read, what trains beside the model, the constants."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.config import Config, ConfigError
from jaxtransfer.config import objectives as configured
from jaxtransfer.data.examples import Examples, collate
from jaxtransfer.job.shapes import Shapes, batch_of
from jaxtransfer.models import apply
from jaxtransfer.models.projection import PROJECTION
from jaxtransfer.objectives import (
    Objective,
    Term,
    aux_of,
    boundary,
    captures,
    continual,
    seen,
    shapes_of,
    states_of,
    total,
)
from jaxtransfer.objectives import terms as made
from jaxtransfer.step import bare
from jaxtransfer.tasks import Task
from jaxtransfer.tree.partition import combine
from jaxtransfer.tree.paths import Params
from jaxtransfer.types import AUX, TARGET, Model, Source, State, View

DOMAINS = (TARGET, made.REPLAY)
_OF_ONE_CLASS = (
    configured.LwFConfig, configured.EWCConfig, configured.R3FConfig, configured.CDANConfig, configured.MCCConfig,
    configured.MCDConfig, configured.EntropyConfig, configured.InformationMaximisationConfig,
    configured.CentroidLabelsConfig, configured.PseudoLabelsConfig,
)  # fmt: skip
"""Terms that read predictions as a softmax."""


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """The objective of a run beside its task's loss.

    Attributes:
      terms: in the configuration's order.
      options: keywords of `make_step`.
      task: the task's loss.
      new: regex of the leaves that the source has not.
      shapes: widths that the terms' own parameters depend on; None without terms.
    """

    config: Config
    model: Model
    terms: tuple[Term, ...]
    task: Objective
    new: str
    shapes: Any = None

    @property
    def objective(self) -> Objective:
        """The sum."""
        how = self.config.objective
        if how.plain:
            return self.task
        return total(self.task if how.task else None, self.terms, weight=how.task)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `make_step`."""
        how = self.config.objective
        return {
            "capture": captures(self.terms),
            "perturb": made.mixout(how.mixout, new=self.new) if how.mixout else None,
            "memory": self.task if how.memory else None,
        }

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that a batch has beside its own rows."""
        read = {name for term in self.terms for name in term.domains}
        return tuple(name for name in DOMAINS if name in read or (name == made.REPLAY and self.config.objective.memory))

    @property
    def anchored(self) -> bool:
        """Whether the source's values of what trains are read."""
        return bool(self.config.objective.anchored)

    def beside(self, seed: int) -> Params:
        """What trains beside the model, ``{"aux": ...}``, or nothing."""
        if self.shapes is None:
            return {}
        return aux_of(self.terms, self.model, jax.random.fold_in(jax.random.key(seed), 3), self.shapes)

    def constants(self, state: State, frozen: Params, replay: Examples | None) -> dict[str, Any]:
        """What the objective knows beforehand, of a run's first state and the examples of the domain before."""
        found: dict[str, Any] = {"anchor": state.params}
        if jax.tree.leaves(state.stats):
            found["statistics"] = state.stats
        for entry in self.config.objective.terms:
            if isinstance(entry, configured.EWCConfig):
                assert replay is not None
                count, buckets = min(entry.examples, len(replay)), self.config.buckets
                rows = collate(replay, np.arange(count), buckets[-1] if buckets else 0)
                found["ewc"] = importances(self.model, entry, state, frozen, rows, state.key)
        return found

    @property
    def states(self) -> Params:
        """The first `State.terms`."""
        return {} if self.shapes is None else states_of(self.terms, self.shapes)


def terms_of(config: Config, task: Task, trunk: Source, model: Model, params: Params, steps: int) -> Terms:
    """The terms of a configuration for a model.

    Args:
      config: the configuration.
      task: its task.
      trunk: its source, whose inputs a batch is made of.
      model: under the task's head.
      params: arrays or shapes.
      steps: of the run, which schedules count.

    Raises:
      ConfigError: a term does not fit the model, the task or the batch: no such boundary, no logits a row, no head to
        go on with, too few rows.
    """
    found = []
    for i, entry in enumerate(config.objective.terms):
        where = f"objective.terms[{i}]"
        try:
            found.append(_term(entry, task, model, steps))
        except ValueError as error:
            raise ConfigError(f"{where}: {entry.method}: {error}", where) from None
        if isinstance(entry, (configured.LwFConfig, configured.EWCConfig)) and task.fresh_head:
            raise ConfigError(
                f"{where}: {entry.method} holds to the source's own predictions, but its head is drawn anew; "
                "task.head: source goes on with it", where,
            )  # fmt: skip
        if isinstance(entry, _OF_ONE_CLASS) and not task.single_label:
            several = "task.multi_label says that it may be of several"
            told = several if getattr(config.task, "multi_label", False) else f"{task.name} gives it none"
            raise ConfigError(f"{where}: {entry.method} takes each example to be of one class; {told}", where)
    shapes = None
    if found:
        batch = batch_of(config, task, trunk)
        try:
            shapes = shapes_of(model, params, batch, found)
            wide = [term for term in found if term.aux is not None]
            jax.eval_shape(lambda: aux_of(wide, model, jax.random.key(0), shapes))
        except ValueError as error:
            raise ConfigError(f"objective.terms: {error}", "objective.terms") from None
        _check_losses(config, task, model, params, batch, found, shapes)
    return Terms(config, model, tuple(found), task.objective, _new(task), shapes)


def _check_losses(
    config: Config, task: Task, model: Model, params: Params, batch: Shapes, terms: Sequence[Term], shapes: Any
) -> None:
    """Traces every term on the shapes of a microbatch, the same in every domain."""
    count = max(1, config.data.batch // config.run.accumulate)
    rows = {name: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    if config.objective.task == 0:
        rows.pop("labels", None)
    dtype = jnp.dtype(config.run.precision)
    states = jax.eval_shape(lambda: states_of(terms, shapes))
    beside = jax.eval_shape(lambda: aux_of(terms, model, jax.random.key(0), shapes))

    def losses(params: Params, states: Params, rows: Mapping[str, jax.Array]) -> None:
        key, step = jax.random.key(0), jnp.zeros((), jnp.int32)

        def view(rows: Mapping[str, jax.Array]) -> View:
            outputs = apply(model, bare(params), rows, capture=captures(terms), dtype=dtype, also=(PROJECTION,))
            constants = {"anchor": bare(params), "ewc": bare(params)}
            return View(params, outputs, rows, key, step, params, {}, constants, states, model, dtype)

        target = {name: x for name, x in rows.items() if name != "labels"}
        own = rows if task.augment is None else task.augment(rows, key)
        main = dataclasses.replace(view(own), domains={TARGET: view(target), made.REPLAY: view(rows)})
        for i, (term, entry) in enumerate(zip(terms, config.objective.terms, strict=True)):
            where = f"objective.terms[{i}]"
            try:
                if isinstance(entry, configured.EWCConfig):
                    seen.logits(main)  # of which the Fisher information is, before the first step
                term.loss(main)
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"{where}: {entry.method}: {error}", where) from None

    jax.eval_shape(losses, {**params, **beside}, states, rows)


def _term(entry: Any, task: Task, model: Model, steps: int) -> Term:
    layer = functools.partial(boundary, model)
    match entry:
        case configured.L2SPConfig():
            return made.l2_sp(entry.alpha, entry.beta, weight=entry.weight, new=_new(task))
        case configured.EWCConfig():
            return made.ewc(weight=entry.weight)
        case configured.BSSConfig():
            return made.spectral_shrinkage(layer(entry.layer), entry.k, weight=entry.weight)
        case configured.R3FConfig():
            return made.r3f(model.stages[0].name, entry.scale, weight=entry.weight)
        case configured.LwFConfig():
            return made.lwf(entry.temperature, weight=entry.weight)
        case configured.FeatureDistillationConfig():
            layers = tuple(map(layer, entry.layers)) or (layer(None),)
            return made.feature_distillation(layers, weight=entry.weight)
        case configured.ReplayConfig():
            return made.replay(task.objective, weight=entry.weight)
        case configured.CORALConfig():
            return made.coral(layer(entry.layer), weight=entry.weight)
        case configured.MMDConfig():
            return made.mmd(layer(entry.layer), entry.scales, unbiased=entry.unbiased, weight=entry.weight)
        case configured.DANNConfig():
            return made.dann(layer(entry.layer), steps, width=entry.width, weight=entry.weight)
        case configured.CDANConfig():
            return made.cdan(
                layer(entry.layer), steps, entropy=entry.entropy, random=entry.random, width=entry.width,
                weight=entry.weight,
            )  # fmt: skip
        case configured.MCCConfig():
            return made.mcc(entry.temperature, weight=entry.weight)
        case configured.MCDConfig():
            return made.mcd(task.objective, layer(None), weight=entry.weight)
        case configured.EntropyConfig():
            return made.entropy(weight=entry.weight)
        case configured.InformationMaximisationConfig():
            return made.information_maximisation(weight=entry.weight)
        case configured.CentroidLabelsConfig():
            return made.centroid_labels(layer(entry.layer), entry.momentum, weight=entry.weight)
        case configured.PseudoLabelsConfig():
            return made.pseudo_labels(entry.threshold, weight=entry.weight)
    raise TypeError(f"{type(entry).__name__} is no term")


def _new(task: Task) -> str:
    """Which leaves the source has not: a kept head is none of them."""
    return made.NEW if task.fresh_head else f"{AUX}/.*"


def importances(
    model: Model, entry: configured.EWCConfig, state: State, frozen: Params, rows: Mapping[str, Any], key: jax.Array
) -> Params:
    """The Fisher information of the trained leaves on rows of the domain before; see `continual.fisher`."""
    labels = jnp.asarray(rows["labels"]) if entry.fisher == "empirical" else None
    examples = {name: jnp.asarray(value) for name, value in rows.items() if name not in ("labels", "index")}

    def predict(trained: Params, row: Mapping[str, jax.Array]) -> jax.Array:
        params = bare(combine(combine(trained, state.stats), frozen))
        return apply(model, params, jax.tree.map(lambda x: x[None], dict(row)))["logits"][0]

    options = {"labels": labels, "key": key if entry.fisher == "sampled" else None}
    found = jax.jit(functools.partial(continual.fisher, predict, kind=entry.fisher, **options))
    return found(state.params, examples)
