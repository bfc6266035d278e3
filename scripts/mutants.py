"""Mutation run: plant small faults in the shared modules, and count those that their tests find.

    make mutants            or: python scripts/mutants.py [--sample 300] [--seed 0] [--limit N]

A mutant is a module with one changed expression (`<` is `<=`, a constant is one more). The tests of
that module run against it, in a copy of the working tree, in a process forked from one that has
imported the frameworks. Results are added to the file `--out`, so a run that was interrupted
continues; mutants of a module that has changed run again, with `--again` also those that survived.
Mutants that compute the same are listed in docs/mutants.md, with the reason, and not counted.
"""

import argparse
import ast
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "docs" / "mutants.md"
PRELOADED = (
    "torch",
    "jax",
    "flax.nnx",
    "grain",
    "orbax.checkpoint",
    "pyarrow.parquet",
    "transformers",
)

CHECKPOINTS = ("checkpoints/test_base", "checkpoints/test_manager", "parity/test_convert")
SHARDS = tuple(f"data/test_{name}" for name in ("shards", "offsets", "changed_text", "packing"))
SAMPLING = ("generation/test_sampling",)
"""With its slow tests, which take seconds: only they sort all tokens."""
TESTS = {
    "mooshak/numerics/init_weights": ("numerics/test_numerics",),
    "mooshak/numerics/philox": ("numerics/test_numerics",),
    "mooshak/numerics/rope": ("numerics/test_numerics",),
    "mooshak/numerics/sampling_noise": ("numerics/test_numerics",),
    "mooshak/numerics/schedule": ("numerics/test_numerics",),
    "mooshak/corpus/filters": ("corpus/test_readers",),
    "mooshak/corpus/readers": (
        "corpus/test_readers",
        "corpus/test_odd_files",
        "data/test_changed_text",
    ),
    "mooshak/corpus/tales": ("corpus/test_tales",),
    "mooshak/data/batches": ("data/test_batches", "data/test_packing"),
    "mooshak/data/packing": ("data/test_packing", "data/test_batches"),
    "mooshak/data/manifest": SHARDS,
    "mooshak/data/shards": SHARDS,
    "mooshak/evaluation/bits_per_byte": ("evaluation/test_bits_per_byte", "data/test_packing"),
    "mooshak/checkpoints/base": CHECKPOINTS,
    "mooshak/checkpoints/checksums": CHECKPOINTS,
    "mooshak/checkpoints/formats": ("checkpoints/test_formats", *CHECKPOINTS),
    "mooshak/checkpoints/hf": ("checkpoints/test_hf_files", "parity/test_huggingface"),
    "mooshak/checkpoints/hf_config": ("checkpoints/test_hf_files", "parity/test_huggingface"),
    "mooshak/checkpoints/init_from": ("checkpoints/test_resolve", "checkpoints/test_init_from"),
    "mooshak/checkpoints/manager": ("checkpoints/test_manager",),
    "mooshak/checkpoints/resume": ("checkpoints/test_resume",),
    "mooshak/checkpoints/safetensors": CHECKPOINTS,
    "mooshak/generation/text": ("generation/test_text_stream", "generation/test_decode"),
    "mooshak_torch/sampling": SAMPLING,
    "mooshak_jax/sampling": SAMPLING,
}
"""Module -> the files of its fast tests, the most likely to fail first."""

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Add, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "any": "all", "minimum": "maximum", "amax": "amin", "floor": "ceil"}
NAMES |= {new: old for old, new in NAMES.items()}
IGNORED_FIELDS = ("annotation", "returns", "decorator_list")
IGNORED_NODES = (ast.Raise, ast.JoinedStr, ast.Assert)
"""Types, and texts of errors, are not tested by numbers."""


@dataclass(frozen=True)
class Mutant:
    """A change of a module: `name` says which, `code` is the changed module."""

    module: str
    line: int
    change: str
    code: str

    @property
    def name(self) -> str:
        """The module and the change, without the line, which moves."""
        return f"{self.module}.py: {self.change}"


