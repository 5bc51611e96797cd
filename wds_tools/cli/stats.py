"""`wds-tools stats`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wds_tools.check.stats.describe import Stats, StatsConfig, stats
from wds_tools.check.stats.duplicates import Repeats
from wds_tools.check.stats.histogram import Histogram
from wds_tools.check.stats.report import render, to_json
from wds_tools.cli.options import Positional
from wds_tools.cli.summary import Printed, describe_dataset, show
from wds_tools.select.duplicates import write_duplicates
from wds_tools.storage import open_store, split_url
from wds_tools.storage.place import check_apart
from wds_tools.terminal import counted, say

EXAMPLE = "wds-tools stats s3://bucket/pairs --workers 8 --html report.html"
_SPARKS = " ▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class Config(Printed, StatsConfig):
    """Describe a dataset in numbers: lengths, sizes, codebook use, duplicates, drift between shards."""

    input: Positional[str]
    """The dataset: a directory or URL."""
    html: str | None = None
    """Write a report to this file (a path or URL): one self-contained page."""
    duplicates: str | None = None
    """Write all groups of samples with equal texts or equal codes to this file, one a line: {"same": ..., "keys": [...]}."""


def run(config: Config) -> int:
    """Count, and say what was found."""
    for option, path in {"--html": config.html, "--duplicates": config.duplicates}.items():
        if path is not None:
            check_apart(config.input, path, option=option)
    result = stats(config)
    if config.duplicates is not None:
        groups = write_duplicates(config.input, config.duplicates, workers=config.workers, quiet=config.quiet)
        found = " and ".join(f"{counted(count, 'group')} of equal {what}" for what, count in groups.items())
        say(f"wds-tools: {found} are in {config.duplicates}", error=True)
    if config.html is not None:
        folder, name = split_url(config.html)
        open_store(folder).put(name, render(result).encode())
    report = ["", f"report: {config.html}"] if config.html is not None else []
    show(config, to_json(result), [*describe_dataset(config.input, result.manifest), "", *_describe(result), *report])
    return 0


def _describe(result: Stats) -> Iterator[str]:
    count = result.count
    yield f"{'':<16}{'least':>10}{'5 %':>10}{'median':>10}{'95 %':>10}{'most':>12}{'mean':>12}"
    for name, values in (
        ("text, chars", count.text_chars),
        ("turns", count.turns),
        ("sample, bytes", count.sample_bytes),
        ("image, bytes", count.image_bytes),
    ):
        if values.count:
            cells = (values.least, values.quantile(0.05), values.quantile(0.5), values.quantile(0.95))
            numbers = "".join(f"{value:>10,}" for value in cells)
            yield f"{name:<16}{numbers}{values.most:>12,}{values.mean:>12,.1f}  {_spark(values)}"
    for grid, number in count.grids.most_common(8):
        yield f"{'grid':<16}{grid}: {number:,}"
    width = max((len(column) + 2 for column in count.codes), default=0)
    for column, use in sorted(count.codes.items()):
        yield (
            f"{column:<{max(width, 16)}}{use.used:,} of {use.size:,} codes in use ({use.used / max(use.size, 1):.1%}), "
            f"entropy {use.entropy_bits:.3f} bits, perplexity {use.perplexity:,.0f}"
        )
    if count.text_chars.count:
        yield from _describe_repeats("same text", result.text_repeats, result.largest["text"])
    if count.codes:
        yield from _describe_repeats("same codes", result.code_repeats, result.largest["codes"])
    odd = [shard for shard in result.shards if shard.is_odd]
    if len(result.shards) > 1:
        yield f"{'drift':<16}{len(odd):,} of {len(result.shards):,} shards stand out"
    for shard in sorted(odd, key=lambda shard: -max(shard.text_distance, shard.code_distance))[:8]:
        yield (
            f"{'':<16}{shard.name}: texts differ by {shard.text_distance:.1%}, codes by {shard.code_distance:.1%}; "
            f"median text {shard.text_p50:,} chars"
        )


def _describe_repeats(name: str, repeats: Repeats, largest: Sequence[tuple[int, str, str]]) -> Iterator[str]:
    about = "" if repeats.share_kept == 1 else f"; an estimate, from {repeats.share_kept:.3%} of the contents (--hashes for more)"
    yield f"{name:<16}{repeats.extra:,} of {repeats.samples:,} samples repeat an earlier one ({repeats.share:.2%}){about}"
    for copies, key, text in largest[:3]:
        yield f"{'':<16}{copies:,} x {key} {text[:60]!r}"


def _spark(values: Histogram) -> str:
    """The distribution between least and most, over a logarithmic axis, in one line."""
    bars = values.bars()
    width = min(_SPARK_WIDTH, len(bars))
    heights = [0] * width
    for number, (_, _, count) in enumerate(bars):
        heights[number * width // len(bars)] += count
    top = max(heights)
    return "".join(_SPARKS[-(-height * (len(_SPARKS) - 1) // top)] for height in heights)
