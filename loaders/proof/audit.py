"""Receipts against manifests: what became of every sample of every epoch.

    receipts -> those that count -> the SampleOrder that all of them name, over the manifests
    -> Coverage: each epoch counted by position, each receipt and each complete epoch added up -> Audit

A receipt names positions, the order says which samples they are, the manifest's fingerprint what their hashes are: no shard
and no index is read.
Cost: see coverage.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import orjson

from loaders.order.generations import Generation
from loaders.order.mask import Held
from loaders.order.plan import Ints
from loaders.order.samples import SampleOrder
from loaders.proof.coverage import Coverage, EpochAudit, runs_of
from loaders.proof.data import open_order, read_masks
from loaders.proof.receipt import Receipt, Span, parse_receipt
from loaders.proof.saves import newest_save
from loaders.world import World
from wds_tools.errors import FormatError, UsageError
from wds_tools.storage import join, open_store, split_url


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Result of an audit."""

    num_receipts: int
    """Number of receipts that count."""
    superseded: tuple[tuple[str, str], ...]
    """(receipt that does not count, the later one of the same run that contains it)."""
    absent: tuple[str, ...]
    """Ranks of which there is no receipt where others of their world have one."""
    epochs: tuple[EpochAudit, ...]
    """Each epoch from the first to the last that receipts name."""
    problems: tuple[str, ...]
    """Receipts and epochs whose hashes do not add up."""
    excluded: tuple[tuple[str, int, int], ...]
    """(source, position from which they were excluded, number of samples) of each mask that was compared."""
    totals_compared: int
    """Number of complete epochs (of a mixture: of its sources) whose hashes were compared with the manifest's."""

    def is_exact(self, epoch: int | None = None) -> bool:
        """Whether all adds up and nothing is missing or repeated: in one epoch, or by default in all."""
        return not self.problems and all(audited.is_exact for audited in self.epochs if epoch in (None, audited.epoch))


def read_receipts(urls: Sequence[str]) -> list[Receipt]:
    """Read receipts.

    Args:
        urls: URLs of .json files, of folders of them, or of folders with saves, of which the newest counts.

    Raises:
        NotFound: a file does not exist.
        FormatError: a file is not a receipt.
        UsageError: a folder has neither saves nor .json files, or a receipt is of another version.
    """
    receipts = []
    for url in urls:
        if url.endswith(".json"):
            folder, name = split_url(url)
            store, names = open_store(folder), [name]
        else:
            store = open_store(url)
            if save := newest_save(store, World()):
                found = enumerate(save.receipts(store))
                receipts += [parse_receipt(orjson.dumps(receipt), f"{where}, entry {n}") for n, (where, receipt) in found]
                continue
            names = [entry.name for entry in store.list() if entry.name.endswith(".json")]
        if not names:
            raise UsageError(f"{store.url}: no saves, no .json files: expected what loader.save(folder) writes, or receipts")
        receipts += [parse_receipt(store.read(name), join(store.url, name)) for name in names]
    return receipts


def num_positions(receipts: Sequence[Receipt], *, complete: bool = False) -> int:
    """Number of positions that `audit` counts, over all epochs: the total of its progress.

    Args:
        receipts, complete: see `audit`.
    """
    ends: dict[int, int] = defaultdict(int)
    for receipt in receipts:
        for epoch, _, high, _ in receipt.spans:
            ends[epoch] = max(ends[epoch], high)
    if not ends:
        return 0
    epochs, last = _latest(receipts).epochs, max(ends)
    return sum(
        ends[epoch] if epoch == last and not complete else max(ends.get(epoch, 0), epochs.length(epoch))
        for epoch in range(last + 1)
    )


