"""Datasets -> one globally shuffled Hugging Face dataset of Liquid's columns, or a typed one in order, in constant memory.

    Lease -> samples of all inputs -> rows (`rows`) -> external shuffle (`shuffle`) -> equal files -> state.json -> export.json
                                   -> all columns (`typed`), in order ───────────────┘         [-> the Hub (`push`)]

`arrow` is what `datasets.load_from_disk` loads, `parquet` what `load_dataset` and pandas do. The same inputs and seed give the
same bytes, and every sample is in exactly once.
Invariant: an unfinished export can't be read as a finished one. Of `arrow`, state.json is written last; of `parquet`, the last
file is begun as a line of text that no reader takes for Parquet. By the dataset card beside them (`card`), --resume knows them,
and by export.json, which is written last of all, whether its files are still those that were written.
Cost: two passes, one core; about 300 MB of memory; temporary files of about 2 bytes a code plus the text, which shrink as the
output grows. They lie in OUTPUT/.tmp if the output is a folder here, so that the next run clears what a killed one left, else in
Python's temporary folder (TMPDIR).
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import orjson

from wds_tools.dataset.external_sort import ExternalSort
from wds_tools.dataset.files import Written, describe_changed, find_changed, written
from wds_tools.dataset.lease import Lease, files_of
from wds_tools.dataset.reader import read_manifest, read_shard
from wds_tools.errors import FormatError, UsageError
from wds_tools.export.card import LIQUID_TYPES, TAG, serialize_card
from wds_tools.export.card import NAME as CARD
from wds_tools.export.push import push
from wds_tools.export.rows import (
    FEATURES,
    ROW_BYTES,
    TYPED_INSTEAD,
    Columns,
    Format,
    liquid_columns,
    liquid_schema,
    serialize_table_row,
    write_part,
)
from wds_tools.export.shuffle import random_keys
from wds_tools.export.typed import size_of, typed_columns, typed_schema
from wds_tools.format.codes import CODE_COLUMNS, chosen_codes, codes_named, is_code_column
from wds_tools.format.manifest import Manifest, ShardInfo, check_one_tokenizer
from wds_tools.format.schema import IMAGE_EXTENSIONS, Sample
from wds_tools.format.typed_json import read_json
from wds_tools.run.progress import Advance, Progress
from wds_tools.sources.arrow import load_pyarrow
from wds_tools.storage import LocalStore, Store, open_store
from wds_tools.storage.base import TEMP_FOLDER, split_scheme
from wds_tools.storage.local import translate
from wds_tools.storage.place import check_apart
from wds_tools.terminal import say

STATE, INFO = "state.json", "dataset_info.json"
FILES = "export.json"
"""Sizes and hashes of the other files, but for the card: the export is finished, and this is what it wrote."""
_OURS = re.compile(rf"data-\d{{5}}-of-\d{{5}}\.arrow|{STATE}|{INFO}|{FILES}|{CARD}|data/train-\d{{5}}-of-\d{{5}}\.parquet")
_NUM_BYTES = re.compile(rb'"num_bytes":(\d+)')
_UNFINISHED = b"This export is not finished: run the same command again with --overwrite.\n"
_REPORT_EVERY = 256
_MAX_FILES = 99_999

_Source = tuple[Store, Manifest]
_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What any export is told."""

    input: tuple[str, ...]
    """One or more datasets: folders or URLs. One that is named twice is in twice."""
    output: str
    """Where the result goes: a directory or an object-store prefix, empty or absent."""
    num_shards: int = 256
    """Files to write; as many as there are samples, if those are fewer."""
    license: str | None = None
    """Of the rows, for the dataset card, as the Hub names it: cc-by-4.0, apache-2.0, other ..."""
    push_to_hub: str | None = None
    """Upload the finished export, of Parquet files in a folder here, to this dataset repository of the Hugging Face Hub
    (OWNER/NAME), made if need be. The token is that of Hugging Face's own tools: HF_TOKEN, or `hf auth login`."""
    private: bool = False
    """With --push-to-hub: make the repository a private one."""
    resume: bool = False
    """Go on after an interruption: a finished export of the same command is kept, an unfinished one begun again, and the Hub gets
    the files that it does not have yet."""
    verify: bool = False
    """With --resume: compare the hashes of a finished export's files too, which reads them; without, their sizes."""
    overwrite: bool = False
    """Remove the export that is at the output first, finished or not. Files of any other kind are never removed."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        if not self.input:
            raise UsageError("--input: name at least one dataset")
        if not 1 <= self.num_shards <= _MAX_FILES:
            raise UsageError(f"--num-shards {self.num_shards}: expected 1 to {_MAX_FILES}")
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite exclude each other: keep what is there, or remove it")
        if self.verify and not self.resume:
            raise UsageError("--verify is for --resume: it looks at what an earlier run finished")
        check_apart(self.input, self.output)
        if self.push_to_hub is None and self.private:
            raise UsageError("--private is for the repository of --push-to-hub")
        if self.push_to_hub is not None and (self.writes != "parquet" or not isinstance(open_store(self.output), LocalStore)):
            raise UsageError("--push-to-hub uploads Parquet files from a folder here: --format parquet, and a local --output")
        if self.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise UsageError(f"--push-to-hub {self.push_to_hub!r}: expected OWNER/NAME")

    @property
    def writes(self) -> Format:
        """What kind of files."""
        return "parquet"


@dataclass(frozen=True, kw_only=True)
class ParquetConfig(ExportOptions):
    """Write datasets as typed Parquet with everything that they hold, in their order; `convert coded` takes it back."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ExportOptions):
    """Shuffle datasets together and write them as a Hugging Face dataset of Liquid's seven columns."""

    format: Format = "arrow"
    """arrow: for datasets.load_from_disk. parquet: for load_dataset("parquet", ...), pandas and the hub."""
    code_set: str = ""
    """Code set to export, where datasets have several (see `wds-tools encode --code-set`), or the column."""
    seed: int = 42
    """Of the shuffle: 0 to 2**64 - 1. The order depends on it and on the inputs, not on format or num_shards."""
    reader: Literal["any", "liquid"] = "any"
    """liquid: leave out and count what Liquid's own trainer takes for plain text: image_text_multi, visual_sft."""

    def __post_init__(self) -> None:
        if self.format not in _NAMES:
            raise UsageError(f"--format {self.format!r}: expected {' or '.join(_NAMES)}")
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"--seed {self.seed}: expected 0 to 2**64 - 1")
        super().__post_init__()

    @property
    def writes(self) -> Format:
        """What kind of files."""
        return self.format


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export wrote."""

    rows: int
    files: int
    """Arrow or Parquet files, all of about the same number of rows, none empty."""
    data_types: Mapping[str, int]
    """Rows by data type."""
    left_out: Mapping[str, int]
    """Samples by data type that the reader would take for something else."""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    """Samples that have something for which there is no column: texts, image, provenance, or a column of other codes. Counted
    while they are read, so empty where a finished export was kept."""
    pushed: int | None = None
    """Files sent to the Hub, if that was asked for; those that it had are not sent."""


_NAMES: Mapping[Format, str] = {
    "arrow": "data-{:05d}-of-{:05d}.arrow",
    "parquet": "data/train-{:05d}-of-{:05d}.parquet",
}


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
    sources = _open(config)
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
    form = _Form(liquid_schema(pa), liquid_columns, len, records, config.seed, data_types, left_out, passed_over)
    return _export(config, sources, form, made_of)


def export_parquet(config: ParquetConfig) -> ExportSummary:
    """Export everything, in order; returns what was written once it is complete. Raises as export_hf."""
    pa = load_pyarrow("exporting")
    sources = _open(config)
    check_one_tokenizer((store.url, manifest, manifest.code_columns) for store, manifest in sources)
    data_types = dict(sorted(sum((Counter(manifest.data_types) for _, manifest in sources), Counter[str]()).items()))
    made_of = ["wds-tools export parquet 1", *(manifest.fingerprint() for _, manifest in sources)]
    schema = typed_schema(pa, [manifest for _, manifest in sources])
    records = partial(_in_order, sources, config, sum(data_types.values()))
    return _export(config, sources, _Form(schema, typed_columns, size_of, records, None, data_types), made_of)


def _open(config: ExportOptions) -> list[_Source]:
    sources = [(store, read_manifest(store, instead_of_rows="export those datasets")) for store in map(open_store, config.input)]
    if not any(manifest.samples for _, manifest in sources):
        raise UsageError(f"{', '.join(config.input)}: no samples, nothing to export")
    return sources


@dataclass(frozen=True)
class _Form:
    """What is written of datasets; see rows.write_part."""

    schema: Any
    columns: Columns
    size: Callable[[Any], int]
    records: Callable[[], AbstractContextManager[Iterator[Any]]]
    seed: int | None
    """Of the shuffle; None: there is none."""
    data_types: Mapping[str, int]
    """See ExportSummary, as the next two."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)