def main() -> None:
    """Run the mutants of the sample that have no result yet, and print the share that is found."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=sys.maxsize, help="run at most N mutants now")
    parser.add_argument("--again", action="store_true", help="run those that survived again")
    parser.add_argument("--only", default="", help="run those of modules with this in their name")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants.json")
    options = parser.parse_args()
    results = read_results(options.out)
    chosen = sample(options.sample, options.seed, results)
    todo = [m for m in chosen if needs_run(m, results, options.again) and options.only in m.module]
    del todo[options.limit :]
    if todo:
        with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
            runner = Runner(Path(directory))
            for mutant in todo:
                result = runner.run(mutant)
                results = read_results(options.out)  # Another process may run other modules.
                results[mutant.name] = asdict(mutant) | result | {"code": digest(mutant.code)}
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
                print(
                    f"{result['outcome']:8} {result['seconds']:5.1f} s  {mutant.name}", flush=True
                )
    report(chosen, results)


def read_results(path: Path) -> dict[str, dict]:
    """Return the results of earlier runs by the name of the mutant."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def needs_run(mutant: Mutant, results: dict[str, dict], again: bool) -> bool:
    """Return whether a mutant has no result, one of other code, or survived and runs again."""
    past = results.get(mutant.name)
    if past is None or past["code"] != digest(mutant.code):
        return True
    return again and past["outcome"] == "survived" and mutant.name not in equivalent()


def equivalent() -> set[str]:
    """Return the names of the mutants that docs/mutants.md lists, each in backticks in a row."""
    text = EQUIVALENT.read_text("utf-8") if EQUIVALENT.is_file() else ""
    return set(re.findall(r"^\| `(.*?)` \|", text.replace("\\|", "|"), re.MULTILINE))


def report(chosen: list[Mutant], results: dict[str, dict]) -> None:
    """Print the survivors, and the share of the mutants that the tests find."""
    same = equivalent()
    done = [m for m in chosen if m.name in results and m.name not in same]
    survivors = [m for m in done if results[m.name]["outcome"] == "survived"]
    for mutant in survivors:
        print(f"survived: {mutant.module}.py:{mutant.line}: {mutant.change}")
    listed = sum(mutant.name in same for mutant in chosen)
    found = len(done) - len(survivors)
    print(
        f"{found} of {len(done)} mutants found ({100 * found / max(len(done), 1):.1f} %), "
        f"{listed} equivalent, {len(chosen) - listed - len(done)} not run"
    )


def sample(count: int, seed: int, done: Iterable[str]) -> list[Mutant]:
    """Return a seeded sample of the mutants of all modules, in the order of the modules.

    Those that are `done` and still exist are in it: a run continues with its sample after a change.
    """
    trees = {module: ast.parse((ROOT / f"{module}.py").read_text("utf-8")) for module in TESTS}
    every = [mutant.name for module in TESTS for mutant in mutants(module, trees[module])]
    first = [name for name in done if name in set(every)]
    others = [name for name in every if name not in set(first)]
    random.Random(seed).shuffle(others)
    chosen = {*first, *others[: max(0, count - len(first))]}
    return [m for module in TESTS for m in mutants(module, trees[module], chosen) if m.code]


def mutants(module: str, tree: ast.Module, chosen: Collection[str] = ()) -> Iterator[Mutant]:
    """Yield every mutant of a module; those that are `chosen`, by name, have their code."""
    seen: Counter[str] = Counter()
    for statement, parent, field, index, new in list(sites(tree)):
        before, old = head(statement), getattr(parent, field)
        setattr(parent, field, new if index is None else [*old[:index], new, *old[index + 1 :]])
        change = f"{before} -> {head(new if isinstance(new, ast.stmt) else statement)}"
        seen[change] += 1
        change += f" #{seen[change]}" if seen[change] > 1 else ""
        mutant = Mutant(module, statement.lineno, change, "")
        yield replace(mutant, code=ast.unparse(tree)) if mutant.name in chosen else mutant
        setattr(parent, field, old)


def head(statement: ast.AST) -> str:
    """Return a statement in one line: of a compound one the first line."""
    compound = hasattr(statement, "body")
    text = ast.unparse(statement)
    return text.split("\n", 1)[0] if compound else " ".join(text.split())


Site = tuple[ast.stmt, ast.AST, str, int | None, ast.AST]