def audit(
    receipts: Sequence[Receipt],
    moved: Sequence[str] = (),
    *,
    exclude: str | None = None,
    complete: bool = False,
    quick: bool = False,
    show: int = 20,
    on_counted: Callable[[int], None] = lambda _: None,
) -> Audit:
    """Compare receipts with the manifests of their sources.

    Args:
        receipts: receipts of all ranks and restarts, in any order. One that a later one of its run contains does not count.
        moved: URLs of sources that are no longer at the URL of the receipts; recognised by their fingerprints.
        exclude: file of keys that the run excluded (Source.exclude): no span from there on may have handed one over.
        complete: whether the last epoch has to be complete too.
        quick: compare positions only, no hashes.
        show: number of ranges to give of each kind.
        on_counted: called with the number of further positions that were counted, of num_positions.

    Returns:
        What became of every sample of every epoch.

    Raises:
        UsageError: the receipts are of different data or orders, or the data is not theirs.
        FormatError: a receipt or a manifest is damaged.
        NotFound: a source has no manifest.
    """
    if not receipts:
        raise UsageError("no receipts to audit")
    latest = _latest(receipts)
    _check_alike(receipts, latest)
    order = open_order(latest, moved, latest.name)
    _check_substitutions(receipts, order)
    counted, superseded = _last_of_runs(receipts)
    if exclude and quick:
        raise UsageError("quick compares positions only: what is excluded are samples")
    excluded, unproved = _excluded(receipts, order, exclude) if exclude else ([], [])
    coverage = Coverage(order, counted, quick=quick, show=show, excluded=excluded, on_counted=on_counted)
    named = {epoch for receipt in counted for epoch, *_ in receipt.spans}
    epochs = range(max(named, default=-1) + 1)  # from the first on: of those before the receipts nothing is known to be seen
    audited = tuple(coverage.epoch(epoch, may_end_early=epoch == epochs[-1] and not complete) for epoch in epochs)
    totals = coverage.complete_epochs()
    broken = [
        f"{name}: its samples' hashes add up to {total:032x}, the manifest's to {expected:032x}: this order is not a bijection"
        for name, total, expected in totals
        if total != expected
    ]
    return Audit(
        num_receipts=len(counted),
        superseded=superseded,
        absent=tuple(_absent_ranks(counted)),
        epochs=audited,
        problems=(*coverage.problems(), *broken, *unproved),
        totals_compared=len(totals),
        excluded=tuple((order.sources[held.source].store.url, held.position, len(rows)) for held, rows in excluded),
    )


def _excluded(receipts: Sequence[Receipt], order: SampleOrder, exclude: str) -> tuple[list[tuple[Held, Ints]], list[str]]:
    """The masks of the receipts with the rows that they exclude, and sentences about keys that none of them has."""
    held_masks = sorted({held for receipt in receipts for held in receipt.masks})
    if not held_masks:
        raise UsageError(f"no receipt says that the run excluded {exclude}: it shows nothing about its samples")
    masks = read_masks(held_masks, order, exclude)
    excluded = [(held, masks[held.source].rows(held.num_ids)) for held in held_masks]
    unproved = []
    for number, mask in masks.items():
        largest = max((len(rows) for held, rows in excluded if held.source == number), default=0)
        if rest := len(mask.rows(len(mask.ids))) - largest:
            name = order.sources[number].name
            unproved.append(f"{rest:,} samples of {name} are in {exclude}, but no receipt says that they were excluded")
    return excluded, unproved


def _latest(receipts: Sequence[Receipt]) -> Receipt:
    """The one that knows all generations of the run."""
    return max(receipts, key=lambda receipt: len(receipt.generations))


def _check_alike(receipts: Sequence[Receipt], latest: Receipt) -> None:
    """Raise UsageError unless all are of one order over the same data, and each has spans of its own generations only."""
    for receipt in receipts:
        differing = [
            what
            for generation, wanted in zip(receipt.generations, latest.generations, strict=False)
            for what in _differences(generation, wanted)
        ]
        if differing:
            raise UsageError(
                f"{receipt.name} is of another run than {latest.name}: {'; '.join(differing)}: audit each run by itself"
            )
        change = [each.position for each in latest.generations[len(receipt.generations) :]][:1]
        ends = [receipt.epochs.start(epoch) + min(high, receipt.epochs.length(epoch)) for epoch, _, high, _ in receipt.spans]
        if change and max(ends, default=0) > change[0]:
            raise UsageError(
                f"{receipt.name} has positions up to {max(ends):,}, but the run went on from {change[0]:,} with another order: "
                "audit the receipts that belong to the checkpoints it went on from"
            )


