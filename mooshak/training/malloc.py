"""Settings of glibc's malloc for training on a CPU: memory freed by a step is reused by the next.

By default, glibc returns large blocks to the kernel, which clears and maps their pages again at the
next use: a step that allocates and frees a gigabyte takes hundreds of thousands of page faults
(docs/performance.md).
"""

import ctypes
import platform

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8

WARMUP_STEPS = 8
"""Steps after which `retain_freed_memory` is called.

Permanent allocations of the first steps would otherwise fragment the heap. Even so, a large block
may not fit into the gap left by the previous one; both then count towards peak memory.
"""


def use_single_arena() -> None:
    """Use a single heap for all threads of this process; only the main heap takes large blocks.

    Call it in a command, before threads are started: it affects the full process. Without glibc, it
    does nothing.
    """
    global _libc
    if platform.libc_ver()[0] == "glibc":
        _libc = ctypes.CDLL(None)
        _libc.mallopt(_ARENA_MAX, 1)


MAX_RETAINED_BYTES = 2**30
"""Largest block that is retained; XLA allocates the memory of a step as one block."""


def retain_freed_memory() -> None:
    """Retain freed memory in this process for reuse, after `use_single_arena`.

    Blocks up to `MAX_RETAINED_BYTES` are then allocated from the heap, which never shrinks.
    """
    if _libc is not None:
        _libc.mallopt(_MMAP_THRESHOLD, MAX_RETAINED_BYTES)
        _libc.mallopt(_TRIM_THRESHOLD, -1)


_libc: ctypes.CDLL | None = None
"""glibc, after `use_single_arena`."""
