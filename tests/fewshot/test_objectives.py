"""The losses of episodes and pairs are their equations, and the library's own step makes them small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import fewshot, probes
from jaxtransfer.data.loader import Examples, batches
from jaxtransfer.fewshot import FewShotError
from jaxtransfer.models import from_function
from jaxtransfer.models.conv4 import conv4
from jaxtransfer.optim import Group
from jaxtransfer.run import fit
from jaxtransfer.step import params_of
from jaxtransfer.tree import flatten
from jaxtransfer.types import Source, View
from tests import tiny


def view(z, batch):
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    return View({}, {"last_hidden_state": jnp.asarray(z)}, batch, None, jnp.array(0))


def episode(ways=3, shots=2, queries=4, width=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.repeat(np.arange(ways), n) for n in (shots, queries)]).astype(np.int32)
    support = np.repeat([1.0, 0.0], [ways * shots, ways * queries]).astype(np.float32)
    z = rng.normal(size=(len(labels), width)).astype(np.float32) + labels[:, None].astype(np.float32)
    return z, {"labels": labels, "support": support, "weight": np.ones(len(labels), np.float32)}


def test_the_loss_of_an_episode_is_the_papers():
    z, batch = episode()
    known = batch["support"] > 0
    centres = np.stack([z[known & (batch["labels"] == k)].mean(axis=0) for k in range(3)])
    apart = ((z[~known][:, None] - centres[None]) ** 2).sum(axis=2)
    own = apart[np.arange(12), batch["labels"][~known]]
    wanted = np.mean(own + np.log(np.exp(-apart).sum(axis=1)))
    loss, metrics = fewshot.prototypical(3)(view(z, batch))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert float(metrics["weight"]) == 12
    np.testing.assert_allclose(metrics["accuracy"], (apart.argmin(axis=1) == batch["labels"][~known]).mean())


def test_the_loss_of_an_episode_knows_no_order_of_its_rows_and_no_padding():
    z, batch = episode()
    loss, metrics = fewshot.prototypical(3)(view(z, batch))
    order = np.random.default_rng(1).permutation(len(z))
    mixed = {name: np.concatenate([value[order], value[:2]]) for name, value in batch.items()}
    mixed["weight"] = np.concatenate([np.ones(len(z)), np.zeros(2)]).astype(np.float32)
    rows = np.concatenate([z[order], np.full((2, 5), 1e3, np.float32)])
    again, counted = fewshot.prototypical(3)(view(rows, mixed))
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    assert float(counted["weight"]) == float(metrics["weight"])


def test_a_class_without_support_is_no_number():
    z, batch = episode()
    loss = jax.jit(lambda z: fewshot.prototypical(4)(view(z, batch))[0])
    assert np.isnan(loss(z))


def pair_batch(width=6, half=4, seed=0):
    z = np.random.default_rng(seed).normal(size=(2 * half, width)).astype(np.float32)
    same = np.array([1, 0] * (half // 2) * 2, np.float32)
    return z, {"same": same, "weight": np.ones(2 * half, np.float32)}


def test_the_loss_of_pairs_is_the_squared_error_of_the_cosine():
    z, batch = pair_batch()
    cosine = [z[i] @ z[i + 4] / np.linalg.norm(z[i]) / np.linalg.norm(z[i + 4]) for i in range(4)]
    loss, metrics = fewshot.pair_similarity()(view(z, batch))
    np.testing.assert_allclose(loss, np.mean((np.array(cosine) - batch["same"][:4]) ** 2), rtol=1e-5)
    assert float(metrics["weight"]) == 4


def test_the_loss_of_pairs_is_symmetric_blind_to_length_and_finite_at_nothing():
    z, batch = pair_batch()
    loss = fewshot.pair_similarity()
    value = loss(view(z, batch))[0]
    np.testing.assert_allclose(loss(view(np.concatenate([z[4:], z[:4]]), batch))[0], value, rtol=1e-6)
    np.testing.assert_allclose(loss(view(z * np.arange(1, 9, dtype=np.float32)[:, None], batch))[0], value, rtol=1e-5)
    z[2] = 0.0
    assert np.isfinite(jax.grad(lambda z: loss(view(z, batch))[0])(z)).all()


def test_an_odd_number_of_rows_is_not_of_pairs():
    z, batch = pair_batch()
    with pytest.raises(FewShotError, match="7 rows is not of pairs"):
        fewshot.pair_similarity()(view(z[:7], batch))


# --- training --------------------------------------------------------------------------------------------------------


def encoder():
    """A vector for each token."""
    table = 0.5 * jax.random.normal(jax.random.key(0), (64, 8))
    return from_function(lambda p, ids: p["table"][ids], {"table": table}, input="input_ids")


def texts(rows=24, seed=0):
    """Texts of two classes, told by the words that they hold."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % 2
    ids = [(rng.integers(1, 32, rng.integers(4, 9)) + 31 * y).astype(np.int32) for y in labels]
    return Examples(ragged={"input_ids": ids}), labels


