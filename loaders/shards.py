"""One dataset as a torch IterableDataset on webdataset's pipeline: shuffled, decoded samples, each once an epoch.

    SampleOrder -> this rank's and worker's positions -> ReadAhead -> dicts -> .map / .batched / WebLoader / DataLoader

Position p belongs to rank p mod world_size, and worker w of n takes every n-th of a rank's. Samples are read and
decoded `_READ_TOGETHER` at a time; what comes out are single samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from loaders.batches.collate import Sample, read_samples
from loaders.batches.decode import Decoder
from loaders.config import LastBatch, LoaderConfig, Source
from loaders.order.partition import BatchPartition
from loaders.order.samples import SampleOrder, open_source, order_spec
from loaders.proof.state import Start, next_starts, read_state, resumed, state_to_json
from loaders.reading.planner import PositionRange
from loaders.reading.reader import ReadAhead, open_reader
from loaders.workers.handover import begin_worker
from loaders.world import World
from wds_tools.errors import UsageError

_READ_TOGETHER = 256
_BATCH = 128
"""Of the order: it does not depend on the number of ranks, and no batches are made here."""


class ShardDataset(wds.DataPipeline, wds.compat.FluidInterface):  # type: ignore[misc]  # webdataset has no types
    """Samples of a dataset, as dicts.

    A sample has `__key__`, `__url__`, `data_type`, `text`, and what it has of: `codes` (int32 tensor (h, w) of codebook indices),
    `width` and `height` (pixels), `conversations`, `image` (encoded bytes), and its provenance fields. Of a conversation,
    `codes` and `image` are lists, one entry an image. Tars made elsewhere, once `wds-tools index` has been there, give `__key__`,
    `__url__` and the members' bytes by suffix, as webdataset does.

    An iteration is an epoch; `set_epoch` chooses the order of the next, and is called before each. `state_dict` stands behind
    the last sample that came out, so it is exact for stages that keep nothing back (`map`, on one rank `select`; not `shuffle`
    or `batched`), and under torchdata's StatefulDataLoader, which asks each worker. Batches, mixtures, receipts: build_loader.

    Args:
        url: the dataset: a directory or URL.
        shuffle: permute the samples; else the order of the shards.
        seed: of the permutation.
        epoch: of the permutation; see `set_epoch`.
        rank: this process among `world_size`. Without both, they are detected (World.detect) and compared with torch.distributed
            at the first sample; rank=0, world_size=1 gives every process all samples.
        world_size: training processes; each sample goes to one of them.
        last_batch: what becomes of the last samples, fewer than world_size: `short` hands them out, so that ranks may differ by
            one; `drop` leaves them out; `wrap` fills up from the beginning of the next epoch.
        memory_bytes: what a process keeps of the data that it has fetched.
        scarce_memory: run with less than what is read at one time, and fetch data more than once; else that is refused.
        cache_dir: a folder on a local disk that keeps what was fetched from object storage.
        cache_bytes: size limit of that folder.
        check_crc: compare every sample's bytes with its CRC-32.

    Raises:
        NotFound: there is no manifest at the URL.
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
        last_batch: LastBatch = "short",
        memory_bytes: int = 2 << 30,
        scarce_memory: bool = False,
        cache_dir: str | None = None,
        cache_bytes: int = 100 << 30,
        check_crc: bool = False,
    ) -> None:
        world = World.of(rank, world_size)
        config = LoaderConfig(
            sources=(Source(url),),
            batch_size=_BATCH,
            seed=seed,
            shuffle=shuffle,
            last_batch=last_batch,
            memory_bytes=memory_bytes,
            scarce_memory=scarce_memory,
            cache_dir=cache_dir,
            cache_bytes=cache_bytes,
            check_crc=check_crc,
        )
        self._source = _Samples(config, world, epoch)
        super().__init__(self._source)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch over all ranks."""
        return self._source.order.length

    def select(self, predicate: Callable[[Sample], bool]) -> Self:
        """Samples for which a function is true, on one rank.

        Args:
            predicate: sample -> whether it is kept.

        Raises:
            UsageError: there are several, which would come to different numbers of samples, and wait for each other for ever.
        """
        if (ranks := self._source.world.world_size) > 1:
            raise UsageError(
                f"select() on {ranks} ranks: each would keep another number of samples, and all wait for the first that ends: "
                "choose before training (`wds-tools select`), or take samples out with Source(exclude=) of build_loader"
            )
        return super().select(predicate)  # type: ignore[no-any-return]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes, from its start; of persistent workers too.

        Args:
            epoch: from 0.
        """
        self._source.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands: small JSON, the same on every rank that has handed out as many samples."""
        source = self._source
        position = source.order.epochs.start(source.epoch) + min(source.position, source.order.length)
        return {**state_to_json(source.order, position, position, source.starts), "epoch": source.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state with the next iteration: behind the last sample of an epoch, with the next epoch. StatefulDataLoader
        with workers does not hand over states of a finished epoch: call set_epoch behind it.

        Args:
            state: of the same worker of the same number.

        Raises:
            UsageError: the state is damaged, or of other data or another order; says what differs.
        """
        self._source.load_state_dict(state)


