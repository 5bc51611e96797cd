"""Counts how often each position of an epoch was handed over, and adds up the hashes of the samples behind them.

    spans of all receipts, in chunks of positions -> times handed over -> missing and repeated ranges
    the same through SampleOrder.locate -> samples -> the total of each receipt, and of each complete epoch

Invariant: handed_over = expected - missing - dropped - unseen + repeated.
Cost: about 0.4 us a sample, a twentieth of it without hashes; memory is a chunk and the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loaders.order.mix import Mixture
from loaders.order.plan import Ints
from loaders.order.samples import SampleOrder
from loaders.proof.receipt import MODULUS, Receipt, SampleHash, Span, total_of

_CHUNK = 1 << 18
_QUICK_CHUNK = 1 << 22
_NAMED_SAMPLES = 1 << 20
"""So many missing or repeated samples of an epoch are traced to their rows."""

_Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class SampleRange:
    """Rows [first, last) of a shard."""

    source: str
    """URL of the dataset."""
    shard: str
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Samples of an epoch, by position and by row. All are counted; of the ranges, the first ones are given."""

    samples: int
    num_ranges: int = 0
    """Ranges of positions that there are."""
    positions: tuple[tuple[int, int], ...] = ()
    """The first of them: [low, high)."""
    num_row_ranges: int = 0
    """Ranges of rows that there are, without the untraced."""
    rows: tuple[SampleRange, ...] = ()
    """The first of them."""
    untraced: int = 0
    """Samples beyond the first 1,048,576, whose rows were not looked up."""


@dataclass(frozen=True, kw_only=True)
class EpochAudit:
    """What became of an epoch of the stream."""

    epoch: int
    expected: int
    """Samples that it has."""
    handed_over: int
    """Its positions that were handed over, each as often as it was."""
    missing: Ranges
    repeated: Ranges
    """Positions that were handed over more than once; `samples` is how often too often, in all."""
    repeated_by: tuple[tuple[str, ...], ...]
    """The receipts behind the first position of each of `repeated.positions`."""
    dropped: int
    """Samples at the end, less than a batch, that last_batch="drop" left out."""
    wrapped: int
    """Samples of the next epoch that filled up a last batch: last_batch="wrap". That epoch has them again."""
    unseen: int
    """Samples at the end that the run, in its last epoch, has not come to."""
    substituted: Mapping[str, int]
    """Samples that could not be read and that another stood in for, by reason."""
    substituted_rows: Ranges

    @property
    def is_exact(self) -> bool:
        """Whether nothing is missing and nothing repeated."""
        return not self.missing.samples and not self.repeated.samples


class _Handed(NamedTuple):
    """Positions of a chunk that a receipt has: ranges, ascending and apart."""

    receipt: int
    low: Ints
    high: Ints

    def positions(self) -> Ints:
        sizes = self.high - self.low
        ends = np.cumsum(sizes)
        positions: Ints = np.arange(ends[-1]) + np.repeat(self.low - (ends - sizes), sizes)
        return positions