def _export(config: ExportOptions, sources: Sequence[_Source], form: _Form, made_of: Sequence[Any]) -> ExportSummary:
    rows = sum(form.data_types.values())
    num_files = min(config.num_shards, rows)
    names = [_NAMES[config.writes].format(number, num_files) for number in range(num_files)]
    fingerprint = hashlib.sha256(orjson.dumps(made_of)).hexdigest()[:16]  # what Hugging Face's caches know the rows by
    page = partial(
        serialize_card,
        [manifest for _, manifest in sources],
        config.writes,
        data_types=form.data_types,
        left_out=form.left_out,
        files=len(names),
        seed=form.seed,
        columns={column.name: str(column.type) for column in form.schema},
        fingerprint=fingerprint,
        license_id=config.license,
    )
    store = open_store(config.output)
    is_complete = config.resume and _is_complete(store, config, page, names)
    if not is_complete:
        _look(store, config)
    pushed = None
    if not is_complete or config.push_to_hub is not None:
        with Lease(store) as lease:
            if not is_complete:
                _begin(store, config, page(), names[-1])
                with form.records() as records:
                    files = _write_parts(store, names, rows, records, config.writes, form, page, lease)
                lease.check()
                if config.writes == "arrow":
                    files[STATE] = _write_state(store, names, fingerprint)
                store.put(FILES, orjson.dumps(files, option=orjson.OPT_INDENT_2))
            if config.push_to_hub is not None:
                pushed = push(Path(_local_path(config.output)), config.push_to_hub, private=config.private, quiet=config.quiet)
    kinds, passed = {"data_types": form.data_types, "left_out": form.left_out}, dict(sorted(form.passed_over.items()))
    return ExportSummary(rows=rows, files=len(names), **kinds, passed_over=passed, pushed=pushed)


