"""A user's own model as a `Source`: NNX, Linen, Equinox or a plain function, one stage or several in depth order."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxtransfer.models.encoder import mean_pool
from jaxtransfer.models.foreign_parts import (
    ForeignError,
    Part,
    equinox_part,
    function_part,
    linen_part,
    nnx_part,
    parameters_of,
)
from jaxtransfer.models.layers import Linear
from jaxtransfer.models.stages import stages_of
from jaxtransfer.tree.diff import diff
from jaxtransfer.tree.fingerprint import digest, fingerprint
from jaxtransfer.tree.paths import Params, flatten, unflatten
from jaxtransfer.types import Carry, Head, Lineage, Model, Source, Stage

OUTPUTS = {"hidden": "last_hidden_state", "logits": "logits"}

TRAIN_FLAGS, EVAL_FLAGS = ("train", "training", "is_training"), ("deterministic", "use_running_average")
"""Arguments of Linen modules that, left unsaid, would silently keep dropout off and statistics still."""

Init = Callable[[jax.Array], Any] | Mapping[str, Callable[[jax.Array], Any]] | None


def from_nnx(
    module: nnx.Module | Mapping[str, nnx.Module],
    *,
    input: str | Sequence[str] = "inputs",
    output: str | None = None,
    init: Init = None,
) -> Source:
    """A source from an NNX module, whose ``Param`` and ``BatchStat`` variables become the parameters.

    Training calls ``module.train()`` and reseeds every random stream from the step's key; evaluation ``module.eval()``.

    Args:
      module: one module, which becomes the stage ``body``, or several in depth order, ``{"body": ..., "head": ...}``,
        each called on what the one before it returned. Stages ``blocks/0``, ``blocks/1``, ... are alike and scanned.
      input: the batch entry, or entries, that the first stage is called on.
      output: the entry that the last stage writes: by default ``logits`` for a stage called ``head``, else ``hidden``.
      init: ``init(key) -> module``, for training from scratch; a mapping by stage where there are several.

    Raises:
      ForeignError: the module, the names of its parameters or its stages' names cannot join.

    Example:
      >>> source = from_nnx({"head": nnx.Linear(4, 2, rngs=nnx.Rngs(0))})
      >>> list(flatten(source.params))
      ['head/bias', 'head/kernel']
    """
    # An nnx.Dict is a module and a mapping; it cannot be called, so it can only mean several stages.
    return _source(module if isinstance(module, Mapping) else {"body": module}, nnx_part, input, output, init)


def from_linen(
    module: linen.Module | Mapping[str, tuple[linen.Module, Any]],
    variables: Any = None,
    *,
    input: str | Sequence[str] = "inputs",
    output: str | None = None,
    train_kwarg: str | None = None,
    eval_kwarg: str | None = None,
    rngs: Sequence[str] = ("dropout",),
    init: Init = None,
) -> Source:
    """A source from a Linen module and its variables; ``params`` and ``batch_stats`` share the modules' paths.

    Args:
      module: one module, the stage ``body``, or ``{"body": (module, variables), "head": (module, variables)}``.
      variables: what ``module.init`` returned; collections other than these two are constants.
      input, output: as in `from_nnx`.
      train_kwarg: the argument of ``__call__`` that is true in training, such as ``train``.
      eval_kwarg: the argument of ``__call__`` that is true in evaluation, such as ``deterministic``.
      rngs: the names of the random streams that training needs.
      init: ``init(key) -> variables``, for training from scratch; a mapping by stage where there are several.

    Raises:
      ForeignError: as `from_nnx`; a flag that no stage takes; a stage that takes a well-known flag that is not named.

    Example:
      >>> dense = linen.Dense(2)
      >>> source = from_linen(dense, dense.init(jax.random.key(0), jnp.zeros((1, 4))))
      >>> list(flatten(source.params))
      ['body/bias', 'body/kernel']
    """
    stages = module if isinstance(module, Mapping) else {"body": (module, variables)}
    taken = {name: parameters_of(type(item[0]).__call__) for name, item in stages.items()}
    for flag in filter(None, (train_kwarg, eval_kwarg)):
        if not any(flag in names for names in taken.values()):
            raise ForeignError(f"no stage's __call__ takes {flag!r}; they take {taken}")
    for kind, known in (("train", TRAIN_FLAGS), ("eval", EVAL_FLAGS)):
        for stage, names in taken.items():
            if unsaid := [flag for flag in names if flag in known and flag not in (train_kwarg, eval_kwarg)]:
                raise ForeignError(f"stage {stage}: __call__ takes {unsaid[0]!r}: pass {kind}_kwarg={unsaid[0]!r}")

    def part(where: str, item: tuple[linen.Module, Any]) -> Part:
        return linen_part(where, *item, train_kwarg, eval_kwarg, rngs)

    inits = _by_stage(stages, init)
    return _source(stages, part, input, output, {n: _pair(stages[n][0], fn) for n, fn in inits.items()})


def from_equinox(
    module: Any,
    *,
    input: str | Sequence[str] = "inputs",
    output: str | None = None,
    vmap: bool = True,
    init: Init = None,
) -> Source:
    """A source from an Equinox module, whose floating-point arrays become the parameters; the rest stays constant.

    Args:
      module: one module, the stage ``body``, or several in depth order, ``{"body": ..., "head": ...}``. A module that
        takes ``key`` gets one in training (each example its own), None in evaluation, and ``inference`` is set.
      input, output: as in `from_nnx`.
      vmap: whether a module acts on one example, and is mapped over the batch.
      init: ``init(key) -> module``, for training from scratch; a mapping by stage where there are several.

    Raises:
      ForeignError: as `from_nnx`; a module that keeps ``eqx.nn.State`` (batch normalisation).

    Example:
      >>> import equinox as eqx
      >>> source = from_equinox(eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0)))
      >>> list(flatten(source.params))
      ['body/layers_0/bias', 'body/layers_0/weight', 'body/layers_1/bias', 'body/layers_1/weight']
    """
    import equinox as eqx

    def part(where: str, module: Any) -> Part:
        return equinox_part(eqx, where, module, vmap)

    return _source(module if isinstance(module, Mapping) else {"body": module}, part, input, output, init)


def from_function(
    fn: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    params: Any,
    *,
    input: str | Sequence[str] = "inputs",
    output: str | None = None,
    init: Init = None,
) -> Source:
    """A source from ``fn(params, x) -> y``, or ``fn(params, x, key)`` with ``key`` None in evaluation.

    Args:
      fn: one function, the stage ``body``, or several in depth order, ``{"body": ..., "head": ...}``.
      params: any pytree of arrays; where there are several stages, a mapping from each to its own.
      input, output: as in `from_nnx`.
      init: ``init(key) -> params``, for training from scratch; a mapping by stage where there are several.

    Raises:
      ForeignError: as `from_nnx`; a leaf that is no array.

    Example:
      >>> source = from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))})
      >>> source.model.stages[0].fn(source.params["body"], {"inputs": jnp.ones((3, 4))}, None)["hidden"].shape
      (3, 2)
    """
    fns: Mapping[str, Any] = fn if isinstance(fn, Mapping) else {"body": fn}
    trees = params if isinstance(fn, Mapping) else {"body": params}
    if not isinstance(trees, Mapping) or set(trees) != set(fns):
        raise ForeignError(f"params must have one tree for each of the stages {list(fns)}")

    def part(where: str, item: tuple[Callable[..., Any], Any]) -> Part:
        return function_part(where, *item)

    inits = {name: _pair(fns[name], make) for name, make in _by_stage(fns, init).items()}
    return _source({name: (fns[name], trees[name]) for name in fns}, part, input, output, inits)


def _pair(first: Any, make: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    return lambda key: (first, make(key))


def _by_stage(stages: Mapping[str, Any], init: Init) -> Mapping[str, Callable[[jax.Array], Any]]:
    """The initialisers by stage."""
    if init is not None and not isinstance(init, Mapping):
        if list(stages) != ["body"]:
            raise ForeignError(f"init must be a mapping, with a function for each of the stages {list(stages)}")
        return {"body": init}
    if unknown := sorted(set(init or {}) - set(stages)):
        raise ForeignError(f"init: no stage is called {unknown}; the stages are {list(stages)}")
    return init or {}


def _source(
    stages: Mapping[str, Any],
    read: Callable[[str, Any], Part],
    input: str | Sequence[str],
    output: str | None,
    init: Init,
) -> Source:
    """Puts the parts together: stages, canonical parameters, lineage."""
    if not stages:
        raise ForeignError("a model needs at least one stage")
    parts = {_checked(name): read(name, item) for name, item in stages.items()}
    inits, last = _by_stage(stages, init), list(parts)[-1]
    writes = {name: "logits" if name == "head" else "hidden" for name in parts} | ({last: output} if output else {})
    entries: tuple[str, ...] = (input,) if isinstance(input, str) else tuple(input)
    built: list[Stage] = []
    ends: dict[str, Any] = {}
    for name, part in parts.items():
        ends[name] = (entries, writes[name])
        like = _like(name, parts, ends)
        fn = _stage_fn(name, part, *ends[name]) if like is None else built[list(parts).index(like)].fn
        built.append(Stage(name, fn, partial(_fresh, name, _shapes(part), read, inits.get(name)), (writes[name],)))
        entries = (writes[name],)
    leaves = {f"{name}/{path}": jnp.asarray(x) for name, part in parts.items() for path, x in part.leaves.items()}
    stats = tuple(re.escape(f"{name}/{path}") for name, part in parts.items() for path in part.stats)
    outputs = OUTPUTS | {entry: OUTPUTS.get(entry, entry) for entry in writes.values()}
    params = unflatten(leaves)
    model = Model("foreign", None, tuple(built), outputs, Head("foreign") if last == "head" else None, stats)
    return Source(model, params, Lineage("memory", digest(params), fingerprints=fingerprint(params)))


def _checked(name: str) -> str:
    *parents, last = name.split("/")
    numbered = any(part.isdigit() for part in parents) or (last.isdigit() and not parents)
    if numbered or not all((*parents, last)) or re.search("[@:]", name):
        raise ForeignError(f"a stage is called like 'body', 'encoder/body' or 'blocks/0', not {name!r}")
    return name


def _like(name: str, parts: Mapping[str, Part], ends: Mapping[str, Any]) -> str | None:
    """The earlier numbered stage whose ``fn`` this one shares: like layers are laid out in one stack, and scanned."""
    parent, _, index = name.rpartition("/")
    for other in ends if index.isdigit() else ():
        number = other.removeprefix(f"{parent}/")
        if other == name or not number.isdigit() or _shapes(parts[other]) != _shapes(parts[name]):
            continue
        if ends[other] != ends[name] or parts[other].same() != parts[name].same():
            raise ForeignError(
                f"stages {other} and {name} have like parameters but differ in settings, or in what they read or "
                "write, so they cannot be scanned: name one of them without a number"
            )
        return other
    return None


def _stage_fn(name: str, part: Part, entries: tuple[str, ...], writes: str) -> Callable[..., Carry]:
    spec, call = _shapes(part), part.call

    def fn(params: Params, carry: Carry, key: jax.Array | None) -> Carry:
        diff(spec, params, dtypes=False).check(f"parameters of stage {name}")
        if missing := [entry for entry in entries if entry not in carry]:
            raise ForeignError(f"stage {name} reads {missing}, there is {sorted(carry)}: pass input= or output=")
        y, stats = call(flatten(params), [carry[entry] for entry in entries], key)
        if not hasattr(y, "dtype"):
            raise ForeignError(f"stage {name} returned a {type(y).__name__}; it must return one array")
        return {writes: y} if key is None or not stats else {writes: y, "stats": unflatten(stats)}

    return fn


def _fresh(name: str, spec: Any, read: Callable[[str, Any], Part], init: Any, key: jax.Array) -> Params:
    """Fresh parameters of a stage from the user's ``init``."""
    if not spec:
        return {}
    if init is None:
        raise ForeignError(f"stage {name}: a foreign model has no initialiser; pass init=, a function of a key")
    leaves = {path: jnp.asarray(leaf) for path, leaf in read(name, init(key)).leaves.items()}
    diff(spec, leaves).check(f"init of stage {name}")
    return unflatten(leaves)


