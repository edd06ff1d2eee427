"""What to do about a step that does not fit."""

from jaxtransfer.adapt.groups import FROZEN
from jaxtransfer.plan.chips import GIB, Chip
from jaxtransfer.plan.held import OPTIMIZER, Blueprint

TEMPORARIES = "temporaries"


def advice(plan: Blueprint, need: float, chip: Chip, *, remat: str | None, accumulate: int) -> str:
    """How far a step is over a device's memory, what is largest of it, and what would make it fit.

    Args:
      plan: the step.
      need: bytes that one device would hold.
      chip: the device.
      remat, accumulate: of the step.
    """
    held, over = plan.bytes(), need - chip.hbm
    parts = {**held, TEMPORARIES: need - sum(held.values())}
    largest = max(parts, key=lambda name: parts[name])
    if largest == TEMPORARIES:
        remedy = _fewer(plan, parts[TEMPORARIES], over, remat, accumulate)
    else:
        what = {FROZEN: "quantise it (adapt.quantize)", OPTIMIZER: "train less of it (adapt.train)"}
        remedy = f"{_spread(plan)}{what.get(largest, 'train less of it (adapt.train: head, last, adapters)')}"
    return (
        f"{over / GIB:.2f} GiB over the {chip.hbm / GIB:.2f} of a device; the most is {largest}, "
        f"{parts[largest] / GIB:.2f} GiB: {remedy}, or take more devices"
    )


def _spread(plan: Blueprint) -> str:
    """Copies along ``data`` hold the same: split along ``fsdp`` they hold a part each."""
    data, fsdp = plan.mesh.shape["data"], plan.mesh.shape["fsdp"]
    return f"set mesh.data 1 and mesh.fsdp {data * fsdp}, " if data > 1 else ""


def _fewer(plan: Blueprint, temporaries: float, over: float, remat: str | None, accumulate: int) -> str:
    """Temporaries shrink with what is kept for the backward pass, and with the rows of a microbatch."""
    if remat != "full":
        return "set run.remat: full"
    shape = plan.mesh.shape
    rows = next(iter(plan.batch.values())).shape[0] // (shape["data"] * shape["fsdp"])
    scaled = max(0.0, temporaries - plan.gradients)  # the gradients are there whatever the microbatch
    for times in (n for n in range(accumulate + 1, rows + 1) if rows % n == 0):
        if scaled * (1 - accumulate / times) > over:
            return f"set run.accumulate: {times}"
    if rows > accumulate:
        return f"set run.accumulate: {rows}, a smaller task.max_length or data.batch"
    return "a smaller task.max_length, more mesh.tensor"
