"""The frozen prefix: the stages before the first that trains, what is read of their output, and a model without them.

What the prefix computes of an example does not change while the rest trains. Of the entries of the carry at its end,
those that depend on parameters (or on fields that cost as much to make, such as decoded images) are kept; those that
follow from the batch alone, such as masks and rotary tables, are computed again; what nothing behind it reads is
dropped. Both are read off the traced programs.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.adapt.groups import FROZEN
from jaxtransfer.data.examples import Examples, collate
from jaxtransfer.features.extract import FeatureError
from jaxtransfer.models.api import STATS, apply, run_span
from jaxtransfer.models.attention import Attend
from jaxtransfer.tree.paths import Params, flatten, weight_path
from jaxtransfer.tree.weights import SHARED
from jaxtransfer.types import Carry, Model

Uses = Callable[[Params, Mapping[str, Any], Mapping[str, Any]], Any]
"""``uses(params, outputs, batch)``: what training and evaluation read of a batch's outputs and fields; traced."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the carry that is kept, a row an example.

    Attributes:
      shape: of a row, without the axis of its tokens.
      dtype: as it is computed.
      ragged: a row has an axis of tokens before ``shape``.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    ragged: bool

    def bytes(self, lengths: np.ndarray) -> int:
        """Of all rows, by the examples' lengths (N,)."""
        rows = int(lengths.sum()) if self.ragged else len(lengths)
        return rows * int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The frozen stages up to the boundary ``stop``, and what is kept of their output.

    Attributes:
      model: the whole model.
      stop: the name of the last frozen stage.
      entries: what is kept, by its name in the carry.
      free: what is computed again from the batch.
      lazy: fields of the batch that are not made any more, as rows of zeros.
      reads: fields of the batch that what follows reads.
      precision: dtype of activations.
    """

    model: Model
    stop: str
    entries: Mapping[str, Entry]
    free: tuple[str, ...]
    lazy: Mapping[str, np.ndarray]
    reads: tuple[str, ...]
    precision: Any

    @property
    def stages(self) -> int:
        """How many stages it has."""
        return [stage.name for stage in self.model.stages].index(self.stop) + 1

    def run(self, params: Params, batch: Mapping[str, Any], **how: Any) -> Carry:
        """The kept entries of a batch; ``how`` as in `models.run_span`."""
        carry = run_span(self.model, params, batch, None, self.stop, dtype=self.precision, **how)
        return {name: carry[name] for name in self.entries}

    def rest(self) -> Model:
        """The model that starts behind the prefix, from batches that hold the kept entries; same names, same keys."""

        def carry(params: Params, batch: Mapping[str, Any]) -> Carry:
            if not self.free:
                return dict(batch)
            rows = len(next(iter(batch.values())))
            given = {name: value for name, value in batch.items() if name not in self.entries}
            given |= {name: jnp.zeros((rows, *row.shape), row.dtype) for name, row in self.lazy.items()}
            # All of the prefix is traced, and what it computes of parameters cut out, for nothing reads it.
            found = run_span(self.model, params, given, None, self.stop, dtype=self.precision)
            return {**batch, **{name: found[name] for name in self.free}}

        return dataclasses.replace(self.model, start=(self.stop, carry))


def frozen_stages(model: Model, labels: Any) -> tuple[int, str]:
    """How many stages from the first on neither train nor read what trains, and the leaf that ends them.

    Args:
      model: the model.
      labels: tree of labels over canonical parameters.

    Example:
      >>> from jaxtransfer.models import from_function
      >>> parts = {"body": lambda p, x: x @ p["w"], "head": lambda p, x: x @ p["w"]}
      >>> model = from_function(parts, {name: {"w": jnp.eye(2)} for name in parts}).model
      >>> frozen_stages(model, {"body": {"w": "frozen"}, "head": {"w": "head"}})
      (1, 'head/w')
    """
    live = [path for path, label in flatten(labels).items() if label != FROZEN]
    if shared := [path for path in live if path.startswith(f"{SHARED}/")]:
        return 0, shared[0]
    for index, stage in enumerate(model.stages):
        for path in live:
            if path.startswith(f"{stage.name}/") or any(_holds(read, path) for read in stage.reads):
                return index, path
    return len(model.stages), ""


def _holds(read: str, path: str) -> bool:
    """Whether what a stage reads is, or is above, the leaf at a path."""
    return weight_path(path) == read or path.startswith(f"{read}/")


def frozen_prefix(
    model: Model,
    params: Params,
    labels: Any,
    examples: Examples,
    uses: Uses,
    *,
    length: int = 0,
    precision: Any = jnp.float32,
    attend: Attend | None = None,
) -> Prefix:
    """The stages whose output can be computed once, for examples that are the same in every epoch.

    Args:
      model: the model.
      params: its parameters, concrete or abstract, canonical or laid out.
      labels: tree of labels over the canonical parameters.
      examples: what it reads.
      uses: what training and evaluation read.
      length: the longest that a batch of texts can be; 0 where there are none.
      precision: dtype of activations.
      attend: what attention behind the prefix is left to, of no mesh.

    Raises:
      FeatureError: there is no such prefix, or its output cannot be kept; the message says why.
    """
    count, ending = frozen_stages(model, labels)
    if count == len(model.stages):
        raise FeatureError("nothing trains")
    layers = [stage.name for stage in model.stages if stage.name.rpartition("/")[2].isdecimal()]
    if count == 0 or (layers and layers[0] not in [stage.name for stage in model.stages[:count]]):
        raise FeatureError(f"training reaches down to {ending}, so no layer stays as it is")
    if examples.lazy is not None and examples.lazy.random:
        raise FeatureError(f"{', '.join(examples.lazy.padding)} are augmented: new in every epoch")
    if examples.ragged and model.family == "foreign":
        raise FeatureError("a model of one's own may look at padding, which differs from batch to batch")
    stop = model.stages[count - 1].name
    lazy = {} if examples.lazy is None else dict(examples.lazy.padding)

    def before(params: Params, batch: Mapping[str, Any]) -> Carry:
        return run_span(model, params, batch, None, stop, dtype=precision)

    batch = _abstract(examples, 2, length)
    at_stop = jax.eval_shape(before, params, batch)
    written = [name for name in at_stop if name not in batch and name not in (STATS, "captured")]
    costly = _depends(lambda args: {name: before(*args)[name] for name in written}, (params, batch), lazy)
    behind = dataclasses.replace(model, start=(stop, lambda params, carry: dict(carry)))

    def after(carry: Carry, how: Attend | None) -> Any:
        return uses(params, apply(behind, params, carry, dtype=precision, attend=how), carry)

    # The masks, from which attention starts whatever it is left to, and what a kernel reads instead of them.
    read = _read(lambda carry: [after(carry, how) for how in {None, attend}], at_stop)
    if made := sorted(read & lazy.keys()):
        raise FeatureError(f"{made[0]} is read behind {stop}, so it has to be made in every epoch all the same")
    kept = [name for name in written if name in costly & read]
    entries = {name: _entry(name, before, params, examples, length) for name in kept}
    free = tuple(name for name in written if name in read - costly)
    reads = tuple(sorted(batch)) if free else tuple(name for name in sorted(batch) if name in read)
    return Prefix(model, stop, entries, free, lazy, reads, precision)


def _abstract(examples: Examples, rows: int, length: int) -> dict[str, Any]:
    """The shapes of a batch: of padding rows, which cost nothing to make."""
    batch = collate(examples, np.full(rows, -1), length)
    return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in batch.items()}


def _entry(name: str, before: Callable[..., Carry], params: Params, examples: Examples, length: int) -> Entry:
    """Which axes of an entry are rows and tokens, by what changes with the batch's shape."""

    def shape(rows: int, length: int) -> Any:
        return jax.eval_shape(before, params, _abstract(examples, rows, length))[name]

    base, taller = shape(2, length), shape(3, length)
    if getattr(base, "shape", ())[:1] != (2,) or taller.shape != (3, *base.shape[1:]):
        raise FeatureError(f"{name} at the end of the frozen stages is no array of one row an example")
    dtype = np.dtype(base.dtype)
    if not examples.ragged or length < 2 or (shorter := shape(2, length - 1)).shape == base.shape:
        return Entry(base.shape[1:], dtype, ragged=False)
    if base.shape[1] != length or shorter.shape != (2, length - 1, *base.shape[2:]):
        raise FeatureError(f"{name} {base.shape} at the end of the frozen stages does not have one row a token")
    return Entry(base.shape[2:], dtype, ragged=True)


