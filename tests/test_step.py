import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtransfer.adapt import groups, heads, swap_head, untie
from jaxtransfer.models import apply
from jaxtransfer.models.api import abstract_init
from jaxtransfer.models.foreign import from_nnx
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.optim import Group
from jaxtransfer.step import init_state, make_eval, make_step, params_of, training_stages, whole
from jaxtransfer.tree import TreeError, flatten, match, partition
from jaxtransfer.types import State
from tests import tiny

DECAYED = Group("adamw", lr=1e-2, weight_decay=0.5)


@pytest.fixture(scope="module")
def run():
    """A partly frozen BERT with dropout: ``(source, first state, frozen, step)``."""
    src = tiny.source(hidden_dropout_prob=0.2)
    return src, *tiny.start(src, groups.last(src.model, 2), DECAYED, clip=1.0)


@pytest.fixture(scope="module")
def plain():
    """A step in full, without dropout, that subtracts the gradient: ``(state, frozen, step, new state, metrics)``."""
    state, frozen, step = tiny.start(tiny.source(), None, tiny.PLAIN, donate=False)
    return state, frozen, step, *step(state, frozen, tiny.batch())


def test_only_the_trainable_partition_has_a_state(run):
    src, state, frozen, _ = run
    trained = set(flatten(state.params))
    assert {path.split("/")[0] for path in trained} == {"blocks", "pooler", "head"}
    assert {path.split("/")[1] for path in trained if path.startswith("blocks")} == {"2:4"}
    assert trained.isdisjoint(flatten(frozen)) and not jax.tree.leaves(state.stats)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * parameters
    assert tiny.same_bits(params_of(state, frozen), src.params)


def test_frozen_leaves_stay_and_the_state_is_donated(run):
    src, first, frozen, step = run
    given, kept = jax.tree.map(np.array, (src.params, frozen))
    state = tiny.copied(first)
    for i in range(20):
        old = state
        state, metrics = step(state, frozen, tiny.batch(seed=i))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)))
    assert step._cache_size() == 1
    assert int(state.step) == 20 and bool(metrics["finite"])
    assert tiny.same_bits(frozen, kept)
    assert tiny.same_bits(src.params, given)  # neither moved nor deleted
    moved = flatten(state.params)
    assert all(tiny.bits(moved[path]) != tiny.bits(leaf) for path, leaf in flatten(first.params).items())


def test_init_state_leaves_the_users_arrays_alone(run):
    src, first, _, step = run
    labels, key = tiny.labels_of(src, groups.last(src.model, 2)), jax.random.key(2)
    state, frozen = init_state(src.model, src.params, labels, tiny.transform(labels, DECAYED, clip=1.0), key)
    assert tiny.same_bits(state, first)
    step(state, frozen, tiny.batch())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((src.params, frozen, key)))


def test_a_step_is_a_function_of_its_arguments(run):
    _, first, frozen, step = run
    results = [step(tiny.copied(first), frozen, tiny.batch()) for _ in range(2)]
    assert tiny.same_bits(*results)
    loss = float(results[0][1]["loss"])
    later = dataclasses.replace(tiny.copied(first), step=jnp.array(1, jnp.int32))
    other = dataclasses.replace(tiny.copied(first), key=jax.random.key(3))
    assert loss != float(step(later, frozen, tiny.batch())[1]["loss"])
    assert loss != float(step(other, frozen, tiny.batch())[1]["loss"])


def test_a_step_that_is_not_finite_changes_nothing(run):
    _, first, frozen, step = run
    state, _ = step(tiny.copied(first), frozen, tiny.batch())
    bad = tiny.batch(seed=1)
    bad["weight"][0] = np.inf
    rejected, metrics = step(tiny.copied(state), frozen, bad)
    assert not bool(metrics["finite"]) and not np.isfinite(float(metrics["loss"]))
    assert tiny.same_bits(rejected, state)
    (after, metrics), (wanted, _) = (step(tiny.copied(s), frozen, tiny.batch(seed=2)) for s in (rejected, state))
    assert bool(metrics["finite"]) and int(after.step) == 2
    assert tiny.same_bits(after, wanted)


