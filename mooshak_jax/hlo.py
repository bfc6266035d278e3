"""The collectives of a compiled program: what each moves, and how often a step runs it.

They are read from the text of XLA's optimised program. A loop counts as often as it turns; what a
compiler has fused, made asynchronous or cut into pieces counts as the one collective that it is.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

Groups = tuple[tuple[int, ...], ...]
"""The devices that exchange with each other, by their number in the program."""

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str
    """One of `KINDS`."""
    size: int
    """Bytes of the whole array: all-gather's result, the operand of the others."""
    groups: Groups
    count: int
    """How often a step runs it."""
    source: str
    """Where it comes from: the name of the operation that JAX traced."""

    @property
    def moved(self) -> float:
        """Bytes that each device sends in a step.

        Along a ring every device passes on (n - 1) / n of the array, twice for all-reduce
        (arXiv:1802.05799, section 3); a permutation is sent in whole.
        """
        n = max(map(len, self.groups))
        share = 1.0 if self.kind == "collective-permute" else (n - 1) / n
        return self.count * self.size * share * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str) -> list[Collective]:
    """All collectives of `compiled.as_text()`, the largest first.

    Raises `ValueError` where a loop with collectives does not say how often it turns.
    """
    computations, entry = _computations(text)
    found: dict[object, Collective] = {}
    for name, count in _counts(computations, entry).items():
        for instruction in computations[name].values():
            collective = _collective(instruction, computations[name])
            if collective is None:
                continue
            if count < 1:
                raise ValueError(f"how often does the loop around {instruction.line} turn?")
            # Pieces of one collective, which other work is put between, share chain and channel;
            # some stand in a loop, but it begins once.
            piece = re.search(r'channel_id=(\d+).*chain_id="\d+"', instruction.line)
            key = piece[1] if piece else (name, instruction.name)
            before = found[key].count if key in found else count
            found[key] = replace(collective, count=min(before, count))
    return sorted(found.values(), key=lambda collective: -collective.moved)


@dataclass(frozen=True)
class _Instruction:
    """name = result opcode(operands), attributes."""

    name: str
    result: str
    opcode: str
    operands: list[str]
    line: str


_Computation = dict[str, _Instruction]


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """Name -> instructions of every computation, and the name of the first to run."""
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
    """How often a step runs each computation; not positive where a loop does not say it."""
    counts: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        counts[name] += count
        for instruction in computations[name].values():
            if not instruction.opcode.endswith(("-update", "-done")):
                times = _turns(instruction, computations[name], computations)
                for attribute in re.findall(
                    r"(?:body|calls|to_apply|\w*computations?)=(\{.*?\}|%[\w.\-]+)",
                    instruction.line,
                ):
                    for called in re.findall(r"%([\w.\-]+)", attribute):
                        visit(called, count * times)

    visit(entry, 1)
    return counts


def _turns(loop: _Instruction, around: _Computation, computations: dict[str, _Computation]) -> int:
    """How often an instruction runs what it calls: a loop's turns, 0 if unknown; 1 for others.

    XLA for CPU and GPU writes it down. XLA for TPU does not: there it follows from the counter's
    first value, its last, by the loop's condition, and what the body adds to it.
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
    start = _constant(around[loop.operands[0]].operands[int(place[1])], around)
    last = _constant(limit.name, condition)
    step = next((c for c in (_constant(name, body) for name in added.operands) if c), None)
    if added.opcode != "add" or start is None or last is None or step is None:
        return 0
    return -(-(last - start) // step)


def _constant(name: str, computation: _Computation) -> int | None:
    """The value of an instruction that is a whole number, or the copy of one."""
    instruction = computation[name]
    if instruction.opcode in ("copy", "bitcast"):
        return _constant(instruction.operands[0], computation)
    value = re.search(r" constant\((-?\d+)\)", instruction.line)
    return int(value[1]) if value else None


def _collective(instruction: _Instruction, computation: _Computation) -> Collective | None:
    """The collective that an instruction is, once; None for any other, and for ends of such."""
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
        # TPU: fused with the choice of this device's part, it is a reduce-scatter.
        kind = "reduce-scatter"
    source = re.search(r'op_name="([^"]*)"', instruction.line)
    return Collective(kind, size, groups, 1, source[1] if source else "")


def _size(shape: str) -> int:
    """Bytes of an array or of a tuple of arrays; what is not data (tokens, flags) left out."""
    total = 0
    for dtype, sizes in re.findall(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]", shape):
        if dtype == "u32" and not sizes:
            continue
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        total += math.prod(map(int, filter(None, sizes.split(",")))) * bits // 8
    return total


def _groups(line: str) -> Groups:
    """The groups of a collective, in any of the notations of XLA."""
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
    raise ValueError(f"replica groups in a notation that is not known: {line[:2000]}")


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _connected(pairs: list[tuple[int, ...]]) -> Groups:
    """The sets of devices that pairs of sender and receiver join."""
    of: dict[int, set[int]] = {}
    for pair in pairs:
        joined = set().union(*({device} | of.get(device, set()) for device in pair))
        of.update(dict.fromkeys(joined, joined))
    return tuple({id(group): tuple(sorted(group)) for group in of.values()}.values())
