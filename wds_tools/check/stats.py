"""What a data set holds, in numbers: one pass over texts and codes, in constant memory, on any number of processes.

    shard ──scan──▶ pieces of rows ──Count──▶ histograms, code counts, hashes ──merge──▶ Stats
                                                  └▶ the shard's own text and code histogram ──▶ drift

Source images are not read, only their sizes. Invariant: the result does not depend on workers or on the order of shards.
Cost: about 10 us a sample and process. Memory: pieces of 8 MiB and a code histogram a process; here 32 bytes a hash kept (see
duplicates) and 1 KB a shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from wds_tools.check.drift import BUCKETS, Outline, ShardStats, drift, outline
from wds_tools.check.duplicates import HashSet, Repeats
from wds_tools.check.histogram import Histogram
from wds_tools.check.rows import PIECE_BYTES, Row, Rows, is_image, is_small, is_text
from wds_tools.dataset.read import read_manifest
from wds_tools.errors import DataError, FormatError, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import ANY_MEMBERS
from wds_tools.format.shard import parse_npy
from wds_tools.run.local import Report, run_tasks
from wds_tools.run.progress import Progress
from wds_tools.storage import open_store

MAX_CODEBOOK = 1 << 22
"""Counts of more entries than this are not kept: no tokenizer has them, and a damaged grid may."""
_SHOWN_CHARS = 100


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Describe a data set in numbers: lengths, sizes, codebook use, duplicates, drift between shards."""

    input: str
    """The data set: a directory or URL."""
    workers: int = 1
    """Processes to use."""
    hashes: int = 4_000_000
    """Samples up to which duplicates are counted exactly; above, they are estimated from this many. 100 bytes each."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: at least 1")
        if self.hashes < 1000:
            raise UsageError(f"--hashes {self.hashes}: at least 1000")


@dataclass(kw_only=True)
class CodeUse:
    """How often each entry of a codebook was used."""

    codebook_size: int | None
    """As the manifest says; None if it does not."""
    counts: NDArray[np.int64]
    """At least `codebook_size` of them."""

    @property
    def size(self) -> int:
        """Entries: those of the codebook, or as many as the codes that were seen need."""
        return self.codebook_size or len(self.counts)

    @property
    def used(self) -> int:
        """Entries that occur."""
        return int((self.counts > 0).sum())

    @property
    def entropy_bits(self) -> float:
        """Of the distribution over entries: log2 of how many equally frequent ones would say as much."""
        total = self.counts.sum()
        share = self.counts[self.counts > 0] / max(int(total), 1)
        return float(-(share * np.log2(share)).sum()) + 0.0

    @property
    def perplexity(self) -> float:
        """2 to the entropy."""
        return float(2.0**self.entropy_bits)

    def merge(self, other: CodeUse) -> None:
        """Add another's counts."""
        short, long = sorted((self.counts, other.counts), key=len)
        self.counts = long.copy()
        self.counts[: len(short)] += short


@dataclass(kw_only=True)
class Count:
    """What was counted over some samples. Two of these add up."""

    samples: int = 0
    data_types: Counter[str] = field(default_factory=Counter)
    text_chars: Histogram = field(default_factory=Histogram)
    """Of texts; of a conversation, over its turns."""
    turns: Histogram = field(default_factory=Histogram)
    """Of conversations."""
    sample_bytes: Histogram = field(default_factory=Histogram)
    """In the tar, headers and padding included."""
    image_bytes: Histogram = field(default_factory=Histogram)
    """Of source images that were kept."""
    grids: Counter[str] = field(default_factory=Counter)
    """Code grids by "HEIGHT x WIDTH"."""
    codes: dict[str, CodeUse] = field(default_factory=dict)

    def merge(self, other: Count) -> None:
        """Add another's."""
        self.samples += other.samples
        self.data_types.update(other.data_types)
        for name in ("text_chars", "turns", "sample_bytes", "image_bytes"):
            getattr(self, name).merge(getattr(other, name))
        self.grids.update(other.grids)
        for column, use in other.codes.items():
            if column in self.codes:
                self.codes[column].merge(use)
            else:
                self.codes[column] = use


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Everything about a data set."""

    url: str
    manifest: Manifest
    count: Count
    text_repeats: Repeats
    code_repeats: Repeats
    shards: tuple[ShardStats, ...]
    largest: Mapping[str, Sequence[tuple[int, str, str]]] = field(default_factory=dict)
    """"text" and "codes" -> (copies, key, the text's beginning) of the largest groups of duplicates."""


@dataclass(kw_only=True)
class Part:
    """What was counted over rows of one shard."""

    shard: int
    count: Count = field(default_factory=Count)
    texts: list[tuple[int, int]] = field(default_factory=list)
    """(hash, number of the sample), of all that have text."""
    codes: list[tuple[int, int]] = field(default_factory=list)
    """The same, of all that have codes."""
    buckets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))
    """Codes by their number modulo BUCKETS."""

    def merge(self, other: Part) -> None:
        """Add what was counted over other rows of the same shard."""
        self.count.merge(other.count)
        self.texts += other.texts
        self.codes += other.codes
        self.buckets += other.buckets


