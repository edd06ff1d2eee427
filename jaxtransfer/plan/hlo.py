"""Compiled programs as text, read back: computations, instructions, how often each runs, what collectives send."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: its bytes, and whether they lie in HBM (or in memory on the chip, as ``S(1)`` says)."""

    bytes: float
    hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: its name, the text of its shape, its operation, its operands, and all that follows."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that it gives."""
        return tuple(
            Array(_size(kind) * math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n), "S(" not in layout)
            for kind, dims, layout in _ARRAY.findall(self.shape)
        )

    @property
    def bytes(self) -> float:
        """Of all arrays that it gives."""
        return sum(array.bytes for array in self.arrays)

    def called(self, how: str) -> str | None:
        """The computation that it runs as its ``body``, ``condition``, ``calls`` or ``to_apply``."""
        found = re.search(rf"\b{how}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions, each after its operands."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Name -> instruction."""
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(instruction for instruction in self.instructions if instruction.root)


@dataclasses.dataclass(frozen=True)
class Program:
    """A module: its computations by name, and the one that it starts with."""

    computations: Mapping[str, Computation]
    entry: str

    def runs(self) -> Iterator[tuple[Computation, int]]:
        """Every computation of the control flow and how often it runs in one call of the program.

        Of the branches of a conditional all are given: one of them runs.

        Raises:
          ValueError: a loop whose length cannot be read.
        """
        yield from self._runs(self.computations[self.entry], 1)

    def _runs(self, computation: Computation, times: int) -> Iterator[tuple[Computation, int]]:
        yield computation, times
        for instruction in computation.instructions:
            if instruction.op == "while":
                body = self.computations[instruction.called("body") or ""]
                yield from self._runs(body, times * self.trips(computation, instruction))
            elif instruction.op in ("call", "conditional"):
                for name in _branches(instruction):
                    yield from self._runs(self.computations[name], times)

    def trips(self, computation: Computation, loop: Instruction) -> int:
        """How often the body of a loop runs: as XLA says, or from the counter that its condition compares."""
        if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        condition = self.computations[loop.called("condition") or ""]
        body, start = self.computations[loop.called("body") or ""], computation.by_name[loop.operands[0]]
        compare = condition.root
        index = _index(condition, compare.operands[0])
        limit = _constant(condition, compare.operands[1])
        if limit is None and (place := _index(condition, compare.operands[1])) is not None:
            limit = _constant(computation, start.operands[place])
        first = None if index is None else _constant(computation, start.operands[index])
        if compare.op != "compare" or "direction=LT" not in compare.rest or index is None or None in (limit, first):
            raise ValueError(f"the length of the loop {loop.name} cannot be read")
        step = _step(body, body.by_name[body.root.operands[index]])
        return -(-(limit - first) // step)  # type: ignore[operator]


def parse(text: str) -> Program:
    """A program from its text, as ``compiled.as_text()`` gives it."""
    computations, entry, name, lines = {}, "", "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line == "}":
            computations[name] = Computation(name, tuple(lines))
        elif found := _LINE.match(line):
            inside, _, rest = found[5].partition(")")
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            after = rest if operands or found[4] not in ("constant", "parameter") else inside
            lines.append(Instruction(found[2], found[3], found[4], operands, after, bool(found[1])))
    return Program(computations, entry)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind: how often they run in a step, and the bytes that each device sends for them."""

    kind: str
    count: int
    bytes: float


def collectives(program: Program) -> list[Collective]:
    """What devices say to each other in one call, by kind.

    Of n devices that share in one, each sends ``(n - 1) / n`` of what an all-gather gives or a reduce-scatter or
    all-to-all takes, twice that of an all-reduce, and all of a permutation. An all-reduce of which a fused computation
    gives a slice alone is a reduce-scatter: so TPUs' compiler writes it.
    """
    found: dict[str, tuple[int, float]] = {}
    for computation, times in program.runs():
        for fused, instruction in _with_fused(program, computation):
            kind = instruction.op.removesuffix("-start")
            if kind in COLLECTIVES:
                sent = _sent(kind, instruction)
                if kind == "all-reduce" and fused and _slices(fused.root, instruction):
                    kind, sent = "reduce-scatter", sent / 2
                count, before = found.get(kind, (0, 0.0))
                found[kind] = count + times, before + times * sent
    return [Collective(kind, *found[kind]) for kind in COLLECTIVES if kind in found]


def _slices(root: Instruction, value: Instruction) -> bool:
    return root.op == "dynamic-slice" and value.name in root.operands


def _with_fused(program: Program, computation: Computation) -> Iterator[tuple[Computation | None, Instruction]]:
    """Its instructions, and those fused into one with the computation that they are in; a channel's collective once."""
    seen: set[str] = set()
    inside = [program.computations[name] for i in computation.instructions if (name := i.called("calls"))]
    for fused in (None, *inside):
        for instruction in (fused or computation).instructions:
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            if channel is None or channel[1] not in seen:
                seen |= {channel[1]} if channel else set()
                yield fused, instruction


def _sent(kind: str, instruction: Instruction) -> float:
    arrays = [array.bytes for array in instruction.arrays if array.bytes > 4 or len(instruction.arrays) == 1]
    whole = max(arrays, default=0.0) if instruction.op.endswith("-start") else sum(arrays)
    n = group_size(instruction.rest)
    share = (n - 1) / n
    how = {"all-reduce": 2 * share, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
    if kind == "reduce-scatter" and instruction.op.endswith("-start"):
        return whole * share
    return whole * how.get(kind, share)


def group_size(text: str) -> int:
    """How many devices share in a collective.

    Example:
      >>> group_size("replica_groups={{0,1,2},{3,4,5}}"), group_size("replica_groups=[4,8]<=[32]")
      (3, 8)
      >>> group_size("replica_groups=mesh['a'=2,'b'=16] {'b'}, dimensions={0}")
      16
      >>> group_size("replica_groups=mesh['a'=32,'b'=4], device_ids=([4,32]T(1,0)) {'a'}, dimensions={0}")
      32
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    if "source_target_pairs" in text:
        return 2
    raise ValueError(f"a collective whose groups are written in no known way: {text[:200]}")


def _size(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    bits = re.search(r"\d+", kind)
    return int(bits[0]) / 8 if bits else 0.0


def _branches(instruction: Instruction) -> Sequence[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
        return re.findall(r"[\w.\-]+", found[1])
    names = [instruction.called(how) for how in ("true_computation", "false_computation", "to_apply", "calls")]
    return [name for name in names if name]


def _through(computation: Computation, name: str) -> Instruction:
    """What a value is, behind copies and bitcasts of it."""
    while (found := computation.by_name[name]).op in ("copy", "bitcast", "copy-start", "copy-done", "convert"):
        name = found.operands[0]
    return found


def _constant(computation: Computation, name: str) -> int | None:
    found = _through(computation, name)
    number = re.match(r"-?\d+", found.rest)
    return int(number[0]) if found.op == "constant" and number else None


def _index(computation: Computation, name: str) -> int | None:
    """Which part of the loop's tuple a value is."""
    found = _through(computation, name)
    index = re.search(r"index=(\d+)", found.rest)
    return int(index[1]) if found.op == "get-tuple-element" and index else None


def _step(body: Computation, counter: Instruction) -> int:
    """By how much the counter grows."""
    counter = _through(body, counter.name)
    steps = [step for name in counter.operands if (step := _constant(body, name)) is not None]
    if counter.op != "add" or len(steps) != 1 or steps[0] < 1:
        raise ValueError(f"the counter {counter.name} of a loop does not grow by a constant")
    return steps[0]
