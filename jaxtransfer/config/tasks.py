"""What a model learns, a record for each task, told apart by ``kind``; each holds what its task reads, and no more."""

import dataclasses
from typing import Any, Literal

from jaxtransfer.config.checks import at_least, check
from jaxtransfer.config.document import ConfigError
from jaxtransfer.data.augment import Augment


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassificationConfig:
    """One label for each text.

    Attributes:
      labels: the classes in the order of the logits; None sorts those of the training data.
      pooling: None is the family's own, ``"mean"`` the mean over unmasked positions.
      max_length: tokens kept of each text.
      label_smoothing: in [0, 1).
      head: a fresh one, or the source's own, whose labels must be those here.
    """

    kind: Literal["text-classification"] = "text-classification"
    labels: tuple[str, ...] | None = None
    pooling: Literal["mean"] | None = None
    max_length: int = 128
    label_smoothing: float = 0.0
    head: Literal["fresh", "source"] = "fresh"

    def __post_init__(self) -> None:
        at_least(self, 3, "max_length")
        _check_labels(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClassificationConfig:
    """A tag for each word: entities, parts of speech.

    Attributes:
      labels: the tags in the order of the logits; None sorts those of the training data.
      max_length: tokens that a row reads; longer sentences are split.
      label_smoothing: in [0, 1).
      head: a fresh one, or the source's own, whose labels must be those here.
    """

    kind: Literal["token-classification"]
    labels: tuple[str, ...] | None = None
    max_length: int = 128
    label_smoothing: float = 0.0
    head: Literal["fresh", "source"] = "fresh"

    def __post_init__(self) -> None:
        at_least(self, 3, "max_length")
        _check_labels(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnsweringConfig:
    """The part of a text that answers a question.

    Attributes:
      max_length: tokens that a row reads; longer texts are read in windows.
      stride: tokens that a window repeats of the one before.
      max_answer: tokens of an answer.
      unanswerable: whether a question may have no answer in its text.
      head: a fresh one, or the source's own.
    """

    kind: Literal["question-answering"]
    max_length: int = 384
    stride: int = 128
    max_answer: int = 30
    unanswerable: bool = False
    head: Literal["fresh", "source"] = "fresh"

    def __post_init__(self) -> None:
        at_least(self, 3, "max_length")
        at_least(self, 0, "stride")
        at_least(self, 1, "max_answer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Every next token of a text, of a completion, or of an assistant's turns; the source keeps its head.

    Attributes:
      max_length: tokens that a row reads.
      packing: whether rows to train on hold several documents, which do not see each other.
      completion_only: reads ``prompt`` and ``completion``, of which the latter is learned.
      chat: reads ``messages``, of which the assistant's are learned.
      chat_template: of Jinja, instead of the tokenizer's own.
      long: what happens to a document of more tokens: an error, the beginning alone, or pieces.
      label_smoothing: in [0, 1).
      z_loss: the weight of the squared logarithm of the normaliser.
    """

    kind: Literal["causal-lm"]
    max_length: int = 512
    packing: bool = True
    completion_only: bool = False
    chat: bool = False
    chat_template: str | None = None
    long: Literal["error", "cut", "split"] = "error"
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, 1, "max_length")
        at_least(self, 0, "z_loss")
        check(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)", self.label_smoothing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLMConfig:
    """Hidden tokens of a text, from all around them: continued pre-training.

    Attributes:
      max_length: tokens that a row reads; longer texts are split.
      mask_rate: the share of them that has to be named, in (0, 1).
      head: the source's own, or a fresh one for a source that has none for masked tokens.
    """

    kind: Literal["masked-lm"]
    max_length: int = 128
    mask_rate: float = 0.15
    head: Literal["fresh", "source"] = "source"

    def __post_init__(self) -> None:
        at_least(self, 3, "max_length")
        check(0 < self.mask_rate < 1, "mask_rate", "in (0, 1)", self.mask_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageClassificationConfig:
    """One label for each image, or any number of them.

    Attributes:
      labels: the classes in the order of the logits; None sorts those of the training data. Of two, the second is the
        positive one of AUC and sensitivity.
      multi_label: whether an image may have any number of the labels.
      size: of the pixels: a square's side, or [height, width]; None is as the source was trained.
      channels: of a model whose configuration does not say it; 1 also turns colour into grey.
      mean, std: of each channel; None is as the source was trained.
      augment: how training images vary; None: not.
      on_bad: whether an image that cannot be read stops the run, or is left out and counted.
      label_smoothing: in [0, 1).
      class_weights: of each class in the training loss; ``"balanced"`` makes all weigh the same.
      mixup: alpha; 0 is none.
      pooling: None is the family's own, ``"mean"`` the mean over positions.
      head: a fresh one, or the source's own, whose labels must be those here.
    """

    kind: Literal["image-classification"]
    labels: tuple[str, ...] | None = None
    multi_label: bool = False
    size: int | tuple[int, int] | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Augment | None = None
    on_bad: Literal["stop", "skip"] = "stop"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | Literal["balanced"] | None = None
    mixup: float = 0.0
    pooling: Literal["mean"] | None = None
    head: Literal["fresh", "source"] = "fresh"

    def __post_init__(self) -> None:
        sides = (self.size, self.size) if isinstance(self.size, int) else self.size or (1, 1)
        check(min(sides) >= 1, "size", "at least 1 pixel", self.size)
        check(self.channels in (None, 1, 3), "channels", "1 or 3", self.channels)
        at_least(self, 0, "mixup")
        _check_labels(self)


TaskConfig = (
    TextClassificationConfig
    | TokenClassificationConfig
    | QuestionAnsweringConfig
    | CausalLMConfig
    | MaskedLMConfig
    | ImageClassificationConfig
)


def _check_labels(record: Any) -> None:
    pooling = getattr(record, "pooling", None)
    if record.head == "source" and pooling is not None:
        raise ConfigError(f"pooling: is that of the source's head with head: source, got {pooling}", "pooling")
    check(0 <= record.label_smoothing < 1, "label_smoothing", "in [0, 1)", record.label_smoothing)
    names = record.labels
    check(names is None or len(set(names)) == len(names) >= 2, "labels", "two or more different names", names)
