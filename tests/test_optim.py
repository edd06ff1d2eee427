import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtransfer.adapt import groups
from jaxtransfer.adapt.attaching import attach, lora
from jaxtransfer.adapt.quantized import quantize
from jaxtransfer.optim import NO_DECAY, OPTIMIZERS, Group, GroupError, explain, optimizer, schedule
from jaxtransfer.step import init_state
from jaxtransfer.tree import RuleError, flatten, layout, map_with_path, partition, stack, unstack
from tests import tiny


def tree(seed, scale=1.0):
    """Five layers of two matrices, a bias and a scale, between an embedding and a head, unlike in size."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape) * scale * rng.uniform(0.2, 3.0), jnp.float32)

    layer = {"kernel": (4, 6), "wide": (128, 129), "bias": (6,), "scale": (6,)}  # adafactor factors from 128 on
    blocks = {str(i): {name: leaf(*shape) for name, shape in layer.items()} for i in range(5)}
    return {"embed": {"table": leaf(9, 4)}, "blocks": blocks, "head": {"kernel": leaf(6, 3), "bias": leaf(3)}}


def labels_of(params, frozen=()):
    def label(path, _):
        if any(path.startswith(start) for start in frozen):
            return "frozen"
        return "head" if path.startswith("head") else "trunk"

    return map_with_path(label, params)


def train(tx, params, labels, *, stacked, steps=3):
    """The trainable partition after some steps along made-up gradients, by canonical path."""
    table = layout(params, labels)
    by_path = flatten(labels)

    def arranged(tree):
        selected, _ = partition(tree, lambda path: by_path[path] != "frozen")
        return stack(selected, table) if stacked else selected

    trained = arranged(params)
    state = jax.jit(tx.init)(trained)

    @jax.jit
    def step(trained, state, grads):
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    for i in range(steps):
        trained, state = step(trained, state, arranged(tree(100 + i, scale=0.1)))
    return flatten(unstack(trained))


def by_hand(params, frozen, rule, steps=3):
    """The same with ``rule(path, parameter, gradient, step) -> parameter`` on each leaf alone."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    flat = {path: leaf for path, leaf in flat.items() if not path.startswith(frozen)}
    for i in range(steps):
        grads = {path: np.asarray(g, np.float64) for path, g in flatten(tree(100 + i, scale=0.1)).items()}
        flat = {path: rule(path, leaf, grads, i) for path, leaf in flat.items()}
    return flat


def worst(found, wanted):
    assert found.keys() == wanted.keys()
    return max(np.abs(found[path] - wanted[path]).max() / np.abs(wanted[path]).max() for path in wanted)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_gives_the_same_update_stacked_and_per_layer(name):
    params = tree(0)
    labels = labels_of(params, frozen=("blocks/0/", "blocks/1/"))  # cut: two frozen layers, a stack of three
    made = Group(name, lr=1e-2, weight_decay=0.1, schedule="linear", warmup=1, steps=9)
    scales = {path: 0.5 + 0.1 * i for i, path in enumerate(flatten(params))}
    tx = optimizer(labels, {"trunk": made, "head": made}, clip=0.9, scales=scales)
    apiece = train(tx, params, labels, stacked=False)
    assert worst(train(tx, params, labels, stacked=True), apiece) < 2e-6
    moved = {path: np.abs(np.asarray(leaf - flatten(params)[path])).max() for path, leaf in apiece.items()}
    assert min(moved.values()) > 0


def test_optimizers_that_are_not_elementwise_would_differ_if_they_saw_the_stack():
    params = tree(0)
    labels = labels_of(params)

    def update(make, stacked):
        trained = stack(params, layout(params)) if stacked else params
        grads = tree(1)
        grads = stack(grads, layout(grads)) if stacked else grads
        group = Group(lr=1e-2, weight_decay=0.0)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            tx = make(group, schedule(group), lambda tree: jax.tree.map(lambda _: True, tree))
            updates, _ = jax.jit(tx.update)(grads, tx.init(trained), trained)
        return {path: np.asarray(leaf) for path, leaf in flatten(unstack(updates)).items()}

    assert set(flatten(labels).values()) == {"trunk", "head"}
    for name, (make, elementwise) in OPTIMIZERS.items():
        difference = worst(update(make, True), update(make, False))
        assert (difference < 1e-6) == elementwise, (name, difference)


