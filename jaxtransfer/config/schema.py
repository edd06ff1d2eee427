"""What a run is, as frozen records: every field is read by ``job``, and checks its own range."""

import dataclasses
from typing import Literal

from jaxtransfer.config.adapters import AdapterConfig, Quantization, check_trained
from jaxtransfer.config.checks import at_least, check, increasing
from jaxtransfer.config.document import ConfigError
from jaxtransfer.config.objectives import ObjectiveConfig, check_domains, readers
from jaxtransfer.config.optimizers import OptimizerConfig
from jaxtransfer.config.phases import PhaseConfig, phase, read_elsewhere
from jaxtransfer.config.tasks import TaskConfig, TextClassificationConfig
from jaxtransfer.data.sources import DataSpec

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the pre-trained model comes from.

    Attributes:
      ref: a folder in Hugging Face layout, a hub id, or ``python:PACKAGE/FOLDER``; with ``config``, a .safetensors file
        too; where no weights are read, the .json file of a configuration.
      config: the path of the configuration of weights that come without one.
      revision: of a hub id; resolved to a commit and recorded.
      dtype: of the loaded parameters; None keeps the stored one.
      alternatives: other references to the same weights, named when ``ref`` is not there.
      init: ``"scratch"`` takes the architecture and fresh parameters; weights are not read, and need not be there.
      ignore: fields of the model's config that are accepted unread.
    """

    ref: str
    config: str | None = None
    revision: str | None = None
    dtype: Dtype | None = None
    alternatives: tuple[str, ...] = ()
    init: Literal["pretrained", "scratch"] = "pretrained"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(bool(self.ref), "ref", "a folder, a hub id or python:PACKAGE/FOLDER", self.ref)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data, and how it is batched.

    Attributes:
      retain: of the source's own domain, held out: what the model forgets is measured on it.
      target: of the domain to adapt to; its labels, if it has any, are not read.
      replay: of the source's own domain, labelled: what is learned beside the task, or protected from it.
      subgroups: further columns, by whose values the final metrics are broken down.
      batch: rows of a batch over all processes.
      buckets: static lengths, in tokens, that batches of texts are padded to; None is 32, doubled up to
        ``task.max_length``.
    """

    train: DataSpec
    validation: DataSpec | None = None
    test: DataSpec | None = None
    retain: DataSpec | None = None
    target: DataSpec | None = None
    replay: DataSpec | None = None
    subgroups: tuple[str, ...] = ()
    batch: int = 16
    buckets: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "batch")
        if self.buckets is not None:
            increasing(self.buckets, "buckets", "increasing lengths")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """What trains, and what is put on the source for it.

    Attributes:
      train: all of it; the head; the head and the ``last`` blocks; by ``rules``; or the head and the ``adapters``, the
        same with a rate of its own for the b of LoRA (group ``adapter_b``, by default 16 times the rate of
        ``adapter``), all ``biases``, or all ``norms``.
      last: blocks.
      rules: (regex of paths, group).
      untie: gives a head that is tied to the word embedding weights of its own, to train the one without the other.
      quantize: (regex of paths, how): weights of the source that are packed, and then stay as they are.
      adapters: what is put on the source, in this order.
    """

    train: Literal["full", "head", "last", "rules", "adapters", "lora_plus", "biases", "norms"] = "full"
    last: int | None = None
    rules: tuple[tuple[str, str], ...] = ()
    untie: bool = False
    quantize: tuple[tuple[str, Quantization], ...] = ()
    adapters: tuple[AdapterConfig, ...] = ()
    may_wait: dataclasses.InitVar[bool] = False  # of a phase that trains the head alone: the adapters are the run's

    def __post_init__(self, may_wait: bool) -> None:
        check_trained(self.train, self.adapters, may_wait=may_wait)
        at_least(self, 1, "last")
        for field in ("last", "rules"):
            given = getattr(self, field) not in (None, ())
            if given != (self.train == field):
                need = "is only read" if given else "is needed"
                raise ConfigError(f"{field}: {need} with train: {field}, got train: {self.train}", field)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, how often, how precisely.

    Attributes:
      epochs, steps: exactly one of them.
      accumulate: microbatches of one update.
      precision: of the computation; trained parameters stay float32.
      attention: ``xla`` of any device, or ``splash``, a kernel of TPUs that holds no scores.
      remat: what the backward pass recomputes: None nothing, ``"dots"`` all but products, ``"full"`` everything.
      evaluate_every, checkpoint_every: in steps; None is at the end of every epoch.
      keep: checkpoints kept.
      metric: of the validation data, by which the best step is chosen; None is the task's own.
      patience: evaluations without improvement until the run stops.
      log_every: in steps.
      max_rejected: non-finite steps in a row until the run stops.
      tensorboard: whether scalars are written for TensorBoard as well (extra ``tensorboard``).
      cache: ``auto`` computes frozen stages once where that is valid, ``off`` in every epoch anew; the results agree.
    """

    epochs: int | None = None
    steps: int | None = None
    seed: int = 0
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["xla", "splash"] = "xla"
    remat: Literal["full", "dots"] | None = None
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    metric: str | None = None
    patience: int | None = None
    log_every: int = 10
    max_rejected: int = 10
    tensorboard: bool = False
    cache: Literal["auto", "off"] = "auto"

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError("epochs: give either epochs or steps, and null for the other", "epochs")
        at_least(self, 1, "epochs", "steps", "accumulate", "evaluate_every", "checkpoint_every", "keep")
        at_least(self, 1, "patience", "log_every", "max_rejected")
        check(0 <= self.seed < 2**32, "seed", "in [0, 2**32)", self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along the axes of the mesh; their product is the number of devices used.

    Attributes:
      data: copies of the model, each with rows of its own.
      fsdp: rows too, and parameters split between uses of them.
      tensor: layers split by heads and features.
      sequence: the tokens of a row split; divides the batches' lengths.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        at_least(self, 1, "data", "fsdp", "tensor", "sequence")

    @property
    def size(self) -> int:
        """The number of devices."""
        return self.data * self.fsdp * self.tensor * self.sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The control experiment: the same architecture from scratch, all of it trained, both over ``seeds``.

    ``budgets`` repeats it with less data: for every budget and seed, transfer and control train on the first so many
    examples of each class of a permutation of the training data, by the seed (of documents or images with several
    labels, on the first so many in all). The steps are those of the whole run at every budget, so that the optimizer
    has the same schedule; of little data they are more epochs.
    """

    control: Literal["scratch"] = "scratch"
    seeds: tuple[int, ...] = (0, 1, 2)
    budgets: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check(0 < len(self.seeds) == len(set(self.seeds)), "seeds", "one or more different integers", self.seeds)
        check(all(0 <= seed < 2**32 for seed in self.seeds), "seeds", "in [0, 2**32)", self.seeds)
        if self.budgets is not None:
            increasing(self.budgets, "budgets", "increasing numbers of examples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A source made here: the architecture of ``source.ref``, trained from scratch on other data.

    Attributes:
      task: None is that of the run, with the labels of these data.
    """

    data: DataConfig
    task: TaskConfig | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    run: RunConfig

    def __post_init__(self) -> None:
        for name in ("retain", "target", "replay"):
            if getattr(self.data, name) is not None:
                told = f"data.{name}: what is trained from scratch has no domain before it, nor a term that reads one"
                raise ConfigError(told, f"data.{name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run, whole. ``out`` is the folder that it writes to; ``pretrain``, where it is given, runs before.

    ``mesh: auto`` takes copies along ``data`` of what leaves half of a device's memory free, else splits it along
    ``fsdp``, over no more devices than that needs.

    ``phases`` come before the run, in order; each goes on from the best state of the one before.
    """

    source: SourceConfig
    pretrain: PretrainConfig | None = None
    task: TaskConfig = dataclasses.field(default_factory=TextClassificationConfig)
    data: DataConfig
    phases: tuple[PhaseConfig, ...] = ()
    adapt: AdaptConfig = AdaptConfig()
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    run: RunConfig
    mesh: MeshConfig | Literal["auto"] = MeshConfig()
    study: StudyConfig | None = None
    out: str

    def __post_init__(self) -> None:
        check(bool(self.out), "out", "a folder", self.out)
        longest, buckets = getattr(self.task, "max_length", None), self.data.buckets
        if buckets is not None and longest is None:
            raise ConfigError(f"data.buckets: are lengths of texts, {self.task.kind} has none", "data.buckets")
        if buckets is not None and buckets[-1] != longest:
            told = f"must end with task.max_length, {longest}; got {buckets[-1]}"
            raise ConfigError(f"data.buckets: {told}", "data.buckets")
        if self.data.validation is None and self.run.patience is not None:
            raise ConfigError("run.patience: needs data.validation to be measured on", "run.patience")
        if self.objective.task == 0:
            told = "objective.task: 0 leaves the labels of data.train unread, so"
            if self.data.validation is None and self.data.test is None:
                raise ConfigError(
                    f"{told} nothing can be measured; give data.test or data.validation", "objective.task"
                )
            if self.study is not None:
                raise ConfigError(f"{told} a study has no control to train from scratch; leave study out", "study")
        own, domains = readers(self.objective), ("target", "replay")
        idle = {name for name in domains if not own[name] and read_elsewhere(self.phases, name)}
        check_domains(self.objective, *(getattr(self.data, name) is not None and name not in idle for name in domains))
        if self.source.init == "scratch":
            for field, given in {
                "pretrain": self.pretrain,
                "study": self.study,
                "data.retain": self.data.retain,
                "adapt.quantize": self.adapt.quantize or None,
                "adapt.adapters": self.adapt.adapters or None,
                **{f"objective.{field}": True for field in self.objective.anchored},
            }.items():
                if given is not None:
                    raise ConfigError(f"{field}: needs a source with weights, source.init asks for none", field)
        if getattr(self.task, "packing", False) and any(entry.method == "prompt" for entry in self.adapt.adapters):
            told = "one prompt cannot stand before every document of a packed row; set task.packing: false"
            raise ConfigError(f"task.packing: {told}", "task.packing")
        if self.phases and self.study is not None:
            raise ConfigError("study: its control has no phases to compare with; leave study or phases out", "study")
        if self.phases:
            phase(self, len(self.phases) - 1)
        try:
            self.pretraining()
        except ConfigError as error:
            raise ConfigError(f"pretrain.{error}", f"pretrain.{error.path}") from None

    @property
    def buckets(self) -> tuple[int, ...]:
        """The static lengths of texts; none where the task reads no texts.

        Example:
          >>> source, data = SourceConfig(ref="bert"), DataConfig(train=DataSpec("train.jsonl"))
          >>> Config(source=source, data=data, run=RunConfig(epochs=1), out="runs/x").buckets
          (32, 64, 128)
        """
        if (longest := getattr(self.task, "max_length", None)) is None:
            return ()
        doubled = (32 << i for i in range(longest.bit_length()))
        return self.data.buckets or (*(length for length in doubled if length < longest), longest)

    def phasing(self) -> "tuple[Config, ...]":
        """The phases before the run, each as a run of its own, see `phases.phase`."""
        return tuple(phase(self, i) for i in range(len(self.phases)))

    def pretraining(self) -> "Config | None":
        """The run that makes the source, in a folder of its own; None where the source is there."""
        if (given := self.pretrain) is None:
            return None
        task = given.task
        if task is None:
            task = dataclasses.replace(self.task, labels=None) if hasattr(self.task, "labels") else self.task
        return Config(
            source=dataclasses.replace(self.source, init="scratch"), task=task, data=given.data,
            optimizer=given.optimizer, run=given.run, mesh=self.mesh, out=f"{self.out}/pretrain",
        )  # fmt: skip
