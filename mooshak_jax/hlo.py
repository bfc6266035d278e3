"""Collectives of a compiled program: the bytes that each sends, and how often a step runs it.

Parsed from the text of XLA's optimized HLO. A collective in a loop counts once per iteration. One
that the compiler has fused, made asynchronous or split into several operations counts as one.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

Groups = tuple[tuple[int, ...], ...]
"""Groups of devices that communicate, by device number in the program."""

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """Collective operation of a program."""

    kind: str
    """One of `KINDS`."""
    size: int
    """Bytes of the full array: the result of an all-gather, the operand of the others."""
    groups: Groups
    count: int
    """Executions in a step."""
    source: str
    """Name of the JAX operation that it was lowered from."""

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends in a step.

        In a ring each device sends (n - 1) / n of the array, twice for all-reduce
        (arXiv:1802.05799, section 3); a permutation sends the full array.
        """
        n = max(map(len, self.groups))
        share = 1.0 if self.kind == "collective-permute" else (n - 1) / n
        return self.count * self.size * share * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str) -> list[Collective]:
    """Return all collectives of `compiled.as_text()`, most bytes sent first.

    Raises `ValueError` if the number of iterations of a loop with collectives is unknown.
    """
    computations, entry = _computations(text)
    found: dict[object, Collective] = {}
    for name, count in _counts(computations, entry).items():
        for instruction in computations[name].values():
            collective = _collective(instruction, computations[name])
            if collective is None:
                continue
            if count < 1:
                raise ValueError(f"unknown number of iterations around {instruction.line}")
            # A collective that is split to overlap with other work: all operations have its channel
            # and a chain. Some are in a loop, but the first runs once.
            split = re.search(r'channel_id=(\d+).*chain_id="\d+"', instruction.line)
            key = split[1] if split else (name, instruction.name)
            previous = found[key].count if key in found else count
            found[key] = replace(collective, count=min(previous, count))
    return sorted(found.values(), key=lambda collective: -collective.bytes_sent)


@dataclass(frozen=True)
class _Instruction:
    """Instruction `name = result opcode(operands), attributes`."""

    name: str
    result: str
    opcode: str
    operands: list[str]
    line: str


_Computation = dict[str, _Instruction]


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """Return name -> instructions of every computation, and the name of the entry computation."""
    computations: dict[str, _Computation] = {}
    entry, instructions = "", {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            instructions = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif parts := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)", line):
            name, result, opcode, rest = parts.groups()
            operands = re.findall(r"%([\w.\-]+)", rest[: rest.find(")")])
            instructions[name] = _Instruction(name, result, opcode, operands, line)
    return computations, entry


def _counts(computations: dict[str, _Computation], entry: str) -> dict[str, int]:
    """Return how often a step runs each computation; less than 1 if unknown."""
    counts: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        counts[name] += count
        for instruction in computations[name].values():
            if not instruction.opcode.endswith(("-update", "-done")):
                times = _iterations(instruction, computations[name], computations)
                for attribute in re.findall(
                    r"(?:body|calls|to_apply|\w*computations?)=(\{.*?\}|%[\w.\-]+)",
                    instruction.line,
                ):
                    for called in re.findall(r"%([\w.\-]+)", attribute):
                        visit(called, count * times)

    visit(entry, 1)
    return counts


