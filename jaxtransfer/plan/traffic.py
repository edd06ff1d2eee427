"""What a compiled program moves between the device and its HBM."""

from collections.abc import Iterator

from jaxtransfer.plan.hlo import Computation, Instruction, Program

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "iota", "copy-done", "all-gather-done", "all-reduce-done",
    "collective-permute-done", "async-done", "async-update", "send-done", "recv-done", "slice-done", "add-dependency",
}  # fmt: skip


def traffic(program: Program) -> float:
    """Bytes that one call reads and writes in HBM.

    Every fused instruction reads its operands and writes its results once, a slice of an array counts as the slice,
    and what lies in memory on the chip counts for nothing.
    """
    return sum(
        times * sum(_moved(program, computation, instruction) for instruction in computation.instructions)
        for computation, times in program.runs()
    )


def _moved(program: Program, computation: Computation, instruction: Instruction) -> float:
    if instruction.op in _FREE or 'custom_call_target="AllocateBuffer"' in instruction.rest:
        return 0.0
    operands = [computation.by_name[name] for name in dict.fromkeys(instruction.operands)]
    name = instruction.called("calls") if instruction.op == "fusion" else None
    if name is None:
        return _plain(instruction, operands)
    fused = program.computations[name]
    given = [i for i in fused.instructions if i.op == "parameter"]
    order = sorted(given, key=lambda parameter: int(parameter.rest))
    read = sum(
        min(_hbm(operand), _read(fused, parameter))
        for operand, parameter in zip((computation.by_name[n] for n in instruction.operands), order, strict=False)
    )
    return read + _written(fused, instruction)


def _plain(instruction: Instruction, operands: list[Instruction]) -> float:
    """Of an instruction that is not fused with others."""
    if instruction.op in ("dynamic-slice", "slice", "gather"):
        return 2 * _hbm(instruction)
    if instruction.op == "dynamic-update-slice":
        return 2 * _hbm(operands[1]) if len(operands) > 1 else 0.0
    if instruction.op.endswith("-start"):  # its shape names what it reads as well
        return _hbm(instruction)
    return _hbm(instruction) + sum(map(_hbm, operands))


def _read(fused: Computation, parameter: Instruction) -> float:
    """How much of a parameter a fused computation reads: all, or the slices that it takes of it."""
    total = 0.0
    for user in _users(fused, parameter):
        if user.op in ("dynamic-slice", "slice", "gather"):
            total += user.bytes
        elif user.op == "dynamic-update-slice" and fused.by_name[user.operands[0]] in _views(fused, parameter):
            continue  # written in place
        else:
            return float("inf")
    return total


def _users(fused: Computation, value: Instruction) -> Iterator[Instruction]:
    for view in _views(fused, value):
        yield from (i for i in fused.instructions if view.name in i.operands and i.op != "bitcast")


def _views(fused: Computation, value: Instruction) -> list[Instruction]:
    """A value and the bitcasts of it."""
    views = [value]
    for instruction in fused.instructions:
        if instruction.op == "bitcast" and instruction.operands[0] in {view.name for view in views}:
            views.append(instruction)
    return views


def _written(fused: Computation, instruction: Instruction) -> float:
    """Of a result that is updated in place, the update alone."""
    root = fused.root
    results = [fused.by_name[name] for name in root.operands] if root.op == "tuple" else [root]
    total = 0.0
    for result, array in zip(results, instruction.arrays, strict=False):
        while result.op == "bitcast":
            result = fused.by_name[result.operands[0]]
        update = result.op == "dynamic-update-slice"
        total += (fused.by_name[result.operands[1]].bytes if update else array.bytes) if array.hbm else 0.0
    return total


def _hbm(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.arrays if array.hbm)
