"""Datasets -> one globally shuffled Hugging Face dataset of Liquid's seven columns, in constant memory.

    samples of all inputs -> rows (`rows`) -> external shuffle (`shuffle`) -> equal files (`output`)

`arrow` is what `datasets.load_from_disk` loads, `parquet` what `load_dataset` and pandas do. The same inputs and seed give the
same bytes, and every sample is in exactly once.
Cost: two passes, and about 300 MB of memory a worker; temporary files of about 2 bytes a code plus the text. Above 8 GiB of
these, the files are made in rounds, up to four, each of which reads the input again and keeps the rows of its own files only.
They lie in OUTPUT/.tmp if the output is a folder here, so that the next run clears what a killed one left, else in Python's
temporary folder (TMPDIR).
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wds_tools.dataset.external_sort import ExternalSort, bucket_of, count_buckets
from wds_tools.dataset.reader import parse_stored, read_stored
from wds_tools.errors import FormatError, UsageError
from wds_tools.export.card import LIQUID_TYPES
from wds_tools.export.options import ExportConfig, ExportSummary
from wds_tools.export.output import Round, Source, Table, counted, local_path, open_sources, write_export
from wds_tools.export.rows import ROW_BYTES, TYPED_INSTEAD, liquid_columns, liquid_schema, serialize_table_row
from wds_tools.export.shuffle import SortedRows, bucket_ends, keys_from
from wds_tools.format.codes import CODE_COLUMNS, chosen_codes, codes_named, is_code_column
from wds_tools.format.manifest import check_one_tokenizer
from wds_tools.format.schema import IMAGE_EXTENSIONS, PAIR_TYPES, Sample
from wds_tools.format.shards import ShardInfo
from wds_tools.run.local import Report, run_tasks
from wds_tools.run.progress import Progress
from wds_tools.sources.arrow import load_pyarrow
from wds_tools.storage import Store
from wds_tools.storage.base import TEMP_FOLDER, split_scheme
from wds_tools.storage.local import translate

ROUND_BYTES = 8 << 30
"""Of rows on the disk: with more, the files are made in rounds ..."""
MOST_ROUNDS = 4
"""... of which there are more only where their rows would take more than half of what is free."""


def export_hf(config: ExportConfig) -> ExportSummary:
    """Export to Liquid's seven columns, shuffled.

    Args:
        config: what is exported, and where it goes.

    Returns:
        What was written, once it is complete.

    Raises:
        UsageError: the output is in the way, or another run is writing there; inputs are empty, not encoded, or hold what these
            columns can't.
        StorageError: another run has taken this one for dead.
        NotFound, FormatError, StorageError: an input can't be read.
        MissingPackage: pyarrow is not installed.
    """
    pa = load_pyarrow("exporting")
    sources = open_sources(config)
    _check_sources(sources, config)
    held = sum((Counter(manifest.data_types) for _, manifest in sources), Counter[str]())
    data_types = {name: held[name] for name in sorted(held) if _takes(config, name)}
    left_out = {name: held[name] for name in sorted(held) if name not in data_types}
    if not sum(data_types.values()):
        raise UsageError(f"{', '.join(config.input)}: of {dict(held)} samples, none can be exported for {config.reader}")
    made_of = ["wds-tools export 1", config.seed, *(manifest.fingerprint() for _, manifest in sources)]
    made_of += [config.code_set] if config.code_set else []
    made_of += [] if config.reader == "any" else [{"for": config.reader}]
    passed_over: Counter[str] = Counter()
    rounds = partial(_shuffled, sources, config, passed_over)
    table = Table(liquid_schema(pa), liquid_columns, len, rounds, config.seed, data_types, left_out, passed_over)
    return write_export(config, sources, table, made_of)


def _takes(config: ExportConfig, data_type: str) -> bool:
    return config.reader == "any" or data_type in LIQUID_TYPES


@contextmanager
def _shuffled(
    sources: Sequence[Source], config: ExportConfig, passed_over: Counter[str], bounds: Sequence[int]
) -> Iterator[Iterator[Round]]:
    """The files in rounds, each of those whose rows are on the disk; counts samples that have what no column takes."""
    with _scratch_folder(config.output) as folder:
        yield _rounds(sources, config, passed_over, bounds, folder)


def _rounds(
    sources: Sequence[Source], config: ExportConfig, passed_over: Counter[str], bounds: Sequence[int], folder: Path
) -> Iterator[Round]:
    size = sum(_record_bytes(row) for _, manifest in sources for row in manifest.shards)
    groups = _groups(sources, config, 1 if config.workers == 1 else 2 * config.workers)
    ends = bucket_ends(config.seed, bounds[-1], count_buckets(size))
    num_files, free = len(bounds) - 1, shutil.disk_usage(folder).free
    num_rounds = min(max(min(-(-size // ROUND_BYTES), MOST_ROUNDS), -(-2 * size // max(free, 1)), 1), num_files)
    for number in range(num_rounds):
        files = range(number * num_files // num_rounds, (number + 1) * num_files // num_rounds)
        low, high = bounds[files.start], bounds[files.stop]
        which = f", round {number + 1} of {num_rounds}" if num_rounds > 1 else ""
        folders = [folder / f"{number}-{group}" for group in range(len(groups))]
        rows = SortedRows(folders, ends, low, high)
        scatter = _Scatter(config, [(store, manifest.codes) for store, manifest in sources], size, rows.buckets, rows.is_shared)
        with Progress(f"export, 1 of 2: reading{which}", bounds[-1], quiet=config.quiet) as progress:
            tasks = list(zip(folders, groups, strict=True))
            with closing(run_tasks(scatter, tasks, workers=config.workers, on_report=progress)) as done:
                for passed in done:
                    passed_over.update(passed)
        with Progress(f"export, 2 of 2: writing{which}", high - low, quiet=config.quiet) as progress:
            yield Round(files, rows, progress)
        for path in folders:
            shutil.rmtree(path)


def _check_sources(sources: Sequence[Source], config: ExportConfig) -> None:
    """Refuse at once what the manifests show to be impossible."""
    code_set = config.code_set
    for store, manifest in sources:
        for row in manifest.shards:
            if not any(_takes(config, data_type) for data_type in row.data_types):
                continue
            if "interleaved" in row.data_types and _takes(config, "interleaved"):
                raise UsageError(f"{store.url}/{row.name} holds interleaved documents, for which no column is: {TYPED_INSTEAD}")
            has_codes = any(map(is_code_column, row.members))
            has_images = any(member in IMAGE_EXTENSIONS for member in row.members)
            if not has_codes and (has_images or not {"image_text", "image_text_multi"}.isdisjoint(row.data_types)):
                raise UsageError(f"{store.url}/{row.name} holds images without codes: run `wds-tools encode` first")
        columns = manifest.code_columns
        chosen = codes_named(dict.fromkeys(columns), code_set)
        others = sorted(chosen.keys() - {*CODE_COLUMNS})
        if columns and (not chosen or (not code_set and len(others) == len(chosen))):
            wanted = f"codes named {code_set!r}" if code_set else f"codes without a name ({' or '.join(CODE_COLUMNS)})"
            raise UsageError(f"{store.url} has no {wanted}, but {', '.join(columns)}: choose with --code-set; {TYPED_INSTEAD}")
        if others:
            raise UsageError(
                f"{store.url}: Liquid's seven columns have a place for {' and '.join(CODE_COLUMNS)} only, and none for "
                f"{', '.join(others)}: --code-set vqcode_512 takes one column of several; {TYPED_INSTEAD}"
            )
        for column, layout in codes_named(manifest.layouts, code_set).items():
            if layout.schema_version > 1:
                raise UsageError(f"{store.url}: {column} has {layout}, and Liquid's columns have a place for (h, w) codes only")
    check_one_tokenizer((store.url, one, chosen_codes(dict.fromkeys(one.code_columns), code_set)) for store, one in sources)


@contextmanager
def _scratch_folder(output: str) -> Iterator[Path]:
    """A folder for the shuffle, on the disk of a local output; gone afterwards, whatever happens."""
    is_local = split_scheme(output)[0] in ("", "file")
    parent = Path(local_path(output)).absolute() / TEMP_FOLDER if is_local else None
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        holder = tempfile.TemporaryDirectory(prefix="wds-tools-export-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise translate(error, "make a temporary folder", str(parent or "TMPDIR")) from error
    try:
        with holder as folder:
            yield Path(folder)
    finally:
        if parent is not None:
            with suppress(OSError):
                parent.rmdir()


def _record_bytes(row: ShardInfo) -> int:
    """What the rows of a shard come to in the shuffle, at most: the tar is larger, and so are 4 bytes a character and code,
    unless the text becomes JSON."""
    if "visual_sft" in row.data_types:
        return row.bytes
    return min(row.bytes, 4 * (row.text_chars + row.num_codes) + (ROW_BYTES + 16) * row.samples)


_Shard = tuple[int, ShardInfo, int, int]
"""Number of its source, the shard, the number of its first row and how many it has."""


def _groups(sources: Sequence[Source], config: ExportConfig, most: int) -> list[list[_Shard]]:
    """All shards in order, as so many groups of about equal size at most."""
    total = sum(row.bytes for _, manifest in sources for row in manifest.shards) + 1
    groups: dict[int, list[_Shard]] = {}
    first = begin = 0
    for source, (_, manifest) in enumerate(sources):
        for row in manifest.shards:
            num_rows = sum(count for data_type, count in row.data_types.items() if _takes(config, data_type))
            groups.setdefault(begin * most // total, []).append((source, row, first, num_rows))
            first, begin = first + num_rows, begin + row.bytes
    return list(groups.values())


@dataclass(frozen=True)
class _Scatter:
    """Reads shards, and puts what a round writes into the buckets of a folder; picklable."""

    config: ExportConfig
    sources: Sequence[tuple[Store, Mapping[str, Any]]]
    """Each with the provenance of its codes."""
    size: int
    """Bytes of all rows, about."""
    buckets: range
    """Of the round."""
    is_shared: bool
    """Whether the round before has the first of them too."""

    def __call__(self, task: tuple[Path, Sequence[_Shard]], report: Report) -> Counter[str]:
        """What samples have for which there is no column."""
        folder, shards = task
        sort, passed_over = ExternalSort(folder, self.size), Counter[str]()
        for source, row, first, num_rows in shards:
            store, made = self.sources[source]
            keys = keys_from(self.config.seed, first, num_rows)
            bucket = bucket_of(keys, count_buckets(self.size)) - self.buckets.start
            coming, num_taken = zip(keys.tolist(), bucket.tolist(), strict=True), 0
            for stored in counted(read_stored(store, row), report):
                sample = parse_stored(store, row, stored) if num_rows < row.samples else None
                if sample is not None and not _takes(self.config, sample.data_type):
                    continue
                key, place = next(coming, (0, -1))
                num_taken += 1
                if 0 <= place < len(self.buckets):
                    sample = sample or parse_stored(store, row, stored)
                    num_taken -= not _takes(self.config, sample.data_type)
                    record, passed = self._row(sample, made)
                    sort.add(key, record)
                    passed_over.update(passed if place or not self.is_shared else ())
            if num_taken != num_rows:
                raise FormatError(
                    f"{store.url}/{row.name}: {num_taken} samples of the data types to export, the manifest says {num_rows}: "
                    "it was edited or damaged"
                )
        sort.flush()
        return passed_over

    def _row(self, sample: Sample, made: Mapping[str, Any]) -> tuple[bytes, list[str]]:
        """The record of a sample, and what is not in it."""
        code_set = self.config.code_set
        chosen = sample.with_codes(list(chosen_codes(sample.codes, code_set)), made)
        wide = codes_named({column: column for column in chosen.codes}, code_set).get(CODE_COLUMNS[1])
        if wide and chosen.data_type == PAIR_TYPES[0] and isinstance(stride := made.get(wide, {}).get("stride"), int):
            height, width = (side * stride for side in chosen.codes[wide].shape)  # a sample has those of its first column
            chosen = chosen._replace(width=width, height=height)
        grids = None if chosen.grids is None else codes_named(chosen.grids, code_set)
        passed = [name for name in ("texts", "image", "provenance") if getattr(sample, name)]
        passed += sample.codes.keys() - chosen.codes.keys()
        return serialize_table_row(chosen._replace(codes=codes_named(chosen.codes, code_set), grids=grids)), passed
