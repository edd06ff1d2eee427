"""A user's own model, in each of the four notations: same outputs, fine-tuned with nothing from the zoo."""

import functools
import gc
import typing
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxtransfer.adapt import heads
from jaxtransfer.adapt.groups import labels_of
from jaxtransfer.models.api import abstract_init, apply, init, run_span
from jaxtransfer.models.foreign import (
    ForeignError,
    from_equinox,
    from_function,
    from_linen,
    from_nnx,
    head_stage,
)
from jaxtransfer.objectives.losses import cross_entropy
from jaxtransfer.optim import Group, optimizer
from jaxtransfer.step import init_state, make_step, params_of
from jaxtransfer.tree import TreeError, digest, fingerprint, flatten, layout, map_with_path, stack
from jaxtransfer.types import Head

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
BATCH = {"inputs": X, "labels": np.array([0, 1, 2, 0, 1, 2]), "weight": np.ones(6, np.float32)}
KEY = jax.random.key(7)


class NnxBody(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, depth: int = 2, rate: float = 0.5):
        self.layers = nnx.List([nnx.Linear(4 if i == 0 else 8, 8, rngs=rngs) for i in range(depth)])
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.drop(self.norm(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rate: float = 0.5):
        self.linear, self.drop = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.drop(jnp.tanh(self.linear(x)))


class LinenBody(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(2):
            x = jnp.tanh(linen.Dense(8, name=f"layers_{i}")(x))
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return linen.Dropout(0.5, deterministic=not train)(x)


class EquinoxBody(eqx.Module):
    layers: list
    drop: eqx.nn.Dropout
    order: jax.Array  # an integer buffer: constant, no parameter

    def __init__(self, key: jax.Array):
        first, second = jax.random.split(key)
        self.layers = [eqx.nn.Linear(4, 8, key=first), eqx.nn.Linear(8, 8, key=second)]
        self.drop, self.order = eqx.nn.Dropout(0.5), jnp.arange(8)[::-1]

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.drop(x[self.order], key=key)


class Pair(typing.NamedTuple):
    w: jax.Array
    b: jax.Array


def dense(p: Pair, x: jax.Array) -> jax.Array:
    return x @ p.w + p.b[None]


def function_body(params: list[Pair], x: jax.Array, key: jax.Array | None) -> jax.Array:
    for p in params:
        x = jnp.tanh(dense(p, x))
    return x if key is None else jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0.0)


def make_nnx():
    body, head = NnxBody(nnx.Rngs(0)), nnx.Linear(8, 5, rngs=nnx.Rngs(1))
    body.norm.mean.set_value(jnp.linspace(-0.1, 0.1, 8))

    def own(x):
        body.eval()
        return head(body(x))

    return from_nnx({"body": body, "head": head}), own


def make_linen():
    body, head = LinenBody(), linen.Dense(5)
    below = body.init(jax.random.key(0), X)
    below = {**below, "batch_stats": jax.tree.map(lambda x: x + 0.1, below["batch_stats"])}
    above = head.init(jax.random.key(1), jnp.zeros((1, 8)))
    source = from_linen({"body": (body, below), "head": (head, above)}, train_kwarg="train")
    return source, lambda x: head.apply(above, body.apply(below, x))


def make_equinox():
    body, head = EquinoxBody(jax.random.key(0)), eqx.nn.Linear(8, 5, key=jax.random.key(1))
    still = eqx.nn.inference_mode(body)
    return from_equinox({"body": body, "head": head}), jax.vmap(lambda x: head(still(x)))


def make_function():
    rng = np.random.default_rng(1)
    pairs = [Pair(rng.normal(size=s).astype(np.float32), np.zeros(s[1], np.float32)) for s in [(4, 8), (8, 8), (8, 5)]]
    source = from_function({"body": function_body, "head": dense}, {"body": pairs[:2], "head": pairs[2]})
    return source, lambda x: dense(pairs[2], function_body(pairs[:2], x, None))


MAKE = {"nnx": make_nnx, "linen": make_linen, "equinox": make_equinox, "function": make_function}
FIRST = {"nnx": "body/layers_0/", "linen": "body/layers_0/", "equinox": "body/layers_0/", "function": "body/_0/"}


@functools.cache
def made(name):
    """The source and the user's own evaluation function; built once, for tests that change neither."""
    return MAKE[name]()


notation = pytest.mark.parametrize("name", list(MAKE))


def train(source, rules, steps=6, batch=BATCH, **kwargs):
    labels = labels_of(source.model, rules, source.params)
    groups = {label: Group(lr=0.05) for label in set(flatten(labels).values()) - {"frozen", "stats"}}
    tx = optimizer(labels, groups)
    state, frozen = init_state(source.model, source.params, labels, tx, KEY)
    step, losses = make_step(source.model, cross_entropy(), tx, **kwargs), []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return flatten(params_of(state, frozen)), losses


@notation
def test_outputs_are_those_of_the_users_own_model(name):
    source, own = made(name)
    expected = own(jnp.asarray(X))
    for run in (apply, jax.jit(apply, static_argnums=0)):
        out = run(source.model, source.params, {"inputs": X})
        assert set(out) == {"last_hidden_state", "logits"}
        np.testing.assert_allclose(out["logits"], expected, atol=1e-6)


@notation
def test_cut_anywhere(name):
    source, own = made(name)
    middle = run_span(source.model, source.params, {"inputs": jnp.asarray(X)}, None, "body")
    end = run_span(source.model, source.params, middle, "body", None)
    np.testing.assert_allclose(end["logits"], own(jnp.asarray(X)), atol=1e-6)


def test_paths():
    norm = ["body/norm/bias", "body/norm/mean", "body/norm/scale", "body/norm/var"]
    layers = [f"body/layers_{i}/{leaf}" for i in range(2) for leaf in ("bias", "kernel")]
    linear, weight = ["head/bias", "head/kernel"], ["head/bias", "head/weight"]
    expected = {
        "nnx": [*layers, *norm, *linear],
        "linen": [*[path.replace("norm", "BatchNorm_0") for path in norm], *layers, *linear],
        "equinox": [path.replace("kernel", "weight") for path in layers] + weight,
        "function": ["body/_0/b", "body/_0/w", "body/_1/b", "body/_1/w", "head/b", "head/w"],
    }
    sources = {name: made(name)[0] for name in MAKE}
    assert {name: list(flatten(source.params)) for name, source in sources.items()} == expected
    assert sources["nnx"].model.stats == ("body/norm/mean", "body/norm/var")
    assert sources["linen"].model.stats == (r"body/BatchNorm_0/mean", r"body/BatchNorm_0/var")
    assert sources["equinox"].model.stats == sources["function"].model.stats == ()


@notation
def test_lineage(name):
    source = made(name)[0]
    assert source.model.family == "foreign" and source.lineage.ref == "memory"
    assert source.lineage.digest == digest(source.params) == MAKE[name]()[0].lineage.digest
    assert source.lineage.fingerprints == fingerprint(source.params)


@notation
def test_fine_tune_with_a_frozen_part_and_a_swapped_head(name):
    source, own = made(name)
    before = own(jnp.asarray(X))
    swapped = heads.swap_head(source, heads.classifier(["a", "b", "c"], width=8), jax.random.key(3))
    start = flatten(jax.tree.map(np.asarray, swapped.params))
    assert start["head/out/kernel"].shape == (8, 3) and "head/kernel" not in start
    end, losses = train(swapped, [(f"{FIRST[name]}.*", "frozen"), (".*", "train")], steps=12)
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:2])
    assert end.keys() == start.keys()
    for path in start:
        same = np.array_equal(start[path], end[path])
        assert same == (path.startswith(FIRST[name])), path
    # Nothing was taken from the user's own model: it still computes what it computed.
    np.testing.assert_array_equal(own(jnp.asarray(X)), before)


