"""What is minimised besides the task's loss, a record for each term, told apart by ``method``."""

import dataclasses
from typing import Literal

from jaxtransfer.config.checks import at_least, check
from jaxtransfer.config.document import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class L2SPConfig:
    """``alpha/2 |w - w0|^2`` over the source's parameters, ``beta/2 |w|^2`` over the head's (arXiv:1802.01483)."""

    method: Literal["l2_sp"]
    weight: float = 1.0
    alpha: float = 0.01
    beta: float = 0.01

    def __post_init__(self) -> None:
        at_least(self, 0, "weight", "alpha", "beta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EWCConfig:
    """``weight/2 sum F (w - w0)^2``: what mattered to the source on ``data.replay`` stays (arXiv:1612.00796).

    Attributes:
      weight: lambda.
      fisher: over all classes, over one drawn from the prediction, or of the labels given.
      examples: of ``data.replay`` that the Fisher information is a mean over, the first ones.
    """

    method: Literal["ewc"]
    weight: float = 1.0
    fisher: Literal["exact", "sampled", "empirical"] = "exact"
    examples: int = 256

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")
        at_least(self, 1, "examples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BSSConfig:
    """The ``k`` smallest squared singular values of a batch's features: batch spectral shrinkage (Chen et al. 2019).

    Attributes:
      layer: the boundary of the features, a stage's name; None is the last before the head.
    """

    method: Literal["bss"]
    weight: float = 1e-3
    k: int = 1
    layer: str | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")
        at_least(self, 1, "k")


@dataclasses.dataclass(frozen=True, kw_only=True)
class R3FConfig:
    """Predictions that noise of ``scale`` on the embeddings does not move (arXiv:2008.03156)."""

    method: Literal["r3f"]
    weight: float = 1.0
    scale: float = 1e-5

    def __post_init__(self) -> None:
        at_least(self, 0, "weight", "scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LwFConfig:
    """The source's own predictions at a temperature: learning without forgetting (arXiv:1606.09282)."""

    method: Literal["lwf"]
    weight: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")
        _positive(self.temperature, "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureDistillationConfig:
    """The source's own activations at boundaries; ``layers``: stages' names, none is the last before the head."""

    method: Literal["feature_distillation"]
    weight: float = 0.01
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The task's loss on as many rows of ``data.replay`` in every step."""

    method: Literal["replay"]
    weight: float = 1.0

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CORALConfig:
    """Distance of the covariances of features (arXiv:1607.01719); ``layer`` as of ``bss``."""

    method: Literal["coral"]
    weight: float = 1.0
    layer: str | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMDConfig:
    """Maximum mean discrepancy of features (DAN: arXiv:1502.02791).

    Attributes:
      scales: of the Gaussian kernels, in mean squared distances.
      unbiased: leaves out the pairs of a row with itself.
      layer: as of ``bss``.
    """

    method: Literal["mmd"]
    weight: float = 1.0
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    unbiased: bool = False
    layer: str | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")
        check(bool(self.scales) and min(self.scales) > 0, "scales", "positive numbers", self.scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DANNConfig:
    """Features that no discriminator of ``width`` tells the domain from (arXiv:1505.07818); ``layer`` as of ``bss``."""

    method: Literal["dann"]
    weight: float = 1.0
    width: int = 256
    layer: str | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")
        at_least(self, 1, "width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CDANConfig:
    """As ``dann``, of features conditioned by the predictions (arXiv:1705.10667).

    Attributes:
      entropy: weighs rows by the certainty of their predictions (CDAN+E).
      random: the width of a fixed random map, where features times classes are too many; None is their product.
    """

    method: Literal["cdan"]
    weight: float = 1.0
    entropy: bool = True
    random: int | None = None
    width: int = 256
    layer: str | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")
        at_least(self, 1, "random", "width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MCCConfig:
    """Minimum class confusion of the target's predictions at a temperature (arXiv:1912.03699)."""

    method: Literal["mcc"]
    weight: float = 1.0
    temperature: float = 2.5

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")
        _positive(self.temperature, "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MCDConfig:
    """Two heads that differ on the target, and features that make them agree (arXiv:1712.02560)."""

    method: Literal["mcd"]
    weight: float = 1.0

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    """Sure predictions on the target: TENT where norms alone train (arXiv:2006.10726)."""

    method: Literal["entropy"]
    weight: float = 1.0

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InformationMaximisationConfig:
    """Predictions on the target that are sure of each row, and of no class for all (SHOT: arXiv:2002.08546)."""

    method: Literal["information_maximisation"]
    weight: float = 1.0

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CentroidLabelsConfig:
    """Pseudo-labels on the target by the nearest centroid (SHOT: arXiv:2002.08546).

    Attributes:
      momentum: of the centroids from step to step, in [0, 1).
      layer: as of ``bss``.
    """

    method: Literal["centroid_labels"]
    weight: float = 0.3
    momentum: float = 0.95
    layer: str | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")
        check(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PseudoLabelsConfig:
    """Predictions on the target of at least a probability as labels (Lee 2013)."""

    method: Literal["pseudo_labels"]
    weight: float = 1.0
    threshold: float = 0.95

    def __post_init__(self) -> None:
        at_least(self, 0, "weight")
        check(0 < self.threshold <= 1, "threshold", "in (0, 1]", self.threshold)


TermConfig = (
    L2SPConfig
    | EWCConfig
    | BSSConfig
    | R3FConfig
    | LwFConfig
    | FeatureDistillationConfig
    | ReplayConfig
    | CORALConfig
    | MMDConfig
    | DANNConfig
    | CDANConfig
    | MCCConfig
    | MCDConfig
    | EntropyConfig
    | InformationMaximisationConfig
    | CentroidLabelsConfig
    | PseudoLabelsConfig
)
OF_TARGET = (
    CORALConfig, MMDConfig, DANNConfig, CDANConfig, MCCConfig, MCDConfig, EntropyConfig, InformationMaximisationConfig,
    CentroidLabelsConfig, PseudoLabelsConfig,
)  # fmt: skip
"""Terms that read ``data.target``."""
OF_SOURCE = (L2SPConfig, EWCConfig, LwFConfig, FeatureDistillationConfig)
"""Terms that read what the source was before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised: ``task`` times the task's loss, and the terms.

    Attributes:
      task: 0 leaves the task's loss out, and the labels of ``data.train`` unread: adaptation without a source's data.
      terms: each of another method.
      mixout: the share of parameters that are the source's again in every step (arXiv:1909.11299); 0 is none.
      memory: ``a_gem`` bends the gradient so that the loss on ``data.replay`` does not rise (arXiv:1812.00420).
    """

    task: float = 1.0
    terms: tuple[TermConfig, ...] = ()
    mixout: float = 0.0
    memory: Literal["a_gem"] | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "task")
        check(0 <= self.mixout < 1, "mixout", "in [0, 1)", self.mixout)
        methods = [term.method for term in self.terms]
        if twice := [method for method in methods if methods.count(method) > 1]:
            raise ConfigError(f"terms: {twice[0]} is there twice; give it once, with the sum of the weights", "terms")
        if self.task == 0 and not self.terms:
            raise ConfigError("task: 0 leaves nothing to minimise without terms", "task")
        if self.task == 0 and {"replay", "mcd"} & {*methods}:
            raise ConfigError("task: replay and mcd are of the task's loss, which 0 leaves out", "task")

    @property
    def plain(self) -> bool:
        """Whether the task's loss is all there is."""
        return self == ObjectiveConfig()

    @property
    def anchored(self) -> list[str]:
        """The fields that read what the source was before."""
        found = [f"terms[{i}]" for i, term in enumerate(self.terms) if isinstance(term, OF_SOURCE)]
        return [*found, *(["mixout"] if self.mixout else [])]


def check_domains(objective: ObjectiveConfig, target: bool, replay: bool) -> None:
    """Every further domain that a term reads is there, and none that nothing reads.

    Raises:
      ConfigError: it is not so.
    """
    found = readers(objective)
    for name, given in (("target", target), ("replay", replay)):
        if given and not found[name]:
            raise ConfigError(f"data.{name}: nothing reads it; objective.terms say what does", f"data.{name}")
        if found[name] and not given:
            raise ConfigError(f"data.{name}: is missing; objective's {found[name][0]} reads it", f"data.{name}")
    if objective.memory and any(isinstance(term, ReplayConfig) for term in objective.terms):
        raise ConfigError("objective.memory: reads data.replay itself; leave the term replay out", "objective.memory")


def readers(objective: ObjectiveConfig) -> dict[str, list[str]]:
    """What reads each further domain."""
    return {
        "target": [term.method for term in objective.terms if isinstance(term, OF_TARGET)],
        "replay": [term.method for term in objective.terms if isinstance(term, (ReplayConfig, EWCConfig))]
        + ([objective.memory] if objective.memory else []),
    }


def _positive(value: float, name: str) -> None:
    check(value > 0, name, "positive", value)
