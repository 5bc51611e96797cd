"""What a run handed over at a step, and when it handed over a sample: by arithmetic, from one state or receipt.

    step -> its span -> positions -> SampleOrder.locate -> samples, those that stood in for excluded ones in their stead
    samples -> each span of the run -> SampleOrder.positions_of -> positions -> steps and ranks

Invariant: `seen` is the inverse of `at`, and `at` is what the loaders handed over. What no state says: samples that could not be
read and were substituted (`on_error="substitute"`), which receipts list by themselves.
Cost: plans of the epochs asked about (order.plan), and a few operations for each span; no shard is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from loaders.order.generations import Origin
from loaders.order.mask import Mask
from loaders.order.plan import Ints
from loaders.order.samples import SampleOrder
from loaders.proof.data import open_order, read_masks
from loaders.proof.receipt import parse_receipt
from loaders.proof.state import Record, Start, read_state
from loaders.proof.steps import history
from wds_tools.errors import UsageError
from wds_tools.format.typed_json import read_json, shape
from wds_tools.storage import open_store, split_url


class Place(NamedTuple):
    """Where a sample lies."""

    source: int
    """Number of its source in the run."""
    shard: int
    """Number of the shard in the source."""
    sample_index: int
    """Number of the sample in the shard."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What was handed over at a step of the training."""

    step: int
    is_to_come: bool
    """Whether the run had not come to it yet."""
    epoch: int
    position: int
    """Position of the stream of its first sample."""
    start: Start
    """The start of the run that made it: batch size, ranks."""
    ranks: Sequence[int]
    """(B,) rank of each sample."""
    places: Sequence[Place]
    """(B,) where it lies."""
    excluded: int
    """Number of these that stood in for excluded samples."""


class Seen(NamedTuple):
    """A sample was handed over."""

    sample: int
    """Number of the sample among those asked about."""
    epoch: int
    step: int
    rank: int
    world_size: int


