"""What a reading process does: a request (a step) -> a result with the batch's columns. In a worker or in the main process.

    requests_of (a loop) -> StepRequest -> StepDataset -> StepResult

The request says all: which positions, and which come after them. A process keeps nothing between requests but what it read ahead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from loaders.batches.collate import Batch, Columns, chosen_texts, read_columns
from loaders.batches.decode import Decoder
from loaders.batches.transform import Transformer
from loaders.config import LoaderConfig
from loaders.order.mask import Substitution
from loaders.order.partition import BatchPartition
from loaders.order.plan import Ints
from loaders.order.samples import Located, SampleOrder
from loaders.proof.receipt import SampleHash, total_of
from loaders.proof.steps import StepSpan
from loaders.reading.planner import PositionRange
from loaders.reading.reader import PositionReader, ReadAhead, open_reader
from loaders.reading.source import LoadedSamples
from loaders.tokens.lanes import LaneBook, LaneState
from loaders.tokens.packing import LanePacker
from loaders.tokens.rows import RowMaker, check_packed_ahead, read_token_rows
from wds_tools.errors import UsageError, WdsToolsError


@dataclass(frozen=True, slots=True)
class StepRequest:
    """A step to fetch, and what the worker's next steps are."""

    epoch: int
    """Epoch of the order."""
    steps: BatchPartition
    """Steps of the epoch, over all ranks."""
    step: int
    """Number of the step among them."""
    stride: int
    """Steps between two of this worker's: the number of workers, at least 1."""
    loop: int
    """Number of the loop over the loader."""
    lanes: Mapping[int, LaneState] = field(default_factory=dict)
    """With packing: where lanes stand that this worker meets for the first time in the loop."""


def requests_of(span: StepSpan, stride: int, loop: int, book: LaneBook | None) -> Iterator[StepRequest]:
    """The requests of some steps of a loop; see StepRequest.

    Args:
        book: with packing: what is known of the lanes.
    """
    epoch, steps = span.epoch, span.steps
    for step in range(span.num_steps):
        yield StepRequest(epoch, steps, step, stride, loop, book.new_lanes(steps, step, stride) if book else {})


@dataclass(slots=True, kw_only=True)
class StepResult:
    """A rank's share of a step, as it travels to the main process."""

    columns: Columns
    """The batch."""
    sources: list[int]
    """Number of the source of each sample."""
    hash_total: int
    """Sum of the hashes of the samples, substitutes aside."""
    substitutions: list[Substitution]
    """Samples that could not be read, and their substitutes."""
    asked: tuple[int, int, int]
    """What it answers: the loop, the epoch, and the first position of the share."""
    worker: int
    """Number of the process that made it."""
    counts: dict[str, int]
    """PositionReader.counts() of that process, and those of its RowMaker."""
    lanes: dict[int, LaneState]
    """With packing: where its lanes stand after it."""

    def to_batch(self, names: Sequence[str]) -> Batch:
        """The batch; `names` are those of the sources."""
        columns, lists = self.columns, self.columns.lists
        sources = lists.get("__source__") or list(map(names.__getitem__, self.sources))
        batch: Batch = {"__key__": lists["__key__"], "__source__": sources, **lists}
        if columns.tokens is not None:
            batch |= columns.tokens.to_columns()
        if columns.codes is not None:
            batch["codes"] = columns.codes.to_tensors()
        return (columns.made or {}) | batch


