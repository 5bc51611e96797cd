"""Write the shards of one task, part by part.

    TaskWriter   shard-TTTTTT-PPPP.tar       part P of task T: closes at a count or a size
                 shard-TTTTTT-PPPP.tar.index
                 rejects/task-TTTTTT.jsonl   only if something was rejected
                 _work/task-TTTTTT.json      a TaskResult, written last: the task is done, and these are its files

Every file is published whole or not at all (see `storage`). A shard is a function of its task alone.
Invariant: a task's inputs, counted by whoever reads them, are its samples + rejects.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import orjson

from wds_tools.dataset.files import Written, written
from wds_tools.dataset.layout import index_name, marker_name, rejects_name, shard_name
from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.codes import NO_LAYOUTS, CodeGrid
from wds_tools.format.index import ShardIndex, serialize_index
from wds_tools.format.manifest import FILTERED
from wds_tools.format.offsets import marked
from wds_tools.format.schema import ANY_MEMBERS, Sample
from wds_tools.format.shard import ShardBuilder
from wds_tools.format.shards import ShardInfo
from wds_tools.format.typed_json import Count
from wds_tools.storage import Store, Writer

_WRITE_BYTES = 256 << 10
"""A write takes as long as to make a document, so that many share one; large samples are written as they come."""


@dataclass(frozen=True, kw_only=True)
class ShardLimits:
    """When a shard closes: at whichever comes first."""

    samples: int = 10_000
    """Samples in a shard at most."""
    bytes: int = 256 << 20
    """A shard closes once it has this many bytes."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.bytes < 1:
            raise UsageError(f"a shard holds at least one sample and one byte, got {self.samples} and {self.bytes}")


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What became of one task."""

    task: Count
    inputs: Count
    """Records read."""
    shards: tuple[ShardInfo, ...]
    rejects: Mapping[str, Count]
    """By reason."""
    files: Mapping[str, Written]
    """All that was published: shards, indices, rejects."""
    offsets: Mapping[str, str]
    """Of each shard: see offsets.marked; base64."""
    rejects_sha256: str
    """Of the file of rejects, hexadecimal; "" if there is none."""
    counts: Mapping[str, Count] = field(default_factory=dict)
    """What else the work counted: TaskWriter.count."""
    schema_version: Count = ANY_MEMBERS
    """The newest that a sample needs."""


class TaskWriter:
    """Writes the shards and rejects of one task. Use as a context manager; `finish` publishes, an exception discards.

    A full shard is published (flushed to the disk, or its upload completed) in a thread while the next one fills.

    Args:
        store: the dataset.
        task: its number in the plan.
        limits: when a shard closes.
        key_prefix: of the keys that `key` makes.
        layouts: code column -> what its arrays are, where that is another than (h, w).
    """

    def __init__(
        self,
        store: Store,
        task: int,
        limits: ShardLimits,
        key_prefix: str = "",
        layouts: Mapping[str, CodeGrid] = NO_LAYOUTS,
    ) -> None:
        self._store = store
        self._layouts = layouts
        self.task = task
        self._key_prefix = f"{key_prefix}-{task:06d}-" if key_prefix else f"{task:06d}-"
        self._limits = limits
        self._builder: ShardBuilder | None = None
        self._writer: Writer | None = None
        self._unwritten: list[bytes] = []
        self._unwritten_bytes = 0
        self._publisher = ThreadPoolExecutor(1)
        self._publishing: Future[None] | None = None
        self._shards: list[ShardInfo] = []
        self._files: dict[str, Written] = {}
        self._offsets: dict[str, str] = {}
        self._reject_lines: list[bytes] = []
        self._rejects: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self.num_samples = 0
        self.num_rejects = 0
        self._schema_version = ANY_MEMBERS

    def __enter__(self) -> TaskWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._publisher.shutdown()
        if self._writer is not None:
            self._writer.abort()
            self._writer = None

    def key(self, number: int) -> str:
        """The key of an input of the task.

        Args:
            number: of the input, from 0.
        """
        return f"{self._key_prefix}{number:08d}"

    def add(self, sample: Sample) -> None:
        """Append a sample; closes the shard if it is full.

        Args:
            sample: with a key of its own.

        Raises:
            FormatError: the sample breaks the schema; nothing was written.
            StorageError: the shard can't be written.
        """
        builder = self._builder or ShardBuilder(self._layouts)
        self._append(builder, builder.add(sample))
        if (version := sample.schema_version) > self._schema_version:
            self._schema_version = version

    def add_members(self, key: str, payloads: Iterable[tuple[str, bytes | memoryview]], sample: Sample | None = None) -> None:
        """Append a sample of any members.

        Args:
            key: of the sample.
            payloads: (suffix, bytes) of each member.
            sample: what they are, if they follow the schema; see ShardBuilder.add_members.

        Raises:
            FormatError, StorageError: as `add`.
        """
        builder = self._builder or ShardBuilder()
        self._append(builder, builder.add_members(key, payloads, sample))

    def add_stored(self, samples: Sequence[memoryview], index: ShardIndex, data_types: Sequence[str]) -> None:
        """Append samples as they lie in another tar; shards close behind the same samples as if they came one by one.

        Args:
            samples: the bytes of each.
            index, data_types: theirs; see ShardBuilder.add_stored.
        """
        first, ends = 0, np.cumsum(index.size, dtype=np.int64)
        while first < len(samples):
            builder = self._builder or ShardBuilder()
            room = self._limits.bytes - builder.num_bytes + (int(ends[first - 1]) if first else 0)
            full = min(first + self._limits.samples - builder.num_samples, int(np.searchsorted(ends, room)) + 1)
            last = min(full, len(samples))
            data = b"".join(samples[first:last])
            self._append(builder, builder.add_stored(data, index.part(first, last), data_types[first:last]), last - first)
            first = last

    def count(self, what: str, number: int = 1) -> None:
        """Add to a count of the manifest's `source["counts"]`.

        Args:
            what: name of the count.
            number: what is added.
        """
        self._counts[what] += number

    def _append(self, builder: ShardBuilder, data: bytes, num_samples: int = 1) -> None:
        if self._writer is None:
            self._builder, self._writer = builder, self._store.write(shard_name(self.task, len(self._shards)))
        self._unwritten.append(data)
        self._unwritten_bytes += len(data)
        if self._unwritten_bytes >= _WRITE_BYTES:
            self._write_out(self._writer)
        self.num_samples += num_samples
        if builder.num_samples >= self._limits.samples or builder.num_bytes >= self._limits.bytes:
            self._close_shard()

    def _write_out(self, writer: Writer) -> None:
        writer.write(b"".join(self._unwritten))
        self._unwritten.clear()
        self._unwritten_bytes = 0

    def reject(
        self, cause: Reject, *, source: str, line: int | None = None, element: int | None = None, key: str | None = None
    ) -> None:
        """Record an input that becomes no sample. A reason of FILTERED is counted, and no more.

        Args:
            cause: reason and detail.
            source: URL of its file.
            line, element, key: where it is in there: a line, an element of a JSON list, or a key.
        """
        self._rejects[cause.reason] += 1
        self.num_rejects += 1
        if cause.reason in FILTERED:
            return
        record = {"source": source, "line": line, "element": element, "key": key, "reason": cause.reason, "detail": cause.detail}
        known = {name: value for name, value in record.items() if value is not None}
        for name, text in known.items():
            if isinstance(text, str):  # of the record, perhaps, which may hold half a character
                known[name] = text.encode(errors="backslashreplace").decode()
        self._reject_lines.append(orjson.dumps(known))

    def finish(self, inputs: int) -> TaskResult:
        """Publish what is left and mark the task as done.

        Args:
            inputs: records that were read, counted by the reader.

        Returns:
            What the task has made, as its marker has it.

        Raises:
            FormatError: they are not the samples and rejects that arrived here.
        """
        if inputs != self.num_samples + self.num_rejects:
            raise FormatError(
                f"task {self.task}: read {inputs} records, but {self.num_samples} samples + {self.num_rejects} rejects "
                "came out: this is a bug of the converter"
            )
        self._close_shard()
        self._wait_for_publication()
        rejects = b"".join(line + b"\n" for line in self._reject_lines)
        if rejects:
            self._put(rejects_name(self.task), rejects)
        result = TaskResult(
            task=self.task,
            inputs=inputs,
            shards=tuple(self._shards),
            rejects=dict(sorted(self._rejects.items())),
            files=self._files,
            offsets=self._offsets,
            rejects_sha256=hashlib.sha256(rejects).hexdigest() if rejects else "",
            counts=dict(sorted(self._counts.items())),
            schema_version=self._schema_version,
        )
        self._store.put(marker_name(self.task), orjson.dumps(result))
        return result

    def _close_shard(self) -> None:
        if self._builder is None or self._writer is None:
            return
        name = shard_name(self.task, len(self._shards))
        data, index, shard = self._builder.finish(name)
        self._unwritten.append(data)
        self._write_out(self._writer)
        self._wait_for_publication()
        self._publishing = self._publisher.submit(self._publish, self._writer, index, shard)
        self._builder = self._writer = None
        self._shards.append(shard)
        self._offsets[name] = base64.b64encode(marked(index.start, shard.bytes).tobytes()).decode()

    def _publish(self, writer: Writer, index: ShardIndex, shard: ShardInfo) -> None:
        writer.close()
        self._files[shard.name] = Written(shard.bytes, shard.xxh128)
        self._put(index_name(shard.name), serialize_index(index))

    def _put(self, name: str, data: bytes) -> None:
        self._store.put(name, data)
        self._files[name] = written(data)

    def _wait_for_publication(self) -> None:
        if self._publishing is not None:
            self._publishing.result()
            self._publishing = None
