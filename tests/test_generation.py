"""Generation: transformers' greedy tokens, transformers' sampling filters, one cache, streams equal to the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtransfer.adapt.subtrees import prompt_tuning
from jaxtransfer.generation import GenerationError, generate, left_pad, loop, pieces, prompts, stream, stream_text
from jaxtransfer.generation.sampling import Sampling, draw, warp
from jaxtransfer.models import apply, layout_of
from jaxtransfer.parallel import make_mesh, place
from jaxtransfer.tree import stack
from jaxtransfer.types import Head, Lineage, Source
from tests.models import decoder_zoo
from tests.models.zoo import tiny as tiny_bert

NEW = 12
PROMPTS = [list(range(3, 16)), [7, 5, 9], [40, 41, 42, 43, 44, 45, 46, 47]]  # longer and shorter than the windows


def tiny(**overrides):
    return decoder_zoo.tiny("llama", **overrides)


@functools.cache
def greedy():
    """What the tiny Llama says to the prompts."""
    return np.asarray(generate(*tiny(), *left_pad(PROMPTS, 0), max_new_tokens=NEW))


@pytest.mark.torch
@pytest.mark.parametrize("name", decoder_zoo.FAMILIES)
def test_greedy_tokens_are_those_of_transformers(name):
    import torch

    theirs, model, params = decoder_zoo.from_torch(name)
    ids, mask = left_pad(PROMPTS, 0)
    ours = np.asarray(generate(model, params, ids, mask, max_new_tokens=NEW))
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        found = theirs.generate(
            torch.tensor(ids).long(), attention_mask=torch.tensor(mask), do_sample=False, max_new_tokens=NEW,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    wanted = found.sequences[:, ids.shape[1] :].numpy()
    best = torch.stack(found.logits, dim=1).topk(2).values.numpy()
    clear = best[..., 0] - best[..., 1] > 1e-4
    # Behind a near tie that was broken the other way a row goes its own way.
    same = np.logical_and.accumulate((ours == wanted) | clear, axis=1)
    np.testing.assert_array_equal(ours[same & clear], wanted[same & clear])
    assert np.mean(same & clear) >= 0.95
    assert len(np.unique(wanted)) > 3


def test_a_row_does_not_depend_on_its_batch_or_its_padding():
    for row, prompt in enumerate(PROMPTS):
        alone = generate(*tiny(), [prompt], max_new_tokens=NEW)
        np.testing.assert_array_equal(alone[0], greedy()[row])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma2", "gemma3_text"])
def test_a_soft_prompt_stays_within_windows_however_rows_are_padded(name):
    model, params = decoder_zoo.tiny(name)
    prompted = prompt_tuning(Source(model, params, Lineage("memory", "")), jax.random.key(3), length=3)
    ids = np.array([[5, 6, 7, 8]], np.int32)
    padded = {"input_ids": np.pad(ids, ((0, 0), (6, 0))), "attention_mask": np.array([[0] * 6 + [1] * 4], np.int32)}
    padded["position_ids"] = np.maximum(np.cumsum(padded["attention_mask"], axis=1) - 1, 0)
    bare, left = (np.asarray(apply(model, prompted.params, batch)["logits"]) for batch in ({"input_ids": ids}, padded))
    np.testing.assert_allclose(left[:, 6:], bare, atol=1e-5 * np.abs(bare).max())
    new = generate(model, prompted.params, *left_pad([[5, 6, 7, 8]], 0), max_new_tokens=3)[0]
    for token in new:  # a bucket's padding stands before these tokens; without a cache there is none
        assert int(np.asarray(apply(model, prompted.params, {"input_ids": ids})["logits"])[0, -1].argmax()) == token
        ids = np.append(ids, [[token]], axis=1).astype(np.int32)


def test_laid_out_and_sharded_parameters_give_the_same_tokens(devices):
    model, params = tiny()
    ids, mask = left_pad(PROMPTS, 0)
    laid_out = stack(params, layout_of(model, params))
    np.testing.assert_array_equal(generate(model, laid_out, ids, mask, max_new_tokens=NEW), greedy())
    rules = ((r".*/(query|key|value)/kernel", (None, "tensor")), (r".*", ()))
    placed = place(params, make_mesh(fsdp=4, tensor=2), rules)
    columns = list(stream(model, placed, ids, mask, max_new_tokens=NEW))
    np.testing.assert_array_equal(np.stack(columns, axis=1), greedy())


def test_what_stands_before_every_prompt_takes_positions_and_is_attended_to():
    model, params = tiny()
    soft = jax.random.normal(jax.random.key(0), (3, 20))
    params = {**params, "embed": {**params["embed"], "prompt": {"embedding": soft}}}
    ids = np.full((1, 26), 5, np.int32)
    found = np.asarray(generate(model, params, ids, max_new_tokens=12))[0]
    logits = apply(model, params, {"input_ids": np.append(ids, found[None], axis=1)})["logits"][0]
    np.testing.assert_array_equal(found, np.argmax(logits, axis=-1)[25:-1])
    with pytest.raises(GenerationError, match="13 after a prompt of 26 exceed the model's 38 positions"):
        generate(model, params, ids, max_new_tokens=13)


def test_prompts_of_one_bucket_and_temperatures_compile_once():
    model, params = tiny(num_hidden_layers=1)
    key = jax.random.key(0)
    generate(model, params, [[5] * 3], max_new_tokens=2, temperature=1.0, top_p=0.9, key=key)
    sizes = loop._prefill._cache_size(), loop._advance._cache_size()
    generate(model, params, [[6] * 9], max_new_tokens=2, temperature=0.5, top_p=0.7, key=key)
    list(stream(model, params, [[6] * 11], max_new_tokens=2, temperature=0.5, top_p=0.7, key=key))
    assert (loop._prefill._cache_size(), loop._advance._cache_size()) == sizes


def test_a_row_ends_with_its_first_end_token_and_is_padded_behind():
    ends = (int(greedy()[0, 3]), int(greedy()[1, 5]))
    found = np.asarray(generate(*tiny(), *left_pad(PROMPTS, 0), max_new_tokens=NEW, eos_token_id=ends, pad_token_id=77))
    stops = 0
    for row, free in zip(found, greedy(), strict=True):
        at = [i for i, token in enumerate(free) if token in ends]
        stop = at[0] + 1 if at else NEW
        stops += bool(at)
        np.testing.assert_array_equal(row, [*free[:stop], *[77] * (NEW - stop)])
    assert stops >= 2


def test_pads_are_the_first_end_token_and_the_loop_stops_when_all_rows_ended():
    end = int(greedy()[0, 0])
    columns = list(stream(*tiny(), [PROMPTS[0]], max_new_tokens=NEW, eos_token_id=[end, 1]))
    assert [column.tolist() for column in columns] == [[end]]
    found = generate(*tiny(), [PROMPTS[0]], max_new_tokens=NEW, eos_token_id=[end, 1])
    assert found.tolist() == [[end] * NEW]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "key": 3}])
def test_a_stream_is_the_columns_of_the_whole(options):
    options = options | ({"key": jax.random.key(options["key"])} if options else {})
    ids, mask = left_pad(PROMPTS, 0)
    whole = generate(*tiny(), ids, mask, max_new_tokens=NEW, **options)
    columns = list(stream(*tiny(), ids, mask, max_new_tokens=NEW, **options))
    assert {column.shape for column in columns} == {(len(PROMPTS),)}
    np.testing.assert_array_equal(np.stack(columns, axis=1), whole)


def test_the_key_the_row_and_the_step_decide_a_sample():
    model, params = tiny(num_hidden_layers=1)

    def sample(rows, seed):
        return np.asarray(
            generate(model, params, [PROMPTS[0]] * rows, max_new_tokens=NEW, temperature=2.0, key=jax.random.key(seed))
        )

    found = sample(3, 0)
    np.testing.assert_array_equal(sample(3, 0), found)
    np.testing.assert_array_equal(sample(2, 0), found[:2])
    assert (sample(3, 1) != found).any()
    assert (found[0] != found[1]).any()
    assert all(len(set(row)) > 3 for row in found.tolist())


@pytest.mark.torch
@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(0.7, 5, 0.8), (1.3, None, 0.5), (2.0, 1000, None), (1.0, 7, 1e-3)]
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_what_is_kept_is_what_transformers_keeps(temperature, top_k, top_p, spread):
    import torch
    from transformers.generation import logits_process

    logits = np.random.default_rng(0).normal(size=(40, 211)).astype(np.float32) * spread
    scores = logits_process.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    if top_k is not None:
        scores = logits_process.TopKLogitsWarper(top_k)(None, scores)
    ascending = scores.sort().values.softmax(-1).cumsum(-1)
    if top_p is not None:
        assert (ascending - (1 - top_p)).abs().min() > 1e-6, "a sum at the border: rounding decides"
        scores = logits_process.TopPLogitsWarper(top_p)(None, scores)
    found = jax.jit(warp)(jnp.asarray(logits), Sampling(temperature, top_p, top_k))
    np.testing.assert_allclose(found, scores.numpy(), rtol=1e-6)


def test_the_least_that_is_kept_is_one_token_and_ties_stay_together():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1]]))
    kept = {p: np.isfinite(warp(logits, Sampling(1.0, top_p=p))).tolist()[0] for p in (1e-6, 0.39, 0.41, 0.81)}
    assert kept[1e-6] == kept[0.39] == [True, False, False, False, False]
    assert kept[0.41] == [True, True, True, False, False]
    assert kept[0.81] == [True] * 5
    assert np.isfinite(warp(logits, Sampling(1.0, top_k=2))).tolist()[0] == [True, True, True, False, False]


def test_samples_come_as_often_as_their_probabilities_say():
    probs, count = np.array([0.5, 0.3, 0.15, 0.05]), 20_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)) * 2, (count, 4))
    for top_p, wanted in [(None, probs), (0.9, probs * [1, 1, 1, 0] / 0.95)]:
        found = np.bincount(jax.jit(draw)(logits, Sampling(2.0, top_p), jax.random.key(0), 5), minlength=4)
        assert (found[wanted == 0] == 0).all()
        expected = wanted[wanted > 0] * count
        assert np.sum((found[wanted > 0] - expected) ** 2 / expected) < 16.3  # chi-square, 3 degrees, p = 0.001


def test_compiled_steps_hold_one_cache():
    model, params = tiny(num_hidden_layers=8, max_position_embeddings=512)
    work = loop._work(model, params, [[5] * 256] * 16, None, max_new_tokens=128)
    state = jax.eval_shape(lambda: work.prefill())
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    step = loop._advance.lower(model, params, state, np.int32(128), work.how, dtype=jnp.float32).compile()
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 2


def test_dtype_is_that_of_cache_and_activations():
    model, params = tiny(num_hidden_layers=1)
    work = loop._work(model, params, [PROMPTS[0]], None, max_new_tokens=2, dtype=jnp.bfloat16)
    assert jax.eval_shape(work.prefill).cache["key"].dtype == jnp.bfloat16
    assert generate(model, params, [PROMPTS[0]], max_new_tokens=2, dtype=jnp.bfloat16).shape == (1, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is not at least 1"),
        ({"max_new_tokens": 29}, "29 after a prompt of 13 exceed the model's 41 positions"),
        ({"temperature": -1.0}, "temperature: -1.0 is not 0"),
        ({"temperature": float("nan")}, "temperature: nan is not 0"),
        ({"temperature": 1.0}, "key: sampling at temperature 1.0 needs one"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: 0.0 is not above 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p: 1.1 is not above 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: 0 is not at least 1"),
        ({"top_k": 5}, "temperature: 0 is greedy, where top_k and top_p mean nothing"),
        ({"input_ids": [[1, 2, 101]]}, "token 101 in row 0 is outside the model's vocabulary of 101"),
        ({"input_ids": [1, 2]}, r"expected integers of shape \(B, T\), found int64 of \(2,\)"),
        ({"input_ids": [[1.0]]}, "expected integers"),
        (
            {"input_ids": [[1, 2], [3, 0]], "attention_mask": [[1, 1], [1, 0]]},
            "row 1 is empty, has a hole or is padded",
        ),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "row 0 is empty, has a hole"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "row 0 is empty"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            r"attention_mask: is of shape \(1, 1\), input_ids of \(1, 2\)",
        ),
    ],
)
def test_what_is_refused_before_work(options, message):
    given = {"input_ids": [PROMPTS[0]], "max_new_tokens": 4} | options
    for call in (generate, stream):
        with pytest.raises(GenerationError, match=message):
            call(*tiny(), **given)


def test_models_that_do_not_generate_are_refused():
    with pytest.raises(GenerationError, match="bert has a sequence-classification head and no cache"):
        generate(*tiny_bert(), [[1]], max_new_tokens=1)
    classifier = decoder_zoo.tiny("llama", Head("sequence-classification", ("a", "b")))
    with pytest.raises(GenerationError, match="llama has a sequence-classification head and a cache"):
        generate(*classifier, [[1]], max_new_tokens=1)


def test_the_whole_length_of_the_model_can_be_used_though_a_bucket_is_longer():
    assert generate(*tiny(), [[5] * 33], max_new_tokens=8).shape == (1, 8)
    assert prompts.bucket(33) + 8 > 41


def test_left_pad_refuses_empty_prompts():
    with pytest.raises(GenerationError, match=r"every prompt needs a token, found lengths \[2, 0\]"):
        left_pad([[1, 2], []], 0)
    with pytest.raises(GenerationError, match="every prompt needs a token"):
        left_pad([], 0)


@given(st.integers(1, 100_000))
def test_buckets_hold_their_lengths_and_waste_at_most_a_quarter_or_fifteen(length):
    found = prompts.bucket(length)
    assert length <= found <= max(length + 15, 1.25 * length)
    assert prompts.bucket(found) == found


@functools.cache
def byte_tokenizer():
    """One token a byte, and an end token: every character beyond ASCII is several tokens."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


