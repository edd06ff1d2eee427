"""The task from texts to numbers: what is hidden, how often, and that nothing else of a batch differs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.data import DataError, batches, from_records
from jaxtransfer.models import apply, family, init
from jaxtransfer.models.projection import PROJECTION
from jaxtransfer.objectives import IGNORE
from jaxtransfer.source import load
from jaxtransfer.tasks import collect, masked_lm
from jaxtransfer.tasks.masked_lm import mask_tokens
from jaxtransfer.tasks.metrics_language import masked_language
from jaxtransfer.types import Head, View
from tests import torch_reference
from tests.job.world import MODEL, WORDS, texts, write_source
from tests.language import byte_tokenizer

PAD, UNK, CLS, SEP, MASK = range(5)
TASK = masked_lm(max_length=12)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return load(write_source(tmp_path_factory.mktemp("world") / "source"), head=None)


@pytest.fixture(scope="module")
def processor(source):
    return TASK.processor(source)


@pytest.fixture(scope="module")
def data():
    long = " ".join(["lamp", "chair", "good", "nothing", "book"] * 5)  # 25 tokens, of which 5 are unknown: 3 pieces
    return from_records([*({"text": row["text"]} for row in texts(6, 0)), {"text": long}], "memory")


def batch_of(examples):
    (batch,) = batches(examples, batch=len(examples) + 1, shuffle=False, buckets=(12,), epochs=1)
    return batch


def test_rows_are_pieces_between_special_tokens(processor, data):
    batch = batch_of(TASK.prepare(processor, data, train=True))
    ids, targets = batch["input_ids"][:-1], batch["targets"][:-1]
    assert batch["document"][:-1].tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6]
    assert set(ids[:, 0].tolist()) == {CLS}
    assert [row[row != PAD][-1] for row in ids] == [SEP] * 9
    inside = np.concatenate([row[(row != CLS) & (row != SEP) & (row != PAD)] for row in ids[6:]])
    assert inside.tolist() == processor(data[6]["text"], add_special_tokens=False)["input_ids"]
    assert (inside == UNK).sum() == 5
    np.testing.assert_array_equal(targets, np.where(ids > MASK, ids, IGNORE))
    assert set(batch["targets"][-1].tolist()) == {IGNORE}, "a row of padding"
    (note,) = TASK.prepare(processor, data, train=True).notes
    assert note == "memory: 7 texts split into 9 pieces of up to 12"


def test_only_tokens_of_the_text_are_hidden_and_as_many_as_said(processor, data):
    examples = TASK.prepare(processor, data, train=True)
    batch = batch_of(examples)
    for key in map(jax.random.key, range(3)):
        out = TASK.augment(batch, key)
        ids, labels = np.asarray(out["input_ids"]), np.asarray(out["labels"])
        hidden = labels != IGNORE
        np.testing.assert_array_equal(labels[hidden], batch["targets"][hidden])
        np.testing.assert_array_equal(ids[~hidden], batch["input_ids"][~hidden])
        may = (batch["targets"] != IGNORE).sum(1)
        want = np.where(may > 0, np.maximum(1, np.round(0.15 * may)), 0)
        np.testing.assert_array_equal(hidden.sum(1), want)
        assert want[-1] == 0


def test_every_step_hides_others_and_the_same_step_the_same(processor, data):
    batch = batch_of(TASK.prepare(processor, data, train=True))
    one, same, other = (np.asarray(TASK.augment(batch, jax.random.key(i))["labels"]) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any(1)[:-1].mean() > 0.5


def test_eight_in_ten_are_masked_and_one_is_any_token():
    """Of 40,000 hidden tokens: shares within five standard deviations; each token as likely as the others."""
    ids = jnp.full((2000, 40), 7)
    hide = jax.jit(jax.vmap(partial(mask_tokens, mask_token=4, vocabulary=8, rate=0.5)))
    read, labels = map(np.asarray, hide(ids, ids, jax.random.split(jax.random.key(0), 2000)))
    assert (labels == 7).sum(1).tolist() == [20] * 2000
    found = np.bincount(read[labels == 7], minlength=8) / 40_000
    want = np.full(8, 0.1 / 8)
    want[4] += 0.8
    want[7] += 0.1
    assert np.abs(found - want).max() < 5 * np.sqrt(0.8 * 0.2 / 40_000)
    places = (labels == 7).mean(0)
    assert np.abs(places - 0.5).max() < 5 * 0.5 / np.sqrt(2000)


def test_an_evaluation_repeats(processor, data):
    first, again = (batch_of(TASK.prepare(processor, data, train=False)) for _ in range(2))
    for name in ("input_ids", "labels"):
        np.testing.assert_array_equal(first[name], again[name])
    assert "targets" not in first
    whole = batch_of(TASK.prepare(processor, data, train=True))["input_ids"]
    hidden = first["labels"] != IGNORE
    assert hidden.any(1).tolist() == [True] * 9 + [False]
    np.testing.assert_array_equal(np.where(hidden, first["labels"], first["input_ids"]), whole)
    few = TASK.prepare(processor, dataclasses.replace(data, rows=data.rows[:3]), train=False).ragged["labels"][2]
    np.testing.assert_array_equal(few, first["labels"][2, : len(few)], err_msg="other texts are of no matter")


@pytest.fixture(scope="module")
def measured(processor, data):
    """A small model's outputs on an evaluation, whole."""
    model = family("bert").build({**MODEL, "num_hidden_layers": 1, "hidden_size": 16}, Head("masked-lm"))
    batch = batch_of(TASK.prepare(processor, data, train=False))
    with jax.numpy_dtype_promotion("strict"):
        outputs = jax.jit(partial(apply, model, also=(PROJECTION,)))(init(model, jax.random.key(1)), batch)
    return batch, outputs


