"""Tells glibc to keep the memory that is freed, since a tokenizer on a CPU asks for the same again with every image.

By default blocks of 128 KiB and more come fresh from the kernel and go back to it: each page of them is cleared and mapped
again, which took a quarter of the time of a Chameleon in fp32 (docs/benchmarks.md). The price is that a process keeps its peak.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of malloc.h
_NEVER = -1


def keep_freed_memory() -> None:
    """For this process, from now on. Does nothing where the C library has no such setting."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, _NEVER)
    mallopt(_ARENA_MAX, 1)  # arenas of threads hold 64 MiB at most, and larger blocks would be mapped after all
