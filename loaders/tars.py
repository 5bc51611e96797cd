"""WebDataset tars as they are, without index or manifest: read from start to end, at a weaker promise than ShardDataset's.

    *.tar below the URL, permuted -> dealt out to ranks and workers, whole -> samples in file order -> .shuffle / .decode / ...

What it promises: an epoch has every sample once over all ranks and workers, and which shards a worker reads, in which order, is
a function of (seed, epoch). What it doesn't: ranks get different numbers of samples, samples are mixed only by a `.shuffle(n)`
behind it, and there is no resume. `wds-tools index` makes an index once, and ShardDataset and build_loader give all that.
Memory: a shard and the next one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import webdataset as wds

from loaders.order.plan import shuffled
from loaders.reading.fetches import end_with_trainer
from loaders.workers.handover import begin_worker
from loaders.world import World
from wds_tools.errors import NotFound
from wds_tools.format.tar.scan import scan_tar
from wds_tools.storage import join, open_store


class TarDataset(wds.DataPipeline, wds.compat.FluidInterface):  # type: ignore[misc]  # webdataset has no types
    """Samples of all tars below a URL, as webdataset gives them: `__key__`, `__url__` and the members' bytes by suffix.

    Args:
        url: a directory or URL; every `*.tar` below it is read, so it can't be a web server, which has no listings.
        shuffle: permute the shards.
        seed: of the permutation.
        epoch: of the permutation; see `set_epoch`.
        rank: this process among `world_size`; without both, they are detected, as ShardDataset does.
        world_size: training processes; each shard goes to one of them.

    Raises:
        NotFound: there is no tar.
        UsageError: rank and world_size don't fit.
    """

    def __init__(
        self,
        url: str,
        *,
        shuffle: bool = True,
        seed: int = 42,
        epoch: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._source = _Tars(url, shuffle, seed, epoch, World.of(rank, world_size))
        super().__init__(self._source)

    @property
    def num_shards(self) -> int:
        """Tars below the URL."""
        return len(self._source.names)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes. Call it before the workers start.

        Args:
            epoch: from 0.
        """
        self._source.epoch = epoch


class _Tars:
    """The first stage of the pipeline: called for each iteration, in the process that iterates."""

    def __init__(self, url: str, shuffle: bool, seed: int, epoch: int, world: World) -> None:
        self._store = open_store(url)
        self._shuffle = shuffle
        self._seed = seed
        self.epoch = epoch
        self._world = world
        self.names = [entry.name for entry in self._store.list() if entry.name.endswith(".tar")]
        if not self.names:
            raise NotFound(f"{self._store.url} has no *.tar: give the folder that holds the shards")

    def __call__(self) -> Iterator[dict[str, Any]]:
        end_with_trainer()
        self._world.check()
        worker, num_workers = begin_worker()
        order = shuffled(len(self.names), self._seed, self.epoch) if self._shuffle else np.arange(len(self.names))
        own = order[self._world.rank * num_workers + worker :: self._world.world_size * num_workers].tolist()
        with ThreadPoolExecutor(1, thread_name_prefix="wds-tar") as pool:
            has_warned = False
            following = pool.submit(self._read, self.names[own[0]]) if own else None
            for number, shard in enumerate(own):
                assert following is not None
                tar = following.result()
                if number + 1 < len(own):
                    following = pool.submit(self._read, self.names[own[number + 1]])
                url = join(self._store.url, self.names[shard])
                found = scan_tar(tar, url)
                if found.num_passed_over and not has_warned:
                    what = f"{found.num_passed_over} members that are no part of a sample: hidden, without a suffix, or links"
                    warnings.warn(f"{url}: passed over {what}; there may be more in other tars", stacklevel=2)
                    has_warned = True
                for key, payloads in zip(found.keys, found.payloads(tar), strict=True):
                    sample: dict[str, Any] = {"__key__": key, "__url__": url}
                    sample.update((suffix, bytes(payload)) for suffix, payload in payloads.items())
                    yield sample

    def _read(self, name: str) -> memoryview:
        return memoryview(self._store.read(name))
