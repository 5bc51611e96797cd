"""Images side by side on a CPU: each lane is a thread, and torch uses no further threads inside it.

Throughput is that of one image on all cores (measured: docs/tokenizers.md). What it is for is that a sum is then taken in one
order only, whatever the number of cores, workers and images: torch's kernels cut sums by the number of threads.
Cost: the memory of one pass for each lane in use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier, Lock

import torch

_starting = Lock()


def side_by_side(work: Callable[[int], None], places: Sequence[int]) -> None:
    """Call `work` for each place, as many at a time as torch has threads here; raises what the first to fail raised."""
    with _starting:
        pool = _lanes(os.getpid(), torch.get_num_threads())
    for _ in pool.map(work, places):
        pass


@lru_cache
def _lanes(pid: int, count: int) -> ThreadPoolExecutor:  # noqa: ARG001  a forked process has none of its parent's threads
    """A pool whose threads have all been told to be alone."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="lane")
    all_there = Barrier(count)

    def begin(_: int) -> None:
        torch.get_num_threads()  # else torch gives this thread the common number at its first operation
        torch.set_num_threads(1)
        all_there.wait()

    list(pool.map(begin, range(count)))
    torch.set_num_threads(count)  # torch gives the number that was set last to every new thread
    return pool
