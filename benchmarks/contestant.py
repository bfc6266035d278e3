"""The process of one contestant: it sets up, then measures once for every line that it is sent.

python -m benchmarks.contestant MODULE:FUNCTION SIZE_AS_JSON

FUNCTION takes the size and returns a function that does the work once and returns its seconds.
Answers are lines of JSON: `{}` when it is ready, `{"seconds": ...}` after each repetition, and
`{"memory": ...}` in bytes once its input ends; `{"missing": reason}` where a peer is not installed.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

Repeat = Callable[[], float]
"""Does the work once; returns the seconds that it took."""


def main() -> None:
    entry, size = sys.argv[1], json.loads(sys.argv[2])
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
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
        answer(seconds=repeat())
    answer(memory=peak_memory())


def peak_memory() -> float:
    """Bytes: of the accelerator where there is one, or what the largest process had resident."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    if jax is not None and jax.default_backend() != "cpu":
        return float(jax.local_devices()[0].memory_stats()["peak_bytes_in_use"])
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return 1024.0 * max(resource.getrusage(who).ru_maxrss for who in processes)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that the work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
