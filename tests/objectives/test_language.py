"""The loss of a language model against its definition, its gradient against automatic differentiation, its memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import quantized
from jaxtransfer.adapt.adapter_types import LoRA
from jaxtransfer.models import apply
from jaxtransfer.models.projection import PROJECTION, Projection
from jaxtransfer.objectives import IGNORE, cross_entropy, language_model, token_losses
from jaxtransfer.objectives.chunked import chunk_count, map_chunks
from jaxtransfer.objectives.language import losses_of
from jaxtransfer.step import make_eval
from jaxtransfer.tree import combine, partition
from jaxtransfer.types import Head, View
from tests import language, tiny
from tests.models import zoo

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.normal(size=(3, 5, 11)).astype(np.float32)
LABELS = RNG.integers(0, 11, (3, 5)).astype(np.int32)
LABELS[0, 3:] = LABELS[2, 0] = IGNORE
WEIGHT = np.array([1.0, 1.0, 0.0], np.float32)


def view(logits, labels=LABELS, weight=WEIGHT):
    batch = {"labels": jnp.asarray(labels), "weight": jnp.asarray(weight)}
    return View({}, {"logits": jnp.asarray(logits)}, batch, None, jnp.array(0, jnp.int32))


def naive(logits, labels):
    wide = jnp.asarray(logits, jnp.float32)
    log_z = jax.nn.logsumexp(wide, axis=-1)
    return log_z - jnp.take_along_axis(wide, labels[..., None], axis=-1)[..., 0], log_z, wide.mean(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_is_cross_entropy_over_the_tokens_that_count(smoothing):
    loss, metrics = language_model(smoothing)(view(LOGITS))
    want, others = cross_entropy(smoothing)(view(LOGITS))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert metrics.keys() == others.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, others[name], rtol=1e-6)
    assert float(metrics["weight"]) == 8


def test_z_loss():
    plain, _ = language_model()(view(LOGITS))
    loss, _ = language_model(z_loss=0.01)(view(LOGITS))
    log_z = np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))
    counts = (LABELS != IGNORE) & (WEIGHT > 0)[:, None]
    np.testing.assert_allclose(loss - plain, 0.01 * (log_z[counts] ** 2).mean(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_of_every_part(dtype):
    """By random cotangents, against automatic differentiation of the definition."""
    labels = jnp.asarray(np.where(LABELS == IGNORE, 0, LABELS))
    by = tuple(jnp.asarray(RNG.normal(size=LABELS.shape), jnp.float32) for _ in range(3))
    logits = jnp.asarray(LOGITS, dtype)
    (out, pull), (want, pull_naive) = (jax.vjp(lambda z, f=f: f(z, labels), logits) for f in (token_losses, naive))
    for found, expected in zip(out, want, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    (found,), (expected,) = pull(by), pull_naive(by)
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), atol=1e-6 if dtype == jnp.float32 else 1e-2
    )


def test_what_does_not_count_is_out_of_value_and_gradient():
    def loss(logits):
        return language_model(0.1, 1e-3)(view(logits))[0]

    spoilt = LOGITS.copy()
    spoilt[2] = np.nan
    assert float(loss(spoilt)) == float(loss(LOGITS))
    gradient = np.abs(np.asarray(jax.grad(loss)(jnp.asarray(LOGITS)))).sum(-1)
    assert ((gradient > 0) == ((LABELS != IGNORE) & (WEIGHT > 0)[:, None])).all()


def test_no_token_is_no_loss():
    loss, metrics = language_model()(view(LOGITS, np.full_like(LABELS, IGNORE)))
    assert [float(value) for value in (loss, *metrics.values())] == [0, 0, 0, 0]


def test_extreme_logits():
    losses, *_ = token_losses(jnp.array([[1e4, -1e4], [1e4, -1e4]]), jnp.array([0, 1]))
    assert losses.tolist() == [0, 2e4]


def test_memory():
    """Of arrays as large as the logits: these, their gradient, and one more. Log-softmax takes four."""
    rows, tokens, vocabulary, width = 2, 64, 4096, 16

    def taken(objective):
        def loss(hidden, kernel, labels):
            return objective(view(hidden @ kernel, labels, np.ones(rows, np.float32)))[0]

        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, tokens, width), (width, vocabulary))]
        labels = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * rows * tokens * vocabulary)

    assert taken(language_model()) < 3.1
    assert taken(language_model(0.1, 1e-4)) < 3.1
    assert taken(cross_entropy()) > 3.5


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


WIDTH = 64
KERNELS = {
    "array": normal(WIDTH, 11),
    "lora": LoRA(normal(WIDTH, 11), normal(WIDTH, 2), normal(2, 11), jnp.float32(0.5)),
    "int8": LoRA(quantized.int8(normal(WIDTH, 11)), normal(WIDTH, 2), normal(2, 11), jnp.float32(0.5)),
    "nf4": LoRA(quantized.nf4(normal(WIDTH, 11)), normal(WIDTH, 2), normal(2, 11), jnp.float32(0.5)),
}


def of_projection(projection, chunks):
    """Loss and metrics of logits that are there only as their factors."""
    batch = {"labels": jnp.asarray(LABELS), "weight": jnp.asarray(WEIGHT)}
    outputs = {"logits": projection.logits(), PROJECTION: projection}
    return language_model(0.1, 1e-3, chunks=chunks)(View({}, outputs, batch, None, jnp.array(0, jnp.int32)))


def moving(projection):
    """What trains: all of an array, of an adapter its own two matrices; the hidden states, the bias."""
    floats = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating), projection)
    return partition(projection, floats if not hasattr(projection.kernel, "a") else lambda path: "base" not in path)


@pytest.mark.parametrize(("kernel", "cap"), [*((kernel, None) for kernel in KERNELS), ("array", 3.0)])
def test_chunks_change_neither_loss_nor_gradient(kernel, cap):
    """Of hidden states, kernel and bias; five tokens a row do not divide into two chunks."""
    trained, rest = moving(Projection(0.1 * normal(3, 5, WIDTH), KERNELS[kernel], normal(11), cap=cap))

    def loss(trained, chunks):
        return of_projection(combine(trained, rest), chunks)

    (wanted, others), gradient = jax.value_and_grad(loss, has_aux=True)(trained, 1)
    (found, metrics), got = jax.value_and_grad(loss, has_aux=True)(trained, 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert metrics.keys() == others.keys()
    assert all(np.isclose(metrics[name], others[name], rtol=1e-6) for name in metrics)
    assert jax.tree.structure(got) == jax.tree.structure(gradient)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(gradient), strict=True):
        assert np.abs(one - other).max() <= 1e-6 * np.abs(other).max()


@pytest.mark.parametrize(("live", "products"), [("both", 3), ("hidden", 2), ("kernel", 2), ("neither", 1)])
def test_a_gradient_that_is_not_asked_for_is_not_formed(live, products):
    hidden, kernel = normal(3, 5, WIDTH), KERNELS["array"]
    functions = {
        "both": jax.grad(lambda h, w: of_projection(Projection(h, w), 5)[0], (0, 1)),
        "hidden": jax.grad(lambda h, w: of_projection(Projection(h, w), 5)[0], 0),
        "kernel": jax.grad(lambda h, w: of_projection(Projection(h, w), 5)[0], 1),
        "neither": lambda h, w: of_projection(Projection(h, w), 5)[0],
    }
    text = jax.jit(functions[live]).lower(hidden, kernel).compile().as_text()
    assert text.count(" dot(") == products


def test_dropout_of_an_adapter_is_drawn_for_every_chunk():
    node = LoRA(jnp.zeros((WIDTH, 11)), KERNELS["lora"].a, KERNELS["lora"].b, jnp.float32(1.0), 0.5)
    labels = jnp.zeros((1, 4), jnp.int32)
    for key, kinds in ((None, 1), (jax.random.key(0), 4)):
        projection = Projection(jnp.ones((1, 4, WIDTH)), node, key=key)
        losses = map_chunks(lambda z, y: token_losses(z, y)[0], projection, labels, 4)
        assert len(np.unique(losses)) == kinds


def test_the_number_of_chunks_follows_from_the_shapes():
    def count(rows, length, width, vocabulary):
        shapes = ((rows, length, width), (width, vocabulary))
        return chunk_count(Projection(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))

    assert count(1, 4096, 4096, 128256) == count(64, 4096, 4096, 128256) == 8
    assert count(8, 1024, 768, 50257) == 32
    assert count(16, 128, 768, 8000) == 1  # small
    assert count(64, 4096, 4096, 16000) == 1  # no larger than the hidden states
    assert count(4096, 3, 16, 4096) == 3  # tokens


def heads():
    """A decoder and an encoder, tied, whose logits are 64 MB: 8 rows, 256 tokens, 8192 words."""
    sizes = {"vocab_size": 8192, "hidden_size": 64, "max_position_embeddings": 256}
    decoder = language.decoder(**sizes, intermediate_size=64, num_hidden_layers=1)
    model, params = zoo.tiny(Head("masked-lm"), **sizes, num_hidden_layers=1)
    return {"causal-lm": decoder, "masked-lm": dataclasses.replace(decoder, model=model, params=params)}


@pytest.mark.parametrize(("head", "remat"), [("causal-lm", None), ("masked-lm", "full")])
def test_a_step_never_holds_the_logits(head, remat):
    source, shape = heads()[head], (8, 256)
    ids = np.zeros(shape, np.int32)
    batch = {"input_ids": ids, "labels": ids, "weight": np.ones(8, np.float32)}
    state, frozen, step = tiny.start(source, objective=language_model(), remat=remat)
    compiled = step.lower(state, frozen, batch).compile()
    assert "[8,256,8192]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.8 * 4 * ids.size * 8192  # whole, they take 3.3 of these
    evaluate = make_eval(source.model, lambda outputs, batch: {"nll": losses_of(outputs, batch["labels"])})
    assert "[8,256,8192]" not in evaluate.lower(state, frozen, batch).compile().as_text()


def test_evaluation_in_chunks():
    source = language.decoder(vocab_size=8192, hidden_size=16, num_hidden_layers=1, max_position_embeddings=256)
    ids = RNG.integers(0, 8192, (8, 256)).astype(np.int32)
    outputs = jax.jit(lambda ids: apply(source.model, source.params, {"input_ids": ids}, also=(PROJECTION,)))(ids)
    assert chunk_count(outputs[PROJECTION]) == 128
    np.testing.assert_allclose(losses_of(outputs, ids), token_losses(outputs["logits"], ids)[0], rtol=1e-5)
    assert PROJECTION not in apply(source.model, source.params, {"input_ids": ids[:1, :2]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing: must be in \[0, 1\)"),
        ({"z_loss": -1.0}, "z_loss: must be at least 0"),
        ({"chunks": 0}, "chunks: must be at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        language_model(**options)
