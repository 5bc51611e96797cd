"""`wds-tools audit`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from loaders.proof.audit import Audit, audit, num_positions, read_receipts
from loaders.proof.coverage import EpochAudit, Ranges
from wds_tools.cli.options import Positional
from wds_tools.cli.summary import Printed, show
from wds_tools.errors import UsageError
from wds_tools.run.progress import Advance, Progress, Shown
from wds_tools.storage import join
from wds_tools.terminal import counted, from_to

EXAMPLE = "wds-tools audit s3://bucket/run-7 --complete"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, Shown):
    """Compare the receipts of a training run with the manifests: every sample of an epoch must be used once.

    Exit status 1 if anything is missing or repeated."""

    input: Positional[tuple[str, ...]]
    """Folders or URLs with saves of a loader, of which the newest counts; or the receipts of all ranks and restarts, as .json
    files or folders of these."""
    epoch: int | None = None
    """Report only this epoch. Receipts are still added up over all epochs."""
    source: tuple[str, ...] = ()
    """Where data of the run lies that is no longer at the URL in the receipts. It is recognised by its fingerprint."""
    exclude: str | None = None
    """File of keys that the run excluded with Source(exclude=...): prove that none of their samples was used after that."""
    complete: bool = False
    """The last epoch must also be complete; by default, it may be unfinished."""
    quick: bool = False
    """Compare only positions, without adding up the hashes of the samples: half a minute for 100 million."""
    show: int = 20
    """Ranges to list of each kind; others are only counted. With --json they are [first, after the last]."""

    def __post_init__(self) -> None:
        if not self.input:
            raise UsageError("name the receipts of the run: files or folders")
        if self.show < 0:
            raise UsageError(f"--show {self.show}: 0 or more")


def run(config: Config) -> int:
    """Audit, and list what is missing or repeated."""
    receipts = read_receipts(config.input)
    with Progress("audit", num_positions(receipts, complete=config.complete), quiet=config.quiet) as progress:
        result = audit(
            receipts,
            config.source,
            exclude=config.exclude,
            complete=config.complete,
            quick=config.quick,
            show=config.show,
            on_counted=lambda count: progress(Advance(units=count, samples=count)),
        )
    epochs = [audited for audited in result.epochs if config.epoch in (None, audited.epoch)]
    if not epochs:
        named = f"{result.epochs[0].epoch} to {result.epochs[-1].epoch}" if result.epochs else "none: nothing was handed over"
        raise UsageError(f"no epoch {config.epoch or 0} in these receipts; they have {named}")
    is_exact = result.is_exact(config.epoch)
    wrong = sum(not audited.is_exact for audited in epochs)
    lines = [
        *_describe_receipts(result, config),
        *(line for audited in epochs for line in _describe(audited)),
        *(f"WRONG     {problem}" for problem in result.problems),
        "audit: all is well"
        if is_exact
        else f"audit: {counted(wrong, 'epoch')} not exact, {counted(len(result.problems), 'wrong total')}",
    ]
    show(config, {**asdict(result), "epochs": [asdict(audited) for audited in epochs], "is_exact": is_exact}, lines)
    return 0 if is_exact else 1


def _describe_receipts(result: Audit, config: Config) -> Iterator[str]:
    yield f"receipts  {result.num_receipts:,}" + (
        f", {len(result.superseded):,} more that later ones of the same loader contain" if result.superseded else ""
    )
    hidden = max(len(result.superseded) - config.show, 0)
    yield from (f"          {earlier} is contained in {later}" for earlier, later in result.superseded[: config.show])
    yield from [f"          and {hidden:,} more"] * (hidden > 0)
    yield (
        "hashes    not compared (--quick)"
        if config.quick
        else f"hashes    of all receipts and {counted(result.totals_compared, 'complete epoch')}, compared with the manifests"
    )
    yield from (
        f"excluded  {count:,} samples of {url}: compared with what was handed over from position {position:,} on"
        for url, position, count in result.excluded
    )
    yield from (f"ABSENT    {what}" for what in result.absent[: config.show])
    hidden = max(len(result.absent) - config.show, 0)
    yield from [f"          and {hidden:,} more"] * (hidden > 0)


def _describe(audited: EpochAudit) -> Iterator[str]:
    counts = {
        "expected": audited.expected,
        "handed over": audited.handed_over,
        "missing": audited.missing.num_samples,
        "repeated": audited.repeated.num_samples,
        "dropped": audited.dropped,
        "skipped": audited.skipped,
        "wrapped": audited.wrapped,
        "substituted": sum(audited.substituted.values()),
    }
    verdict = "NOT exact" if not audited.is_exact else "exact"
    seen = f" up to position {audited.expected - audited.unseen:,}, {audited.unseen:,} to come" if audited.unseen else ""
    yield f"epoch {audited.epoch:<3} {', '.join(f'{count:,} {what}' for what, count in counts.items())}: {verdict}{seen}"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in audited.substituted.items())
    yield from _describe_ranges(f"MISSING   epoch {audited.epoch}", audited.missing, ())
    yield from _describe_ranges(f"REPEATED  epoch {audited.epoch}", audited.repeated, audited.repeated_by)
    yield from _describe_ranges(f"REPLACED  epoch {audited.epoch} ({reasons})", audited.substituted_ranges, ())


def _describe_ranges(title: str, ranges: Ranges, by: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    if not ranges.num_samples:
        return
    yield f"{title}: {ranges.num_samples:,} samples"
    for number, (low, high) in enumerate(ranges.positions):
        yield f"          position {from_to(low, high)}" + (f", by {' and '.join(by[number])}" if by else "")
    if hidden := ranges.num_position_ranges - len(ranges.positions):
        yield f"          and {hidden:,} more ranges of positions"
    for samples in ranges.sample_ranges:
        yield f"          {join(samples.source, samples.shard)} sample {from_to(samples.first, samples.last)}"
    if hidden := ranges.num_sample_ranges - len(ranges.sample_ranges):
        yield f"          and {hidden:,} more ranges of samples"
    if ranges.num_untraced:
        yield f"          and {ranges.num_untraced:,} more samples, whose shards were not looked up"
