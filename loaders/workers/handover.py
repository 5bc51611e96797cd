"""Batches on their way from worker processes to the trainer. Their tensors lie in /dev/shm, which may be small.

    affordable_prefetch    before workers start: fewer batches ahead if they would not fit, or a refusal
    tell_of_failures       in a worker: what the thread behind its queue fails to send becomes an error in its place

torch's queue loses what its thread can't send, and the trainer would wait for it for ever.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from multiprocessing.queues import Queue
from typing import Any

from torch._utils import ExceptionWrapper
from torch.utils.data import get_worker_info

from loaders.config import LoaderConfig
from loaders.order.samples import OpenSource
from loaders.world import World, ranks_of_machine
from wds_tools.errors import StorageError, UsageError

SHARED_MEMORY = "/dev/shm"  # noqa: S108  # torch's place
_HELD_BY_TRAINER = 2
"""Batches: the one that it works on, and the one that it takes meanwhile."""
_TOKEN_BYTES = 3 * 8
"""Of a token in a batch: see TokenBatch."""
_MORE = f"docker run --shm-size=8g or --ipc=host gives {SHARED_MEMORY} more; a smaller batch_size or fewer num_workers need less"


def affordable_prefetch(config: LoaderConfig, world: World, sources: Sequence[OpenSource]) -> int:
    """How many batches each worker may prepare ahead: `config.prefetch`, or fewer, with a warning, if they would not fit.

    Ranks of one machine (LOCAL_WORLD_SIZE) are taken to need the same.

    Raises:
        UsageError: not even one of each worker fits.
    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return config.prefetch_factor
    free = status.f_bavail * status.f_frsize // ranks_of_machine()
    batch = -(-config.batch_size // world.world_size) * max(_row_bytes(config, opened) for opened in sources)
    fitting = (int(free / max(batch, 1)) - _HELD_BY_TRAINER) // config.num_workers
    if fitting >= config.prefetch_factor:
        return config.prefetch_factor
    what = (
        f"{SHARED_MEMORY} has {free:,} bytes free for this rank: {config.num_workers} workers with "
        f"prefetch_factor={config.prefetch_factor} batches of about {int(batch):,} bytes need "
        f"{int(batch) * (config.num_workers * config.prefetch_factor + _HELD_BY_TRAINER):,}"
    )
    if fitting < 1:
        raise UsageError(f"{what}, and even prefetch_factor=1 is too much. {_MORE}")
    warnings.warn(f"{what}; going on with prefetch_factor={fitting}. {_MORE}", stacklevel=2)
    return fitting


def _row_bytes(config: LoaderConfig, opened: OpenSource) -> float:
    """Of the tensors of a row, on average; of padded token rows at most, long documents aside."""
    manifest = opened.manifest
    if rows := manifest.token_rows:
        length = rows.get("length")
        return _TOKEN_BYTES * length if isinstance(length, int) else 0
    if config.sequences is not None:
        return config.sequences.max_length * _TOKEN_BYTES
    widest = max((max(layout.npy_dtype.itemsize, 2) for layout in manifest.layouts.values()), default=2)
    return manifest.num_codes / max(manifest.samples, 1) * widest


def tell_of_failures(_: int = 0, *, wrapped: bool = False) -> None:
    """To be called in a worker, before it sends anything.

    Args:
        wrapped: as DataLoader raises it by itself; else the error alone, for whoever looks at what comes.
    """

    def tell(queue: Any, error: Exception, item: Any) -> None:
        if not isinstance(item, tuple):  # the pipe itself is broken: the trainer sees this process end
            os._exit(1)
        told = StorageError(f"a worker can't hand over its batch ({' '.join(str(error).split())}). {_free()}{_MORE}")
        queue.put((item[0], ExceptionWrapper((StorageError, told, None)) if wrapped else told))  # type: ignore[no-untyped-call]

    Queue._on_queue_feeder_error = tell  # type: ignore[attr-defined]


def begin_worker() -> tuple[int, int]:
    """Number of this worker, and how many there are; 0 of 1 in a process that is not a worker. Called when a pipeline begins."""
    info = get_worker_info()
    if info is None:
        return 0, 1
    tell_of_failures(wrapped=True)
    return info.id, info.num_workers


def _free() -> str:
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return ""
    return f"{SHARED_MEMORY} has {status.f_bavail * status.f_frsize:,} of {status.f_blocks * status.f_frsize:,} bytes free: "
