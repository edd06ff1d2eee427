import re

import jax
import jax.numpy as jnp
import pytest

from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import groups, quantize, subtrees
from jaxtransfer.models.foreign import from_function
from jaxtransfer.tree import RuleError, flatten, match
from jaxtransfer.types import Head, Model, Stage
from tests import tiny

KEY = jax.random.key(0)


def by_label(src, rules):
    """label -> the stages that have it."""
    found = {}
    for path, label in flatten(tiny.labels_of(src, rules)).items():
        stage = next(stage.name for stage in src.model.stages if path.startswith(f"{stage.name}/"))
        found.setdefault(label, set()).add(stage)
    return found


def test_recipes():
    src = tiny.source()
    blocks = {f"blocks/{i}" for i in range(4)}
    model = src.model
    assert by_label(src, groups.full(model)) == {"trunk": {"embed", "pooler", *blocks}, "head": {"head"}}
    assert by_label(src, groups.head_only(model)) == {"frozen": {"embed", "pooler", *blocks}, "head": {"head"}}
    assert by_label(src, groups.last(model, 0)) == {"frozen": {"embed", *blocks}, "trunk": {"pooler"}, "head": {"head"}}
    assert by_label(src, groups.last(model, 3)) == {
        "frozen": {"embed", "blocks/0"},
        "trunk": {"blocks/1", "blocks/2", "blocks/3", "pooler"},
        "head": {"head"},
    }
    assert by_label(src, groups.last(model, 4)) == {
        "frozen": {"embed"},
        "trunk": {*blocks, "pooler"},
        "head": {"head"},
    }
    assert by_label(tiny.trunk(), groups.full(tiny.trunk().model)) == {"trunk": {"embed", "pooler", *blocks}}


@pytest.mark.parametrize("blocks", [-1, 5])
def test_last_needs_as_many_layers(blocks):
    with pytest.raises(ValueError, match=re.escape(f"last({blocks}): the model has 4 layers")):
        groups.last(tiny.source().model, blocks)


def test_a_recipe_needs_what_it_names():
    bare = tiny.trunk()
    with pytest.raises(RuleError, match=re.escape("rule 'head/.*' matches none")):
        tiny.labels_of(bare, groups.head_only(bare.model))
    flat = from_function(lambda p, x: x * p["w"], {"w": jnp.ones(2)}).model
    with pytest.raises(ValueError, match=re.escape("last(0): the model has 0 layers")):
        groups.last(flat, 0)
    with pytest.raises(ValueError, match="layer-wise decay needs layers; the stages are body"):
        groups.layerwise_decay(flat, {}, 0.5)


def numbered(*names, stats=()):
    """A model of stages that compute nothing."""
    stages = tuple(Stage(name, lambda params, carry, key: {}, lambda key: {"w": jnp.ones(1)}) for name in names)
    return Model("foreign", None, stages, {}, Head("own"), stats)


def test_the_layers_of_a_head_are_none_of_the_trunk():
    model = numbered("embed", "blocks/0", "blocks/1", "head/0", "head/1")
    params = {"embed": {"w": 0}, "blocks": {"0": {"w": 0}, "1": {"w": 0}}, "head": {"0": {"w": 0}, "1": {"w": 0}}}
    labels = flatten(match(groups.last(model, 1), params))
    assert [labels[path] for path in ("blocks/0/w", "blocks/1/w", "head/0/w")] == ["frozen", "trunk", "head"]
    scales = groups.layerwise_decay(model, params, 0.5)
    assert [scales[path] for path in ("blocks/0/w", "blocks/1/w", "head/0/w", "head/1/w")] == [0.25, 0.5, 1.0, 1.0]


def test_layerwise_decay_is_that_of_the_paper():
    """BEiT (Bao et al. 2022): layer l of L, the embeddings being 0, learns at decay^(L + 1 - l), the head at 1."""
    src = tiny.source()
    scales = groups.layerwise_decay(src.model, src.params, 0.5)
    assert scales.keys() == flatten(src.params).keys()
    wanted = {"embed": 2**-5, "blocks/0": 2**-4, "blocks/1": 2**-3, "blocks/2": 2**-2, "blocks/3": 2**-1}
    wanted |= {"pooler": 1.0, "head": 1.0}
    found = {stage: {scales[path] for path in scales if path.startswith(f"{stage}/")} for stage in wanted}
    assert found == {stage: {scale} for stage, scale in wanted.items()}


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5])
def test_a_decay_out_of_range_is_refused(decay):
    src = tiny.source()
    with pytest.raises(ValueError, match=re.escape(f"layer-wise decay must be in (0, 1], got {decay}")):
        groups.layerwise_decay(src.model, src.params, decay)


