"""Terms of an objective, through the step: each is its function of arrays on what the step shows it, and no more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtransfer.models import apply, run_span
from jaxtransfer.models.foreign import from_nnx
from jaxtransfer.objectives import (
    Term,
    adversarial,
    aux_of,
    captures,
    continual,
    cross_entropy,
    discrepancy,
    distillation,
    regularisers,
    seen,
    shapes_of,
    source_free,
    states_of,
    terms,
    total,
)
from jaxtransfer.optim import Group
from jaxtransfer.step import bare, init_state, make_eval, make_step, params_of, with_constants
from jaxtransfer.tree import flatten
from jaxtransfer.types import AUX, View
from tests import tiny

LAYER, STEPS = "body", 10
TASK = cross_entropy()


class Body(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 8, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.up(x))


@functools.cache
def source():
    """Three small stages: what terms need of a model, compiled in no time."""
    stages = {"embed": lambda r: nnx.Linear(5, 6, rngs=r), "body": Body, "head": lambda r: nnx.Linear(8, 3, rngs=r)}
    rngs = nnx.Rngs(0)
    made = {name: make(rngs) for name, make in stages.items()}
    return from_nnx(made, init={name: lambda key, make=make: make(nnx.Rngs(key)) for name, make in stages.items()})


def rows(seed=0):
    """Points of three classes, one row of padding among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(16, 5)).astype(np.float32)
    weight = np.ones(16, np.float32)
    weight[5] = 0
    return {"inputs": x, "labels": (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0).astype(np.int32), "weight": weight}


def domains(**more):
    """A batch of the source's, with one of the target's behind it; each has a row of padding."""
    target = {name: value for name, value in rows(7).items() if name != "labels"}
    return {**rows(), "target": target, **more}


def begun(made, objective=TASK, *, group=None, constants=None, tx=None, **options):
    """``(state, frozen, step)`` of a run with terms."""
    src = source()
    shapes = shapes_of(src.model, src.params, rows(), made)
    params = {**src.params, **aux_of(made, src.model, jax.random.key(5), shapes)}
    labels = jax.tree.map(lambda _: "all", params)
    tx = tx or tiny.transform(labels, group or Group("sgd", lr=0.1, weight_decay=0.0))
    state, frozen = init_state(src.model, params, labels, tx, jax.random.key(2), terms=states_of(made, shapes))
    if constants:
        frozen = with_constants(frozen, **constants(state))
    step = make_step(
        src.model, total(objective, made) if made else objective, tx, capture=captures(made), donate=False, **options
    )
    return state, frozen, step


def anchor(state):
    return {"anchor": state.params}


@functools.cache
def outputs(seed: int):
    src = source()
    found = apply(src.model, src.params, rows(seed), capture=[LAYER])
    return {"logits": found["logits"], "features": found["captured"][LAYER]}


def real(found):
    """The rows that count."""
    return jnp.concatenate([found[:5], found[6:]])


MADE = {
    "coral": (terms.coral(LAYER), lambda f, t, z, q: discrepancy.coral(f, t)),
    "mmd": (terms.mmd(LAYER), lambda f, t, z, q: discrepancy.mmd(f, t)),
    "mcc": (terms.mcc(), lambda f, t, z, q: discrepancy.class_confusion(q)),
    "entropy": (terms.entropy(), lambda f, t, z, q: source_free.entropy(q)),
    "information_maximisation": (
        terms.information_maximisation(),
        lambda f, t, z, q: source_free.information_maximisation(q),
    ),
    "bss": (terms.spectral_shrinkage(LAYER, 2), lambda f, t, z, q: regularisers.spectral_shrinkage(f, 2)),
}


def test_every_term_is_its_function_of_the_rows_that_count():
    made = [dataclasses.replace(term, weight=0.5) for term, _ in MADE.values()]
    state, frozen, step = begun(made)
    _, metrics = step(state, frozen, domains())
    ours, theirs = outputs(0), outputs(7)
    seen_rows = [real(x) for x in (ours["features"], theirs["features"], ours["logits"], theirs["logits"])]
    sum_of = 0.0
    for name, (_, function) in MADE.items():
        wanted = float(function(*seen_rows))
        np.testing.assert_allclose(float(metrics[name]), wanted, rtol=2e-4, atol=1e-6, err_msg=name)
        sum_of += 0.5 * wanted
    task = float(TASK(View({}, ours, rows(), None, jnp.array(0)))[0])
    np.testing.assert_allclose(float(metrics["loss"]), task + sum_of, rtol=1e-4)


