"""Keep freed memory in the process: a step's large temporaries are then the same pages every time.

glibc gives every large block back to the system and takes it anew, zeroed page by page: at D 2304, F 16384 that took
more time than the sparse products themselves (transposed product 113 ms, kept 27 ms, two cores). An evaluation of the
quickstart's size takes 34 s in place of 40.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask the allocator to keep what is freed; False where it is another than glibc's."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))
