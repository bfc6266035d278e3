"""Memory of a process that trains on a CPU: what a step frees, the next one finds in place.

glibc gives large blocks back to the kernel at once, and the kernel clears and maps their pages anew
at their next use: a step that makes and drops a gigabyte takes hundreds of thousands of page faults
(docs/performance.md).
"""

import ctypes
import platform

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8

WARMUP_STEPS = 8
"""Steps after which `retain_freed_memory` is called.

What the first ones leave for good would lie between the blocks that come and go, and cut up the
heap. Even so a large block may not find its place again, and a run then holds it twice.
"""


def use_single_arena() -> None:
    """Let all threads of this process have one heap, the only one that takes large blocks.

    Call it before there are threads, and in a command: it changes the whole process. Without glibc
    nothing happens.
    """
    global _libc
    if platform.libc_ver()[0] == "glibc":
        _libc = ctypes.CDLL(None)
        _libc.mallopt(_ARENA_MAX, 1)


MAX_RETAINED_BYTES = 2**30
"""Bytes of the largest block that stays: XLA has all of a step's in one."""


def retain_freed_memory() -> None:
    """Keep freed memory in this process for reuse, if it has one heap (`use_single_arena`).

    Every block up to `MAX_RETAINED_BYTES` then comes out of the heap, which never shrinks.
    """
    if _libc is not None:
        _libc.mallopt(_MMAP_THRESHOLD, MAX_RETAINED_BYTES)
        _libc.mallopt(_TRIM_THRESHOLD, -1)


_libc: ctypes.CDLL | None = None
"""glibc, once there is one heap."""