def stats(config: StatsConfig) -> Stats:
    """Read a data set and describe it.

    Raises:
        NotFound: there is no manifest, or an index is missing.
        FormatError: a manifest, an index or a sample is damaged: `verify` says more.
        StorageError: the storage does not answer.
    """
    store = open_store(config.input)
    manifest = read_manifest(store, any_members=True)
    with Progress("stats", manifest.samples, quiet=config.quiet) as progress:
        tasks = list(range(len(manifest.shards)))
        work = _CountShard(config.input, manifest)
        parts = run_tasks(work, tasks, workers=config.workers, on_report=progress)
        rows = Rows(store, manifest)
        result = _describe(config.input, rows, parts, config.hashes)
        rows.close()
    return result


def sample_stats(url: str, rows: Rows, blocks: int = 32, block_samples: int = 128) -> Stats:
    """The same from blocks of samples spread evenly over the set, in one process: what a glance may cost.

    Args:
        url: the data set, as it is to be named.
        rows: it.
        blocks, block_samples: how many, and of what size; small sets are read whole.
    """
    total = len(rows)
    starts: Sequence[int] = range(0, total, block_samples)
    if len(starts) > blocks:
        starts = [at * (total - block_samples) // (blocks - 1) for at in range(blocks)]
    parts: dict[int, Part] = {}
    for at in starts:
        last = min(at + block_samples, total)
        while at < last:
            shard, row = rows.locate(at)
            end = min(row + last - at, rows.manifest.shards[shard].samples)
            parts.setdefault(shard, Part(shard=shard)).merge(count_rows(rows, shard, row, end, lambda *_: None))
            at += end - row
    return _describe(url, rows, parts.values(), blocks * block_samples)


@dataclass(frozen=True)
class _CountShard:
    """The count of one shard, in whatever process it runs."""

    input: str
    manifest: Manifest
    _rows: list[Rows] = field(default_factory=list)

    def __call__(self, shard: int, progress: Report) -> Part:
        if not self._rows:
            self._rows.append(Rows(open_store(self.input), self.manifest))
        return count_rows(self._rows[0], shard, 0, self.manifest.shards[shard].samples, progress)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": []}


def count_rows(rows: Rows, shard: int, first: int, last: int, progress: Report) -> Part:
    """Count the rows [first, last) of a shard.

    Raises:
        FormatError: a sample is damaged, or has a code outside its codebook.
    """
    part = Part(shard=shard)
    sizes = {column: _codebook_size(rows.manifest, column) for column in rows.manifest.codes}
    has_schema = rows.manifest.schema_version != ANY_MEMBERS
    for piece in rows.scan(shard, first, is_small if has_schema else lambda _: False, last):
        part.count.samples += len(piece)
        part.count.sample_bytes.add([row.size for row in piece])
        images = [length for row in piece for suffix, length in row.lengths.items() if is_image(suffix)]
        part.count.image_bytes.add(images)
        if has_schema:
            _count_codes(part, piece, _count_texts(part, piece), sizes)
        progress(len(piece), len(piece), 0)
    return part


def _count_texts(part: Part, piece: Sequence[Row]) -> list[Mapping[str, Any]]:
    """Count texts and turns; returns the samples' records."""
    records: list[Mapping[str, Any]] = []
    chars: list[int] = []
    turns: list[int] = []
    for row in piece:
        try:
            record = orjson.loads(row.payloads["json"])
            records.append(record)
            texts = [record["text"]]
            if record.get("conversations") is not None:
                texts += [turn["value"] for turn in record["conversations"]]
                turns.append(len(texts) - 1)
            part.count.data_types[record["data_type"]] += 1
            whole = "\x1f".join(texts).encode()
            chars.append(sum(map(len, texts)))
        except (orjson.JSONDecodeError, KeyError, TypeError, UnicodeEncodeError) as error:
            why = f"its json is none of this schema ({type(error).__name__}: {error})"
            raise FormatError(f"{row.shard}, byte {row.start}: {why}: `wds-tools verify` says more") from error
        if chars[-1]:
            part.texts.append((xxh3_64_intdigest(whole), row.number))
    part.count.text_chars.add(chars)
    part.count.turns.add(turns)
    return records


def _count_codes(part: Part, piece: Sequence[Row], records: Sequence[Mapping[str, Any]], sizes: Mapping[str, int | None]) -> None:
    columns: dict[str, list[NDArray[Any]]] = {}
    for row, record in zip(piece, records, strict=True):
        hashes = []
        for suffix, payload in row.payloads.items():
            if not suffix.endswith(".npy"):
                continue
            codes = parse_npy(payload, f"{row.shard}, byte {row.start}: {suffix}")
            if codes.ndim != 2:
                raise FormatError(f"{row.shard}, byte {row.start}: {suffix} has the shape {codes.shape}, expected (h, w)")
            column = suffix.removesuffix(".npy")
            try:
                part.count.grids.update(f"{h} x {w}" for h, w in (record.get("grids") or {}).get(column, [codes.shape]))
            except (AttributeError, TypeError, ValueError) as error:
                raise FormatError(
                    f"{row.shard}, byte {row.start}: its grids are not [h, w] each: `wds-tools verify` says more"
                ) from error
            if codes.size:
                columns.setdefault(column, []).append(codes.ravel())
                hashes.append(xxh3_64_intdigest(payload))
        if hashes:
            part.codes.append((hashes[0] if len(hashes) == 1 else xxh3_64_intdigest(repr(hashes).encode()), row.number))
    for column, grids in columns.items():
        codes = np.concatenate(grids)
        size = sizes.get(column)
        most = int(codes.max(initial=0))
        if most >= (size or MAX_CODEBOOK):
            raise FormatError(
                f"{piece[0].shard}: {column} holds the code {most:,}; the codebook has {size or MAX_CODEBOOK:,} entries: "
                "`wds-tools verify` says where"
            )
        use = CodeUse(codebook_size=size, counts=np.bincount(codes, minlength=size or 1).astype(np.int64))
        part.count.merge(Count(codes={column: use}))
        part.buckets += np.bincount(codes % BUCKETS, minlength=BUCKETS)


def _codebook_size(manifest: Manifest, column: str) -> int | None:
    size = manifest.codes[column].get("codebook_size")
    return size if type(size) is int and 0 < size <= MAX_CODEBOOK else None


def _describe(url: str, rows: Rows, parts: Iterable[Part], limit: int) -> Stats:
    count = Count()
    texts, codes = HashSet(limit=limit), HashSet(limit=limit)
    outlines: dict[int, Outline] = {}
    for part in parts:
        count.merge(part.count)
        for kept, pairs in ((texts, part.texts), (codes, part.codes)):
            hashes, numbers = zip(*pairs, strict=True) if pairs else ((), ())
            kept.add(np.array(hashes, np.uint64), np.array(numbers, np.int64))
        name = rows.manifest.shards[part.shard].name
        outlines[part.shard] = outline(name, part.count.samples, part.count.text_chars, part.buckets, part.count.grids.total())
    text_repeats, code_repeats = texts.repeats(), codes.repeats()
    return Stats(
        url=url,
        manifest=rows.manifest,
        count=count,
        text_repeats=text_repeats,
        code_repeats=code_repeats,
        shards=tuple(drift([outlines[shard] for shard in sorted(outlines) if outlines[shard].samples])),
        largest={"text": _largest(rows, text_repeats), "codes": _largest(rows, code_repeats)},
    )


def _largest(rows: Rows, repeats: Repeats) -> list[tuple[int, str, str]]:
    """(copies, key, the text's beginning) of the largest groups; a sample each is read for it."""
    found = []
    for copies, number in repeats.largest:
        row = rows.one(number, is_text, max_member_bytes=PIECE_BYTES)
        try:
            record = orjson.loads(row.payloads["json"])
            turns = record.get("conversations") or ()
            text = record["text"] or " / ".join(turn["value"] for turn in turns)
            found.append((copies, row.key, " ".join(text.split())[:_SHOWN_CHARS]))
        except (DataError, KeyError, TypeError):
            found.append((copies, f"sample {number}", ""))
    return found
