"""Comparisons of the guard: two files of results, to the last bit.

Every comparison returns None, or where the first difference is.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MACHINE = {"tokens_per_second", "time", "memory_bytes", "mfu"}
"""Metrics that are of the machine, not of the model."""

OWN = {"run", "torch", "jax"}
"""Directories of files in formats of our own, which are compared as converted to safetensors."""


def differences(base: Path, head: Path) -> Iterator[str]:
    """Compare the results of one job: a line for each file of BASE that HEAD has not the same."""
    for file in sorted(base.rglob("*")):
        name = file.relative_to(base)
        if OWN & set(name.parts) or file.suffix not in COMPARISONS:
            continue
        if not (head / name).is_file():
            yield f"{name}: HEAD has no such file"
        elif difference := COMPARISONS[file.suffix](file, head / name):
            yield f"{name}: {difference}"


def compare_metrics(base: Path, head: Path) -> str | None:
    """Compare every metric of BASE, step by step; HEAD may have more of them."""
    lines, others = (
        [json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in (base, head)
    )
    for line, other in zip(lines, others, strict=False):
        for key in line:
            if key not in MACHINE and repr(line[key]) != repr(other.get(key)):
                return f"{key} of step {line['step']}: {line[key]!r}, HEAD {other.get(key)!r}"
    return None if len(lines) == len(others) else f"{len(lines)} steps, HEAD {len(others)}"


def compare_tensors(base: Path, head: Path) -> str | None:
    """Compare tensors by name, dtype, shape and bits."""
    tensors, others = load_tensors(base), load_tensors(head)
    if names := sorted(tensors.keys() ^ others.keys()):
        return f"{len(names)} tensors in one of the two only: {', '.join(names[:4])}"
    found = []
    for name, a in tensors.items():
        b = others[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name}: {a.dtype} {list(a.shape)}, HEAD {b.dtype} {list(b.shape)}"
        a_bits, b_bits = (np.frombuffer(x.tobytes(), f"V{x.itemsize}") for x in (a, b))
        if len(at := np.flatnonzero(a_bits != b_bits)):
            place = np.unravel_index(at[0], a.shape)
            found.append(
                f"{name} {list(map(int, place))}: {a[place]!r}, HEAD {b[place]!r}, "
                f"and {len(at)} of {a.size} elements"
            )
    return f"{found[0]}; {len(found)} of {len(tensors)} tensors differ" if found else None


def load_tensors(file: Path) -> dict[str, np.ndarray]:
    """Load tensors without any code of ours."""
    if file.suffix == ".npy":
        return {"element": np.load(file)}
    if file.suffix == ".gguf":
        import gguf

        return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    from safetensors.numpy import load_file

    return load_file(file)


def compare_lines(base: Path, head: Path) -> str | None:
    """Compare texts line by line; a line of generated text is a token."""
    lines, others = (file.read_text("utf-8").split("\n") for file in (base, head))
    for number, (line, other) in enumerate(zip(lines, others, strict=False), 1):
        if line != other:
            a, b = _around_difference(line.strip(), other.strip())
            return f"line {number} of {len(lines)}: {a!r}, HEAD {b!r}"
    return None if len(lines) == len(others) else f"{len(lines)} lines, HEAD {len(others)}"


def _around_difference(a: str, b: str, width: int = 120) -> tuple[str, str]:
    """Return both lines, long ones from shortly before the first difference."""
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    start = max(0, first - width // 2) if max(len(a), len(b)) > 2 * width else 0
    return a[start : start + 2 * width], b[start : start + 2 * width]


def compare_bytes(base: Path, head: Path) -> str | None:
    """Compare files of a format of others."""
    return None if base.read_bytes() == head.read_bytes() else "the bytes differ"


COMPARISONS = {
    ".jsonl": compare_metrics,
    ".txt": compare_lines,
    ".mlir": compare_lines,
    ".model": compare_bytes,
    ".safetensors": compare_tensors,
    ".gguf": compare_tensors,
    ".npy": compare_tensors,
}