def own_update_nnx():
    body = NnxBody(nnx.Rngs(0), rate=0.0)
    source = from_nnx(body)
    body.train()
    body(jnp.asarray(X))
    return source, {"norm/mean": body.norm.mean.get_value(), "norm/var": body.norm.var.get_value()}


def own_update_linen():
    body = LinenBody()
    variables = body.init(jax.random.key(0), X)
    rngs = {"dropout": jax.random.key(1)}
    _, new = body.apply(variables, X, train=True, rngs=rngs, mutable=["batch_stats"])
    return from_linen(body, variables, train_kwarg="train"), flatten(new["batch_stats"])


@pytest.mark.parametrize("make", [own_update_nnx, own_update_linen])
def test_running_statistics(make):
    source, expected = make()
    assert len(expected) == 2
    before = flatten(source.params)
    out = apply(source.model, source.params, {"inputs": X}, train=True, key=KEY)
    assert set(flatten(out["stats"])) == {f"body/{path}" for path in expected}
    assert "stats" not in apply(source.model, source.params, {"inputs": X})
    swapped = heads.swap_head(source, heads.classifier(3, width=8), jax.random.key(3))
    trained, _ = train(swapped, [(".*", "train")], steps=1)
    frozen, _ = train(swapped, [("head/.*", "train"), (".*", "frozen")], steps=2)
    for path, value in expected.items():
        path = f"body/{path}"
        assert not np.array_equal(value, before[path])
        np.testing.assert_allclose(flatten(out["stats"])[path], value, rtol=1e-6)
        np.testing.assert_allclose(trained[path], value, rtol=1e-6)
        np.testing.assert_array_equal(frozen[path], before[path])


