"""Several trainings as one program: each is the training that it would be by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import groups
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.optim import OPTIMIZERS, Group, optimizer
from jaxtransfer.step import init_state, make_eval, make_step
from jaxtransfer.sweeps import SweepError, stacked, sweep, sweep_eval, unstacked
from jaxtransfer.tree import stack
from jaxtransfer.types import State
from tests import tiny

POINTS = [(0, 1e-2, 0.0), (0, 1e-1, 0.1), (1, 1e-2, 0.1), (1, 1e-1, 0.0)]  # seed, rate, weight decay
SMALL = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.1}


def group(lr, decay):
    return Group("sgd", lr=lr, weight_decay=decay, schedule="cosine", steps=4, warmup=1)


@pytest.fixture(scope="module")
def trained():
    """By point: the state after two steps alone, and the losses; the states and a step to sweep; what is frozen."""
    source = tiny.source(**SMALL)
    labels = tiny.labels_of(source, groups.head_only(source.model))
    txs = [optimizer(labels, {"head": group(*how)}, clip=1.0, traced=True) for _, *how in POINTS]
    starts = [
        init_state(source.model, source.params, labels, tx, jax.random.key(seed))
        for tx, (seed, *_) in zip(txs, POINTS, strict=True)
    ]
    plain, losses = [], []
    for (state, frozen), (seed, *how) in zip(starts, POINTS, strict=True):
        tx = optimizer(labels, {"head": group(*how)}, clip=1.0)
        now = dataclasses.replace(state, opt_state=tx.init(state.params))
        step, seen = make_step(source.model, cross_entropy(), tx, donate=False), []
        for i in range(2):
            now, metrics = step(now, frozen, tiny.batch(seed=10 * seed + i))
            seen.append(float(metrics["loss"]))
        plain.append(now)
        losses.append(seen)
    step = make_step(source.model, cross_entropy(), txs[0])
    return plain, losses, [state for state, _ in starts], starts[0][1], step, source.model


def same(state, other):
    return all(
        np.allclose(a, b, atol=1e-6)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True)
    )


def test_rates_share_batches_and_seeds_have_their_own(trained):
    plain, losses, states, frozen, step, model = trained
    inner, first = sweep(step, states[:2])
    both, now = sweep(inner, [first, stacked(states[2:])], batches="own")
    for i in range(2):
        rows = [tiny.batch(seed=10 * seed + i) for seed in (0, 1)]
        now, metrics = both(now, frozen, {name: np.stack([row[name] for row in rows]) for name in rows[0]})
        assert np.allclose(metrics["loss"], np.reshape([seen[i] for seen in losses], (2, 2)), atol=1e-6)
    found = [state for seed in unstacked(now) for state in unstacked(seed)]
    assert [same(*pair) for pair in zip(found, plain, strict=True)] == [True] * 4
    assert not same(found[0], found[1]) and not same(found[0], found[2])
    evaluate = make_eval(model)
    each = sweep_eval(evaluate)(stacked(found), frozen, tiny.batch())["logits"]
    assert np.allclose(each[3], evaluate(found[3], frozen, tiny.batch())["logits"], atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_its_rate_from_the_state(name):
    params = {"blocks": {str(i): {"kernel": jnp.linspace(0.5, 1.0 + i, 12).reshape(4, 3)} for i in range(2)}}
    labels = jax.tree.map(lambda _: "trunk", params)
    laid = stack(params, {"blocks": ((0, 2),)})
    grads = jax.tree.map(lambda x: 0.1 * x + 0.01, laid)
    one, other = (Group(name, lr=lr, weight_decay=decay) for lr, decay in ((1e-2, 0.1), (3e-2, 0.3)))
    plain, traced = optimizer(labels, {"trunk": other}), optimizer(labels, {"trunk": one}, traced=True)
    mine = optimizer(labels, {"trunk": other}, traced=True)
    wanted, _ = plain.update(grads, plain.init(laid), laid)
    found, _ = traced.update(grads, mine.init(laid), laid)
    different, _ = traced.update(grads, traced.init(laid), laid)
    for a, b, c in zip(*map(jax.tree.leaves, (found, wanted, different)), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-8) and not np.allclose(c, b, rtol=1e-2)


def test_one_that_diverges_leaves_the_others_alone():
    def step(state, frozen, batch):
        finite = jnp.isfinite(state.params["w"])
        new = jnp.where(finite, state.params["w"] + batch, state.params["w"])
        return dataclasses.replace(state, params={"w": new}), {"finite": finite}

    one = State(jnp.zeros((), jnp.int32), {"w": jnp.zeros(())}, {}, (), jax.random.key(0), {})
    both, now = sweep(step, [one, dataclasses.replace(one, params={"w": jnp.full((), jnp.nan)})])
    now, metrics = both(now, {}, jnp.ones(()))
    assert metrics["finite"].tolist() == [True, False] and float(now.params["w"][0]) == 1.0


def test_states_that_differ_are_told(trained):
    states = trained[2]
    wider = dataclasses.replace(states[1], params={"head": {"out": {"bias": jnp.zeros(4)}}})
    with pytest.raises(
        SweepError, match=r"state 1 is not like state 0 at params/head/out/bias: float32\[4\] and float32"
    ):
        sweep(trained[4], [states[0], wider])
    with pytest.raises(SweepError, match="1 state"):
        sweep(trained[4], states[:1])
