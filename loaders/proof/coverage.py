"""Counts how often each position of an epoch was handed over, and adds up the hashes of the samples there.

    spans of all receipts, in windows of positions -> times handed over -> missing and repeated ranges
    the same through SampleOrder.locate -> samples -> the total of each receipt, and of each complete epoch

Invariant: handed_over = expected - missing - dropped - skipped - unseen + repeated.
Cost: about 0.4 us a sample, a twentieth of it without hashes; memory is a window and the plan.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loaders.order.mask import Held, Substitution
from loaders.order.plan import Ints
from loaders.order.samples import SampleOrder
from loaders.proof.receipt import MODULUS, Receipt, SampleHash, Span, total_of
from loaders.proof.steps import skipped
from loaders.proof.totals import SourceTotals
from wds_tools.format.shards import spread
from wds_tools.storage import join

_WINDOW = 1 << 18
_QUICK_WINDOW = 1 << 22
_TRACED_SAMPLES = 1 << 20
"""Number of missing or repeated samples of an epoch that are traced to their shards."""

_Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class SampleRange:
    """Neighbouring samples of a shard."""

    source: str
    """URL of the dataset."""
    shard: str
    """Name of the shard."""
    first: int
    """Sample index of the first one."""
    last: int
    """Sample index after the last one."""


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Samples of an epoch, by position and by shard. All are counted; of the ranges, the first ones are given."""

    num_samples: int
    """Number of samples."""
    num_position_ranges: int = 0
    """Number of ranges of positions."""
    positions: tuple[tuple[int, int], ...] = ()
    """The first ranges of positions, [low, high)."""
    num_sample_ranges: int = 0
    """Number of ranges of samples in shards, without the untraced ones."""
    sample_ranges: tuple[SampleRange, ...] = ()
    """The first ranges of samples in shards."""
    num_untraced: int = 0
    """Number of samples beyond the first 1,048,576, whose shards were not looked up."""


@dataclass(frozen=True, kw_only=True)
class EpochAudit:
    """What became of an epoch of the sample order."""

    epoch: int
    """Number of the epoch, from 0."""
    expected: int
    """Samples of an epoch."""
    handed_over: int
    """Positions of the epoch that were handed over, each as often as it was."""
    missing: Ranges
    """Positions that were not handed over."""
    repeated: Ranges
    """Positions that were handed over more than once; `num_samples` sums up how often too often."""
    repeated_by: tuple[tuple[str, ...], ...]
    """Names of the receipts that have the first position of each of `repeated.positions`."""
    dropped: int
    """Samples at the end, less than a batch, that last_batch="drop" left out."""
    skipped: int
    """Samples that Loader.skip left out, and that were not handed over otherwise."""
    wrapped: int
    """Samples of the next epoch that filled up a last batch: last_batch="wrap". That epoch has them again."""
    unseen: int
    """Samples at the end that the run, in its last epoch, has not come to."""
    substituted: Mapping[str, int]
    """Number of samples that could not be read and that another stood in for, by reason."""
    substituted_ranges: Ranges
    """Where these samples lie."""

    @property
    def is_exact(self) -> bool:
        """Whether nothing is missing and nothing repeated."""
        return not self.missing.num_samples and not self.repeated.num_samples


class _Handed(NamedTuple):
    """Positions of a window that a receipt has: ranges, ascending and apart."""

    receipt: int
    low: Ints
    high: Ints

    def positions(self) -> Ints:
        return spread(self.low, self.high - self.low)


