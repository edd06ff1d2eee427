"""Compile time of a train step against depth: 32 blocks over 4 of the same width.

BERT, a Llama, a ViT and a Gemma 3 (every second layer's window differs, with a rope of its own), all of width 512,
whole and frozen below the middle of the stack. Each figure is a fresh process with the persistent compilation cache
off: processor seconds of trace, lowering to StableHLO, and XLA, of all, and the wall's. Shapes are abstract, so nothing
is drawn, stacked or placed. The machine may be busy: rounds are interleaved, a ratio is the median of those within a
round, and the wall's is the machine's too.

Usage: python benchmarks/compile.py [--rounds 5] [--models bert llama vit gemma3_text] [--depths 4 32] [--hidden 512]

Goal: at most 1.3 over 4 whole blocks, frozen ones or not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise

MODELS = {
    "bert": {"vocab_size": 30522, "intermediate_size": 4},
    "llama": {"vocab_size": 32000, "intermediate_size": 3, "num_key_value_heads": 4},
    "vit": {"image_size": 224, "patch_size": 16, "intermediate_size": 4},
    "gemma3_text": {
        "vocab_size": 32000, "intermediate_size": 3, "num_key_value_heads": 4, "head_dim": 64, "sliding_window": 32,
        "sliding_window_pattern": 2,
    },
}  # fmt: skip
ROWS, LENGTH = 2, 64
PARTS = ("trace", "lower", "xla", "all", "wall")


def lowering(name, depth, cut, hidden):
    """Abstract state, frozen part and batch of a classifier's step, its lowest ``cut`` blocks frozen; and the step."""
    import jax
    import jax.numpy as jnp

    from jaxtransfer import Head, groups, init_state, make_step, optim
    from jaxtransfer.models import family
    from jaxtransfer.models.api import abstract_init
    from jaxtransfer.objectives import cross_entropy

    raw = {**MODELS[name], "hidden_size": hidden, "num_hidden_layers": depth, "num_attention_heads": 8}
    raw["intermediate_size"] *= hidden
    kind = "image-classification" if name == "vit" else "sequence-classification"
    model = family(name).build(raw, Head(kind, ("no", "yes")))
    params = abstract_init(model)
    labels = groups.labels_of(model, groups.last(model, depth - cut) if cut else groups.full(model), params)
    tx = optim.optimizer(labels, dict.fromkeys(["trunk", "head"], optim.Group(lr=1e-4)), clip=1.0)
    state, frozen = jax.eval_shape(lambda p: init_state(model, p, labels, tx, jax.random.key(0)), params)
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    inputs = {"input_ids": tokens, "attention_mask": tokens}
    if name == "vit":
        inputs = {"pixel_values": jax.ShapeDtypeStruct((ROWS, 224, 224, 3), jnp.float32)}
    rows = {"labels": jax.ShapeDtypeStruct((ROWS,), jnp.int32), "weight": jax.ShapeDtypeStruct((ROWS,), jnp.float32)}
    return make_step(model, cross_entropy(), tx), state, frozen, {**inputs, **rows}


def child(name, depth, cut, hidden):
    """Prints the seconds of each part of one compilation."""
    import jax

    step, *args = lowering(name, depth, cut, hidden)
    jax.jit(lambda x: x + 1).lower(1.0).compile()  # what the first compilation of a process sets up
    marks, start = [time.process_time()], time.perf_counter()
    traced = step.trace(*args)
    marks.append(time.process_time())
    lowered = traced.lower()
    marks.append(time.process_time())
    lowered.compile()
    marks.append(time.process_time())
    seconds = [
        *(after - before for before, after in pairwise(marks)),
        marks[-1] - marks[0],
        time.perf_counter() - start,
    ]
    print(json.dumps(dict(zip(PARTS, seconds, strict=True))))


def measured(name, depth, cut, hidden):
    """The seconds of one compilation in a fresh process, without the persistent cache."""
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--child", name, str(depth), str(cut), str(hidden)]
    found = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def main():
    """Prints a row for each model and cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--depths", nargs=2, type=int, default=[4, 32])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], *map(int, args.child[1:]))
        return
    few, many = args.depths
    titles = "".join(f"{part:>7} s  ratio" for part in PARTS)
    print(f"{'model':12}{'blocks':>7}{'frozen':>7}{'over':>12}{titles}", flush=True)
    for name in args.models:
        cases = {(few, 0), (few, few // 2), (many, 0), (many, many // 2)}
        rounds = [{case: measured(name, *case, args.hidden) for case in sorted(cases)} for _ in range(args.rounds)]
        for (depth, cut), base in (((many, 0), 0), ((many, many // 2), 0), ((many, many // 2), few // 2)):
            row = f"{name:12}{depth:7}{cut:7}{f'{few}, {base} frozen':>12}"
            for part in PARTS:
                seconds = statistics.median(found[depth, cut][part] for found in rounds)
                ratio = statistics.median(found[depth, cut][part] / found[few, base][part] for found in rounds)
                row += f"{seconds:9.2f}{ratio:7.2f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
