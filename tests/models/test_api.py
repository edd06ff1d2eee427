"""Running stages: spans compose, captures, masks, statistics, rematerialisation, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.models import apply, family, init, run_span
from jaxtransfer.models.api import abstract_init
from jaxtransfer.tree import TreeError, flatten, layers_of, layout, stack, unflatten
from jaxtransfer.types import Head, Model, Stage
from tests.models import zoo

BOUNDARIES = ["embed", "blocks/0", "blocks/1", "blocks/2", "blocks/3", "pooler", "head"]
KEY = jax.random.key(7, impl="rbg")  # compiles much faster than threefry on a CPU


def layouts(params):
    """Unrolled, in one stack, and in several."""
    return {
        "unrolled": params,
        "stacked": zoo.stacked(params),
        "cut": stack(params, {"blocks": ((0, 1), (1, 4))}),
    }


@functools.cache
def trained():
    """Outputs in training mode and a hidden state, from the unrolled program."""
    model, params = zoo.tiny()
    return run(model, params, True)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def run(model, params, train):
    train = set(train) if isinstance(train, tuple) else train
    return apply(model, params, zoo.inputs(), train=train, key=KEY, capture=["blocks/1"])


def same(got, want, tolerance=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, value in flatten(want).items():
        zoo.assert_close(flatten(got)[path], value, tolerance)


def test_init_draws_each_stage_from_its_own_key_whatever_the_head():
    model, params = zoo.tiny()
    assert [stage.name for stage in model.stages] == BOUNDARIES
    trunk = family("bert").build(zoo.TINY, None)
    for path, leaf in flatten(init(trunk, jax.random.key(0))).items():
        assert np.array_equal(leaf, flatten(params)[path]), path
    flat = flatten(params)
    assert {leaf.dtype.name for leaf in flat.values()} == {"float32"}
    assert all(not leaf.any() for path, leaf in flat.items() if path.endswith("bias"))
    assert all((leaf == 1).all() for path, leaf in flat.items() if path.endswith("scale"))
    assert abs(float(flat["embed/word/embedding"].std()) - 0.3) < 0.05
    kernels = [np.asarray(leaf).tobytes() for path, leaf in flat.items() if path.endswith(("kernel", "embedding"))]
    assert len(set(kernels)) == len(kernels)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert abstract_init(model) == spec


@pytest.mark.parametrize("how", ["unrolled", "stacked"])
def test_spans_compose_exactly_at_every_boundary(how):
    model, params = zoo.tiny()
    params = layouts(params)[how]
    whole = run_span(model, params, zoo.inputs(), None, None)
    for boundary in BOUNDARIES:
        carry = run_span(model, params, zoo.inputs(), None, boundary)
        carry = run_span(model, params, carry, boundary, None)
        assert set(carry) == set(whole)
        for name, value in whole.items():
            assert jnp.array_equal(carry[name], value), (boundary, name)


def test_an_empty_span_changes_nothing():
    model, params = zoo.tiny()
    carry = run_span(model, params, zoo.inputs(), None, "blocks/0")
    assert run_span(model, params, carry, "blocks/0", "blocks/0") == carry


def test_a_span_needs_only_its_own_parameters():
    model, params = zoo.tiny()
    carry = run_span(model, params, zoo.inputs(), None, "blocks/3")
    tail = run_span(model, {name: params[name] for name in ("pooler", "head")}, carry, "blocks/3", None)
    assert tail["logits"].shape == (3, 3)


@pytest.mark.parametrize("how", ["unrolled", "stacked"])
def test_captures_are_the_carry_at_the_boundary(how):
    model, params = zoo.tiny()
    params = layouts(params)[how]
    out = apply(model, params, zoo.inputs(), capture=["blocks/1", "pooler", "embed"])
    assert set(out) == {"last_hidden_state", "pooler_output", "logits", "captured"}
    assert set(out["captured"]) == {"blocks/1", "pooler", "embed"}
    for name, entry in (("embed", "hidden"), ("blocks/1", "hidden"), ("pooler", "pooler_output")):
        zoo.assert_close(out["captured"][name], run_span(model, params, zoo.inputs(), None, name)[entry], 1e-6)
    assert "captured" not in apply(model, params, zoo.inputs())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"stop": "blocks/4"}, "no stage is called 'blocks/4'; the stages are embed, blocks/0, "),
        ({"start": "encoder"}, "no stage is called 'encoder'"),
        ({"capture": ["pool"]}, "no stage is called 'pool'"),
        ({"train": {"heads"}, "key": KEY}, "no stage is called 'heads'"),
        ({"start": "blocks/2", "stop": "blocks/0"}, "the span is backwards: blocks/0 comes before blocks/2"),
        (
            {"stop": "blocks/1", "capture": ["blocks/2"]},
            "capture: blocks/2 is outside the span after None up to blocks/1",
        ),
        ({"start": "embed", "capture": ["embed"]}, "capture: embed is outside the span after embed up to None"),
        ({"train": True}, "train=True needs a key"),
        ({"train": {"head"}}, "train=True needs a key"),
        ({"remat": "everything"}, r"remat: 'everything' is not one of \[None, 'full', 'dots'\]"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, complaint):
    model, params = zoo.tiny()
    with pytest.raises(ValueError, match=complaint):
        run_span(model, params, zoo.inputs(), **({"start": None, "stop": None} | arguments))


@pytest.mark.parametrize("how", ["stacked", "cut"])
def test_masks_do_not_change_when_the_tree_is_laid_out(how):
    model, params = zoo.tiny()
    plain = apply(model, params, zoo.inputs())
    assert not jnp.allclose(trained()["logits"], plain["logits"], atol=1e-2)
    same(run(model, layouts(params)[how], True), trained())


def test_masks_do_not_change_when_a_span_is_cut():
    model, params = zoo.tiny()
    carry = {**zoo.inputs(), "hidden": trained()["captured"]["blocks/1"], "mask": zoo.inputs()["attention_mask"] > 0}
    rest = run_span(model, zoo.stacked(params), carry, "blocks/1", None, train=True, key=KEY)
    zoo.assert_close(rest["logits"], trained()["logits"], 1e-6)


@pytest.mark.parametrize("how", ["unrolled", "stacked"])
def test_masks_do_not_change_when_only_some_stages_train(how):
    """The frozen prefix is in evaluation mode; what follows it draws the masks that it draws when everything trains."""
    model, params = zoo.tiny()
    params = layouts(params)[how]
    frozen = run_span(model, params, zoo.inputs(), None, "blocks/1")
    want = run_span(model, params, frozen, "blocks/1", None, train=True, key=KEY)
    got = run(model, params, ("blocks/2", "blocks/3", "pooler", "head"))
    zoo.assert_close(got["captured"]["blocks/1"], frozen["hidden"], 1e-6)
    zoo.assert_close(got["logits"], want["logits"], 1e-6)
    assert not jnp.allclose(got["logits"], trained()["logits"], atol=1e-2)


def test_another_key_or_none_of_the_dropout_changes_what_is_drawn():
    model, params = zoo.tiny()
    other = apply(model, params, zoo.inputs(), train=True, key=jax.random.key(8))
    assert not jnp.allclose(other["logits"], trained()["logits"], atol=1e-2)
    still, _ = zoo.tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    zoo.assert_close(
        apply(still, params, zoo.inputs(), train=True, key=KEY)["logits"],
        apply(model, params, zoo.inputs())["logits"],
        1e-6,
    )


@pytest.mark.parametrize("how", ["stacked", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_rematerialisation_gives_equal_gradients(how):
    model, params = zoo.tiny(num_hidden_layers=2)
    params = params if how == "unrolled" else zoo.stacked(params)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, remat):
        out = lambda p: apply(model, p, zoo.inputs(), train=True, key=KEY, remat=remat)["logits"]  # noqa: E731
        return jax.grad(lambda p: jnp.sum(jnp.sin(out(p))))(params)

    plain = flatten(gradient(params, None))
    assert all(np.abs(leaf).max() > 0 for path, leaf in plain.items() if "key/bias" not in path)
    for remat in ("full", "dots"):
        zoo.assert_gradients_close(flatten(gradient(params, remat)), plain, largest=1e-6, relative=1e-5)


def test_activations_have_the_dtype_asked_for_and_weights_keep_theirs():
    model, params = zoo.tiny()
    full = apply(model, params, zoo.inputs(), capture=["blocks/1"])
    half = apply(model, zoo.stacked(params), zoo.inputs(), capture=["blocks/1"], dtype=jnp.bfloat16)
    for leaf in jax.tree.leaves(half):
        assert leaf.dtype == jnp.bfloat16
    zoo.assert_close(half["logits"].astype(jnp.float32), full["logits"], 0.05)
    stored = apply(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), zoo.inputs())
    assert stored["logits"].dtype == jnp.float32
    zoo.assert_close(stored["logits"], full["logits"], 0.05)


def test_the_constraint_is_applied_to_every_activation_between_stages():
    model, params = zoo.tiny()
    seen = []
    constrain = lambda x: seen.append(x.shape) or x  # noqa: E731
    out = apply(model, params, zoo.inputs(), constrain=constrain)
    assert set(seen) == {(3, 7, 8), (3, 8)}  # logits stay split over a vocabulary that is
    assert seen.count((3, 7, 8)) >= 5 and jnp.array_equal(out["logits"], apply(model, params, zoo.inputs())["logits"])


def test_padding_changes_nothing_that_is_attended():
    model, params = zoo.tiny(Head("sequence-classification", ("a", "b"), pooling="mean"))
    batch = zoo.inputs()
    other = {**batch, "input_ids": jnp.where(batch["attention_mask"] == 1, batch["input_ids"], 9)}
    one, two = (apply(model, params, b) for b in (batch, other))
    assert "pooler" not in params and "pooler_output" not in one
    zoo.assert_close(one["logits"], two["logits"], 1e-6)
    seen = batch["attention_mask"][..., None].astype(jnp.float32)
    mean = (one["last_hidden_state"] * seen).sum(1) / seen.sum(1)
    zoo.assert_close(one["logits"], mean @ params["head"]["out"]["kernel"] + params["head"]["out"]["bias"][None], 1e-5)


def test_a_row_with_nothing_to_attend_to_is_finite():
    model, params = zoo.tiny(Head("sequence-classification", ("a", "b"), pooling="mean"))
    out = apply(model, params, {**zoo.inputs(), "attention_mask": jnp.zeros((3, 7), jnp.int32)})
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(out))


@pytest.mark.parametrize(("name", "most"), [("bert", 16), ("roberta", 14), ("xlm-roberta", 14)])
def test_an_input_longer_than_the_positions_is_refused(name, most):
    model = family(name).build(zoo.TINY, None)
    params = abstract_init(model)
    length = lambda n: jax.eval_shape(functools.partial(apply, model), params, zoo.inputs(length=n))  # noqa: E731
    assert length(most)["last_hidden_state"].shape == (3, most, 8)
    with pytest.raises(ValueError, match=f"input of length {most + 1} does not fit: the model has {most} positions"):
        length(most + 1)


def changed(params, change):
    flat = flatten(params)
    change(flat)
    return unflatten(flat)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda flat: flat.pop("blocks/1/mlp/up/bias"), "blocks/1: .*: missing mlp/up/bias"),
        (lambda flat: flat.update({"pooler/dense/scale": jnp.ones(1)}), "pooler: .*: extra dense/scale"),
        (
            lambda flat: flat.update({"head/out/bias": jnp.ones(4)}),
            r"head: .*: out/bias: expected shape \(3,\), found \(4,\)",
        ),
        (
            lambda flat: [flat.pop("head/out/bias"), flat.pop("head/out/kernel")],
            "head: .*: missing out/bias; missing out/kernel",
        ),
        (lambda flat: [flat.pop(path) for path in list(flat) if "blocks" in path], "no parameters at blocks; the tree"),
        (
            lambda flat: [flat.pop(path) for path in list(flat) if path.startswith("blocks/2/")],
            "no parameters for stage blocks/2; beside it there are 0, 1, 3",
        ),
        (lambda flat: flat.update({"blocks/4/mlp/up/bias": jnp.ones(1)}), "owns or reads blocks/4/mlp/up/bias"),
        (lambda flat: flat.update({"prompt/embedding": jnp.ones(1)}), r"owns or reads prompt/embedding \(1 leaves"),
    ],
    ids=["missing", "extra", "misshapen", "no stage", "no list", "no layer", "one layer more", "a stranger"],
)
def test_parameters_that_do_not_fit_are_named(change, complaint):
    model, params = zoo.tiny()
    with pytest.raises(TreeError, match=complaint):
        jax.eval_shape(lambda p: apply(model, p, zoo.inputs()), changed(params, change))


def test_stacked_parameters_that_do_not_fit_are_named():
    model, params = zoo.tiny()
    laid = zoo.stacked(params)
    laid["blocks"]["0:4"]["mlp"]["up"]["bias"] = jnp.ones((4, 5))
    with pytest.raises(TreeError, match=r"blocks/0:4: .*mlp/up/bias: expected shape \(12,\), found \(5,\)"):
        jax.eval_shape(lambda p: apply(model, p, zoo.inputs()), laid)
    blocks = zoo.stacked(params)["blocks"]["0:4"]
    with pytest.raises(TreeError, match="blocks/0:3/attention/key/bias is not stacked from 3 layers"):
        jax.eval_shape(lambda p: apply(model, p, zoo.inputs()), {**params, "blocks": {"0:3": blocks}})
    half = {"0:2": jax.tree.map(lambda x: x[:2], blocks)}
    with pytest.raises(TreeError, match="no parameters for stage blocks/2; beside it there are 0:2"):
        jax.eval_shape(lambda p: apply(model, p, zoo.inputs()), {**params, "blocks": half})


def test_a_tied_head_reads_the_embedding_and_says_where_it_is_not():
    model, params = zoo.tiny(Head("masked-lm"))
    assert model.stages[-1].reads == ("embed/word/embedding",) and "decoder" not in params["head"]
    carry = run_span(model, params, zoo.inputs(), None, "blocks/3")
    with pytest.raises(TreeError, match="no parameters at embed/word/embedding"):
        run_span(model, {"head": params["head"]}, carry, "blocks/3", None)
    untied, alone = zoo.tiny(Head("masked-lm"), tie_word_embeddings=False)
    assert untied.stages[-1].reads == () and alone["head"]["decoder"]["kernel"].shape == (8, 31)


def test_a_head_with_stages_of_its_own():
    def score(params, carry, key):
        return {"logits": carry["hidden"][:, 0] @ params["w"]}

    own = Stage("score", score, lambda key: {"w": jax.random.normal(key, (8,))}, ("logits",))
    model, params = zoo.tiny(Head("ranking", stages=(own,)))
    out = apply(model, params, zoo.inputs())
    zoo.assert_close(out["logits"], out["last_hidden_state"][:, 0] @ params["score"]["w"], 1e-6)


def counting(count=3):
    """Stages of the user's own with a statistic each: an exponential mean of what passes."""

    def fn(params, carry, key):
        hidden = carry["hidden"] * params["w"]
        if key is None:
            return {"hidden": hidden - params["mean"]}
        return {"hidden": hidden, "stats": {"mean": 0.9 * params["mean"] + 0.1 * hidden.mean()}}

    fresh = lambda key: {"w": jax.random.uniform(key, ()), "mean": jnp.zeros(())}  # noqa: E731
    stages = tuple(Stage(f"blocks/{i}", fn, fresh) for i in range(count))
    return Model("own", None, stages, {"hidden": "y"}, stats=(r"blocks/\d+/mean",))