def test_clipping_is_by_the_norm_of_what_trains():
    params, frozen, lr = tree(0), ("blocks/0/", "blocks/1/", "embed"), 0.1

    def rule(path, p, grads, step):
        norm = np.sqrt(sum((g * g).sum() for name, g in grads.items() if not name.startswith(frozen)))
        return p - lr * grads[path] * min(1.0, 0.3 / norm)

    group = Group("sgd", lr=lr, weight_decay=0.0, momentum=0.0)
    labels = labels_of(params, frozen)
    tx = optimizer(labels, {"trunk": group, "head": group}, clip=0.3)
    assert worst(train(tx, params, labels, stacked=True), by_hand(params, frozen, rule)) < 1e-6


def test_a_norm_that_is_known_is_not_computed_again():
    grads = {"a": {"kernel": jnp.full(4, 3.0)}}  # of norm 6
    group = Group("sgd", lr=1.0, weight_decay=0.0, momentum=0.0)
    tx = optimizer({"a": {"kernel": "all"}}, {"all": group}, clip=2.0)
    for norm, wanted in ((None, -1.0), (jnp.float32(12.0), -0.5), (jnp.float32(1.0), -3.0)):
        updates, _ = tx.update(grads, tx.init(grads), grads, norm=norm)
        assert np.allclose(updates["a"]["kernel"], wanted)


@pytest.mark.parametrize(
    ("rules", "spared"),
    [(NO_DECAY, ("bias", "scale")), ([("head/.*", False), (".*", True)], ("head/kernel", "head/bias"))],
    ids=["default", "custom"],
)
def test_weight_decay_spares_what_the_rules_say(rules, spared):
    params, lr, rate = tree(0), 0.1, 0.2
    group = Group("sgd", lr=lr, weight_decay=rate, momentum=0.0)
    labels = labels_of(params)
    tx = optimizer(labels, {"trunk": group, "head": group}, no_decay=rules)

    def rule(path, p, grads, step):
        return p - lr * (grads[path] + (0.0 if path.endswith(spared) else rate) * p)

    assert worst(train(tx, params, labels, stacked=True), by_hand(params, ("none",), rule)) < 1e-6


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "lamb", "muon"])
def test_weight_decay_is_in_units_of_the_learning_rate(name):
    params = {"a": {"kernel": jnp.full((4, 4), 2.0)}}
    moved = []
    for rate in (0.0, 0.5):
        labels = {"a": {"kernel": "all"}}
        tx = optimizer(labels, {"all": Group(name, lr=1e-3, weight_decay=rate)})
        grads = jax.tree.map(jnp.ones_like, params)
        moved.append(np.asarray(jax.jit(tx.update)(grads, tx.init(params), params)[0]["a"]["kernel"]))
    if name == "lamb":  # the whole update, decay included, has the norm of the parameters
        assert np.allclose(np.linalg.norm(moved[1]), 1e-3 * 8.0, rtol=1e-5)
    else:
        assert np.allclose(moved[1] - moved[0], -1e-3 * 0.5 * 2.0, rtol=1e-3)


def test_layerwise_decay_scales_a_stack_as_it_scales_its_layers():
    src = tiny.source()
    scales = groups.layerwise_decay(src.model, src.params, 0.7)
    labels = tiny.labels_of(src, groups.full(src.model))
    grads = jax.tree.map(jnp.ones_like, src.params)
    tx = tiny.transform(labels, tiny.PLAIN, scales=scales)
    laid = stack(grads, layout(grads, labels))
    updates, _ = jax.jit(tx.update)(laid, tx.init(laid), laid)
    for path, update in flatten(unstack(updates)).items():
        assert np.allclose(update, -scales[path], rtol=1e-6), path


def test_schedules_by_group():
    warm = schedule(Group(lr=2.0, schedule="cosine", warmup=2, steps=10))
    rates = [float(warm(i)) for i in range(12)]
    wanted = [0.0, 1.0, *(1.0 + np.cos(np.pi * i / 8) for i in range(9)), 0.0]
    assert np.allclose(rates, wanted, atol=1e-6)
    assert [float(schedule(Group(lr=3.0, warmup=2))(i)) for i in (0, 1, 2, 99)] == [0.0, 1.5, 3.0, 3.0]
    params = {"a": {"kernel": jnp.ones(1)}, "b": {"kernel": jnp.ones(1)}}
    plain = {"optimizer": "sgd", "weight_decay": 0.0, "momentum": 0.0}
    slow, fast = Group(lr=1.0, schedule="linear", warmup=1, steps=3, **plain), Group(lr=8.0, **plain)
    tx = optimizer({"a": {"kernel": "slow"}, "b": {"kernel": "fast"}}, {"slow": slow, "fast": fast})
    state, seen = tx.init(params), []
    for _ in range(4):
        updates, state = tx.update(params, state, params)
        seen.append((-updates["a"]["kernel"][0], -updates["b"]["kernel"][0]))
    assert np.allclose(seen, [(0.0, 8.0), (1.0, 8.0), (0.5, 8.0), (0.0, 8.0)])


