"""The fields of a dataset's samples, as tables: made once, read by whatever chooses.

    shard -> keys, json, sizes, hashes -> a table -> fields/ID/SHARD.parquet in the dataset, under its lease
                                                     or, where nothing can be written there, in the output

A row is a sample: key, shard, sample_index, bytes, text_chars, num_codes; what its json has, but for texts and turns; text_hash
and codes_hash, the XXH3-128 of its text (with turns) and of its codes, null where it has none. A column whose values are of
several kinds, lists or objects holds JSON. Invariant: a file is a function of its shard, and ID of the dataset's content: one
that is there is right. Cost: one read of every shard, about 12 us a sample; memory is one shard a process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
from xxhash import xxh3_128

from wds_tools.dataset.layout import FIELDS, index_name
from wds_tools.dataset.lease import Lease
from wds_tools.dataset.reader import ShardBytes, check_unchanged
from wds_tools.errors import FormatError, StorageError, in_one_line
from wds_tools.format.index import check_fresh, parse_index
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import ANY_MEMBERS
from wds_tools.format.shards import ShardInfo
from wds_tools.format.tar.scan import scan_tar
from wds_tools.records.fields import value_of
from wds_tools.run.local import Report, run_tasks
from wds_tools.run.progress import Advance, Progress
from wds_tools.sources.arrow import load_pyarrow
from wds_tools.storage import Store, join
from wds_tools.terminal import say

KEY, TEXT_HASH, CODES_HASH = "key", "text_hash", "codes_hash"
_SHARD = "shard"
_NO_FIELDS = {"text", "conversations", "grids", "texts"}
_IS_JSON = b"wds_tools_json"
EXACT = 1 << 53
"""Below it a float tells whole numbers apart."""
_MAX_ROW_BYTES = 1 << 16
"""A file that becomes more for each of its rows, and more than a MiB, is refused."""


@dataclass(frozen=True)
class Fields:
    """The fields of one dataset. A value that can be pickled."""

    store: Store
    """The dataset."""
    schema_version: int
    home: Store | None
    """Where the files are; None: nowhere, and each table is made when it is asked for."""
    folder: str
    """Of the files."""
    shards: ShardBytes = field(default_factory=ShardBytes, repr=False)

    @classmethod
    def find(cls, store: Store, manifest: Manifest) -> Fields:
        """Those that are in a dataset; if any are missing, each table is made when it is asked for. Nothing is written."""
        found = cls(store, manifest.schema_version, store, _folder(manifest))
        return replace(found, home=None) if found._missing(manifest) else found

    @classmethod
    def make(
        cls, store: Store, manifest: Manifest, *, spare: Store | None = None, workers: int = 1, quiet: bool = True
    ) -> Fields:
        """Those of a dataset, with the files that are missing.

        Args:
            store, manifest: the dataset.
            spare: where the files go if the dataset can't be written.
            workers: processes to use.
            quiet: show no progress.

        Raises:
            MissingPackage: pyarrow is not installed.
            UsageError: another run is writing there.
            FormatError: a shard is damaged.
        """
        load_pyarrow("reading the fields of samples")
        folder = _folder(manifest)
        for home in (store, spare):
            made = cls(store, manifest.schema_version, home, folder)
            missing = made._missing(manifest)
            if home is None or not missing:
                return made
            with ExitStack() as stack:
                try:
                    lease = stack.enter_context(Lease(home))
                except StorageError as error:
                    if spare is not None:
                        say(f"wds-tools: {store.url} can't be written: its fields go to {spare.url} ({error})", error=True)
                    continue
                progress = stack.enter_context(Progress("fields", sum(shard.samples for shard in missing), quiet=quiet))
                with closing(run_tasks(made.write, missing, workers=workers, on_report=progress)) as written:
                    for _ in written:
                        lease.check()
                home.clean_temp()  # of runs that were killed
            return made
        return cls(store, manifest.schema_version, None, folder)

    def write(self, shard: ShardInfo, report: Report) -> None:
        """Make the file of a shard."""
        assert self.home is not None
        pa = load_pyarrow("writing the fields of samples")
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(self._table(shard), sink, compression="zstd", write_page_checksum=True)
        self.home.put(self._name(shard), sink.getvalue().to_pybytes())
        report(Advance(units=shard.samples, samples=shard.samples))

    def read(self, shard: ShardInfo, names: Sequence[str] | None = None) -> Any:
        """The table of a shard: a pyarrow.Table of its samples in order.

        Args:
            shard: of the manifest.
            names: columns, those that there are; None: all.

        Raises:
            FormatError: the file, or the shard that it is made of, is damaged.
        """
        if self.home is None:
            table = self._table(shard)
            return table if names is None else table.select([name for name in table.column_names if name in names])
        pa, where = load_pyarrow("reading the fields of samples"), join(self.home.url, self._name(shard))
        data = self.home.read(self._name(shard))
        try:
            file = pa.parquet.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            sizes = [file.metadata.row_group(number).total_byte_size for number in range(file.metadata.num_row_groups)]
            if file.metadata.num_rows != shard.samples or sum(sizes) > _MAX_ROW_BYTES * shard.samples + (1 << 20):
                raise FormatError(f"{file.metadata.num_rows} rows of {sum(sizes)} bytes, for {shard.samples} samples")
            wanted = [name for name in file.schema_arrow.names if names is None or name in names]
            table = file.read(columns=list(dict.fromkeys((_SHARD, *wanted))), use_threads=False)
            if len(table) and (of := table[_SHARD][0].as_py()) != shard.name:
                raise FormatError(f"it is of {of}")
            return table.select(wanted)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise FormatError(f"{where}: {error}: remove the file, and it is made again") from error

    def _name(self, shard: ShardInfo) -> str:
        return f"{self.folder}{shard.name}.parquet"

    def _missing(self, manifest: Manifest) -> list[ShardInfo]:
        there = set()
        if self.home is not None:
            try:
                there = {entry.name for entry in self.home.list(self.folder)}
            except StorageError:
                pass  # what can't be listed, as over HTTP, can't be written either
        return [shard for shard in manifest.shards if self._name(shard) not in there]

    def _table(self, shard: ShardInfo) -> Any:
        pa = load_pyarrow("reading the fields of samples")
        where = join(self.store.url, shard.name)
        tar, xxh128 = self.shards.read(self.store, shard.name, shard.bytes)
        check_unchanged(shard, tar_bytes=len(tar), xxh128=xxh128, name=where)
        name = index_name(shard.name)
        index = parse_index(self.store.read(name), join(self.store.url, name))
        check_fresh(index, samples=shard.samples, tar_bytes=shard.bytes, xxh128=xxh128, name=join(self.store.url, name))
        scan = scan_tar(tar, where)
        is_ours = self.schema_version != ANY_MEMBERS
        records, texts, codes = [], [], []
        for key, payloads, num_codes in zip(scan.keys, scan.payloads(tar), index.num_codes.tolist(), strict=True):
            record, text = _json_and_text(payloads, f"{where}: {key}", is_ours)
            records.append(record)
            texts.append(_hash(text))
            codes.append(
                _hash(*(data for suffix, data in payloads.items() if suffix.endswith("npy") and (num_codes or not is_ours)))
            )
        own = {
            KEY: pa.array(scan.keys, pa.string()),
            _SHARD: pa.array([shard.name] * len(scan.keys), pa.string()),
            "sample_index": pa.array(range(len(scan.keys)), pa.int32()),
            "bytes": pa.array(index.size.astype("i8")),
            "text_chars": pa.array(index.text_chars.astype("i8")),
            "num_codes": pa.array(index.num_codes.astype("i8")),
            TEXT_HASH: pa.array(texts, pa.binary(16)),
            CODES_HASH: pa.array(codes, pa.binary(16)),
        }
        columns = [(pa.field(name, array.type), array) for name, array in own.items()]
        names = dict.fromkeys(name for record in records for name in record if name not in own and name not in _NO_FIELDS)
        columns += [_column(pa, name, [record.get(name) for record in records]) for name in names]
        return _table_of(pa, columns)


def _folder(manifest: Manifest) -> str:
    return f"{FIELDS}{manifest.fingerprint()[7:23]}/"


def values_of(table: Any, name: str) -> list[Any]:
    """A column as JSON values; None in all rows if there is none."""
    if name not in table.column_names:
        return [None] * len(table)
    values: list[Any] = table[name].to_pylist()
    if _IS_JSON in (table.schema.field(name).metadata or {}):
        return [None if value is None else orjson.loads(value) for value in values]
    return values


def field_of(table: Any, name: str) -> list[Any]:
    """The values of a field, which may lie inside another, as `value_of` finds it; None where a sample lacks it."""
    columns = {column: values_of(table, column) for column in (name.partition(".")[0], name) if column in table.column_names}
    rows = zip(*columns.values(), strict=True) if columns else [()] * len(table)
    return [value_of(dict(zip(columns, row, strict=True)), name) for row in rows]


def as_text(value: Any) -> str:
    """A value as text: equal ones have one, be it a whole number among fractions, or from a CSV; none has "".

    Raises:
        TypeError: it is of no kind that JSON has.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        value = int(value)
    return "" if value is None else value if isinstance(value, str) else orjson.dumps(value).decode()