def _differences(generation: Generation, wanted: Generation) -> Iterator[str]:
    if (generation.position, generation.step) != (wanted.position, wanted.step):
        yield f"it changed at position {generation.position:,}, not {wanted.position:,}"
    yield from (f"{name} is {value!r}, not {other!r}" for name, value, other in generation.spec.differences(wanted.spec))
    for number, origins in enumerate(zip_longest(generation.sources, wanted.sources)):
        fingerprint, other = (origin and origin.fingerprint for origin in origins)
        if fingerprint != other:
            yield f"fingerprint of source {number} is {fingerprint!r}, not {other!r}"


def _check_substitutions(receipts: Sequence[Receipt], order: SampleOrder) -> None:
    """Raise FormatError unless every sample that was replaced is in the data."""
    shards = [opened.shards for opened in order.sources]
    for receipt in receipts:
        for bad in receipt.substitutions:
            for shard, sample_index in (bad.shard, bad.sample_index), (bad.substitute_shard, bad.substitute_index):
                is_known = bad.source < len(shards) and shard < len(shards[bad.source])
                if not is_known or sample_index >= shards[bad.source][shard].samples:
                    raise FormatError(
                        f"{receipt.name}: it names source {bad.source}, shard {shard}, sample {sample_index}, which its data "
                        "does not have"
                    )


def _last_of_runs(receipts: Sequence[Receipt]) -> tuple[list[Receipt], tuple[tuple[str, str], ...]]:
    """The receipts that count, and (name, name of the later one) of those that don't.

    A receipt that a loader writes at a later checkpoint contains its earlier ones: of receipts with the same run, rank,
    world and last_batch, one whose spans begin those of another does not count.
    """
    runs: dict[object, list[Receipt]] = defaultdict(list)
    for receipt in receipts:
        start = receipt.spans[:1] and receipt.spans[0][:2]
        runs[receipt.run, receipt.rank, receipt.world_size, receipt.last_batch, start].append(receipt)
    counted, superseded = [], []
    for members in runs.values():
        last: list[Receipt] = []
        for receipt in sorted(members, key=_num_positions, reverse=True):
            later = next((other for other in last if _begins_with(other.spans, receipt.spans)), None)
            if later is None:
                last.append(receipt)
            else:
                superseded.append((receipt.name, later.name))
        counted += last
    return sorted(counted, key=lambda receipt: receipt.name), tuple(sorted(superseded))


def _num_positions(receipt: Receipt) -> int:
    """Positions that its spans have, over all ranks."""
    return sum(high - low for _, low, high, _ in receipt.spans)


def _begins_with(spans: Sequence[Span], first: Sequence[Span]) -> bool:
    """Whether a loader that had handed over `first` may since have handed over `spans`."""
    if not first or len(first) > len(spans):
        return not first
    same, (epoch, low, high, batch_size), later = len(first) - 1, first[-1], spans[len(first) - 1]
    return spans[:same] == first[:same] and later == (epoch, low, max(high, later[2]), batch_size)


def _absent_ranks(receipts: Sequence[Receipt]) -> Iterator[str]:
    """A sentence about each group of ranks without a receipt of spans that other ranks of their world began."""
    starts: dict[tuple[int, int, int, int], set[int]] = defaultdict(set)
    for receipt in receipts:
        for epoch, low, _, batch_size in receipt.spans:
            starts[epoch, low, batch_size, receipt.world_size].add(receipt.rank)
    for (epoch, low, _, world_size), ranks in sorted(starts.items()):
        if len(ranks) < world_size:
            absent = np.ones(world_size, bool)
            absent[list(ranks)] = False
            ranges = [f"{low}" if high - low == 1 else f"{low}-{high - 1}" for low, high in zip(*runs_of(absent), strict=True)]
            yield f"no receipt of rank {', '.join(ranges)} of {world_size} for epoch {epoch} from position {low:,}"