@functools.cache
def word_tokenizer():
    """Words that carry their leading space, as SentencePiece's do: alone at the start they lose it."""
    import tokenizers
    import transformers

    words = ["\u2581a", "\u2581bc", "d", "\u2581", "."]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "."))
    raw.decoder = tokenizers.decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=12), st.integers(0, 40))
def test_pieces_are_whole_characters_and_join_to_the_text(text, cut):
    tokenizer = byte_tokenizer()
    tokens = [*tokenizer(text)["input_ids"][: max(cut, 1)], tokenizer.eos_token_id]
    found = list(pieces(tokens, tokenizer))
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(found) == whole
    assert all(found)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found[:-1])
        assert len(found) >= len(whole.rstrip("\N{REPLACEMENT CHARACTER}"))  # nothing is held longer than needed


@given(st.lists(st.integers(0, 5), max_size=8))
def test_pieces_keep_the_spaces_of_words(tokens):
    tokenizer = word_tokenizer()
    assert "".join(pieces(tokens, tokenizer)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_text_is_continued_in_pieces():
    tokenizer = byte_tokenizer()
    model, params = tiny(vocab_size=258)
    options = {"max_new_tokens": NEW, "temperature": 1.0, "top_k": 40, "top_p": 0.95, "key": jax.random.key(0)}
    tokens = generate(model, params, [tokenizer("ab")["input_ids"]], eos_token_id=tokenizer.eos_token_id, **options)
    found = list(stream_text(model, params, tokenizer, "ab", **options))
    assert "".join(found) == tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert len(found) > 1
    with pytest.raises(GenerationError, match="prompt: '' has no tokens; the tokenizer's start is '<s>'"):
        stream_text(model, params, tokenizer, "", max_new_tokens=1)
    with pytest.raises(GenerationError, match=r"prompt: holds '.ud800' at character 1, half of a surrogate pair"):
        stream_text(model, params, tokenizer, "a\ud800", max_new_tokens=1)


def test_a_text_follows_the_prompt_and_not_what_ends_a_text():
    """The tokenizer puts an end behind every text, and no model was trained on what comes after it."""
    from tokenizers import processors

    ended, (model, params) = byte_tokenizer.__wrapped__(), tiny(vocab_size=258)
    ended.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ended.eos_token_id)]
    )
    assert ended("ab")["input_ids"][-1] == ended.eos_token_id
    texts = ["".join(stream_text(model, params, each, "ab", max_new_tokens=NEW)) for each in (ended, byte_tokenizer())]
    assert texts[0] == texts[1]
