"""From a configuration to the abstract step of its run: no weights and no data are read."""

import dataclasses
import functools
from typing import Any

import jax

from jaxtransfer.config import Config, ConfigError
from jaxtransfer.job.abstract import adapted, architecture
from jaxtransfer.job.prepare import trained
from jaxtransfer.job.shapes import Shapes, batch_of
from jaxtransfer.job.sources import sharding_rules
from jaxtransfer.job.tasks import make_task
from jaxtransfer.models.api import apply, layout_of
from jaxtransfer.plan import Blueprint, blueprint
from jaxtransfer.tasks import Task
from jaxtransfer.tree.stacks import stack
from jaxtransfer.types import Source


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """A run's model, adapted, and its batches, as shapes; steps for any mesh are made of it.

    Attributes:
      source: with abstract parameters, adapters and quantised weights among them.
      batch: of the longest bucket, over all devices.
    """

    config: Config
    task: Task
    source: Source
    batch: Shapes

    def on(self, mesh: Any, **run: Any) -> Blueprint:
        """The step on a mesh, of devices or abstract, with fields of ``run`` set otherwise."""
        config = dataclasses.replace(self.config, run=dataclasses.replace(self.config.run, **run))
        model, params = self.source.model, self.source.params
        rules = sharding_rules(mesh, model, params)
        how = trained(config, self.task, model, params, config.run.steps or 1000, mesh, rules)
        return blueprint(model, params, how["labels"], how["tx"], how["step"], self.batch, mesh=mesh, sharding=rules)


def draft(config: Config, say: Any) -> Draft:
    """The model and the batches of a configuration, without weights and without data.

    Where the data name the classes, two stand for them: they change nothing of size.

    Raises:
      SourceError, HubError, ConfigFieldError: the architecture cannot be read; ConfigError: the task or its adapters do
        not fit it.
    """
    if not config.objective.plain:
        raise ConfigError(
            "objective: a plan counts the task's loss alone; leave terms, mixout and memory out", "objective"
        )
    labels = getattr(config.task, "labels", ()) or ("0", "1")
    task = make_task(config, None, labels)
    trunk = architecture(config, task, say)
    source = adapted(config, trunk, task)
    batch = batch_of(config, task, trunk)
    laid = stack(source.params, layout_of(source.model, source.params))
    try:
        jax.eval_shape(functools.partial(apply, source.model), laid, batch)
    except ValueError as error:
        raise ConfigError(f"task: {error}", "task") from None
    return Draft(config, task, source, batch)