class StepDataset(torch.utils.data.Dataset["StepResult | WdsToolsError"]):
    """Fetches steps of a rank. Indexed by StepRequest; made in the main process, used in any.

    Args:
        order: which sample stands at a position.
        config: how samples are read.
        rank: whose share of the steps.
        maker: of token rows, if they are wanted.
    """

    def __init__(self, order: SampleOrder, config: LoaderConfig, rank: int, maker: RowMaker | None) -> None:
        self._order = order
        self._config = config
        self._rank = rank
        self._hashes = [SampleHash(fingerprint) for fingerprint in order.fingerprints]
        self._decoder = Decoder(order, check_crc=config.check_crc, substitute=config.on_error == "substitute")
        are_rows = check_packed_ahead([opened for opened in order.sources if not opened.removed])
        if are_rows and config.transform is not None:
            raise UsageError(
                "transform= is for samples; the sources are rows of `wds-tools pack`, which are handed over as they are"
            )
        self._parse = read_token_rows if are_rows else read_columns
        self._maker = maker
        self._transformer = None
        if config.transform is not None:
            self._transformer = Transformer(order, self._decoder, config.seed, config.transform, config.collate)
        self._reading: tuple[PositionReader[LoadedSamples], ReadAhead[LoadedSamples], LanePacker | None] | None = None
        self._pid = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reading": None, "_pid": 0}

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
        if self._reading is None or self._pid != os.getpid():
            self._reading, self._pid = self._open(request), os.getpid()
        reader, read_ahead, packer = self._reading
        low, high = request.steps.part(request.step, self._rank)
        hash_total = 0
        lanes: dict[int, LaneState] = {}
        if packer is not None:
            columns, sources, substitutions, lanes = packer.rows(low, high, request.loop, request.lanes)
        else:
            located, loaded = read_ahead.read(PositionRange(request.epoch, low, high), self._upcoming(request))
            columns, replaced = self._decoded(located, loaded, request.epoch, low)
            sources, substitutions = located.source.tolist(), [replaced[number] for number in sorted(replaced)]
            good = (np.delete(column, list(replaced)) if replaced else column for column in located[:3])
            hash_total = total_of(self._hashes, *good)
        return StepResult(
            asked=(request.loop, request.epoch, low),
            columns=columns,
            sources=sources,
            hash_total=hash_total,
            substitutions=substitutions,
            worker=_worker_id(),
            counts=reader.counts() | {"sample_bytes": self._decoder.num_bytes} | (self._maker.counts if self._maker else {}),
            lanes=lanes,
        )

    def _decoded(
        self, located: Located, loaded: list[LoadedSamples], epoch: int, low: int
    ) -> tuple[Columns, dict[int, Substitution]]:
        """Samples from position `low` on as columns; see Decoder.decode."""
        sources = located.source.tolist()

        def epochs() -> Ints:
            return self._order.source_epochs(epoch, np.arange(low, low + len(loaded)))

        if self._transformer is not None:
            return self._transformer.batch(located, loaded, epochs())
        if self._maker is None:
            columns, substitutions = self._decoder.decode(located, loaded, self._parse)
            if "texts" in columns.lists:
                weights = [opened.texts for opened in self._order.sources]
                held = zip(*(columns.lists[name] for name in ("__key__", "text", "texts")), strict=True)
                columns.lists["text"] = chosen_texts(weights, self._config.seed, epochs(), sources, held)
            return columns, substitutions
        samples, substitutions = self._decoder.decode(located, loaded, self._maker.read)
        names = [self._order.sources[number].name for number in sources]
        return self._maker.padded(samples, epochs(), names, sources), substitutions

    def _upcoming(self, request: StepRequest) -> Iterator[PositionRange]:
        """Positions of this worker's next steps, into the next epoch if there is one."""
        for step in range(request.step + request.stride, len(request.steps), request.stride):
            yield PositionRange(request.epoch, *request.steps.part(step, self._rank))
        if request.epoch + 1 == self._config.epochs:
            return
        following = replace(request.steps, start=0, length=self._order.epochs.length(request.epoch + 1))
        for step in range(_worker_id(), len(following), request.stride):
            yield PositionRange(request.epoch + 1, *following.part(step, self._rank))

    def _open(self, request: StepRequest) -> tuple[PositionReader[LoadedSamples], ReadAhead[LoadedSamples], LanePacker | None]:
        low, high = request.steps.part(0, self._rank)
        reader = open_reader(self._order, self._config, high - low, request.stride * request.steps.batch_size)
        packer = None
        if self._config.packing and self._maker is not None:
            packer = LanePacker(self._order, reader, self._decoder, self._maker)
        return reader, ReadAhead(reader), packer


def _worker_id() -> int:
    info = torch.utils.data.get_worker_info()
    return info.id if info else 0
