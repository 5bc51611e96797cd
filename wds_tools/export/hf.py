"""Datasets -> one globally shuffled Hugging Face dataset of Liquid's seven columns, in constant memory.

    samples of all inputs -> rows (`rows`) -> external shuffle (`shuffle`) -> equal files (`output`)

`arrow` is what `datasets.load_from_disk` loads, `parquet` what `load_dataset` and pandas do. The same inputs and seed give the
same bytes, and every sample is in exactly once.
Cost: two passes, one core; about 300 MB of memory; temporary files of about 2 bytes a code plus the text, which shrink as the
output grows. They lie in OUTPUT/.tmp if the output is a folder here, so that the next run clears what a killed one left, else in
Python's temporary folder (TMPDIR).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from wds_tools.dataset.external_sort import ExternalSort
from wds_tools.dataset.reader import read_shard
from wds_tools.errors import UsageError
from wds_tools.export.card import LIQUID_TYPES
from wds_tools.export.options import ExportConfig, ExportSummary
from wds_tools.export.output import Source, Table, counted, local_path, open_sources, write_export
from wds_tools.export.rows import ROW_BYTES, TYPED_INSTEAD, liquid_columns, liquid_schema, serialize_table_row
from wds_tools.export.shuffle import random_keys
from wds_tools.format.codes import CODE_COLUMNS, chosen_codes, codes_named, is_code_column
from wds_tools.format.manifest import check_one_tokenizer
from wds_tools.format.schema import IMAGE_EXTENSIONS
from wds_tools.format.shards import ShardInfo
from wds_tools.run.progress import Progress
from wds_tools.sources.arrow import load_pyarrow
from wds_tools.storage.base import TEMP_FOLDER, split_scheme
from wds_tools.storage.local import translate


def export_hf(config: ExportConfig) -> ExportSummary:
    """Export to Liquid's seven columns, shuffled; returns what was written once it is complete.

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
    records = partial(_shuffled, sources, config, sum(data_types.values()), passed_over)
    table = Table(liquid_schema(pa), liquid_columns, len, records, config.seed, data_types, left_out, passed_over)
    return write_export(config, sources, table, made_of)


def _takes(config: ExportConfig, data_type: str) -> bool:
    return config.reader == "any" or data_type in LIQUID_TYPES


@contextmanager
def _shuffled(sources: Sequence[Source], config: ExportConfig, rows: int, passed_over: Counter[str]) -> Iterator[Iterator[bytes]]:
    """Records of the samples in their random order; counts samples that have what no column takes."""
    with _scratch_folder(config.output) as folder:
        size = sum(_record_bytes(row) for _, manifest in sources for row in manifest.shards)
        shuffle = ExternalSort(folder / "rows", size)
        with Progress("export, 1 of 2: reading", rows, quiet=config.quiet) as progress:
            _scatter(sources, config, shuffle, progress, passed_over)
        with Progress("export, 2 of 2: writing", rows, quiet=config.quiet) as progress:
            yield counted((record for _, record in shuffle.drain()), progress)


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


def _scatter(
    sources: Sequence[Source], config: ExportConfig, shuffle: ExternalSort, progress: Progress, passed_over: Counter[str]
) -> None:
    code_set, keys = config.code_set, random_keys(config.seed)
    for store, manifest in sources:
        for row in manifest.shards:
            for sample in counted(read_shard(store, row), progress):
                if not _takes(config, sample.data_type):
                    continue
                chosen = sample.with_codes(list(chosen_codes(sample.codes, code_set)), manifest.codes)
                grids = None if chosen.grids is None else codes_named(chosen.grids, code_set)
                passed_over.update(name for name in ("texts", "image", "provenance") if getattr(sample, name))
                passed_over.update(sample.codes.keys() - chosen.codes.keys())
                record = serialize_table_row(chosen._replace(codes=codes_named(chosen.codes, code_set), grids=grids))
                shuffle.add(next(keys), record)
