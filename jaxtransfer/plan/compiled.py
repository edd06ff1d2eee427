"""A plan from a compiled step: memory, arithmetic, what devices say to each other, and what bounds the step's time."""

import dataclasses
import re
import time
from typing import Any

import jax

from jaxtransfer.plan.advice import TEMPORARIES
from jaxtransfer.plan.chips import Chip
from jaxtransfer.plan.held import Blueprint
from jaxtransfer.plan.hlo import Collective, collectives, parse
from jaxtransfer.plan.traffic import traffic

_GRADIENTS = "of which gradients, about"


@dataclasses.dataclass(frozen=True)
class Held:
    """One line of what a device holds, and how much of its HBM that takes."""

    what: str
    bytes: int
    percent: float


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time that a step needs for one of the things that it does."""

    what: str
    amount: str
    limit: str
    ms: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step.

    Attributes:
      fits: whether the compiler could place it.
      temporaries: bytes of one device; where it does not fit, what the compiler wanted.
      padding: bytes by which the arguments are longer on the device than their numbers are.
      code: bytes of the program.
      collectives: by kind.
      traffic: bytes that a device moves to and from its HBM.
      seconds: of compilation.
      error: in the compiler's words, where it does not fit.
    """

    fits: bool
    temporaries: int
    padding: int
    code: int
    collectives: tuple[Collective, ...]
    traffic: float
    seconds: float
    error: str = ""


def compiled(plan: Blueprint) -> Compiled:
    """Compiles a step for its mesh's devices; that it does not fit is an answer, no error.

    Raises:
      jax.errors.JaxRuntimeError: whatever else the compiler finds.
    """
    lowered, start = plan.step.lower(plan.state, plan.frozen, plan.batch), time.perf_counter()  # type: ignore[attr-defined]
    own = sum(plan.bytes().values())
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(False, wanted(str(error), own), 0, 0, (), 0.0, time.perf_counter() - start, _told(error))
    seconds, memory = time.perf_counter() - start, program.memory_analysis()
    text = parse(program.as_text())
    return Compiled(
        True, memory.temp_size_in_bytes, max(0, memory.argument_size_in_bytes - own),
        memory.generated_code_size_in_bytes, tuple(collectives(text)), traffic(text), seconds,
    )  # fmt: skip


def wanted(message: str, arguments: int) -> int:
    """The temporaries that a program would need, from the compiler's message that they do not fit.

    Example:
      >>> wanted("memory required for HLO temporaries (70.50G) exceeds available HBM (15.75G).", 0) / 2**30
      70.5
      >>> wanted("Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G.", 2 * 2**30) / 2**30
      18.0
    """
    if found := re.search(r"temporaries \(([\d.]+)([KMGT])\)", message):
        return _bytes(*found.groups())
    if found := re.search(r"Used ([\d.]+)([KMGT]) of", message):
        return _bytes(*found.groups()) - arguments
    return 0


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def _told(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def memory(plan: Blueprint, temporaries: int, chip: Chip, *, code: int = 0, padding: int = 0) -> list[Held]:
    """What a device holds, line by line, and its share of the device's HBM."""
    lines = {**plan.bytes(), "padding": padding, "program": code, TEMPORARIES: temporaries}
    total = sum(lines.values())
    gradients = {_GRADIENTS: min(plan.gradients, temporaries)}
    rows = {**{name: count for name, count in lines.items() if count}, **gradients, "total": total}
    return [Held(name, count, round(100 * count / chip.hbm, 2)) for name, count in rows.items()]


def bounds(flops: float, moved: float, sent: float, chip: Chip) -> list[Bound]:
    """The least time of a step by its arithmetic, its memory and its links, for one device."""
    return [
        Bound("arithmetic", f"{flops / 1e12:.4g} TFLOP", f"{chip.flops / 1e12:.4g} TFLOP/s", 1e3 * flops / chip.flops),
        Bound("memory", f"{moved / 1e9:.4g} GB", f"{chip.bandwidth / 1e9:.4g} GB/s", 1e3 * moved / chip.bandwidth),
        Bound("links", f"{sent / 1e9:.4g} GB", f"{chip.links / 1e9:.4g} GB/s", 1e3 * sent / chip.links),
    ]


def sent(found: Any) -> float:
    """Bytes that one device sends."""
    return sum(collective.bytes for collective in found)