class Coverage:
    """Counts epochs of a stream, one after the other.

    Args:
        stream: what the receipts are of.
        receipts: those that count.
        quick: positions only, no hashes.
        show: how many ranges of a kind to give.
        on_counted: told how many more positions were counted.
    """

    def __init__(
        self,
        order: SampleOrder,
        receipts: Sequence[Receipt],
        *,
        quick: bool = False,
        show: int = 20,
        on_counted: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._order = order
        self._receipts = receipts
        self._quick = quick
        self._show = show
        self._on_counted = on_counted
        self._hashes = [SampleHash(fingerprint) for fingerprint in order.fingerprints]
        self._num_samples = [0] * len(receipts)
        self._totals = [0] * len(receipts)
        self._sources = _SourceTotals(order, self._hashes)

    def epoch(self, epoch: int, *, may_end_early: bool) -> EpochAudit:
        """Count an epoch.

        Args:
            epoch: which.
            may_end_early: what comes behind its last span is unseen rather than missing.
        """
        length = self._order.length
        spans = [(number, span) for number, receipt in enumerate(self._receipts) for span in receipt.spans if span[0] == epoch]
        last = max((span[2] for _, span in spans), default=0)
        reached = min(last, length)
        dropped = length - reached if self._is_dropped(epoch, reached) else 0
        unseen = length - reached - dropped if may_end_early else 0
        due = length - dropped - unseen
        missing, repeated = _Collector(self._show), _Collector(self._show)
        handed_over = wrapped = 0
        chunk, stop = _QUICK_CHUNK if self._quick else _CHUNK, max(length - unseen, last)
        for begin in range(0, stop, chunk):
            end = min(begin + chunk, stop)
            handed = [self._handed(number, span, begin, end) for number, span in spans if span[1] < end and span[2] > begin]
            times = _times(handed, begin, end)
            inside = times[: max(length - begin, 0)]
            handed_over += int(inside.sum())
            wrapped += int(times[len(inside) :].sum())
            missing.add(begin, times[: max(due - begin, 0)] == 0)
            repeated.add(begin, inside > 1, int((inside - 1).clip(0).sum()))
            accounted = inside > 0
            accounted[max(due - begin, 0) :] = True
            self._add_up(epoch, begin, end, handed, accounted)
            self._on_counted(end - begin)
        too_often = repeated.ranges(self._order, epoch)
        bad = [one for receipt in self._receipts for one in receipt.substitutions if one[0] == epoch]
        return EpochAudit(
            epoch=epoch,
            expected=length,
            handed_over=handed_over,
            missing=missing.ranges(self._order, epoch),
            repeated=too_often,
            repeated_by=tuple(tuple(self._handed_by(spans, low)) for low, _ in too_often.positions),
            dropped=dropped,
            wrapped=wrapped,
            unseen=unseen,
            substituted=dict(sorted(Counter(reason for *_, reason in bad).items())),
            substituted_rows=_row_ranges(self._order, *_columns(bad), self._show),
        )

    def problems(self) -> list[str]:
        """What is wrong with the sums of receipts whose epochs were all counted."""
        found = []
        for receipt, num_samples, total in zip(self._receipts, self._num_samples, self._totals, strict=True):
            if receipt.num_samples != num_samples:
                found.append(f"{receipt.name}: it counts {receipt.num_samples:,} samples, its spans have {num_samples:,}")
            expected = (total - total_of(self._hashes, *_columns(receipt.substitutions))) % MODULUS
            if not self._quick and receipt.hash_total != expected:
                found.append(
                    f"{receipt.name}: its hashes add up to {receipt.hash_total:032x}, those of the samples in its spans, "
                    f"{len(receipt.substitutions):,} substituted ones aside, to {expected:032x}: "
                    "other samples were handed over than it says, or it was edited"
                )
        return found

    def complete_epochs(self) -> list[tuple[str, int, int]]:
        """(name, total, total by the manifest) of the epochs counted that are complete. For mixtures, of their sources."""
        return self._sources.complete()

    def _is_dropped(self, epoch: int, reached: int) -> bool:
        """Whether a run with last_batch="drop" ended the epoch here: less than its batch is left, now or after a resume."""
        left = self._order.length - reached
        return any(
            receipt.last_batch == "drop" and batch_size > left and ((of, high) == (epoch, reached) or (of, low) == (epoch + 1, 0))
            for receipt in self._receipts
            for of, low, high, batch_size in receipt.spans
        )

    def _handed(self, number: int, span: Span, begin: int, end: int) -> _Handed:
        """What a span has of the positions begin ... end, which it overlaps: its rank's part of each step."""
        receipt = self._receipts[number]
        steps, count = receipt.steps(span)
        _, start, _, batch_size = span
        first, last = max(min((begin - start) // batch_size, count - 1), 0), min(-((start - end) // batch_size), count)
        offset = np.arange(first, last) * batch_size
        low, high = (bound + offset for bound in steps.part(0, receipt.world.rank))
        if last == count:  # the only one that may be of another size
            low[-1], high[-1] = steps.part(count - 1, receipt.world.rank)
        low, high = low.clip(begin, end), high.clip(begin, end)
        here = low < high
        return _Handed(number, low[here], high[here])

    def _handed_by(self, spans: Sequence[tuple[int, Span]], position: int) -> Iterator[str]:
        for number, span in spans:
            if span[1] <= position < span[2] and len(self._handed(number, span, position, position + 1).low):
                yield self._receipts[number].name

    def _add_up(self, epoch: int, begin: int, end: int, handed: Sequence[_Handed], accounted: _Flags) -> None:
        """Add the hashes of a chunk to the receipts, and those of the accounted positions, once each, to the epochs."""
        for number, low, high in handed:
            self._num_samples[number] += int((high - low).sum())
        if self._quick or not (handed or accounted.any()):
            return
        located = self._order.locate(epoch, np.arange(begin, end))
        for one in handed:
            if len(one.low):
                at = one.positions() - begin
                self._totals[one.receipt] += total_of(self._hashes, located.source[at], located.shard[at], located.row[at])
        at = np.flatnonzero(accounted)
        self._sources.add(epoch, begin + at, located.source[at], located.shard[at], located.row[at])


class _SourceTotals:
    """Number and hashes of the samples that each epoch of each source has come to.

    Sources without weights are one, whose epochs are the stream's.
    """

    def __init__(self, order: SampleOrder, hashes: Sequence[SampleHash]) -> None:
        self._order = order
        self._hashes = hashes
        self._limits, self._repeat = order.recipe["max_samples"], order.recipe["repeat"]
        weights = order.recipe["weights"]
        sizes = [limit or opened.manifest.samples for limit, opened in zip(self._limits, order.sources, strict=True)]
        self._sizes = sizes if weights else [order.length]
        schedule = list(zip(order.recipe["from_positions"], weights or (), strict=False))
        self._mixture = Mixture(sizes, order.spec.lanes, schedule) if weights else None
        self._found: dict[tuple[int, int], tuple[int, int]] = {}

    def add(self, epoch: int, positions: Ints, source: Ints, shard: Ints, row: Ints) -> None:
        """Positions of an epoch of the stream, none of them twice, and where they lead."""
        if self._mixture is None:
            self._add((0, epoch), len(row), total_of(self._hashes, source, shard, row))
            return
        its_epoch = self._mixture.locate(epoch * self._order.length + positions).epoch
        for number, hashed in enumerate(self._hashes):
            for turn in np.unique(its_epoch[source == number]).tolist():
                here = (source == number) & (its_epoch == turn)
                self._add((number, turn), int(here.sum()), hashed.total(shard[here], row[here]))

    def _add(self, place: tuple[int, int], count: int, total: int) -> None:
        before, sum_before = self._found.get(place, (0, 0))
        self._found[place] = before + count, (sum_before + total) % MODULUS

    def complete(self) -> list[tuple[str, int, int]]:
        """(name, total, total by the manifest) of complete epochs of sources that are used in full."""
        full = [place for place, (count, _) in sorted(self._found.items()) if count == self._sizes[place[0]]]
        if self._mixture is None:
            names, full = ["the stream"], [] if any(self._limits) else full
            totals = {0: sum(times * self._total_of(number) for number, times in enumerate(self._repeat))} if full else {}
        else:
            names, full = [opened.name for opened in self._order.sources], [at for at in full if not self._limits[at[0]]]
            totals = {number: self._total_of(number) for number in {number for number, _ in full}}
        return [(f"epoch {at[1]} of {names[at[0]]}", self._found[at][1], totals[at[0]] % MODULUS) for at in full]

    def _total_of(self, number: int) -> int:
        """The sum of the hashes of all samples of a source, by its manifest."""
        before = np.cumsum([0, *(row.samples for row in self._order.sources[number].manifest.shards)])
        total = 0
        for begin in range(0, int(before[-1]), _CHUNK):
            at = np.arange(begin, min(begin + _CHUNK, int(before[-1])))
            shard = np.searchsorted(before, at, "right") - 1
            total += self._hashes[number].total(shard, at - before[shard])
        return total


class _Collector:
    """Gathers positions of an epoch, in ascending chunks."""

    def __init__(self, show: int) -> None:
        self._show = show
        self._samples = self._num_ranges = self._num_positions = self._num_traced = 0
        self._ranges: list[tuple[int, int]] = []
        self._end = -1
        self._traced: list[Ints] = [np.zeros(0, np.int64)]

    def add(self, begin: int, chosen: _Flags, samples: int | None = None) -> None:
        """Those of the positions from `begin` on that are chosen; they stand for so many samples, by default one each."""
        at = np.flatnonzero(chosen) + begin
        if not len(at):
            return
        self._num_positions += len(at)
        self._samples += len(at) if samples is None else samples
        low, high = (bound + begin for bound in runs_of(chosen))
        if low[0] == self._end:  # the last range goes on
            if self._num_ranges == len(self._ranges):
                self._ranges[-1] = self._ranges[-1][0], int(high[0])
            low, high = low[1:], high[1:]
        self._end = int(at[-1]) + 1
        self._num_ranges += len(low)
        room = self._show - len(self._ranges)
        self._ranges += zip(low[:room].tolist(), high[:room].tolist(), strict=True)
        self._traced.append(at[: _NAMED_SAMPLES - self._num_traced])
        self._num_traced += len(self._traced[-1])

    def ranges(self, order: SampleOrder, epoch: int) -> Ranges:
        """What was gathered."""
        located = order.locate(epoch, np.concatenate(self._traced))
        return replace(
            _row_ranges(order, located.source, located.shard, located.row, self._show),
            samples=self._samples,
            num_ranges=self._num_ranges,
            positions=tuple(self._ranges),
            untraced=self._num_positions - self._num_traced,
        )


def _row_ranges(order: SampleOrder, source: Ints, shard: Ints, row: Ints, show: int) -> Ranges:
    """These samples as ranges of rows."""
    ascending = np.lexsort((row, shard, source))
    source, shard, row = source[ascending], shard[ascending], row[ascending]
    new = np.ones(len(row), bool)
    new[1:] = (np.diff(source) != 0) | (np.diff(shard) != 0) | (np.diff(row) > 1)
    starts = np.flatnonzero(new)
    ends = np.append(starts, len(row))[1:]
    rows = []
    for start, end in zip(starts[:show].tolist(), ends[:show].tolist(), strict=True):
        opened = order.sources[int(source[start])]
        name = opened.manifest.shards[int(shard[start])].name
        rows.append(SampleRange(source=opened.store.url, shard=name, first=int(row[start]), last=int(row[end - 1]) + 1))
    return Ranges(samples=len(row), num_row_ranges=len(starts), rows=tuple(rows))


def _columns(substitutions: Sequence[tuple[int, int, int, int, str]]) -> tuple[Ints, Ints, Ints]:
    """Source, shard and row of each."""
    source, shard, row = np.array([one[1:4] for one in substitutions], np.int64).reshape(-1, 3).T
    return source, shard, row


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