@notation
def test_dropout_is_a_function_of_the_key(name):
    source = made(name)[0]

    @jax.jit
    def hidden(key):
        return apply(source.model, source.params, {"inputs": X}, train=True, key=key)["last_hidden_state"]

    first, again, other = hidden(jax.random.key(1)), hidden(jax.random.key(1)), hidden(jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    assert 0.2 < np.mean(first == 0) < 0.8
    assert not np.array_equal(first == 0, other == 0)
    assert len({tuple(row) for row in np.asarray(first == 0).tolist()}) > 1, "each example has a mask of its own"
    assert not np.any(apply(source.model, source.params, {"inputs": X})["last_hidden_state"] == 0)


def test_nnx_streams_draw_their_own_masks():
    class Two(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.a, self.b = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.stack([self.a(x), self.b(x)])

    fresh, used = Two(nnx.Rngs(0)), Two(nnx.Rngs(1))
    used(jnp.ones((6, 4)))
    first, second = (
        run_span(from_nnx(module).model, {}, {"inputs": jnp.ones((6, 4))}, None, None, train=True, key=KEY)["hidden"]
        for module in (fresh, used)
    )
    assert not np.array_equal(*np.asarray(first))
    np.testing.assert_array_equal(first, second)


def test_nnx_layers_stacked_by_vmap():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> NnxBlock:
        return NnxBlock(rngs)

    class Tower(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.blocks = make(rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.vmap(lambda block, x: block.drop(x), in_axes=(0, None), out_axes=0)(self.blocks, x)

    source = from_nnx(Tower(nnx.Rngs(0)))
    assert source.params["body"]["blocks"]["linear"]["kernel"].shape == (3, 4, 4)
    out = apply(source.model, source.params, {"inputs": jnp.ones((6, 4))}, train=True, key=KEY)["last_hidden_state"]
    assert len({layer.tobytes() for layer in np.asarray(out)}) == 3


@notation
def test_the_stages_do_not_keep_the_users_arrays(name):
    source = MAKE[name]()[0]
    model, arrays = source.model, [weakref.ref(leaf) for leaf in jax.tree.leaves(source.params)]
    del source
    gc.collect()
    assert model.stages and not [ref().shape for ref in arrays if ref() is not None]


def test_twelve_nnx_layers_are_bound_by_name():
    body = NnxBody(nnx.Rngs(0), depth=12)
    source = from_nnx(body)
    body.eval()
    np.testing.assert_allclose(
        apply(source.model, source.params, {"inputs": X})["last_hidden_state"], body(jnp.asarray(X)), atol=1e-6
    )


def blocks(rates=(0.5, 0.5, 0.5)):
    stem = nnx.Linear(4, 4, rngs=nnx.Rngs(9))
    return from_nnx({"stem": stem, **{f"blocks/{i}": NnxBlock(nnx.Rngs(i), rate) for i, rate in enumerate(rates)}})


def test_numbered_stages_are_scanned_with_the_same_masks():
    source = blocks()
    laid = stack(source.params, layout(source.params))
    assert list(laid["blocks"]) == ["0:3"]
    run = jax.jit(apply, static_argnums=0, static_argnames="train")
    for kwargs in ({}, {"train": True, "key": KEY}):
        unrolled, scanned = (run(source.model, p, {"inputs": X}, **kwargs) for p in (source.params, laid))
        np.testing.assert_allclose(unrolled["last_hidden_state"], scanned["last_hidden_state"], atol=1e-6)
    swapped = heads.swap_head(source, heads.classifier(3, width=4), jax.random.key(3))
    end, _ = train(swapped, [("blocks/0/.*|stem/.*", "frozen"), (".*", "train")])
    assert np.array_equal(end["blocks/0/linear/kernel"], source.params["blocks"]["0"]["linear"]["kernel"])
    assert not np.array_equal(end["blocks/1/linear/kernel"], source.params["blocks"]["1"]["linear"]["kernel"])


def test_numbered_stages_that_differ_in_settings_are_refused():
    with pytest.raises(ForeignError, match="blocks/0 and blocks/2 have like parameters but differ"):
        blocks(rates=(0.5, 0.5, 0.1))
    layers = {f"blocks/{i}": eqx.nn.Linear(4, 4, key=jax.random.key(i)) for i in range(2)}
    with pytest.raises(ForeignError, match=r"blocks/0 and blocks/1 .* in what they read"):
        from_equinox(layers)


@notation
def test_a_list_inside_a_stage_is_not_stacked(name):
    params = made(name)[0].params
    assert layout(params) == {}


def test_several_inputs_and_another_output():
    def scored(p, x, mask):
        return x * p["w"][None] - mask

    source = from_function(scored, {"w": jnp.ones(4)}, input=("x", "mask"), output="score")
    out = apply(source.model, source.params, {"x": X, "mask": 3 * X})
    assert list(out) == ["score"]
    np.testing.assert_allclose(out["score"], -2 * X, rtol=1e-6)


def test_an_equinox_module_may_take_the_whole_batch():
    source = from_equinox(eqx.nn.Lambda(lambda x: x - x.mean(0, keepdims=True)), vmap=False)
    np.testing.assert_allclose(apply(source.model, {}, {"inputs": X})["last_hidden_state"], X - X.mean(0), atol=1e-6)


def test_evaluation_flag_of_linen():
    class Body(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
            return linen.Dropout(0.5, rng_collection="noise")(linen.Dense(4)(x), deterministic=deterministic)

    source = from_linen(Body(), Body().init(KEY, X), eval_kwarg="deterministic", rngs=("noise",))
    still = apply(source.model, source.params, {"inputs": X})["last_hidden_state"]
    noisy = apply(source.model, source.params, {"inputs": X}, train=True, key=KEY)["last_hidden_state"]
    assert np.all(still != 0) and np.any(noisy == 0)


INITS = {
    "nnx": lambda i: from_nnx(NnxBody(nnx.Rngs(0)), init=i and (lambda key: NnxBody(nnx.Rngs(key)))),
    "linen": lambda i: from_linen(
        LinenBody(), LinenBody().init(KEY, X), train_kwarg="train", init=i and (lambda key: LinenBody().init(key, X))
    ),
    "equinox": lambda i: from_equinox(EquinoxBody(KEY), init=i and EquinoxBody),
    "function": lambda i: from_function(
        lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}, init=i and (lambda key: {"w": jax.random.normal(key, (4, 2))})
    ),
}


@notation
def test_from_scratch(name):
    with pytest.raises(ForeignError, match=r"stage body: a foreign model has no initialiser; pass init="):
        init(INITS[name](None).model, KEY)
    source = INITS[name](True)
    fresh = init(source.model, KEY)
    assert flatten(fresh).keys() == flatten(source.params).keys()
    moved = [path for path, leaf in flatten(fresh).items() if not np.array_equal(leaf, flatten(source.params)[path])]
    assert any("kernel" in path or "w" in path for path in moved)
    assert jax.tree.map(jnp.shape, abstract_init(source.model)) == jax.tree.map(jnp.shape, fresh)


def test_init_of_another_shape_or_stage_is_refused():
    wrong = from_function(lambda p, x: x, {"w": jnp.ones(3)}, init=lambda key: {"w": jnp.ones(4)})
    with pytest.raises(TreeError, match=r"init of stage body: shape of w: expected \(3,\), found \(4,\)"):
        init(wrong.model, KEY)
    fns = {"a": lambda p, x: x, "b": lambda p, x: x}
    with pytest.raises(ForeignError, match="init must be a mapping"):
        from_function(fns, {"a": {}, "b": {}}, init=lambda key: {})
    with pytest.raises(ForeignError, match=r"no stage is called \['c'\]"):
        from_function(fns, {"a": {}, "b": {}}, init={"c": lambda key: {}})


@notation
def test_parameters_are_bound_by_name_with_every_shape_checked(name):
    source = made(name)[0]
    path = next(iter(flatten(source.params["body"])))
    grown = map_with_path(lambda p, x: jnp.zeros((3, 3, 3)) if p == f"body/{path}" else x, source.params)
    with pytest.raises(TreeError, match=f"parameters of stage body: shape of {path}: .*3, 3, 3"):
        apply(source.model, grown, {"inputs": X})
    with pytest.raises(TreeError, match=r"parameters of stage head: missing: .*; extra: other"):
        apply(source.model, {**source.params, "head": {"other": jnp.ones(3)}}, {"inputs": X})


class Counter(nnx.Variable):
    pass


class Counting(nnx.Module):
    def __init__(self):
        self.seen = Counter(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.seen[...] = self.seen[...] + 1.0
        return x


def norm_equinox():
    return eqx.nn.Sequential([eqx.nn.BatchNorm(4, "batch", mode="batch")])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_nnx(jnp.tanh), "stage body: expected an nnx.Module, found"),
        (lambda: from_nnx({}), "a model needs at least one stage"),
        (lambda: from_nnx({"0": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}), "a stage is called like .*, not '0'"),
        (lambda: from_nnx({"a/1/b": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}), "a stage is called like .*, not 'a/1/b'"),
        (lambda: from_linen(linen.Dense(2)), "expected a linen.Module and its variables"),
        (lambda: from_linen(LinenBody(), {"params": {}}), "__call__ takes 'train': pass train_kwarg='train'"),
        (lambda: from_linen(linen.Dropout(0.5), {"params": {}}), "pass eval_kwarg='deterministic'"),
        (lambda: from_linen(linen.Dense(2), {"params": {}}, train_kwarg="train"), "no stage's __call__ takes 'train'"),
        (lambda: from_equinox(norm_equinox()), r"stage body: \.layers\[0\].* keeps eqx.nn.State.*use GroupNorm"),
        (lambda: from_function(dense, {"scale": 1.0}), "stage body: scale is a float, expected an array"),
        (lambda: from_function(dense, jnp.ones(2)), "needs another name than ''"),
        (lambda: from_function(dense, {"a@b": jnp.ones(2)}), "needs another name than 'a@b'"),
        (lambda: from_function(dense, {"0:2": jnp.ones(2)}), "needs another name than '0:2'"),
        (lambda: from_function(dense, {"a": [jnp.ones(2)], "a_0": jnp.ones(2)}), "two parameters would be called a_0"),
        (lambda: from_function({"a": dense}, {"b": {}}), r"one tree for each of the stages \['a'\]"),
    ],
)
def test_what_cannot_join_is_refused(make, message):
    with pytest.raises(ForeignError, match=message):
        make()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: from_function(dense, {}, input="pixels"), r"stage body reads \['pixels'\], there is \['inputs'\]"),
        (lambda: from_function(lambda p, x: (x, x), {}), "stage body returned a tuple; it must return one array"),
        (lambda: from_nnx(Counting()), "stage body: its call changes seen, a Counter; only a BatchStat can move"),
    ],
)
def test_what_cannot_run_is_refused(source, message):
    source = source()
    with pytest.raises(ForeignError, match=message):
        apply(source.model, source.params, {"inputs": X})


