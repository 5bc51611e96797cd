"""Put other texts and fields into the samples of a dataset: what a table says of their keys, or of the value of a field.

    rows of the table, then samples -> sorted on disk by a hash of the value -> each sample beside the first row of its value
        -> sorted on disk by sample -> _work/labels/HASH.json, what the samples of a task get -> json written again, else copied

Invariant: no member but the json changes. Every sample comes through, with a row or without; what found no partner is counted and
named. Cost: two sorts on disk; memory is a bucket of them, then the labels of a task.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from xxhash import xxh3_128_digest

from wds_tools.dataset.external_sort import ExternalSort
from wds_tools.dataset.layout import LABELS, MANIFEST
from wds_tools.dataset.reader import read_manifest, read_stored
from wds_tools.errors import Reject, UsageError
from wds_tools.format.checksum import content_hash
from wds_tools.format.codes import CodeGrid
from wds_tools.format.manifest import Manifest, shard_info_from_json
from wds_tools.format.schema import Sample, validate
from wds_tools.format.shard import encode_members, sample_from_members
from wds_tools.jobs import Advance, Job, JobOptions, Report, TaskWriter, run_job
from wds_tools.records.field_map import parse_pairs
from wds_tools.records.fields import value_of
from wds_tools.select.fields import EXACT, KEY, Fields, as_text, field_of, values_of
from wds_tools.select.select import check_output, of_parents
from wds_tools.sources.composite import Containers
from wds_tools.sources.inputs import expand_inputs
from wds_tools.sources.record import InputFile, group_to_limits
from wds_tools.storage import open_store
from wds_tools.terminal import counted, say

_SAMPLE_BYTES = 40
"""Of a sample in the sort."""
_EXPANSION = 8
"""How many times its bytes a compressed table may become."""
_SAMPLE, _ROW = b"\1", b"\0"


@dataclass(frozen=True, kw_only=True)
class RelabelConfig(JobOptions):
    """Put other texts and fields into the samples of a dataset, from tables."""

    help_group = "texts and fields"

    input: str
    """The dataset: a directory or URL."""
    labels: tuple[str, ...]
    """Tables with the texts and fields: files of any kind that conversions read, folders or patterns."""
    on: str = KEY
    """How rows and samples are matched: by `key`, or by a field; FIELD=COLUMN if the column has another name."""
    texts: tuple[str, ...] = ()
    """NAME=COLUMN: captions to put into the samples' `texts` under this name. The first one that a sample gets also becomes its
    `text`; the previous text stays in `texts`."""
    fields: tuple[str, ...] = ()
    """NAME=COLUMN: further fields of the json, such as scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pairs:
            raise UsageError("--texts NAME=COLUMN, --fields NAME=COLUMN: at least one says what is put into the samples")

    @property
    def pairs(self) -> dict[tuple[str, str], str]:
        """("texts" or "fields", name) of what is put in -> column."""
        texts, fields = parse_pairs("--texts", self.texts, needs_name=True), parse_pairs("--fields", self.fields)
        return {(what, name): column for what, pairs in (("texts", texts), ("fields", fields)) for name, column in pairs}


