"""What training will cost, from manifests alone: no shard, no index is read, and the data need not exist yet.

    sources, config, world size -> SampleOrder -> steps, and how well the order is mixed
                                          -> replay.py: requests, bytes and memory of one process

Cost: a few seconds and the plan's memory, whatever the number of samples.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loaders.config import LoaderConfig, Source
from loaders.cost.replay import ProcessCost, replay
from loaders.order.partition import BatchPartition, check_batch
from loaders.order.plan import Ints
from loaders.order.samples import OpenSource, SampleOrder, order_spec
from loaders.order.shares import count_tokens
from loaders.proof.state import read_state, resumed
from loaders.reading.concurrency import levels
from loaders.reading.planner import shared_lanes
from wds_tools.errors import UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.offsets import hash_offsets
from wds_tools.format.shards import ShardInfo, Shards
from wds_tools.storage import open_store

_MAX_SHARDS = 1 << 24
_MIXING_SAMPLES = 1 << 20
_MIXING_LANES = 64
_GOOD_REQUEST_BYTES = 256 << 10


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How far the order takes apart what lies together."""

    batch_chunks: float
    """Number of chunks that a batch has samples of, on average; at best the batch size."""
    batch_shards: float
    """Number of shards that a batch has samples of, on average."""
    neighbours_median: float | None
    """Positions between two samples that lie side by side in a chunk, median; None where chunks are single samples, and chance
    puts neighbours anywhere."""
    neighbours_p5: float | None
    """The same for the closest 5 % of them."""


@dataclass(frozen=True, kw_only=True)
class SourceTokens:
    """What an epoch has of a source, on average."""

    source: str
    """Its name."""
    samples: float
    """Samples of it."""
    text_tokens: float
    """Tokens of their texts; those that a template puts around them are not counted."""
    image_tokens: float
    """Codes of their images."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What training will cost."""

    num_samples: int
    """Samples of all sources."""
    num_shards: int
    """Shards of all sources."""
    total_bytes: int
    """Bytes of all shards."""
    epoch_samples: int
    """Samples of an epoch."""
    num_steps: int
    """Steps of an epoch."""
    num_dropped: int
    """Samples that last_batch="drop" leaves out."""
    num_lanes: int
    """Number of lanes."""
    lanes_per_sample: int
    """Lanes for each sample of the batch: as many workers, or a divisor of it, have lanes of their own."""
    weights_error: float
    """How far the share of a source is from its weight, at most, as a part of the weight."""
    num_chunks: int
    """Chunks of an epoch of every source that is drawn from."""
    chunk_bytes: int
    """Size of a chunk."""
    block_bytes: int
    """Size of a shuffle block."""
    start_s: float
    """Time to plan, at the start of every process (worker processes that are forked share it)."""
    epoch_s: float
    """Time to plan each further epoch."""
    plan_bytes: int | None
    """Memory of the plan of an epoch; None where the system does not say."""
    mixing: Mixing
    """How well the order is mixed."""
    process: ProcessCost
    """What one process reads."""
    tokens: tuple[SourceTokens, ...]
    """Of each source; none where the config's sequences name no tokenizer."""
    warnings: tuple[str, ...]
    """Settings that cost more than they need."""


def imagined_source(samples: float, sample_bytes: float, shard_samples: int = 10_000) -> OpenSource:
    """A dataset that does not exist, in shards of one size.

    Args:
        samples: number of samples.
        sample_bytes: size of a sample in its tar, headers and padding included.
        shard_samples: samples of a shard.

    Raises:
        UsageError: one of them is less than 1, or they are more than can be planned.
    """
    is_small = samples < 1 << 53 and shard_samples < 1 << 32 and shard_samples * sample_bytes < 1 << 53
    if not (is_small and min(samples, sample_bytes, shard_samples) >= 1):
        raise UsageError(
            f"{samples:,} samples of {sample_bytes} bytes, {shard_samples:,} a shard: expected 1 or more of each, less than "
            "2**53 samples, and shards of less than 2**32 samples and 2**53 bytes"
        )
    whole, rest = divmod(int(samples), shard_samples)
    if whole > _MAX_SHARDS:
        raise UsageError(
            f"{samples:,} samples are {whole:,} shards of {shard_samples:,}: at most {_MAX_SHARDS:,} are simulated; give larger "
            "shards (--shard-samples)"
        )
    parts, power = [_imagined_shards([rest] if rest else [], sample_bytes)], _imagined_shards([shard_samples], sample_bytes)
    while whole:
        parts = [power, *parts] if whole % 2 else parts
        power, whole = Shards.join([power, power]), whole // 2
    manifest = Manifest(shards=Shards.join(parts), inputs=int(samples), offsets_hash=hash_offsets(b""))
    return OpenSource(Source("imagined"), open_store("memory://imagined"), manifest)