def test_pooled_head():
    stage = head_stage(heads.classifier(2, width=4, pooling="mean"))
    params = stage.init(KEY)
    assert list(flatten(params)) == ["out/bias", "out/kernel"]
    x = jnp.asarray(X.reshape(2, 3, 4))
    mask = jnp.array([[1, 1, 0], [1, 1, 1]])
    rows = jnp.stack([x[0, :2].mean(0), x[1].mean(0)])
    masked = stage.fn(params, {"hidden": x, "attention_mask": mask}, None)["logits"]
    np.testing.assert_allclose(masked, rows @ params["out"]["kernel"], atol=1e-6)
    image = stage.fn(params, {"hidden": x[:, None]}, None)["logits"]
    np.testing.assert_allclose(image, x.mean(1) @ params["out"]["kernel"], atol=1e-6)
    tokens = head_stage(heads.tokens(3, width=4))
    assert tokens.fn(tokens.init(KEY), {"hidden": x}, None)["logits"].shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("head", "carry", "message"),
    [
        (heads.classifier(2), {}, "no known width"),
        (heads.masked_lm(), {}, "not 'masked-lm'"),
        (Head("sequence-classification", ("a",), "max", 4), {}, "pooling 'max' is not one of"),
        (heads.classifier(2, width=4), {"logits": X}, "reads 'hidden', which no stage wrote"),
        (heads.classifier(2, width=5), {"hidden": X}, r"width=5, but the features are \(6, 4\)"),
        (heads.classifier(2, width=4), {"hidden": X[None]}, "ask for pooling='mean'"),
    ],
)
def test_heads_that_do_not_fit_are_refused(head, carry, message):
    with pytest.raises(ForeignError, match=message):
        stage = head_stage(head)
        stage.fn(stage.init(KEY), carry, None)
