"""Tasks on this machine: in this process, or in worker processes.

`run_tasks(fn, tasks, workers=n)` yields `fn(task, report)` for each task as it finishes. With one worker everything happens in
this process. With more, `fn` is pickled once to each spawned process and kept there, so what it loads (a model) is loaded once.
`report(done, samples, rejects)` may be called as often as fn likes; reports reach `on_report` in this process.
Invariant: no worker outlives this process or the generator: each watches a pipe that closes with them, however they end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from wds_tools.errors import WorkerDied

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[int, int, int], None]
"""(units of work done, samples written, rejects) since the last report."""
Work = Callable[[Task, Report], Result]

_POLL_S = 0.25
_worker: tuple[Callable[..., Any], Report] | None = None


def run_tasks(fn: Work[Task, Result], tasks: Sequence[Task], *, workers: int, on_report: Report) -> Iterator[Result]:
    """Run `fn` over the tasks.

    Args:
        fn: picklable if workers > 1.
        tasks: picklable if workers > 1; started in this order.
        workers: processes, at least 1.
        on_report: gets every report, in this process.

    Yields:
        The results, as they come.

    Raises:
        WorkerDied: a process was killed from outside.
        Exception: whatever `fn` raised; the other tasks are stopped.
    """
    if workers == 1 or len(tasks) <= 1:
        for task in tasks:
            yield fn(task, on_report)
        return
    context = multiprocessing.get_context("spawn")
    stop_reader, stop_writer = context.Pipe(duplex=False)
    reports = context.SimpleQueue()
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_start_worker, initargs=(fn, reports, stop_reader)
    )
    waiting = iter(tasks)
    running: set[Future[Result]] = set()
    try:
        while True:
            for task in islice(waiting, 2 * workers - len(running)):
                running.add(pool.submit(_run_in_worker, task))
            if not running:
                break
            done, running = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            while not reports.empty():
                on_report(*reports.get())
            for future in done:
                yield future.result()
        while not reports.empty():
            on_report(*reports.get())
        pool.shutdown()
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process ended without a word: it was killed, or memory ran out. "
            "Finished shards are kept: run again with --resume, and with fewer --workers if memory was short"
        ) from error
    finally:
        stop_writer.close()
        stop_reader.close()
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(fn: Callable[..., Any], reports: Any, stop: Connection) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(stop, parent.sentinel), daemon=True).start()
    _worker = (fn, lambda *counts: reports.put(counts))


def _run_in_worker(task: Any) -> Any:
    assert _worker is not None
    fn, report = _worker
    return fn(task, report)


def _exit_with(stop: Connection, parent: int) -> None:
    wait_for([stop, parent])
    os._exit(1)
