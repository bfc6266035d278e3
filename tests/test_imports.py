"""The rooms of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "mooshak": {"torch", "jax", "flax", "optax", "orbax", "mooshak_torch", "mooshak_jax", "parity"},
    "mooshak_torch": {"jax", "flax", "optax", "orbax", "mooshak_jax", "parity"},
    "mooshak_jax": {"torch", "mooshak_torch", "parity"},
}
FILES = [(room, path) for room in FORBIDDEN for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(("room", "path"), FILES, ids=lambda value: getattr(value, "name", value))
def test_imports(room: str, path: Path) -> None:
    assert not imported(path) & FORBIDDEN[room]


def test_only_batches_imports_grain() -> None:
    importers = {str(p.relative_to(ROOT)) for _, p in FILES if "grain" in imported(p)}
    assert importers <= {"mooshak/data/batches.py"}


@pytest.mark.parametrize(
    "name", ["model", "ops/cross_entropy", "train", "optimizer", "parallel", "generate"]
)
def test_the_mirror_has_the_same_files(name: str) -> None:
    assert (ROOT / "mooshak_torch" / f"{name}.py").is_file()
    assert (ROOT / "mooshak_jax" / f"{name}.py").is_file()
