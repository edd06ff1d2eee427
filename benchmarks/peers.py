"""Training steps of a decoder, a convolutional network and a vision transformer: ours, and torch + transformers'."""

import jax
import numpy as np

from jaxtransfer import groups, init, optim
from jaxtransfer.models import family
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.step import init_state, make_step
from jaxtransfer.types import Head

LABELS = tuple(f"LABEL_{i}" for i in range(1000))
SHAPES = {
    "llama": "hidden 512, 8 layers, 8 heads over 4, inner 1408, vocabulary 8,192, batch 4 x 256, 36 M parameters",
    "resnet-50": "224 x 224, batch 8, 25.6 M parameters",
    "vit-s": "ViT-S/16, 224 x 224, batch 8, 22.1 M parameters",
}


def config(name):
    """The transformers configuration and the class that trains it."""
    import transformers as hf

    if name == "llama":
        made = hf.LlamaConfig(
            vocab_size=8192, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
            intermediate_size=1408, max_position_embeddings=1024,
        )  # fmt: skip
        return made, "LlamaForCausalLM"
    if name == "resnet-50":
        return hf.ResNetConfig(num_labels=1000), "ResNetForImageClassification"
    made = hf.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return made, "ViTForImageClassification"


def batch(name):
    """Random rows, all of them real."""
    rng = np.random.default_rng(0)
    if name == "llama":
        ids = rng.integers(0, 8192, (4, 257)).astype(np.int32)
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "weight": np.ones(4, np.float32)}
    return {
        "pixel_values": rng.standard_normal((8, 224, 224, 3)).astype(np.float32),
        "labels": rng.integers(0, 1000, 8).astype(np.int32),
        "weight": np.ones(8, np.float32),
    }


def library(name, data):
    """A function that runs one step of the library."""
    raw = config(name)[0].to_dict() | {"architectures": None}
    head = Head("causal-lm") if name == "llama" else Head("image-classification", LABELS)
    model = family(raw["model_type"]).build(raw, head)
    params = init(model, jax.random.key(0))
    labels = groups.labels_of(model, groups.full(model), params)
    used = sorted(set(jax.tree.leaves(labels)) - {"stats"})
    tx = optim.optimizer(labels, {name: optim.Group(lr=1e-4) for name in used}, clip=1.0)
    state, frozen = init_state(model, params, labels, tx, jax.random.key(2))
    step, held = make_step(model, cross_entropy(), tx), [state]

    def run():
        held[0], metrics = step(held[0], frozen, data)
        return metrics["loss"].block_until_ready()

    return run


def torch_step(name, data):
    """A function that runs one step of torch + transformers, or None without torch."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    made, kind = config(name)
    model = getattr(transformers, kind)(made).train()
    if name == "llama":
        ids = torch.tensor(np.concatenate([data["input_ids"], data["labels"][:, -1:]], axis=1)).long()
        inputs = {"input_ids": ids, "labels": ids}
    else:
        pixels = torch.tensor(data["pixel_values"].transpose(0, 3, 1, 2).copy())
        inputs = {"pixel_values": pixels, "labels": torch.tensor(data["labels"]).long()}

    return torch_run(model, list(model.parameters()), inputs)


def torch_run(model, trained, inputs):
    """A function that runs one torch step: AdamW with decay on matrices and kernels, gradients clipped."""
    import torch

    decayed, rest = ([p for p in trained if (p.ndim > 1) == wide] for wide in (True, False))
    settings = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(settings, lr=1e-4)

    def run():
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return run
