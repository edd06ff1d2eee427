"""A whole run in miniature: a BERT of two blocks with its tokenizer, a few texts, and a configuration of both."""

import copy
import io
import json
import os
import random
import signal
from pathlib import Path

import jax

from jaxtransfer import config as configs
from jaxtransfer.job import prepare
from jaxtransfer.models import family, init
from jaxtransfer.source import export
from jaxtransfer.types import Lineage, Source

GOOD, BAD = ("good", "lovely"), ("bad", "dull")
THINGS = ("lamp", "chair", "book", "film", "the", "a", "was", "and")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *THINGS, *(f"##{i}" for i in range(47))]
MODEL = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.1,
}


def write_source(folder: Path, words=WORDS) -> Path:
    """The model with its tokenizer, in Hugging Face layout."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    model = family("bert").build(MODEL, None)
    lineage = Lineage("memory", "0" * 64, license="cc0-1.0")
    export(Source(model, init(model, jax.random.key(7)), lineage, {"config": MODEL}), folder)
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


def texts(count: int, seed: int) -> list[dict[str, str]]:
    """Short texts of two classes, in turn, told apart by a word said three times; ``place`` is a subgroup."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = [*draw.sample(THINGS, draw.randint(2, 6)), *[draw.choice(GOOD if i % 2 else BAD)] * 3]
        label = "positive" if i % 2 else "negative"
        rows.append({"text": " ".join(words), "label": label, "place": draw.choice(["here", "there"])})
    return rows


def write_texts(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class World:
    """The folder in which the tests' runs live: the source, the data, and configurations of them."""

    def __init__(self, root: Path):
        self.root = root
        self.source = write_source(root / "source")
        sizes = {"train": 16, "validation": 6, "test": 10}
        self.data = {
            name: write_texts(root / f"{name}.jsonl", texts(count, seed))
            for seed, (name, count) in enumerate(sizes.items())
        }

    def config(self, out: Path, **changes) -> configs.Config:
        """Two epochs of four steps; ``changes`` are ``section__key=value``, or ``section=value`` for all of it."""
        raw = copy.deepcopy(
            {
                "source": {"ref": str(self.source)},
                "data": {**{name: {"path": path} for name, path in self.data.items()}, "batch": 4, "buckets": [16]},
                "task": {"max_length": 16},
                "optimizer": {"lr": 3e-3},
                "run": {"epochs": 2, "log_every": 3},
                "out": str(out),
            }
        )
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                raw.setdefault(section, {})[name] = value
            else:
                raw[section] = value
        return configs.from_dict(raw)


def during(patch, call: int, what="make_step", signum=signal.SIGTERM, times=1):
    """Sends this process a signal in the middle of the ``call``-th step (or, with ``make_eval``, evaluated batch)."""
    real, calls = getattr(prepare, what), []

    def make(*args, **keywords):
        fn = real(*args, **keywords)

        def counting(*args):
            calls.append(1)
            for _ in range(times if len(calls) == call else 0):
                os.kill(os.getpid(), signum)
            return fn(*args)

        return counting

    patch.setattr(prepare, what, make)


def console(*, terminal: bool = False):
    """A rich console that writes into memory: ``console().file.getvalue()``."""
    from rich.console import Console

    return Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False, markup=False)


def lines(folder: Path) -> list[dict]:
    """The events of a run without what differs between two runs of the same: times and rates."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "rate")} for line in found]
