"""What must hold of every method, on every kind of weight, over every kind of base, however adapters are combined."""

import dataclasses
import math
import re
import tempfile

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxtransfer import checkpoint
from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import groups
from jaxtransfer.adapt.adapter_types import Adapter
from jaxtransfer.adapt.quantized import NF4
from jaxtransfer.models import apply, layout_of
from jaxtransfer.parallel import make_mesh
from jaxtransfer.step import init_state, make_step, params_of
from jaxtransfer.tree import flatten, stack, unstack
from jaxtransfer.tree.weights import is_weight
from tests import tiny
from tests.adapt.strategies import EXACT, LEAVES, adapted_toys, cases, formula, moved, squares, toy_batch
from tests.models import zoo

settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


FEW = settings(max_examples=12)
ANY = settings(max_examples=60)


def unchanged_at_the_start(case):
    run = jax.jit(case.run)
    got, want = run(case.attached().params), run(case.plain.params)
    if EXACT.issuperset(case.methods):
        assert jnp.array_equal(got, want)
    else:
        zoo.assert_close(got, want, 2e-6)


def merged_is_factored_and_unmerge_is_exact(case):
    tuned = dataclasses.replace(case.attached(), params=moved(case.attached().params))
    run = jax.jit(case.run)
    want = run(tuned.params)
    merged, kept = (at.merge(tuned, dequantize=True, keep=keep) for keep in (False, True))
    assert not any(map(is_weight, jax.tree.leaves(merged.params, is_leaf=is_weight)))
    for other in (merged, kept):
        zoo.assert_close(run(other.params), want)
    assert tiny.same_bits(at.unmerge(kept).params, tuned.params)


def gradients_are_the_formula_s(case):
    params = moved(case.attached().params)
    node, bias = case.weight(params)
    values = {f"{depth}@{part}": getattr(n, part) for depth, n in enumerate(_nest(node)) for part in n.trainable}

    def placed(values):
        out = node
        for name, value in values.items():
            depth, part = name.split("@")
            out = _replaced(out, int(depth), part, value)
        return out

    def ours(values):
        return case.run({**params, **case.with_weight(placed(values), bias)})

    def theirs(values):
        return case.run(case.with_weight(*formula(placed(values), bias)))

    @jax.jit
    def both(values):
        out = ours(values), theirs(values)
        weight = jnp.cos(jnp.arange(out[0].size, dtype=jnp.float32)).reshape(out[0].shape)
        return out, [jax.grad(lambda v, f=f: jnp.vdot(f(v), weight))(values) for f in (ours, theirs)]

    (got, want), gradients = both(values)
    zoo.assert_close(got, want)
    zoo.assert_gradients_close(*gradients)


def _nest(node):
    return [node, *_nest(node.base)] if isinstance(node, Adapter) else []


def _replaced(node, depth, part, value):
    if depth == 0:
        return dataclasses.replace(node, **{part: value})
    return dataclasses.replace(node, base=_replaced(node.base, depth - 1, part, value))


LAWS = [unchanged_at_the_start, merged_is_factored_and_unmerge_is_exact, gradients_are_the_formula_s]


@pytest.mark.parametrize("law", LAWS)
@FEW
@given(case=cases())
def test_of_a_weight(law, case):
    law(case)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@ANY
@given(case=cases(depth=3, any_shape=True))
def test_of_a_weight_of_any_shape(law, case):
    law(case)


# The same of a whole model: scanned, trained, saved, on meshes.


def logits(source, params):
    return jax.jit(lambda p: apply(source.model, p, toy_batch())["logits"])(params)


@settings(max_examples=4)
@given(adapted_toys())
def test_scanned_is_unrolled_and_merged_is_factored(toys):
    _, source = toys
    want = logits(source, source.params)
    laid = stack(source.params, layout_of(source.model, source.params))
    assert any(":" in path and "@" in path for path in flatten(laid))
    zoo.assert_close(logits(source, laid), want)
    assert tiny.same_bits(unstack(laid), source.params)
    zoo.assert_close(logits(source, at.merge(source, dequantize=True).params), want)


def started(source, mesh=None, rules=()):
    labels = groups.labels_of(source.model, groups.adapters(source.model), source.params)
    tx = tiny.transform(labels, tiny.PLAIN)
    key = jax.random.key(5)
    state, frozen = init_state(source.model, source.params, labels, tx, key, mesh=mesh, sharding=rules)
    return state, frozen, make_step(source.model, squares, tx, mesh=mesh, sharding=rules, donate=False)


