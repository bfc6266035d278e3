"""Workers that run a complete command: the time until the first step is done."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.case import Size
from benchmarks.worker import Repeat
from mooshak.errors import InputError
from mooshak.training.metrics import read_metrics

_TINY = "--model.dim 32 --model.n_layers 1 --model.n_heads 2 --model.hidden_dim 64"
_TINY += " --data.dir {dir}/data --tokenizer.path {dir}/tokenizer.model"


def start_torch(size: Size) -> Repeat:
    """Time `python -m mooshak_torch.train --config configs/demo.yaml`."""
    return _start("mooshak_torch.train", size)


def start_jax(size: Size) -> Repeat:
    """Time `python -m mooshak_jax.train --config configs/demo.yaml`, compilation cached."""
    return _start("mooshak_jax.train", size)


def _start(module: str, size: Size) -> Repeat:
    directory = tempfile.TemporaryDirectory()
    numbers = iter(range(10**6))
    options = [
        "--config",
        "configs/demo.yaml",
        "--train.stop_after_step",
        "1",
        "--evaluate.every",
        "0",
    ]
    options += ["--run.progress", "false"]
    if size.get("tiny"):
        options += [word.format(dir=directory.name) for word in _TINY.split()]

    def repeat() -> float:
        run = Path(directory.name) / f"run{next(numbers)}"
        words = [sys.executable, "-m", module, *options, "--run.dir", str(run)]
        start = time.time()
        done = subprocess.run(words, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise InputError(f"{module} failed: {done.stderr[-2000:]}")
        return read_metrics(run / "metrics.jsonl")[0]["time"] - start

    repeat()  # Prepares data and tokenizer, and fills the caches.
    return repeat