class Run:
    """The steps of a run.

    Args:
        record: a state or receipt of it.
        order: of the run, as open_order makes it.
        exclude: the file of keys that it excluded; needed for steps behind that only.

    Raises:
        UsageError: the run excluded other keys.
    """

    def __init__(self, record: Record, order: SampleOrder, exclude: str | None = None) -> None:
        self.record = record
        self.order = order
        self.origins: Sequence[Origin] = record.generations[-1].sources
        """The sources, as the record has them."""
        self.names = [origin.name or origin.url for origin in self.origins]
        """Of the sources, as batches have them in `__source__`."""
        if exclude and not record.masks:
            raise UsageError(f"the run has not excluded {exclude}, nor any other keys")
        self._masks = read_masks(record.masks, order, exclude) if exclude else {}

    @classmethod
    def open(cls, url: str, moved: Sequence[str] = (), exclude: str | None = None) -> Run:
        """Read a state, that of an EpochLoader or of a save too, or a receipt, from its JSON file, and the manifests of its data.

        Args:
            url: the file.
            moved: URLs of sources that are no longer where the record has them.
            exclude: see Run.

        Raises:
            NotFound: there is no such file, or no manifest.
            UsageError, FormatError: it is neither, or of rows or samples that no steps can be told of; see open_order.
        """
        folder, name = split_url(url)
        data = open_store(folder).read(name)
        document = read_json(dict[str, Any], data, f"{url}: not a state or a receipt of a loader")
        if "spans" in document:
            record: Record = parse_receipt(data, url)
        else:
            inner = document.get("loader", document.get("state", document))
            state = shape(dict[str, Any], inner, f"{url}: not the state of a loader")
            record = saved = read_state(state)
            if "packing" in state:
                raise UsageError(
                    f"{url}: rows were packed on the fly: which samples are in one depends on how far its lane had read at that "
                    "step, and a state knows that of its own step only; rows packed ahead (`wds-tools pack`) can be asked about"
                )
            if saved.epoch is not None:
                raise UsageError(f"{url}: the state of a ShardDataset, which makes no batches: ask those of build_loader")
        return cls(record, open_order(record, moved, url), exclude)

    def at(self, step: int, rank: int | None = None) -> Step:
        """What a step handed over; one that is still to come will, if the run goes on as it did last.

        Args:
            step: of the training, from 0.
            rank: of whose share; None: all ranks', one after the other.

        Raises:
            UsageError: there was no such rank, or the run had excluded keys that are not known here.
        """
        *_, span = history(self.order.epochs, self.record, step + 1)
        start, steps, number = span.start, span.steps, step - span.step
        if rank is not None and not 0 <= rank < start.world_size:
            raise UsageError(f"rank {rank} is not in 0 ... {start.world_size - 1}, the ranks of step {step}")
        parts = [(each, *steps.part(number, each)) for each in (range(start.world_size) if rank is None else [rank])]
        positions = np.arange(parts[0][1], parts[-1][2])
        located = self._order_of(start).locate(span.epoch, positions)
        places = list(map(Place, *(column.tolist() for column in located[:3])))
        num_excluded = 0
        for source, mask in self._masks_of(start).items():
            for each in np.flatnonzero((located.source == source) & mask.holds(located.shard, located.sample_index)).tolist():
                places[each] = Place(source, *next(mask.after(*places[each][1:])))
                num_excluded += 1
        return Step(
            step=step,
            is_to_come=step >= self.record.step,
            epoch=span.epoch,
            position=self.order.epochs.start(span.epoch) + int(positions[0]),
            start=start,
            ranks=[each for each, low, high in parts for _ in range(low, high)],
            places=places,
            excluded=num_excluded,
        )

    def seen(self, places: Sequence[Place]) -> Iterator[Seen]:
        """Every time that samples were handed over, up to where the record stands, by step.

        Args:
            places: the samples.

        Raises:
            UsageError: see `at`.
        """
        start: Start | None = None
        for span in history(self.order.epochs, self.record, self.record.step):
            if span.start is not start:
                start, order = span.start, self._order_of(span.start)
                table = self._standing_for(places, start)
            low = order.epochs.start(span.epoch) + span.steps.start
            high = order.epochs.start(span.epoch) + span.steps.end(span.num_steps - 1)
            which, positions = order.positions_of(table[1], table[2], table[3], low, high)
            for each, place in zip(table[0][which].tolist(), (positions - low).tolist(), strict=True):
                number = min(place // start.batch_size, span.num_steps - 1)
                begin = number * start.batch_size
                size = span.steps.end(number) - span.steps.start - begin
                rank = ((place - begin + 1) * start.world_size - 1) // size  # the one whose part has it: see BatchPartition
                yield Seen(each, span.epoch, span.step + number, rank, start.world_size)

    def _order_of(self, start: Start) -> SampleOrder:
        """The order as a start knew it."""
        return self.order.before(sum(each.position <= start.position for each in self.record.generations))

    def _masks_of(self, start: Start) -> dict[int, Mask]:
        """Source -> what of it was excluded, from a start on."""
        held = {each.source: each for each in self.record.masks if each.position <= start.position}
        if lacking := held.keys() - self._masks.keys():
            number = min(lacking)
            raise UsageError(
                f"the run excluded {held[number].num_ids:,} keys of {self.names[number]} at or before step {start.step:,}: give "
                "the file with --exclude"
            )
        return {source: self._masks[source].first(each.num_ids) for source, each in held.items()}

    def _standing_for(self, places: Sequence[Place], start: Start) -> Ints:
        """(4, M) number of a sample; source, shard and sample index whose positions it fills: its own, unless it is excluded,
        and those of samples that it stands in for."""
        masks, rows = self._masks_of(start), []
        for number, (source, *place) in enumerate(places):
            mask = masks.get(source, Mask())
            own = [] if mask.holds(*np.array(place)[:, None])[0] else [place]
            rows += [(number, source, *each) for each in (*own, *mask.replaced_by(*place))]
        return np.array(rows, np.int64).reshape(-1, 4).T
