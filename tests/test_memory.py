"""Memory that a training process keeps: a block that it frees, it finds in place again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from mooshak.memory import keep_memory, share_heap

{call}
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_memory_that_is_kept_takes_no_page_faults_again() -> None:
    """Only in a process that has asked for it: `train` called from elsewhere changes nothing."""
    for call, few in (("share_heap(); keep_memory()", True), ("keep_memory()", False)):
        words = [sys.executable, "-c", FAULTS.format(call=call)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert (int(done.stdout) < 50) == few
