"""`wds-tools simulate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from loaders.config import LoaderConfig, Source
from loaders.cost.replay import ProcessCost
from loaders.cost.simulate import Simulation, imagined_source, opening_s, simulate
from loaders.order.samples import open_source
from wds_tools.cli.options import Positional
from wds_tools.cli.summary import Printed, show
from wds_tools.errors import UsageError
from wds_tools.format.typed_json import read_json
from wds_tools.sequences.config import SequenceConfig
from wds_tools.storage import open_store, split_url
from wds_tools.terminal import sized

EXAMPLE = "wds-tools simulate --samples 10e9 --sample-bytes 4100 --batch-size 4096 --world 512 --workers 4"
_NO_LENGTH = 1 << 20
"""Of rows, none of which are made."""


@dataclass(frozen=True, kw_only=True)
class Config(Printed):
    """Estimate the cost of training from datasets: steps, requests, bytes, memory, and how well samples are mixed. Reads only
    manifests; with --samples, not even these."""

    input: Positional[tuple[str, ...]] = ()
    """The datasets: directories or URLs."""
    samples: float | None = None
    """Instead of datasets: number of samples of a dataset that does not exist yet. 10e9 is ten billion."""
    sample_bytes: float = 4100.0
    """With --samples: bytes of a sample in its tar, headers and padding included."""
    shard_samples: int = 10_000
    """With --samples: samples of a shard."""
    batch_size: int
    """Samples of a batch over all ranks."""
    world: int = 1
    """Ranks."""
    workers: int = 0
    """Worker processes of a rank that read; 0: the rank reads by itself."""
    weights: tuple[float, ...] = ()
    """Weights of the datasets in the mixture, in their order; by default every sample of each once an epoch."""
    tokenizer: str | None = None
    """Folder of a Hugging Face tokenizer with which `index --tokens` counted the datasets: weights are then shares of tokens, and
    the tokens of texts and images of each dataset are reported."""
    last_batch: Literal["drop", "short", "wrap"] = "drop"
    """What happens to the last, incomplete batch of an epoch."""
    memory_bytes: int = 2 << 30
    """Memory that one process may use for data that it has read."""
    max_requests: int = LoaderConfig.max_requests
    """Requests that one process may have in flight at a time."""
    latency_ms: float | None = None
    """Milliseconds that object storage takes to answer a request, to estimate the time of the first batches."""
    seed: int = 42
    """Seed of the sample order."""
    exclude: str | None = None
    """File of keys to take out, as Source(exclude=...); samples are then looked up in the data."""
    state: str | None = None
    """State (JSON) of a run that continues with these settings: its lanes stay, and changed settings take effect there."""
    remote: bool = False
    """Count local files as if they were fetched from object storage."""

    def __post_init__(self) -> None:
        if bool(self.input) == (self.samples is not None):
            raise UsageError("name datasets, or give --samples for one that does not exist yet; not both")
        if self.samples is not None and (self.state or self.exclude):
            raise UsageError("--state and --exclude are of datasets that exist, not of --samples")
        if self.weights and len(self.weights) != max(len(self.input), 1):
            raise UsageError(f"{len(self.weights)} weights for {max(len(self.input), 1)} datasets")
        if self.tokenizer and self.samples is not None:
            raise UsageError("--tokenizer counts tokens of datasets that exist, not of --samples")
        if self.latency_ms is not None and not 0 <= self.latency_ms < 1e6:
            raise UsageError(f"--latency-ms {self.latency_ms:g}: 0 or more milliseconds")
        if self.world < 1:
            raise UsageError(f"--world {self.world}: 1 or more")


def run(config: Config) -> int:
    """Simulate, and print what came out."""
    weights = config.weights or (None,) * max(len(config.input), 1)
    sources = tuple(
        Source(url, weight=weight, exclude=config.exclude)
        for url, weight in zip(config.input or ("imagined",), weights, strict=True)
    )
    same: dict[str, Any] = {
        name: getattr(config, name) for name in ("batch_size", "seed", "last_batch", "memory_bytes", "max_requests")
    }
    settings = LoaderConfig(
        sources=sources,
        unit="tokens" if config.tokenizer and config.weights else "samples",
        sequences=SequenceConfig(tokenizer=config.tokenizer, max_length=_NO_LENGTH) if config.tokenizer else None,
        num_workers=config.workers,
        **{name: getattr(config, name) for name in same},
    )
    if config.samples is None:
        opened = [open_source(source) for source in sources]
    else:
        opened = [imagined_source(config.samples, config.sample_bytes, config.shard_samples)]
    state = None
    if config.state is not None:
        folder, name = split_url(config.state)
        state = read_json(dict[str, Any], open_store(folder).read(name), config.state)
    result = simulate(opened, settings, config.world, as_remote=config.remote, state=state)
    show(config, asdict(result), (f"{name:<12}{fact}" for name, fact in _describe(result, config)))
    return 0


def _describe(result: Simulation, config: Config) -> Iterator[tuple[str, str]]:
    count = result.num_samples
    plan = "" if result.plan_bytes is None else f", {sized(result.plan_bytes)} of memory"
    yield "data", f"{count:,} samples, {sized(result.total_bytes)}, {result.num_shards:,} shards"
    left = f", {result.num_dropped:,} samples left over" if result.num_dropped else ""
    yield "epoch", f"{result.epoch_samples:,} samples: {result.num_steps:,} steps of {config.batch_size:,}{left}"
    yield (
        "order",
        f"{result.num_lanes:,} lanes, {result.lanes_per_sample} for each sample of the batch; {result.num_chunks:,} chunks of "
        f"{sized(result.chunk_bytes)}, read in shuffle blocks of {sized(result.block_bytes)}",
    )
    if result.weights_error:
        yield "", f"weights are kept as parts of 2**20: to {result.weights_error:.2g} of each"
    total = sum(one.text_tokens + one.image_tokens for one in result.tokens) or 1.0
    for one in result.tokens:
        yield (
            "tokens",
            f"{(one.text_tokens + one.image_tokens) / total:6.1%} from {one.source}: {one.samples:,.0f} samples, "
            f"{one.text_tokens:,.0f} tokens of texts, {one.image_tokens:,.0f} of images",
        )
    yield "plan", f"{result.start_s:.2f} s at the start, {result.epoch_s:.2f} s each epoch{plan}"
    mixing = result.mixing
    yield (
        "mixing",
        f"a batch has samples of {mixing.batch_chunks:,.0f} chunks in {mixing.batch_shards:,.0f} shards "
        f"(the more, the better mixed; at most {config.batch_size:,})",
    )
    yield (
        "",
        "neighbours in a shard are wherever chance puts them (chunks are single samples)"
        if mixing.neighbours_median is None or mixing.neighbours_p5 is None
        else f"neighbours in a shard are {mixing.neighbours_median:,.0f} samples apart in the order (median; the closest 5 %: "
        f"{mixing.neighbours_p5:,.0f}), that is {mixing.neighbours_median / config.batch_size:,.0f} steps",
    )
    yield from _describe_process(result.process, config)
    yield from (("WARNING", warning) for warning in result.warnings)


def _describe_process(cost: ProcessCost, config: Config) -> Iterator[tuple[str, str]]:
    processes = config.world * max(config.workers, 1)
    how = "in full" if cost.is_whole else f"for {cost.replayed_steps:,} steps at the start and in the middle, and extrapolated"
    how += ", roughly: it reads far ahead" if cost.is_rough else ""
    yield "process", f"one of {processes:,}: {cost.samples:,} samples an epoch, from {cost.lanes:,} lanes; replayed {how}"
    if not cost.requests:
        yield "  requests", "none: local files are mapped (--remote counts them as if they were fetched)"
        return
    yield "  requests", f"{cost.requests:,.0f} an epoch, of {sized(cost.bytes / cost.requests)} on average"
    yield "  bytes", f"{sized(cost.bytes)} an epoch, {cost.amplification:.2f} x those of its samples"
    yield "  offsets", f"{cost.index_requests:,.0f} requests, {sized(cost.index_bytes)} an epoch; indices where there are none"
    yield "  first batch", f" waits for {cost.first_requests[0]:,} requests, {sized(cost.first_batch_bytes)}"
    if config.latency_ms is not None:
        first, *others = opening_s(cost, config.latency_ms / 1000, config.max_requests)
        after = f", then each of {len(others)} that open lanes after {max(others):.2f} s at most" if others else ""
        yield "", f"comes after {first:.2f} s at {config.latency_ms:g} ms a request, bandwidth and computing aside{after}"
    yield (
        "  memory",
        f"{sized(cost.peak_bytes)} of data at most, in {cost.peak_blocks:,} open blocks; {sized(config.memory_bytes)} allowed"
        + (", and 0.1 to 0.3 GB for batches, threads and what the allocator holds" if cost.peak_bytes else ""),
    )
    yield "  late", f"{cost.late:.0%} of the steps ask for what they need only when they are due"
    yield "  evicted", f"{cost.evicted:,.0f} requests an epoch, whose rows are not used up"