LABELS = {"a": {"kernel": "trunk"}, "b": {"kernel": "frozen"}, "c": {"mean": "stats"}}


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ({}, "label 'trunk' .of a/kernel and others. has no optimizer group; there are .."),
        ({"trunk": Group(), "idle": Group()}, r"optimizer group 'idle' has no parameters; .* \['trunk'\]"),
        ({"trunk": Group(), "frozen": Group()}, "optimizer group 'frozen' has no parameters"),
        ({"trunk": Group("adam")}, "group 'trunk': optimizer 'adam' is not one of adamw, sgd"),
        ({"trunk": Group(schedule="step")}, "schedule 'step' is not one of constant, linear, cosine"),
        ({"trunk": Group(schedule="cosine")}, "a cosine schedule needs steps > warmup, got None and 0"),
        ({"trunk": Group(schedule="linear", warmup=5, steps=5)}, "needs steps > warmup, got 5 and 5"),
    ],
)
def test_what_does_not_fit_is_refused(used, message):
    with pytest.raises(GroupError, match=message):
        optimizer(LABELS, used)
    with pytest.raises(GroupError, match=message):
        explain({"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}, "c": {"mean": jnp.ones(2)}}, LABELS, used)


def test_rules_and_scales_must_cover_what_trains():
    with pytest.raises(RuleError, match="no rule covers 1 of 1 leaves: a/kernel"):
        optimizer(LABELS, {"trunk": Group()}, no_decay=[("b/.*", False, True)])
    with pytest.raises(GroupError, match="no factor for a/kernel"):
        optimizer(LABELS, {"trunk": Group()}, scales={"b/kernel": 1.0})


@pytest.mark.parametrize("how", ["int8", "nf4"])
@pytest.mark.parametrize("adapted", [False, True])
def test_explain_counts_the_numbers_that_packed_weights_stand_for(how, adapted):
    kernels = r"blocks/\d+/mlp/\w+/kernel"
    src = tiny.source(hidden_size=64, intermediate_size=128)
    packed = quantize(src, [(kernels, how)])
    if adapted:
        src, packed = (attach(of, [(kernels, lora(2))], jax.random.key(0)) for of in (src, packed))

    def frozen(of, rules, used):
        labels = tiny.labels_of(of, rules(src.model))
        return {row.group: row for row in explain(of.params, labels, dict.fromkeys(used, Group()))}["frozen"]

    how = (groups.adapters, ["adapter", "head"]) if adapted else (groups.head_only, ["head"])
    whole, found = frozen(src, *how), frozen(packed, *how)
    assert found.parameters == whole.parameters
    assert found.bytes < whole.bytes
    assert found.leaves > whole.leaves


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_explain_counts_what_is_there(name):
    src = tiny.source()
    half = {root: jax.tree.map(_half, src.params[root]) for root in ("embed", "pooler")}
    params = src.params | half  # one frozen, one kept in float32 to train
    labels = tiny.labels_of(src, groups.last(src.model, 2))
    used = {"trunk": Group(name, lr=1e-3), "head": Group("sgd", lr=0.5, momentum=0.0)}
    rows = {row.group: row for row in explain(params, labels, used)}
    state, frozen = init_state(src.model, params, labels, optimizer(labels, used, clip=1.0), jax.random.key(0))
    assert list(rows) == ["trunk", "head", "frozen"]
    by_path = flatten(labels)
    for group, row in rows.items():
        leaves = [leaf for path, leaf in flatten(params).items() if by_path[path] == group]
        assert (row.leaves, row.parameters) == (len(leaves), sum(leaf.size for leaf in leaves))
        assert row.bytes == sum(leaf.nbytes for leaf in leaves)
    assert rows["frozen"].bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    assert rows["frozen"].dtype == "bfloat16/float32"
    assert (rows["frozen"].lr, rows["frozen"].optimizer, rows["frozen"].optimizer_bytes) == (None, None, 0)
    assert (rows["trunk"].lr, rows["trunk"].optimizer, rows["head"].lr) == (1e-3, name, 0.5)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert rows["trunk"].optimizer_bytes + rows["head"].optimizer_bytes == held
    if name == "adamw":
        assert rows["trunk"].optimizer_bytes == 2 * 4 * rows["trunk"].parameters + 2 * 4  # two moments, two counters


def _half(x):
    return x.astype(jnp.bfloat16)
