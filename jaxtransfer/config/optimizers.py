"""How parameters move: the optimizer of all groups, and what one group has of its own."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxtransfer.config.checks import at_least, check
from jaxtransfer.config.document import ConfigError

Schedule = Literal["cosine", "linear", "constant"]
OptimizerName = Literal["adamw", "sgd", "lion", "adafactor", "lamb", "lars", "muon"]

_ADAM = ("b1", "b2", "eps")
READS: Mapping[str, tuple[str, ...]] = {
    "adamw": _ADAM,
    "sgd": ("momentum",),
    "lion": ("b1", "b2"),
    "adafactor": (),
    "lamb": _ADAM,
    "lars": ("momentum",),
    "muon": ("b1", "b2"),
}
"""Of the fields that only some optimizers have, those that each reads; setting another is an error, not a no-op."""
_MOMENTS = {"momentum", *_ADAM}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """What one group of parameters has of its own; None is what ``optimizer`` says for all."""

    name: OptimizerName | None = None
    lr: float | None = None
    weight_decay: float | None = None
    schedule: Schedule | None = None
    warmup: float | None = None
    momentum: float | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        _rates(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters move.

    Attributes:
      name: of the optimizer.
      lr: the peak learning rate, > 0.
      weight_decay: >= 0; biases and norms are left out.
      schedule: of the learning rate after warm-up.
      warmup: fraction of the steps in [0, 1) over which the learning rate rises from zero.
      momentum, b1, b2, eps: of optimizers that have them; None is their own default.
      clip: largest norm of the trainables' gradient, or None.
      layer_decay: each block's learning rate over that of the block above it, in (0, 1], or None.
      groups: group (a label of ``adapt``) -> what it has of its own.
    """

    name: OptimizerName = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.01
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    momentum: float | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    clip: float | None = 1.0
    layer_decay: float | None = None
    groups: Mapping[str, GroupConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _rates(self)
        check(self.clip is None or self.clip > 0, "clip", "positive or null", self.clip)
        fits = self.layer_decay is None or 0 < self.layer_decay <= 1
        check(fits, "layer_decay", "in (0, 1] or null", self.layer_decay)
        for where, record in {"": self, **{f"groups.{label}.": group for label, group in self.groups.items()}}.items():
            name = record.name or self.name
            for field in sorted(_MOMENTS - set(READS[name])):
                if getattr(record, field) is not None:
                    raise ConfigError(f"{where}{field}: is not read by {name}; set null", f"{where}{field}")

    def group(self, label: str) -> GroupConfig:
        """The settings of one group, its own before those of all; None is left to the optimizer's own default.

        Example:
          >>> OptimizerConfig(groups={"head": GroupConfig(lr=1e-3)}).group("head").lr
          0.001
        """
        own = self.groups.get(label, GroupConfig())
        unread = _MOMENTS - set(READS[own.name or self.name])
        inherited = {field.name for field in dataclasses.fields(own) if getattr(own, field.name) is None} - unread
        return dataclasses.replace(own, **{field: getattr(self, field) for field in inherited})


def _rates(record: Any) -> None:
    """The ranges that an optimizer and a group of it share; None is inherited."""
    for field in ("lr", "eps"):
        value = getattr(record, field)
        check(value is None or value > 0, field, "positive", value)
    at_least(record, 0, "weight_decay")
    for field in ("warmup", "momentum", "b1", "b2"):
        value = getattr(record, field)
        check(value is None or 0 <= value < 1, field, "in [0, 1)", value)