@pytest.mark.parametrize("table", [None, ((0, 3),), ((0, 1), (1, 3))], ids=str)
def test_statistics_move_where_training_is_and_only_there(table):
    model = counting()
    params = init(model, jax.random.key(0))
    laid = params if table is None else stack(params, {"blocks": table})
    batch = {"hidden": jnp.arange(4.0)}
    assert "stats" not in apply(model, laid, batch)
    out = apply(model, laid, batch, train={"blocks/1", "blocks/2"}, key=KEY)
    found = {}
    for path, value in flatten(out["stats"]).items():
        found |= dict(zip(layers_of(path), np.asarray(value).reshape(-1), strict=True))
    hidden = batch["hidden"] * params["blocks"]["0"]["w"]
    want = {}
    for i in (1, 2):
        hidden = hidden * params["blocks"][str(i)]["w"]
        want[f"blocks/{i}/mean"] = 0.1 * float(hidden.mean())
    assert found == pytest.approx(want)
    zoo.assert_close(out["y"], hidden, 1e-6)


def test_stages_that_are_not_alike_are_not_scanned():
    model = counting()
    odd = Stage("blocks/1", lambda params, carry, key: {"hidden": carry["hidden"]}, model.stages[1].init)
    mixed = Model("own", None, (model.stages[0], odd, model.stages[2]), {"hidden": "y"})
    params = init(mixed, jax.random.key(0))
    assert apply(mixed, params, {"hidden": jnp.ones(2)})["y"].shape == (2,)
    with pytest.raises(TreeError, match=r"blocks/0:3 are stacked, but their stages are not alike"):
        apply(mixed, stack(params, layout(params)), {"hidden": jnp.ones(2)})


