"""What freezing saves: FLOPs against the arithmetic minimum, temporaries against a hand-written step.

A BERT of width 384 frozen at every depth. FLOPs are counted on the unrolled program (XLA counts a scanned body once),
the minimum from the shapes: forward through everything, backward through what trains. Temporaries are those of XLA's
``memory_analysis`` of the scanned program, with and without remat, beside the plain JAX step of the same case.

Usage: python benchmarks/freeze.py [--layers 6] [--batch 8] [--length 64]

Binding: both within 5 %.
"""

import argparse

import jax
import plain_bert
from cases import HEADS, HIDDEN, INNER, batch, ours, plain_parts, source

from jaxtransfer.adapt.groups import FROZEN
from jaxtransfer.tree import flatten, partition
from jaxtransfer.types import State


def unrolled_flops(case, src, data):
    """FLOPs of the library's step with every layer traced."""
    _, _, step, labels, tx = ours(case, src)
    by_path = flatten(labels)
    trained, frozen = partition(src.params, lambda path: by_path[path] != FROZEN)
    state = State(
        jax.numpy.zeros((), "int32"),
        trained,
        partition(src.params, lambda _: False)[0],
        tx.init(trained),
        jax.random.key(2),
        {},
    )
    return step.lower(state, frozen, data).compile().cost_analysis()["flops"]


def minimum_flops(case, layers, rows, length):
    """Matrix products that cannot be avoided: forward of all, weight and input gradients of what trains.

    The lowest trained layer needs no gradient of its input unless the embeddings train.
    """
    tokens = rows * length
    dense = 2 * tokens * HIDDEN * HIDDEN
    inner = 2 * tokens * HIDDEN * INNER
    scores = 2 * rows * length * length * HIDDEN
    forward = layers * (4 * dense + 2 * inner + 2 * scores) + 2 * rows * HIDDEN * HIDDEN + 4 * rows * HIDDEN
    if case == "head":
        return forward + 4 * rows * HIDDEN
    live = layers if case == "full" else int(case.split("-")[1])
    backward = live * (8 * dense + 4 * inner + 4 * scores) + 4 * rows * HIDDEN * HIDDEN
    if case != "full" and live:
        backward -= 3 * dense
    if case != "full" and not live:
        backward -= 2 * rows * HIDDEN * HIDDEN
    return forward + backward + 8 * rows * HIDDEN


def temporaries(lowered):
    """Bytes of temporaries of a compiled program."""
    return lowered.compile().memory_analysis().temp_size_in_bytes


def main():
    """Prints a row a depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    src, data = source(args.layers, 512), batch(args.batch, args.length, 512)
    memory = "".join(f"{title:>10}{'plain':>9}{'ratio':>8}" for title in ("temp MB", "remat MB"))
    print(f"{'case':8}{'GFLOP':>9}{'minimum':>9}{'ratio':>8}{memory}")
    for case in ["head", *(f"last-{k}" for k in range(args.layers + 1)), "full"]:
        flops, least = unrolled_flops(case, src, data), minimum_flops(case, args.layers, args.batch, args.length)
        row = f"{case:8}{flops / 1e9:9.2f}{least / 1e9:9.2f}{flops / least:8.3f}"
        for remat in (None, "full"):
            state, frozen, step, _, _ = ours(case, src, remat=remat)
            mine = temporaries(step.lower(state, frozen, data))
            cut, parts = plain_parts(case, args.layers)
            trained, still = plain_bert.split(src.params, args.layers, cut, parts)
            tx = plain_bert.adamw()
            theirs = temporaries(
                plain_bert.make_step(tx, HEADS, remat=remat is not None).lower(
                    trained, tx.init(trained), jax.random.key(2), still, data
                )
            )
            row += f"{mine / 1e6:10.2f}{theirs / 1e6:9.2f}{mine / theirs:8.3f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