def _takes(config: ExportConfig, data_type: str) -> bool:
    return config.reader == "any" or data_type in LIQUID_TYPES


@contextmanager
def _shuffled(
    sources: Sequence[_Source], config: ExportConfig, rows: int, passed_over: Counter[str]
) -> Iterator[Iterator[bytes]]:
    """Records of the samples in their random order; counts samples that have what no column takes."""
    with _scratch_folder(config.output) as folder:
        size = sum(_record_bytes(row) for _, manifest in sources for row in manifest.shards)
        shuffle = ExternalSort(folder / "rows", size)
        with Progress("export, 1 of 2: reading", rows, quiet=config.quiet) as progress:
            _scatter(sources, config, shuffle, progress, passed_over)
        with Progress("export, 2 of 2: writing", rows, quiet=config.quiet) as progress:
            yield _counted((record for _, record in shuffle.drain()), progress)


@contextmanager
def _in_order(sources: Sequence[_Source], config: ExportOptions, rows: int) -> Iterator[Iterator[Sample]]:
    """The samples."""
    with Progress("export", rows, quiet=config.quiet) as progress:
        shards = (read_shard(store, row) for store, manifest in sources for row in manifest.shards)
        yield _counted(chain.from_iterable(shards), progress)


def _check_sources(sources: Sequence[_Source], config: ExportConfig) -> None:
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


def _is_complete(store: Store, config: ExportOptions, page: Callable[..., bytes], names: Sequence[str]) -> bool:
    """Whether this very export lies there, finished, and its files are those that were written; if not, says so in a line.

    Raises:
        UsageError: another one does, finished or not.
    """
    card, is_finished = bytes(store.read(CARD)) if store.exists(CARD) else b"", store.exists(FILES)
    known = _NUM_BYTES.search(card)
    if (card or is_finished) and card != page(num_bytes=int(known[1]) if known else None):
        raise UsageError(f"{store.url} holds another export, or one of other data: choose another output, or pass --overwrite")
    if not is_finished:
        return False
    try:
        files = read_json(dict[str, Written], store.read(FILES), FILES)
        changed = find_changed(store, dict.fromkeys(names, Written(None)) | files, verify=config.verify, quiet=config.quiet)
    except FormatError:
        changed = {FILES: "is not what an export writes"}
    if changed:
        say(f"wds-tools: {describe_changed(store, changed)}; the export is made again", error=True)
    return not changed


