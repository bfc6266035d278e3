"""The structure of the packages: order of imports, no circles, sizes of files and functions.

Every check is a function of a directory, so that a planted violation shows that it can fail.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mooshak", "mooshak_torch", "mooshak_jax", "parity", "benchmarks")

ORDER = (
    (
        "mooshak.errors",
        "mooshak.command_line",
        "mooshak.files",
        "mooshak.tables",
        "mooshak.mesh",
        "mooshak.hardware",
        "mooshak.device",
    ),
    ("mooshak.config",),
    ("mooshak.numerics",),
    ("mooshak.corpus",),
    ("mooshak.tokenizer",),
    ("mooshak.data",),
    ("mooshak.checkpoints",),
    ("mooshak.generation",),
    ("mooshak.serving",),
    ("mooshak.evaluation",),
    ("mooshak.training",),
    ("mooshak.report",),
    ("mooshak.plan",),
    ("mooshak_torch", "mooshak_jax"),
    ("parity",),
    ("benchmarks",),
)
"""A module imports only from its own line and from lines above it."""

FORBIDDEN = {
    "mooshak": {"torch", "jax", "flax", "optax", "orbax"},
    "mooshak_torch": {"jax", "flax", "optax", "orbax", "mooshak_jax"},
    "mooshak_jax": {"torch", "deepspeed", "mooshak_torch"},
}
"""Package -> what none of its modules imports, in functions either."""

GRAIN = "mooshak.data.batches"
"""The only module that imports Grain, which imports jax."""

LATE_IMPORTS = {
    "mooshak_torch": "a command parses its arguments before a framework is imported",
    "mooshak_jax": "a command parses its arguments before a framework is imported",
    "mooshak.serving.command": "Starlette and uvicorn are optional dependencies",
    "mooshak.data.training_data": "Grain imports jax, after the framework has made its devices",
    "mooshak.evaluation.bits_per_byte": "Grain imports jax",
    "parity.accelerator.machine": "a framework that is missing is a row of the report",
    "parity.accelerator.training": "a process imports the framework that it measures",
    "parity.accelerator.decoding": "a process imports the framework that it measures",
    "parity.accelerator.checkpoints": "a process imports the framework that it measures",
    "benchmarks.jax_models": "Grain imports jax",
    "benchmarks.torch_models": "Grain imports jax",
    "parity.export_hf": "its check imports torch, which --help does not need",
    "benchmarks.tuning": "a worker loads one framework, or TRL",
}
"""Module that imports one of ours inside a function -> the reason.

Commands may too: they parse their arguments before they import a framework.
"""

MAX_FILE, MAX_FUNCTION = 400, 60
FILE_REASON, FUNCTION_REASON = "Longer than 400 lines: ", "# Longer than 60 lines: "
"""A longer file says why in its docstring, a longer function in a comment."""


@dataclass(frozen=True)
class Import:
    """An import of a module: `source` imports `target`."""

    source: str
    target: str
    line: int
    late: bool
    """True if the import is inside a function."""

    def __str__(self) -> str:
        return f"{self.source} line {self.line} imports {self.target}"


def modules(root: Path) -> dict[str, Path]:
    """Name -> file of every module of the packages; a package's name is its `__init__`."""
    files = (file for package in PACKAGES for file in sorted((root / package).rglob("*.py")))
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def imports(root: Path) -> list[Import]:
    """Every import, those in functions and under `if TYPE_CHECKING` included."""
    known, found = modules(root), []
    for source, file in known.items():
        tree = ast.parse(file.read_text())
        functions = (n for n in ast.walk(tree) if isinstance(n, FUNCTION))
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            for target in _targets(node, source, file, known):
                found.append(Import(source, target, node.lineno, id(node) in inside))
    return found


FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def _targets(node: ast.AST, source: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = node.module or ""
        if node.level:
            parts = source.split(".") + ["__init__"] * (file.name == "__init__.py")
            package = ".".join([*parts[: -node.level], *filter(None, [node.module])])
        for alias in node.names:
            submodule = f"{package}.{alias.name}"
            yield submodule if submodule in known else package


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle of the graph, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(edges.get(name, ())):
                if found := visit(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in sorted(edges))), [])


def import_circle(root: Path) -> list[str]:
    edges: dict[str, set[str]] = {}
    for one in imports(root):
        edges.setdefault(one.source, set()).add(one.target)
    return circle(edges)