class Coverage:
    """Counts the epochs of a sample order, one after the other.

    Args:
        order: the sample order that the receipts are of.
        receipts: those that count.
        quick: compare positions only, no hashes.
        show: number of ranges of each kind to give.
        excluded: masks, and the rows (see Mask.rows) that each excludes.
        on_counted: called with the number of further positions that were counted.
    """

    def __init__(
        self,
        order: SampleOrder,
        receipts: Sequence[Receipt],
        *,
        quick: bool = False,
        show: int = 20,
        excluded: Sequence[tuple[Held, Ints]] = (),
        on_counted: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._excluded = excluded
        self._excluded_seen: dict[int, Counter[tuple[int, int, int, int]]] = defaultdict(Counter)
        """Receipt -> (epoch, source, shard, sample index) of excluded samples at its positions, and how often."""
        self._order = order
        self._receipts = receipts
        self._skipped = sorted({bounds for receipt in receipts for bounds in skipped(order.epochs, receipt)})
        self._quick = quick
        self._show = show
        self._on_counted = on_counted
        self._hashes = [SampleHash(fingerprint) for fingerprint in order.fingerprints]
        self._num_samples = [0] * len(receipts)
        self._totals = [0] * len(receipts)
        self._sources = SourceTotals(order, self._hashes)

    def epoch(self, epoch: int, *, may_end_early: bool) -> EpochAudit:
        """Count an epoch.

        Args:
            epoch: number of the epoch.
            may_end_early: whether what comes after its last span is unseen rather than missing.

        Returns:
            Its counts, and the ranges that are missing or repeated.
        """
        length = self._order.epochs.length(epoch)
        spans = [(number, span) for number, receipt in enumerate(self._receipts) for span in receipt.spans if span[0] == epoch]
        base = self._order.epochs.start(epoch)
        left_out = [(low - base, min(high - base, length)) for low, high in self._skipped if low < base + length and high > base]
        last = max(*(span[2] for _, span in spans), *(high for _, high in left_out), 0, 0)
        reached = min(last, length)
        dropped = length - reached if self._is_dropped(epoch, reached) else 0
        unseen = length - reached - dropped if may_end_early else 0
        due = length - dropped - unseen
        missing, repeated = _Collector(self._show), _Collector(self._show)
        handed_over = wrapped = num_skipped = 0
        window, stop = _QUICK_WINDOW if self._quick else _WINDOW, max(length - unseen, last)
        for begin in range(0, stop, window):
            end = min(begin + window, stop)
            handed = [self._handed(number, span, begin, end) for number, span in spans if span[1] < end and span[2] > begin]
            times = _times(handed, begin, end)
            inside = times[: max(length - begin, 0)]
            handed_over += int(inside.sum())
            wrapped += int(times[len(inside) :].sum())
            absent, is_skipped = inside == 0, np.zeros(len(inside), bool)
            for low, high in left_out:
                is_skipped[max(low - begin, 0) : max(high - begin, 0)] = True
            num_skipped += int((absent & is_skipped).sum())
            missing.add(begin, (absent & ~is_skipped)[: max(due - begin, 0)])
            repeated.add(begin, inside > 1, int((inside - 1).clip(0).sum()))
            accounted = (inside > 0) | is_skipped
            accounted[max(due - begin, 0) :] = True
            self._add_up(epoch, begin, end, handed, accounted)
            self._on_counted(end - begin)
        too_often = repeated.ranges(self._order, epoch)
        replaced = [bad for receipt in self._receipts for bad in receipt.substitutions if bad.epoch == epoch]
        return EpochAudit(
            epoch=epoch,
            expected=length,
            handed_over=handed_over,
            missing=missing.ranges(self._order, epoch),
            repeated=too_often,
            repeated_by=tuple(tuple(self._handed_by(spans, low)) for low, _ in too_often.positions),
            dropped=dropped,
            skipped=num_skipped,
            wrapped=wrapped,
            unseen=unseen,
            substituted=dict(sorted(Counter(bad.reason for bad in replaced).items())),
            substituted_ranges=_sample_ranges(self._order, *_columns(replaced), self._show),
        )

    def problems(self) -> list[str]:
        """What is wrong with the sums of receipts whose epochs were all counted."""
        problems = []
        for receipt, num_samples, total in zip(self._receipts, self._num_samples, self._totals, strict=True):
            if receipt.num_samples != num_samples:
                problems.append(f"{receipt.name}: it counts {receipt.num_samples:,} samples, its spans have {num_samples:,}")
            expected = (total - total_of(self._hashes, *_columns(receipt.substitutions))) % MODULUS
            if not self._quick and int(receipt.hash_total, 16) != expected:
                problems.append(
                    f"{receipt.name}: its hashes add up to {receipt.hash_total}, those of the samples in its spans, "
                    f"{len(receipt.substitutions):,} substituted ones aside, to {expected:032x}: "
                    "other samples were handed over than it says, or it was edited"
                )
        for number, receipt in enumerate(self._receipts):
            replaced = Counter((bad.epoch, bad.source, bad.shard, bad.sample_index) for bad in receipt.substitutions)
            given = list((self._excluded_seen[number] - replaced).elements()) + list(self._excluded_stand_ins(receipt))
            for epoch, source, shard, sample_index in given[: self._show]:
                opened = self._order.sources[source]
                name = join(opened.store.url, opened.shards.name(shard))
                problems.append(f"{receipt.name}: epoch {epoch} handed over {name} sample {sample_index}, which is excluded")
            if len(given) > self._show:
                problems.append(f"{receipt.name}: {len(given) - self._show:,} more excluded samples were handed over")
        return problems

    def _excluded_stand_ins(self, receipt: Receipt) -> Iterator[tuple[int, int, int, int]]:
        """Excluded samples that stood in for others in epochs, or in a receipt, that begin no earlier than the mask."""
        starts = [self._order.epochs.start(epoch) + low for epoch, low, _, _ in receipt.spans[:1]]
        for bad in receipt.substitutions:
            begin = max(self._order.epochs.start(bad.epoch), *starts, 0)
            code = (bad.substitute_shard << 32) + bad.substitute_index
            if any(held.source == bad.source and held.position <= begin and code in rows for held, rows in self._excluded):
                yield bad.epoch, bad.source, bad.substitute_shard, bad.substitute_index

    def complete_epochs(self) -> list[tuple[str, int, int]]:
        """(name, total, total by the manifest) of the epochs counted that are complete. For mixtures, of their sources."""
        return self._sources.complete()

    def _is_dropped(self, epoch: int, reached: int) -> bool:
        """Whether a run with last_batch="drop" ended the epoch there: less than its batch is left, now or after a resume."""
        left = self._order.epochs.length(epoch) - reached
        return any(
            receipt.last_batch == "drop"
            and size > left
            and ((number, high) == (epoch, reached) or (number, low) == (epoch + 1, 0))
            for receipt in self._receipts
            for number, low, high, size in receipt.spans
        )

    def _handed(self, number: int, span: Span, begin: int, end: int) -> _Handed:
        """What a span has of the positions begin ... end, which it overlaps: its rank's part of each step."""
        receipt = self._receipts[number]
        steps, count = receipt.steps(span)
        _, start, _, batch_size = span
        first, last = max(min((begin - start) // batch_size, count - 1), 0), min(-((start - end) // batch_size), count)
        offset = np.arange(first, last) * batch_size
        low, high = (bound + offset for bound in steps.part(0, receipt.rank))
        if last == count:  # the only one that may be of another size
            low[-1], high[-1] = steps.part(count - 1, receipt.rank)
        low, high = low.clip(begin, end), high.clip(begin, end)
        is_inside = low < high
        return _Handed(number, low[is_inside], high[is_inside])

    def _handed_by(self, spans: Sequence[tuple[int, Span]], position: int) -> Iterator[str]:
        for number, span in spans:
            if span[1] <= position < span[2] and len(self._handed(number, span, position, position + 1).low):
                yield self._receipts[number].name

    def _add_up(self, epoch: int, begin: int, end: int, handed: Sequence[_Handed], accounted: _Flags) -> None:
        """Add the hashes of a window to the receipts, and those of the accounted positions, once each, to the epochs."""
        for number, low, high in handed:
            self._num_samples[number] += int((high - low).sum())
        if self._quick or not (handed or accounted.any()):
            return
        # A mask begins between batches, also if one is filled up from the next epoch.
        stream = self._order.epochs.start(epoch) + np.minimum(np.arange(begin, end), self._order.epochs.length(epoch) - 1)
        latest, known = len(self._order.generations), {len(self._receipts[number].generations) for number, _, _ in handed}
        columns_of, excluded_of = {}, {}
        for number in known | {latest}:
            columns_of[number] = source, shard, sample_index = self._order.before(number).locate(epoch, np.arange(begin, end))[:3]
            excluded_of[number] = np.zeros(end - begin, bool)
            for held, rows in self._excluded:
                is_held = np.isin((shard << 32) + sample_index, rows) & (source == held.source)
                excluded_of[number] |= is_held & (stream >= held.position)
        for ranges in handed:
            if len(ranges.low):
                inside = ranges.positions() - begin
                number = len(self._receipts[ranges.receipt].generations)
                seen = inside[excluded_of[number][inside]]
                samples = zip(*(column[seen].tolist() for column in columns_of[number]), strict=True)
                self._excluded_seen[ranges.receipt].update((epoch, *sample) for sample in samples)
                self._totals[ranges.receipt] += total_of(self._hashes, *(column[inside] for column in columns_of[number]))
        inside = np.flatnonzero(accounted)
        self._sources.add(epoch, begin + inside, *(column[inside] for column in columns_of[latest]))


class _Collector:
    """Gathers positions of an epoch, in ascending windows."""

    def __init__(self, show: int) -> None:
        self._show = show
        self._num_samples = self._num_ranges = self._num_positions = self._num_traced = 0
        self._ranges: list[tuple[int, int]] = []
        self._end = -1
        self._traced: list[Ints] = [np.zeros(0, np.int64)]

    def add(self, begin: int, chosen: _Flags, num_samples: int | None = None) -> None:
        """Add those of the positions from `begin` on that are chosen; they stand for so many samples, by default one each."""
        positions = np.flatnonzero(chosen) + begin
        if not len(positions):
            return
        self._num_positions += len(positions)
        self._num_samples += len(positions) if num_samples is None else num_samples
        low, high = (bound + begin for bound in runs_of(chosen))
        if low[0] == self._end:  # the last range goes on
            if self._num_ranges == len(self._ranges):
                self._ranges[-1] = self._ranges[-1][0], int(high[0])
            low, high = low[1:], high[1:]
        self._end = int(positions[-1]) + 1
        self._num_ranges += len(low)
        room = self._show - len(self._ranges)
        self._ranges += zip(low[:room].tolist(), high[:room].tolist(), strict=True)
        self._traced.append(positions[: _TRACED_SAMPLES - self._num_traced])
        self._num_traced += len(self._traced[-1])

    def ranges(self, order: SampleOrder, epoch: int) -> Ranges:
        """What was gathered."""
        located = order.locate(epoch, np.concatenate(self._traced))
        return replace(
            _sample_ranges(order, *located[:3], self._show),
            num_samples=self._num_samples,
            num_position_ranges=self._num_ranges,
            positions=tuple(self._ranges),
            num_untraced=self._num_positions - self._num_traced,
        )


def _sample_ranges(order: SampleOrder, source: Ints, shard: Ints, sample_index: Ints, show: int) -> Ranges:
    """These samples as ranges in their shards."""
    ascending = np.lexsort((sample_index, shard, source))
    source, shard, sample_index = source[ascending], shard[ascending], sample_index[ascending]
    is_first = np.ones(len(source), bool)
    is_first[1:] = (np.diff(source) != 0) | (np.diff(shard) != 0) | (np.diff(sample_index) > 1)
    starts = np.flatnonzero(is_first)
    ends = np.append(starts, len(source))[1:]
    ranges = []
    for start, end in zip(starts[:show].tolist(), ends[:show].tolist(), strict=True):
        opened = order.sources[int(source[start])]
        name = opened.shards.name(int(shard[start]))
        first, last = int(sample_index[start]), int(sample_index[end - 1]) + 1
        ranges.append(SampleRange(source=opened.store.url, shard=name, first=first, last=last))
    return Ranges(num_samples=len(source), num_sample_ranges=len(starts), sample_ranges=tuple(ranges))


def _columns(substitutions: Sequence[Substitution]) -> tuple[Ints, Ints, Ints]:
    """Source, shard and sample index of each that was replaced."""
    table = np.array([(bad.source, bad.shard, bad.sample_index) for bad in substitutions], np.int64)
    source, shard, sample_index = table.reshape(-1, 3).T
    return source, shard, sample_index


def _times(handed: Sequence[_Handed], begin: int, end: int) -> Ints:
    """How often each of the positions begin ... end was handed over."""
    change = np.zeros(end - begin + 1, np.int64)
    for _, low, high in handed:  # one span's ranges are apart, so no bound stands twice
        change[low - begin] += 1
        change[high - begin] -= 1
    return np.cumsum(change[:-1])


def runs_of(chosen: _Flags) -> tuple[Ints, Ints]:
    """Where the runs of True begin and end."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    return edges[::2], edges[1::2]
