"""Weak scaling, from compiled plans and of simulated devices; the plans need the extra `plan`.

Usage: python benchmarks/scale.py [--to docs/scale.svg] [--slices 2x2x4 ...] [--simulated ROUNDS]

Plans: Llama 3 of 8 G parameters, all of them trained, a row of 2,048 tokens a chip, on slices of v5p that double from
4 chips to 512 (8 x 8 x 8). Nothing runs: each step is compiled for its slice, by the compiler that would compile it
there, and the compiler's own numbers are printed: bytes that a chip holds, and bytes that it sends in a step.

What to expect: parameters and optimizer halve with every doubling until the mesh's `fsdp` axis is 64 long; from there
on copies are added along `data`, and both stay. What a chip sends stays, too: each layer is gathered once a pass, so
it is the whole model's bytes twice and its gradients' once, whatever the number of chips. Goal: no more at 512 chips
than 1.1 times what a chip sends at 16, and no more held than at 64.

Simulated devices share this machine's cores, so more of them are not faster: a step of n devices, four rows each, is
held against the step of one device with all the rows. What is above 1 is what splitting costs.
"""

import argparse
import dataclasses
import json
import math
import statistics
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from cases import batch, recipe, source, started  # noqa: E402
from step import interleaved  # noqa: E402

from jaxtransfer import config, plan  # noqa: E402
from jaxtransfer.config import ConfigError  # noqa: E402
from jaxtransfer.job import blueprints, meshes  # noqa: E402
from jaxtransfer.parallel import make_mesh  # noqa: E402
from jaxtransfer.report.axes import WIDTH, axis, svg, text  # noqa: E402
from jaxtransfer.report.markup import join, tag  # noqa: E402
from jaxtransfer.step import shard_batch  # noqa: E402

SLICES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CONFIG = Path(__file__).resolve().parent.parent / "configs/pods/llama-3-8b-full-v5p.yaml"
SOURCE = CONFIG.parent.parent / "models/llama-3-8b.json"
MOST = 64  # of the fsdp axis
STYLE = """svg { background: #fff } text { fill: #6a6f77; font: 11.5px system-ui, sans-serif } .grid { stroke: #e5e5e0 }
polyline { fill: none; stroke-width: 1.5 } .held { stroke: #2a5fc4; fill: #2a5fc4 } .sent { stroke: #b8681c }
circle.sent, text.sent { fill: #b8681c } polyline.held, polyline.sent { fill: none }
text.held, text.sent { stroke: none; font-weight: 600 }"""


