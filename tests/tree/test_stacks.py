import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtransfer.tree import TreeError, flatten, layers_of, layout, stack, unstack
from jaxtransfer.tree.stacks import is_list, run_of, stacked_length
from tests.tree.test_paths import Pair
from tests.tree.trees import draw, equal, trees


def layer(seed=0, width=3, dtype="float32"):
    return {"mlp": {"kernel": draw((width, 2), dtype, seed), "bias": draw((2,), dtype, seed + 1)}}


def blocks(*layers):
    return {"embed": {"w": draw((4, 3), "float32", 9)}, "blocks": {str(i): item for i, item in enumerate(layers)}}


@given(st.lists(trees(), min_size=1, max_size=3), st.data())
def test_unstack_inverts_stack(kinds, data):
    layers = data.draw(st.lists(st.sampled_from(range(len(kinds))), min_size=1, max_size=6))
    labels = data.draw(st.lists(st.booleans(), min_size=len(layers), max_size=len(layers)))
    tree = {"x": {"blocks": {str(i): kinds[kind] for i, kind in enumerate(layers)}}, "other": kinds[0]}
    marks = {
        "x": {"blocks": {str(i): jax.tree.map(lambda _, i=i: labels[i], kinds[k]) for i, k in enumerate(layers)}},
        "other": jax.tree.map(lambda _: True, kinds[0]),
    }
    table = layout(tree, marks)
    laid = stack(tree, table)
    assert equal(unstack(laid), tree)
    runs = table["x/blocks"]
    assert [i for start, stop in runs for i in range(start, stop)] == list(range(len(layers)))
    for (start, stop), (following, _) in zip(runs, [*runs[1:], (len(layers), None)], strict=True):
        assert all(labels[i] == labels[start] for i in range(start, stop)) and following == stop
    canonical = sorted(path for laid_path in flatten(laid) for path in layers_of(laid_path))
    assert canonical == sorted(flatten(tree))


def test_like_layers_are_one_stack_with_a_leading_axis():
    tree = blocks(layer(0), layer(1), layer(2))
    assert layout(tree) == {"blocks": ((0, 3),)}
    laid = stack(tree, layout(tree))
    assert list(laid["blocks"]) == ["0:3"]
    kernel = laid["blocks"]["0:3"]["mlp"]["kernel"]
    assert kernel.shape == (3, 3, 2) and np.array_equal(kernel[1], tree["blocks"]["1"]["mlp"]["kernel"])
    assert laid["embed"]["w"] is tree["embed"]["w"]


@pytest.mark.parametrize(
    "odd",
    [
        layer(width=4),
        layer(dtype="float16"),
        {**layer(), "extra": draw((1,), "float32", 0)},
        {"mlp": {**layer()["mlp"], "bias": None}},
        {"mlp": {**layer()["mlp"], "kernel": Pair(draw((3, 2), "float32", 0), draw((), "float32", 0))}},
    ],
    ids=["shape", "dtype", "structure", "absent", "leaf type"],
)
def test_stacks_are_cut_where_layers_differ(odd):
    tree = blocks(layer(0), layer(1), odd, layer(2), layer(3))
    assert layout(tree) == {"blocks": ((0, 2), (2, 3), (3, 5))}
    assert equal(unstack(stack(tree, layout(tree))), tree)


def test_stacks_are_cut_where_labels_differ():
    tree = blocks(layer(), layer(), layer())
    labels = jax.tree.map(lambda _: "frozen", tree)
    labels["blocks"]["2"]["mlp"]["bias"] = "train"
    assert layout(tree, labels) == {"blocks": ((0, 2), (2, 3))}


def test_a_single_layer_is_a_stack_of_one():
    laid = stack(blocks(layer()), {"blocks": ((0, 1),)})
    assert laid["blocks"]["0:1"]["mlp"]["bias"].shape == (1, 2)


def test_lists_deeper_in_the_tree_and_lists_inside_layers():
    inner = {"experts": {"0": layer(0), "1": layer(1)}}
    tree = {"encoder": {"blocks": {"0": inner, "1": inner}}, "decoder": {"blocks": {"0": layer()}}}
    assert layout(tree) == {"encoder/blocks": ((0, 2),), "decoder/blocks": ((0, 1),)}
    laid = stack(tree, layout(tree))
    assert laid["encoder"]["blocks"]["0:2"]["experts"]["1"]["mlp"]["bias"].shape == (2, 2)
    assert equal(unstack(laid), tree)


def test_only_the_lists_asked_for():
    tree = {"enc": {"blocks": {"0": layer(), "1": layer()}}, "dec": {"0": {"blocks": {"0": layer(), "1": layer()}}}}
    assert layout(tree, None, {"enc/blocks"}) == {"enc/blocks": ((0, 2),)}
    assert layout(tree, None, {"dec/0/blocks"}) == {"dec/0/blocks": ((0, 2),)}
    assert layout(tree, None, set()) == {}
    assert layout(tree) == {"enc/blocks": ((0, 2),), "dec": ((0, 1),)}


def test_abstract_and_device_arrays():
    tree = blocks(layer(0), layer(1))
    table = layout(tree)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert layout(abstract) == table
    laid = stack(abstract, table)
    assert laid == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stack(tree, table))
    assert unstack(laid) == abstract
    device = jax.tree.map(jnp.asarray, tree)
    assert equal(stack(device, table), stack(tree, table))
    traced = jax.eval_shape(lambda t: unstack(stack(t, table)), device)
    assert traced == abstract


def test_absent_leaves_stay_absent():
    tree = {"blocks": {"0": {"a": np.ones(2), "b": None}, "1": {"a": np.zeros(2), "b": None}}}
    laid = stack(tree, layout(tree))
    assert laid["blocks"]["0:2"]["b"] is None
    assert unstack(laid)["blocks"]["1"]["b"] is None


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"blocks": ((0, 2),)}, r"the runs of blocks are \(\(0, 2\),\), but it has 0, 1, 2"),
        ({"blocks": ((1, 3), (0, 1))}, "the runs of blocks"),
        ({"blocks": ((0, 4),)}, "the runs of blocks"),
        ({"embed": ((0, 1),)}, r"the runs of embed are \(\(0, 1\),\), but it has w"),
        ({"blocks": ((0, 3),), "decoder": ((0, 1),)}, "the tree has no decoder; the layout is another tree's"),
    ],
)
def test_a_layout_of_another_tree_is_refused(table, complaint):
    with pytest.raises(TreeError, match=complaint):
        stack(blocks(layer(), layer(), layer()), table)


@pytest.mark.parametrize("odd", [layer(width=4), layer(dtype="float16"), {"mlp": {"kernel": np.ones((3, 2))}}])
def test_unlike_layers_are_never_stacked(odd):
    with pytest.raises(TreeError, match="blocks/1 is not like blocks/0 in structure, shapes or dtypes"):
        stack(blocks(layer(), odd), {"blocks": ((0, 2),)})


def test_what_is_a_list_and_what_is_a_run():
    assert is_list({"1": 0, "0": 0}) and not is_list({"0": 0, "2": 0}) and not is_list({}) and not is_list([0])
    assert run_of("8:12") == (8, 12) and run_of("8") is None and run_of("a8:12") is None
    assert layers_of("x/8:10/w@a") == ["x/8/w@a", "x/9/w@a"]
    assert stacked_length("x/8:10/w@a") == 2 and stacked_length("x/8/w") is None
