"""Phases that come before a run: what trains in each, how, for how long; the rest is the run's own."""

import dataclasses
from typing import Any, Literal

from jaxtransfer.config.document import ConfigError
from jaxtransfer.config.objectives import ObjectiveConfig, readers
from jaxtransfer.config.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseAdaptConfig:
    """What trains in a phase, as in ``adapt``; adapters and what is packed are the run's own."""

    train: Literal["full", "head", "last", "rules", "adapters", "lora_plus", "biases", "norms"] = "full"
    last: int | None = None
    rules: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseRunConfig:
    """How long a phase is, and how often it is measured, as in ``run``; exactly one of epochs and steps."""

    epochs: int | None = None
    steps: int | None = None
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    patience: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A phase before the run, on the same data, source and task.

    Attributes:
      objective, optimizer: None is the run's own.
    """

    adapt: PhaseAdaptConfig = PhaseAdaptConfig()
    objective: ObjectiveConfig | None = None
    optimizer: OptimizerConfig | None = None
    run: PhaseRunConfig


def phase(config: Any, index: int) -> Any:
    """A phase as a run of its own, whose phases are those before it, in a folder of its own.

    Args:
      config: a `Config`.
      index: of one of its phases.

    Raises:
      ConfigError: it does not fit; names ``phases[index]``.
    """
    given: PhaseConfig = config.phases[index]
    objective = given.objective or config.objective
    try:
        if (objective.task == 0) != (config.objective.task == 0):
            told = "objective.task: 0 leaves the labels of data.train unread, so it is 0 in every phase and in the run"
            raise ConfigError(told, "objective.task")
        idle = {name: None for name, found in readers(objective).items() if not found}
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, **idle),
            adapt=_with(config.adapt, given.adapt, "adapt", may_wait=True),
            objective=objective,
            optimizer=given.optimizer or config.optimizer,
            run=_with(config.run, given.run, "run"),
            phases=config.phases[:index],
            out=f"{config.out}/phase-{index + 1}",
        )
    except ConfigError as error:
        if error.path.startswith("phases["):  # an earlier phase's
            raise
        where = f"phases[{index}]"
        if error.path.startswith("data."):
            raise ConfigError(f"{error} ({where})", error.path) from None
        raise ConfigError(f"{where}.{error}", f"{where}.{error.path}") from None


def read_elsewhere(phases: tuple[PhaseConfig, ...], name: str) -> bool:
    """Whether a phase reads a further domain, which the run then need not."""
    return any(each.objective is not None and readers(each.objective)[name] for each in phases)


def _with(record: Any, given: Any, name: str, **more: Any) -> Any:
    """The run's own record with what a phase says."""
    said = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    try:
        return dataclasses.replace(record, **said, **more)
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}", f"{name}.{error.path}") from None
