"""What a reading process does: an request (a step) -> a result with the batch's columns. In a worker or in the main process.

The request says all: which positions, and which come after them. A process keeps nothing between requests but what it read ahead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from loaders.batches.collate import Columns, read_columns
from loaders.batches.decode import Decoder, Substitution
from loaders.config import LoaderConfig
from loaders.order.partition import BatchPartition
from loaders.order.samples import SampleOrder
from loaders.proof.receipt import SampleHash, total_of
from loaders.reading.cache import BlockCache
from loaders.reading.prefetch import PositionRange, Reader, lanes_of
from loaders.tokens.packing import Cursor, LaneRows
from loaders.tokens.rows import RowMaker, check_packed_ahead, read_token_rows
from wds_tools.errors import WdsToolsError


@dataclass(frozen=True, slots=True)
class StepRequest:
    """A step to fetch, and how the ones behind it follow."""

    epoch: int
    steps: BatchPartition
    step: int
    stride: int
    """Steps between two of this worker's."""
    loop: int
    """Of the loops over the loader, which this is for."""
    cursors: Mapping[int, Cursor] = field(default_factory=dict)
    """With packing: where lanes stand that this worker meets for the first time in it."""


@dataclass(slots=True, kw_only=True)
class StepResult:
    """A rank's part of a step, as it travels to the main process."""

    columns: Columns
    sources: list[int]
    """Number of the source of each row."""
    hash_total: int
    """Of the samples that it holds, substitutes aside."""
    substitutions: list[Substitution]
    worker: int
    counts: dict[str, int]
    """Reader.counts() of the process that made it, and those of its RowMaker."""
    cursors: dict[int, Cursor] = field(default_factory=dict)
    """With packing: where its lanes stand behind it."""


class StepDataset(torch.utils.data.Dataset["StepResult | WdsToolsError"]):
    """Fetches steps of a rank. Indexed by StepRequest; made in the main process, used in any.

    Args:
        stream, config, rank: what is read, and by whom.
        maker: of token rows, if they are wanted.
    """

    def __init__(self, order: SampleOrder, config: LoaderConfig, rank: int, maker: RowMaker | None) -> None:
        self._order = order
        self._config = config
        self._rank = rank
        self._hashes = [SampleHash(fingerprint) for fingerprint in order.fingerprints]
        self._decoder = Decoder(check_crc=config.check_crc, substitute=config.on_error == "substitute")
        self._parse = read_token_rows if check_packed_ahead(order.sources) else read_columns
        self._maker = maker
        self._reader: Reader | None = None
        self._lanes: LaneRows | None = None
        self._pid = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_lanes": None, "_pid": 0}

    def __getitem__(self, request: StepRequest) -> StepResult | WdsToolsError:
        """The result of a step, or the error that it met: DataLoader would take its message apart."""
        try:
            return self.fetch(request)
        except WdsToolsError as error:
            return error

    def fetch(self, request: StepRequest) -> StepResult:
        """The result of a step.

        Raises:
            FormatError: a sample or an index is damaged.
            StorageError: the storage does not answer.
        """
        reader = self._reader_of(request)
        low, high = request.steps.part(request.step, self._rank)
        if self._lanes is not None:
            packed = self._lanes.part(low, high, request.loop, request.cursors)
            return self._result(reader, packed.columns, packed.sources, 0, packed.substitutions, packed.cursors)
        part = PositionRange(request.epoch, low, high)
        located, rows = reader.rows(part, self._upcoming(request))
        sources = located.source.tolist()
        if self._maker is None:
            columns, substitutions, good = self._decoder.decode(located, rows, self._parse)
        else:
            samples, substitutions, good = self._decoder.decode(located, rows, self._maker.read)
            epochs = self._order.source_epochs(request.epoch, np.arange(low, high))
            columns = self._maker.padded(samples, epochs, [self._order.sources[number].name for number in sources])
        hash_total = total_of(self._hashes, good.source, good.shard, good.sample_index)
        return self._result(reader, columns, sources, hash_total, substitutions)

    def _result(
        self,
        reader: Reader,
        columns: Columns,
        sources: list[int],
        hash_total: int,
        substitutions: list[Substitution],
        cursors: dict[int, Cursor] | None = None,
    ) -> StepResult:
        return StepResult(
            columns=columns,
            sources=sources,
            hash_total=hash_total,
            substitutions=substitutions,
            worker=_worker_id(),
            counts=reader.counts() | (self._maker.counts if self._maker else {}),
            cursors=cursors or {},
        )

    def _upcoming(self, request: StepRequest) -> Iterator[PositionRange]:
        """The parts of this worker's next steps, into the next epoch."""
        for step in range(request.step + request.stride, len(request.steps), request.stride):
            yield PositionRange(request.epoch, *request.steps.part(step, self._rank))
        following = replace(request.steps, start=0, length=self._order.length)
        for step in range(_worker_id(), len(following), request.stride):
            yield PositionRange(request.epoch + 1, *following.part(step, self._rank))

    def _reader_of(self, request: StepRequest) -> Reader:
        if self._reader is None or self._pid != os.getpid():
            config, lanes = self._config, self._order.spec.lanes
            low, high = request.steps.part(0, self._rank)
            part = high - low
            own_lanes = lanes_of(lanes, part, request.stride * request.steps.batch_size)
            cache = BlockCache(config.cache_dir, config.cache_bytes) if config.cache_dir else None
            self._reader, self._pid = Reader(self._order, own_lanes, part, config.memory_bytes, cache), os.getpid()
            if config.packing and self._maker is not None:
                self._lanes = LaneRows(self._order, self._reader, self._decoder, self._maker)
        return self._reader


def _worker_id() -> int:
    info = torch.utils.data.get_worker_info()
    return info.id if info else 0
