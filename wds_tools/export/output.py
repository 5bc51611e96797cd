"""The life of an export: what lies at the output, a lease, the files, and what makes them a finished export.

    Lease -> records of all inputs (`hf`, `parquet`) -> equal files (`rows`) -> state.json -> export.json [-> the Hub (`push`)]

Each file but the last is a task for a worker; the last is written by this process, when all others are there.
Invariant: no number of workers changes a byte. An unfinished export can't be read as a finished one: of `arrow`, state.json is
written last; of `parquet`, the last file is begun as a line of text that no reader takes for Parquet. By the dataset card beside
them (`card`), --resume knows them, and by export.json, which is written last of all, whether its files are still those that were
written.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import orjson

from wds_tools.dataset.files import Written, describe_changed, find_changed, written
from wds_tools.dataset.lease import Lease, files_of
from wds_tools.dataset.reader import read_manifest
from wds_tools.errors import FormatError, UsageError
from wds_tools.export.card import NAME as CARD
from wds_tools.export.card import TAG, serialize_card
from wds_tools.export.options import MAX_FILES, NAMES, ExportOptions, ExportSummary
from wds_tools.export.push import push
from wds_tools.export.rows import FEATURES, Columns, write_part
from wds_tools.format.manifest import Manifest
from wds_tools.format.typed_json import read_json
from wds_tools.run.local import Report, run_tasks
from wds_tools.run.progress import Advance, Progress
from wds_tools.storage import Store, Writer, open_store
from wds_tools.storage.base import split_scheme
from wds_tools.terminal import say

STATE, INFO = "state.json", "dataset_info.json"
FILES = "export.json"
"""Sizes and hashes of the other files, but for the card: the export is finished, and this is what it wrote."""
_OURS = re.compile(rf"data-\d{{5}}-of-\d{{5}}\.arrow|{STATE}|{INFO}|{FILES}|{CARD}|data/train-\d{{5}}-of-\d{{5}}\.parquet")
_NUM_BYTES = re.compile(rb'"num_bytes":(\d+)')
_UNFINISHED = b"This export is not finished: run the same command again with --overwrite.\n"
_REPORT_EVERY = 256
FILE_BYTES = 1 << 28
"""Of the tars behind one file, unless it is said how many files there are."""

Source = tuple[Store, Manifest]
_Item = TypeVar("_Item")


def open_sources(config: ExportOptions) -> list[Source]:
    sources = [(store, read_manifest(store, instead_of_rows="export those datasets")) for store in map(open_store, config.input)]
    if not any(manifest.samples for _, manifest in sources):
        raise UsageError(f"{', '.join(config.input)}: no samples, nothing to export")
    return sources


@dataclass(frozen=True)
class Round:
    """Files whose rows are at hand at the same time."""

    files: range
    rows: Callable[[int, int], Iterator[Any]]
    """The records of the rows [low, high), in any process."""
    progress: Progress


@dataclass(frozen=True)
class Table:
    """What is written of datasets."""

    schema: Any
    """pyarrow's."""
    columns: Columns
    """Of some records; see rows.write_part."""
    size: Callable[[Any], int]
    """Bytes of a record, about."""
    rounds: Callable[[Sequence[int]], AbstractContextManager[Iterator[Round]]]
    """Given the number of the first row of each file, and of all rows: the files round by round."""
    seed: int | None
    """Of the shuffle; None: there is none."""
    data_types: Mapping[str, int]
    """See ExportSummary, as the next two."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)


def write_export(config: ExportOptions, sources: Sequence[Source], table: Table, made_of: Sequence[Any]) -> ExportSummary:
    rows = sum(table.data_types.values())
    num_bytes = sum(manifest.bytes for _, manifest in sources)
    num_files = min(config.num_shards or math.ceil(num_bytes / FILE_BYTES), rows, MAX_FILES)
    names = [NAMES[config.writes].format(number, num_files) for number in range(num_files)]
    fingerprint = hashlib.sha256(orjson.dumps(made_of)).hexdigest()[:16]  # what Hugging Face's caches know the rows by
    page = partial(
        serialize_card,
        [manifest for _, manifest in sources],
        config.writes,
        data_types=table.data_types,
        left_out=table.left_out,
        files=len(names),
        seed=table.seed,
        columns={column.name: str(column.type) for column in table.schema},
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
                files = _write_files(store, config, names, table, page, lease)
                lease.check()
                if config.writes == "arrow":
                    files[STATE] = _write_state(store, names, fingerprint)
                store.put(FILES, orjson.dumps(files, option=orjson.OPT_INDENT_2))
            if config.push_to_hub is not None:
                pushed = push(Path(local_path(config.output)), config.push_to_hub, private=config.private, quiet=config.quiet)
    kinds, passed = {"data_types": table.data_types, "left_out": table.left_out}, dict(sorted(table.passed_over.items()))
    return ExportSummary(rows=rows, files=len(names), **kinds, passed_over=passed, pushed=pushed)


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
    store.delete_all(name for name in found if name not in (first, CARD))


def local_path(url: str) -> str:
    """The path of a folder that is given as one, or as file://."""
    return unquote(urlsplit(url).path) if split_scheme(url)[0] == "file" else url


def _write_files(
    store: Store, config: ExportOptions, names: Sequence[str], table: Table, page: Callable[..., bytes], lease: Lease
) -> dict[str, Written]:
    """Cut the records into files whose row counts differ by one at most; the card is whole before the last is published."""
    each, more = divmod(sum(table.data_types.values()), len(names))
    bounds = [number * each + min(number, more) for number in range(len(names) + 1)]
    files: dict[int, Written] = {}
    last, num_bytes = len(names) - 1, 0
    with table.rounds(bounds) as rounds:
        for part in rounds:
            write = _WriteFile(config, names, bounds, table, part.rows)
            todo = [number for number in part.files if number != last]
            with closing(run_tasks(write, todo, workers=config.workers, on_report=part.progress)) as written_files:
                for number, file, more_bytes in written_files:
                    files[number] = file
                    num_bytes += more_bytes
                    lease.check()
            if last in part.files:
                with store.write(names[last]) as writer:
                    files[last], more_bytes = write.write(writer, last, part.progress)
                    store.put(CARD, page(num_bytes=num_bytes + more_bytes))
                    lease.check()
    return {name: files[number] for number, name in enumerate(names)}


@dataclass(frozen=True)
class _WriteFile:
    """Writes a file, in whatever process; picklable."""

    config: ExportOptions
    names: Sequence[str]
    bounds: Sequence[int]
    table: Table
    rows: Callable[[int, int], Iterator[Any]]

    def __call__(self, number: int, report: Report) -> tuple[int, Written, int]:
        with open_store(self.config.output).write(self.names[number]) as writer:
            return number, *self.write(writer, number, report)

    def write(self, writer: Writer, number: int, report: Report) -> tuple[Written, int]:
        """The same into a writer."""
        with closing(counted(self.rows(*self.bounds[number : number + 2]), report)) as records:
            return write_part(writer, records, self.config.writes, self.table.schema, self.table.columns, self.table.size)


def counted(items: Iterator[_Item], progress: Report) -> Generator[_Item, None, None]:
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
