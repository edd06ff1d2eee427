"""Phases: parameters go on bit for bit, moments by canonical path; linear probing first, thawing, alternation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtransfer.adapt import groups
from jaxtransfer.models.foreign import from_nnx
from jaxtransfer.objectives import cross_entropy, discrepancy, seen
from jaxtransfer.optim import Group
from jaxtransfer.parallel import make_mesh
from jaxtransfer.phases import apart, next_phase, thawing
from jaxtransfer.step import init_state, make_step, params_of, places
from jaxtransfer.tree import Rule, TreeError, flatten, unstack
from jaxtransfer.types import AUX
from tests import tiny

LAYERS = 3
GROUP = Group("adamw", lr=1e-2, schedule="linear", warmup=2, steps=50)


@functools.cache
def source():
    return tiny.source(num_hidden_layers=LAYERS)


def labelled(rules, before=None):
    labels = tiny.labels_of(source(), rules)
    return apart(labels, before)[0] if before is not None else labels


def grouped(labels, group=GROUP, **options):
    """One group's options for every label, in groups of their own."""
    return tiny.transform(labels, group, **options)


def begun(labels, tx):
    src = source()
    return init_state(src.model, src.params, labels, tx, jax.random.key(2))


def imagined(state, seed=0):
    """A state whose optimizer has seen something: random moments, counters at 7."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.uniform(0.1, 1.0, leaf.shape).astype(leaf.dtype))
        return jnp.full_like(leaf, 7)

    return dataclasses.replace(state, step=jnp.int32(7), opt_state=jax.tree.map(draw, state.opt_state))


def adam(state, field):
    """The moments of every Adam of a state, by canonical path."""
    found = {}
    for node in jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)):
        if isinstance(node, optax.ScaleByAdamState):
            found |= flatten(unstack(getattr(node, field)))
    return found


def counts(state):
    """The counters of every Adam, and of every schedule."""
    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState)
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, kinds))
    return [sorted(int(np.max(node.count)) for node in nodes if isinstance(node, kind)) for kind in kinds]


def carried(before, after, layers, fresh):
    """Moments of the named leaves are the same bits, of the others nothing."""
    for field in ("mu", "nu"):
        old, new = adam(before, field), adam(after, field)
        for path, leaf in new.items():
            if path.startswith(layers):
                assert tiny.bits(leaf) == tiny.bits(old[path]), path
            else:
                assert path.startswith(fresh), path
                assert not np.asarray(leaf).any(), path


def test_what_stays_keeps_its_moments_and_their_counter_however_the_stacks_are_cut():
    src = source()
    first = labelled(groups.last(src.model, 1))
    state, frozen = begun(first, grouped(first))
    state = imagined(state)
    second = labelled(groups.last(src.model, 2), first)
    after, still = next_phase(src.model, state, frozen, second, grouped(second))
    carried(state, after, ("head/", "pooler/", "blocks/2/"), "blocks/1/")
    assert counts(after) == [[0, 7, 7], [0, 0, 0]]  # the moments' go along, schedules start anew
    assert int(after.step) == 7 and tiny.bits(after.key) == tiny.bits(state.key)
    assert tiny.same_bits(params_of(after, still), params_of(state, frozen))
    # A third phase: three ages in what the rules call the trunk, and everything in one stack or another.
    third = labelled(groups.full(src.model), second)
    last, rest = next_phase(src.model, imagined(after, 1), still, third, grouped(third))
    carried(imagined(after, 1), last, ("head/", "pooler/", "blocks/1/", "blocks/2/"), ("embed/", "blocks/0/"))
    assert sorted(set(flatten(third).values())) == ["head", "trunk", "trunk_2", "trunk_3"]
    assert not any(leaf is not None for leaf in flatten(rest).values())


def test_a_counter_that_would_count_for_leaves_of_different_ages_starts_them_all_anew():
    src = source()
    first = labelled(groups.last(src.model, 1))
    state, frozen = begun(first, grouped(first))
    second = labelled(groups.last(src.model, 2))  # not set apart
    after, _ = next_phase(src.model, imagined(state), frozen, second, grouped(second))
    carried(imagined(state), after, "head/", ("pooler/", "blocks/"))
    assert counts(after)[0] == [0, 7]


def test_momentum_has_no_counter_and_is_carried_leaf_by_leaf():
    src, group = source(), Group("sgd", lr=1e-2)
    first, second = labelled(groups.last(src.model, 1)), labelled(groups.last(src.model, 2))
    state, frozen = begun(first, grouped(first, group))
    state = imagined(state)
    after, _ = next_phase(src.model, state, frozen, second, grouped(second, group))

    def traces(state):
        return {
            path: leaf
            for node in jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, optax.TraceState))
            if isinstance(node, optax.TraceState)
            for path, leaf in flatten(unstack(node.trace)).items()
        }

    old, new = traces(state), traces(after)
    assert {path for path, leaf in new.items() if np.asarray(leaf).any()} == old.keys() < new.keys()
    assert all(tiny.bits(new[path]) == tiny.bits(leaf) for path, leaf in old.items())


@pytest.mark.parametrize(("before", "kept"), [("adamw", True), ("lion", False)])
def test_moments_go_to_the_same_kind_of_optimizer_alone(before, kept):
    """LAMB is built on Adam, and has a state for each layer, whose counters are its own."""
    src = source()
    first, second = labelled(groups.last(src.model, 1)), labelled(groups.full(src.model))
    state, frozen = begun(first, grouped(first, Group(before, lr=1e-3)))
    state = imagined(state)
    after, _ = next_phase(src.model, state, frozen, second, grouped(second, Group("lamb", lr=1e-3)))
    layers = {path.split("/")[1] for path, leaf in adam(after, "mu").items() if path[:6] == "blocks" and leaf.any()}
    assert layers == ({"2"} if kept else set())
    head = [leaf for path, leaf in adam(after, "mu").items() if path.startswith("head/")]
    assert head and all(bool(np.any(leaf)) is kept for leaf in head)


def test_an_optimizer_with_a_state_for_each_layer_keeps_the_counter_of_each():
    src, group = source(), Group("muon", lr=1e-3)
    first, second = labelled(groups.last(src.model, 1)), labelled(groups.full(src.model))
    state, frozen = begun(first, grouped(first, group))
    after, _ = next_phase(src.model, imagined(state), frozen, second, grouped(second, group))
    found = {
        path: np.asarray(leaf).tolist()
        for path, leaf in flatten(after.opt_state).items()
        if path.endswith("@count") and "blocks/" in path
    }
    # Of matrices and of vectors: the moments' counter goes along with the one layer that trained, the schedule's not.
    assert sorted(found.values()) == [[0, 0, 0]] * 2 + [[0, 0, 7]] * 2, found


def test_names_of_ages_stay_from_phase_to_phase():
    before = {"a": "head", "b": "trunk", "c": "trunk_2", "d": "frozen"}
    labels, parts = apart({"a": "trunk", "b": "trunk", "c": "trunk", "d": "trunk"}, before)
    assert labels == {"a": "trunk_3", "b": "trunk", "c": "trunk_2", "d": "trunk_4"}
    assert set(parts.values()) == {"trunk"} and set(parts) == set(labels.values())
    assert apart({"a": "head", "b": "head"}, {"a": "trunk", "b": "frozen"})[0] == {"a": "head", "b": "head_2"}


def test_on_a_mesh_everything_is_where_a_step_keeps_it(devices):
    src, mesh = source(), make_mesh(fsdp=2, devices=devices[:2])
    rules = [(r"blocks/.*/kernel", PartitionSpec("fsdp"))]
    first = labelled(groups.last(src.model, 1))
    where = {"mesh": mesh, "sharding": rules}
    state, frozen = init_state(src.model, src.params, first, grouped(first), jax.random.key(2), **where)
    second = labelled(groups.last(src.model, 2), first)
    after, _ = next_phase(src.model, state, frozen, second, grouped(second), **where)
    wanted = flatten(places(after, mesh, [Rule(*rule, optional=True) for rule in rules]))
    for path, leaf in flatten(after).items():
        assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path


def test_labels_of_another_tree_are_refused():
    src = source()
    labels = labelled(groups.head_only(src.model))
    state, frozen = begun(labels, grouped(labels))
    with pytest.raises(TreeError, match="labels and params differ"):
        next_phase(src.model, state, frozen, {"head": labels["head"]}, grouped(labels))


def test_thawing_goes_from_the_top_down_to_all():
    model = source().model
    found = [flatten(labelled(rules)) for rules in thawing(model)]
    live = [
        {path.split("/")[1] for path, label in by.items() if path[:6] == "blocks" and label == "trunk"} for by in found
    ]
    assert live == [set(), {"2"}, {"1", "2"}, {"0", "1", "2"}, {"0", "1", "2"}]
    assert [by["embed/word/embedding"] for by in found] == ["frozen"] * 4 + ["trunk"]
    assert all({label for path, label in by.items() if path.startswith("head/")} == {"head"} for by in found)
    assert len(thawing(model, by=2)) == 3
    for by in (0, 4):
        with pytest.raises(ValueError, match=f"thawing: {by} layers at a time, but the model has 3"):
            thawing(model, by=by)


class Body(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 8, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.up(x))


def stages(**made):
    """A model of small stages, named in depth order."""
    rngs = nnx.Rngs(0)
    return from_nnx(
        {name: make(rngs) for name, make in made.items()},
        init={name: lambda key, make=make: make(nnx.Rngs(key)) for name, make in made.items()},
    )


TASK = cross_entropy()


def two_heads(view):
    """The losses of both heads on the source, and their discrepancy on the target: the parts of `terms.mcd`."""
    target, second = view.domains["target"], view.params[AUX]["mcd"]
    hidden = seen.captured(target, "body")
    first, other = seen.behind(target, "body", hidden), seen.behind(target, "body", hidden, second)
    own = seen.behind(view, "body", seen.captured(view, "body"), second)
    loss, metrics = TASK(view)
    loss = loss + TASK(dataclasses.replace(view, outputs={**view.outputs, "logits": own}))[0]
    return loss, discrepancy.classifier_discrepancy(first, other), {"weight": metrics["weight"]}


def turn(sign, task=True):
    def objective(view):
        loss, apart, metrics = two_heads(view)
        return (loss if task else 0.0) + sign * apart, {**metrics, "apart": apart}

    return objective


def test_alternation_of_mcd_heads_raise_the_discrepancy_and_features_lower_it():
    """Saito et al. 2018, arXiv:1712.02560: everything learns the source, the heads part, the features follow."""
    src = stages(embed=lambda r: nnx.Linear(5, 6, rngs=r), body=Body, head=lambda r: nnx.Linear(8, 3, rngs=r))
    second = next(stage for stage in src.model.stages if stage.name == "head").init(jax.random.key(9))
    params = {**src.params, AUX: {"mcd": second}}
    heads, features = (f"(head|{AUX})/.*", "heads"), ("(embed|body)/.*", "features")
    sets = [[heads, features], [heads, (".*", "frozen")], [features, (".*", "frozen")]]
    labels = [groups.labels_of(src.model, rules, params) for rules in sets]
    txs = [tiny.transform(each, Group("adamw", lr=1e-2, weight_decay=0.0)) for each in labels]
    objectives = [turn(0.0), turn(-1.0), turn(1.0, task=False)]
    step = [
        make_step(src.model, objective, tx, capture=("body",), donate=False)
        for objective, tx in zip(objectives, txs, strict=True)
    ]
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(16, 5)).astype(np.float32), np.ones(16, np.float32)
    batch = {"inputs": x, "labels": (x[:, 0] > 0).astype(np.int32), "weight": weight}
    batch["target"] = {"inputs": x[::-1] + 1.0, "weight": weight}
    state, frozen = init_state(src.model, params, labels[0], txs[0], jax.random.key(1))
    ends, told = [], []
    for count in range(6):
        kind = count % 3
        if count:
            state, frozen = next_phase(src.model, state, frozen, labels[kind], txs[kind], rested=ends[::-1])
        seen_here = []
        for _ in range((40, 8, 8)[kind]):
            state, metrics = step[kind](state, frozen, batch)
            seen_here.append(float(metrics["apart"]))
        ends.append(state)
        told.append(seen_here)
    for count in (1, 4):
        assert told[count][-1] > told[count][0], "the heads part"
        assert told[count + 1][-1] < told[count + 1][0], "the features bring them together"
    assert int(state.step) == 112 and counts(state)[0] == [96]  # the features learned in four of six turns
    last, _ = next_phase(src.model, state, frozen, labels[0], txs[0], rested=ends[::-1])
    assert counts(last)[0] == [96, 96]  # and so did the heads


@functools.cache
def linear_network():
    return stages(
        body=lambda r: nnx.Linear(20, 5, use_bias=False, rngs=r),
        head=lambda r: nnx.Linear(5, 1, use_bias=False, rngs=r),
    )


@functools.cache
def step_of(kind):
    """One compiled step for every seed: of all, or of the head."""
    src = linear_network()
    recipe = (groups.full, groups.head_only)[kind]
    labels = groups.labels_of(src.model, recipe(src.model), src.params)
    tx = tiny.transform(labels, Group("sgd", lr=0.05, weight_decay=0.0, momentum=0.9))
    return labels, tx, make_step(src.model, squared, tx)


def squared(view):
    error = view.outputs["logits"][:, 0] - view.batch["labels"]
    return jnp.mean(error**2), {"weight": jnp.sum(view.batch["weight"])}


def orthonormal(matrix):
    return np.linalg.qr(matrix)[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_linear_probing_first_keeps_the_features_where_no_example_is(seed):
    """Two-layer linear networks of Kumar et al. 2022: d=20, k=5, n=10 examples in a subspace of 5 dimensions.

    ``f(x) = v . B x``; the pre-trained B is near the true one. The error out of distribution is
    ``|B^T v - B*^T v*|^2``, of a standard normal x.
    """
    d, k, n, span = 20, 5, 10, 5
    rng = np.random.default_rng(seed)
    true = orthonormal(rng.normal(size=(d, k)))
    near, wanted = orthonormal(true + 0.02 * rng.normal(size=(d, k))), true @ rng.normal(size=k)
    x = np.zeros((n, d))
    x[:, :span] = rng.normal(size=(n, span))
    batch = {
        "inputs": x.astype(np.float32),
        "labels": (x @ wanted).astype(np.float32),
        "weight": np.ones(n, np.float32),
    }
    src = linear_network()
    random = rng.normal(size=(k, 1)).astype(np.float32)
    params = {"body": {"kernel": jnp.asarray(near, jnp.float32)}, "head": {"kernel": jnp.asarray(random)}}
    labels, txs, (full, probe) = zip(*map(step_of, range(2)), strict=True)

    def trained(step, state, frozen):
        for _ in range(600):
            state, metrics = step(state, frozen, batch)
        return state, float(metrics["loss"])

    def error(state, frozen):
        found = params_of(state, frozen)
        return float(np.sum((np.asarray(found["body"]["kernel"] @ found["head"]["kernel"])[:, 0] - wanted) ** 2))

    state, nothing = init_state(src.model, params, labels[0], txs[0], jax.random.key(0))
    tuned, loss = trained(full, state, nothing)
    assert loss < 1e-3
    moved = np.asarray(tuned.params["body"]["kernel"]) - near
    assert np.abs(moved[span:]).max() < 1e-6 < 0.01 < np.abs(moved[:span]).max()
    state, frozen = init_state(src.model, params, labels[1], txs[1], jax.random.key(0))
    probed, _ = trained(probe, state, frozen)
    both, still = next_phase(src.model, probed, frozen, labels[0], txs[0])
    both, loss = trained(full, both, still)
    assert loss < 1e-3
    errors = error(tuned, nothing), error(probed, frozen), error(both, still)
    assert errors[2] < errors[1] < errors[0] / 2
