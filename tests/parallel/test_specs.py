import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt.adapter_types import LoRA
from jaxtransfer.adapt.quantized_types import int8, nf4
from jaxtransfer.models import family
from jaxtransfer.optim import OPTIMIZERS, Group
from jaxtransfer.parallel import ShardingError, fsdp, make_mesh, place, shardings, state_shardings
from jaxtransfer.tree import RuleError, flatten, layout, match, stack
from tests import tiny


@pytest.fixture
def mesh(devices):
    return make_mesh(data=2, fsdp=2, tensor=2)


def tree():
    layer = {"kernel": np.zeros((6, 4), np.float32), "bias": np.zeros(4, np.float32)}
    return {"embed": {"table": np.zeros((10, 4), np.float32)}, "blocks": {str(i): layer for i in range(3)}}


def specs(tree, mesh, rules):
    return {path: where.spec for path, where in flatten(shardings(tree, mesh, rules)).items()}


RULES = [("blocks/.*/kernel", P("fsdp", "tensor")), ("embed/table", P(None, ("fsdp", "tensor")))]


def test_a_stack_is_sharded_as_its_layers_are(mesh):
    params = tree()
    found = specs(params, mesh, RULES)
    assert found["blocks/2/kernel"] == P("fsdp", "tensor") and found["blocks/2/bias"] == P()
    assert found["embed/table"] == P(None, ("fsdp", "tensor"))
    laid = specs(stack(params, layout(params)), mesh, RULES)
    assert laid["blocks/0:3/kernel"] == P(None, "fsdp", "tensor") and laid["blocks/0:3/bias"] == P()
    with pytest.raises(
        ShardingError, match=r"blocks/0:3/kernel: .* blocks/0/kernel has the spec .* blocks/1/kernel has"
    ):
        specs(stack(params, layout(params)), mesh, [("blocks/1/kernel", P("fsdp"))])
    assert specs(params, mesh, [("blocks/1/kernel", P("fsdp"))])["blocks/1/kernel"] == P("fsdp")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P(None, None, "fsdp"), r"embed/table: the spec .* is longer than the shape \(10, 4\)"),
        (P("expert"), r"embed/table: the mesh has no axis 'expert', it has \('data', 'fsdp', 'sequence', 'tensor'\)"),
        (P(("data", "fsdp")), "embed/table: a dimension of 10 does not divide by dataxfsdp = 4"),
    ],
)
def test_a_spec_that_does_not_fit_names_its_leaf(mesh, spec, message):
    with pytest.raises(ShardingError, match=message):
        shardings(tree(), mesh, [("embed/table", spec)])


def test_packed_parts_that_do_not_divide_say_what_can_be_done(mesh):
    weight = {"kernel": nf4(jax.random.normal(jax.random.key(0), (192, 256)))}  # three blocks over two
    told = "kernel@scales: a dimension of 3 does not divide by fsdp = 2 .*, or leave the weight unquantised: its blocks"
    with pytest.raises(ShardingError, match=told):
        shardings(weight, mesh, [("kernel", P("fsdp", "tensor"))])


def test_a_rule_that_matches_nothing_is_an_error(mesh):
    with pytest.raises(RuleError, match="matches none of 7 leaves"):
        place(tree(), mesh, [("embed/word", P("fsdp"))])


def test_fsdp_splits_the_largest_dimension_that_divides(devices):
    params = {
        "a": {"wide": np.zeros((6, 16)), "odd": np.zeros((7, 9)), "small": np.zeros(8), "tall": np.zeros((32, 16))},
        "b.c": {"(x)": np.zeros((24, 25))},  # a path is no regular expression
    }
    mesh = make_mesh(fsdp=8)
    rules = fsdp(params, mesh, min_size=16)
    assert flatten(match(rules, params, default="whole")) == {
        "a/odd": "whole",
        "a/small": "whole",
        "a/tall": P("fsdp"),
        "a/wide": P(None, "fsdp"),
        "b.c/(x)": P("fsdp"),
    }
    assert fsdp(params, make_mesh(data=8)) == ()