class _Samples:
    """The first stage of the pipeline: called for each iteration, in the process that iterates."""

    def __init__(self, config: LoaderConfig, world: World, epoch: int) -> None:
        self._config = config
        self.world = world
        sources = [open_source(config.sources[0])]
        self.order = SampleOrder(sources, order_spec(sources, config))
        self._chosen = torch.tensor([0, epoch], device="cpu").share_memory_()  # type: ignore[no-untyped-call]
        """Calls of set_epoch, and the epoch of the last: workers that stay hear of it here."""
        self._heard = 0
        self.epoch = epoch
        self.starts: tuple[Start, ...] = (Start(0, 0, 1, 1, config.last_batch),)
        """See Record: a step is a sample."""
        self.start = 0
        """Position at which the next iteration begins."""
        self.position = 0
        """Position in the epoch after the samples handed out: a multiple of what ranks and workers take in turn, or the end."""

    def set_epoch(self, epoch: int) -> None:
        self._chosen.copy_(torch.tensor([int(self._chosen[0]) + 1, epoch], device="cpu"))
        self._hear()

    def _hear(self) -> None:
        calls, epoch = self._chosen.tolist()
        if calls != self._heard:
            self._heard, self.epoch, self.position, self.start = calls, epoch, 0, 0

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = read_state(state)
        self.order = resumed(saved, self._config, self.order.sources)
        self.starts = next_starts(saved, Start(saved.position, saved.step, 1, 1, self._config.last_batch))
        self.epoch, self.position = self.order.epochs.at(saved.position)
        if saved.epoch == self.epoch - 1 and not self.position and get_worker_info():  # others may not have done their part
            self.epoch, self.position = saved.epoch, self.order.epochs.length(saved.epoch)
        self.start = self.position

    def __call__(self) -> Iterator[Sample]:
        self.world.check()
        worker, num_workers = begin_worker()
        self._hear()
        rank, world_size, epoch = self.world.rank, self.world.world_size, self.epoch
        stride = world_size * num_workers
        self.position, self.start = self.start, 0
        steps = BatchPartition(self.order.length, self.position, world_size, self._config.last_batch, world_size)
        end = self.order.length if self._config.last_batch == "short" else self.position + len(steps) * world_size
        positions = range(self.position + rank + world_size * worker, end, stride)
        starts = range(0, len(positions), _READ_TOGETHER)
        read_ahead = ReadAhead(open_reader(self.order, self._config, 1, stride))
        decoder = Decoder(self.order, check_crc=self._config.check_crc, substitute=False)
        for number, start in enumerate(starts):
            upcoming = (_range(epoch, positions[later : later + _READ_TOGETHER]) for later in starts[number + 1 :])
            located, loaded = read_ahead.read(_range(epoch, positions[start : start + _READ_TOGETHER]), upcoming)
            samples, _ = decoder.decode(located, loaded, read_samples)
            for sample in samples:
                self.position += stride
                yield sample
        if get_worker_info() is None:
            self.position = self.order.length


def _range(epoch: int, positions: range) -> PositionRange:
    return PositionRange(epoch, positions.start, positions.stop, positions.step)
