"""The task from records to numbers, with a decoder: packing changes no loss and no gradient."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.data import DataError, batches, from_records, read
from jaxtransfer.models import apply, family
from jaxtransfer.objectives import IGNORE
from jaxtransfer.tasks import causal_lm, collect
from jaxtransfer.tree import flatten
from jaxtransfer.types import Lineage, Source, View
from tests.language import CHAT, EOS, byte_tokenizer, decoder, spell

BYTES = byte_tokenizer()
TEXTS = ["def f(x):", "é", "return x + 1", "import numpy as np, jax", "ab", "x = [1, 2, 3]"]
DATA = from_records([{"text": text} for text in TEXTS], "code")


def batch_of(examples, size):
    (batch,) = batches(examples, batch=len(examples), shuffle=False, buckets=(size,), epochs=1)
    return batch


@jax.jit
def losses(params, batch):
    """What the objective gives, and what is observed of each row."""
    task, source = causal_lm(), decoder()

    def loss(params):
        outputs = apply(source.model, params, batch)
        return *task.objective(View(params, outputs, batch, None, jnp.array(0))), task.observe(outputs, batch)

    def scalar(params):
        value, metrics, observed = loss(params)
        return value, (metrics, observed)

    return jax.value_and_grad(scalar, has_aux=True)(params)


@pytest.fixture(scope="module")
def measured():
    """Of the same texts, packed and a row each: the batch, and what the decoder makes of it."""
    found = {}
    with jax.numpy_dtype_promotion("strict"):
        for name, train in (("packed", True), ("apart", False)):
            batch = batch_of(causal_lm(max_length=32).prepare(BYTES, DATA, train=train), 32)
            found[name] = batch, losses(decoder().params, batch)
    return found


def test_a_packed_row(measured):
    batch, _ = measured["packed"]
    assert batch["input_ids"].shape == (3, 32)
    for row in range(3):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            own = batch["segment_ids"][row] == segment
            ids, labels = batch["input_ids"][row, own], batch["labels"][row, own]
            assert ids[0] == EOS
            assert labels[-1] == EOS
            np.testing.assert_array_equal(ids[1:], labels[:-1])
            assert spell(BYTES, ids[1:]) in TEXTS
        np.testing.assert_array_equal(batch["labels"][row][batch["segment_ids"][row] == 0], IGNORE)
    assert batch["bytes"].sum() == sum(len(text.encode()) for text in TEXTS)
    assert (batch["labels"] != IGNORE).sum() == sum(len(text.encode()) + 1 for text in TEXTS)


def test_rows_that_are_measured(measured):
    batch, _ = measured["apart"]
    assert batch["input_ids"].shape == (6, 32)
    assert "segment_ids" not in batch
    assert batch["bytes"].tolist() == [len(text.encode()) for text in TEXTS]
    assert batch["document"].tolist() == list(range(6))


def test_packing_changes_no_loss(measured):
    """Neither the mean, nor any gradient, nor what is observed."""
    ((loss, (metrics, packed)), grads), ((want, (wanted, apart)), apart_grads) = (
        measured[name][1] for name in ("packed", "apart")
    )
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], wanted["accuracy"], rtol=1e-6)
    assert float(metrics["weight"]) == float(wanted["weight"])
    for name in ("nll", "tokens", "bytes"):
        np.testing.assert_allclose(packed[name].sum(), apart[name].sum(), rtol=1e-5)
    grads, apart_grads = flatten(grads), flatten(apart_grads)
    scale = max(float(jnp.abs(leaf).max()) for leaf in apart_grads.values())
    for path, leaf in apart_grads.items():
        np.testing.assert_allclose(grads[path], leaf, atol=1e-5 * scale, err_msg=path)


def test_packing_changes_no_document(measured):
    """Each segment's loss is that of its document alone; without segments it would not be."""
    batch, _ = measured["packed"]
    source = decoder()

    @jax.jit
    def each(batch):
        logp = jax.nn.log_softmax(apply(source.model, source.params, batch)["logits"])
        known = jnp.where(batch["labels"] == IGNORE, 0, batch["labels"])
        return -jnp.take_along_axis(logp, known[..., None], axis=-1)[..., 0]

    packed, blind = each(batch), each({**batch, "segment_ids": jnp.ones_like(batch["segment_ids"])})
    found, merged, want = {}, {}, measured["apart"][1][0][1][1]["nll"]
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            text = spell(BYTES, batch["input_ids"][row, own][1:])
            found[text], merged[text] = packed[row, own].sum(), blind[row, own].sum()
    np.testing.assert_allclose([found[text] for text in TEXTS], want, rtol=1e-5)
    assert np.abs(np.array([merged[text] for text in TEXTS]) - np.asarray(want)).max() > 0.1


