"""Every parameter-efficient method against a hand-written plain JAX step and against torch PEFT, interleaved.

BERT-L6-H384, batch 16 x 128, float32, dropout 0.1, AdamW with clipping; the head trains besides. Leaf types stand
on all six kernels of a block (rank 8; VeRA 256), (IA)3 on keys, values and the MLP's second, the rest as METHODS says.
rsLoRA is LoRA's program with another number. PEFT has no bottlenecks, its prefixes find no way into the BERT of
transformers 5, and bitsandbytes has no 4 or 8 bits on a CPU. Full fine-tuning is there for comparison.

Of each: step time by the wall and by the processor's seconds of all threads, which others on the machine disturb less;
arguments and temporaries by XLA's ``memory_analysis`` of the same compiled programs; FLOPs of the unrolled step of two
blocks, and over the matrix products that cannot be avoided (no weight gradients of frozen leaves); the bytes that
train, a checkpoint over these and the optimizer's, and the bytes of what is frozen.

Usage: python benchmarks/adapters.py [--rounds 7] [--no-torch] [--only lora,dora]

With ``--rounds 0`` nothing is timed.

Binding: at most 1.05 x the plain step in time, temporaries and FLOPs, a checkpoint of at most 1.05 x what trains with
its optimizer, at most 0.56 byte a parameter under QLoRA, and faster than torch PEFT.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import peers
import plain_adapters
import plain_bert
from cases import BATCH, HEADS, HIDDEN, INNER, LAYERS, LENGTH, VOCABULARY, batch, source, started
from step import interleaved

from jaxtransfer import checkpoint, groups, quantize
from jaxtransfer.adapt import attaching, subtrees
from jaxtransfer.adapt.groups import FROZEN
from jaxtransfer.models import apply
from jaxtransfer.step import params_of
from jaxtransfer.tree import fingerprint, flatten, partition
from jaxtransfer.tree.weights import is_weight
from jaxtransfer.types import State

RANK, VERA_RANK, WIDTH, POSITIONS = 8, 256, 64, 20
ALPHA = plain_adapters.SCALE * RANK
KERNELS = r"blocks/\d+/(attention|mlp)/\w+/kernel"
KEY = jax.random.key(3)


def _attached(make):
    return lambda src: attaching.attach(src, [(KERNELS, make)], KEY)


def _over(base):
    """LoRA over quantised kernels."""
    lora = _attached(attaching.lora(RANK, alpha=ALPHA))
    return lambda src: lora(quantize(src, [(KERNELS, base)]))


def _ia3(src):
    keys, down = r"blocks/\d+/attention/(key|value)/kernel", r"blocks/\d+/mlp/down/kernel"
    return attaching.attach(src, [(keys, attaching.ia3()), (down, attaching.ia3("input"))], KEY)


METHODS: dict[str, Callable] = {
    "full": lambda src: src,
    "lora": _attached(attaching.lora(RANK, alpha=ALPHA)),
    "dora": _attached(attaching.dora(RANK, alpha=ALPHA)),
    "ia3": _ia3,
    "vera": _attached(attaching.vera(VERA_RANK)),
    "qlora": _over("nf4"),
    "int8": _over("int8"),
    "bottleneck": lambda src: subtrees.bottleneck(src, [(r"blocks/\d+", True)], KEY, width=WIDTH),
    "prompt": lambda src: subtrees.prompt_tuning(src, KEY, length=POSITIONS),
    "prefix": lambda src: subtrees.prefix_tuning(src, KEY, length=POSITIONS),
    "bitfit": lambda src: src,
}
"""Name -> what it makes of a source: bottlenecks of 64 behind attention and MLP, 20 positions of prompt or prefix."""


@dataclasses.dataclass
class Program:
    """A compiled step, what it is called with, and how to call it again."""

    compiled: object
    args: list
    run: Callable

    @property
    def megabytes(self):
        """Of arguments, and of temporaries."""
        found = self.compiled.memory_analysis()
        return found.argument_size_in_bytes / 1e6, found.temp_size_in_bytes / 1e6


def recipe(method, model):
    """What trains."""
    return {"full": groups.full, "bitfit": groups.biases}.get(method, groups.adapters)(model)


def adapted(method, layers=LAYERS, **config):
    """The source with a method's parameters, known by fingerprint so that a checkpoint leaves out what is its own."""
    src = source(layers, **config)
    lineage = dataclasses.replace(src.lineage, fingerprints=fingerprint(src.params))
    return METHODS[method](dataclasses.replace(src, lineage=lineage))


