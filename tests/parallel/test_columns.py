"""Matrices split by columns: the numbers of whole ones, and no whole one, nor its gradient, in the program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.parallel import fsdp, make_mesh, place, shardings
from jaxtransfer.parallel.columns import Columns
from jaxtransfer.parallel.mesh import BATCH_AXES, SEQUENCE
from jaxtransfer.parallel.specs import gather
from jaxtransfer.tree import weights

ROWS, LENGTH, WIDTH = 8, 8, 16


def ends(count):
    """A table and a head of so many tokens."""
    table, kernel = (np.random.default_rng(i).normal(size=(count, WIDTH)).astype(np.float32) for i in (0, 1))
    return {"word": {"embedding": table}, "head": {"kernel": kernel.T}}


def loss(params, ids):
    """Of a head behind a table, once as it is and once tied."""
    x = weights.take(params["word"]["embedding"], ids)
    own = weights.linear(jnp.tanh(x), params["head"]["kernel"])
    tied = weights.linear(x, weights.transpose(params["word"]["embedding"]))
    return jnp.mean(jnp.tanh(own) * tied)


def compiled(params, ids, mesh, rules):
    """The program of the loss's gradients with columns split, and what it is given."""
    laid = place(params, mesh, rules)
    batch = jax.device_put(ids, NamedSharding(mesh, P(BATCH_AXES, SEQUENCE) if ids.shape[0] > 1 else P()))

    def of(laid, ids):
        return loss(gather(laid, mesh, rules), ids)

    where = shardings(laid, mesh, rules)
    program = jax.jit(jax.value_and_grad(of), out_shardings=(None, where)).lower(laid, batch).compile()
    return program, program(laid, batch)


@pytest.mark.parametrize(
    ("axes", "count", "rows"),
    [
        ({"fsdp": 8}, 64, ROWS),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 64, ROWS),
        ({"fsdp": 4, "sequence": 2}, 50, ROWS),  # of the head's columns the devices have different numbers
        ({"fsdp": 8}, 64, 1),  # rows that cannot be split, as of positions
    ],
)
def test_columns_change_no_number(devices, axes, count, rows, capfd):
    params, mesh = ends(count), make_mesh(**axes)
    ids = np.random.default_rng(2).integers(0, count, (rows, LENGTH)).astype(np.int32)
    rules = fsdp(params, mesh, min_size=1)
    if axes.get("tensor"):
        rules = (("word/embedding", P(None, ("fsdp", "tensor"))), ("head/kernel", P("fsdp", "tensor")))
    _, (value, gradients) = compiled(params, ids, mesh, rules)
    wanted, by = jax.value_and_grad(loss)(params, ids)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), gradients, by)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_no_table_and_no_head_is_ever_whole(devices):
    params, mesh, count = ends(640), make_mesh(fsdp=8), 640
    ids = np.zeros((ROWS, LENGTH), np.int32)
    program, _ = compiled(params, ids, mesh, fsdp(params, mesh, min_size=1))
    sizes = {
        int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"f32\[([\d,]+)\]", program.as_text())
    }
    assert count * WIDTH // 8 in sizes
    assert max(sizes) < count * WIDTH


def test_where_rows_are_more_than_columns_the_kernel_is_gathered(devices):
    mesh = make_mesh(fsdp=8)
    kernel = jax.device_put(np.ones((2, 16), np.float32), NamedSharding(mesh, P(None, "fsdp")))
    x = jax.device_put(np.ones((8, 4, 2), np.float32), NamedSharding(mesh, P("fsdp")))
    run = jax.jit(lambda kernel, x: weights.linear(x, Columns(kernel, mesh, ("fsdp",))))
    many, few = run(kernel, x), run(kernel, x[:, :2])
    assert many.sharding.spec == P("fsdp") and few.sharding.spec[-1] == "fsdp"
    np.testing.assert_array_equal(many, np.full((8, 4, 16), 2.0))


def test_what_becomes_columns(devices):
    mesh = make_mesh(fsdp=8)
    tree = {
        "word": {"embedding": np.zeros((64, 16))}, "head": {"kernel": np.zeros((16, 64)), "bias": np.zeros(64)},
        "square": {"kernel": np.zeros((16, 16))}, "blocks": {"0:2": {"up": {"kernel": np.zeros((2, 16, 64))}}},
    }  # fmt: skip
    rules = [(".*kernel", P(None, "fsdp")), (".*embedding", P(None, "fsdp")), (".*", P())]

    def kinds(columns):
        out = {}

        def look(tree):
            out.update(
                jax.tree.map(
                    lambda x: type(x) is Columns, gather(tree, mesh, rules, columns=columns), is_leaf=weights.is_weight
                )
            )
            return 0

        jax.eval_shape(look, tree)
        return out

    found = kinds(True)
    assert found["word"]["embedding"] and found["head"]["kernel"]
    assert not (found["head"]["bias"] or found["square"]["kernel"] or found["blocks"]["0:2"]["up"]["kernel"])
    assert not any(jax.tree.leaves(kinds(False)))