def test_the_parts_of_a_packed_weight_are_split_as_one():
    weight = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    tree = {"up": {"kernel": jax.eval_shape(nf4, weight)}, "down": {"kernel": jax.eval_shape(int8, weight)}}
    tree["lora"] = {"kernel": LoRA(tree["up"]["kernel"], np.zeros((256, 4)), np.zeros((4, 64)), np.ones(()))}

    def found(count):
        rules = fsdp(tree, AbstractMesh((count,), ("fsdp",)), min_size=16)
        return {
            path: spec
            for path, spec in flatten(match(rules, tree, default="whole")).items()
            if "scale" not in path[-5:]
        }

    rows, parts = P("fsdp", None), ("codes", "scales", "spread", "centre")
    four = found(4)
    assert (
        {four[f"up/kernel@{part}"] for part in parts} == {four[f"lora/kernel@base@{part}"] for part in parts} == {rows}
    )
    assert (
        four["down/kernel@q"] == rows
        and four["lora/kernel@a"] == P("fsdp")
        and four["lora/kernel@b"] == P(None, "fsdp")
    )
    # Four blocks of inputs and one group of outputs: neither divides by eight. An adapter is split by itself.
    eight = found(8)
    assert {eight[f"up/kernel@{part}"] for part in parts} == {"whole"} and eight["lora/kernel@a"] == P("fsdp")


def test_tensor_rules_of_bert(mesh):
    src = tiny.source()
    found = specs(src.params, mesh, family("bert").tensor_rules)
    split = {path: spec for path, spec in found.items() if path.startswith("blocks/1/") and spec != P()}
    column, row = P("fsdp", "tensor"), P("tensor", "fsdp")
    wanted = {f"attention/{name}/kernel": column for name in ("query", "key", "value")}
    wanted |= {f"attention/{name}/bias": P("tensor") for name in ("query", "key", "value")}
    wanted |= {"attention/output/kernel": row, "mlp/up/kernel": column, "mlp/up/bias": P("tensor")}
    wanted |= {"mlp/down/kernel": row}
    assert split == {f"blocks/1/{path}": spec for path, spec in wanted.items()}


def test_place_does_not_copy_what_is_there(mesh):
    first = place(tree(), mesh, RULES)
    again = place(first, mesh, RULES)
    for path, leaf in flatten(again).items():
        pointers = [
            [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards] for x in (leaf, flatten(first)[path])
        ]
        assert pointers[0] == pointers[1], path
    assert {shard.data.shape for shard in first["blocks"]["0"]["kernel"].addressable_shards} == {(3, 2)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_sharded_as_their_parameters(mesh, name):
    params = tree()
    laid = stack(params, layout(params))
    labels = jax.tree.map(lambda _: "all", params)
    tx = tiny.transform(labels, Group(name), clip=1.0)
    where = shardings(laid, mesh, RULES)
    abstract = jax.eval_shape(tx.init, laid)
    found = flatten(state_shardings(abstract, laid, where, mesh))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items()}
    wanted, seen = flatten(where), set()
    for path, sharding in found.items():
        owner = next((own for own in wanted if path.endswith(f"/{own}")), None)
        if owner and shapes[path] == flatten(laid)[owner].shape:
            seen.add(owner)
            assert sharding == wanted[owner], path
        else:
            assert sharding == NamedSharding(mesh, P()), path
    assert seen == set(wanted)
    assert any(sharding == NamedSharding(mesh, P()) for sharding in found.values()) or name in ("sgd", "lars")


def test_moments_of_different_groups_find_their_parameters(mesh):
    laid = {"blocks": {"0:2": {"kernel": jnp.zeros((2, 6, 4))}}, "head": {"kernel": jnp.zeros((6, 4))}}
    where = shardings(laid, mesh, [("head/kernel", P("tensor")), (".*", P("fsdp"))])
    labels = {"blocks": {str(i): {"kernel": "trunk"} for i in range(2)}, "head": {"kernel": "head"}}
    tx = tiny.transform(labels)
    found = flatten(state_shardings(jax.eval_shape(tx.init, laid), laid, where, mesh))
    by_end = {path: sharding.spec for path, sharding in found.items() if path.endswith("kernel")}
    assert {spec for path, spec in by_end.items() if path.endswith("head/kernel")} == {P("tensor")}
    assert {spec for path, spec in by_end.items() if path.endswith("0:2/kernel")} == {P(None, "fsdp")}
