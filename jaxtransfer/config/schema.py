"""What a run is, as frozen records: every field is read by ``job.py``, and checks its own range."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxtransfer.config.document import ConfigError
from jaxtransfer.data.sources import DataSpec

Dtype = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["cosine", "linear", "constant"]
OptimizerName = Literal["adamw", "sgd", "lion", "adafactor", "lamb", "lars", "muon"]

_ADAM = ("b1", "b2", "eps")
_READS: Mapping[str, tuple[str, ...]] = {
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


def _check(fits: bool, field: str, want: str, got: Any) -> None:
    if not fits:
        raise ConfigError(f"{field}: must be {want}, got {got!r}", field)


def _at_least(record: Any, low: float, *fields: str) -> None:
    for field in fields:
        if (value := getattr(record, field)) is not None:
            _check(value >= low, field, f"at least {low}", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the pre-trained model comes from.

    Attributes:
      ref: a folder in Hugging Face layout, a hub id, or ``python:PACKAGE/FOLDER``.
      revision: of a hub id; resolved to a commit and recorded.
      dtype: of the loaded parameters; None keeps the stored one.
      alternatives: other references to the same weights, named when ``ref`` is not there.
      init: ``"scratch"`` takes the architecture and fresh parameters.
      ignore: fields of the model's config that are accepted unread.
    """

    ref: str
    revision: str | None = None
    dtype: Dtype | None = None
    alternatives: tuple[str, ...] = ()
    init: Literal["pretrained", "scratch"] = "pretrained"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(bool(self.ref), "ref", "a folder, a hub id or python:PACKAGE/FOLDER", self.ref)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What the model learns.

    Attributes:
      labels: the classes in the order of the logits; None sorts those of the training data.
      pooling: None is the family's own, ``"mean"`` the mean over unmasked positions.
      max_length: tokens kept of each text.
      label_smoothing: in [0, 1).
    """

    kind: Literal["text-classification"] = "text-classification"
    labels: tuple[str, ...] | None = None
    pooling: Literal["mean"] | None = None
    max_length: int = 128
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, 3, "max_length")
        _check(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)", self.label_smoothing)
        if self.labels is not None:
            _check(len(set(self.labels)) == len(self.labels) >= 2, "labels", "two or more different names", self.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data, and how it is batched.

    Attributes:
      subgroups: further columns, by whose values the final metrics are broken down.
      batch: rows of a batch over all processes.
      buckets: static lengths, in tokens, that batches are padded to.
    """

    train: DataSpec
    validation: DataSpec | None = None
    test: DataSpec | None = None
    subgroups: tuple[str, ...] = ()
    batch: int = 16
    buckets: tuple[int, ...] = (32, 64, 128)

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch")
        increasing = all(a < b for a, b in zip((0, *self.buckets), self.buckets, strict=False))
        _check(bool(self.buckets) and increasing, "buckets", "increasing lengths", list(self.buckets))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """What trains: all, the head, the head and the ``last`` blocks, or by ``rules``: (regex of paths, group)."""

    train: Literal["full", "head", "last", "rules"] = "full"
    last: int | None = None
    rules: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _at_least(self, 1, "last")
        for field in ("last", "rules"):
            given = getattr(self, field) not in (None, ())
            if given != (self.train == field):
                need = "is only read" if given else "is needed"
                raise ConfigError(f"{field}: {need} with train: {field}, got train: {self.train}", field)


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
        _check(self.clip is None or self.clip > 0, "clip", "positive or null", self.clip)
        fits = self.layer_decay is None or 0 < self.layer_decay <= 1
        _check(fits, "layer_decay", "in (0, 1] or null", self.layer_decay)
        for where, record in {"": self, **{f"groups.{label}.": group for label, group in self.groups.items()}}.items():
            name = record.name or self.name
            for field in sorted(_MOMENTS - set(_READS[name])):
                if getattr(record, field) is not None:
                    raise ConfigError(f"{where}{field}: is not read by {name}; set null", f"{where}{field}")

    def group(self, label: str) -> GroupConfig:
        """The settings of one group, its own before those of all; None is left to the optimizer's own default.

        Example:
          >>> OptimizerConfig(groups={"head": GroupConfig(lr=1e-3)}).group("head").lr
          0.001
        """
        own = self.groups.get(label, GroupConfig())
        unread = _MOMENTS - set(_READS[own.name or self.name])
        inherited = {field.name for field in dataclasses.fields(own) if getattr(own, field.name) is None} - unread
        return dataclasses.replace(own, **{field: getattr(self, field) for field in inherited})


def _rates(record: Any) -> None:
    """The ranges that an optimizer and a group of it share; None is inherited."""
    for field in ("lr", "eps"):
        value = getattr(record, field)
        _check(value is None or value > 0, field, "positive", value)
    _at_least(record, 0, "weight_decay")
    for field in ("warmup", "momentum", "b1", "b2"):
        value = getattr(record, field)
        _check(value is None or 0 <= value < 1, field, "in [0, 1)", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, how often, how precisely.

    Attributes:
      epochs, steps: exactly one of them.
      accumulate: microbatches of one update.
      precision: of the computation; trained parameters stay float32.
      remat: what the backward pass recomputes: None nothing, ``"dots"`` all but products, ``"full"`` everything.
      evaluate_every, checkpoint_every: in steps; None is at the end of every epoch.
      keep: checkpoints kept.
      metric: of the validation data, by which the best step is chosen.
      patience: evaluations without improvement until the run stops.
      log_every: in steps.
      max_rejected: non-finite steps in a row until the run stops.
      tensorboard: whether scalars are written for TensorBoard as well (extra ``tensorboard``).
    """

    epochs: int | None = None
    steps: int | None = None
    seed: int = 0
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["full", "dots"] | None = None
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    metric: Literal["accuracy", "macro_f1", "loss"] = "accuracy"
    patience: int | None = None
    log_every: int = 10
    max_rejected: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError("epochs: give either epochs or steps, and null for the other", "epochs")
        _at_least(self, 1, "epochs", "steps", "accumulate", "evaluate_every", "checkpoint_every", "keep")
        _at_least(self, 1, "patience", "log_every", "max_rejected")
        _check(0 <= self.seed < 2**32, "seed", "in [0, 2**32)", self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along the axes of the mesh; their product is the number of devices used."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        _at_least(self, 1, "data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The control experiment: the same architecture from scratch, both over ``seeds``."""

    control: Literal["scratch"] = "scratch"
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        _check(0 < len(self.seeds) == len(set(self.seeds)), "seeds", "one or more different integers", self.seeds)
        _check(all(0 <= seed < 2**32 for seed in self.seeds), "seeds", "in [0, 2**32)", self.seeds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run, whole. ``out`` is the folder that it writes to."""

    source: SourceConfig
    task: TaskConfig = TaskConfig()
    data: DataConfig
    adapt: AdaptConfig = AdaptConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig
    mesh: MeshConfig = MeshConfig()
    study: StudyConfig | None = None
    out: str

    def __post_init__(self) -> None:
        _check(bool(self.out), "out", "a folder", self.out)
        longest, limit = self.data.buckets[-1], self.task.max_length
        if longest != limit:
            raise ConfigError(f"data.buckets: must end with task.max_length, {limit}; got {longest}", "data.buckets")
        if self.data.validation is None and self.run.patience is not None:
            raise ConfigError("run.patience: needs data.validation to be measured on", "run.patience")
