"""A run in phases: other leaves train, under another transformation, and what stays keeps its optimizer's state."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxtransfer.adapt import groups
from jaxtransfer.optim import UNTRAINED
from jaxtransfer.parallel import put
from jaxtransfer.parallel.specs import param_path
from jaxtransfer.step import init_state, params_of
from jaxtransfer.tree.paths import Params, flatten, map_with_path, path_of
from jaxtransfer.tree.rules import Rules
from jaxtransfer.tree.stacks import layers_of, run_of
from jaxtransfer.types import Model, State


def next_phase(
    model: Model,
    state: State,
    frozen: Params,
    labels: Any,
    tx: optax.GradientTransformation,
    *,
    params: Params | None = None,
    rested: Sequence[State] = (),
    mesh: Mesh | None = None,
    sharding: Rules = (),
    terms: Params | None = None,
) -> tuple[State, Params]:
    """The state of the next phase: the same parameters under other labels and another transformation.

    ``theta' = theta``, ``m'_i = m_i`` for each leaf i that trained and still does, else ``m'_i = tx.init``. Moments are
    found by the parameter's canonical path, so stacks may be cut otherwise, and by the kind of state that they are a
    field of, so Adam's go to whatever is built on Adam and to nothing else. A moment is fresh where its leaf did not
    train before, where its optimizer is of another kind or its shape differs, and where the counter that corrects its
    bias would also count for leaves of another age: `apart` keeps those in groups of their own.

    The counter of such moments goes along with them; schedules start anew. The run's key and step go on. Constants of
    the objective are of the old layout and left out: give them anew, see `step.with_constants`.

    Args:
      model: as before.
      state, frozen: the end of the last phase; both stay as they are.
      labels: tree of labels over canonical parameters.
      tx: over what trains now.
      params: canonical parameters to go on with instead of the state's own, as under another head.
      rested: ends of earlier phases, the latest first: what did not train in the last phase finds its moments there.
      mesh, sharding: as given to `init_state`.
      terms: first state of the objective's terms; None goes on with that of ``state``.

    Raises:
      ValueError, ShardingError, TreeError: as `init_state`.

    Example:
      >>> from jaxtransfer import Group, groups, optimizer
      >>> from jaxtransfer.models import family, init
      >>> from jaxtransfer.types import Head
      >>> raw = {"model_type": "cifar-resnet", "depth": 8, "num_channels": 1, "hidden_sizes": [4, 4, 4]}
      >>> model = family("cifar-resnet").build(raw, Head("image-classification", ("a", "b")))
      >>> params = init(model, jax.random.key(0))
      >>> probe, full = (groups.labels_of(model, rules(model), params) for rules in (groups.head_only, groups.full))
      >>> state, frozen = init_state(model, params, probe, optimizer(probe, {"head": Group()}), jax.random.key(1))
      >>> tx = optimizer(full, {"head": Group(), "trunk": Group()})
      >>> after, still = next_phase(model, state, frozen, full, tx)
      >>> [sum(leaf is not None for leaf in flatten(tree).values()) for tree in (state.params, after.params)]
      [2, 23]

    Linear probing then fine-tuning (Kumar et al. 2022, arXiv:2202.10054) and gradual unfreezing, see `thawing`, are
    made of it.
    """
    given = params_of(state, frozen) if params is None else params
    held = state.terms if terms is None else terms
    fresh, rest = init_state(model, given, labels, tx, state.key, mesh=mesh, sharding=sharding, terms=held)
    step = jnp.copy(state.step) if mesh is None else put(state.step, fresh.step.sharding)
    moments = _carried([state, *rested], fresh, mesh)
    return dataclasses.replace(fresh, step=step, opt_state=moments), rest


def thawing(model: Model, *, by: int = 1) -> tuple[Rules, ...]:
    """The rules of gradual unfreezing, phase by phase from the top: the head, ``by`` layers more each time, then all.

    Phase k trains ``{head} + {l : l > L - k * by}``; the embeddings thaw last.

    Args:
      model: of L layers.
      by: layers that thaw together, 1 to L.

    Raises:
      ValueError: the model has no layers, or ``by`` is out of range.

    Example:
      >>> from jaxtransfer.models import family
      >>> sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), 4)
      >>> model = family("bert").build({**sizes, "model_type": "bert", "num_hidden_layers": 2}, None)
      >>> [[rule[0] for rule in rules if rule[1] == "trunk"] for rules in thawing(model)][:2]
      [['pooler/.*'], ['blocks/1/.*', 'pooler/.*']]

    Howard & Ruder 2018, arXiv:1801.06146, take an epoch a phase.
    """
    layers = max(groups.stage_depths([stage.name for stage in model.stages]).values()) - 1
    if not 1 <= by <= layers:
        raise ValueError(f"thawing: {by} layers at a time, but the model has {layers}")
    return (*(groups.last(model, k) for k in range(0, layers + 1, by)), groups.full(model))


def apart(labels: Any, before: Any) -> tuple[Any, dict[str, str]]:
    """Labels under which leaves of different age share no group, so that each keeps its moments: see `next_phase`.

    Adam's counter t corrects the bias ``1 - b ** t`` of a whole group; of leaves that thaw in different phases t
    differs. Those that had the label keep it, the others get it with a number.

    Args:
      labels: tree of labels of this phase.
      before: those of the phase before, as this function gave them; paths of one alone count as not trained.

    Returns:
      The labels, and new label -> the label that it is a part of: what to give the groups of `optim.optimizer`.

    Example:
      >>> apart({"a": "trunk", "b": "trunk", "c": "frozen"}, {"a": "frozen", "b": "trunk", "c": "frozen"})
      ({'a': 'trunk_2', 'b': 'trunk', 'c': 'frozen'}, {'trunk': 'trunk', 'trunk_2': 'trunk'})
    """
    flat, old = flatten(labels), flatten(before)
    classes: dict[str, list[str | None]] = {}
    for path, label in flat.items():
        if label not in UNTRAINED:
            known = classes.setdefault(label, [])
            if (age := _trained(old.get(path))) not in known:
                known.append(age)
    names: dict[tuple[str, str | None], str] = {}
    for label, ages in classes.items():
        free = (name for n in itertools.count(2) if (name := f"{label}_{n}") not in classes and name not in ages)
        eldest = label if label in ages else next((age for age in ages if age), None)
        for age in ages:
            own = re.fullmatch(rf"{re.escape(label)}_\d+", age or "")
            names[label, age] = label if age == eldest else own[0] if own else next(free)
    new = map_with_path(lambda path, label: names.get((label, _trained(old.get(path))), label), labels)
    return new, dict(sorted((name, label) for (label, _), name in names.items()))


def _trained(label: str | None) -> str | None:
    return None if label in UNTRAINED else label


class _Row(NamedTuple):
    """A parameter's share of a leaf of an optimizer's state, and the state that the leaf is a field of."""

    leaf: str
    index: int | None  # of its layer, where the leaf is stacked
    node: tuple[str, int | None]  # and of the node's, where there is one for each layer


class _Moments(NamedTuple):
    """The leaves of an optimizer's state that belong to parameters, and the counters beside them."""

    leaves: dict[str, jax.Array]
    rows: dict[tuple[str, str, str], list[_Row]]  # by kind of state, field, canonical path
    counters: dict[str, dict[str, str]]  # node -> field -> leaf

    def row(self, leaf: str, index: int | None) -> Any:
        value = self.leaves[leaf]
        return value if index is None else value[index]

    def like(self, row: _Row) -> tuple[Any, Any]:
        shape = self.leaves[row.leaf].shape
        return shape if row.index is None else shape[1:], self.leaves[row.leaf].dtype


