"""How well a language model predicts, over whole documents: numpy, float64, on the host."""

import math
from collections.abc import Mapping

import numpy as np

from jaxtransfer.tasks.intervals import Metric, bootstrap_mean


def language(observed: Mapping[str, np.ndarray]) -> dict[str, Metric]:
    """Loss in nats a token, its exponential, and bits a byte of the text.

    ``loss = sum nll / sum tokens``, ``perplexity = exp(loss)``, ``bits_per_byte = sum nll / (ln 2 sum bytes)``. The
    last does not depend on how a tokenizer cuts a text. The intervals are those of a bootstrap over documents, whose
    pieces belong together.

    Args:
      observed: by row, (N,) each: ``nll``, the summed negative log-likelihood of the targets, in nats; ``tokens``, the
        number of targets; ``bytes``, those of UTF-8 that the targets spell; ``document``, which rows are one's.

    Raises:
      ValueError: no targets at all.

    Example:
      >>> rows = {"nll": np.log([2.0**8, 2.0**8]), "tokens": np.array([4, 4]), "bytes": np.array([8, 8])}
      >>> found = language({**rows, "document": np.array([0, 1])})
      >>> {name: round(metric.value, 6) for name, metric in found.items()}
      {'loss': 1.386294, 'perplexity': 4.0, 'bits_per_byte': 1.0}
    """
    nll, tokens, size = _by_document(observed, "nll", "tokens", "bytes")
    return _loss(nll, tokens) | {"bits_per_byte": bootstrap_mean(nll / math.log(2) / size, size)}


def masked_language(observed: Mapping[str, np.ndarray]) -> dict[str, Metric]:
    """Loss in nats a hidden token, its exponential, and the share of hidden tokens that are named.

    ``loss = sum nll / sum tokens``, ``perplexity = exp(loss)``, ``accuracy = sum hits / sum tokens``. The intervals are
    those of a bootstrap over documents.

    Args:
      observed: by row, (N,) each: ``nll``, ``tokens`` and ``document`` as `language` has them, of the hidden tokens;
        ``hits``, how many of these are the likeliest.

    Raises:
      ValueError: no targets at all.

    Example:
      >>> rows = {"nll": np.log([2.0**8, 2.0**8]), "tokens": np.array([4, 4]), "hits": np.array([1, 2])}
      >>> found = masked_language({**rows, "document": np.array([0, 1])})
      >>> {name: round(metric.value, 6) for name, metric in found.items()}
      {'loss': 1.386294, 'perplexity': 4.0, 'accuracy': 0.375}
    """
    nll, tokens, hits = _by_document(observed, "nll", "tokens", "hits")
    return _loss(nll, tokens) | {"accuracy": bootstrap_mean(hits / tokens, tokens)}


def _by_document(observed: Mapping[str, np.ndarray], *names: str) -> list[np.ndarray]:
    """Sums over the rows of each document that has targets."""
    _, document = np.unique(observed["document"], return_inverse=True)
    some = np.bincount(document, np.asarray(observed["tokens"])) > 0
    if not some.any():
        raise ValueError("metrics: no token counts, so there is no loss")
    return [np.bincount(document, np.asarray(observed[name]))[some] for name in names]


def _loss(nll: np.ndarray, tokens: np.ndarray) -> dict[str, Metric]:
    loss = bootstrap_mean(nll / tokens, tokens)
    with np.errstate(over="ignore"):  # of a diverged model
        low, value, high = map(float, np.exp([loss.low, loss.value, loss.high]))
    return {"loss": loss, "perplexity": Metric(value, low, high, loss.n)}