def library(src, rules, data):
    """The library's step."""
    state, frozen, step, labels, _ = started(src, rules)
    compiled = step.lower(state, frozen, data).compile()
    args = [state, frozen]

    def run():
        args[0], metrics = compiled(args[0], args[1], data)
        return metrics["loss"].block_until_ready()

    return Program(compiled, args, run), labels


def plain(method, src, labels, data):
    """The step by hand."""
    trained, frozen = plain_adapters.split(src.params, labels)
    tx, key = plain_bert.adamw(), jax.random.key(2)
    step = plain_bert.make_step(tx, HEADS, linear=plain_adapters.LINEARS[method])
    args = [trained, tx.init(trained), frozen]
    compiled = step.lower(*args[:2], key, frozen, data).compile()

    def run():
        args[0], args[1], loss = compiled(args[0], args[1], key, args[2], data)
        return loss.block_until_ready()

    return Program(compiled, args, run)


def apart(method, src, labels, mine, data):
    """By how much of their scale the logits of both differ under the parameters that ours has trained."""
    params = params_of(*mine.args)
    trained, frozen = plain_adapters.split(params, labels)
    linear = plain_adapters.LINEARS[method]
    theirs = plain_bert.logits_of(trained, frozen, data, None, HEADS, False, linear)
    ours = apply(src.model, params, data)["logits"]
    return float(abs(ours - theirs).max() / abs(theirs).max())


def flops(method, data, layers=2):
    """FLOPs of the library's step with every layer traced.

    Without dropout: to draw its masks is no matrix product, and XLA counts every integer operation of it.
    """
    src = adapted(method, layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    _, _, step, labels, tx = started(src, recipe(method, src.model))
    by_path = flatten(labels)
    trained, frozen = partition(src.params, lambda path: by_path[path] != FROZEN)
    nothing = partition(src.params, lambda _: False)[0]
    state = State(jax.numpy.zeros((), "int32"), trained, nothing, tx.init(trained), jax.random.key(2), {})
    return step.lower(state, frozen, data).compile().cost_analysis()["flops"]


def minimum_flops(method, layers=2):
    """Matrix products that cannot be avoided: forward of all, gradients of inputs, and of the method's own weights.

    What lies before the lowest trained leaf needs no gradient.
    """
    length = LENGTH + (POSITIONS if method == "prompt" else 0)
    seen = length + (POSITIONS if method == "prefix" else 0)
    tokens = BATCH * length
    dense, inner = 2 * tokens * HIDDEN * HIDDEN, 2 * tokens * HIDDEN * INNER
    scores = 2 * BATCH * length * seen * HIDDEN
    pooler, head = 2 * BATCH * HIDDEN * HIDDEN, 4 * BATCH * HIDDEN
    forward = layers * (4 * dense + 2 * inner + 2 * scores) + pooler + head
    backward = layers * (4 * dense + 2 * inner + 4 * scores) + pooler + 2 * head
    sides = 4 * 2 * HIDDEN + 2 * (HIDDEN + INNER)
    if method == "full":  # every weight's gradient is as much as its product; the embedding's is a sum
        return forward + backward + layers * (4 * dense + 2 * inner) + pooler
    low = 2 * tokens * RANK * sides
    if method in ("lora", "dora", "qlora", "int8"):
        forward, backward = forward + layers * low, backward + 2 * layers * low - 3 * dense - 6 * tokens * RANK * HIDDEN
    if method == "dora":
        forward += layers * 2 * RANK * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
    if method == "vera":
        low, one = 2 * tokens * VERA_RANK * sides, 2 * tokens * VERA_RANK * HIDDEN
        forward += layers * (low - 2 * one)  # x A is one product for queries, keys and values
        backward += layers * low - 3 * dense - 3 * one
    if method == "bottleneck":
        small = 2 * tokens * HIDDEN * WIDTH
        forward, backward = forward + 4 * layers * small, backward + 8 * layers * small - small - 4 * dense - 4 * scores
    if method in ("ia3", "prefix"):
        backward -= 3 * dense + scores
    return forward + backward


def size(tree):
    """Bytes of the arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def stored(src, mine):
    """Bytes of a checkpoint's files over those of what trains and its optimizer; of what trains; of what is frozen."""
    state, frozen = mine.args
    with tempfile.TemporaryDirectory() as folder:
        path = Path(checkpoint.save(Path(folder) / "one", state, frozen, src.lineage))
        written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return written / (size(state.params) + size(state.opt_state)), size(state.params), size(frozen)


def bytes_a_parameter(src):
    """Bytes a parameter over the quantised leaves, and over the frozen part of the whole model."""
    nodes = [leaf for leaf in flatten(src.params, is_leaf=is_weight).values() if is_weight(leaf)]
    count = sum(node.base.shape[0] * node.base.shape[1] for node in nodes)
    return sum(size(node.base) for node in nodes) / count


def peft_config(method):
    """PEFT's configuration of a method, or None where it has none."""
    import peft

    six = (
        r".*encoder.layer.\d+.(attention.self.(query|key|value)|attention.output.dense|intermediate.dense|output.dense)"
    )
    down = r".*encoder.layer.\d+.output.dense"
    low = dict(task_type="SEQ_CLS", r=RANK, lora_alpha=int(ALPHA), target_modules=six)
    return {
        "lora": lambda: peft.LoraConfig(**low),
        "dora": lambda: peft.LoraConfig(use_dora=True, **low),
        "ia3": lambda: peft.IA3Config(
            task_type="SEQ_CLS", target_modules=rf".*attention.self.(key|value)|{down}", feedforward_modules=down
        ),
        "vera": lambda: peft.VeraConfig(task_type="SEQ_CLS", r=VERA_RANK, target_modules=six),
        "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=POSITIONS),
    }.get(method, lambda: None)()


def torch_step(method, data):
    """A function that runs one step of torch with PEFT (BitFit: without it), or None."""
    try:
        import peft
        import torch
        import transformers
    except ImportError:
        return None
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INNER, num_labels=2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).train()
    if method == "full":
        pass
    elif method == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
    elif (own := peft_config(method)) is not None:
        model = peft.get_peft_model(model, own).train()
    else:
        return None
    trained = [p for p in model.parameters() if p.requires_grad]
    inputs = {name: torch.tensor(value).long() for name, value in data.items() if name != "weight"}
    return peers.torch_run(model, trained, inputs)


