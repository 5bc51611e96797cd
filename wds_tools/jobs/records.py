"""Records -> samples -> shards: the one loop of every job that makes samples, whatever reads and whatever converts.

    task -> read -> Record -> convert, some records ahead of their turn -> Sample | Reject -> [encoder: codes] -> writer

Invariant: every record is a sample or a reject, in the order in which they were read; what fails is one record, never the task,
unless the storage or the encoder fails. Keys are `TTTTTT-NNNNNNNN`: the task, and the record's number in it.
Memory: `num_ahead` records with what they fetch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from wds_tools.dataset.writer import TaskWriter
from wds_tools.errors import FormatError, Reject
from wds_tools.format.manifest import ENLARGED, IMAGES, PASSED_OVER
from wds_tools.format.schema import Sample
from wds_tools.run.local import Report
from wds_tools.run.progress import Advance
from wds_tools.sources.record import Record

_REPORT_EVERY = 64
_BATCH_RECORDS, _BATCH_UNITS = 64, 128 << 10
"""Of those that wait for nothing. Units are bytes of the input, as most sources count them, and may become a thousand times as
many, so few make a batch."""

Converted = tuple[Record[Any], Sample | Reject]


class Encoder(Protocol):
    """Fills the codes of samples on the way to the shards; see wds_tools.encode.image_encoder."""

    workers: int
    """Processes that encode."""
    runs_on: str
    """Device, as --device has it."""

    @property
    def device(self) -> Any:
        """What encodes in this process; knows how long it waited."""
        ...

    def provenance(self, column_types: Collection[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """What decides on the codes, and the provenance of each code column."""
        ...

    def fill(self, samples: Iterable[Converted]) -> Iterator[Converted]:
        """The same samples in the same order with codes, or why not."""
        ...


@dataclass(frozen=True)
class ConvertRecords:
    """The work on a task."""

    read: Callable[[Any], Iterator[Record[Any]]]
    """The records of a task."""
    convert: Callable[[str, Any, str], Sample]
    """(key, fields of a record, URL of its file) -> sample, or raises Reject. Called in threads, if `num_ahead` is not 0."""
    num_ahead: int = 0
    """Records that are converted at the same time, for what waits for files; 0: one after the other."""
    encoder: Encoder | None = None
    """Fills the codes."""

    def __call__(self, task: Any, writer: TaskWriter, report: Report) -> int:
        """Convert the records of a task; returns how many there were."""
        num_records = units = 0
        converted = self._converted(task, writer)
        for record, sample in converted if self.encoder is None else self.encoder.fill(converted):
            if isinstance(sample, Sample):
                try:
                    writer.add(sample)
                    if sample.image is not None or sample.codes:
                        self._count_images(sample, writer)
                except FormatError as error:  # such as a kept field that is nested too deep to be written
                    sample = Reject("unwritable_record", str(error))
            if isinstance(sample, Reject):
                writer.reject(sample, source=record.source, line=record.line, element=record.element, key=record.key)
            if record.num_passed_over:
                writer.count(PASSED_OVER, record.num_passed_over)
            num_records += 1
            units += record.num_units
            if num_records % _REPORT_EVERY == 0:
                report(self._advance(units))
                units = 0
        report(self._advance(units))
        return num_records

    @staticmethod
    def _count_images(sample: Sample, writer: TaskWriter) -> None:
        for what, number in ((IMAGES, sample.num_images), (ENLARGED, sample.num_enlarged)):
            if number:
                writer.count(what, number)

    def _advance(self, units: int) -> Advance:
        """What is new, with the seconds and images of the encoder."""
        return Advance(units=units) + (Advance() if self.encoder is None else self.encoder.device.new_use())

    def _converted(self, task: Any, writer: TaskWriter) -> Iterator[Converted]:
        def convert(record: Record[Any]) -> Converted:
            fields = record.fields
            if isinstance(fields, Reject):
                return record, fields
            try:
                return record, self.convert(writer.key(record.number), fields, record.source)
            except Reject as cause:
                return record, cause

        records = self.read(task)
        return self._ahead(convert, records) if self.num_ahead else _in_batches(convert, records)

    def _ahead(self, convert: Callable[[Record[Any]], Converted], records: Iterator[Record[Any]]) -> Iterator[Converted]:
        with ThreadPoolExecutor(self.num_ahead) as pool:
            under_way: deque[Future[Converted]] = deque()
            for record in records:
                under_way.append(pool.submit(convert, record))
                if len(under_way) >= self.num_ahead:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()


def _in_batches(convert: Callable[[Record[Any]], Converted], records: Iterator[Record[Any]]) -> Iterator[Converted]:
    """Some are read, then converted, then written: what each step needs stays near the processor, which saves a sixth."""
    batch: list[Record[Any]] = []
    units = 0
    for record in records:
        batch.append(record)
        units += record.num_units
        if len(batch) == _BATCH_RECORDS or units >= _BATCH_UNITS:
            yield from [*map(convert, batch)]
            batch.clear()
            units = 0
    yield from [*map(convert, batch)]
