"""Activations at boundaries: by every pooling, in the order of the examples, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.data.loader import Examples, batches
from jaxtransfer.features import FeatureError, extract, last_boundary
from jaxtransfer.models import apply, from_function, layout_of
from jaxtransfer.models import init as fresh
from jaxtransfer.models.registry import family
from jaxtransfer.parallel import make_mesh, place
from jaxtransfer.tree import stack
from jaxtransfer.types import Lineage, Source
from tests import tiny

LENGTHS = [5, 2, 7, 3, 8, 4, 6]


def examples():
    rng = np.random.default_rng(0)
    return Examples(ragged={"input_ids": [rng.integers(0, 64, n).astype(np.int32) for n in LENGTHS]})


def loader(rows=None, **options):
    return batches(rows or examples(), **{"batch": 4, "buckets": (4, 8), "shuffle": False, "epochs": 1} | options)


def alone(source, boundary, row):
    """The activations of one example without padding, (T, d), or (d,)."""
    batch = {"input_ids": row[None], "attention_mask": np.ones_like(row[None])}
    return np.asarray(apply(source.model, source.params, batch, capture=[boundary])["captured"][boundary][0])


@pytest.fixture(scope="module")
def found():
    return {
        pooling: extract(tiny.source(), loader(), ["blocks/1", "pooler"], pooling=pooling)
        for pooling in ("mean", "first", "tokens")
    }


def test_rows_are_in_the_order_of_the_examples_and_padding_counts_nowhere(found):
    for i, row in enumerate(examples().ragged["input_ids"]):
        states = alone(tiny.source(), "blocks/1", row)
        assert np.allclose(found["mean"]["blocks/1"][i], states.mean(0), atol=1e-5)
        assert np.allclose(found["first"]["blocks/1"][i], states[0], atol=1e-5)
        assert np.allclose(found["tokens"]["blocks/1"][i], states, atol=1e-5)
        assert found["tokens"]["blocks/1"][i].shape == (len(row), 16)
    assert all(found[how]["blocks/1"].dtype == np.float32 for how in ("mean", "first"))


def test_padding_may_be_on_the_left():
    source = from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(1)})
    batch = {"inputs": np.array([[[9.0], [9.0], [1.0], [2.0]]], np.float32), "attention_mask": np.array([[0, 0, 1, 1]])}
    found = {how: extract(source, [batch], pooling=how)["body"][0].tolist() for how in ("mean", "first", "tokens")}
    assert found == {"mean": [1.5], "first": [1.0], "tokens": [[1.0], [2.0]]}


def test_what_has_no_positions_stays_as_it_is(found):
    row = examples().ragged["input_ids"][2]
    pooled = alone(tiny.source(), "pooler", row)
    assert np.allclose(found["mean"]["pooler"][2], pooled, atol=1e-5)
    assert np.array_equal(found["mean"]["pooler"], found["first"]["pooler"])
    assert found["tokens"]["pooler"][2].shape == (1, 16)


def test_the_order_of_batches_and_the_layout_do_not_matter(found):
    source = tiny.source()
    laid = dataclasses.replace(source, params=stack(source.params, layout_of(source.model, source.params)))
    other = extract(laid, loader(shuffle=True, seed=3, batch=2), ["pooler"])
    assert np.allclose(other["pooler"], found["mean"]["pooler"], atol=1e-6)


def test_a_mesh_gives_the_same(found, devices):
    mesh, rules = make_mesh(data=2, fsdp=2, devices=devices[:4]), [(r".*/kernel", jax.sharding.PartitionSpec("fsdp"))]
    rules = [*rules, (".*", jax.sharding.PartitionSpec())]
    source = tiny.source()
    placed = dataclasses.replace(source, params=place(source.params, mesh, rules))
    other = extract(placed, loader(), ["blocks/1", "pooler"], mesh=mesh, sharding=rules)
    for name, rows in other.items():
        assert np.allclose(rows, found["mean"][name], atol=1e-5)


def test_images_are_averaged_over_their_positions():
    raw = {"model_type": "cifar-resnet", "depth": 8, "num_channels": 1, "hidden_sizes": [4, 6, 8]}
    model = family("cifar-resnet").build(raw, None)
    source = Source(model, fresh(model, jax.random.key(0)), Lineage("memory", ""), {})
    batch = {"pixel_values": np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)}
    states = np.asarray(apply(model, source.params, batch, capture=["embed"])["captured"]["embed"])
    assert np.allclose(extract(source, [batch], ["embed"])["embed"], states.mean((1, 2)), atol=1e-6)
    each = extract(source, [batch], ["embed"], pooling="tokens")["embed"]
    assert [len(row) for row in each] == [64] * 3 and np.allclose(each[1], states[1].reshape(64, 4), atol=1e-6)
    with pytest.raises(FeatureError, match=r"embed gives activations \(3, 8, 8, 4\), of which 'first' is not defined"):
        extract(source, [batch], ["embed"], pooling="first")


def test_the_last_boundary_is_the_last_hidden_state():
    assert last_boundary(tiny.source()) == last_boundary(tiny.trunk()) == "blocks/3"
    source = from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(2)})
    assert list(extract(source, [{"inputs": np.ones((3, 2), np.float32)}])) == ["body"]


def test_what_cannot_be_extracted_is_refused():
    with pytest.raises(FeatureError, match="there are none to extract"):
        extract(tiny.source(), [])
    with pytest.raises(FeatureError, match="pooling: 'max' is not one of mean, first, tokens"):
        extract(tiny.source(), loader(), pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no stage is called 'block/1'"):
        extract(tiny.source(), loader(), ["block/1"])