def _shapes(part: Part) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in part.leaves.items()}


def head_stage(head: Head) -> Stage:
    """The stage ``head`` of a foreign model: ``logits = pool(hidden) kernel + bias``, with parameters under ``out``.

    Args:
      head: sequence- or token-classification with the features' ``width``. ``pooling="mean"`` is the mean over all axes
        between the first and the last; of (B, T, d), over the unmasked if the batch has an ``attention_mask``.

    Raises:
      ForeignError: another kind or pooling, no width; when it runs, features of another width or rank.

    Example:
      >>> stage = head_stage(Head("sequence-classification", ("a", "b"), width=4))
      >>> stage.init(jax.random.key(0))["out"]["kernel"].shape
      (4, 2)
    """
    kinds = ("sequence-classification", "token-classification")
    if head.kind not in kinds:
        raise ForeignError(f"a foreign model has heads {kinds}, not {head.kind!r}; or give the head's own stages")
    if head.width is None:
        raise ForeignError("a foreign model's features have no known width: give the head its width=")
    if head.pooling not in (None, "mean"):
        raise ForeignError(f"pooling {head.pooling!r} is not one of [None, 'mean']")
    return stages_of(["head"], partial(_LinearHead, head), _LinearHead.__call__, writes=("logits",))[0]


class _LinearHead(nnx.Module):
    """A linear layer on pooled features: (B, d) or (B, ..., d) -> (B, labels) or (B, ..., labels)."""

    def __init__(self, head: Head, rngs: nnx.Rngs):
        self.out = Linear(head.width or 0, len(head.labels), rngs=rngs)
        self.head = head

    def __call__(self, carry: Carry, key: jax.Array | None) -> Carry:
        return {"logits": self.out(self.features(carry), key)}

    def features(self, carry: Carry) -> jax.Array:
        if "hidden" not in carry:
            raise ForeignError(f"the head reads 'hidden', which no stage wrote; there is {sorted(carry)}")
        x, mask = carry["hidden"], carry.get("attention_mask")
        if x.shape[-1] != self.head.width:
            raise ForeignError(f"the head has width={self.head.width}, but the features are {x.shape}")
        if self.head.pooling == "mean":
            if mask is not None and x.ndim == 3:
                return mean_pool(x, mask)
            return x.mean(tuple(range(1, x.ndim - 1)))
        if self.head.kind == "sequence-classification" and x.ndim != 2:
            raise ForeignError(f"the features are {x.shape}, not (examples, width): ask for pooling='mean'")
        return x
