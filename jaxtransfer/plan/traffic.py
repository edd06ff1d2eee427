"""What a compiled program moves between the device and its HBM."""

from jaxtransfer.plan.hlo import COLLECTIVES, Computation, Instruction, Program

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "iota", "copy-done", "all-gather-done", "all-reduce-done",
    "collective-permute-done", "async-done", "async-update", "send-done", "recv-done", "slice-done", "add-dependency",
}  # fmt: skip


def traffic(program: Program) -> float:
    """Bytes that one call reads and writes in HBM.

    Every fused instruction reads its operands and writes its results once, a slice of an array counts as the slice,
    and what lies in memory on the chip counts for nothing. A collective that goes on beside several fused computations
    is counted where it starts.
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
    if 'custom_call_target="AsyncCollectiveDone"' in fused.root.rest:
        return 0.0
    given = zip((computation.by_name[name] for name in instruction.operands), _parameters(fused), strict=False)
    read = sum(min(_hbm(operand), _read(program, fused, parameter)) for operand, parameter in given)
    return read + _written(program, fused, instruction)


def _parameters(fused: Computation) -> list[Instruction]:
    given = [i for i in fused.instructions if i.op == "parameter"]
    return sorted(given, key=lambda parameter: int(parameter.rest))


def _plain(instruction: Instruction, operands: list[Instruction]) -> float:
    """Of an instruction that is not fused with others."""
    if instruction.op in ("dynamic-slice", "slice", "gather"):
        return 2 * _hbm(instruction)
    if instruction.op == "dynamic-update-slice":
        return 2 * _hbm(operands[1]) if len(operands) > 1 else 0.0
    if instruction.op.endswith("-start"):  # its shape names what it reads as well
        return _hbm(instruction)
    return _hbm(instruction) + sum(map(_hbm, operands))


def _read(program: Program, fused: Computation, parameter: Instruction) -> float:
    """How much of a parameter a fused computation, with those fused into it, reads: all, or the slices taken of it."""
    total = 0.0
    views = _views(program, fused, parameter)
    if fused.root.name in views:
        return float("inf")
    for user in fused.instructions:
        if user.name in views or not views.intersection(user.operands):
            continue
        if user.root and user.op == "tuple" and parameter.name in user.operands:
            continue  # handed on
        if user.op in ("dynamic-slice", "slice", "gather"):
            total += user.bytes
        elif user.op == "dynamic-update-slice" and user.operands[0] in views:
            continue  # written in place
        elif user.op == "fusion":
            within = program.computations[user.called("calls") or ""]
            total += sum(
                _read(program, within, inner)
                for name, inner in zip(user.operands, _parameters(within), strict=True)
                if name in views
            )
        else:
            return float("inf")
    return total


def _views(program: Program, fused: Computation, value: Instruction) -> set[str]:
    """A value, and what is the same numbers in another order: bitcasts, and copies that are never made."""
    views = {value.name}
    for instruction in fused.instructions:
        if views.intersection(instruction.operands) and _same(program, instruction):
            views.add(instruction.name)
    return views


def _same(program: Program, instruction: Instruction) -> bool:
    if instruction.op == "fusion":
        within = program.computations[instruction.called("calls") or ""].instructions
        return all(inner.op == "parameter" or _same(program, inner) for inner in within)
    return instruction.op in ("bitcast", "copy")


def _written(program: Program, fused: Computation, instruction: Instruction) -> float:
    """Of a result that is updated in place, the update alone."""
    root = fused.root
    results = [fused.by_name[name] for name in root.operands] if root.op == "tuple" else [root]
    if len(results) != len(instruction.arrays):
        return _hbm(instruction)
    return sum(
        min(array.bytes, _made(program, fused, result))
        for result, array in zip(results, instruction.arrays, strict=True)
        if array.hbm
    )


def _made(program: Program, fused: Computation, result: Instruction) -> float:
    """How much of its result an instruction writes: all, what it puts into an array that is there, or nothing."""
    while result.op == "bitcast":
        result = fused.by_name[result.operands[0]]
    if result.op == "parameter" or (result.op in COLLECTIVES and "chain_id" in result.rest):
        return 0.0
    if result.op == "fusion":
        within = program.computations[result.called("calls") or ""]
        return _made(program, within, within.root)
    return fused.by_name[result.operands[1]].bytes if result.op == "dynamic-update-slice" else float("inf")


def _hbm(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.arrays if array.hbm)
