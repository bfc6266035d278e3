"""Part `curve`: loss curves of the devices, of the CPU, and after a change of framework.

The runs are those of the training commands, on the demo's model and text.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mooshak.device import device_environment
from mooshak.errors import InputError
from mooshak.training.metrics import losses
from parity.accelerator.rows import Row, Setup, attempt, reason
from parity.accelerator.training import CONFIGS
from parity.distance import curve_differences
from parity.tolerances import CURVE_FLOAT32, RATIO

STEPS, SMALL_STEPS = 300, 12
DOCUMENTS, SMALL_DOCUMENTS = 1500, 300
"""Tales in each language."""
SMALL = {
    "model.dim": 48,
    "model.n_layers": 2,
    "model.hidden_dim": 64,
    "model.max_seq_len": 64,
    "model.vocab_size": 512,
    "tokenizer.vocab_size": 512,
}


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str
    framework: str
    device: str
    dtype: str = "float32"
    start: str | None = None
    """The run from whose half this one resumes."""


def curve(setup: Setup) -> Iterator[Row]:
    """Yield the differences of the runs from those on the CPU, and of both frameworks."""
    torch, jax = setup.torch_device, setup.jax_device
    runs: tuple[Run, ...] = (
        Run("torch", "torch", torch),
        Run("jax", "jax", jax),
        Run("torch-to-jax", "jax", jax, start="torch"),
        Run("jax-to-torch", "torch", torch, start="jax"),
        Run("torch-resumed", "torch", torch, start="torch"),
        Run("torch-bfloat16", "torch", torch, "bfloat16"),
        Run("jax-bfloat16", "jax", jax, "bfloat16"),
    )
    if setup.small:  # Starting Python takes most of the time.
        runs = tuple(run for run in runs if run.name not in ("jax-to-torch", "torch-resumed"))
    prepare(setup)
    # The CPU is idle while the device trains.
    with ThreadPoolExecutor(1) as background:
        on_cpu = background.submit(train, Run("torch-cpu", "torch", "cpu"), setup)
        found: dict[str, dict[int, float]] = {}
        for run in runs:
            yield from attempt(run.name, lambda run=run: _measure(run, setup, found))  # type: ignore[misc]
            yield from _compared(run.name, found)
        yield from _from_cpu(on_cpu, found)


def prepare(setup: Setup) -> None:
    """Train the tokenizer and write the text as tokens, once for all runs."""
    for module, verb in (("mooshak.tokenizer", "train"), ("mooshak.data", "prepare")):
        _command([module, verb, *_options(setup)], "cpu")


def train(run: Run, setup: Setup) -> dict[int, float]:
    """Train, and return the loss of each step; after a change of framework, from the start on.

    Raises `InputError` if the command fails.
    """
    half, directory = steps(setup) // 2, run_directory(run.name, setup)
    words = [f"mooshak_{run.framework}.train", *_options(setup), "--run.dir", str(directory)]
    words += ["--train.dtype", run.dtype]
    before: Mapping[int, float] = {}
    if run.start:
        start = run_directory(run.start, setup)
        words += ["--resume", str(start / f"checkpoints/{half}")]
        before = {step: loss for step, loss in losses(start).items() if step <= half}
    _command(words, run.device)
    found = dict(before) | losses(directory)
    if list(found) != list(range(1, steps(setup) + 1)):
        raise InputError(f"{directory} does not hold every step exactly once")
    return found


def steps(setup: Setup) -> int:
    """Return the steps of a run."""
    return SMALL_STEPS if setup.small else STEPS


def run_directory(name: str, setup: Setup) -> Path:
    """Return the directory of a run."""
    return setup.out / "runs" / name


def _options(setup: Setup) -> list[str]:
    n_steps = steps(setup)
    documents = SMALL_DOCUMENTS if setup.small else DOCUMENTS
    sources = [
        f"{{name: tales-{language}, kind: tales, language: {language}, documents: {documents}}}"
        for language in ("hi", "en")
    ]
    values: dict[str, object] = {
        "data.dir": setup.out / "data",
        "data.sources": f"[{', '.join(sources)}]",
        "tokenizer.path": setup.out / "data/tokenizer.model",
        "train.steps": n_steps,
        "schedule.warmup_steps": max(1, n_steps // 12),
        "checkpoint.every": n_steps // 2,
        "checkpoint.keep": 2,
        "evaluate.every": 0,
        "run.progress": "false",
        "run.tensorboard": "false",
    }
    values |= SMALL if setup.small else {}
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return ["--config", str(CONFIGS / "demo.yaml"), *words]


def _command(words: list[str], device: str) -> None:
    environment = os.environ | dict(device_environment(device))
    line = [sys.executable, "-m", *words]
    done = subprocess.run(
        line, capture_output=True, encoding="utf-8", errors="replace", env=environment
    )
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise InputError(f"{words[0]}: {lines[-1].removeprefix('error: ')}")


def _measure(run: Run, setup: Setup, found: dict[str, dict[int, float]]) -> Iterator[Row]:
    found[run.name] = train(run, setup)
    last = list(found[run.name].values())[-1]
    yield Row(f"{run.name}: last loss", last, "nats", passed=math.isfinite(last))


def _compared(name: str, found: Mapping[str, dict[int, float]]) -> Iterator[Row]:
    """Yield the differences of a run from an earlier one."""
    pairs = {
        "jax": "torch",
        "torch-to-jax": "torch",
        "jax-to-torch": "jax",
        "torch-resumed": "torch",
    }
    if name in pairs and {name, pairs[name]} <= set(found):
        yield _difference(f"{name} from {pairs[name]}", found[name], found[pairs[name]])
    if name == "jax-bfloat16" and {"torch", "jax", "torch-bfloat16", name} <= set(found):
        apart = {
            framework: _mean(found[f"{framework}-bfloat16"], found[framework])
            for framework in ("torch", "jax")
        }
        for framework, other in (("torch", "jax"), ("jax", "torch")):
            mean, allowed = apart[framework], RATIO * apart[other]
            name = f"{framework}: bfloat16 from float32, mean of all steps"
            yield Row(name, mean, "nats", allowed, mean <= allowed)


def _from_cpu(
    on_cpu: Future[dict[int, float]], found: Mapping[str, dict[int, float]]
) -> Iterator[Row]:
    try:
        truth = on_cpu.result()
    except InputError as error:
        yield Row("torch-cpu", reason(error), passed=False)
        return
    for name in ("torch", "jax"):
        if name in found:
            yield _difference(f"{name} from torch on the CPU", found[name], truth)


def _difference(name: str, found: dict[int, float], truth: dict[int, float]) -> Row:
    apart = curve_differences(found, truth, relative=False)
    step = max(apart, key=lambda k: apart[k])
    worst = apart[step]
    value = worst if math.isfinite(worst) else None
    return Row(name, value, "nats", CURVE_FLOAT32, worst <= CURVE_FLOAT32, f"at step {step}")


def _mean(found: dict[int, float], truth: dict[int, float]) -> float:
    return sum(curve_differences(found, truth, relative=False).values()) / len(truth)
