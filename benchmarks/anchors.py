"""Frozen features and full fine-tuning on public data, against numbers measured with torch and scikit-learn.

Frozen: the mean of MiniLM's last hidden state over unmasked positions, standardised, logistic regression (C = 0.003).
Full: the recipe as it stands in ``configs/``, three seeds. The reference numbers come from the same splits.

Usage: python benchmarks/anchors.py [--full mr uci-amazon] [--only NAME ...]

Needs the data sets (``JAXTRANSFER_DATA``); a set that is not there is named and skipped.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from jaxtransfer import apply, config, stack
from jaxtransfer.data.dataset import DataError
from jaxtransfer.job.prepare import prepare
from jaxtransfer.job.train import score
from jaxtransfer.models import layout_of
from jaxtransfer.models.encoder import mean_pool
from jaxtransfer.run import Stop
from jaxtransfer.study import interval
from jaxtransfer.tasks import collect

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FDU = "${JAXTRANSFER_DATA}/text/fdu"


def _fdu(file):
    path = f"{FDU}/{file}.task.t[er]*"
    return (("data.train.path", path), ("data.test.path", path))


FROZEN = {  # name: (recipe, overrides, frozen features with torch, TF-IDF)
    "mr": ("mr", (), 72.6, 69.3),
    "trec": ("trec", (), 83.4, 80.0),
    "uci-imdb": ("uci-imdb", (), 89.8, 73.2),
    "uci-amazon": ("uci-amazon", (), 89.2, 81.2),
    "fdu-books": ("fdu-books", _fdu("books"), 73.4, 82.3),
    "fdu-dvd": ("fdu-books", _fdu("dvd"), 77.1, 82.5),
    "fdu-electronics": ("fdu-books", _fdu("electronics"), 77.2, 84.0),
    "fdu-kitchen": ("fdu-books", _fdu("kitchen_housewares"), 77.8, 83.4),
    "afrisenti-pcm": ("afrisenti-pcm", (), 61.8, 60.4),
    "afrisenti-swa": ("afrisenti-swa", (), 57.2, 59.6),
}
FULL = {"mr": 78.9, "uci-amazon": 94.0}


def features(job, split, forward, params):
    """(N, d) mean-pooled features and (N,) labels of a split."""
    parts = []
    for batch in job.loader(split):
        parts.append({"x": np.asarray(forward(params, batch)), "labels": batch["labels"], "index": batch["index"]})
    found = collect(parts)
    return found["x"], found["labels"]


def frozen(name):
    """Accuracy in per cent of the frozen features under a logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    recipe, overrides, _, _ = FROZEN[name]
    job = prepare(config.load(CONFIGS / f"{recipe}.yaml", overrides), lambda text: None)
    params = stack(job.trunk.params, layout_of(job.trunk.model, job.trunk.params))

    @jax.jit
    def forward(params, batch):
        hidden = apply(job.trunk.model, params, batch)["last_hidden_state"]
        return mean_pool(hidden, batch["attention_mask"])

    (x, y), (x_test, y_test) = (features(job, split, forward, params) for split in ("train", "test"))
    scaler = StandardScaler().fit(x)
    probe = LogisticRegression(C=0.003, max_iter=2000).fit(scaler.transform(x), y)
    return 100 * probe.score(scaler.transform(x_test), y_test), len(x), len(x_test)


def full(name):
    """Accuracies in per cent of three seeds of the recipe."""
    job = prepare(config.load(CONFIGS / f"{name}.yaml"), lambda text: None)
    with Stop() as stop:
        return [100 * score(job, seed, scratch=False, stop=stop, callbacks=[]) for seed in range(3)]


def main():
    """Prints a row a set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(FROZEN))
    parser.add_argument("--full", nargs="*", default=[])
    args = parser.parse_args()
    if args.only:
        print(f"{'frozen features':16}{'ours':>7}{'torch':>7}{'TF-IDF':>8}   train/test")
    for name in args.only:
        try:
            value, train, test = frozen(name)
        except DataError as error:
            print(f"{name:16} skipped: {error}")
            continue
        print(f"{name:16}{value:7.1f}{FROZEN[name][2]:7.1f}{FROZEN[name][3]:8.1f}   {train}/{test}", flush=True)
    for name in args.full:
        values = full(name)
        spread = interval(values)
        half = spread.high - spread.value
        seeds = ", ".join(f"{value:.1f}" for value in values)
        print(f"{name:16} full fine-tuning {spread.value:.1f} +- {half:.1f} ({seeds}), torch {FULL[name]}", flush=True)


if __name__ == "__main__":
    main()
