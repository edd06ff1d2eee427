"""Metrics of language models by hand, and that a tokenizer or the cut of a document changes none of bits a byte."""

import numpy as np
import pytest

from jaxtransfer.tasks.metrics_language import language


def observed(nll, tokens, size, document):
    return {"nll": np.array(nll), "tokens": np.array(tokens), "bytes": np.array(size), "document": np.array(document)}


def test_by_hand():
    found = language(observed([6.0, 2.0, 1.0], [3, 2, 1], [12, 3, 5], [0, 0, 1]))
    assert found["loss"].value == pytest.approx(9 / 6)
    assert found["perplexity"].value == pytest.approx(np.exp(1.5))
    assert found["bits_per_byte"].value == pytest.approx(9 / np.log(2) / 20)
    assert {metric.n for metric in found.values()} == {2}
    assert found["bits_per_byte"].low == pytest.approx(1 / np.log(2) / 5)
    assert found["bits_per_byte"].high == pytest.approx(8 / np.log(2) / 15)
    assert [found["perplexity"].low, found["perplexity"].high] == pytest.approx(
        [np.exp(found["loss"].low), np.exp(found["loss"].high)]
    )


def test_pieces_are_resampled_with_their_document():
    """A hundred pieces of two documents know no more than the two."""
    rng = np.random.default_rng(0)
    nll = rng.normal(5, 1, 100) + np.repeat([0, 10], 50)
    whole = language(observed(nll, np.full(100, 4), np.full(100, 9), np.repeat([0, 1], 50)))["loss"]
    apart = language(observed(nll, np.full(100, 4), np.full(100, 9), np.arange(100)))["loss"]
    assert whole.value == pytest.approx(apart.value)
    assert whole.high - whole.low > 4 * (apart.high - apart.low)


def test_rows_without_targets_do_not_count():
    with_them = language(observed([0.0, 2.0], [0, 2], [0, 3], [0, 1]))
    assert with_them == language(observed([2.0], [2], [3], [1]))
    with pytest.raises(ValueError, match="no token counts"):
        language(observed([0.0], [0], [0], [0]))


def test_a_diverged_model():
    found = language(observed([2000.0], [2], [3], [0]))
    assert found["perplexity"].value == np.inf
    assert np.isnan(language(observed([np.nan], [2], [3], [0]))["bits_per_byte"].value)