def test_the_loss_is_that_of_all_logits_at_the_hidden_tokens(measured):
    batch, outputs = measured
    logp = jax.nn.log_softmax(outputs["logits"])
    hidden = batch["labels"] != IGNORE
    nll = -np.take_along_axis(np.asarray(logp), np.where(hidden, batch["labels"], 0)[..., None], -1)[..., 0]
    hits = np.asarray(outputs["logits"]).argmax(-1) == batch["labels"]
    for given in (outputs, {"logits": outputs["logits"]}):
        loss, metrics = TASK.objective(View({}, given, batch, None, jnp.array(0)))
        np.testing.assert_allclose(loss, nll[hidden].mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], hits[hidden].mean(), rtol=1e-5)
        assert float(metrics["weight"]) == hidden.sum()
        observed = TASK.observe(given, batch)
        np.testing.assert_allclose(observed["nll"], (nll * hidden).sum(1), rtol=1e-5)
        np.testing.assert_allclose(observed["hits"], (hits & hidden).sum(1))
        np.testing.assert_array_equal(observed["tokens"], hidden.sum(1))


def test_metrics_are_over_tokens_and_their_intervals_over_texts(measured):
    batch, outputs = measured
    observed = {**TASK.observe(outputs, batch), "index": batch["index"]}
    found = TASK.metrics(collect([jax.device_get(observed)]))
    assert tuple(found) == TASK.metric_names
    loss, _ = TASK.objective(View({}, outputs, batch, None, jnp.array(0)))
    assert found["loss"].value == pytest.approx(float(loss), rel=1e-5)
    assert found["perplexity"].value == pytest.approx(np.exp(float(loss)), rel=1e-5)
    assert {metric.n for metric in found.values()} == {7}
    by_hand = masked_language({name: np.array(values) for name, values in {
        "nll": [6.0, 2.0, 1.0], "tokens": [3, 2, 1], "hits": [1, 0, 1], "document": [0, 0, 1],
    }.items()})  # fmt: skip
    assert by_hand["accuracy"].value == pytest.approx(2 / 6)
    assert (by_hand["accuracy"].low, by_hand["accuracy"].high) == pytest.approx((1 / 5, 1))


REFUSED = {
    "max_length": ({"max_length": 0}, r"max_length: must be at least 1, got 0"),
    "mask_rate": ({"mask_rate": 1.0}, r"mask_rate: must be in \(0, 1\), got 1.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_out_of_range(name):
    options, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        masked_lm(**options)


def test_no_room_for_a_token(processor, data):
    with pytest.raises(DataError, match="max_length: 2 leaves no room beside 2 special tokens"):
        masked_lm(max_length=2).prepare(processor, data, train=True)


def test_a_tokenizer_without_a_mask(tmp_path):
    folder = write_source(tmp_path / "bytes")
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(DataError, match="bytes: its tokenizer has no mask token, which masked-lm hides others behind"):
        TASK.processor(load(folder, head=None))


def test_a_tokenizer_of_more_tokens_than_the_model(source):
    narrow = dataclasses.replace(source.model.config, vocab_size=len(WORDS) - 1)
    model = dataclasses.replace(source.model, config=narrow)
    with pytest.raises(DataError, match=r"source: its tokenizer has 64 tokens, any of which .* draws, its model 63"):
        TASK.processor(dataclasses.replace(source, model=model))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_the_loss_is_torch_s(name, tmp_path):
    """On the same hidden tokens, of `AutoModelForMaskedLM` with the same weights."""
    import torch

    theirs = torch_reference.random_model(name, "mlm", seed=0, num_hidden_layers=1)
    source = load(torch_reference.save(theirs, tmp_path / name, tokenizer=True))
    task = masked_lm(max_length=24)
    records = [
        {"text": text} for text in ("a lamp and a chair, no less", "good", "the book was dull; the film was not")
    ]
    examples = task.prepare(task.processor(source), from_records(records, "memory"), train=False)
    (batch,) = batches(examples, batch=len(examples), shuffle=False, buckets=(24,), epochs=1)
    given = {
        ours: torch.from_numpy(batch[ours].astype(np.int64)) for ours in ("input_ids", "attention_mask", "labels")
    }  # fmt: skip
    with torch.no_grad():
        want = theirs(**given).loss.item()
    outputs = jax.jit(partial(apply, source.model, also=(PROJECTION,)))(source.params, batch)
    loss, _ = task.objective(View(source.params, outputs, batch, None, jnp.array(0)))
    assert float(loss) == pytest.approx(want, rel=1e-5)