def test_the_gradient_is_that_of_the_whole_model(plain):
    state, frozen, _, new, metrics = plain
    src, batch = tiny.source(), tiny.batch()

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = apply(src.model, params, batch)["logits"]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch["labels"])[:, None], axis=1)[:, 0]
        return jnp.sum(nll * batch["weight"]) / 15.0

    value, grads = loss(src.params)
    found = flatten(params_of(state, frozen))
    after = flatten(params_of(new, frozen))
    assert tiny.apart({path: found[path] - after[path] for path in found}, flatten(grads)) < 1e-5
    assert np.isclose(metrics["loss"], value, rtol=1e-6)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert np.isclose(metrics["grad_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize("options", [{"accumulate": 4}, {"remat": "full"}, {"remat": "dots"}], ids=str)
def test_accumulation_and_rematerialisation_change_no_gradient(plain, options):
    state, frozen, _, new, metrics = plain
    _, _, step = tiny.start(tiny.source(), None, tiny.PLAIN, donate=False, **options)
    after, found = step(state, frozen, tiny.batch())
    assert tiny.apart(tiny.gradients(state, after), tiny.gradients(state, new)) < 2e-6
    assert found.keys() == metrics.keys()
    assert all(np.isclose(found[name], metrics[name], rtol=1e-5) for name in metrics)
    assert found["weight"] == 15.0


def test_a_microbatch_without_weight_counts_for_nothing(plain):
    def mean(view):
        """Not a number where nothing weighs anything."""
        loss, metrics = cross_entropy()(view)
        return loss + 0.0 / metrics["weight"], metrics

    state, frozen, whole_batch, *_ = plain
    _, _, step = tiny.start(tiny.source(), None, tiny.PLAIN, objective=mean, donate=False, accumulate=4)
    batch = tiny.batch()
    batch["weight"][2::4] = 0  # all of the third of four microbatches
    (one, wanted), (four, found) = whole_batch(state, frozen, batch), step(state, frozen, batch)
    assert bool(found["finite"]) and np.isclose(found["loss"], wanted["loss"], rtol=1e-6)
    assert tiny.apart(tiny.gradients(state, four), tiny.gradients(state, one)) < 2e-6
    batch["weight"][0] = np.nan  # which is not nothing: the step must be refused
    assert not bool(step(state, frozen, batch)[1]["finite"])


def test_a_batch_must_divide_into_its_microbatches(plain):
    _, _, step = tiny.start(tiny.source(), None, tiny.PLAIN, accumulate=3)
    with pytest.raises(ValueError, match="a batch of 16 rows does not divide into 3 microbatches"):
        step(*plain[:2], tiny.batch())


def test_rematerialisation_needs_fewer_temporaries(plain):
    batch = tiny.batch(rows=64, length=16)
    _, _, lean = tiny.start(tiny.source(), None, tiny.PLAIN, remat="full", donate=False)
    kept, saved = (
        step.lower(*plain[:2], batch).compile().memory_analysis().temp_size_in_bytes for step in (plain[2], lean)
    )
    assert saved < 0.5 * kept


def test_mixed_precision_keeps_masters_in_float32(plain):
    src = tiny.source()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), src.params)
    state, frozen, step = tiny.start(
        dataclasses.replace(src, params=half), groups.last(src.model, 2), precision=jnp.bfloat16
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    moments = [leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert {*moments, *(leaf.dtype for leaf in jax.tree.leaves(state.params))} == {jnp.dtype(jnp.float32)}
    state, metrics = step(state, frozen, tiny.batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert metrics["loss"].dtype == jnp.float32 and bool(metrics["finite"])
    assert np.isclose(metrics["loss"], plain[4]["loss"], rtol=0.02)


@pytest.mark.parametrize(("recipe", "live"), [("head", 0), ("last", 1)])
def test_a_frozen_layer_costs_its_forward_pass_only(recipe, live):
    """FLOPs of the unrolled program within 5 % of the matrix products that cannot be avoided."""
    d, inner, layers, rows, length = 512, 2048, 2, 32, 16
    src = tiny.trunk(
        hidden_size=d, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
        hidden_dropout_prob=0.1,
    )  # fmt: skip
    src = swap_head(src, heads.classifier(2), jax.random.key(1))
    rules = groups.last(src.model, 1) if recipe == "last" else groups.head_only(src.model)
    labels = tiny.labels_of(src, rules)
    tx = tiny.transform(labels, DECAYED, clip=1.0)
    by_path = flatten(labels)
    trained, frozen = partition(abstract_init(src.model), lambda path: by_path[path] != "frozen")
    none, scalar = jax.tree.map(lambda _: None, src.params), jax.ShapeDtypeStruct((), jnp.int32)
    state = State(scalar, trained, none, jax.eval_shape(tx.init, trained), jax.random.key(0), {})
    step = make_step(src.model, cross_entropy(), tx)
    found = step.lower(state, frozen, tiny.batch(rows, length)).compile().cost_analysis()["flops"]

    square, wide, scores = 2 * rows * length * d * d, 2 * rows * length * d * inner, 2 * rows * length * length * d
    forward = layers * (4 * square + 2 * wide + 2 * scores) + 2 * rows * d * d
    # The lowest layer that trains needs no gradient of its input.
    backward = live * (8 * square + 4 * wide + 4 * scores - 3 * square + 4 * rows * d * d)
    assert 1.0 <= found / (forward + backward) < 1.05


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.norm(self.linear(x)))


STATS = ("body/norm/mean", "body/norm/var")


@pytest.fixture(scope="module")
def normed():
    """A model with running statistics, and a batch for it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rngs = nnx.Rngs(0)
        src = from_nnx({"body": Normed(rngs), "head": nnx.Linear(6, 3, rngs=rngs)})
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=(8, 4)) + 2.0).astype(np.float32)
    return src, {"inputs": inputs, "labels": np.arange(8) % 3, "weight": np.ones(8, np.float32)}


def moving(src, batches, mean, var):
    """Running statistics after the batches, in order."""
    w, b = (np.asarray(src.params["body"]["linear"][name], np.float64) for name in ("kernel", "bias"))
    for x in batches:
        y = x.astype(np.float64) @ w + b
        mean, var = 0.9 * mean + 0.1 * y.mean(0), 0.9 * var + 0.1 * y.var(0)
    return mean, var


@pytest.mark.parametrize("count", [1, 4])
def test_running_statistics_move_in_order_where_a_layer_trains(normed, standard_promotion, count):
    src, batch = normed
    state, frozen, step = tiny.start(src, None, accumulate=count, donate=False)
    assert set(flatten(state.stats)) == set(STATS) and set(STATS).isdisjoint(flatten(state.params))
    before = flatten(state.stats)
    after, _ = step(state, frozen, batch)
    cut = [batch["inputs"][i::count] for i in range(count)]
    wanted = moving(src, cut, *(np.asarray(before[path], np.float64) for path in STATS))
    assert all(np.allclose(flatten(after.stats)[path], w, rtol=1e-5) for path, w in zip(STATS, wanted, strict=True))
    bad = batch | {"weight": np.full(8, np.inf, np.float32)}
    rejected, metrics = step(after, frozen, bad)
    assert not bool(metrics["finite"]) and tiny.same_bits(rejected, after)


def test_running_statistics_of_a_frozen_layer_stay_and_it_normalises_by_them(normed, standard_promotion):
    src, batch = normed
    state, frozen, step = tiny.start(src, groups.head_only(src.model), donate=False)
    after, metrics = step(state, frozen, batch)
    assert set(flatten(after.stats)) == set(STATS) and tiny.same_bits(after.stats, state.stats)
    outputs = make_eval(src.model)(state, frozen, batch)
    loss = -jax.nn.log_softmax(outputs["logits"])[np.arange(8), batch["labels"]].mean()
    assert np.isclose(metrics["loss"], loss, rtol=1e-6)


def test_statistics_that_would_be_lost_are_an_error(normed, standard_promotion):
    src, batch = normed
    rules = [("body/norm/(mean|var)", "frozen"), (".*", "trunk")]
    labels = match(rules, src.params)
    tx = tiny.transform(labels)
    state, frozen = init_state(src.model, src.params, labels, tx, jax.random.key(0))
    with pytest.raises(TreeError, match="statistics body/norm/mean, body/norm/var, which are not labelled 'stats'"):
        make_step(src.model, cross_entropy(), tx)(state, frozen, batch)


def test_training_stages(normed):
    src = tiny.source()

    def stages(src, rules):
        by_path = flatten(tiny.labels_of(src, rules))
        live, frozen = partition(src.params, lambda path: by_path[path] != "frozen")
        return training_stages(src.model, partition(live, lambda path: by_path[path] != "stats")[0], frozen)

    assert stages(src, groups.full(src.model)) == {stage.name for stage in src.model.stages}
    assert stages(src, groups.last(src.model, 1)) == {"blocks/3", "pooler", "head"}
    assert stages(src, groups.head_only(src.model)) == {"head"}
    assert stages(src, [("blocks/1/.*/bias", "trunk"), (".*", "frozen")]) == {"blocks/1"}
    assert stages(normed[0], groups.head_only(normed[0].model)) == {"head"}


def test_a_tied_head_over_a_frozen_embedding_is_refused_until_untied():
    tied = swap_head(tiny.trunk(), heads.masked_lm(), jax.random.key(1))
    start = {"key": jax.random.key(0)}

    def begin(src, rules):
        labels = tiny.labels_of(src, rules)
        return init_state(src.model, src.params, labels, tiny.transform(labels), **start)

    with pytest.raises(ValueError, match="head is trained but reads embed/word/embedding, which is frozen: untie"):
        begin(tied, groups.head_only(tied.model))
    begin(tied, [("blocks/.*", "trunk"), (".*", "frozen")])  # neither trains
    begin(tied, groups.full(tied.model))  # both train
    loose = untie(tied)
    state, _ = begin(loose, groups.head_only(loose.model))
    assert "head/decoder/kernel" in flatten(state.params)
    batch = {name: tiny.batch()[name] for name in ("input_ids", "attention_mask")}
    logits = [np.asarray(jax.jit(lambda p, m=s.model: apply(m, p, batch)["logits"])(s.params)) for s in (tied, loose)]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-6 * np.abs(logits[0]).max()
    assert loose.lineage.operations == (*tied.lineage.operations, "untie()")
    with pytest.raises(ValueError, match="the head of this bert model is not tied"):
        untie(loose)


def test_labels_must_fit_the_parameters():
    src = tiny.source()
    labels = tiny.labels_of(src, groups.full(src.model))
    tx, key = tiny.transform(labels), jax.random.key(0)
    with pytest.raises(ValueError, match="nothing trains: every label is 'frozen' or 'stats'"):
        init_state(src.model, src.params, jax.tree.map(lambda _: "frozen", labels), tx, key)
    with pytest.raises(TreeError, match=r"labels and params differ at \['head/out/bias', 'head/out/kernel'\]"):
        init_state(src.model, src.params, {k: v for k, v in labels.items() if k != "head"}, tx, key)
    counted = src.params | {"head": {"out": src.params["head"]["out"] | {"bias": jnp.zeros(3, jnp.int32)}}}
    with pytest.raises(ValueError, match="head/out/bias is int32 and cannot train"):
        init_state(src.model, counted, labels, tx, key)


def test_make_eval_gives_the_named_outputs_without_dropout(run):
    src, state, frozen, _ = run
    evaluate = make_eval(src.model, ("logits", "pooler_output"))
    batch = tiny.batch()
    found = evaluate(state, frozen, batch)
    wanted = jax.jit(lambda params: apply(src.model, params, batch))(whole(state, frozen))
    assert found.keys() == {"logits", "pooler_output"}
    assert all(np.allclose(found[name], wanted[name], rtol=1e-6) for name in found)
    with pytest.raises(ValueError, match="the model has no output 'logit'; it has last_hidden_state, "):
        make_eval(src.model, ("logit",))(state, frozen, batch)
