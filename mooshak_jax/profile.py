"""Profile of a training step (`--profile`): a trace, and a table of time by operation.

Mirror: mooshak_torch/profile.py.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import jax

from mooshak.tables import print_times


@contextmanager
def profiled(directory: Path) -> Iterator[dict[str, float]]:
    """Record the block in `directory` (for XProf and https://ui.perfetto.dev) and print a table.

    Yields a dictionary that has the seconds of each operation at the end. Operations are XLA's,
    added up by kind (`dot.3` and `dot.4` are `dot`).
    """
    with jax.profiler.trace(str(directory), create_perfetto_trace=True):
        seconds: dict[str, float] = {}
        yield seconds
    newest = max(directory.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    counts: Counter[str] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                if operation := dict(event.stats).get("hlo_op"):
                    kind = re.sub(r"[.\d]+(\.clone)?$", "", str(operation))
                    seconds[kind] = seconds.get(kind, 0.0) + event.duration_ns / 1e9
                    counts[kind] += 1
    print_times(seconds, counts)


def prepare_profiler() -> None:
    """Restrict JAX to the CPU where libtpu is installed without a TPU.

    The profiler would call libtpu, and crash if its version does not match. Call this before
    anything uses a device.
    """
    if "TPU_SKIP_MDS_QUERY" in os.environ and not find_spec("jax_plugins"):
        jax.config.update("jax_platforms", "cpu")