def line_of(module: str) -> int | None:
    """The line of `ORDER` that a module is on: that of its longest prefix there."""
    names = {name: line for line, names in enumerate(ORDER) for name in names}
    parts = module.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((names[prefix] for prefix in prefixes if prefix in names), None)


def against_order(root: Path) -> list[str]:
    """Imports from a line below, and modules on no line."""
    known = modules(root)
    wrong = [f"{m} is on no line" for m in known if line_of(m) is None and m != "mooshak"]
    for one in imports(root):
        if one.target not in known:
            continue
        here, there = line_of(one.source), line_of(one.target)
        # Commands come after all rooms: those of data and the tokenizer resolve `init.from`.
        is_command = one.source.endswith(".__main__")
        if there is None or here is None or (here < there and not is_command):
            wrong.append(str(one))
    return wrong


def forbidden_imports(root: Path) -> list[str]:
    """Imports of another framework, and of Grain outside of its module."""
    wrong = []
    for one in imports(root):
        package, target = one.source.split(".")[0], one.target.split(".")[0]
        if target in FORBIDDEN.get(package, ()):
            wrong.append(str(one))
        if target == "grain" and one.source != GRAIN and package.startswith("mooshak"):
            wrong.append(str(one))
    return wrong


def late_imports(root: Path) -> dict[str, list[Import]]:
    """Module, no command -> its imports of ours inside functions."""
    known = modules(root)
    commands = {name for name, file in known.items() if COMMAND in file.read_text()}
    found: dict[str, list[Import]] = {}
    for one in imports(root):
        if one.late and one.target in known and one.source not in commands:
            found.setdefault(one.source, []).append(one)
    return found


COMMAND = 'if __name__ == "__main__":'


def too_long(root: Path, folders: tuple[str, ...]) -> list[str]:
    """Files and functions that are longer than is allowed and do not say why."""
    wrong = []
    for file in sorted(file for folder in folders for file in (root / folder).rglob("*.py")):
        text = file.read_text()
        tree, lines, name = ast.parse(text), text.splitlines(), file.relative_to(root)
        if len(lines) > MAX_FILE and FILE_REASON not in (ast.get_docstring(tree) or ""):
            wrong.append(f"{name}: {len(lines)} lines")
        for node in ast.walk(tree):
            if not isinstance(node, FUNCTION):
                continue
            assert node.end_lineno is not None
            size = node.end_lineno - node.lineno + 1
            around = "\n".join(lines[max(0, node.lineno - 3) : node.end_lineno])
            if size > MAX_FUNCTION and FUNCTION_REASON not in around:
                wrong.append(f"{name}:{node.lineno} {node.name}: {size} lines")
    return wrong


def unmapped_tests(root: Path) -> list[str]:
    """Files of tests/ that its README does not describe as their docstrings do, and the reverse."""
    tests = root / "tests"
    described = {}
    for file in tests.rglob("*.py"):
        doc = ast.get_docstring(ast.parse(file.read_text())) or ""
        described[str(file.relative_to(tests))] = doc.partition("\n")[0].replace("|", "\\|")
    rows = re.findall(r"^\| `(\S+\.py)` \| (.*) \|$", (tests / "README.md").read_text(), re.M)
    return sorted({name for name, _ in described.items() ^ dict(rows).items()})


def wrong_test_names(root: Path) -> list[str]:
    """Test functions whose names are too long or used twice in a file, where one never runs."""
    wrong = []
    for file in sorted((root / "tests").rglob("test_*.py")):
        names = re.findall(r"^def (test_\w+)", file.read_text(), re.M)
        wrong += [name for name in names if len(name) > MAX_NAME or names.count(name) > 1]
    return wrong


MAX_NAME = 60


def test_imports_have_no_circle() -> None:
    assert not import_circle(ROOT)


def test_imports_follow_the_order() -> None:
    assert not against_order(ROOT)


def test_frameworks_do_not_import_each_other() -> None:
    assert not forbidden_imports(ROOT)
    assert GRAIN in {one.source for one in imports(ROOT) if one.target.split(".")[0] == "grain"}


def test_late_imports_have_a_named_reason() -> None:
    assert late_imports(ROOT).keys() == LATE_IMPORTS.keys()