def test_pairs_tune_an_encoder_by_the_librarys_step():
    examples, labels = texts()
    source = encoder()
    state, frozen, step = tiny.start(source, None, Group(lr=3e-2), objective=fewshot.pair_similarity())
    data = fewshot.pair_batches(examples, fewshot.pairs(labels, 8), buckets=(8,))
    state = fit(step, state, frozen, data, steps=30)
    tuned = Source(source.model, params_of(state, frozen), source.lineage)

    def apart(source):
        """How far the cosines of like texts lie above those of unlike ones, of texts that were not seen."""
        unseen, y = texts(seed=1)
        z = fewshot.embed(source, batches(unseen, batch=8, shuffle=False, buckets=(8,), epochs=1))
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        same = y[:, None] == y[None, :]
        return (z @ z.T)[same].mean() - (z @ z.T)[~same].mean()

    assert apart(tuned) > apart(source) + 0.5


def test_microbatches_of_pairs_are_the_whole_batch():
    examples, labels = texts()
    source = encoder()
    batch = fewshot.pair_batches(examples, fewshot.pairs(labels, 8), buckets=(8,)).batch(0)
    found = []
    for accumulate in (1, 2):
        state, frozen, step = tiny.start(
            source, None, tiny.PLAIN, objective=fewshot.pair_similarity(), accumulate=accumulate
        )
        before = tiny.copied(state)
        after, metrics = step(state, frozen, batch)
        found.append((tiny.gradients(before, after), float(metrics["loss"])))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert tiny.apart(found[1][0], found[0][0]) < 1e-5


def test_embed_is_the_masked_mean_of_the_last_hidden_state():
    examples, _ = texts(rows=6)
    source = encoder()
    found = fewshot.embed(source, batches(examples, batch=4, shuffle=False, buckets=(8, 16), epochs=1))
    for ids, row in zip(examples.ragged["input_ids"], found, strict=True):
        np.testing.assert_allclose(row, source.params["body"]["table"][ids].mean(axis=0), atol=1e-6)


def test_prototypical_networks_learn_classes_that_they_were_never_shown():
    rng = np.random.default_rng(0)
    shapes = np.kron(rng.normal(size=(20, 2, 2)), np.ones((4, 4)))[..., None]  # four squares a class, in noise

    def drawings(classes, each=8):
        labels = np.repeat(classes, each)
        return (shapes[labels] + 1.5 * rng.normal(size=(len(labels), 8, 8, 1))).astype(np.float32), labels

    images, labels = drawings(np.arange(16))
    source = conv4(jax.random.key(0), width=8, blocks=2)
    assert "body/norms_0/mean" in flatten(source.params)
    state, frozen, step = tiny.start(source, None, Group(lr=1e-2), objective=fewshot.prototypical(4))
    data = fewshot.episode_batches(Examples(fixed={"inputs": images}), fewshot.episodes(labels, 4, 2, 3))
    losses = []
    state = fit(step, state, frozen, data, steps=40, log_every=10, callbacks=[losses.append])
    shown = [event["loss"] for event in losses if event["kind"] == "train"]
    assert shown[-1] < 0.6 * shown[0]
    tuned = Source(source.model, params_of(state, frozen), source.lineage)
    unseen, y = drawings(np.arange(16, 20))

    def right(source):
        x = {"inputs": unseen, "index": np.arange(len(unseen))}
        z = fewshot.embed(source, [x])
        tasks = [fewshot.episodes(y, 4, 2, 4)[i] for i in range(20)]
        wanted = np.repeat(np.arange(4), 4)
        found = [
            probes.classify_by_prototypes(
                z[t.queries.ravel()], probes.prototypes(z[t.support.ravel()], np.repeat(np.arange(4), 2), 4)
            )
            for t in tasks
        ]
        return np.mean([np.asarray(p).argmax(axis=1) == wanted for p in found])

    assert right(tuned) > max(0.85, right(source) + 0.05)
