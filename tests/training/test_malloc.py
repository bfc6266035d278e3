"""Freed memory that a training process retains: its next blocks take no page faults."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from mooshak.training.malloc import retain_freed_memory, use_single_arena

{call}
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_retained_memory_takes_no_page_faults() -> None:
    """Only in a process with a single arena: `train` called from elsewhere changes nothing."""
    for call, few in (
        ("use_single_arena(); retain_freed_memory()", True),
        ("retain_freed_memory()", False),
    ):
        words = [sys.executable, "-c", FAULTS.format(call=call)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert (int(done.stdout) < 50) == few
