"""Records without behaviour: Stage, Model, Head, Source, Lineage, State, View."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxtransfer.tree.paths import Params

Carry = dict[str, Any]
AUX = "aux"
"""Where parameters lie that train beside a model and are none of it: the discriminators of an objective's terms."""
TARGET = "target"
"""The domain whose labels no objective ever sees."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a model's depth: a pure function from carry to the entries of the carry that it writes.

    Attributes:
      name: the path of its parameters, ``"embed"`` or ``"blocks/3"``; like stages share one ``fn``, and are scanned.
      fn: ``fn(params, carry, key, *reads) -> dict`` of the written entries. ``key`` is None in evaluation, so a stage
        trains if and only if it is given a key. Under ``"stats"`` it may return new running statistics, a subtree of
        its parameters.
      init: ``init(key) -> params``, fresh parameters.
      writes: the entries that it writes; everything else in the carry passes unchanged (and is not carried by a scan).
      reads: paths of parameters of other stages, handed to ``fn`` in this order (a tied head reads the embedding).
      constants: what tells this layer from its like, as numbers (its index, its attention window); ``fn`` finds them
        in the carry. A scan runs over them, so like stages differ in constants and still share one compiled body.
      slots: what subtrees may stand among its parameters: slot -> place in it -> width of the features there.
    """

    name: str
    fn: Callable[..., Carry]
    init: Callable[[jax.Array], Params]
    writes: tuple[str, ...] = ("hidden",)
    reads: tuple[str, ...] = ()
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    slots: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True)
class Head:
    """What a model ends in.

    ``kind``: sequence-classification, token-classification, question-answering, masked-lm, causal-lm,
    image-classification.

    Attributes:
      kind: one of the kinds above, or a kind of the user's own.
      labels: the classes' names in the order of the logits; empty where the kind has none.
      pooling: ``None`` for the family's own, ``"mean"`` for the mean over unmasked positions.
      width: the features' width; only for foreign models, the zoo's know theirs.
      stages: stages of the user's own, used instead of a built-in kind.
    """

    kind: str
    labels: tuple[str, ...] = ()
    pooling: str | None = None
    width: int | None = None
    stages: tuple[Stage, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Stages in depth order, and what is known about them. ``Params`` mirrors the stages' names.

    Attributes:
      family: ``"bert"``, ...; ``"foreign"`` for a user's own model.
      config: the family's frozen configuration record.
      stages: in depth order.
      outputs: carry entry -> name in the outputs of `apply`: ``{"hidden": "last_hidden_state"}``.
      head: what the model ends in; None is the bare trunk.
      stats: patterns of the paths that hold running statistics.
      cache: ``cache(rows, length, dtype) -> cache``, an empty cache for decoding; None where the model does not decode.
      start: a boundary and ``carry(params, batch) -> carry`` there: `apply` runs only what follows it. None runs all.
    """

    family: str
    config: Any
    stages: tuple[Stage, ...]
    outputs: Mapping[str, str]
    head: Head | None = None
    stats: tuple[str, ...] = ()
    cache: Callable[[int, int, Any], Carry] | None = None
    start: tuple[str, Callable[[Params, Carry], Carry]] | None = None


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Where parameters come from and what was done to them since.

    Attributes:
      ref: what `load` was asked for (a folder's name, a hub id, ``python:PACKAGE/FOLDER``) or ``"memory"``.
      digest: SHA-256 that identifies the source: over its weight files' SHA-256, or over its leaves where it has none.
      files: file name -> SHA-256.
      commit: the hub commit that the revision resolved to.
      license: from the model card, or None.
      base_model: from the model card, or None.
      fingerprints: canonical path -> fingerprint of each leaf as loaded (see ``tree.fingerprint``).
      dropped: checkpoint tensors not used -> the reason.
      operations: what was done since, oldest first: ``"swap_head(sequence-classification, 2 labels)"``.
    """

    ref: str
    digest: str
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    commit: str | None = None
    license: str | None = None
    base_model: str | None = None
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    operations: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A pre-trained model: its stages, its parameters under canonical paths, where they come from, its other files.

    Attributes:
      assets: ``"config"`` -> the raw config dictionary; ``"files"`` -> the paths of tokenizer and processor files;
        ``"image_size"`` -> (H, W), where it was changed since they were written; ``"processor"`` -> how images are
        prepared, where that is known better than from the file.
    """

    model: Model
    params: Params
    lineage: Lineage
    assets: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that a step changes, laid out for scanning; donated to the step.

    Attributes:
      step: int32 scalar, the number of accepted updates.
      params: the trainable leaves; ``None`` where a leaf is frozen or a statistic.
      stats: the running statistics; ``None`` elsewhere.
      opt_state: the optimizer's state over ``params`` alone.
      key: typed PRNG key of the run; the key of a step is ``fold_in(key, step)``.
      terms: state of the objective's terms, by name.
    """

    step: jax.Array
    params: Params
    stats: Params
    opt_state: Any
    key: jax.Array
    terms: Params


@dataclasses.dataclass(frozen=True)
class View:
    """What an objective sees of one (micro)batch.

    An objective is ``objective(view) -> (loss, metrics)``: the loss is a mean, and ``metrics["weight"]`` the number of
    units (examples, tokens) that the mean runs over, by which microbatches are weighted. Under ``metrics["terms"]`` it
    may return new values of ``terms``.

    Attributes:
      params: of the model and of what trains beside it (`AUX`), laid out.
      outputs: of the batch, by Hugging Face's names; ``"captured"`` where `make_step` was asked for boundaries.
      batch: the rows; without the further domains.
      key: of this step, for what is random.
      step: the number of accepted updates.
      trained: the differentiated leaves alone, None elsewhere.
      domains: name -> the view of a further domain's rows; that of `TARGET` has no labels.
      constants: what is known beforehand and does not change: ``anchor``, the source's values of the trained leaves;
        ``statistics``, its running statistics.
      terms: `State.terms`.
      model: the model, for terms that run it again.
      dtype: of its activations.
    """

    params: Params
    outputs: Mapping[str, Any]
    batch: Mapping[str, jax.Array]
    key: jax.Array | None
    step: jax.Array
    trained: Params = dataclasses.field(default_factory=dict)
    domains: Mapping[str, "View"] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    terms: Params = dataclasses.field(default_factory=dict)
    model: Model | None = None
    dtype: Any = None
