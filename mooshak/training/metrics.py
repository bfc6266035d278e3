"""The run directory: configuration, environment, metrics of every step; signals."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mooshak.checkpoints.manager import record_of
from mooshak.config.parse import dump_config
from mooshak.config.sections import Config
from mooshak.files import write_atomically
from mooshak.hardware import peak_flops


class RunLog:
    """Writer of `metrics.jsonl`, TensorBoard events and a progress bar; silent unless `is_main`."""

    def __init__(self, config: Config, start_step: int, is_main: bool, device: str, n_devices: int):
        self.config, self.is_main = config, is_main
        self.directory = Path(config.run.dir)
        self.flops_per_step = (
            config.model.flops_per_token(config.T) * config.T * config.train.batch_size
        )
        peak = peak_flops(device)
        self.peak = peak and peak * n_devices
        if not is_main:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory / "config.yaml", dump_config(record_of(config)))
        write_atomically(
            self.directory / "environment.json", json.dumps(environment(), indent=2) + "\n"
        )
        dropped = _truncate(self.directory / "metrics.jsonl", start_step)
        self.file = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        self.events: Any = None
        if config.run.tensorboard:
            self.events = self._open_events(dropped)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            disable=not config.run.progress,
        )
        self.progress.start()
        steps = config.train.steps
        self.task = self.progress.add_task("training", total=steps, completed=start_step, status="")

    def log(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        """Write the metrics of a step that took `seconds`; `step` steps are done now."""
        if not self.is_main:
            return
        tokens = self.config.train.batch_size * self.config.T
        line = {"step": step, **metrics, "tokens_per_second": tokens / seconds}
        if self.peak:
            line["mfu"] = self.flops_per_step / seconds / self.peak
        line["time"] = time.time()
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.events is not None:
            self._write_events(line)
        status = f"loss {metrics['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
        self.progress.update(self.task, completed=step, status=status)

    def flush(self) -> None:
        """Write buffered events to disk, which a killed process would lose."""
        if self.is_main and self.events is not None:
            self.events.flush()

    def _open_events(self, dropped: bool) -> Any:
        """Return a writer of TensorBoard events.

        If lines of metrics.jsonl were `dropped`, because the process was killed after its last
        checkpoint, the events are written again from the others: each step is there once.
        """
        from tensorboard.summary import Writer

        directory = self.directory / "tensorboard"
        if not dropped:
            return Writer(str(directory))
        for file in directory.glob("events.out.tfevents.*"):
            file.unlink()
        self.events = Writer(str(directory))
        for line in read_metrics(self.directory / "metrics.jsonl"):
            self._write_events(line)
        return self.events

    def _write_events(self, line: dict[str, float]) -> None:
        for name, value in line.items():
            if name not in ("step", "time"):
                self.events.add_scalar(name, value, int(line["step"]), wall_time=line.get("time"))

    def close(self) -> None:
        """Close the files and the progress bar."""
        if self.is_main:
            self.progress.stop()
            self.file.close()
            if self.events is not None:
                self.events.close()


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set; a second signal ends the process at once."""
    request = threading.Event()
    previous: dict[signal.Signals, Any] = {}

    def receive(number: int, frame: FrameType | None) -> None:
        if request.is_set():
            signal.signal(number, previous[signal.Signals(number)])
            signal.raise_signal(number)
        request.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, receive)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def environment() -> dict[str, Any]:
    """Return versions, commit and command line, to reproduce the run."""
    names = ("torch", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {}
    for name in (*names, "sentencepiece", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, encoding="utf-8").stdout.strip()
    except OSError:  # git is not installed.
        commit = ""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": commit or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "versions": versions,
    }


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the lines of a `metrics.jsonl`, up to one that was not written completely."""
    lines = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def losses(run: Path) -> dict[int, float]:
    """Return step -> loss from the metrics of a run directory."""
    return {int(line["step"]): line["loss"] for line in read_metrics(run / "metrics.jsonl")}


def _truncate(path: Path, step: int) -> bool:
    """Drop the lines after `step`, which the run writes again; return whether there were any."""
    if not path.is_file():
        return False
    lines = read_metrics(path)
    retained = [line for line in lines if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in retained))
    return len(retained) < len(lines)
