"""What a dataset holds, in numbers: one pass over texts and codes, in constant memory, on any number of processes.

    shard ──scan──▶ pieces ──`count`──▶ histograms, code counts, hashes ──merge──▶ Stats
                                                  └▶ the shard's own text and code histogram ──▶ drift

Source images are not read, only their sizes. Invariant: the result does not depend on workers or on the order of shards.
Cost: about 10 us a sample and process. Memory: pieces of 8 MiB and a code histogram a process; here 32 bytes a hash kept (see
duplicates) and 1 KB a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import orjson

from wds_tools.check.stats.count import Count, ShardCount, count_samples
from wds_tools.check.stats.drift import Outline, ShardStats, drift, outline
from wds_tools.check.stats.duplicates import HashSet, Repeats
from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.samples import PIECE_BYTES, SampleReader, is_text
from wds_tools.errors import DataError, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.run.local import OnWorkers, Report, run_tasks
from wds_tools.run.progress import Progress
from wds_tools.storage import open_store

_SHOWN_CHARS = 100


@dataclass(frozen=True, kw_only=True)
class StatsConfig(OnWorkers):
    """Describe a dataset in numbers: lengths, sizes, codebook use, duplicates, drift between shards."""

    input: str
    """The dataset: a directory or URL."""
    hashes: int = 4_000_000
    """Number of samples up to which duplicates are counted exactly; above, they are estimated from this many. 100 bytes each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hashes < 1000:
            raise UsageError(f"--hashes {self.hashes}: at least 1000")


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Everything about a dataset."""

    url: str
    manifest: Manifest
    count: Count
    text_repeats: Repeats
    code_repeats: Repeats
    shards: tuple[ShardStats, ...]
    largest: Mapping[str, Sequence[tuple[int, str, str]]] = field(default_factory=dict)
    """"text" and "codes" -> (copies, key, the text's beginning) of the largest groups of duplicates."""


def stats(config: StatsConfig) -> Stats:
    """Read a dataset and describe it.

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
        with closing(run_tasks(work, tasks, workers=config.workers, on_report=progress)) as counts:
            reader = SampleReader(store, manifest)
            result = _describe(config.input, reader, counts, config.hashes)
            reader.close()
    return result


def sample_stats(url: str, reader: SampleReader, blocks: int = 32, block_samples: int = 128) -> Stats:
    """The same from blocks of samples spread evenly over the dataset, in one process: what a glance may cost.

    Args:
        url: the dataset, as it is to be named.
        reader: it.
        blocks, block_samples: how many, and of what size; small datasets are read whole.
    """
    total = len(reader)
    starts: Sequence[int] = range(0, total, block_samples)
    if len(starts) > blocks:
        starts = [block * (total - block_samples) // (blocks - 1) for block in range(blocks)]
    counts: dict[int, ShardCount] = {}
    for start in starts:
        last = min(start + block_samples, total)
        while start < last:
            shard, first = reader.locate(start)
            end = min(first + last - start, reader.manifest.shards[shard].samples)
            counts.setdefault(shard, ShardCount(shard=shard)).merge(count_samples(reader, shard, first, end, lambda *_: None))
            start += end - first
    return _describe(url, reader, counts.values(), blocks * block_samples)


@dataclass(frozen=True)
class _CountShard:
    """The count of one shard, in whatever process it runs."""

    input: str
    manifest: Manifest

    @cached_property
    def _reader(self) -> SampleReader:
        return SampleReader(open_store(self.input), self.manifest)

    def __call__(self, shard: int, progress: Report) -> ShardCount:
        return count_samples(self._reader, shard, 0, self.manifest.shards[shard].samples, progress)


def _describe(url: str, reader: SampleReader, counts: Iterable[ShardCount], limit: int) -> Stats:
    count = Count()
    texts, codes = HashSet(limit=limit), HashSet(limit=limit)
    outlines: dict[int, Outline] = {}
    for counted in counts:
        count.merge(counted.count)
        for kept, pairs in ((texts, counted.texts), (codes, counted.codes)):
            hashes, numbers = zip(*pairs, strict=True) if pairs else ((), ())
            kept.add(np.array(hashes, np.uint64), np.array(numbers, np.int64))
        outlines[counted.shard] = outline(
            reader.manifest.shards[counted.shard].name,
            counted.count.samples,
            counted.count.text_chars,
            counted.buckets,
            counted.count.grids.total(),
        )
    text_repeats, code_repeats = texts.repeats(), codes.repeats()
    return Stats(
        url=url,
        manifest=reader.manifest,
        count=count,
        text_repeats=text_repeats,
        code_repeats=code_repeats,
        shards=tuple(drift([outlines[shard] for shard in sorted(outlines) if outlines[shard].stats.samples])),
        largest={"text": _largest(reader, text_repeats), "codes": _largest(reader, code_repeats)},
    )


def _largest(reader: SampleReader, repeats: Repeats) -> list[tuple[int, str, str]]:
    """(copies, key, the text's beginning) of the largest groups; a sample each is read for it."""
    largest = []
    for copies, number in repeats.largest:
        sample = reader.sample(number, is_text, max_member_bytes=PIECE_BYTES)
        try:
            record = orjson.loads(sample.payloads["json"])
            turns = record.get("conversations") or ()
            text = record["text"] or " / ".join(turn["value"] for turn in turns)
            largest.append((copies, sample.key, " ".join(text.split())[:_SHOWN_CHARS]))
        except (DataError, KeyError, TypeError):
            largest.append((copies, f"sample {number}", ""))
    return largest
