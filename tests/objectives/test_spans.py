"""The loss of a span, against transformers' and against itself under padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.models import apply
from jaxtransfer.objectives import span_cross_entropy
from jaxtransfer.types import View
from tests.models.zoo import from_torch


def view_of(outputs, **batch):
    count = len(outputs["start_logits"])
    batch = {"attention_mask": jnp.ones(outputs["start_logits"].shape), "weight": jnp.ones(count), **batch}
    return View({}, outputs, batch, None, jnp.array(0))


def logits(shape, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return {f"{name}_logits": jax.random.normal(key, shape) for name, key in zip(("start", "end"), keys, strict=True)}


def test_rows_weigh_alike_and_padding_nothing():
    outputs, start, end = logits((3, 5)), jnp.array([1, 0, 4]), jnp.array([2, 0, 4])
    told = {"start_positions": start, "end_positions": end}
    loss, metrics = span_cross_entropy()(view_of(outputs, **told, weight=jnp.array([1.0, 1.0, 0.0])))
    logp = {name: jax.nn.log_softmax(x, axis=-1) for name, x in outputs.items()}
    rows = [-(logp["start_logits"][i, start[i]] + logp["end_logits"][i, end[i]]) / 2 for i in range(2)]
    assert float(loss) == pytest.approx(float(sum(rows)) / 2, rel=1e-6)
    assert float(metrics["weight"]) == 2
    wide = {name: jnp.pad(x, ((0, 0), (0, 3)), constant_values=7.0) for name, x in outputs.items()}
    mask = jnp.pad(jnp.ones((3, 5)), ((0, 0), (0, 3)))
    padded, _ = span_cross_entropy()(view_of(wide, **told, attention_mask=mask, weight=jnp.array([1.0, 1.0, 0.0])))
    assert float(padded) == pytest.approx(float(loss), rel=1e-6)


def test_what_is_masked_has_no_gradient():
    mask = jnp.array([[1, 1, 0]])
    told = {"start_positions": jnp.array([0]), "end_positions": jnp.array([1]), "attention_mask": mask}
    grads = jax.grad(lambda outputs: span_cross_entropy()(view_of(outputs, **told))[0])(logits((1, 3)))
    for grad in grads.values():
        assert np.isfinite(grad).all()
        assert float(grad[0, 2]) == 0
        assert float(jnp.abs(grad).sum()) > 0


def test_both_ends_have_to_be_right():
    outputs = {"start_logits": jnp.array([[0.0, 3], [3, 0]]), "end_logits": jnp.array([[0.0, 3], [3, 0]])}
    told = {"start_positions": jnp.array([1, 1]), "end_positions": jnp.array([1, 0])}
    _, metrics = span_cross_entropy()(view_of(outputs, **told))
    assert float(metrics["accuracy"]) == 0.5


@pytest.mark.torch
def test_without_padding_it_is_the_loss_of_transformers():
    torch = pytest.importorskip("torch")
    theirs, model, params, _ = from_torch("bert", "qa")
    ids, start, end = np.arange(16).reshape(2, 8) + 5, np.array([1, 3]), np.array([2, 3])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), start_positions=torch.tensor(start), end_positions=torch.tensor(end)).loss
    outputs = apply(model, params, {"input_ids": ids.astype(np.int32)})
    loss, _ = span_cross_entropy()(view_of(outputs, start_positions=jnp.array(start), end_positions=jnp.array(end)))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
