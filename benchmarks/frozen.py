"""Ten epochs of a head on a frozen BERT-L6-H384: its features computed once, every epoch anew, and by torch.

Goal: computed once, all takes at most 1.15 x one forward epoch plus the head's own steps; and a sweep of 32 heads on
the features at most 2 x the time of one.

Usage: python benchmarks/frozen.py [--examples 256] [--rounds 5] [--no-torch]

One round times each part in turn: a forward epoch alone; a pass that keeps the features; the head's ten epochs on them,
loader and all; those of 32 heads at rates of their own; one epoch of all stages; one of torch. Ratios are of the same
round, by the wall's seconds and by the processor's, which other work on the machine disturbs less.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import peers
from cases import BATCH, HEADS, HIDDEN, INNER, LAYERS, LENGTH, VOCABULARY, source

import jaxtransfer as jt
from jaxtransfer.data.loader import Examples, batches
from jaxtransfer.features import Pass, forward, frozen_prefix, kept
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.sweeps import sweep
from jaxtransfer.types import View

EPOCHS, SWEPT = 10, 32


def examples(count):
    """Random tokens, all of them real."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCABULARY, LENGTH).astype(np.int32) for _ in range(count)]
    return Examples(ragged={"input_ids": rows}, fixed={"labels": rng.integers(0, 2, count).astype(np.int32)})


def uses(params, outputs, batch):
    """What training reads."""
    return cross_entropy()(View(params, outputs, batch, jax.random.key(0), jnp.zeros((), jnp.int32)))


class Case:
    """The head on the frozen trunk, ready to be timed part by part."""

    def __init__(self, count):
        self.source, self.rows = source(), examples(count)
        model, params = self.source.model, self.source.params
        labels = jt.groups.labels_of(model, jt.groups.head_only(model), params)
        self.txs = [
            jt.optimizer(labels, {"head": jt.Group(lr=1e-4 * (1 + i))}, clip=1.0, traced=True) for i in range(SWEPT)
        ]
        self.starts = [jt.init_state(model, params, labels, tx, jax.random.key(2)) for tx in self.txs]
        self.frozen = self.starts[0][1]
        self.prefix = frozen_prefix(model, params, labels, self.rows, uses, length=LENGTH)
        self.whole = jt.make_step(model, cross_entropy(), self.txs[0])
        self.step = jt.make_step(self.prefix.rest(), cross_entropy(), self.txs[0])
        self.many, self.states = sweep(self.step, [state for state, _ in self.starts])
        self.forward = forward(self.prefix)
        self.once = Pass(self.prefix, self.frozen, BATCH, (LENGTH,), forward=self.forward)
        self.fields = {*self.prefix.reads, *self.prefix.entries}
        self.features = self.rows

    def loader(self, rows):
        return batches(rows, batch=BATCH, buckets=(LENGTH,), shuffle=True, seed=0)

    def forward_epoch(self):
        data = self.loader(self.rows)
        for _ in range(data.steps_per_epoch):
            found = self.forward(self.frozen, next(data))
        jax.block_until_ready(found)

    def keep(self):
        store = self.once.store(self.rows, None)
        self.once.fill(store, self.rows)
        self.features = kept(self.rows, store)

    def train(self, step, state, rows, epochs):
        data, state = self.loader(rows), jax.tree.map(jnp.copy, state)
        for _ in range(epochs * data.steps_per_epoch):
            batch = next(data)
            if rows is not self.rows:
                batch = {name: batch[name] for name in batch if name in self.fields}
            state, metrics = step(state, self.frozen, batch)
        jax.block_until_ready(metrics["loss"])

    def parts(self):
        """Name -> a function that does one part of a round."""
        one = self.starts[0][0]
        return {
            "forward epoch": self.forward_epoch,
            "features kept": self.keep,
            "head": lambda: self.train(self.step, one, self.features, EPOCHS),
            "32 heads": lambda: self.train(self.many, self.states, self.features, EPOCHS),
            "epoch": lambda: self.train(self.whole, one, self.rows, 1),
        }


def torch_epoch(rows):
    """A function that trains the head for one epoch in torch + transformers, or None without torch."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INNER, num_labels=2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).train()
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    data = batches(rows, batch=BATCH, buckets=(LENGTH,), shuffle=False, epochs=1)
    names = ("input_ids", "attention_mask", "labels")
    runs = [
        peers.torch_run(model, [*model.classifier.parameters()], {n: torch.tensor(b[n]).long() for n in names})
        for b in data
    ]
    return lambda: [run() for run in runs]


def timed(part):
    """Seconds of the wall and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    part()
    return time.perf_counter() - wall, time.process_time() - processor


def main():
    """Prints the parts and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-torch", action="store_true")
    args = parser.parse_args()
    case = Case(args.examples)
    parts = case.parts()
    if not args.no_torch and (theirs := torch_epoch(case.rows)):
        parts["torch epoch"] = theirs
    for part in parts.values():
        part()  # compile
    rounds = [{name: timed(part) for name, part in parts.items()} for _ in range(args.rounds)]
    print(f"{args.examples} x {LENGTH} tokens, batch {BATCH}, {args.rounds} rounds; medians")
    print(f"{'':36}{'wall':>10}{'processor':>12}")
    for name in parts:
        print(f"{name:36}" + "".join(f"{statistics.median(r[name][i] for r in rounds):9.2f} s " for i in (0, 1)))
    rows = {
        "features kept / forward epoch, goal 1.15": lambda r: r["features kept"] / r["forward epoch"],
        "all stages in every epoch / once": lambda r: EPOCHS * r["epoch"] / (r["features kept"] + r["head"]),
        "32 heads / one, goal 2": lambda r: r["32 heads"] / r["head"],
    }
    if "torch epoch" in parts:
        rows["torch / once"] = lambda r: EPOCHS * r["torch epoch"] / (r["features kept"] + r["head"])
    for name, ratio in rows.items():
        found = [[ratio({part: r[part][i] for part in parts}) for r in rounds] for i in (0, 1)]
        print(f"{name:60}" + "".join(f"{statistics.median(values):8.2f}" for values in found))


if __name__ == "__main__":
    main()
