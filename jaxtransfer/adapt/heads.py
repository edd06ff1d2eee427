"""Heads: what a model ends in, and how to replace it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtransfer.models.foreign import head_stage
from jaxtransfer.models.registry import family
from jaxtransfer.tree.paths import flatten, unflatten, weight_path
from jaxtransfer.tree.weights import SHARED, is_weight, materialize
from jaxtransfer.types import Head, Lineage, Model, Source, Stage


def classifier(labels: Sequence[str] | int, *, pooling: str | None = None, width: int | None = None) -> Head:
    """A sequence classifier.

    Args:
      labels: the classes' names in the order of the logits, or how many there are.
      pooling: None for the family's own (BERT: the pooler), ``"mean"`` for the mean of the last hidden state.
      width: the features' width; only for foreign models.

    Example:
      >>> classifier(["negative", "positive"]).labels
      ('negative', 'positive')
    """
    return Head("sequence-classification", _names(labels), pooling, width)


def tokens(labels: Sequence[str] | int, *, width: int | None = None) -> Head:
    """A classifier of every token: entities, parts of speech."""
    return Head("token-classification", _names(labels), None, width)


def span() -> Head:
    """Start and end of an answer: extractive question answering."""
    return Head("question-answering")


def masked_lm() -> Head:
    """Masked-language modelling over the vocabulary, the decoder tied to the word embedding where the model says so."""
    return Head("masked-lm")


def causal_lm() -> Head:
    """The next token over the vocabulary, by the word embedding where the model ties the two."""
    return Head("causal-lm")


def _names(labels: Sequence[str] | int) -> tuple[str, ...]:
    names = tuple(f"LABEL_{i}" for i in range(labels)) if isinstance(labels, int) else tuple(map(str, labels))
    if not names or len(set(names)) != len(names):
        raise ValueError(f"labels must be distinct and at least one, got {labels!r}")
    return names


def swap_head(source: Source, head: Head, key: jax.Array) -> Source:
    """The same trunk under a fresh head; what is new and what is dropped is written into the lineage.

    Args:
      source: any source; the parameters of its trunk are shared, not copied.
      head: `classifier`, `tokens`, `span`, `masked_lm`, `causal_lm`, or a :class:`Head` with stages of the user's own.
      key: draws the new parameters; stage ``i`` of the new model draws from ``fold_in(key, i)``.

    Raises:
      ValueError: the user's own stages are not called ``head`` or ``head/...``, or the model cannot take the head.
    """
    if alien := [stage.name for stage in head.stages if _root(stage) != "head"]:
        raise ValueError(f"the stages of a head are called 'head' or 'head/...', not {alien[0]!r}")
    model = _reheaded(source.model, head)
    roots = {_root(stage) for stage in model.stages}
    kept = {root: node for root, node in source.params.items() if root in {*roots, SHARED} - {"head"}}
    fresh = {}
    for index, stage in enumerate(model.stages):
        if _root(stage) not in kept:
            node = stage.init(jax.random.fold_in(key, index))
            fresh.update(flatten({stage.name: node}, is_leaf=is_weight))
    new = unflatten(fresh)
    dropped = [root for root in source.params if root not in kept]
    note = (
        f"swap_head({head.kind}, labels={list(head.labels)}, new: {', '.join(new) or 'nothing'}; "
        f"dropped: {', '.join(dropped) or 'nothing'})"
    )
    assets, raw = source.assets, source.assets.get("config", {})
    if "problem_type" in raw:  # whether labels exclude each other, said of the head that is gone
        assets = {**assets, "config": {key: value for key, value in raw.items() if key != "problem_type"}}
    return dataclasses.replace(source, model=model, params={**kept, **new}, lineage=_noted(source, note), assets=assets)


def _root(stage: Stage) -> str:
    return stage.name.split("/")[0]


def _reheaded(model: Model, head: Head) -> Model:
    if model.family != "foreign":
        return family(model.family).rehead(model, head)
    trunk = tuple(stage for stage in model.stages if _root(stage) != "head")
    if not trunk:
        raise ValueError("the model is one stage, 'head'; name its parts, {'body': ..., 'head': ...}, to swap one")
    stats = tuple(pattern for pattern in model.stats if not pattern.startswith("head/"))
    return dataclasses.replace(model, stages=(*trunk, *(head.stages or (head_stage(head),))), head=head, stats=stats)


def untie(source: Source) -> Source:
    """A language-modelling head with a decoder of its own, a copy of what the embedding that it was tied to stands for.

    Raises:
      ValueError: the head is not tied.
    """
    model, head = source.model, source.model.head
    if model.family == "foreign" or head is None or not any(s.name == "head" and s.reads for s in model.stages):
        raise ValueError(f"untie: the head of this {model.family} model is not tied to an embedding")
    untied = dataclasses.replace(model, config=dataclasses.replace(model.config, tie_word_embeddings=False))
    kernel = jnp.array(materialize(source.params["embed"]["word"]["embedding"]).T, copy=True)
    params = {**source.params, "head": {**source.params.get("head", {}), "decoder": {"kernel": kernel}}}
    new = family(model.family).rehead(untied, head)
    return dataclasses.replace(source, model=new, params=params, lineage=_noted(source, "untie()"))


def check_tied(model: Model, labels: dict[str, str]) -> None:
    """A trained stage must not read a frozen parameter of another stage: the tie would be broken silently.

    Args:
      model: the model.
      labels: canonical path -> label.

    Raises:
      ValueError: naming the stage, the parameter and the way out.
    """
    for stage in model.stages:
        own = {label for path, label in labels.items() if path.startswith(f"{stage.name}/")}
        for path in stage.reads if own - {"frozen", "stats"} else ():
            if {label for part, label in labels.items() if weight_path(part) == path} == {"frozen"}:
                raise ValueError(
                    f"stage {stage.name} is trained but reads {path}, which is frozen: untie(source) first, "
                    "or train both"
                )


def _noted(source: Source, note: str) -> Lineage:
    return dataclasses.replace(source.lineage, operations=(*source.lineage.operations, note))
