"""Digits of one source adapted to another without its labels: MNIST's and USPS's, both ways, method by method.

MNIST: its 10,000 test digits, cropped to their 20 x 20 box and resized to 16 x 16; 8,000 to train on and 2,000 to test.
``--whole`` leaves them their margin, as published tables do: the digits of the two sets then differ in size as well.
USPS: 7,291 and 2,007 digits of 16 x 16. One small network, optimizer, number of steps and batch for all methods; every
term has its paper's weight, or the one named below. No target label is seen before the test, and nothing is chosen by
one, but SHOT's rate and weight: each run is measured once, at its last step. SHOT starts from the network of the source
alone, at a tenth of the rate (at all of it the clusters come apart under other classes' names: 9 to 18 %), and sees no
source; its pseudo-labels weigh 0.1 (at 0.3 one run of 2,400 steps came apart).
The last row is no adaptation: the same network on the target's training digits and their labels, for what is to be had.

Usage: python benchmarks/digits.py [--steps 800] [--seeds 3] [--only NAME ...] [--sources NAME ...] [--whole]
           [--results FILE]

Needs the data sets (``JAXTRANSFER_DATA``).
"""

import argparse
import functools
import gzip
import json
import os
from pathlib import Path
from statistics import fmean

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtransfer.adapt import groups
from jaxtransfer.models.foreign import from_nnx
from jaxtransfer.objectives import aux_of, captures, cross_entropy, shapes_of, states_of, terms, total
from jaxtransfer.optim import Group, optimizer
from jaxtransfer.step import bare, init_state, make_eval, make_step, params_of
from jaxtransfer.study import gain, interval

DATA = Path(os.environ.get("JAXTRANSFER_DATA", Path(__file__).resolve().parent.parent.parent / "shared/data"))
LAYER, BATCH, RATE = "body", 64, 1e-3
PAIRS = (("mnist", "usps"), ("usps", "mnist"))
BOUND = "with labels"


