"""The process of one worker: set up, then measure one repetition for every line of input.

python -m benchmarks.worker MODULE:FUNCTION SIZE_AS_JSON

FUNCTION takes the size and returns a function that does the work once and returns its seconds.
Answers are lines of JSON: `{}` when ready, `{"seconds": ..., "other_cpu_share": ...}` after each
repetition, and `{"memory": ...}` in bytes at the end of the input; `{"missing": reason}` where a
peer is not installed.
"""

import contextlib
import importlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Repeat = Callable[[], float]
"""Does the work once; returns its seconds, or the figure of a case without `work`."""


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmarks.worker MODULE:FUNCTION SIZE_AS_JSON")
    entry, size = sys.argv[1], json.loads(sys.argv[2])
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    module, function = entry.split(":")
    try:
        repeat: Repeat = getattr(importlib.import_module(f"benchmarks.{module}"), function)(size)
    except ModuleNotFoundError as error:
        answer(missing=str(error))
        return
    answer()
    for _ in sys.stdin:
        answer(**measure_undisturbed(repeat))
    answer(memory=peak_memory())


def peak_memory() -> float:
    """Return bytes: of the accelerator if any, else the largest resident set of a process."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    if jax is not None and jax.default_backend() != "cpu":
        return float(jax.local_devices()[0].memory_stats()["peak_bytes_in_use"])
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return 1024.0 * max(resource.getrusage(who).ru_maxrss for who in processes)


def measure_undisturbed(repeat: Repeat) -> dict[str, float]:
    """Measure a repetition that no other program disturbs, or the least disturbed of several.

    `other_cpu_share` is the share of one processor that other programs used meanwhile.
    """
    tries: list[tuple[float, float]] = []
    while not tries or (tries[-1][0] > DISTURBED and len(tries) < TRIES):
        before, start = _other_cpu_seconds(), time.perf_counter()
        seconds = repeat()
        share = (_other_cpu_seconds() - before) / (time.perf_counter() - start)
        tries.append((max(0.0, share), seconds))
    share, seconds = min(tries)
    return {"seconds": seconds, "other_cpu_share": share}


DISTURBED, TRIES = 0.1, 5


def _other_cpu_seconds() -> float:
    """Return the processor time of processes of other sessions; 0 without /proc."""
    if not Path("/proc/stat").exists():
        return 0.0
    every = Path("/proc/stat").read_text("utf-8").split("\n", 1)[0].split()
    ticks = sum(int(every[i]) for i in (1, 2, 3, 6, 7))  # All but idle, waiting and stolen.
    session = os.getsid(0)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # It may have ended by now.
            fields = path.read_text("utf-8").rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks -= sum(map(int, fields[11:15]))  # Its own and its ended children's.
    return ticks / os.sysconf("SC_CLK_TCK")


_temporary: list["tempfile.TemporaryDirectory[str]"] = []


def temporary_directory() -> Path:
    """Return a new directory, which is removed when the process ends."""
    _temporary.append(tempfile.TemporaryDirectory())
    return Path(_temporary[-1].name)


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that the work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def by_turns(work: Callable[[], Any], other: Callable[[], Any], times: int) -> float:
    """Return the ratio of the median times of two alternating functions."""
    pairs = [(timed(work), timed(other)) for _ in range(times)]
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)


if __name__ == "__main__":
    main()