def test_running_statistics_come_before_every_rule():
    model = numbered("body", "head", stats=(r"body/norm/mean", r"head/norm/mean"))
    params = {"body": {"norm": {"mean": 0, "scale": 0}}, "head": {"w": 0}}  # the old head's statistics are gone
    for rules in (groups.full(model), groups.head_only(model), [(".*", "all")]):
        labels = flatten(groups.labels_of(model, rules, params))
        assert labels["body/norm/mean"] == "stats" and "stats" not in (labels["body/norm/scale"], labels["head/w"])
    with pytest.raises(RuleError, match="no rule covers 1 of 3 leaves: body/norm/scale"):
        groups.labels_of(model, [("head/.*", "head")], params)


def test_labels_have_the_structure_of_the_parameters():
    src = tiny.source()
    labels = tiny.labels_of(src, groups.last(src.model, 2))
    assert jax.tree.structure(labels) == jax.tree.structure(src.params)


def adapted(source):
    """Two adapters on one another, on the head's kernel and on one of the last layer's."""
    inner = [("head/out/kernel", at.lora(2)), ("blocks/3/mlp/up/kernel", at.vera(4))]
    outer = [("head/out/kernel", at.dora(2)), ("blocks/3/mlp/up/kernel", at.lora(2))]
    return at.attach(at.attach(source, inner, KEY), outer, KEY, name="outer")


OUTER = {*(f"head/out/kernel@{part}" for part in ("a", "b", "magnitude")),
         *(f"blocks/3/mlp/up/kernel@{part}" for part in "ab")}  # fmt: skip
SCALES = {"head/out/kernel@scale", "head/out/kernel@base@scale", "blocks/3/mlp/up/kernel@scale"}


@pytest.mark.parametrize("base", [None, "int8"])
def test_of_an_adapted_head_the_outermost_adapter_trains(base):
    plain = tiny.source()
    source = adapted(quantize(plain, [("head/out/kernel", base)]) if base else plain)
    for recipe, label_of_b in ((groups.adapters, "adapter"), (groups.lora_plus, "adapter_b")):
        labels = flatten(tiny.labels_of(source, recipe(source.model)))
        want = {path: label_of_b if path.endswith("@b") else "adapter" for path in OUTER}
        assert {p: label for p, label in labels.items() if label != "frozen"} == want | {"head/out/bias": "head"}


def test_an_adapted_base_trains_with_its_adapters_and_a_constant_never():
    source = adapted(tiny.source())
    model, drawn = source.model, {"shared/vera/default/a", "shared/vera/default/b"}

    def frozen(recipe, *under):
        labels = flatten(tiny.labels_of(source, recipe))
        return {path for path, label in labels.items() if label == "frozen" and path.startswith(under or "")}

    assert frozen(groups.full(model)) == SCALES | drawn
    assert frozen(groups.last(model, 1), "blocks/3/", "pooler/", "head/") == SCALES
    for recipe in (groups.head_only, groups.biases, groups.norms):
        assert frozen(recipe(model), "head/") == {path for path in SCALES if path.startswith("head/")}
    # A rule of the user's own may.
    assert frozen([(r".*@scale", "scales"), *groups.full(model)]) == drawn


def test_of_an_adapted_subtree_the_adapter_trains():
    grown = subtrees.bottleneck(tiny.source(), [("blocks/0", True)], KEY, width=4, where=["mlp"])
    grown = subtrees.prefix_tuning(subtrees.prompt_tuning(grown, KEY, length=2), KEY, length=2)
    down = "blocks/0/adapter/mlp/gelu/down/kernel"
    source = at.attach(grown, [(down, at.lora(2))], KEY)
    labels = flatten(tiny.labels_of(source, groups.adapters(source.model)))
    slots = {path for path in labels if re.search("/(adapter|prompt|prefix)/", path)}
    assert {path for path in slots if labels[path] != "adapter"} == {f"{down}@base", f"{down}@scale"}
    assert {labels[path] for path in labels.keys() - slots} == {"head", "frozen"}


def test_of_a_merged_weight_trains_what_is_read():
    source = at.attach(adapted(tiny.source()), [("blocks/0/mlp/up/kernel", at.ia3())], KEY)
    kept = at.merge(source, keep=True)
    labels = flatten(tiny.labels_of(kept, groups.full(kept.model)))
    read = flatten(at.merge(kept).params)
    assert {path.removesuffix("@value") for path, label in labels.items() if label != "frozen"} == set(read)
    assert "blocks/0/mlp/up/kernel@bias" in labels and "shared/vera/default/a" in labels