def _imagined_shards(samples: Iterable[int], sample_bytes: float) -> Shards:
    nothing: dict[str, Any] = {"xxh128": "0" * 32, "members": (), "data_types": {}, "text_chars": 0, "num_codes": 0}
    return Shards.of(
        ShardInfo(name="imagined.tar", samples=each, bytes=round(each * sample_bytes), **nothing) for each in samples
    )


def simulate(
    sources: Sequence[OpenSource],
    config: LoaderConfig,
    world_size: int = 1,
    *,
    as_remote: bool = False,
    state: Mapping[str, Any] | None = None,
) -> Simulation:
    """Find out what training with a config costs.

    Args:
        sources: the opened sources of the config, or imagined_source(...).
        config: as for build_loader.
        world_size: number of ranks.
        as_remote: count local files as if they were fetched.
        state: of a run that goes on so: its lanes stay, and what differs holds from there on.

    Returns:
        Costs of an epoch, of a run that goes on the first one that begins with these settings, and how well it is mixed.

    Raises:
        UsageError: the settings do not fit the data, the world or the state.
    """
    before, started = _resident_bytes(), time.perf_counter()
    if state is None:
        order = SampleOrder(sources, order_spec(sources, config))
    else:
        order = resumed(read_state(state), config, sources, "future")
    start_s = time.perf_counter() - started
    order.locate(order.latest_epoch, np.arange(1))
    epoch_s = time.perf_counter() - started - start_s
    after = _resident_bytes()
    check_batch(order.length, config.batch_size, config.last_batch, world_size)
    steps = BatchPartition(order.length, 0, config.batch_size, config.last_batch, world_size)
    process = replay(order, config, steps, as_remote=as_remote)
    return Simulation(
        num_samples=sum(opened.manifest.samples for opened in sources),
        num_shards=sum(len(opened.shards) for opened in sources),
        total_bytes=order.total_bytes,
        epoch_samples=order.length,
        num_steps=len(steps),
        num_dropped=steps.dropped,
        num_lanes=order.spec.lanes,
        lanes_per_sample=order.spec.lanes_per_sample,
        weights_error=order.weights_error,
        num_chunks=order.num_chunks,
        chunk_bytes=order.spec.chunk_bytes,
        block_bytes=order.spec.block_bytes,
        start_s=start_s,
        epoch_s=epoch_s,
        plan_bytes=None if before is None or after is None else max(after - before, 0),
        mixing=measure_mixing(order, config.batch_size),
        process=process,
        tokens=tuple(_tokens(order, config)),
        warnings=tuple(
            _warnings(order, config, world_size, process, shared_lanes(order, config, world_size, as_remote=as_remote))
        ),
    )


def _tokens(order: SampleOrder, config: LoaderConfig) -> Iterator[SourceTokens]:
    if config.sequences is None:
        return
    weights = order.spec.schedule[0][1] if order.spec.schedule else ()
    for number, opened in enumerate(order.sources):
        held, samples = opened.manifest.samples, float(opened.manifest.samples * opened.source.repeat)
        if weights:
            samples = order.length * weights[number] / sum(weights)
        text_tokens, image_tokens = count_tokens(opened, config.sequences.tokenizer)
        yield SourceTokens(
            source=opened.name,
            samples=samples,
            text_tokens=samples * text_tokens / held,
            image_tokens=samples * image_tokens / held,
        )


def opening_s(cost: ProcessCost, latency_s: float, max_requests: int) -> list[float]:
    """Seconds from build_loader to the first batch, and from one to the next while lanes are opened.

    Requests go in rounds of `latency_s`, each of as many as are in flight then; before them are those of the manifest and of the
    offsets. Bandwidth and computing come on top.

    Args:
        cost: of a process.
        latency_s: from a request to the end of its answer.
        max_requests: see LoaderConfig.
    """
    in_flight = levels(max_requests)
    seconds = []
    for step, requests in enumerate(cost.first_requests):
        rounds = 0 if step else 2
        while requests > 0:
            rounds, requests = rounds + 1, requests - next(in_flight)
        seconds.append(rounds * latency_s)
    return seconds