def _iterations(
    loop: _Instruction, parent: _Computation, computations: dict[str, _Computation]
) -> int:
    """Return how often an instruction runs the computations that it calls.

    That is a loop's number of iterations, 0 if unknown, and 1 for other instructions. XLA for CPU
    and GPU annotates it. XLA for TPU does not: it is computed from the counter's start, the limit
    in the condition, and the increment in the body.
    """
    if loop.opcode != "while":
        return 1
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(known[1])
    names = re.search(r"condition=%([\w.\-]+), body=%([\w.\-]+)", loop.line)
    assert names is not None, loop.line
    condition, body = computations[names[1]], computations[names[2]]
    test, result = list(condition.values())[-1], list(body.values())[-1]
    if test.opcode != "compare" or "direction=LT" not in test.line:
        return 0
    counter, limit = (condition[name] for name in test.operands)
    place = re.search(r"index=(\d+)", counter.line.split("get-tuple-element")[-1])
    if place is None:
        return 0
    added = body[result.operands[int(place[1])]]
    start = _constant(parent[loop.operands[0]].operands[int(place[1])], parent)
    end = _constant(limit.name, condition)
    step = next((c for c in (_constant(name, body) for name in added.operands) if c), None)
    if added.opcode != "add" or start is None or end is None or step is None:
        return 0
    return -(-(end - start) // step)


def _constant(name: str, computation: _Computation) -> int | None:
    """Return the value of an integer constant, or of a copy of one; None for others."""
    instruction = computation[name]
    if instruction.opcode in ("copy", "bitcast"):
        return _constant(instruction.operands[0], computation)
    value = re.search(r" constant\((-?\d+)\)", instruction.line)
    return int(value[1]) if value else None


def _collective(instruction: _Instruction, computation: _Computation) -> Collective | None:
    """Return the collective that an instruction starts, with count 1; None for others."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    groups = _groups(instruction.line)
    n = max(map(len, groups))
    size = _size(instruction.result)
    if instruction.opcode == "all-gather-start":
        size = size * n // (n + 1)  # Operand and result, n times as large.
    elif instruction.opcode == "collective-permute-start":
        size //= 2  # Operand and result.
    elif kind == "reduce-scatter":
        size *= n
    elif kind == "all-reduce" and any(i.opcode == "dynamic-slice" for i in computation.values()):
        # TPU: an all-reduce fused with the slice of this device's shard is a reduce-scatter.
        kind = "reduce-scatter"
    source = re.search(r'op_name="([^"]*)"', instruction.line)
    return Collective(kind, size, groups, 1, source[1] if source else "")


def _size(shape: str) -> int:
    """Return the bytes of an array or a tuple of arrays, without tokens and flags."""
    total = 0
    for dtype, sizes in re.findall(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]", shape):
        if dtype == "u32" and not sizes:
            continue
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        total += math.prod(map(int, filter(None, sizes.split(",")))) * bits // 8
    return total


def _groups(line: str) -> Groups:
    """Return the groups of a collective, in any notation of XLA.

    Raises `ValueError` for another notation.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line):
        return _connected(
            [tuple(map(int, p.split(","))) for p in re.findall(r"\{([\d,]+)\}", pairs[1])]
        )
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", line):
        return tuple(tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d, ]+)\}", listed[1]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source = _integers(iota[1]), _integers(iota[2])
        order = _integers(iota[3]) if iota[3] else list(range(len(source)))
        numbers = np.arange(math.prod(source)).reshape(source).transpose(order).reshape(shape)
        return tuple(map(tuple, numbers.tolist()))
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\]"
        r"(?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? *\{([^}]*)\}",
        line,
    ):
        axes = re.findall(r"'([^']+)'=(\d+)", mesh[1])
        sizes = [int(size) for _, size in axes]
        chosen = re.findall(r"'([^']+)'", mesh[5])
        names = [name for name, _ in axes]
        rest = [i for i, name in enumerate(names) if name not in chosen]
        order = [*rest, *(names.index(name) for name in chosen)]
        n = math.prod(sizes[names.index(name)] for name in chosen)
        devices = np.array(_integers(mesh[4])) if mesh[4] else np.arange(math.prod(sizes))
        if mesh[3]:
            devices = devices.reshape(_integers(mesh[2])).transpose(_integers(mesh[3]))
        numbers = devices.reshape(sizes).transpose(order).reshape(-1, n)
        return tuple(map(tuple, numbers.tolist()))
    raise ValueError(f"unknown notation of replica groups: {line[:2000]}")


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _connected(pairs: list[tuple[int, ...]]) -> Groups:
    """Return the connected components of pairs (sender, receiver)."""
    groups: dict[int, set[int]] = {}
    for pair in pairs:
        joined = set().union(*({device} | groups.get(device, set()) for device in pair))
        groups.update(dict.fromkeys(joined, joined))
    return tuple({id(group): tuple(sorted(group)) for group in groups.values()}.values())
