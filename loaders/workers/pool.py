"""Worker processes of a loader, or this process in their place: requests -> results, in order.

    WorkerPool.begin(requests), then next() for each

torch's DataLoader runs them. What it tells of a dead worker is translated into WorkerDied here.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from loaders.config import LoaderConfig
from loaders.order.samples import OpenSource
from loaders.workers.handover import affordable_prefetch, tell_of_failures
from loaders.workers.steps import StepDataset, StepRequest, StepResult
from loaders.world import World
from wds_tools.errors import StorageError, UsageError, WdsToolsError, WorkerDied
from wds_tools.run.by_file import ByFile
from wds_tools.storage import LocalStore, join

_GUARD = "a script puts what it does below `if __name__ == '__main__':`, since worker processes import it"


class WorkerPool:
    """Fetches steps. Workers start at the first loop and stay until `close`.

    Args:
        dataset: of the rank.
        config: number of workers, how they start, batches ahead.
        world: this process among the training processes.
        sources: what is read.
    """

    def __init__(self, dataset: StepDataset, config: LoaderConfig, world: World, sources: Sequence[OpenSource]) -> None:
        self._dataset, self._config, self._world, self._sources = dataset, config, world, sources
        self._workers: Any = None
        """The DataLoader."""
        self._requests = _Requests()
        self._results: Iterator[StepResult | WdsToolsError] = iter(())
        self._has_answered = False

    def __getstate__(self) -> dict[str, Any]:
        if self._requests.current:
            raise UsageError("a loader that was begun can't be copied or sent: its config and state_dict() can")
        return self.__dict__

    def begin(self, requests: Iterable[StepRequest]) -> None:
        """Ask for the steps of a loop.

        Raises:
            UsageError: /dev/shm has no room for a batch of each worker.
            WorkerDied: a worker ended.
        """
        self._requests.current = requests
        self._begin_to_wait()
        with self._named_death(), torch.device("cpu"):  # whatever the trainer has for its tensors: workers inherit this
            self._results = iter(self._fetched())

    def next(self) -> StepResult:
        """The result of the next step.

        Raises:
            WdsToolsError: the step met an error.
            WorkerDied: a worker ended, or gives no batch for timeout_s.
        """
        self._begin_to_wait()
        with self._named_death():
            result = next(self._results)
        self._has_answered = True
        if isinstance(result, WdsToolsError):
            raise result
        return result

    def close(self) -> None:
        """End the worker processes."""
        workers, self._workers = self._workers, None
        if workers is not None and workers._iterator is not None:
            try:
                workers._iterator._shutdown_workers()
            except RuntimeError as error:  # torch's handler of SIGCHLD tells, in the midst of this, of one that was killed
                if not _tells_of_a_worker(error):
                    raise

    @property
    def _method(self) -> str:
        """How worker processes start."""
        return self._config.start_method or multiprocessing.get_start_method()

    def _begin_to_wait(self) -> None:
        if self._workers is not None and self._workers._iterator is not None:
            self._workers._iterator.begun, self._workers._iterator.timeout_s = time.monotonic(), self._config.timeout_s

    def _fetched(self) -> Iterable[StepResult | WdsToolsError]:
        if not self._config.num_workers:
            return map(self._dataset.__getitem__, self._requests)
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing itself looks at
            raise UsageError(f"this process imports the script that started it, which reads at once: {_GUARD}")
        if self._workers is None:
            dataset: Any = self._dataset if self._method == "fork" else ByFile(self._dataset)
            self._workers = _Workers(
                dataset,
                sampler=self._requests,
                batch_size=None,
                num_workers=self._config.num_workers,
                prefetch_factor=affordable_prefetch(self._config, self._world, self._sources),
                worker_init_fn=tell_of_failures,
                persistent_workers=True,
                collate_fn=_as_it_is,
                multiprocessing_context=self._config.start_method,
                generator=torch.Generator(),  # else each loop would take a number from the trainer's
            )
            atexit.register(_close, weakref.ref(self))  # in good order, before multiprocessing kills them
        return self._workers  # type: ignore[no-any-return]

    @contextmanager
    def _named_death(self) -> Iterator[None]:
        """DataLoader tells of a dead worker by a RuntimeError, or fails to get the tensors that it had sent."""
        try:
            yield
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            named: Exception | None = None
            while named is None:
                try:
                    named = self._named(error)
                except RuntimeError as another:  # torch's handler of SIGCHLD tells, in the midst of this, of one more
                    if not _tells_of_a_worker(another):
                        raise
            if named is error:
                raise
            raise named from error

    def _named(self, error: Exception) -> Exception:
        """What to raise: WorkerDied if a worker died, and all are ended then; else the error itself."""
        if isinstance(error, WdsToolsError) or not (_tells_of_a_worker(error) or isinstance(error, OSError | EOFError)):
            return error
        self.close()
        is_clear = self._has_answered or self._method == "fork"
        hint = "" if is_clear else f"; where workers are started by {self._method}, {_GUARD}"
        return WorkerDied(f"a worker process ended ({error}{self._cut_off()}){hint}")

    def _cut_off(self) -> str:
        """A local shard that is not as long as it was: who touches what is missing of a mapped file, dies."""
        for opened in self._sources:
            for info in opened.manifest.shards if isinstance(opened.store, LocalStore) else ():
                with suppress(StorageError):
                    if (size := opened.store.size(info.name)) < info.bytes:
                        return f"; {join(opened.store.url, info.name)} has {size} bytes, the manifest says {info.bytes}"
        return ""


class _Waiting(_MultiProcessingDataLoaderIter):
    """Waits for a batch as DataLoader does, which does so for ever, but no longer than `timeout_s`. DataLoader's own `timeout`
    would not look whether the workers live."""

    begun, timeout_s = 0.0, math.inf

    def _try_get_data(self, timeout: float = MP_STATUS_CHECK_INTERVAL) -> Any:
        left = self.begun + self.timeout_s - time.monotonic()
        if left <= 0:
            raise WorkerDied(
                f"the workers gave no batch for timeout_s={self.timeout_s:g} seconds: a transform that never ends, a lock that "
                "was held when they were forked (start_method='spawn' helps), or a slow storage"
            )
        return super()._try_get_data(min(left, timeout))  # type: ignore[no-untyped-call]


class _Workers(torch.utils.data.DataLoader["StepResult | WdsToolsError"]):
    def _get_iterator(self) -> Any:
        self.check_worker_number_rationality()
        return _Waiting(self)


class _Requests(Iterable[StepRequest]):
    """The requests of the current loop: the one sampler that a DataLoader may have."""

    current: Iterable[StepRequest] = ()

    def __iter__(self) -> Iterator[StepRequest]:
        return iter(self.current)


def _close(pool: weakref.ref[WorkerPool]) -> None:
    if (living := pool()) is not None:
        living.close()


def _tells_of_a_worker(error: Exception) -> bool:
    return "DataLoader worker (pid" in str(error)  # of an error in one it says "in DataLoader worker process"


def _as_it_is(result: Any) -> Any:
    return result
