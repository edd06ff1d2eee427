"""A whole run in miniature: a BERT of two blocks with its tokenizer, a few texts, and a configuration of both."""

import copy
import dataclasses
import io
import json
import os
import random
import signal
from pathlib import Path

import jax
import numpy as np

from jaxtransfer import config as configs
from jaxtransfer.job import prepare
from jaxtransfer.models import family, init
from jaxtransfer.source import export
from jaxtransfer.types import Lineage, Source
from tests import language

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


class Place:
    """A folder in which the tests' runs live, and the configuration that they start from."""

    root: Path
    raw: dict

    def config(self, out: Path, **changes) -> configs.Config:
        """The configuration with ``changes``: ``section__key=value``, or ``section=value`` for all of it."""
        raw = copy.deepcopy({**self.raw, "out": str(out)})
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                raw.setdefault(section, {})[name] = value
            else:
                raw[section] = value
        return configs.from_dict(raw)


class World(Place):
    """A source that reads texts, the texts, and two epochs of four steps."""

    def __init__(self, root: Path):
        self.root = root
        self.source = write_source(root / "source")
        sizes = {"train": 16, "validation": 6, "test": 10}
        self.data = {
            name: write_texts(root / f"{name}.jsonl", texts(count, seed))
            for seed, (name, count) in enumerate(sizes.items())
        }
        self.raw = {
            "source": {"ref": str(self.source)},
            "data": {**{name: {"path": path} for name, path in self.data.items()}, "batch": 4, "buckets": [16]},
            "task": {"max_length": 16},
            "optimizer": {"lr": 3e-3},
            "run": {"epochs": 2, "log_every": 3},
        }


class Library(Place):
    """A decoder that has weights, or only a configuration; documents of two alphabets, and four steps of them."""

    def __init__(self, root: Path):
        self.root, self.source, self.bare = root, root / "decoder", root / "bare"
        made, tokens = language.decoder(), language.byte_tokenizer(template=language.CHAT)
        raw = {**made.assets["config"], "architectures": ["LlamaForCausalLM"]}
        self.bare.mkdir()
        (self.bare / "config.json").write_text(json.dumps(raw))
        export(dataclasses.replace(made, assets={"config": raw}), self.source)
        for folder in (self.source, self.bare):
            tokens.save_pretrained(folder)
        self.data = {
            name: write_texts(root / f"{name}.jsonl", documents(letters, count, seed))
            for seed, (name, letters, count) in enumerate(
                [("source", "abc", 12), ("train", "xyz", 12), ("test", "xyz", 5), ("retain", "abc", 5)]
            )
        }
        used = {name: {"path": self.data[name]} for name in ("train", "test", "retain")}
        self.raw = {
            "source": {"ref": str(self.source)},
            "data": {**used, "batch": 4},
            "task": {"kind": "causal-lm", "max_length": 32},
            "optimizer": {"lr": 1e-2},
            "run": {"steps": 4},
        }


def documents(letters: str, count: int, seed: int) -> list[dict[str, str]]:
    """Texts in which every letter is told by the one before it."""
    draw = random.Random(seed)
    return [{"text": (letters * 10)[draw.randrange(3) :][: draw.randint(9, 28)]} for _ in range(count)]


class Gallery(Place):
    """A small ResNet without weights; squares in the corners of noise, and four steps of them."""

    def __init__(self, root: Path):
        self.root, self.source = root, root / "resnet.json"
        made = {"model_type": "cifar-resnet", "depth": 8, "num_channels": 1, "hidden_sizes": [4, 6, 8]}
        self.source.write_text(json.dumps(made))
        self.data = {
            name: str(write_squares(root / f"{name}.npz", seed)) for seed, name in enumerate(("train", "test"))
        }
        self.raw = {
            "source": {"ref": str(self.source)},
            "pretrain": {
                "data": {"train": {"path": self.data["train"], "only": ["0", "1"]}, "batch": 8},
                "optimizer": {"lr": 1e-2},
                "run": {"steps": 8},
            },
            "task": {"kind": "image-classification", "size": 8, "mean": [0.5], "std": [0.5]},
            "data": {**{name: {"path": path, "only": ["2", "3"]} for name, path in self.data.items()}, "batch": 8},
            "optimizer": {"lr": 1e-2},
            "run": {"steps": 12},
        }


def write_squares(path: Path, seed: int, count: int = 40) -> Path:
    """Images (N, 8, 8) with a bright square in the corner that is their label, 0 to 3."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = rng.integers(0, 100, (count, 8, 8), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 120
    np.savez(path, image=images, label=labels)
    return path


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
    return [{key: value for key, value in line.items() if key not in ("time", "per_second")} for line in found]