def test_the_weight_of_a_term_may_be_a_schedule():
    made = [dataclasses.replace(terms.entropy(), weight=lambda step: 0.25 * step.astype(jnp.float32))]
    state, frozen, step = begun(made)
    for count in range(2):
        state, metrics = step(state, frozen, domains())
        task = float(metrics["loss"]) - 0.25 * count * float(metrics["entropy"])
        if count == 0:
            wanted = float(TASK(View({}, outputs(0), rows(), None, jnp.array(0)))[0])
            np.testing.assert_allclose(task, wanted, rtol=1e-5)
        else:
            assert abs(task - float(metrics["loss"])) > 0.1  # the term counts by now


@pytest.mark.parametrize("conditional", [False, True])
def test_a_discriminator_learns_as_it_is_and_the_features_feel_minus_lambda_times(conditional):
    term = terms.cdan(LAYER, STEPS) if conditional else terms.dann(LAYER, STEPS)
    state, frozen, step = begun([term], objective=None, group=tiny.PLAIN)
    halfway = dataclasses.replace(state, step=jnp.array(5, jnp.int32))
    src = source()

    def plain(params):  # the discriminator's loss without the reversal
        found = [apply(src.model, bare(params), b, capture=[LAYER]) for b in (rows(), rows(7))]
        f = [real(o["captured"][LAYER]) for o in found]
        z = [real(o["logits"]) for o in found]
        weights = [adversarial.entropy_weights(x) for x in z] if conditional else [None, None]
        inputs = [adversarial.conditioned(a, b) for a, b in zip(f, z, strict=True)] if conditional else f
        told = [adversarial.discriminate(params[AUX][term.name], x) for x in inputs]
        return adversarial.domain_loss(*told, *weights)[0]

    wanted = flatten(jax.jit(jax.grad(plain))(params_of(state, frozen)))
    after, metrics = step(halfway, frozen, domains())
    np.testing.assert_allclose(float(metrics[term.name]), float(jax.jit(plain)(params_of(state, frozen))), rtol=1e-5)
    found = flatten(params_of(after, frozen))
    scale = float(adversarial.ramp(0.5))
    before = flatten(params_of(state, frozen))
    largest = max(float(jnp.abs(g).max()) for g in wanted.values())
    for path, g in wanted.items():
        moved = before[path] - found[path]
        sign = 1.0 if path.startswith(AUX) else -scale
        np.testing.assert_allclose(np.array(moved), sign * np.array(g), atol=2e-5 * largest + 1e-7, err_msg=path)


def test_what_trains_beside_the_model_is_no_part_of_it():
    made = [terms.dann(LAYER, STEPS)]
    state, frozen, step = begun(made)
    assert {path.split("/")[0] for path in flatten(state.params)} == {AUX, "embed", "body", "head"}
    state, _ = step(state, frozen, domains())
    found = make_eval(source().model)(state, frozen, rows())
    params = bare(params_of(state, frozen))
    np.testing.assert_allclose(found["logits"], apply(source().model, params, rows())["logits"], atol=1e-5)


def test_at_the_anchor_what_holds_to_the_source_is_zero_and_moves_nothing():
    made = [terms.l2_sp(beta=0.0), terms.lwf(), terms.feature_distillation(["embed", LAYER])]
    state, frozen, step = begun(made, objective=None, group=tiny.PLAIN, constants=anchor)
    after, metrics = step(state, frozen, rows())
    assert [round(float(metrics[term.name]), 7) for term in made] == [0.0, 0.0, 0.0] and bool(metrics["finite"])
    for path, leaf in flatten(state.params).items():
        np.testing.assert_allclose(leaf, flatten(after.params)[path], atol=1e-6, err_msg=path)