def relabel(config: RelabelConfig) -> Manifest:
    """Put texts and fields into the samples of a dataset; says on stderr what found no partner.

    Args:
        config: of which dataset, from which tables, and where it goes.

    Returns:
        The manifest of the new dataset; its source has `labels`: rows, samples that got one, and what found no partner.

    Raises:
        UsageError: a row can't be read, or a text is none; no row has a column, or no sample the field; or see run_job.
        MissingPackage: pyarrow is not installed.
    """
    store, output = open_store(config.input), open_store(config.output)
    manifest = read_manifest(store, instead_of_rows="relabel those, and pack them again")
    check_output(config, config.output)
    made = Fields.make(store, manifest, spare=output, workers=config.workers, quiet=config.quiet)
    limits = (config.shard_samples, config.shard_bytes)
    tasks: list[list[Any]] = []
    with tempfile.TemporaryDirectory(prefix="wds-tools-") as folder:
        labels = _Labels(config, manifest, made, Path(folder))
        for group in group_to_limits(manifest.shards, lambda shard: (shard.samples, shard.bytes), limits):
            data = orjson.dumps([next(labels.in_order) for shard in group for _ in range(shard.samples)])
            tasks.append([[asdict(shard) for shard in group], f"{LABELS}{content_hash(data).hexdigest()}.json"])
            if config.overwrite or not output.exists(MANIFEST):  # else it is complete
                output.put(tasks[-1][1], data)
        labels.say()
    job = Job(
        command="relabel",
        settings={"input": manifest.fingerprint(), "on": config.on, "texts": config.texts, "fields": config.fields},
        tasks=tasks,
        total=manifest.samples,
        work=WriteLabels(
            config.input, config.output, tuple(name for what, name in config.pairs if what == "texts"), manifest.layouts
        ),
        **of_parents([config.input], [manifest], labels={"files": list(config.labels), **labels.counts}),
    )
    return run_job(job, config)


class _Labels:
    """The join of a table's rows and a dataset's samples; see the module."""

    def __init__(self, config: RelabelConfig, manifest: Manifest, made: Fields, folder: Path) -> None:
        self.config = config
        self.counts = {"rows": 0, "rows_of_an_earlier_value": 0, "rows_without_sample": 0, "samples": 0, "samples_without_row": 0}
        field, _, column = config.on.partition("=")
        self.lost: dict[str, str] = {}
        source = Containers(2000, 10_000, 256 << 20, config.quiet, (column or field, *config.pairs.values()))
        files = expand_inputs(config.labels, source.choose).files
        size = _EXPANSION * sum(file.size for file in files) + manifest.samples * _SAMPLE_BYTES
        by_value, by_number = (ExternalSort(folder / name, size) for name in ("value", "number"))
        for value, row in self._rows(source, files, column or field):
            if not value:
                self._count("rows_without_sample", "one without a value")
                continue
            by_value.add_hashed(xxh3_128_digest(value.encode()), _ROW + row)
        known = set()
        for shard in manifest.shards:
            table = made.read(shard, sorted({KEY, field, field.partition(".")[0]}))
            known.update(table.column_names)
            for key, value in zip(values_of(table, KEY), field_of(table, field), strict=True):
                record = _SAMPLE + self.counts["samples"].to_bytes(8, "big") + key.encode()
                by_value.add_hashed(xxh3_128_digest(as_text(value).encode()), record)
                self.counts["samples"] += 1
        if self.counts["samples"] and known.isdisjoint((field, field.partition(".")[0])):
            raise UsageError(f"--on {config.on}: {config.input} has no field {field} in the json of its samples")
        scale = (1 << 64) // max(self.counts["samples"], 1)
        for number, label in self._matches(by_value):
            by_number.add(number * scale, label)
        if self.counts["samples"] == self.counts["samples_without_row"] and self.lost:
            raise UsageError(
                f"--with, --on {config.on}: none of {counted(self.counts['rows'], 'row')} is of any sample: the rows have "
                f"{self.lost.get('rows_without_sample')}, the samples {self.lost.get('samples_without_row')} and the like"
            )
        self.in_order = (orjson.loads(row) for _, row in by_number.drain())

    def say(self) -> None:
        """What found no partner."""
        found, samples = self.counts["samples"] - self.counts["samples_without_row"], self.counts["samples"]
        parts = [f"{found:,} of {samples:,} samples ({found / max(samples, 1):.1%}) get a row of {self.counts['rows']:,}"]
        parts += [f"{what.replace('_', ' ')}: {self.counts[what]:,}, such as {value}" for what, value in self.lost.items()]
        say(f"wds-tools: {'; '.join(parts)}", error=True)

    def _count(self, what: str, value: str) -> None:
        self.counts[what] += 1
        self.lost.setdefault(what, value)

    def _rows(self, source: Containers, files: Sequence[InputFile], column: str) -> Iterator[tuple[str, bytes]]:
        """Value of each row, and JSON of [value, labels]."""
        pairs = self.config.pairs
        unseen = {column, *pairs.values()}
        for record in (record for task in source.plan(files)[0] for record in source.read(task)):
            where = f"{record.source}, {'record' if record.line is None else 'line'} {record.line or record.element or 0}"
            if isinstance(record.fields, Reject):
                raise UsageError(f"--with {where}: {record.fields}: mend it, or take it out")
            self.counts["rows"] += 1
            columns = (column, *pairs.values())
            row = {name: value for name in columns if (value := value_of(record.fields, name)) is not None}
            unseen -= row.keys()
            if isinstance(found := row.get(column), float) and abs(found) >= EXACT:
                raise UsageError(f"--with {where}: {column} is {found:g}, and numbers of that size are not exact: write texts")
            label: dict[str, Any] = {}
            for (what, name), taken in pairs.items():
                if taken not in row or _is_blank(row[taken]):
                    continue
                if what == "texts" and not isinstance(row[taken], str):
                    raise UsageError(f"--with {where}: {taken} is a {type(row[taken]).__name__}, expected a text")
                label[f"{what}.{name}"] = row[taken]
            try:
                value = as_text(row.get(column))
                line = orjson.dumps([value, label])
            except TypeError as error:
                raise UsageError(f"--with {where}: a value can't be written as JSON ({error})") from error
            yield value, line
        if unseen and self.counts["rows"]:
            raise UsageError(f"--with: none of the {self.counts['rows']:,} rows has the column {min(unseen)}")

    def _matches(self, by_value: ExternalSort) -> Iterator[tuple[int, bytes]]:
        """Number and label of each sample; null where there is none."""
        for records in by_value.by_hash():
            rows = [orjson.loads(record[1:]) for record in records if record[:1] == _ROW]
            samples = [record[1:] for record in records if record[:1] == _SAMPLE]
            label = orjson.dumps(rows[0][1] if rows else None)
            for what, lost in (("rows_of_an_earlier_value", rows[1:]), ("rows_without_sample", rows[:1] if not samples else [])):
                for value, _ in lost:
                    self._count(what, value)
            for sample in samples:
                if not rows:
                    self._count("samples_without_row", sample[8:].decode())
                yield int.from_bytes(sample[:8], "big"), label