def _depends(fn: Callable[[Any], Mapping[str, Any]], args: tuple[Params, Any], lazy: Collection[str]) -> set[str]:
    """The outputs of a program that depend on its parameters or on lazy fields."""
    jaxpr = jax.make_jaxpr(fn)(args).jaxpr
    params, batch = args
    marks = jax.tree.leaves(jax.tree.map(lambda _: True, params))
    marks += [name in lazy for name in sorted(batch)]  # the order in which dictionaries are flattened
    tainted = {var for var, mark in zip(jaxpr.invars, marks, strict=True) if mark}
    for eqn in jaxpr.eqns:
        if any(_is(var, tainted) for var in eqn.invars):
            tainted |= set(eqn.outvars)
    out = jax.eval_shape(fn, args)
    leaves = [name for name in sorted(out) for _ in jax.tree.leaves(out[name])]
    return {name for name, var in zip(leaves, jaxpr.outvars, strict=True) if _is(var, tainted)}


def _read(fn: Callable[[Any], Any], carry: Mapping[str, Any]) -> set[str]:
    """The entries of a carry that a program's outputs depend on."""
    jaxpr = jax.make_jaxpr(fn)(dict(carry)).jaxpr
    live = {var for var in jaxpr.outvars if not hasattr(var, "val")}
    for eqn in reversed(jaxpr.eqns):
        if any(var in live for var in eqn.outvars):
            live |= {var for var in eqn.invars if not hasattr(var, "val")}
    names = [name for name in sorted(carry) for _ in jax.tree.leaves(carry[name])]
    return {name for name, var in zip(names, jaxpr.invars, strict=True) if var in live}


def _is(var: Any, marked: set[Any]) -> bool:
    """Whether a variable of a program is marked; a literal never is, and cannot be looked up."""
    return not hasattr(var, "val") and var in marked