def test_numpy_batches_are_taken_as_they_are():
    model, params = zoo.tiny()
    batch = {name: np.asarray(value) for name, value in zoo.inputs().items()}
    assert jnp.array_equal(apply(model, params, batch)["logits"], apply(model, params, zoo.inputs())["logits"])


@functools.cache
def lowered(layers, scanned, width=8):
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
    }
    model = family("bert").build(zoo.TINY | sizes | {"max_position_embeddings": 64}, None, pooler=False)
    params = abstract_init(model)
    params = zoo.stacked(params) if scanned else params
    batch = {"input_ids": jax.ShapeDtypeStruct((2, 32), jnp.int32)}
    return jax.jit(functools.partial(apply, model)).lower(params, batch)


def test_a_stacked_program_does_not_grow_with_depth():
    deep, shallow = (lowered(layers, True).compile().as_text() for layers in (12, 3))
    assert len(re.findall(r" while\(", deep)) == 1 == len(re.findall(r" while\(", shallow))
    assert len(deep) <= 1.5 * len(shallow)
    assert "stablehlo.while" not in lowered(12, False).as_text()
    assert len(lowered(12, False).as_text()) > 3 * len(lowered(12, True).as_text())


def test_the_unrolled_program_costs_what_the_arithmetic_says():
    layers, width, rows, length = 3, 256, 2, 32
    cost = lowered(layers, False, width).compile().cost_analysis()
    products = 4 * width * width + 2 * width * 4 * width + 2 * length * width
    assert cost["flops"] == pytest.approx(2 * rows * length * products * layers, rel=0.05)