def _is_blank(value: Any) -> bool:
    """Whether a value of a table says nothing: white space, or NaN."""
    return not value or value.isspace() if isinstance(value, str) else value != value


@dataclass(frozen=True)
class WriteLabels:
    """The work on a run of shards."""

    url: str
    output: str
    names: tuple[str, ...]
    """Of the texts."""
    layouts: Mapping[str, CodeGrid]
    """Of the dataset's code columns."""

    def __call__(self, task: Sequence[Any], writer: TaskWriter, report: Report) -> int:
        """Write the samples with their labels; returns how many there were."""
        shards, name = task
        labels: list[Any] = orjson.loads(open_store(self.output).read(name))
        store = open_store(self.url)
        shards = map(shard_info_from_json, shards)
        for stored, label in zip((stored for shard in shards for stored in read_stored(store, shard)), labels, strict=True):
            sample = self._labelled(sample_from_members(stored.key, stored.payloads), label or {})
            validate(sample, self.layouts)
            payloads: dict[str, bytes | memoryview] = {**stored.payloads, "json": encode_members(sample)[0][1]}
            writer.add_members(stored.key, payloads.items(), sample)
            report(Advance(units=1))
        return len(labels)

    def _labelled(self, sample: Sample, label: Mapping[str, Any]) -> Sample:
        new = {name: label.get(f"texts.{name}") for name in self.names}
        fields = {name.removeprefix("fields."): value for name, value in label.items() if name.startswith("fields.")}
        sample = sample._replace(provenance={**sample.provenance, **fields})
        if not new:
            return sample
        before = {"text": sample.text} if sample.texts is None else sample.texts
        texts = {**before, **{name: before.get(name) if text is None else text for name, text in new.items()}}
        return sample._replace(texts=texts, text=next(filter(None, new.values()), sample.text))
