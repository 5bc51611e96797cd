"""What a reading process does: an errand (a step) -> a parcel with the batch's columns. In a worker or in the main process.

The errand says all: which positions, and which come after them. A process keeps nothing between errands but what it read ahead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from loaders.cache import BlockCache
from loaders.collate import Columns, read_columns
from loaders.config import LoaderConfig, World
from loaders.decode import Decoder, Substitution
from loaders.prefetch import Part, Reader, lanes_of
from loaders.receipt import SampleHash, total_of
from loaders.steps import Steps
from loaders.stream import Stream
from wds_tools.errors import WdsToolsError


@dataclass(frozen=True, slots=True)
class Errand:
    """A step to fetch, and how the ones behind it follow."""

    epoch: int
    steps: Steps
    step: int
    stride: int
    """Steps between two of this worker's."""


@dataclass(slots=True, kw_only=True)
class Parcel:
    """A rank's part of a step, as it travels to the main process."""

    columns: Columns
    sources: list[int]
    """Number of the source of each row."""
    hash_total: int
    """Of the samples that it holds, substitutes aside."""
    substitutions: list[Substitution]
    worker: int
    counts: dict[str, int]
    """Reader.counts() of the process that made it."""


class PartReader(torch.utils.data.Dataset["Parcel | WdsToolsError"]):
    """Fetches steps of a rank. Indexed by Errand; made in the main process, used in any.

    Args:
        stream, config, world: what is read, and by whom.
    """

    def __init__(self, stream: Stream, config: LoaderConfig, world: World) -> None:
        self._stream = stream
        self._config = config
        self._world = world
        self._hashes = [SampleHash(fingerprint) for fingerprint in stream.fingerprints]
        self._decoder = Decoder(check_crc=config.check_crc, substitute=config.on_error == "substitute")
        self._reader: Reader | None = None
        self._pid = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_pid": 0}

    def __getitem__(self, errand: Errand) -> Parcel | WdsToolsError:
        """The parcel of a step, or the error that it met: DataLoader would take its message apart."""
        try:
            return self.fetch(errand)
        except WdsToolsError as error:
            return error

    def fetch(self, errand: Errand) -> Parcel:
        """The parcel of a step.

        Raises:
            FormatError: a sample or an index is damaged.
            StorageError: the storage does not answer.
        """
        reader = self._reader_of(errand)
        part = Part(errand.epoch, *errand.steps.part(errand.step, self._world))
        located, rows = reader.rows(part, self._upcoming(errand))
        columns, substitutions, good = self._decoder.decode(located, rows, read_columns)
        return Parcel(
            columns=columns,
            sources=located.source.tolist(),
            hash_total=total_of(self._hashes, good.source, good.shard, good.row),
            substitutions=substitutions,
            worker=_worker_id(),
            counts=reader.counts(),
        )

    def _upcoming(self, errand: Errand) -> Iterator[Part]:
        """The parts of this worker's next steps, into the next epoch."""
        for step in range(errand.step + errand.stride, len(errand.steps), errand.stride):
            yield Part(errand.epoch, *errand.steps.part(step, self._world))
        following = Steps(self._stream.length, 0, errand.steps.batch_size, errand.steps.tail)
        for step in range(_worker_id(), len(following), errand.stride):
            yield Part(errand.epoch + 1, *following.part(step, self._world))

    def _reader_of(self, errand: Errand) -> Reader:
        if self._reader is None or self._pid != os.getpid():
            config, lanes = self._config, self._stream.order.lanes
            low, high = errand.steps.part(0, self._world)
            part = max(high - low, 1)
            own_lanes = lanes_of(lanes, part, errand.stride * errand.steps.batch_size)
            cache = BlockCache(config.cache_dir, config.cache_bytes) if config.cache_dir else None
            self._reader, self._pid = Reader(self._stream, own_lanes, part, config.memory_bytes, cache), os.getpid()
        return self._reader


def _worker_id() -> int:
    info = torch.utils.data.get_worker_info()
    return info.id if info else 0
