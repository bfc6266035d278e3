"""Where the time of a training step goes (`--profile`): a trace, and a table by operation."""

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
def profiled(directory: Path) -> Iterator[None]:
    """Record the block below `directory` (for XProf and https://ui.perfetto.dev), print a table.

    Operations are XLA's, those of one kind together (`dot.3` and `dot.4` are `dot`).
    """
    with jax.profiler.trace(str(directory), create_perfetto_trace=True):
        yield
    newest = max(directory.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    seconds: dict[str, float] = {}
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
    """Keep JAX off a libtpu without a TPU; call it before anything touches a device.

    The profiler would call into libtpu, and crash where that is of another version.
    """
    if "TPU_SKIP_MDS_QUERY" in os.environ and not find_spec("jax_plugins"):
        jax.config.update("jax_platforms", "cpu")