def sites(tree: ast.AST, statement: ast.stmt | None = None) -> Iterator[Site]:
    """Yield statement, parent, field, index in the field and new node of every change."""
    for field, value in ast.iter_fields(tree):
        if field in IGNORED_FIELDS:
            continue
        several = isinstance(value, list)
        for index, child in enumerate(value if several else [value]):
            if not isinstance(child, ast.AST) or isinstance(child, IGNORED_NODES):
                continue
            inside = child if isinstance(child, ast.stmt) else statement
            if inside is not None:
                for new in changes(child):
                    yield inside, tree, field, index if several else None, new
            yield from sites(child, inside)


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what replaces a node: another operator, another constant, the negated condition."""
    if type(node) in OPERATORS:
        yield OPERATORS[type(node)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield ast.Constant(1.5 * node.value + (not node.value))
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
        yield node.operand
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield ast.Call(ast.Name(NAMES[node.func.id], ast.Load()), node.args, node.keywords)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield ast.Attribute(node.value, NAMES[node.attr], node.ctx)
    elif isinstance(node, ast.If | ast.IfExp) and not isinstance(node.test, ast.UnaryOp):
        parts = {**dict(ast.iter_fields(node)), "test": ast.UnaryOp(ast.Not(), node.test)}
        yield type(node)(**parts)
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, ast.Break):
        yield ast.Continue()


def digest(code: str) -> str:
    """Return a short hash of a mutant's module, which changes with the module."""
    return hashlib.sha256(code.encode()).hexdigest()[:16]


class Runner:
    """Runs tests in a copy of the working tree, each time in a forked process."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.seconds = directory, dict[str, float]()
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        ).stdout.split(b"\0")  # fmt: skip
        for name in filter(None, map(os.fsdecode, names)):
            if (ROOT / name).is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, directory / name)
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(directory)}
        os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        # Mutants of one module may have equal times and sizes, by which compiled files are found.
        sys.dont_write_bytecode = True
        cache = ROOT / ".pytest_cache" / "mutants"
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        os.chdir(directory)
        sys.path[:] = [str(directory), *(p for p in sys.path if not p.startswith(str(ROOT / "s")))]
        for name in PRELOADED:
            importlib.import_module(name)

    def run(self, mutant: Mutant) -> dict[str, object]:
        """Return the outcome, the first test that failed and the seconds."""
        path = self.directory / f"{mutant.module}.py"
        source = path.read_text("utf-8")
        tests = TESTS[mutant.module]
        if mutant.module not in self.seconds:
            passed, failed, self.seconds[mutant.module] = self.pytest(tests, 600)
            if not passed:
                sys.exit(f"error: the tests of {mutant.module}.py fail without a mutant: {failed}")
        path.write_text(mutant.code, "utf-8")
        try:
            passed, failed, seconds = self.pytest(tests, 3 * self.seconds[mutant.module] + 30)
        finally:
            path.write_text(source, "utf-8")
        return {
            "outcome": "survived" if passed else "found",
            "test": failed,
            "seconds": round(seconds, 1),
        }

    def pytest(self, tests: tuple[str, ...], timeout: float) -> tuple[bool, str, float]:
        """Run test files; return whether they pass, the first failure, and the seconds."""
        log, start = self.directory / "pytest.log", time.monotonic()
        child = os.fork()
        if not child:
            self._in_child(log, tests)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > start + timeout:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return False, "timeout", time.monotonic() - start
            time.sleep(0.02)
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text("utf-8", "replace"), re.M)
        passed = os.waitstatus_to_exitcode(ended[1]) == 0
        return passed, "" if passed else (failed or ["ended"])[0], time.monotonic() - start

    def _in_child(self, log: Path, tests: tuple[str, ...]) -> None:
        """Run pytest in this process, and end it."""
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        import pytest

        files = [str(self.directory / "tests" / f"{test}.py") for test in tests]
        options = ["-x", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
        options += [] if tests == SAMPLING else ["-m", "not slow"]
        code = pytest.main([*options, *files])
        sys.stdout.flush()
        os._exit(int(code))


if __name__ == "__main__":
    main()