class Body(nnx.Module):
    """Two convolutions of 5 x 5, each behind a maximum over 2 x 2, and a layer of 128 features."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Conv(1, 16, (5, 5), rngs=rngs), nnx.Conv(16, 32, (5, 5), rngs=rngs)
        self.last, self.drop = nnx.Linear(4 * 4 * 32, 128, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for conv in (self.first, self.second):
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
        return self.drop(nnx.relu(self.last(x.reshape(len(x), -1))))


@functools.cache
def network(seed):
    """A source of fresh parameters; the model is one and the same, so its functions compile once."""
    fresh = {"body": lambda key: Body(nnx.Rngs(key)), "head": lambda key: nnx.Linear(128, 10, rngs=nnx.Rngs(key))}
    made = {name: make(jax.random.fold_in(jax.random.key(seed), i)) for i, (name, make) in enumerate(fresh.items())}
    return from_nnx(made, input="pixel_values", init=fresh)


def idx(name):
    raw = gzip.decompress((DATA / "images" / name).read_bytes())
    sizes = [int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in range(1, 1 + raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


@functools.cache
def digits(name, whole):
    """``{"train": (images, labels), "test": ...}``; images (N, 16, 16, 1) in [-1, 1]."""
    if name == "usps":
        held = np.load(DATA / "images/usps.npz")
        found = {part: (held[f"{part}_images"], held[f"{part}_labels"]) for part in ("train", "test")}
    else:
        images, labels = idx("t10k-images-idx3-ubyte.gz"), idx("t10k-labels-idx1-ubyte.gz")
        boxed = jnp.asarray(images if whole else images[:, 4:24, 4:24], jnp.float32) / 255.0
        small = np.asarray(jax.image.resize(boxed, (len(boxed), 16, 16), "linear"))
        found = {"train": (small[:8000], labels[:8000]), "test": (small[8000:], labels[8000:])}
    return {part: (2.0 * x[..., None].astype(np.float32) - 1.0, y.astype(np.int32)) for part, (x, y) in found.items()}


def rows(images, labels=None):
    more = {} if labels is None else {"labels": labels}
    return {"pixel_values": images, "weight": np.ones(len(images), np.float32), **more}


def stream(source, target, seed, whole):
    """Endless batches: rows of the source with labels, and behind them rows of the target without."""
    rng, held = np.random.default_rng(seed), digits(source, whole)["train"]
    unlabelled = digits(target, whole)["train"][0]
    while True:
        one, two = rng.integers(0, len(held[0]), BATCH), rng.integers(0, len(unlabelled), BATCH)
        yield {**rows(held[0][one], held[1][one]), "target": rows(unlabelled[two])}


def methods(steps):
    """Name -> terms."""
    return {
        "source only": [],
        "CORAL": [terms.coral(LAYER, weight=100.0)],
        "MK-MMD": [terms.mmd(LAYER)],
        "DANN": [terms.dann(LAYER, steps, width=128)],
        "CDAN": [terms.cdan(LAYER, steps, entropy=False, width=128)],
        "CDAN+E": [terms.cdan(LAYER, steps, width=128)],
        "MCC": [terms.mcc()],
        "MCD": [terms.mcd(cross_entropy(), LAYER)],
        "SHOT": [terms.information_maximisation(), terms.centroid_labels(LAYER, weight=0.1)],
        BOUND: [],
    }


@functools.cache
def compiled(name, steps):
    """``(terms, shapes, labels, tx, step, evaluate)`` of a method, for all seeds and directions."""
    made, model = methods(steps)[name], network(0).model
    shapes = shapes_of(model, network(0).params, {"pixel_values": np.zeros((2, 16, 16, 1), np.float32)}, made)
    source_free = name == "SHOT"
    task = None if source_free else cross_entropy(0.1)
    recipe = [("head/.*", "frozen"), (".*", "all")] if source_free else [(".*", "all")]
    beside = jax.eval_shape(lambda: aux_of(made, model, jax.random.key(0), shapes))
    labels = groups.labels_of(model, recipe, {**network(0).params, **beside})
    rate = RATE / 10 if source_free else RATE
    tx = optimizer(labels, {"all": Group("adamw", lr=rate, weight_decay=1e-3, steps=steps, schedule="cosine")})
    step = make_step(model, total(task, made) if made else task, tx, capture=captures(made))
    return made, shapes, labels, tx, step, make_eval(model)


def run(name, source, target, seed, steps, whole=False, start=None):
    """``(accuracy on the target's test set in per cent, parameters)``."""
    made, shapes, labels, tx, step, evaluate = compiled(name, steps)
    model, key = network(0).model, jax.random.key(seed)
    params = {**(start or network(seed).params), **aux_of(made, model, jax.random.fold_in(key, 1), shapes)}
    state, frozen = init_state(model, params, labels, tx, key, terms=states_of(made, shapes))
    batches = stream(target if name == BOUND else source, target, seed, whole)
    for _ in range(steps):
        state, _ = step(state, frozen, next(batches))
    x, y = digits(target, whole)["test"]
    found = [
        np.asarray(evaluate(state, frozen, rows(x[i : i + 500]))["logits"]).argmax(1) for i in range(0, len(x), 500)
    ]
    return 100 * float((np.concatenate(found) == y).mean()), bare(params_of(state, frozen))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(methods(1)))
    parser.add_argument("--sources", nargs="+", default=[source for source, _ in PAIRS], help="directions, by source")
    parser.add_argument("--whole", action="store_true", help="MNIST's digits with their margin")
    parser.add_argument("--results", type=Path, help="a JSON file that runs are kept in, and not repeated")
    arguments = parser.parse_args()
    kept = arguments.results
    found = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
    pairs = [pair for pair in PAIRS if pair[0] in arguments.sources]
    for source, target in pairs:
        for name in ("source only", *(n for n in arguments.only if n != "source only")):
            for seed in range(arguments.seeds):
                key = f"{source} to {target} / {name} / {seed}"
                if key in found:
                    continue
                start = None
                if name == "SHOT":
                    start = run("source only", source, target, seed, arguments.steps, arguments.whole)[1]
                found[key] = run(name, source, target, seed, arguments.steps, arguments.whole, start)[0]
                print(f"{key}: {found[key]:.1f}", flush=True)
                if kept is not None:
                    kept.write_text(json.dumps(found, indent=1))
    for source, target in pairs:
        print(f"\n{source} to {target}, accuracy on the target in %, {arguments.seeds} seeds")
        for name in arguments.only:
            one, plain = (
                [found[f"{source} to {target} / {which} / {seed}"] for seed in range(arguments.seeds)]
                for which in (name, "source only")
            )
            span, better = interval(one), gain(one, plain)
            told = "" if name == "source only" else f"  {better.value:+5.1f} [{better.low:+.1f}, {better.high:+.1f}]"
            print(f"{name:12s} {fmean(one):5.1f} [{span.low:.1f}, {span.high:.1f}]{told}")


if __name__ == "__main__":
    main()
