"""Stages of a demo: commands that are printed, run, and stamped when they succeed.

A stage is skipped while its stamp matches the inputs and its files are complete.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mooshak.files import locked, write_atomically

# Demos run on the CPU, which every machine has.
CPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}


@dataclass(frozen=True)
class Stage:
    """One command of the demo."""

    name: str
    title: str
    words: tuple[str, ...]
    """The arguments of `python -m`."""
    makes: tuple[Path, ...]
    """Output files and directories."""
    prints: Path | None = None
    """The output file that is the command's standard output."""
    inputs: tuple[str, ...] = ()
    """Contents of the files that the command reads, besides those of earlier stages."""


def run_demo(stages: Sequence[Stage], out: Path, made_of: str = "") -> None:
    """Carry out the stages while no other process does, and print where the report is.

    An interrupt ends the program in one line.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.perf_counter()
    try:
        with locked(out / ".lock"):
            ran = carry_out(stages, out, made_of)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes here")
    seconds = time.perf_counter() - start
    print(f"{out / 'report.html'}: {ran} stages run, {seconds:.0f} seconds")


def carry_out(stages: Sequence[Stage], out: Path, made_of: str) -> int:
    """Run the stages that are not complete. Returns how many were run.

    `made_of` identifies the inputs of all stages. Ends the program with the exit code of the stage
    that fails; its files then have no stamp.
    """
    console = Console(highlight=False, soft_wrap=True)
    key, ran = made_of, 0
    for number, stage in enumerate(stages, 1):
        # The key includes those of all earlier stages: what follows a changed stage is run again.
        key = hashlib.sha256(json.dumps([key, stage.words, *stage.inputs]).encode()).hexdigest()
        stamp = out / "stages" / f"{stage.name}.json"
        head = f"[bold]{number:2}/{len(stages)} {stage.title}[/]"
        if is_done(stage, stamp, key):
            console.print(f"{head}  [dim]done before, reused[/]")
            continue
        line = shlex.join(["python", "-m", *stage.words])
        console.print(head)
        console.print(f"$ {line}", style="dim", markup=False)
        stamp.unlink(missing_ok=True)
        for path in stage.makes:  # Left over from an interrupted or a different run.
            if path.is_relative_to(out):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        seconds = run(stage)
        if missing := [path for path in stage.makes if not path.exists()]:
            sys.exit(f"{stage.title}: {missing[0]} was not written; the same command resumes here")
        made = {
            "key": key,
            "number": number,
            "title": stage.title,
            "words": stage.words,
            "seconds": seconds,
            "files": sizes(stage.makes),
        }
        write_atomically(stamp, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
        ran += 1
    return ran


def run(stage: Stage) -> float:
    """Run the command of a stage. Returns its seconds; ends the program when it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *stage.words],
        stdout=subprocess.PIPE if stage.prints else None,
        env=os.environ | CPU,
    )
    if done.returncode in (1, 2):
        sys.exit(done.returncode)  # The command has printed the reason.
    if done.returncode:
        sys.exit(f"{stage.title}: exit code {done.returncode}; the same command resumes here")
    if stage.prints:
        write_atomically(stage.prints, done.stdout)
        print(done.stdout.decode().rstrip())
    return time.perf_counter() - start


def is_done(stage: Stage, stamp: Path, key: str) -> bool:
    """Return whether a stage was completed with this key and its files have the same sizes."""
    try:
        made = json.loads(stamp.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return made["key"] == key and made["files"] == sizes(stage.makes)


def sizes(paths: Sequence[Path]) -> dict[str, int]:
    """Return the size in bytes of every file in these files and directories."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return {str(file): file.stat().st_size for file in sorted(files) if file.is_file()}