def _look(store: Store, config: ExportOptions) -> list[str]:
    """The files of an earlier export that are there.

    Raises:
        UsageError: they, or others, are in the way.
    """
    found = files_of(store)
    foreign = [name for name in found if not _OURS.fullmatch(name)]
    if CARD in found and TAG.encode() not in store.read(CARD):
        foreign.append(CARD)
    if foreign:
        raise UsageError(
            f"{store.url} holds {len(foreign)} files that no export writes, such as {foreign[0]}: choose another output"
        )
    if found and not (config.overwrite or config.resume):
        raise UsageError(
            f"{store.url} holds an export already, finished or not: choose another output, or pass --overwrite, or --resume to "
            "go on with the same"
        )
    return found


def _begin(store: Store, config: ExportOptions, page: bytes, last_part: str) -> None:
    """Make the output unfinished: clear an earlier export, write what says that this one is under way. Under a Lease."""
    found = _look(store, config)
    store.clean_temp()
    store.delete(FILES)
    store.delete(STATE)
    if config.writes == "arrow":
        first = INFO
        info = {"citation": "", "description": "", "features": FEATURES, "homepage": "", "license": ""}
        store.put(first, json.dumps(info, indent=2).encode())
    else:
        first = last_part
        store.put(first, _UNFINISHED)
    store.put(CARD, page)
    for name in found:
        if name not in (first, CARD):
            store.delete(name)


@contextmanager
def _scratch_folder(output: str) -> Iterator[Path]:
    """A folder for the shuffle, on the disk of a local output; gone afterwards, whatever happens."""
    is_local = split_scheme(output)[0] in ("", "file")
    parent = Path(_local_path(output)).absolute() / TEMP_FOLDER if is_local else None
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


def _local_path(url: str) -> str:
    """The path of a folder that is given as one, or as file://."""
    return unquote(urlsplit(url).path) if split_scheme(url)[0] == "file" else url


def _record_bytes(row: ShardInfo) -> int:
    """What the rows of a shard come to in the shuffle, at most: the tar is larger, and so are 4 bytes a character and code,
    unless the text becomes JSON."""
    if "visual_sft" in row.data_types:
        return row.bytes
    return min(row.bytes, 4 * (row.text_chars + row.num_codes) + (ROW_BYTES + 16) * row.samples)


def _scatter(
    sources: Sequence[_Source], config: ExportConfig, shuffle: ExternalSort, progress: Progress, passed_over: Counter[str]
) -> None:
    code_set, keys = config.code_set, random_keys(config.seed)
    for store, manifest in sources:
        for row in manifest.shards:
            for sample in _counted(read_shard(store, row), progress):
                if not _takes(config, sample.data_type):
                    continue
                chosen = sample.with_codes(list(chosen_codes(sample.codes, code_set)), manifest.codes)
                grids = None if chosen.grids is None else codes_named(chosen.grids, code_set)
                passed_over.update(name for name in ("texts", "image", "provenance") if getattr(sample, name))
                passed_over.update(sample.codes.keys() - chosen.codes.keys())
                record = serialize_table_row(chosen._replace(codes=codes_named(chosen.codes, code_set), grids=grids))
                shuffle.add(next(keys), record)


def _write_parts(
    store: Store,
    names: Sequence[str],
    rows: int,
    records: Iterator[Any],
    file_format: Format,
    form: _Form,
    page: Callable[..., bytes],
    lease: Lease,
) -> dict[str, Written]:
    """Cut the records into files whose row counts differ by one at most; the card is whole before the last is published."""
    files = {}
    each, more = divmod(rows, len(names))
    num_bytes = 0
    for number, name in enumerate(names):
        with store.write(name) as writer:
            files[name], written_bytes = write_part(
                writer, islice(records, each + (number < more)), file_format, form.schema, form.columns, form.size
            )
            num_bytes += written_bytes
            if name == names[-1]:
                store.put(CARD, page(num_bytes=num_bytes))
            lease.check()
    return files


def _counted(items: Iterator[_Item], progress: Progress) -> Iterator[_Item]:
    """The same items, reported as they pass."""
    passed = 0
    for item in items:
        yield item
        passed += 1
        if passed == _REPORT_EVERY:
            progress(Advance(units=passed, samples=passed))
            passed = 0
    progress(Advance(units=passed, samples=passed))


def _write_state(store: Store, names: Sequence[str], fingerprint: str) -> Written:
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    data = json.dumps(state, indent=2, sort_keys=True).encode()
    store.put(STATE, data)
    return written(data)