def row(method, data, rounds, with_torch):
    """The figures of one method."""
    src = adapted(method)
    mine, labels = library(src, recipe(method, src.model), data)
    theirs = plain(method, src, labels, data)
    runners = {"ours": mine.run, "plain": theirs.run}
    if with_torch and (run := torch_step(method, data)):
        runners["torch"] = run
    cells = timed(runners, rounds) if rounds else ["-"] * 6
    for a, b in zip(mine.megabytes, theirs.megabytes, strict=True):
        cells += [f"{a:.1f}", f"{b:.1f}", f"{a / b:.3f}"]
    found = flops(method, data)
    cells += [f"{found / 1e9:.1f}", f"{found / minimum_flops(method):.3f}"]
    over, own, frozen = stored(src, mine)
    cells += [f"{own / 1e3:,.0f}", f"{over:.3f}", f"{frozen / 1e6:.1f}"]
    cells.append(f"{bytes_a_parameter(src):.3f}" if method in ("qlora", "int8") else "4")
    return [*cells, f"{apart(method, src, labels, mine, data):.0e}"]


def timed(runners, rounds):
    """Milliseconds and ratios by the wall, and ours over plain by the processor's seconds; medians, pair by pair."""
    spent = {name: [] for name in runners}

    def counted(name):
        began = time.process_time()
        runners[name]()
        spent[name].append(time.process_time() - began)

    times = interleaved({name: partial(counted, name) for name in runners}, rounds)
    middle = {name: f"{1e3 * statistics.median(values):.0f}" for name, values in times.items()}

    def ratio(of, a, b):
        return statistics.median(x / y for x, y in zip(of[a][-rounds:], of[b][-rounds:], strict=True))

    cells = [middle["ours"], middle["plain"]]
    cells += [f"{ratio(of, 'ours', 'plain'):.3f}" for of in (times, spent)]
    return [*cells, middle["torch"], f"{ratio(times, 'torch', 'ours'):.2f}"] if "torch" in times else [*cells, "-", "-"]


COLUMNS = (
    "method", "ours ms", "plain ms", "ours/plain", "by the processor", "PEFT ms", "PEFT/ours", "arguments MB", "plain",
    "ratio", "temporaries MB", "plain", "ratio", "GFLOP, two blocks", "over the minimum", "trained kB",
    "checkpoint/(trained + optimizer)", "frozen MB", "bytes a kernel's parameter", "apart",
)  # fmt: skip


def main():
    """Prints a row a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--only", default=",".join(METHODS), help="methods, with commas between")
    args = parser.parse_args()
    data = batch()
    print(f"{jax.devices()[0].device_kind}, {args.rounds} rounds; medians, ratios pair by pair\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for method in args.only.split(","):
        print(f"| {' | '.join([method, *row(method, data, args.rounds, not args.no_torch)])} |", flush=True)


if __name__ == "__main__":
    main()