def test_metrics_do_not_depend_on_the_batches():
    task, source = causal_lm(max_length=8, long="split"), decoder()
    examples = task.prepare(BYTES, DATA, train=False)
    assert examples.kept is not None and examples.kept.tolist() == [0, 0, 1, 2, 2, 3, 3, 3, 4, 5, 5]

    @jax.jit
    def observe(batch):
        return {**task.observe(apply(source.model, source.params, batch), batch), "index": batch["index"]}

    def found(batch, buckets):
        loader = batches(examples, batch=batch, shuffle=False, buckets=buckets, epochs=1)
        return task.metrics(collect(jax.device_get(observe(batch)) for batch in loader))

    one, other = found(12, (8,)), found(5, (4, 8))
    assert one.keys() == {"loss", "perplexity", "bits_per_byte"}
    assert set(one) == task.minimize and task.metric in task.minimize
    for name, metric in one.items():
        assert (metric.n, other[name].n) == (6, 6)
        np.testing.assert_allclose([metric.value, metric.low], [other[name].value, other[name].low], rtol=1e-5)


def test_training_on_packed_rows_of_pieces():
    examples = causal_lm(max_length=8, long="split").prepare(BYTES, DATA, train=True)
    assert {len(row) for rows in examples.ragged.values() for row in rows} == {8}
    assert examples.fixed["bytes"].sum() == sum(len(text.encode()) for text in TEXTS)
    assert examples.notes[0] == "code: 4 of 6 documents split into pieces of 8 tokens"
    apart = causal_lm(max_length=8, long="split", packing=False).prepare(BYTES, DATA, train=True)
    assert set(apart.ragged) == {"input_ids", "labels"}
    assert len(apart) > len(examples)


def test_long_documents_are_refused_by_default():
    with pytest.raises(
        DataError, match="code, record 3: has 24 tokens, max_length is 16, which 1 of 6 documents exceed"
    ):
        causal_lm(max_length=16).prepare(BYTES, DATA, train=True)


@pytest.mark.parametrize("train", [True, False])
def test_completions(train):
    task = causal_lm(max_length=16, completion_only=True)
    assert task.columns == ("prompt", "completion")
    batch = batch_of(task.prepare(BYTES, from_records([{"prompt": "1+1=", "completion": "2"}] * 2), train=train), 16)
    counts = batch["labels"] != IGNORE
    assert spell(BYTES, batch["labels"][counts]) == "2<eos>" * 2
    assert batch["bytes"].sum() == 2


def test_chats():
    task = causal_lm(max_length=48, chat=True, chat_template=CHAT)
    talk = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    batch = batch_of(task.prepare(BYTES, from_records([{"messages": talk}]), train=True), 48)
    assert spell(BYTES, batch["labels"][batch["labels"] != IGNORE]) == "2\n"
    assert task.columns == ("messages",)


def test_the_model_of_the_example_and_its_tokenizer():
    files = {path.name: path for path in (Path(__file__).parents[2] / "configs" / "models" / "tiny-llama").iterdir()}
    raw, task = json.loads(files["config.json"].read_text()), causal_lm(max_length=128, long="split")
    model = family(raw["model_type"]).build(raw, task.head)
    tokens = task.processor(Source(model, {}, Lineage("tiny-llama", ""), {"config": raw, "files": files}))
    assert (len(tokens), tokens.eos_token) == (model.config.vocab_size, "<eos>")
    data = read("python:json", ("text",))
    examples = task.prepare(tokens, data, train=False)
    assert max(row.max() for row in examples.ragged["input_ids"]) < len(tokens)
    labels = [
        row for row, document in zip(examples.ragged["labels"], examples.fixed["document"], strict=True) if not document
    ]
    assert spell(tokens, np.concatenate(labels)) == data.strings("text")[0] + "<eos>"
    sizes = examples.fixed["bytes"].sum(), sum(map(len, examples.ragged["labels"]))
    assert sizes[0] == sum(len(text.encode()) for text in data.strings("text"))
    assert sizes[0] / sizes[1] > 2.5


def test_the_head_stays():
    task = causal_lm()
    assert (task.head.kind, task.fresh_head, task.decode) == ("causal-lm", False, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length: must be at least 1"),
        ({"long": "drop"}, "long: 'drop' is not one of error, cut, split"),
        (
            {"chat": True, "completion_only": True},
            "completion_only: reads prompts and completions, chat reads messages",
        ),
        ({"chat_template": CHAT}, "chat_template: is read with chat=True only"),
        ({"chat": True, "long": "split"}, "long: 'split' parts an answer from its question"),
        ({"completion_only": True, "long": "split"}, "long: 'split' parts an answer from its question"),
        ({"z_loss": -1.0}, "z_loss: must be at least 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        causal_lm(**options)
