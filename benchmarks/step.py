"""Step time against a hand-written plain JAX step and against torch, interleaved.

BERT-L6-H384, batch 16 x 128, float32, dropout 0.1, AdamW with clipping: full fine-tuning, head only, top two blocks.

Then full fine-tuning of a Llama-shaped decoder, ResNet-50 and ViT-S at 224 x 224 (`peers.py`) against torch.

Usage: python benchmarks/step.py [--rounds 15] [--no-torch] [--profile] [--only bert llama resnet-50 vit-s]

Binding: at most 1.03 x the plain step. Stretch: at least 1.2 x faster than torch + transformers.
"""

import argparse
import statistics
import time

import jax
import peers
import plain_bert
from cases import BATCH, HEADS, HIDDEN, INNER, LAYERS, LENGTH, VOCABULARY, batch, ours, plain_parts, source

CASES = ("full", "head", "last-2")


def plain(case, src, data):
    """A function that runs one plain step."""
    frozen_blocks, parts = plain_parts(case)
    trained, frozen = plain_bert.split(src.params, LAYERS, frozen_blocks, parts)
    tx = plain_bert.adamw()
    step, state = plain_bert.make_step(tx, HEADS), [trained, tx.init(trained)]
    key = jax.random.key(2)

    def run():
        state[0], state[1], loss = step(state[0], state[1], key, frozen, data)
        return loss.block_until_ready()

    return run


def library(case, src, data):
    """A function that runs one step of the library."""
    state, frozen, step, _, _ = ours(case, src)
    held = [state]

    def run():
        held[0], metrics = step(held[0], frozen, data)
        return metrics["loss"].block_until_ready()

    return run


def torch_step(case, data):
    """A function that runs one step of torch + transformers, or None without torch."""
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
    if case != "full":
        kept = 0 if case == "head" else int(case.split("-")[1])
        live = [model.classifier, *(model.bert.encoder.layer[LAYERS - kept :] if kept else [])]
        live += [model.bert.pooler] if kept else []
        model.requires_grad_(False)
        for part in live:
            part.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    inputs = {name: torch.tensor(value).long() for name, value in data.items() if name != "weight"}
    return peers.torch_run(model, trained, inputs)


def interleaved(runners, rounds):
    """Seconds of each runner in every round; the order turns, so that drift of the machine falls on all alike."""
    names = list(runners)
    for name in names:
        runners[name]()
        runners[name]()
    times = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            runners[name]()
            times[name].append(time.perf_counter() - began)
    return times


def profile():
    """Where a full step's time goes: the time that matrix products alone would take, and the parts around them."""
    tokens = BATCH * LENGTH
    per_layer = 2 * tokens * (4 * HIDDEN**2 + 2 * HIDDEN * INNER) + 4 * BATCH * LENGTH**2 * HIDDEN
    flops = 3 * LAYERS * per_layer
    a, b = jax.numpy.ones((tokens, HIDDEN)), jax.numpy.ones((HIDDEN, INNER))
    rate = 2 * tokens * HIDDEN * INNER / best_of(jax.jit(lambda a, b: a @ b), a, b)
    scores, hidden, inner = (BATCH, HEADS, LENGTH, LENGTH), (BATCH, LENGTH, HIDDEN), (BATCH, LENGTH, INNER)
    draw = jax.jit(lambda key: [jax.random.bernoulli(key, 0.9, shape) for shape in (scores, hidden, hidden)])
    gelu = jax.jit(jax.grad(lambda x: jax.nn.gelu(x, approximate=False).sum()))
    softmax = jax.jit(jax.grad(lambda s: (jax.nn.softmax(s) ** 2).sum()))
    moments = jax.jit(lambda p, m, v, g: (p - 1e-4 * m / (jax.numpy.sqrt(v) + 1e-8), 0.9 * m + g, 0.99 * v + g * g))
    flat = [jax.numpy.ones(22_700_000) for _ in range(4)]
    parts = {
        "matrix products at their best rate": flops / rate,
        "dropout masks": LAYERS * best_of(draw, jax.random.key(0)),
        "gelu and its gradient": LAYERS * best_of(gelu, jax.numpy.ones(inner)),
        "softmax and its gradient": LAYERS * best_of(softmax, jax.numpy.ones(scores)),
        "AdamW over all parameters": best_of(moments, *flat),
    }
    theirs = torch_rate(tokens)
    print(f"matrix products reach {rate / 1e9:.0f} GFLOP/s{theirs}; a full step needs {flops / 1e9:.0f} GFLOP. Alone:")
    for name, seconds in parts.items():
        print(f"  {name:36}{1e3 * seconds:8.1f} ms")


def torch_rate(tokens):
    """How fast torch multiplies matrices here: where it is slow, so is everything that is compared with it."""
    try:
        import torch
    except ImportError:
        return ""
    a, b = torch.ones(tokens, HIDDEN), torch.ones(HIDDEN, INNER)
    seconds = min(_timed(lambda: a @ b) for _ in range(30))
    return f" (torch {2 * tokens * HIDDEN * INNER / seconds / 1e9:.0f})"


def best_of(fn, *args, count=20):
    """The least time of a compiled function."""
    jax.block_until_ready(fn(*args))
    return min(_timed(lambda: jax.block_until_ready(fn(*args))) for _ in range(count))


def _timed(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main():
    """Prints a row a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only", nargs="+", choices=["bert", *peers.SHAPES], default=["bert", *peers.SHAPES])
    args = parser.parse_args()
    if "bert" in args.only:
        bert(args)
    for name in peers.SHAPES:
        if name in args.only and not args.no_torch:
            against_torch(name, args.rounds)
    if args.profile:
        profile()


def against_torch(name, rounds):
    """Prints the row of one model against torch."""
    data = peers.batch(name)
    if (theirs := peers.torch_step(name, data)) is None:
        print(f"{name}: torch is not installed")
        return
    times = interleaved({"ours": peers.library(name, data), "torch": theirs}, rounds)
    ours, torch = (1e3 * statistics.median(times[side]) for side in ("ours", "torch"))
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times["torch"], strict=True))
    print(f"{name} ({peers.SHAPES[name]}): ours {ours:.0f} ms, torch {torch:.0f} ms, torch/ours {ratio:.2f}")


def bert(args):
    """Prints the rows of BERT."""
    src, data = source(), batch()
    print(
        f"BERT-L{LAYERS}-H{HIDDEN}, batch {BATCH} x {LENGTH}, float32, {jax.devices()[0].device_kind}, "
        f"{args.rounds} rounds; medians, ratios pair by pair"
    )
    print(f"{'case':8}{'ours ms':>10}{'plain ms':>10}{'torch ms':>10}{'ours/plain':>12}{'torch/ours':>12}")
    for case in CASES:
        runners = {"ours": library(case, src, data), "plain": plain(case, src, data)}
        if not args.no_torch and (run := torch_step(case, data)):
            runners["torch"] = run
        times = interleaved(runners, args.rounds)
        middle = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times["plain"], strict=True))
        faster = (
            statistics.median(b / a for a, b in zip(times["ours"], times["torch"], strict=True))
            if "torch" in times
            else 0
        )
        print(
            f"{case:8}{middle['ours']:10.1f}{middle['plain']:10.1f}{middle.get('torch', float('nan')):10.1f}"
            f"{ratio:12.3f}{faster:12.2f}"
        )


if __name__ == "__main__":
    main()