def test_away_from_the_anchor_they_are_their_equations():
    made = [terms.l2_sp(0.5, 0.25), terms.lwf(3.0), terms.feature_distillation([LAYER])]
    state, frozen, step = begun(made, objective=None, constants=anchor)
    moved = dataclasses.replace(state, params=jax.tree.map(lambda x: x * 1.1, state.params))
    _, metrics = step(moved, frozen, rows())
    src = source()
    teacher = outputs(0)
    student = apply(src.model, jax.tree.map(lambda x: x * 1.1, src.params), rows(), capture=[LAYER])
    student = {"logits": student["logits"], "features": student["captured"][LAYER]}
    old, new = ({n: p for n, p in src.params.items() if (n == "head") == head} for head in (False, True))
    square = lambda tree, factor: sum(float(jnp.sum((factor * x) ** 2)) for x in jax.tree.leaves(tree))  # noqa: E731
    wanted = {
        "l2_sp": 0.25 * square(old, 0.1) + 0.125 * square(new, 1.1),
        "lwf": float(distillation.logit_loss(real(student["logits"]), real(teacher["logits"]), 3.0)),
        "feature_distillation": float(distillation.feature_loss(real(student["features"]), real(teacher["features"]))),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(float(metrics[name]), value, rtol=1e-3, err_msg=name)


def test_importances_hold_what_matters():
    def constants(state):
        return {"anchor": state.params, "ewc": jax.tree.map(jnp.ones_like, state.params)}

    state, frozen, step = begun([terms.ewc(weight=2.0)], objective=None, constants=constants)
    moved = dataclasses.replace(state, params=jax.tree.map(lambda x: x + 0.1, state.params))
    _, metrics = step(moved, frozen, rows())
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(float(metrics["loss"]), 2.0 * 0.5 * 0.01 * count, rtol=1e-4)


def test_noise_is_felt_in_half_precision_too(standard_promotion):
    found = {}
    for precision in (jnp.float32, jnp.bfloat16):
        state, frozen, step = begun([terms.r3f("embed", 1e-3)], objective=None, precision=precision)
        found[precision] = float(step(state, frozen, rows())[1]["r3f"])
    np.testing.assert_allclose(found[jnp.bfloat16], found[jnp.float32], rtol=1e-3)


def test_tokens_of_padding_are_held_to_nothing():
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    own, taught = jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4))
    assert float(distillation.feature_loss(own, taught, mask=jnp.asarray(mask))) == 4 * 4 / 2 / 2
    view = View({}, {}, {"attention_mask": mask, "weight": np.ones(2)}, None, jnp.array(0))
    assert seen.token_mask(view, own) is mask and seen.token_mask(view, own[:, 0]) is None


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(5, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


def test_a_teacher_keeps_the_running_statistics_that_it_had(standard_promotion):
    with jax.numpy_rank_promotion("allow"):
        rngs = nnx.Rngs(0)
        src = from_nnx({"body": Normed(rngs), "head": nnx.Linear(5, 3, rngs=rngs)})
        batch = {**rows(), "inputs": 3.0 * rows()["inputs"] + 2.0}
        teacher = Term("teacher", lambda view: (jnp.zeros(()), {"logits": again(view)}), anchored=True)
        labels = jax.tree.map(lambda _: "all", src.params)
        labels["body"]["norm"] = {
            name: "stats" if name in ("mean", "var") else "all" for name in labels["body"]["norm"]
        }
        tx = tiny.transform(labels, Group("sgd", lr=0.0, weight_decay=0.0))
        state, frozen = init_state(src.model, src.params, labels, tx, jax.random.key(0))
        step = make_step(src.model, total(TASK, [teacher, terms.lwf()]), tx, donate=False)
        with pytest.raises(ValueError, match=r"statistics=state\.stats"):
            step(state, with_constants(frozen, anchor=state.params), batch)
        frozen = with_constants(frozen, anchor=state.params, statistics=state.stats)
        wanted = apply(src.model, src.params, batch)["logits"]
        for _ in range(5):
            state, metrics = step(state, frozen, batch)
        assert float(jnp.abs(flatten(state.stats)["body/norm/mean"]).max()) > 0.5
        np.testing.assert_allclose(metrics["teacher_logits"], wanted, atol=1e-6)


def again(view):
    return seen.again(view, view.constants["anchor"])["logits"]


def test_noise_on_the_embeddings_moves_the_predictions_a_little():
    values = {}
    for scale in (0.0, 1e-2):
        state, frozen, step = begun([terms.r3f("embed", scale)], objective=None)
        values[scale] = float(step(state, frozen, rows())[1]["r3f"])
    assert values[0.0] == 0.0 < values[1e-2] < 0.1


def test_mixout_of_probability_zero_is_the_run_without_it():
    plain, frozen, step = begun([])
    mixed = begun([], perturb=terms.mixout(0.0))[2]
    wanted, _ = step(plain, frozen, rows())
    found, _ = mixed(plain, with_constants(frozen, anchor=plain.params), rows())
    assert tiny.apart(flatten(found.params), flatten(wanted.params)) < 1e-6
    with pytest.raises(ValueError, match="with_constants"):
        mixed(plain, frozen, rows())


def test_replayed_rows_are_learned_as_the_batch_is():
    made = [terms.replay(TASK, weight=0.5)]
    state, frozen, step = begun(made)
    _, metrics = step(state, frozen, domains(replay=rows(3)))
    losses = [float(TASK(View({}, outputs(seed), rows(seed), None, jnp.array(0)))[0]) for seed in (0, 3)]
    np.testing.assert_allclose(float(metrics["loss"]), losses[0] + 0.5 * losses[1], rtol=1e-5)


def test_a_memory_bends_the_gradient_where_they_disagree():
    src, contrary = source(), rows()
    contrary["labels"] = (contrary["labels"] + 1) % 3
    inner = tiny.transform(jax.tree.map(lambda _: "all", src.params), tiny.PLAIN)
    state, frozen, step = begun([], tx=continual.a_gem(inner), memory=TASK)
    after, _ = step(state, frozen, {**rows(), "replay": contrary})
    moved = jax.tree.map(jnp.subtract, state.params, after.params)

    def loss(params, batch):
        return TASK(View({}, apply(src.model, params, batch), batch, None, jnp.array(0)))[0]

    grad = jax.jit(jax.grad(loss))
    g, r = (grad(src.params, batch) for batch in (rows(), contrary))
    assert float(optax.tree.vdot(g, r)) < 0
    wanted = flatten(continual.project(g, r))
    assert tiny.apart(flatten(moved), wanted) < 2e-5
    with pytest.raises(ValueError, match="no domain 'replay'"):
        step(state, frozen, rows())
    broken = {**contrary, "inputs": np.full_like(contrary["inputs"], np.inf)}
    kept, metrics = step(state, frozen, {**rows(), "replay": broken})
    assert not bool(metrics["finite"]) and tiny.same_bits(kept, state)


def test_the_sums_of_centroids_go_on_from_step_to_step_and_over_microbatches():
    made = [terms.centroid_labels(LAYER, 0.9)]
    state, frozen, step = begun(made, group=Group("sgd", lr=0.0, weight_decay=0.0))
    one, _ = step(state, frozen, domains())
    two, metrics = step(one, frozen, domains())
    f = source_free.unit(real(outputs(7)["features"]))
    sums = jax.nn.softmax(real(outputs(7)["logits"]), axis=-1).T @ f
    np.testing.assert_allclose(one.terms["centroid_labels"], sums, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(two.terms["centroid_labels"], 1.9 * sums, rtol=1e-4, atol=1e-5)
    assert 0 <= float(metrics["centroid_labels_agreed"]) <= 1


def test_two_heads_and_what_they_disagree_about():
    made = [terms.mcd(TASK, LAYER)]
    state, frozen, step = begun(made, objective=None, group=tiny.PLAIN)
    after, metrics = step(state, frozen, domains())
    src, second = source(), state.params[AUX]["mcd"]
    hidden = outputs(7)["features"]
    told = [
        run_span(src.model, {**src.params, "head": head}, {"hidden": hidden}, LAYER, None)["logits"]
        for head in (src.params["head"], second)
    ]
    wanted = discrepancy.classifier_discrepancy(*map(real, told))
    np.testing.assert_allclose(float(metrics["mcd_apart"]), float(wanted), rtol=1e-4)
    assert float(jnp.abs(after.params[AUX]["mcd"]["kernel"] - second["kernel"]).max()) > 0


def test_of_the_target_no_labels_are_seen():
    state, frozen, step = begun([terms.entropy()])
    with pytest.raises(ValueError, match="'target' has labels"):
        step(state, frozen, {**rows(), "target": rows()})


@pytest.mark.parametrize(
    ("made", "constants", "told"),
    [
        ([terms.entropy()], None, "entropy: reads the domain 'target'; the batch has no further domain"),
        ([terms.lwf()], None, "lwf: reads the source's values"),
        ([terms.ewc()], anchor, "ewc: reads importances"),
    ],
)
def test_what_a_term_lacks_is_named(made, constants, told):
    state, frozen, step = begun(made, constants=constants)
    with pytest.raises(ValueError, match=told):
        step(state, frozen, rows())


def test_boundaries_and_names_are_checked():
    model = source().model
    assert seen.boundary(model) == LAYER and seen.boundary(model, "embed") == "embed"
    with pytest.raises(ValueError, match="the stages are embed"):
        seen.boundary(model, "blocks/9")
    with pytest.raises(ValueError, match="a model without a head"):
        seen.boundary(from_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0))).model)
    with pytest.raises(ValueError, match="two terms are called 'entropy'"):
        total(TASK, [terms.entropy(), terms.entropy()])
    with pytest.raises(ValueError, match="needs a term"):
        total(None, [])
    view = View({}, {}, rows(), None, jnp.array(0))
    with pytest.raises(ValueError, match="is not captured"):
        seen.features(view, LAYER)


def test_the_sources_own_head_learns_its_classes_given_the_labels():
    relation = jnp.asarray([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]], jnp.float32)
    head = {"kernel": jnp.full((8, 2), 0.1), "bias": jnp.array([0.3, -0.3])}
    view = View({AUX: {"co_tuning": head}}, {"captured": {LAYER: outputs(0)["features"]}}, rows(), None, jnp.array(0))
    view = dataclasses.replace(view, constants={"relation": relation})
    value, _ = terms.co_tuning(LAYER).loss(view)
    logits = real(outputs(0)["features"]) @ head["kernel"] + head["bias"][None, :]
    wanted = -jnp.mean(jnp.sum(relation[real(jnp.asarray(rows()["labels"]))] * jax.nn.log_softmax(logits), axis=-1))
    np.testing.assert_allclose(float(value), float(wanted), rtol=1e-5)