def mesh_of(devices):
    """The longest `fsdp` axis, up to `MOST`, that lies along the slice's axes; the rest is `data`."""
    for fsdp in (n for n in (64, 32, 16, 8, 4) if n <= min(MOST, len(devices))):
        try:
            return meshes.device_mesh({"data": len(devices) // fsdp, "fsdp": fsdp, "tensor": 1}, devices)
        except ConfigError:
            continue
    raise ValueError(f"no mesh of {len(devices)} devices")


def measured(name):
    """One slice: a row of the table."""
    where = plan.topology(f"v5p:{name}")
    settings = config.load(
        CONFIG, [("source.ref", str(SOURCE)), ("source.init", "scratch"), ("task.max_length", "2048")]
    )
    data = dataclasses.replace(settings.data, batch=where.count)
    draft = blueprints.draft(dataclasses.replace(settings, data=data), print)
    mesh = mesh_of(plan.devices(where))
    made = draft.on(mesh)
    found = plan.compiled(made)
    held = sum(made.bytes().values())
    return {
        "chips": where.count, "data": mesh.shape["data"], "fsdp": mesh.shape["fsdp"], "arguments": held,
        "temporaries": found.temporaries, "held": held + found.temporaries,
        "sent": plan.sent(found.collectives), "seconds": round(found.seconds, 1),
    }  # fmt: skip


def drawn(rows):
    """The two curves over the number of chips, a doubling a step."""
    x = axis([math.log2(row["chips"]) for row in rows], 46, WIDTH - 14, tight=True)
    y = axis([0.0, *(row[key] / 1e9 for row in rows for key in ("held", "sent"))], 206, 12, count=4, low=0.0)
    parts = [tag("style", STYLE)]
    for tick in y.ticks:
        parts += [tag("line", x1=46, x2=WIDTH - 14, y1=y(tick), y2=y(tick), class_="grid")]
        parts += [text(f"{y.label(tick)} GB", 42, y(tick) + 4, "end")]
    parts += [text(str(row["chips"]), x(math.log2(row["chips"])), 225, "middle") for row in rows]
    parts.append(text("chips", WIDTH - 14, 241, "end"))
    for key, words, below in (("held", "held by a chip", -8), ("sent", "sent by a chip in a step", 18)):
        places = [(x(math.log2(row["chips"])), y(row[key] / 1e9)) for row in rows]
        parts.append(tag("polyline", points=" ".join(f"{a},{b}" for a, b in places), class_=key))
        parts += [tag("circle", cx=a, cy=b, r=3, class_=key) for a, b in places]
        parts.append(tag("text", words, x=places[-1][0], y=places[-1][1] + below, text_anchor="end", class_=key))
    found = svg(join(parts), 248, "Bytes that a chip holds and sends, by the number of chips of a v5p slice")
    return found.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def runner(axes, rows):
    """A step of BERT-L2-H384 on a mesh, or on one device, ready to be called again and again."""
    src = source(layers=2)
    mesh = make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())]) if axes else None
    state, frozen, step, _, _ = started(src, recipe("full", src.model), mesh=mesh)
    data, held = batch(rows, 64), [state]

    def run():
        held[0], metrics = step(held[0], frozen, shard_batch(data, mesh))
        return metrics["loss"].block_until_ready()

    return run


def simulated(rounds):
    """A row for every number of devices and kind of mesh: milliseconds, and over those of one device."""
    print(f"{'devices':>8}{'mesh':>10}{'rows':>6}{'one device ms':>15}{'these ms':>10}{'ratio':>7}")
    for name in ("data", "fsdp"):
        for count in (1, 2, 4, 8):
            rows = 4 * count
            times = interleaved({"one": runner({}, rows), "these": runner({name: count}, rows)}, rounds)
            ratio = statistics.median(b / a for a, b in zip(times["one"], times["these"], strict=True))
            one, these = (1e3 * statistics.median(times[of]) for of in ("one", "these"))
            print(f"{count:>8}{name:>10}{rows:>6}{one:>15.0f}{these:>10.0f}{ratio:>7.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, help="where the plot is written")
    parser.add_argument("--slices", nargs="+", default=SLICES, help="of v5p")
    parser.add_argument("--simulated", type=int, metavar="ROUNDS", help="simulated devices instead of plans")
    options = parser.parse_args()
    if options.simulated:
        simulated(options.simulated)
        return
    rows = []
    for name in options.slices:
        rows.append(measured(name))
        print(json.dumps(rows[-1]), flush=True)
    print(f"{'chips':>6}{'data x fsdp':>14}{'arguments GB':>14}{'temporaries GB':>16}{'sent GB':>9}{'compiled s':>12}")
    for row in rows:
        mesh = f"{row['data']} x {row['fsdp']}"
        held = f"{row['arguments'] / 1e9:>14.2f}{row['temporaries'] / 1e9:>16.2f}{row['sent'] / 1e9:>9.1f}"
        print(f"{row['chips']:>6}{mesh:>14}{held}{row['seconds']:>12.1f}")
    by_count = {row["chips"]: row for row in rows}
    if {16, 64, 512} <= by_count.keys():
        sent, kept = by_count[512]["sent"] / by_count[16]["sent"], by_count[512]["held"] / by_count[64]["held"]
        print(f"sent at 512 over 16 chips: {sent:.2f} (goal 1.10); held at 512 over 64: {kept:.2f} (goal 1.00)")
    if options.to is not None:
        options.to.write_text(drawn(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