@settings(max_examples=3)
@given(adapted_toys())
def test_training_leaves_the_base_and_inner_adapters_as_they_are_and_is_saved(toys):
    base, source = toys
    state, frozen, step = started(source)
    before = flatten(params_of(state, frozen))
    for _ in range(2):
        state, _ = step(state, frozen, toy_batch())
    after = flatten(params_of(state, frozen))
    still = {path for path in before if not re.fullmatch(r"[^@]+@(a|b|d|magnitude|gain)|head/[^@]+", path)}
    assert tiny.same_bits({p: after[p] for p in still}, {p: before[p] for p in still})
    assert set(before) - still == {p for p, label in flatten(_labels(source)).items() if label != "frozen"}
    assert all(not jnp.array_equal(after[p], before[p]) for p in set(before) - still)
    for path, leaf in flatten(base.params).items():  # what was adapted, bit for bit, however deep it lies now
        same = any(tiny.bits(after[p]) == tiny.bits(leaf) for p in after if p.replace("@base", "") == path)
        assert same or path in set(before) - still
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(f"{folder}/one", state, frozen, source.lineage)
        written = {n for n, leaf in checkpoint.metadata(path)["leaves"].items() if leaf["written"]}
        assert not written & {f"frozen/{p}" for p in flatten(frozen) if p.endswith(("@q", "@codes"))}
        fresh, rest, _ = started(source)
        got, kept, _ = checkpoint.restore(path, like=(fresh, rest), lineage=source.lineage)
    assert tiny.same_bits(got, state) and tiny.same_bits(kept, frozen)


def _labels(source):
    return groups.labels_of(source.model, groups.adapters(source.model), source.params)


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4), (2, 4, 1)]


@st.composite
def placed_toys(draw):
    """The tiny model, a mesh, and rules that split its weights at random, wherever a weight divides."""
    _, source = draw(adapted_toys())
    data, fsdp, tensor = draw(st.sampled_from(MESHES))
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    nodes = flatten(source.params, is_leaf=is_weight)
    rules: list = []
    alike: dict = {}  # layers of one kind may be one array, and are then split alike
    for leaf in LEAVES:
        if (name := leaf.split("/", 2)[-1]) in alike and leaf.startswith("blocks"):
            rules.append((leaf, alike[name]))
            continue
        node = next(x for path, x in nodes.items() if re.fullmatch(leaf, path))
        spec = [None] * len(node.shape)
        any_packed = any(_packed(x) for path, x in nodes.items() if path.endswith(name))
        for axis in draw(st.permutations(("fsdp", "tensor"))):
            blocks = [size // 64 if any_packed else size for size in node.shape]
            fits = [i for i, size in enumerate(blocks) if spec[i] is None and size and size % mesh.shape[axis] == 0]
            where = draw(st.sampled_from([None, *fits]))
            if where is not None:
                spec[where] = axis
        alike[name] = P(*spec)
        rules.append((leaf, alike[name]))
    return source, mesh, rules


def _packed(node):
    return isinstance(node, NF4) or (hasattr(node, "base") and _packed(node.base))


def test_a_mesh_gives_the_gradients_of_one_device(devices):
    settings(max_examples=4)(given(placed_toys())(a_mesh_is_one_device))()


@pytest.mark.slow
def test_any_mesh_gives_the_gradients_of_one_device(devices):
    settings(max_examples=30)(given(placed_toys())(a_mesh_is_one_device))()


def a_mesh_is_one_device(case):
    source, mesh, rules = case
    found = []
    for how in ((), (mesh, rules)):
        state, frozen, step = started(source, *how)
        after, metrics = step(state, frozen, toy_batch())
        found.append((tiny.gradients(state, after), float(metrics["loss"])))
    # Adapters at random over one another make gradients of a thousand out of terms that cancel: 3 and not 1e-5.
    assert tiny.apart(found[1][0], found[0][0]) <= 3e-5
    assert abs(found[1][1] / found[0][1] - 1) < 1e-5
    # What is split divides, and has no more axes than its array.
    for path, leaf in (*flatten(state.params).items(), *flatten(frozen).items()):
        spec = leaf.sharding.spec
        assert len(spec) <= leaf.ndim, path
        for size, axes in zip(leaf.shape, spec, strict=False):
            assert size % math.prod(mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes or ())) == 0, path
