"""Datasets from Python: `open_dataset(url)` reads samples by number and key, `DatasetWriter(url)` makes a dataset.

    with DatasetWriter("long", parents=[data := open_dataset("pairs")]) as writer:
        for sample in data:
            if len(sample.text) > 100:
                writer.add(sample)

Invariant: what a writer makes is complete or not there. Cost of a sample by number: two small reads; by key: a bisection, or
where keys do not ascend a look through the fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from xxhash import xxh3_64_intdigest

from wds_tools.dataset.output import Output, OutputSpec, remove
from wds_tools.dataset.reader import read_manifest, read_shard
from wds_tools.dataset.samples import PartialSample, SampleReader
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.errors import FormatError, UsageError
from wds_tools.format.manifest import Manifest, code_layouts
from wds_tools.format.schema import ANY_MEMBERS, Sample
from wds_tools.format.shard import sample_from_members
from wds_tools.select.fields import KEY, Fields, join_tables, values_of
from wds_tools.select.select import of_parents
from wds_tools.storage import open_store


def open_dataset(url: str) -> Dataset:
    """Open a complete dataset, or third-party tars that `wds-tools index` has been over.

    Args:
        url: a directory or URL.

    Returns:
        The dataset; of its samples nothing is read yet.

    Raises:
        NotFound: there is no manifest.
        FormatError: it is damaged.
    """
    return Dataset(url)


class Dataset:
    """A dataset that is read: len(data), data[17], data["000012-00000007"], iteration in order.

    Args:
        url: a directory or URL.

    Raises:
        NotFound, FormatError: see `open_dataset`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._store = open_store(url)
        self.manifest: Manifest = read_manifest(self._store, any_members=True)
        """What is in it, and where it comes from."""
        self._reader = SampleReader(self._store, self.manifest)

    def __len__(self) -> int:
        return len(self._reader)

    def __iter__(self) -> Iterator[Sample]:
        """The samples in order. Raises as `__getitem__`."""
        self._check_schema()
        for shard in self.manifest.shards:
            yield from read_shard(self._store, shard)

    def __getitem__(self, which: int | str) -> Sample:
        """A sample, by its number from 0, or by its key.

        Raises:
            UsageError: there is none; or the samples are not of this project's schema: see `members`.
            FormatError: it is damaged.
        """
        self._check_schema()
        stored = self._read(which)
        return sample_from_members(stored.key, stored.payloads)

    def members(self, which: int | str) -> dict[str, bytes]:
        """The members of a sample of any schema: suffix, such as "json" or "jpg" -> bytes.

        Args:
            which: its number from 0, or its key.

        Raises:
            UsageError, FormatError: see `__getitem__`.
        """
        return {suffix: bytes(payload) for suffix, payload in self._read(which).payloads.items()}

    def fields(self, *names: str) -> Any:
        """The fields of all samples: a pyarrow.Table of len(self) rows, in order.

        They are made at the first call, which reads the dataset, and kept in it (`fields/`) if it can be written.

        Args:
            names: columns, those that there are; by default all. Which there are, docs/choose.md says.

        Raises:
            MissingPackage: pyarrow is not installed.
            UsageError: another run is writing there.
        """
        return join_tables([self._fields.read(shard, names or None) for shard in self.manifest.shards])

    def close(self) -> None:
        """End the threads that read."""
        self._reader.close()

    @cached_property
    def _fields(self) -> Fields:
        return Fields.make(self._store, self.manifest)

    def _read(self, which: int | str) -> PartialSample:
        return self._reader.sample(self._find(which) if isinstance(which, str) else which, lambda _: True)

    def _find(self, key: str) -> int:
        if (number := self._reader.number_of(key)) is not None:
            return number
        first = 0
        for shard in self.manifest.shards:
            keys = values_of(self._fields.read(shard, [KEY]), KEY)
            if key in keys:
                return first + keys.index(key)
            first += shard.samples
        raise UsageError(f"{self.url} has no sample {key!r}")

    def _check_schema(self) -> None:
        if self.manifest.schema_version == ANY_MEMBERS:
            raise UsageError(f"{self.url} holds samples of any members ({', '.join(self.manifest.members)}): ask for members()")


class DatasetWriter:
    """Makes a dataset. A context manager: complete, with its manifest, once it is left; if that is by an error, nothing is.

    Args:
        url: where it goes: a directory or prefix, empty or absent.
        parents: datasets that its samples come from: provenance and codes go into its manifest.
        codes: provenance of further columns of codes, such as {"vqcode_512": {"tokenizer": "mine", "codebook_size": 8192}}.
        shard_samples, shard_bytes: a shard closes at whichever comes first.
        overwrite: remove the dataset that is there.

    Raises:
        UsageError: on entering: the output is in the way, or the parents don't go together.
    """

    manifest: Manifest
    """Of the finished dataset, once the writer is left."""

    def __init__(
        self,
        url: str,
        *,
        parents: Sequence[Dataset] = (),
        codes: Mapping[str, Mapping[str, Any]] | None = None,
        shard_samples: int = ShardLimits.samples,
        shard_bytes: int = ShardLimits.bytes,
        overwrite: bool = False,
    ) -> None:
        common = of_parents([data.url for data in parents], [data.manifest for data in parents]) if parents else {}
        spec = OutputSpec(
            num_tasks=1,
            source={"plan": {"command": "DatasetWriter"}, **common.get("source", {})},
            codes={**common.get("codes", {}), **(codes or {})},
        )
        self._output = Output(open_store(url), spec, overwrite=overwrite)
        self._limits = ShardLimits(samples=shard_samples, bytes=shard_bytes)
        self._layouts = code_layouts(spec.codes)
        self._keys: set[int] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._output.look()
        self._stack.enter_context(self._output)
        self._output.begin()
        self._writer = self._stack.enter_context(TaskWriter(self._output.store, 0, self._limits, layouts=self._layouts))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if kind is None:
                self.manifest = self._output.finish({0: self._writer.finish(self._writer.num_samples)})
                return
        remove(self._output.store)

    def add(self, sample: Sample) -> None:
        """Append a sample.

        Args:
            sample: with a key of its own.

        Raises:
            FormatError: it breaks the schema, or its key was there before; nothing was written.
            StorageError: the shard can't be written.
        """
        digest = xxh3_64_intdigest(sample.key.encode())
        if digest in self._keys:
            raise FormatError(f"{sample.key}: a sample of this key is there already")
        self._writer.add(sample)
        self._keys.add(digest)
