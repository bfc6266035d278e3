"""A revision that the guard measures: its tree, the commands that run in it, and its names.

Names that differ between trees are translated here (and in scripts/guard_lower.py), nowhere else.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SETTINGS: dict[str, Any] = yaml.safe_load((HERE / "guard.yaml").read_text("utf-8"))

RENAMED = {
    "gradient_accumulation_steps": "accumulation",
    "stop_after_step": "stop_at",
    "max_grad_norm": "clip_norm",
    "min_lr_ratio": "final_fraction",
}
"""Key of the configuration -> its name in trees that do not have it."""
WHERE_KNOWN = {"data": {"document_mask": False}}
"""Settings with which a tree that has them computes what trees without them do."""

Sections = dict[str, dict[str, Any]]


class CommandFailed(Exception):
    """A command of a revision that failed; the message is the end of its standard error."""


@dataclass(frozen=True)
class Revision:
    """A revision: its tree (None: all its results are cached) and its directory of results."""

    name: str
    tree: Path | None
    out: Path
    base: Path
    """Results of BASE."""
    steps: int
    failures: list[str] = field(default_factory=list)

    def run(self, *words: object, ranks: int = 1) -> tuple[str, float, int]:
        """Run `python -m WORDS` of this tree; returns its output, seconds and peak bytes."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return self.python(*(launcher if ranks > 1 else ()), "-m", *words)

    def python(self, *words: object) -> tuple[str, float, int]:
        """Run Python in this tree, on CPUs, with one thread; returns as `run` does."""
        here = {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        here |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
        here |= {"JAX_COMPILATION_CACHE_DIR": str(self.base.parent / "jax")}
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=self.tree,
                env=os.environ | here,
                stdout=stdout,
                stderr=stderr,
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
            stdout.seek(0)
            stderr.seek(0)
            if process.returncode:
                raise CommandFailed(stderr.read().decode(errors="replace").strip()[-2000:])
            return stdout.read().decode(), seconds, 1024 * usage.ru_maxrss

    def knows(self, name: str, pattern: str = r"^    {}:") -> bool:
        """Return whether a field of that name is declared in the tree's shared package."""
        assert self.tree is not None
        wanted = re.compile(pattern.format(name), re.MULTILINE)
        return any(
            wanted.search(file.read_text("utf-8")) for file in self.tree.glob("mooshak/**/*.py")
        )

    def config(self, file: Path, model: str, sections: Sections | None = None) -> Path:
        """Write the configuration of a model, some sections changed, in this tree's key names."""
        inputs = self.out / "inputs"
        places: Sections = {"data": {"dir": str(inputs)}}
        places |= {"tokenizer": {"path": str(inputs / "tokenizer.model")}}
        places |= {"model": SETTINGS["models"][model]}
        # The schedule continues after the last step of the guard.
        places |= {"train": {"steps": 2 * self.steps, "stop_after_step": self.steps}}
        config: Sections = {}
        for part in (SETTINGS["common"], places, sections or {}):
            for section, values in part.items():
                config[section] = config.get(section, {}) | values
        for section, values in WHERE_KNOWN.items():
            config[section] |= {key: value for key, value in values.items() if self.knows(key)}
        old = {new: name for new, name in RENAMED.items() if not self.knows(new)}
        for section, values in config.items():
            config[section] = {old.get(key, key): value for key, value in values.items()}
        file.write_text(yaml.safe_dump(config), "utf-8")
        return file

    def generate(self, framework: str, checkpoint: Path, *options: str) -> tuple[str, float, int]:
        """Run a generate command, its options in this tree's spelling; returns as `run` does."""
        if not self.knows("max_new_tokens", r'"--{0}"|^    {0}:'):
            old = {"--max_new_tokens": "--tokens", "--top_p": "--top-p"}
            options = tuple(old.get(word, word) for word in options)
        return self.run(f"mooshak_{framework}.generate", checkpoint, *options)

    def checkpoint(self, framework: str, model: str) -> Path:
        """Return the path of a checkpoint that BASE wrote."""
        return self.base / framework / model / "single" / "run" / "checkpoints" / str(self.steps)

    def attempt(self, job: str, make: Callable[["Revision", Path], None]) -> None:
        """Make the results of a job, if they are not cached; a failure is recorded."""
        out, start = self.out / job, time.perf_counter()
        if is_done(out):
            return
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        try:
            make(self, out)
            (out / "done").touch()
        except (CommandFailed, OSError) as error:
            self.failures.append(f"{job}: a command of {self.name} failed:\n{error}")
        report(f"{self.name}  {job:32}{time.perf_counter() - start:6.1f} s")


def is_done(out: Path) -> bool:
    """Return whether a job has completed in that directory."""
    return (out / "done").is_file()


def report(line: str) -> None:
    """Print a line of progress."""
    print(line + "\n", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Check a revision out into a temporary worktree."""
    with tempfile.TemporaryDirectory(prefix="guard-") as directory:
        tree = Path(directory).resolve() / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), revision)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*words: str) -> str:
    """Return what git prints, run in the working directory."""
    done = subprocess.run(["git", *words], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout.strip()
