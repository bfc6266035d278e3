"""Memory of a process that trains on a CPU: what a step frees, the next one finds in place.

glibc gives large blocks back to the kernel at once, and the kernel clears and maps their pages anew
at their next use: a step that makes and drops a gigabyte takes hundreds of thousands of page faults
(docs/performance.md).
"""

import ctypes
import platform

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def keep_memory() -> None:
    """Let freed memory stay with this process, for its own use; nothing happens without glibc.

    Every block below 1 GiB then comes out of one heap, which never shrinks. Call it before there
    are threads: those that have a heap of their own keep it, and take large blocks from the kernel.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)):
        mallopt(parameter, value)
