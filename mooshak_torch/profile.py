"""Profile of a training step (`--profile`): a trace, and a table of time by operation.

Mirror: mooshak_jax/profile.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from mooshak.tables import print_times


@contextmanager
def profiled(directory: Path) -> Iterator[dict[str, float]]:
    """Record the block in `directory`/trace.json (for https://ui.perfetto.dev) and print a table.

    Yields a dictionary that has the seconds of each operation at the end: its self time, on the GPU
    if there is one, else on the CPU.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        seconds: dict[str, float] = {}
        yield seconds
    directory.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(directory / "trace.json"))
    # The time of a kernel is also that of the operation that launches it.
    events = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]
    self_time = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    seconds |= {event.key: getattr(event, self_time) / 1e6 for event in events}
    print_times(seconds, {event.key: event.count for event in events})