def measure_mixing(order: SampleOrder, batch_size: int) -> Mixing:
    """How well an epoch is mixed: by batches from its middle, and the neighbours in all of it or in some of its lanes.

    Args:
        order: the order.
        batch_size: samples of a batch over all ranks.
    """
    length = order.length
    count = max(min(_MIXING_SAMPLES, length) // batch_size, 1)
    begin = max(length // 2 - count * batch_size // 2, 0)
    located = order.locate(order.latest_epoch, np.arange(begin, min(begin + count * batch_size, length)))
    batch = np.arange(len(located.source)) // batch_size
    num_batches = int(batch[-1]) + 1
    apart = _neighbours_apart(order)
    return Mixing(
        batch_chunks=_num_distinct(batch, located.source, located.shard, located.first + located.num_in_run) / num_batches,
        batch_shards=_num_distinct(batch, located.source, located.shard) / num_batches,
        neighbours_median=float(np.median(apart)) if len(apart) else None,
        neighbours_p5=float(np.percentile(apart, 5)) if len(apart) else None,
    )


def _neighbours_apart(order: SampleOrder) -> Ints:
    """How many positions apart samples are that lie side by side in a shard: all of them, or those of a chunk in some lanes."""
    length, lanes = order.length, order.spec.lanes
    if length <= _MIXING_SAMPLES:
        positions = np.arange(length)
    else:
        some = np.linspace(0, lanes - 1, min(lanes, _MIXING_LANES)).astype(np.int64)
        num_cursors = min(length // lanes, _MIXING_SAMPLES // len(some))
        positions = (some + lanes * (np.arange(num_cursors) + (length // lanes - num_cursors) // 2)[:, None]).ravel()
    located = order.locate(order.latest_epoch, positions)
    ascending = np.lexsort((located.sample_index, located.shard, located.source))
    source, shard, sample_index, chunk = (
        np.diff(column[ascending]) for column in (*located[:3], located.first + located.num_in_run)
    )
    side_by_side = (source == 0) & (shard == 0) & (sample_index == 1)
    if len(positions) < length:
        side_by_side &= chunk == 0
    apart: Ints = np.abs(np.diff(positions[ascending]))[side_by_side]
    return apart


def _num_distinct(*columns: Ints) -> int:
    """Number of different tuples in these columns."""
    ascending = np.lexsort(columns)
    changes = np.any([np.diff(column[ascending]) != 0 for column in columns], axis=0)
    return 1 + int(np.count_nonzero(changes))


def _warnings(order: SampleOrder, config: LoaderConfig, world_size: int, cost: ProcessCost, shared: str | None) -> Iterator[str]:
    """Settings that cost more than they need."""
    batch_size = config.batch_size
    if shared:
        yield shared
    if excluded := sum(len(opened.mask.rows(len(opened.mask.ids))) for opened in order.sources):
        yield f"{excluded:,} samples are excluded: each is fetched all the same, and the one in its stead unless it is in memory"
    if batch_size % world_size:
        yield f"{world_size} ranks do not divide batch_size={batch_size}: some get a sample more in every step than others"
    if cost.evicted:
        yield (
            f"memory_bytes={config.memory_bytes} is too little for {cost.lanes} lanes a process: {cost.evicted:,.0f} requests "
            "an epoch are dropped before they are used up; two shuffle blocks of each are "
            f"{2 * cost.lanes * order.spec.block_bytes}"
        )
    elif cost.late > 0.1:
        yield (
            f"memory_bytes={config.memory_bytes} is too full to ask ahead in {cost.late:.0%} of the steps: they wait for "
            f"storage; more memory_bytes, or fewer lanes a process than {cost.lanes} (more ranks or workers), lets it"
        )
    if cost.amplification > 1.1:
        yield f"a process fetches {cost.amplification:.1f} times the bytes of its samples"
    if cost.requests and cost.bytes / cost.requests < _GOOD_REQUEST_BYTES:
        yield (
            f"requests of {cost.bytes / cost.requests / 1024:,.0f} KiB are dear on object storage: fewer lanes a process (more "
            "ranks or workers), more memory_bytes, or larger shards make them larger"
        )
    if cost.index_bytes > cost.bytes / 10:
        yield (
            f"indices are {cost.index_bytes / max(cost.bytes, 1):.0%} of the bytes of the samples: each is fetched whole, for "
            "every few chunks of its shard; `wds-tools index` writes the offsets that are read in their stead"
        )


def _resident_bytes() -> int | None:
    """Memory that this process holds; None where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * mmap.PAGESIZE if status.exists() else None