def test_files_and_functions_are_short() -> None:
    assert not too_long(ROOT, (*PACKAGES, "scripts", "tests"))


def test_tests_are_mapped_and_named() -> None:
    assert not unmapped_tests(ROOT)
    assert not wrong_test_names(ROOT)


def plant(root: Path, **files: str) -> Path:
    """Write modules: `mooshak__a__b="text"` is mooshak/a/b.py."""
    for name, text in files.items():
        path = root / (re.sub(r"__(?=[a-z])", "/", name) + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "back",
    [
        "from mooshak.config.model import Model",
        "def f():\n    from mooshak.config import model",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mooshak.config.model",
        "from .model import Model",
    ],
    ids=["module", "function", "type checking", "relative"],
)
def test_circle_is_found(back: str, tmp_path: Path) -> None:
    forward = "from mooshak.config.sections import Config"
    plant(tmp_path, mooshak__config__model=forward, mooshak__config__sections=back)
    circle = ["mooshak.config.model", "mooshak.config.sections", "mooshak.config.model"]
    assert import_circle(tmp_path) == circle
    (tmp_path / "mooshak/config/sections.py").write_text("import json")
    assert not import_circle(tmp_path)


def test_import_from_below_is_found(tmp_path: Path) -> None:
    upward = "def f():\n    from mooshak.data.shards import TokenShards"
    plant(tmp_path, mooshak__data__shards="import mooshak.errors", mooshak__errors="")
    assert not against_order(tmp_path)
    plant(tmp_path, mooshak__corpus__readers=upward, mooshak__extras="")
    assert against_order(tmp_path) == [
        "mooshak.extras is on no line",
        "mooshak.corpus.readers line 2 imports mooshak.data.shards",
    ]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("mooshak__plan", "import jax.numpy as jnp"),
        ("mooshak_torch__step", "def f():\n    from mooshak_jax.model import Model"),
        ("mooshak_jax__step", "import torch"),
        ("mooshak__data__shards", "def f():\n    import grain"),
        ("mooshak_torch__step", "import grain.python as grain"),
    ],
)
def test_forbidden_import_is_found(module: str, text: str, tmp_path: Path) -> None:
    plant(tmp_path, mooshak_jax__model="", mooshak__data__batches="import grain")
    assert not forbidden_imports(tmp_path)
    assert len(forbidden_imports(plant(tmp_path, **{module: text}))) == 1


def test_late_import_is_found(tmp_path: Path) -> None:
    text = "def f():\n    import datasets\n    from mooshak import errors\n"
    plant(tmp_path, mooshak__errors="", mooshak__config__parse=text)
    plant(tmp_path, mooshak_torch__train=f"{text}{COMMAND}\n    f()")
    found = late_imports(tmp_path)
    assert [str(one) for one in found.pop("mooshak.config.parse")] == [
        "mooshak.config.parse line 3 imports mooshak.errors"
    ]
    assert not found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 0\n" * 401, '"""A table.\n\nLonger than 400 lines: one row each.\n"""\n'),
        ("def f():\n" + "    x = 0\n" * 60, "# Longer than 60 lines: one case each.\n"),
    ],
    ids=["file", "function"],
)
def test_length_without_reason_is_found(text: str, reason: str, tmp_path: Path) -> None:
    plant(tmp_path, mooshak__plan=text)
    assert len(too_long(tmp_path, ("mooshak",))) == 1
    plant(tmp_path, mooshak__plan=reason + text)
    assert not too_long(tmp_path, ("mooshak",))


def test_unmapped_or_misnamed_test_is_found(tmp_path: Path) -> None:
    long = "test_" + "x" * 56
    text = f'"""Files."""\n\ndef test_a(): ...\ndef test_b(): ...\ndef {long}(): ...\n'
    plant(tmp_path, tests__data__test_files=text.replace("test_b", "test_a"))
    (tmp_path / "tests/README.md").write_text("| `test_gone.py` | Gone. |\n")
    assert unmapped_tests(tmp_path) == ["data/test_files.py", "test_gone.py"]
    assert wrong_test_names(tmp_path) == ["test_a", "test_a", long]
    plant(tmp_path, tests__data__test_files=text.replace(long, long[:-1]))
    (tmp_path / "tests/README.md").write_text("| `data/test_files.py` | Files. |\n")
    assert not unmapped_tests(tmp_path) and not wrong_test_names(tmp_path)
