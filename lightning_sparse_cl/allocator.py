"""The C library's memory allocator."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of giving it back to the system.

    Otherwise the pages of every step's activations are faulted in anew, which takes a tenth to a quarter of the step's
    time. The process then keeps the most memory that it has ever needed. Without glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if not libc.mallopt(MMAP_THRESHOLD, 2**30):  # older versions allow no more than this
            libc.mallopt(MMAP_THRESHOLD, 2**25)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
