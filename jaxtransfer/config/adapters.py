"""What is put on a frozen source, a record for each method, told apart by ``method``; each holds what it reads."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from jaxtransfer.config.checks import at_least, check
from jaxtransfer.config.document import ConfigError

Quantization = Literal["nf4", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LowRank:
    method: str
    targets: str | None = None
    name: str = "default"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        check(self.alpha is None or self.alpha > 0, "alpha", "positive or null", self.alpha)
        check(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(_LowRank):
    """``W + s a b`` (arXiv:2106.09685).

    Attributes:
      targets: regex of the weights' paths; None is every linear kernel of the layers, as in QLoRA.
      name: to tell adapters on the same weight apart.
      rank: r.
      alpha: ``s = alpha / r``; None is r, so that s is 1.
      dropout: of the adapter's input, in [0, 1).
      rank_stabilized: ``s = alpha / sqrt(r)`` (arXiv:2312.03732).
    """

    method: Literal["lora"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRAConfig(_LowRank):
    """``m V / |V|`` with ``V = W + s a b`` (arXiv:2402.09353); fields as of LoRA."""

    method: Literal["dora"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Config:
    """Gains on what weights give or take (arXiv:2205.05638).

    Attributes:
      targets_output: regex of the weights whose outputs are scaled.
      targets_input: of those whose inputs are. With neither, the paper's: keys, values, the last product of each MLP.
      name: to tell adapters on the same weight apart.
    """

    method: Literal["ia3"]
    targets_output: str | None = None
    targets_input: str | None = None
    name: str = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRAConfig:
    """``W + A diag(d) B diag(b)``, A and B random and shared (arXiv:2310.11454).

    Attributes:
      targets, name: as of LoRA.
      rank: of the shared matrices; it costs one number a weight.
      d: where the gains between the matrices start.
      dropout: of the adapter's input, in [0, 1).
    """

    method: Literal["vera"]
    targets: str | None = None
    name: str = "default"
    rank: int = 256
    d: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        check(self.d != 0, "d", "other than 0", self.d)
        check(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """``h + up(activation(down(h)))`` before the residual (arXiv:1902.00751).

    Attributes:
      targets: regex of the layers, such as ``blocks/(4|5)``; None is all.
      width: of the features between ``down`` and ``up``.
      activation: by Hugging Face's name.
      where: behind ``attention`` and ``mlp``, or one of them.
    """

    method: Literal["bottleneck"]
    targets: str | None = None
    width: int = 64
    activation: str = "gelu"
    where: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")

    def __post_init__(self) -> None:
        at_least(self, 1, "width")
        check(0 < len(self.where) == len(set(self.where)), "where", "one or more different places", list(self.where))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Learned embeddings before the first token (arXiv:2104.08691).

    Attributes:
      length: positions, which count in the model's own.
      init: embeddings of tokens drawn from the vocabulary, or at random.
    """

    method: Literal["prompt"]
    length: int = 20
    init: Literal["vocabulary", "random"] = "vocabulary"

    def __post_init__(self) -> None:
        at_least(self, 1, "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Learned keys and values in every layer (arXiv:2101.00190); ``length``: of them a layer."""

    method: Literal["prefix"]
    length: int = 20

    def __post_init__(self) -> None:
        at_least(self, 1, "length")


AdapterConfig = LoRAConfig | DoRAConfig | IA3Config | VeRAConfig | BottleneckConfig | PromptConfig | PrefixConfig


def check_trained(train: str, adapters: Iterable[Any], *, may_wait: bool) -> None:
    """What is put on must train, or in a phase of the head alone may wait; what is to train must be put on.

    Raises:
      ConfigError: it is not so.
    """
    methods = [entry.method for entry in adapters]
    if train in ("adapters", "lora_plus") and not methods:
        raise ConfigError(f"adapters: is needed with train: {train}", "adapters")
    if methods and train not in ("adapters", "lora_plus", "rules", *(["head"] if may_wait else [])):
        raise ConfigError(
            f"adapters: are trained by train: adapters, lora_plus or rules, got train: {train}", "adapters"
        )
    if train == "lora_plus" and ("vera" in methods or not {"lora", "dora"} & {*methods}):
        raise ConfigError(
            f"train: lora_plus gives the b of lora and dora a rate of its own, got {', '.join(methods)}", "train"
        )