def _moments(state: State) -> _Moments:
    paths, found = flatten(state.params), _Moments({}, {}, {})
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        name, path = path_of(keys), param_path(keys)
        found.leaves[name] = leaf
        if path not in paths:
            if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and jnp.issubdtype(leaf.dtype, jnp.integer):
                found.counters.setdefault(path_of(keys[:-1]), {})[keys[-1].name] = name
            continue
        owner = keys[: len(keys) - len(path.split("/")) - path.count("@")]
        node, field = owner[:-1], path_of(owner[-1:])
        kind, where, layers = _kind(state.opt_state, node), path_of(node), layers_of(path)
        stacked = any(map(run_of, path.split("/")))
        each = any(run_of(part) for part in re.split("[/@]", where))  # one state for each layer
        for i, layer in enumerate(layers):
            row = _Row(name, i if stacked else None, (where, i if each else None))
            found.rows.setdefault((kind, field, layer), []).append(row)
    return found


def _kind(tree: Any, keys: Sequence[Any]) -> str:
    """The type of the node at a key path."""
    for key in keys:
        tree = getattr(tree, key.name) if isinstance(key, jax.tree_util.GetAttrKey) else tree[_entry(key)]
    return type(tree).__name__


def _entry(key: Any) -> Any:
    return key.key if isinstance(key, jax.tree_util.DictKey) else key.idx


def _carried(ends: Sequence[State], fresh: State, mesh: Mesh | None) -> Any:
    """The fresh optimizer's state with the moments of what trained before, from the first of the ends that has them."""
    new, known = _moments(fresh), [_moments(end) for end in ends]
    sources: dict[_Row, tuple[_Moments, _Row]] = {}
    for key, rows in new.rows.items():
        for old in known:
            had = old.rows.get(key, [])
            if len(had) == len(rows) and [*map(old.like, had)] == [*map(new.like, rows)]:
                sources |= {row: (old, was) for row, was in zip(rows, had, strict=True)}
                break
    plan = {(row.leaf, row.index): (old.leaves[was.leaf], was.index) for row, (old, was) in sources.items()}
    for node, rows in _by_node(new).items():
        if not (fields := new.counters.get(node[0])):
            continue
        origins = {(id(sources[row][0]), sources[row][1].node) if row in sources else None for row in rows}
        if len(origins) > 1 or None in origins:  # one counter cannot count for leaves of different ages
            plan = {place: value for place, value in plan.items() if place not in {(r.leaf, r.index) for r in rows}}
            continue
        old, was = sources[rows[0]]
        for field, leaf in fields.items():
            plan[leaf, node[1]] = old.leaves[old.counters[was.node[0]][field]], was.node[1]
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: _put(path_of(keys), leaf, plan, mesh), fresh.opt_state)


def _by_node(moments: _Moments) -> dict[tuple[str, int | None], list[_Row]]:
    nodes: dict[tuple[str, int | None], list[_Row]] = {}
    for rows in moments.rows.values():
        for row in rows:
            nodes.setdefault(row.node, []).append(row)
    return nodes


def _put(name: str, leaf: jax.Array, plan: Mapping[tuple[str, int | None], Any], mesh: Mesh | None) -> jax.Array:
    """A leaf with the rows that are carried over; a copy, since the state that it comes from may be donated."""

    def taken(index: int | None) -> Any:
        value, at = plan.get((name, index), (leaf, index))
        return value if at is None else value[at]

    if (name, None) in plan:
        made = jnp.copy(taken(None))
    elif leaf.ndim and any((name, i) in plan for i in range(len(leaf))):
        made = jnp.stack([taken(i) for i in range(len(leaf))])
    else:
        return leaf
    return made if mesh is None else put(made, leaf.sharding)
