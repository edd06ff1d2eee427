"""Mixup: what is mixed with what, that padding stays out, and that a mesh changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.objectives import mixup
from jaxtransfer.objectives.mixup import partners
from jaxtransfer.parallel import make_mesh

WEIGHT = jnp.array([1, 1, 0, 1, 0, 1, 1, 1], jnp.float32)
REAL = np.asarray(WEIGHT) > 0


def batch(labels=None):
    labels = jnp.arange(8) % 3 if labels is None else labels
    rows = np.arange(8, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 1), np.float32)
    return {"pixel_values": jnp.asarray(rows), "labels": labels, "weight": WEIGHT, "index": jnp.arange(8)}


def test_partners_are_a_permutation_of_the_real_rows():
    seen = np.stack([np.asarray(partners(WEIGHT > 0, jax.random.key(k))) for k in range(200)])
    assert (np.sort(seen, axis=-1) == np.arange(8)).all()
    assert (seen[:, ~REAL] == np.flatnonzero(~REAL)).all()
    assert not np.isin(seen[:, REAL], np.flatnonzero(~REAL)).any()
    shares = [np.mean(seen[:, 0] == row) for row in np.flatnonzero(REAL)]
    assert min(shares) > 0.08 and max(shares) < 0.27  # one in six each


def test_images_and_labels_are_mixed_alike():
    mixed = mixup(1.0, 8)(batch(jnp.arange(8)), jax.random.key(3))
    images, labels = np.asarray(mixed["pixel_values"]), np.asarray(mixed["labels"])
    # Row i holds the value i, so a mixed image is the same combination of the row numbers as its label.
    np.testing.assert_allclose(images, np.broadcast_to((labels @ np.arange(8))[:, None, None, None], images.shape))
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-6)
    shares = labels[REAL][:, REAL].max(-1)
    assert len(np.unique(np.round(shares[shares < 1], 4))) > 2  # each row draws its own
    assert mixed["index"] is not None and (np.asarray(mixed["weight"]) == np.asarray(WEIGHT)).all()


def test_padding_neither_gives_nor_gets():
    spoilt = batch() | {"pixel_values": batch()["pixel_values"].at[2].set(jnp.nan)}
    mixed = mixup(1.0, 3)(spoilt, jax.random.key(0))
    assert np.isfinite(np.asarray(mixed["pixel_values"])[REAL]).all()
    assert np.isnan(np.asarray(mixed["pixel_values"])[2]).all()
    assert (np.asarray(mixed["pixel_values"])[4] == 4).all()
    np.testing.assert_array_equal(mixed["labels"][4], jax.nn.one_hot(4 % 3, 3))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_are_betas(alpha):
    real = {"pixel_values": jnp.arange(4000.0)[:, None], "labels": jnp.zeros(4000, int), "weight": jnp.ones(4000)}
    real["labels"] = jnp.eye(2)[jnp.zeros(4000, int)] * jnp.array([[0.0, 1.0]])
    first = {**real, "pixel_values": jnp.ones((4000, 1)).at[2000:].set(0.0)}
    mixed = np.asarray(mixup(alpha, 2)(first, jax.random.key(0))["pixel_values"])[:, 0]
    differing = mixed[(mixed > 1e-6) & (mixed < 1 - 1e-6)]
    # Var of Beta(a, a) is 1 / (4 (2 a + 1)); shares of nearly 0 or 1 cannot be told from equal partners.
    wanted = np.random.default_rng(0).beta(alpha, alpha, 100_000)
    wanted = wanted[(wanted > 1e-6) & (wanted < 1 - 1e-6)]
    assert differing.mean() == pytest.approx(0.5, abs=0.03)
    assert differing.var() == pytest.approx(wanted.var(), rel=0.06)


def test_several_labels_are_mixed_as_they_are():
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 4)).astype(np.float32))
    mixed = np.asarray(mixup(1.0, 4)(batch(labels), jax.random.key(1))["labels"])
    assert mixed.shape == (8, 4) and ((mixed > 0) & (mixed < 1)).any()
    np.testing.assert_allclose(mixed[REAL].sum(0), np.asarray(labels)[REAL].sum(0), atol=3)
    np.testing.assert_array_equal(mixed[~REAL], np.asarray(labels)[~REAL])


def test_low_precision_stays_low():
    low = batch() | {"pixel_values": batch()["pixel_values"].astype(jnp.bfloat16)}
    mixed = mixup(0.4, 3)(low, jax.random.key(1))
    assert (mixed["pixel_values"].dtype, mixed["labels"].dtype) == (jnp.bfloat16, jnp.float32)


def test_a_mesh_changes_nothing(devices):
    mesh = make_mesh(data=8, devices=devices)
    split = jax.device_put(batch(), NamedSharding(mesh, P(("data", "fsdp"))))
    augment = jax.jit(mixup(0.4, 3))
    alone, together = augment(batch(), jax.random.key(5)), augment(split, jax.random.key(5))
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, rtol=1e-6, err_msg=name)
    assert not np.allclose(alone["pixel_values"], augment(batch(), jax.random.key(6))["pixel_values"])


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match="mixup: alpha must be positive"):
        mixup(alpha, 2)


def test_integers_are_no_images():
    with pytest.raises(ValueError, match="mixup: pixel_values is uint8, expected floats"):
        mixup(1.0, 3)(batch() | {"pixel_values": jnp.zeros((8, 2, 2, 1), jnp.uint8)}, jax.random.key(0))
