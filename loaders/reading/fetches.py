"""Requests in flight: as many as pay, and none begins once the process ends; and workers end with their trainer.

    Fetches.load(request) -> samples, or a future of them       the seam: `cost.replay` counts here instead of fetching

`BackgroundFetches` loads. A plain thread pool is waited for at exit until its queue is empty: a run that is interrupted would
first fetch all that it had planned. Here the pool has what is under way only; what waits is handed to it as threads get free,
which it refuses at exit.

A worker of torch looks every 5 s whether its trainer lives. That does not help one that waits for a read, nor one that has ended
its work and waits for somebody to take more than a pipe holds: `end_with_trainer` ends those too.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import Protocol, TypeVar

from torch.utils.data import get_worker_info

from loaders.config import LoaderConfig
from loaders.order.samples import OpenSource
from loaders.reading.cache import BlockCache
from loaders.reading.concurrency import Concurrency
from loaders.reading.planner import Request
from loaders.reading.source import LoadedSamples, SourceReader
from wds_tools.run.local import exit_with_parent

_S_co = TypeVar("_S_co", covariant=True)
_QUEUED = 1024
"""Requests that wait, above which none is made ahead of need; with fewer the next batch is asked for beside the one in need."""
_GRACE_S = 10.0
"""For a worker without a trainer to end by itself, which leaves no temporary folder behind."""


def end_with_trainer() -> None:
    """In a worker process of torch, whoever has started it: it does not outlive the process that it reads for. Elsewhere nothing.

    To be called wherever a dataset begins to read; costs something once a process.
    """
    if get_worker_info() is not None:
        _watch_trainer()


@cache
def _watch_trainer() -> None:
    exit_with_parent(_GRACE_S)


class Fetches(Protocol[_S_co]):
    """Carries out the requests of one process."""

    is_mapped: Sequence[bool]
    """Of each source, whether its shards are mapped files."""

    @property
    def is_full(self) -> bool:
        """Whether so many requests wait that no more should be made ahead of need."""

    def load(self, request: Request) -> _S_co | Future[_S_co]:
        """What a request brings: at once, or later."""

    def cancel(self) -> None:
        """Drop the requests that have not begun."""

    def counts(self) -> dict[str, int]:
        """What was done so far, by name."""


class BackgroundFetches:
    """Loads from mapped files at once, from anywhere else in threads, first come, first served. Belongs to one process.

    Args:
        sources: what is read.
        config: how many requests may be in flight, and whether CRC-32 are compared.
        cache: on a local disk, for what is fetched.
    """

    def __init__(self, sources: Sequence[OpenSource], config: LoaderConfig, cache: BlockCache | None = None) -> None:
        self._sources = [SourceReader(opened, cache, len(sources), check_crc=config.check_crc) for opened in sources]
        self._cache = cache
        self.is_mapped: Sequence[bool] = [source.is_mapped for source in self._sources]
        self._pool = ThreadPoolExecutor(config.max_requests, thread_name_prefix="wds-fetch")
        self._concurrency = Concurrency(config.max_requests)
        self._in_flight = 0
        self._lock = Lock()
        self._waiting: deque[tuple[Future[LoadedSamples], Request]] = deque()

    @property
    def is_full(self) -> bool:
        """See Fetches."""
        return len(self._waiting) >= _QUEUED

    def load(self, request: Request) -> LoadedSamples | Future[LoadedSamples]:
        """See Fetches. Raises as SourceReader.load, for sources that are not mapped in the future."""
        if self.is_mapped[request.source]:
            return self._read(request)
        future: Future[LoadedSamples] = Future()
        with self._lock:
            self._waiting.append((future, request))
        self._begin()
        return future

    def cancel(self) -> None:
        """See Fetches."""
        with self._lock:
            self._waiting.clear()

    def counts(self) -> dict[str, int]:
        """Requests and bytes, and what the cache counts, since the process started."""
        names = ("requests", "bytes", "misplaced")
        counts = {name: sum(getattr(source, f"num_{name}") for source in self._sources) for name in names}
        answers = [seconds for source in self._sources for seconds in list(source.opened.store.first_bytes_s)]
        counts |= {"in_flight": self._in_flight, "bytes_per_s": round(self._concurrency.bytes_per_s)}
        counts |= {"first_byte_ms": round(statistics.median(answers) * 1000)} if answers else {}
        if self._cache is not None:
            counts |= {f"cache_{name}": count for name, count in self._cache.stats().items()}
        return counts

    def _read(self, request: Request) -> LoadedSamples:
        return self._sources[request.source].load(request.shard, request.first, request.last)

    def _begin(self) -> None:
        """Take the free places for what waits."""
        with self._lock:
            num_more = min(self._concurrency.level - self._in_flight, len(self._waiting))
            self._in_flight += max(num_more, 0)
        for _ in range(num_more):
            with suppress(RuntimeError):  # the process ends
                self._pool.submit(self._run)

    def _run(self) -> None:
        """Carry out what waits longest, then leave the place to the next."""
        with self._lock:
            future, request = self._waiting.popleft() if self._waiting else (None, None)
        if future is not None and request is not None:
            try:
                future.set_result(self._read(request))
            except BaseException as error:  # noqa: BLE001  # it is for whoever waits
                future.set_exception(error)
        with self._lock:
            self._in_flight -= 1
            is_busy = self._in_flight + 1 >= self._concurrency.level and bool(self._waiting)
            self._concurrency.done(request.num_bytes if request else 0, is_busy=is_busy)
        self._begin()
