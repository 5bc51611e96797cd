"""Ranks of one run as threads of this process: what torch.distributed would carry between them goes through a list."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from loaders import World


class Meeting(NamedTuple):
    """What the ranks of a world share: a barrier, and a place for what each brings."""

    barrier: threading.Barrier
    brought: list[bytes]


class ThreadWorld(World):
    """A world whose ranks are threads: what torch.distributed would carry goes through a list."""

    def gather(self, value: bytes) -> list[bytes]:
        self.group.brought[self.rank] = value
        self.group.barrier.wait(timeout=20)
        given = list(self.group.brought)
        self.group.barrier.wait(timeout=20)
        return given


def on_ranks(world_size: int, do: Callable[[World], Any]) -> list[Any]:
    """What `do` gives on each rank. A rank that is killed takes the others with it."""
    meeting = Meeting(threading.Barrier(world_size), [b""] * world_size)

    def run(rank: int) -> Any:
        try:
            return do(ThreadWorld(rank=rank, world_size=world_size, group=meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as threads:
        waiting = [threads.submit(run, rank) for rank in range(world_size)]
    errors = [error for future in waiting if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in waiting]
