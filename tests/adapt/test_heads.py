import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import heads, quantize, swap_head, untie
from jaxtransfer.models import apply
from jaxtransfer.models.foreign import ForeignError, from_function
from jaxtransfer.types import Head, Stage
from tests import tiny
from tests.adapt.strategies import moved
from tests.models import zoo

KEY = jax.random.key(7)


def roots(src):
    return list(src.params)


def outputs(src, batch):
    return jax.eval_shape(lambda params: apply(src.model, params, batch), src.params)


def test_the_trunk_is_shared_and_the_swap_is_noted():
    trunk = tiny.trunk()
    src = swap_head(trunk, heads.classifier(["no", "yes"]), KEY)
    assert roots(src) == ["embed", "blocks", "pooler", "head"]
    assert all(src.params[root] is trunk.params[root] for root in ("embed", "blocks", "pooler"))
    assert src.model.head == Head("sequence-classification", ("no", "yes"))
    assert src.assets is trunk.assets and trunk.lineage.operations == ()
    again = swap_head(src, heads.classifier(5), KEY)
    assert again.params["head"]["out"]["kernel"].shape == (16, 5)
    assert again.params["pooler"] is trunk.params["pooler"]
    assert again.lineage.operations == (
        "swap_head(sequence-classification, labels=['no', 'yes'], new: head; dropped: nothing)",
        "swap_head(sequence-classification, labels=['LABEL_0', 'LABEL_1', 'LABEL_2', 'LABEL_3', 'LABEL_4'], new: head; "
        "dropped: head)",
    )


@pytest.mark.parametrize(
    ("head", "shapes"),
    [
        (heads.tokens(["O", "B"]), {"logits": (16, 8, 2)}),
        (heads.span(), {"start_logits": (16, 8), "end_logits": (16, 8)}),
        (heads.masked_lm(), {"logits": (16, 8, 64)}),
        (heads.classifier(3, pooling="mean"), {"logits": (16, 3)}),
    ],
    ids=lambda value: value.kind if isinstance(value, Head) else "",
)
def test_a_head_that_does_not_use_the_pooler_drops_it(head, shapes):
    src = swap_head(tiny.source(), head, KEY)
    assert roots(src) == ["embed", "blocks", "head"]
    assert "new: head; dropped: pooler, head" in src.lineage.operations[-1]
    found = outputs(src, tiny.batch())
    assert {name: found[name].shape for name in shapes} == shapes and "pooler_output" not in found
    back = swap_head(src, heads.classifier(2), KEY)
    assert "new: pooler, head; dropped: head" in back.lineage.operations[-1]
    assert outputs(back, tiny.batch())["logits"].shape == (16, 2)


def test_the_draw_is_the_keys():
    one, same, other = (swap_head(tiny.trunk(), heads.classifier(3), jax.random.key(i)) for i in (1, 1, 2))
    assert tiny.same_bits(one.params, same.params)
    assert tiny.bits(one.params["head"]["out"]["kernel"]) != tiny.bits(other.params["head"]["out"]["kernel"])


def mean(params, carry, key):
    return {"features": carry["hidden"].mean(1)}


def project(params, carry, key):
    return {"logits": carry["features"] @ params["w"]}


OWN = Head(
    "own",
    stages=(
        Stage("head/mean", mean, lambda key: {}, writes=("features",)),
        Stage("head/project", project, lambda key: {"w": jax.random.normal(key, (16, 2))}, writes=("logits",)),
    ),
)


def test_a_head_of_ones_own_stages():
    src = swap_head(tiny.source(), OWN, KEY)
    assert roots(src) == ["embed", "blocks", "head"]
    assert list(src.params["head"]) == ["project"] and src.params["head"]["project"]["w"].shape == (16, 2)
    assert outputs(src, tiny.batch())["logits"].shape == (16, 2)
    assert "new: head; dropped: pooler, head" in src.lineage.operations[-1]
    assert roots(swap_head(src, heads.tokens(2), KEY)) == ["embed", "blocks", "head"]
    with pytest.raises(ValueError, match=r"the stages of a head are called 'head' or 'head/...', not 'neck'"):
        swap_head(src, Head("own", stages=(Stage("neck", project, lambda key: {}),)), KEY)


@pytest.fixture(scope="module")
def foreign():
    rng = np.random.default_rng(0)
    weights = {"body": {"w": rng.normal(size=(4, 6)).astype(np.float32)}, "head": {"v": np.ones((6, 2), np.float32)}}
    return from_function({"body": lambda p, x: x @ p["w"], "head": lambda p, x: x @ p["v"]}, weights)


def test_a_foreign_model_takes_a_head_of_the_given_width(foreign):
    src = swap_head(foreign, heads.classifier(3, width=6), KEY)
    assert src.params["body"] is foreign.params["body"]
    assert set(src.params["head"]) == {"out"} and src.params["head"]["out"]["kernel"].shape == (6, 3)
    x = np.ones((5, 4), np.float32)
    logits = apply(src.model, src.params, {"inputs": x})["logits"]
    head = src.params["head"]["out"]
    assert np.allclose(logits, x @ np.asarray(src.params["body"]["w"]) @ head["kernel"] + head["bias"][None], atol=1e-5)
    own = Head("own", stages=(Stage("head/a", _double, lambda key: {"b": jnp.ones(1)}, writes=("logits",)),))
    src = swap_head(swap_head(src, own, KEY), own, KEY)  # the first of the two is dropped whole
    assert [stage.name for stage in src.model.stages] == ["body", "head/a"] and set(src.params["head"]) == {"a"}


def _double(params, carry, key):
    return {"logits": 2.0 * carry["hidden"]}


def test_a_foreign_head_without_a_width_or_a_trunk_is_refused(foreign):
    with pytest.raises(ForeignError, match="give the head its width="):
        swap_head(foreign, heads.classifier(3), KEY)
    alone = from_function({"head": lambda p, x: x @ p["w"]}, {"head": {"w": jnp.ones((4, 2))}})
    with pytest.raises(ValueError, match="the model is one stage, 'head'; name its parts"):
        swap_head(alone, heads.classifier(3, width=4), KEY)


@pytest.mark.parametrize("labels", [0, [], ["a", "a"]])
def test_labels_are_distinct_and_at_least_one(labels):
    with pytest.raises(ValueError, match="labels must be distinct and at least one"):
        heads.classifier(labels)
    with pytest.raises(ValueError, match="labels must be distinct and at least one"):
        heads.tokens(labels)


@pytest.mark.parametrize("base", [None, "int8"])
@pytest.mark.parametrize("keep", [False, True])
def test_an_untied_decoder_starts_as_what_the_adapted_embedding_stands_for(base, keep):
    tied, table = swap_head(tiny.trunk(), heads.masked_lm(), KEY), "embed/word/embedding"
    source = at.attach(quantize(tied, [(table, base)]) if base else tied, [(table, at.lora(2))], KEY)
    source = dataclasses.replace(source, params=moved(source.params))
    if keep:
        source = at.attach(at.merge(source, keep=True, dequantize=True), [(table, at.lora(1))], KEY)
        source = dataclasses.replace(source, params=moved(source.params))
    untied = untie(source)
    assert isinstance(untied.params["head"]["decoder"]["kernel"], jax.Array)
    assert untied.params["embed"] is source.params["embed"]
    got, want = (apply(s.model, s.params, tiny.batch())["logits"] for s in (untied, source))
    zoo.assert_close(got, want)
    assert jnp.abs(want - apply(tied.model, tied.params, tiny.batch())["logits"]).max() > 0.1
