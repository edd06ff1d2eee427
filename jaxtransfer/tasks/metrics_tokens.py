"""How well words are tagged: entities by type and place, else words by class; numpy, float64, on the host."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxtransfer.data.tagged import is_scheme, parts_of
from jaxtransfer.tasks.intervals import Metric, bootstrap_mean, bootstrapped, resample, weights
from jaxtransfer.tasks.metrics import macro_f1

Entity = tuple[str, int, int]
"""A type, the first word, and the one behind the last."""


@dataclasses.dataclass(frozen=True)
class Sentence:
    """What is said of the words of a sentence, (W,) each: tags by number, their probabilities, the true tags."""

    guess: np.ndarray
    probability: np.ndarray
    truth: np.ndarray | None


def sentences(observed: Mapping[str, np.ndarray]) -> Iterator[Sentence]:
    """Sentences, of whose words each begins with one token, out of the pieces that an evaluation observed.

    Args:
      observed: by piece and token (N, T): ``words``, the word that begins there or -1; ``guess``, ``probability`` and,
        where they are known, ``labels``. By piece (N,): ``sentence``, in order.
    """
    _, order = np.unique(observed["sentence"], return_inverse=True)
    for low, high in itertools.pairwise(np.searchsorted(order, np.arange(order[-1] + 2))):
        begins = observed["words"][low:high] >= 0
        guess, probability = (observed[name][low:high][begins] for name in ("guess", "probability"))
        yield Sentence(guess, probability, observed["labels"][low:high][begins] if "labels" in observed else None)


def entities(tags: Sequence[str]) -> list[Entity]:
    """Entities as the CoNLL-2000 scorer finds them: of one type, from a beginning to before the next or an outside.

    IOB, IOBES and BILOU are read alike; an inside without a beginning begins one.

    Example:
      >>> entities(["B-person", "I-person", "O", "I-group", "B-group"])
      [('person', 0, 2), ('group', 3, 4), ('group', 4, 5)]
    """
    found: list[Entity] = []
    before = ("", "")
    for i, (place, kind) in enumerate(map(parts_of, tags)):
        if kind:
            if place in ("B", "S", "U") or kind != before[1] or before[0] in ("E", "S", "L", "U"):
                found.append((kind, i, i))
            found[-1] = (*found[-1][:2], i + 1)
        before = place, kind
    return found


def tagging(observed: Mapping[str, np.ndarray], labels: Sequence[str]) -> dict[str, Metric]:
    """Of tags that mark entities F1, precision and recall over all of them; of any the share of words that are right.

    With TP entities of the right type and place, ``f1 = 2 TP / (labelled + predicted)``, ``precision = TP / predicted``
    and ``recall = TP / labelled``, each 0 where its denominator is (Tjong Kim Sang and Buchholz 2000). ``macro_f1`` is
    the mean over the types that occur, or over classes of words; ``accuracy`` is of words, ``loss`` the cross-entropy
    of one. Intervals are those of a bootstrap over sentences.

    Args:
      observed: as `sentences`, and by piece (N,) ``nll``, in nats.
      labels: the tags, in the order of the logits.

    Raises:
      ValueError: no labels.
    """
    found = list(sentences(observed))
    sizes = np.array([len(each.guess) for each in found], np.float64)
    hits = np.array([np.sum(each.guess == each.truth) for each in found])
    nll = np.bincount(np.unique(observed["sentence"], return_inverse=True)[1], observed["nll"])
    _, table = _counted(found, labels)
    sums = _resampled(table)
    out = {}
    if is_scheme(labels):
        micro = _shares(sums.sum(-1))
        out = {name: bootstrapped(float(values[0]), values[1:], len(found)) for name, values in micro.items()}
    macro = macro_f1(sums[:, 0], sums[:, 1] + sums[:, 2])
    return {
        **out,
        "macro_f1": bootstrapped(float(macro[0]), macro[1:], len(found)),
        "accuracy": bootstrap_mean(hits / sizes, sizes),
        "loss": bootstrap_mean(nll / sizes, sizes),
    }


def by_type(observed: Mapping[str, np.ndarray], labels: Sequence[str]) -> dict[str, dict[str, Metric]]:
    """F1, precision and recall of each type of entity, or of each class of words; see `tagging`."""
    found = list(sentences(observed))
    kinds, table = _counted(found, labels)
    shares = _shares(_resampled(table))
    return {
        kind: {name: bootstrapped(float(x[0, k]), x[1:, k], len(found)) for name, x in shares.items()}
        for k, kind in enumerate(kinds)
    }


def mistakes(observed: Mapping[str, np.ndarray], labels: Sequence[str]) -> list[tuple[float, int, Entity, Entity]]:
    """What is wrong: probability, sentence, what it should be and what is said, the most confident first.

    Of entities each that is said wrongly, beside the true one that it touches first, and each that is missed without a
    word of it being said to be in one; of other tags each word. What is in no entity has the type ``""``.
    """
    out: list[tuple[float, int, Entity, Entity]] = []
    for number, each in enumerate(sentences(observed)):
        assert each.truth is not None
        said, true = (_units(tags, labels) for tags in (each.guess, each.truth))
        for kind, start, stop in said:
            if (kind, start, stop) not in true:
                touched = [unit for unit in true if unit[1] < stop and start < unit[2]]
                sure = float(each.probability[start:stop].min())
                out.append((sure, number, touched[0] if touched else ("", start, stop), (kind, start, stop)))
        for kind, start, stop in true:
            if not any(low < stop and start < high for _, low, high in said):
                sure = float(each.probability[start:stop].min())
                out.append((sure, number, (kind, start, stop), ("", start, stop)))
    return sorted(out, key=lambda mistake: (-mistake[0], mistake[1]))


def _units(tags: np.ndarray, labels: Sequence[str]) -> list[Entity]:
    """Entities, or where tags mark none words by class."""
    names = [labels[int(i)] for i in tags]
    return entities(names) if is_scheme(labels) else [(name, i, i + 1) for i, name in enumerate(names)]


def _counted(found: Sequence[Sentence], labels: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The types, and of each sentence how many are right, labelled and predicted: (N, 3, K) float64."""
    kinds = list(dict.fromkeys(parts_of(label)[1] for label in labels)) if is_scheme(labels) else list(labels)
    kinds = [kind for kind in kinds if kind]
    at = {kind: k for k, kind in enumerate(kinds)}
    table = np.zeros((len(found), 3, len(kinds)))
    for counts, each in zip(table, found, strict=True):
        if each.truth is None:
            raise ValueError("metrics: the sentences have no labels")
        true, said = (set(_units(tags, labels)) for tags in (each.truth, each.guess))
        for row, units in zip(counts, (true & said, true, said), strict=True):
            for kind, _, _ in units:
                row[at[kind]] += 1
    return kinds, table


def _resampled(table: np.ndarray) -> np.ndarray:
    """Sums over sentences, (1 + resamples, 3, K), those of the data themselves first."""
    n, flat = len(table), table.reshape(len(table), -1)
    drawn = resample(n, lambda rng, rows: weights(rng, rows, n) @ flat)
    return np.concatenate([flat.sum(0)[None], drawn]).reshape(-1, *table.shape[1:])


def _shares(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Of counts (R, 3, ...) of what is right, labelled and predicted."""
    right, labelled, predicted = sums[:, 0], sums[:, 1], sums[:, 2]
    return {
        "f1": 2 * right / np.maximum(labelled + predicted, 1),
        "precision": right / np.maximum(predicted, 1),
        "recall": right / np.maximum(labelled, 1),
    }