def join_tables(tables: Sequence[Any]) -> Any:
    """The rows of several tables; a column that is of several kinds in them holds JSON."""
    pa = load_pyarrow("reading the fields of samples")
    if tables and all(table.schema.equals(tables[0].schema, check_metadata=True) for table in tables):
        return pa.concat_tables(tables)
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    return _table_of(pa, [_column(pa, name, [value for table in tables for value in values_of(table, name)]) for name in names])


def _table_of(pa: Any, columns: Sequence[tuple[Any, Any]]) -> Any:
    return pa.table([array for _, array in columns], pa.schema([kind for kind, _ in columns]))


def _column(pa: Any, name: str, values: list[Any]) -> tuple[Any, Any]:
    try:
        array = pa.array(values)
        if not pa.types.is_nested(array.type):
            return pa.field(name, array.type), array
    except (pa.ArrowException, OverflowError):
        pass  # of several kinds, or numbers that no column holds
    texts = [None if value is None else orjson.dumps(value).decode() for value in values]
    return pa.field(name, pa.string(), metadata={_IS_JSON: b"1"}), pa.array(texts, pa.string())


def _json_and_text(payloads: Mapping[str, memoryview], where: str, is_ours: bool) -> tuple[Mapping[str, Any], bytes | memoryview]:
    """A sample's json and its text with turns; of a sample of others its json, if that is an object, and its txt."""
    try:
        record = orjson.loads(payloads.get("json", b"{}"))
        if not is_ours:
            return record if isinstance(record, dict) else {}, payloads.get("txt", b"")
        texts = [record["text"], *(turn["value"] for turn in record.get("conversations") or ())]
        return record, "\x1f".join(texts).encode() if any(texts) else b""
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{where}: its json can't be read ({in_one_line(error)}): `wds-tools verify` says more") from error


def _hash(*parts: bytes | memoryview) -> bytes | None:
    digest = xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.digest() if any(map(len, parts)) else None
