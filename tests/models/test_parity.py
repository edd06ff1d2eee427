"""Parity with torch: outputs, hidden states and gradients of every family under every head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.models import family
from jaxtransfer.models.names import turn
from jaxtransfer.tree import flatten, unstack
from tests import torch_reference
from tests.models import zoo

pytestmark = pytest.mark.torch

ACTIVATION = {"distilbert": "activation"}
REPRESENTATIVES = [
    ("bert", "mlm", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "tie_word_embeddings": False}),
    ("roberta", "mlm", {"hidden_act": "relu"}),
    ("xlm-roberta", "seqcls", {"layer_norm_eps": 1e-5}),
    ("distilbert", "tokencls", {}),
]
MATRIX = [
    (name, head, overrides)
    for name, head in torch_reference.combinations()
    if head != "pretraining"
    for overrides in (
        {},
        {ACTIVATION.get(name, "hidden_act"): "gelu_new"},
        {"tie_word_embeddings": False} if head == "mlm" else {ACTIVATION.get(name, "hidden_act"): "relu"},
        {} if name == "distilbert" else {"layer_norm_eps": 1e-5},
    )
]
CASES = [*REPRESENTATIVES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX)]


def spell(value):
    return "-".join(f"{k}={v}" for k, v in value.items()) or "plain" if isinstance(value, dict) else str(value)


def check_outputs(got, want, model, tolerance):
    checked = set(want) & set(got)
    assert checked >= {model.outputs[entry] for entry in model.stages[-1].writes if entry in model.outputs}
    for name in checked:
        zoo.assert_close(got[name], want[name], tolerance)
    states = [got["captured"][name] for name in zoo.boundaries(model)]
    for ours, theirs in zip(states, want["hidden_states"], strict=True):
        zoo.assert_close(ours, theirs, tolerance)


def check_gradients(case, params, dtype, **tolerances):
    theirs, model, plain, batch = case
    shown = {model.outputs[entry]: None for entry in model.stages[-1].writes if entry in model.outputs} | (
        {"last_hidden_state": None} if model.head is None else {}
    )
    forward = torch_reference.outputs(theirs, batch)
    rng = np.random.default_rng(1)
    cotangents = {name: rng.standard_normal(forward[name].shape).astype(forward[name].dtype) for name in shown}
    rest, embed = zoo.gradients(model, params, batch, cotangents, dtype)
    rest, embed = flatten(unstack(rest)), flatten(unstack(embed))

    stored = torch_reference.gradients(theirs, batch, cotangents)
    plan = family(model.family).names(model).load_plan(stored, list(flatten(plain)))
    want = {path: turn(stored[name], how) for path, (name, how) in plan.used.items()}
    # nn.Embedding(padding_idx=...) reads the padding row in the forward pass and gives it no gradient in the backward
    # pass: an idiosyncrasy of torch and not of the function that is differentiated. Ours has one. So for that row the
    # lookup's part is left out of ours: what remains is what a tied decoder contributes, and zero elsewhere.
    pad, looked_up = model.config.pad_token_id, ["embed/word/embedding"]
    if model.family in ("roberta", "xlm-roberta"):
        looked_up.append("embed/position/embedding")
    for path in looked_up:
        assert np.abs(embed[path][pad]).max() > 0
        embed[path] = embed[path].at[pad].set(0)
    zoo.assert_gradients_close({path: rest[path] + embed[path] for path in rest}, want, **tolerances)


@pytest.mark.parametrize(("name", "head", "overrides"), CASES, ids=spell)
def test_outputs_and_gradients(name, head, overrides):
    case = theirs, model, params, batch = zoo.from_torch(name, head, **overrides)
    params = jax.tree.map(jnp.asarray, zoo.stacked(params))
    check_outputs(zoo.outputs(model, params, batch), torch_reference.outputs(theirs, batch), model, 1e-5)
    check_gradients(case, params, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), [case[:2] for case in MATRIX[::4]], ids=spell)
def test_outputs_and_gradients_unrolled(name, head):
    case = theirs, model, params, batch = zoo.from_torch(name, head)
    params = jax.tree.map(jnp.asarray, params)
    check_outputs(zoo.outputs(model, params, batch), torch_reference.outputs(theirs, batch), model, 1e-5)
    check_gradients(case, params, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", torch_reference.FAMILIES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 13), (2, 37)], ids=str)
def test_odd_sizes(name, shape):
    theirs, model, params, _ = zoo.from_torch(name, "model")
    batch = torch_reference.batch(name, 101, shape, 3)
    got = zoo.outputs(model, zoo.stacked(params), batch)
    check_outputs(got, torch_reference.outputs(theirs, batch), model, 1e-5)


def test_bert_in_float64():
    case = theirs, model, params, batch = zoo.from_torch("bert", "mlm", "float64")
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, zoo.stacked(params))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float64"}
        got = zoo.outputs(model, params, batch, jnp.float64)
        check_outputs(got, torch_reference.outputs(theirs, batch), model, 1e-9)
        check_gradients(case, params, jnp.float64, largest=1e-9, relative=1e-9)


@pytest.mark.parametrize("head", [None, "pooler"])
def test_without_a_mask_everything_is_attended_and_segments_are_zero(head):
    theirs, model, params, batch = zoo.from_torch("bert", "model")
    ids = batch["input_ids"]
    want = torch_reference.outputs(theirs, {"input_ids": ids})
    spelled = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    full = {"input_ids": ids} | (spelled if head else {})
    check_outputs(zoo.outputs(model, zoo.stacked(params), full), want, model, 1e-5)
